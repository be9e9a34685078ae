"""This module joins a process to those that were started with it, and finds its device."""

import ctypes
import os
import signal
import sys
from datetime import timedelta

import torch
from accelerate import PartialState

from moc.errors import UserError

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # of torch and of MPI


def join_processes(cpu: bool, timeout: float) -> PartialState:
    """Returns this process among those that `accelerate launch`, torchrun or a plain `python` started.

    cpu: whether they compute on the CPU although there is a GPU. timeout: seconds that they wait for each other at
    most. Raises UserError where accelerate was asked for several processes and started one.
    """
    environment = os.environ.keys()
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environment and environment.isdisjoint(_WORLD_SIZES):
        raise UserError(
            "accelerate launch was asked for several processes and started one: it hands them to torch's launcher with "
            "--multi_gpu only; say that, which needs no GPU, and leave --cpu out"
        )
    if "TORCHELASTIC_RUN_ID" in environment:
        _end_with_launcher()
    on_cpu = cpu or not torch.cuda.is_available()  # where it is not told so, accelerate overlooks the other processes
    return PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout))


def _end_with_launcher() -> None:
    """Has Linux send SIGTERM to this process when torch's launcher dies, which started it and alone would end it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def visible_gpus() -> list[str]:
    """Returns the devices that `device=auto` takes before the CPU: "cuda:0" and so on."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def find_device(name: str, state: PartialState) -> torch.device:
    """Returns this process's device, as `ParallelConfig.device` names it. Raises UserError where torch finds none of
    that name."""
    here = visible_gpus()
    if name == "cpu" or (name == "auto" and not here):
        return torch.device("cpu")
    if name not in ("auto", "cuda") and state.num_processes > 1:
        raise UserError(f"device={name} is one for {state.num_processes} processes; say auto, which gives each its own")
    found = f"cuda:{state.local_process_index}" if name in ("auto", "cuda") else name
    if found not in here:
        names = ", ".join(["auto", "cpu", *here])
        raise UserError(f"device={name} is none that torch {torch.__version__} finds here; say one of {names}")
    return torch.device(found)
