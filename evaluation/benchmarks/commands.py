"""This module times the commands of README.md and docs on a GPU, each after those that make what it reads."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKLWan
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from evaluation.benchmarks.measurements import header, markdown_table, measured_on, put_row, read_rows
from evaluation.benchmarks.timing import check_gpu
from moc.checkout import ROOT
from moc.errors import UserError
from moc.files import write_whole

KEY = ("gpu", "gpus", "name")  # what tells a row of the record from others
SMALL_STORY = "configs/scripts/storyworld.yaml"
README_STORY = {
    "title": "The lighthouse",
    "global": "[character] Ann: old, red coat. [environment] a lighthouse. [story] Night falls.",
    "size": [480, 832],
    "fps": 16,
    "negative": "blurry",
    "shots": [
        {"prompt": "Ann climbs the stairs.", "seconds": 4, "cut": True},
        {"prompt": "She lights the lamp.", "seconds": 4, "cut": False},
    ],
}


@dataclass(frozen=True)
class CommandsConfig:
    """These settings say what to time, and where what the commands make goes.

    folder: where what they make goes, about 90 GB in a folder for each commit.
    output: the record to write; a table of the same name, .md, comes to lie beside it.
    only: names of commands to time; null is all.
    """

    folder: str = "outputs/gpu_commands"
    output: str = "docs/benchmarks/gpu_commands.json"
    only: list[str] | None = None


@dataclass(frozen=True)
class Job:
    """A job is a command.

    arguments: what follows `python`.
    needs: the names of commands that make what it reads.
    makes: the folder that it writes, which is removed before it runs; null where it goes on in one.
    """

    arguments: list[str]
    needs: tuple[str, ...] = ()
    makes: Path | None = None


def plan(folder: Path, num_gpus: int) -> dict[str, Job]:
    """Returns the commands by name: those of data and of films that were made before, of training, of sampling."""
    jobs = data_jobs(folder) | training_jobs(folder) | using_jobs(folder)
    if num_gpus > 1:
        jobs |= team_jobs(folder, num_gpus)
    return jobs


def data_jobs(f: Path) -> dict[str, Job]:
    """Returns the commands that make data, and films by models that were trained before."""

    def prepare(name: str, source: Path | str, needs: tuple[str, ...], *settings: str) -> Job:
        arguments = ["scripts/prepare_data.py", f"input={source}", f"output={f / name}", *settings]
        return Job(arguments, needs, f / name)

    world = [f"output={f / 'world'}", "scenes=96", "size=[128,192]", "shots=[4,6,8]", "mode=recall"]
    wan = ["encoders=wan", f"encoders.codec.path={f / 'release/vae'}", f"encoders.text.path={f / 'release'}"]
    bunny = ["channels=32", "whitening=0.3", "still_detail=false"]
    friends = ["checkpoint=docs/checkpoints/recall_moc", "script=configs/scripts/recall.yaml", f"out={f / 'friends'}"]
    made, size = ("make_storyworld",), "size=[128,192]"
    words = f"encoders.text.path={f / 'world/vocabulary.txt'}"  # both sources of the mix use one text encoder
    return {
        "film by the kept model": Job(
            ["sample.py", *friends, "sampler.steps=24"], (), f / "friends"
        ),
        "demo": Job(["scripts/demo.py", f"output={f / 'demo'}"], (), f / "demo"),
        "make_storyworld": Job(["scripts/make_storyworld.py", *world], (), f / "world"),
        "prepare a manifest": prepare("prepared", f / "world", made, size),
        "prepare films": prepare("found", f / "world/videos", made, size, words),
        "prepare for Wan": prepare("wan_prepared", f / "world", made, size, *wan),
        "fetch a real film": Job(["scripts/example_film.py", f"output={f / 'film'}"], (), f / "film"),
        "prepare a real film": prepare(
            "bunny", f / "film", ("fetch a real film",), "size=[64,112]", "fps=8", "min_frames=1",
            *(f"encoders.codec.{setting}" for setting in bunny),
        ),
    }  # fmt: skip


def train(f: Path, name: str, steps: int, *settings: str, data: str | None = None, needs: tuple[str, ...] = ()) -> Job:
    """Returns the training of a run. data: the setting that names what it is trained on; null is the storyworld."""
    data, needs = (data, needs) if data else (f"data.path={f / 'prepared'}", ("prepare a manifest", *needs))
    paths = [data, f"output={f / 'runs'}", f"name={name}", "data.validation=2"]
    arguments = ["train.py", *paths, f"trainer.num_steps={steps}", "trainer.log_every=1", *settings]
    return Job(arguments, needs, f / "runs" / name)


BASE = ("model=base", "moc=paper", "data.batch_tokens=65536")
WAN = ("moc=paper", "data.batch_tokens=65536", "parallel.activation_checkpointing=true")


def training_jobs(f: Path) -> dict[str, Job]:
    """Returns the commands that train, and convert what they begin with."""
    schedule = "schedule=[{step: 0, chunk_tokens: 10240, top_k: 5}, {step: 5, chunk_tokens: 1280, top_k: 5}]"
    muon = ["optim.name=muon", 'optim.rates=[{match: "*.to_qkv.*"}, {match: "*", factor: 0}]']
    mix = f"{{path: {f / 'prepared'}, kind: multi, weight: 0.8}}, {{path: {f / 'found'}, weight: 0.2}}"
    lora = ["model.lora_rank=16", "model.lora_targets=[to_q,to_v]"]
    wan, high = ["model=wan", f"model.path={f / 'wan'}"], ["model=wan", f"model.path={f / 'HIGH'}"]

    def convert(name: str, source: Path, needs: str, *settings: str) -> Job:
        arguments = ["scripts/convert_checkpoint.py", f"input={source}", f"output={f / name}", *settings]
        return Job(arguments, (needs,), f / name)

    starts = {"base": ("model=base", *BASE[1:]), "Wan 1.3B": ("model=wan_1.3b", *WAN)}
    jobs = {"train storyworld": train(f, "small", 300, "experiment=storyworld", "data.batch_tokens=16384")}
    for name, settings in starts.items():
        for caches, needs in (("cold", ()), ("warm", (f"start {name} cold",))):
            run = f"start_{settings[0].removeprefix('model=')}_{caches}"
            jobs[f"start {name} {caches}"] = train(f, run, 2, *settings, "trainer.validate_every=0", needs=needs)
    return jobs | {
        "train base": train(f, "mine", 20, *BASE),
        "resume base": replace(train(f, "mine", 30, *BASE, needs=("train base",)), makes=None),
        "train by a schedule": train(f, "schedule", 10, *BASE, schedule),
        "train with muon": train(f, "muon", 10, *BASE, *muon),
        "train on a mix": train(
            f, "mix", 10, *BASE, data=f"data.sources=[{mix}]", needs=("prepare a manifest", "prepare films")
        ),
        "train on a real film": train(
            f, "bunny", 100, "experiment=bunny", data=f"data.path={f / 'bunny'}", needs=("prepare a real film",)
        ),
        "train Wan 1.3B": train(f, "wan", 5, "model=wan_1.3b", *WAN),
        "convert to diffusers": convert("wan", f / "runs/wan", "train Wan 1.3B", "dtype=bfloat16"),
        "convert to original names": convert("wan.safetensors", f / "wan", "convert to diffusers"),
        "convert to a run": convert(
            "HIGH", f / "wan.safetensors", "convert to original names", "form=checkpoint", "shift=12", "moc=paper"
        ),
        "fine-tune Wan 1.3B": train(f, "tuned", 3, *wan, *WAN, needs=("convert to diffusers",)),
        "train a LoRA on Wan 1.3B": train(f, "lora", 5, *wan, *lora, *WAN, needs=("convert to diffusers",)),
        "train a high-noise expert": train(
            f, "high", 3, *high, *WAN, "flow.shift=12", "flow.sigma_min=0.875", needs=("convert to a run",)
        ),
    }  # fmt: skip


def sample(f: Path, name: str, checkpoint: str, script: str | Path, *settings: str, needs: tuple[str, ...]) -> Job:
    paths = [f"checkpoint={f / 'runs' / checkpoint}", f"script={script}", f"out={f / 'films' / name}"]
    return Job(["sample.py", *paths, *settings], needs, f / "films" / name)


def using_jobs(f: Path) -> dict[str, Job]:
    """Returns the commands that evaluate and sample what was trained."""
    runs, films = f / "runs", f / "films"
    pair = [f"low_noise_checkpoint={runs / 'wan'}", "shift=12", "sampler.high_noise_guidance_scale=4", "offload=true"]
    small = ("train storyworld",)
    judged = [f"films=[{films / 'staggered'},{films / 'joint'}]", f"page={f / 'report.html'}", f"output={f / 'r.json'}"]
    evaluate = ["scripts/evaluate.py", f"checkpoint={runs / 'mine'}", f"data.path={f / 'prepared'}"]
    return {
        "evaluate": Job(evaluate, ("train base",)),
        "sample shot by shot": sample(f, "mine", "mine", f / "story.yaml", needs=("train base",)),
        "sample staggered": sample(f, "staggered", "small", SMALL_STORY, "sampler=staggered", needs=small),
        "sample joint": sample(f, "joint", "small", SMALL_STORY, "sampler=joint", needs=small),
        "judge films": Job(["scripts/evaluate.py", *judged], ("sample staggered", "sample joint")),
        "sample a LoRA of Wan 1.3B": sample(f, "lora", "lora", SMALL_STORY, needs=("train a LoRA on Wan 1.3B",)),
        "sample two experts": sample(
            f, "experts", "high", SMALL_STORY, *pair, needs=("train a high-noise expert", "train Wan 1.3B")
        ),
    }


def team_jobs(f: Path, num_gpus: int) -> dict[str, Job]:
    """Returns the commands that several GPUs share."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_gpus)]
    team = f"parallel.sequence={num_gpus}"
    large = ["model=3b", *WAN, f"parallel.shard={num_gpus}"]
    jobs = {
        "prepare films": data_jobs(f)["prepare films"],
        "train base": train(f, "spread", 20, *BASE),
        "train 3b in shards": train(f, "3b", 3, *large),
        "sample by sequence": sample(f, "team", "small", SMALL_STORY, team, needs=("train storyworld",)),
    }
    return {f"{name}, all GPUs": replace(job, arguments=[*launch, *job.arguments]) for name, job in jobs.items()}


def write_record(config: CommandsConfig) -> bool:
    """Runs the commands and writes their record; returns whether all ended well."""
    check_gpu()
    head = header() | {"gpus": torch.cuda.device_count()}
    folder, output = Path(config.folder).resolve() / str(head["commit"])[:7], Path(config.output)
    jobs = plan(folder, head["gpus"])
    unknown = set(config.only or ()) - jobs.keys()
    if unknown:
        raise UserError(f"only={sorted(unknown)} names no command; there are {', '.join(jobs)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "story.yaml").write_text(yaml.safe_dump(README_STORY, sort_keys=False))
    here = [row for row in read_rows(output) if all(row[key] == head[key] for key in ("gpu", "gpus", "commit"))]
    recorded = {row["name"] for row in here if row["exit_code"] == 0}
    session = Session(jobs, folder, output, head)
    ended_well = [session.time(name) for name in config.only or jobs if name not in recorded]
    return all(ended_well)


class Session:
    """A session runs commands, each after those that it needs, and puts their rows into the record."""

    def __init__(self, jobs: dict[str, Job], folder: Path, output: Path, head: dict) -> None:
        self._jobs, self._folder, self._output, self._head = jobs, folder, output, head
        self._ended: dict[str, bool] = {}

    def time(self, name: str) -> bool:
        """Runs a command, unless it ran before in this session; returns whether it ended well."""
        if name not in self._ended:
            self._ended[name] = self._run(name, self._jobs[name])
        return self._ended[name]

    def _made(self, name: str) -> bool:
        return (self._folder / "done" / name).exists() or self.time(name)

    def _run(self, name: str, job: Job) -> bool:
        lacking = [need for need in job.needs if not self._made(need)]
        if lacking:
            print(f"{name}: left out, since it needs {', '.join(lacking)}", flush=True)
            return False
        if job.makes:
            remove(job.makes)
        if name == "prepare for Wan":
            save_release(self._folder / "release")
        log = self._folder / "logs" / f"{name}.log"
        row = start(job, log, name) if name.startswith("start ") else run(job.arguments, log)
        print(f"{name}: {row['seconds']} s, exit code {row['exit_code']}", flush=True)
        rows = put_row(self._output, {"name": name} | row, KEY, self._head)
        write_whole(self._output.with_suffix(".md"), page(rows, self._folder).encode())
        if row["exit_code"] == 0:
            write_whole(self._folder / "done" / name, b"")
        if job.makes and not any(name in other.needs for other in self._jobs.values()):
            remove(job.makes / "checkpoints")  # a checkpoint of 1.3 B weights and their optimizer takes 22 GB
        return row["exit_code"] == 0


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def save_release(folder: Path) -> None:
    """Saves encoders as a diffusers pipeline of Wan2.1 holds them, with random weights: its VAE, and a text encoder of
    its width, but of one layer and few words."""
    torch.manual_seed(0)
    vae: Any = AutoencoderKLWan()
    vae.save_pretrained(folder / "vae")
    text = UMT5Config(vocab_size=16, d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=2)
    UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("\u2581meadow", -1.0)]
    T5Tokenizer(vocab=words, extra_ids=0).save_pretrained(folder / "tokenizer")


def run(arguments: list[str], log: Path, settings: dict[str, str] | None = None, until: Path | None = None) -> dict:
    """Runs `python ARGUMENTS`, what it says going to `log`; returns its row.

    settings: added to its environment. until: the metrics of a training whose second step ends the row's seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with log.open("w") as said:
        command, environment = [sys.executable, *arguments], os.environ | (settings or {})
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while until and process.poll() is None and '"step": 2' not in (until.read_text() if until.exists() else ""):
            time.sleep(0.05)
        if until is None:
            process.wait()
        seconds = round(time.perf_counter() - began, 1)
    return {"command": arguments, "seconds": seconds, "exit_code": process.wait()}


def start(job: Job, log: Path, name: str) -> dict:
    """Runs a training to the end of its second step, with a cache of compiled kernels of its own, empty at first."""
    model, caches = name.rsplit(" ", 1)
    kernels = log.parents[1] / "kernels" / model
    if caches == "cold":
        remove(kernels)
    assert job.makes
    row = run(job.arguments, log, {"TRITON_CACHE_DIR": str(kernels)}, job.makes / "metrics.jsonl")
    remove(job.makes / "checkpoints")
    return row


def page(rows: list[dict], folder: Path) -> str:
    """Returns the record as a Markdown page, in which paths are shortened to `folder`."""
    about = (
        f"{measured_on(rows)} Each command in a fresh process, imports and start-up included, after others, so that it "
        "finds compiled kernels, or beside others on one host; `start` rows have a cache of kernels of their own, and "
        "end with the second step. Made by scripts/benchmark_commands.py."
    )
    lines = []
    for row in rows:
        told = " ".join(row["command"]).replace(f"{folder}/", "").replace("|", "\\|")
        gpus, commit = f"{row['gpus']} {row['gpu']}", str(row["commit"])[:7]
        lines.append([row["name"], gpus, f"{row['seconds']:.0f}", row["exit_code"], commit, f"`python {told}`"])
    columns = ["what", "GPUs", "s", "exit code", "commit", "command"]
    return f"# Every command on a GPU\n\n{about}\n\n{markdown_table(columns, lines)}\n"
