"""`Parallel` owns the processes of a command, its device and its precision; nobody else chooses them.

Processes form a mesh of replicate x shard x sequence. Those along `sequence` hold one stream together (`moc.exchange`);
all others have samples of their own. Weights, averages and the optimizer's states are sharded over shard x sequence
(FSDP2) and replicated besides; without either axis every process has them whole (DDP). Models are single-device code;
what spreads them is built once, here, from outside.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moc.errors import UserError, check_least, disk_error
from moc.exchange import Exchange
from moc.move import move
from moc.training.integer_shards import integer_shards
from moc.training.interruption import ignore_signals
from moc.training.offload import OffloadActivations
from moc.training.peers import sign_in, silent, take_leave
from moc.training.processes import find_device, join_processes
from moc.training.swap import Swap

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PATIENT = timedelta(days=1)  # processes wait at most this long for one that writes files
# These words tell of a lost connection, since gloo has no error type of its own.
_BROKEN = re.compile(r"/gloo/\S+:\d+\]|pair closure|\bNCCL\b")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """These settings say how the processes of a command share its work and its weights.

    sequence: how many processes hold a stream together; they divide the model's heads. shard: over how many processes
    with samples of their own the weights are sharded, and over those of the streams besides; where nothing is trained
    these make the same film. replicate: how often that is repeated; null is as often as there are processes for."""

    replicate: int | None = None
    shard: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        check_least(self, "parallel", 1, "shard", "sequence")
        check_least(self, "parallel", 1, "replicate", null="as often as there are processes for")


@dataclass(frozen=True)
class ParallelConfig(MeshConfig):
    """These settings say where and how a step is computed.

    device: auto (the GPU of this process, the CPU where there is none), cpu, cuda, or one GPU, such as cuda:1.
    precision: what every forward pass computes in, in training or not: auto (bf16 on a GPU, fp32 on the CPU), fp32 or
    bf16.
    accumulation: micro-batches a step on each process.
    activation_checkpointing: recompute blocks in backward; routes are kept.
    keep_attention: keep the attention's output too, 2 bytes a number in bf16, and recompute all else.
    recompute_sublayers: recompute the sublayers of such a block once more, one at a time: less memory for one
    more forward.
    offload_activations: keep large tensors that backward needs in the host's memory.
    swap_blocks: keep the frozen weights of so many blocks in the host's memory, each of which comes while the block
    before it computes; it needs activation_checkpointing.
    timeout: seconds after which processes that wait for another one end the job and name it.
    """

    device: str = "auto"
    precision: str = "auto"
    accumulation: int = 1
    activation_checkpointing: bool = False
    keep_attention: bool = False
    recompute_sublayers: bool = False
    offload_activations: bool = False
    swap_blocks: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in ("auto", *PRECISIONS):
            raise UserError(f"precision={self.precision!r} is not one of auto, {', '.join(PRECISIONS)}")
        check_least(self, "parallel", 1, "accumulation", "timeout")
        check_least(self, "parallel", 0, "swap_blocks")
        for name in ("keep_attention", "swap_blocks", "recompute_sublayers"):
            if getattr(self, name) and not self.activation_checkpointing:
                raise UserError(
                    f"parallel.{name}={getattr(self, name)} needs blocks to be computed once more in backward: set "
                    "parallel.activation_checkpointing=true"
                )
        if self.swap_blocks and (self.shard > 1 or self.sequence > 1):
            raise UserError(
                f"parallel.swap_blocks={self.swap_blocks} is for weights that every process has whole: take it without "
                "parallel.shard and parallel.sequence, which shard them"
            )

    def set_recomputation(self, model: Any) -> None:
        """Has a model keep what backward needs, or compute it once more, as these settings say."""
        if self.activation_checkpointing:
            model.enable_gradient_checkpointing()
            model.keeps_attention = self.keep_attention
        if self.recompute_sublayers:
            model.recompute_sublayers()


class Parallel:
    """`Parallel` knows this process among those of a command: rank, world_size, device, and dtype, that of its forward
    passes.

    data_rank, data_ranks: rank and number among the processes with samples of their own; those that hold a stream
    together count as one. saving: a context in which a forward pass keeps what its backward needs where the
    configuration says; offloads: whether that is the host's memory. is_sharded: whether forward passes of all processes
    must keep step. team, num_teams: which team of processes this one belongs to, where those that hold a model together
    make one thing together; leads: whether it is its first.
    Raises UserError for a device that does not exist, for a mesh that the processes do not fill, and where accelerate
    started one process of several.
    """

    def __init__(self, config: ParallelConfig | None = None) -> None:
        config = config or ParallelConfig()
        self._state, self._timeout = join_processes(config.device == "cpu", config.timeout), config.timeout
        self.rank, self.world_size = self._state.process_index, self._state.num_processes
        self.device = find_device(config.device, self._state)
        has_gpu = self.device.type == "cuda"
        if has_gpu:
            torch.cuda.set_device(self.device)  # kernels that we launch ourselves go to the current one
        precision = ("bf16" if has_gpu else "fp32") if config.precision == "auto" else config.precision
        self.dtype = PRECISIONS[precision]
        self.file_group: Any = None  # the group of the processes as they write files together
        if self.world_size > 1:
            sign_in()
            self._hosts = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout))
            self.file_group = dist.new_group(backend="gloo", timeout=_PATIENT)
        self._swap_blocks = config.swap_blocks
        self.offloads = config.offload_activations
        self._waiting: Callable[[], AbstractContextManager] = nullcontext
        self.saving = OffloadActivations(self.device) if self.offloads else nullcontext()
        self._check_mesh(config)
        self.data_rank, self.data_ranks = self.rank // config.sequence, self.world_size // config.sequence
        self._data_group = self._exchange = None
        if config.sequence > 1:
            mesh = self._mesh(data=self.data_ranks, sequence=config.sequence)
            self._data_group, group = mesh.get_group("data"), mesh.get_group("sequence")
            self._exchange = Exchange(group, self.rank % config.sequence, config.sequence)
        shards = config.shard * config.sequence
        self.is_sharded = shards > 1
        self.team, self.num_teams = self.rank // shards, self.world_size // shards
        self.leads = self.rank % shards == 0
        if self.is_sharded:
            mesh = self._mesh(replicate=self.num_teams, shard=shards)
            self._shard_mesh = mesh if mesh.size(0) > 1 else mesh["shard"]
        if self.is_main:
            name = f"{self.device_name} ({self.device})" if has_gpu else self.device_name
            processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
            logger.info("running on %s, precision %s, %s", name, precision, processes)

    @property
    def is_main(self) -> bool:
        """Returns whether this process writes the files and the log."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """Returns what the device is called."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "the CPU"

    def autocast(self) -> AbstractContextManager:
        """Returns the precision of a forward pass. Casts of sharded weights are not kept, as the weights are not."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled, cache_enabled=not self.is_sharded)

    def launching(self) -> AbstractContextManager:
        """While it lasts, this thread alone does what is left to do on the CPU beside a GPU, which is work on small
        tables: of many threads it would wait for the slowest one, and the GPU would wait with it."""
        return _one_thread() if self.device.type == "cuda" else nullcontext()

    def timed_by(self, waiting: Callable[[], AbstractContextManager]) -> None:
        """Has sums, and the exchange of models that are spread later, wait for other processes in this context."""
        self._waiting = waiting
        if self._exchange:
            self._exchange = replace(self._exchange, waiting=waiting)

    def put(self, tensor: Tensor) -> Tensor:
        """Returns the tensor on this process's device."""
        return move(tensor, self.device)

    def wrap(self, model: Any) -> nn.Module:
        """Returns a model as the training loop calls it, on the device: its gradients are averaged over all processes.
        Raises UserError where no blocks can be swapped."""
        if not self._swap_blocks:
            self.spread(model)
        else:
            Swap(model, self._swap_blocks, self.device)
            # DDP would send weights from the main process, all on one device; frozen ones are alike without.
            frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        if self.is_sharded or self.world_size == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def spread(self, model: Any) -> None:
        """Puts a model, in place, on the device or on those of the processes that hold it together: where it is
        sharded, each of its `blocks` is gathered while it computes."""
        model.exchange = self._exchange
        if not self.is_sharded:
            nn.Module.to(model, self.device)  # diffusers' own `to` imports peft, a second of every command
            return
        model.anyone = self.any_of_team
        # It warns of results that are inputs handed through, lest they be changed in place; the models change none.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        model.register_forward_hook(lambda *call: list(call[-1]))  # FSDP looks for gradients in lists
        with integer_shards():
            for unit in (*model.blocks, model):
                fully_shard(unit, mesh=self._shard_mesh, reshard_after_forward=True)

    def share(self, value: Result) -> Result:
        """Returns the value of the team's first process, on each of the team."""
        if not self.is_sharded:
            return value
        values = [value]
        group = self._shard_mesh.get_group("shard")
        dist.broadcast_object_list(values, dist.get_global_rank(group, 0), group)
        return values[0]

    def any_of_team(self, flag: bool) -> bool:
        """Returns whether the flag is set on any process of the team."""
        if not self.is_sharded:
            return flag
        number = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(number, group=self._shard_mesh.get_group("shard"))
        return bool(number)

    def sum_over_heads(self, values: Tensor) -> Tensor:
        """Returns the sum over the processes that hold a stream, each of which has some heads; on each of them."""
        if self._exchange:
            values = values.clone()
            dist.all_reduce(values, group=self._exchange.group)
        return values

    def keep_gradients(self, model: nn.Module) -> AbstractContextManager:
        """While it lasts, backward adds to this process's own gradients of a wrapped model and averages none. Those of
        a sharded one are averaged each time: whole ones would not fit."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum over all processes with samples of their own, on each process."""
        if self.data_ranks > 1:
            values = values.clone()
            with self._waiting():
                dist.all_reduce(values, group=self._data_group)
        return values

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set on any process. It travels between the hosts, waiting for no device."""
        if self.world_size == 1:
            return flag
        number = torch.tensor(int(flag))
        dist.all_reduce(number, group=self._hosts)
        return bool(number)

    def gather(self, value: Result) -> list[Result]:
        """Returns the values of all processes, on each of them. It waits for those that write files beyond the timeout,
        and may run in a thread of its own beside the training."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.file_group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises on all processes what one of them raises within the block, as a UserError or an OSError where it is
        one. They must not wait for each other within."""
        failure: Exception | None = None
        told: tuple[type[Exception], tuple] | None = None
        try:
            yield
        except Exception as error:
            failure, told = error, self._for_others(error)
        elsewhere = [one for one in self.gather(told) if one]
        if failure:
            raise failure
        if elsewhere:
            kind, arguments = elsewhere[0]
            raise kind(*arguments)

    def _for_others(self, error: Exception) -> tuple[type[Exception], tuple]:
        """Returns what the other processes raise where this one has raised an error: the type and its arguments."""
        where = f"rank {self.rank}"
        if isinstance(error, OSError) and error.errno:  # the number chooses the type, such as PermissionError
            return OSError, (error.errno, f"{where}: {error.strerror}", error.filename)
        told = disk_error(error)
        if isinstance(error, UserError) or told:
            return UserError, (f"{where}: {error}",)
        return RuntimeError, (f"{where} failed: {error!r}",)

    @contextmanager
    def naming_absent(self) -> Iterator[None]:
        """Raises UserError that names the processes that are dead or hang, where one of the others waits in vain."""
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not (isinstance(error, dist.DistError) or _BROKEN.search(str(error))):
                raise
            raise self._waited_in_vain() from error

    def _waited_in_vain(self) -> UserError:
        ignore_signals()  # launchers end what a dead process has left, and mean no end that a scheduler asked for
        absent = ", ".join(silent(min(10.0, self._timeout))) or "none, so the network may have failed"
        return UserError(
            f"a process waited in vain (parallel.timeout={self._timeout:g} seconds); those that do not answer: "
            f"{absent}. Look at their logs and hosts; the same command goes on from the newest checkpoint"
        )

    def of_main(self, make: Callable[[], Result]) -> Result:
        """Returns what the main process makes, on all of them, or raises what it raises; the others make none."""
        with self.together():
            made = [make()] if self.is_main else []
        return gather_lists(made)[0]

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self._state.wait_for_everyone()

    def close(self) -> None:
        """Takes leave of the other processes."""
        if self.world_size > 1:
            take_leave()
        self._state.destroy_process_group()

    def _check_mesh(self, config: ParallelConfig) -> None:
        """Raises UserError unless the processes fill the mesh."""
        size = (config.replicate or 1) * config.shard * config.sequence
        if self.world_size % size or (config.replicate and self.world_size != size):
            wanted = "divide" if not config.replicate else "be"
            axes = f"replicate={config.replicate or 'null'}, shard={config.shard}, sequence={config.sequence}"
            raise UserError(
                f"parallel.{axes}: their product {size} must {wanted} the number of processes, {self.world_size}; "
                "change one of them, or start other processes (replicate=null takes what is left over)"
            )

    def _mesh(self, **axes: int) -> DeviceMesh:
        return init_device_mesh(self.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def gather_lists(values: list) -> list:
    """Returns the lists of all processes, one after another, on each of them."""
    if not dist.is_initialized():
        return values
    lists: list = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for one in lists for value in one]
