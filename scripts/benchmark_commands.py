"""Times the README's commands on a GPU, one after another, each in a fresh process as a user starts it:
python scripts/benchmark_commands.py [folder=DIR] [only=[NAME,...]]

There is no public checkpoint: Wan's are random weights of the 1.3B shape. A command's output goes to folder/logs/. One
that fails does not end the others; the exit status then is 1.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import yaml

from configs.command import command
from moc.errors import UserError
from moc.files import write_whole
from scripts.measuring import check_gpu, header, markdown_table
from scripts.rows import ROOT, measured_on, put_row

KEY = ("gpu", "gpus", "name")  # what tells a row of the record from others
SMALL_STORY = "configs/scripts/storyworld.yaml"
README_STORY = {
    "title": "The lighthouse",
    "global": "[character] Ann: old, red coat. [environment] a lighthouse. [story] Night falls.",
    "size": [480, 832],
    "fps": 16,
    "negative": "blurry",
    "shots": [
        {"prompt": "Ann climbs the stairs.", "seconds": 8, "cut": True},
        {"prompt": "She lights the lamp.", "seconds": 8, "cut": False},
    ],
}


@dataclass(frozen=True)
class CommandsConfig:
    """Sets what to time, and where what the commands make goes.

    folder: where what they make goes, about 60 GB.
    output: the record to write; a table of the same name, .md, comes to lie beside it.
    only: names of commands to run again; the rows of the others stay.
    """

    folder: str = "outputs/gpu_commands"
    output: str = "docs/benchmarks/gpu_commands.json"
    only: list[str] = field(default_factory=list)


def plan(folder: Path, num_gpus: int) -> dict[str, list[str]]:
    """Returns the commands by name, each as what follows `python`; later ones need what earlier ones made."""
    f, runs = folder, folder / "runs"
    story = f / "story.yaml"

    def train(name: str, steps: int, *settings: str) -> list[str]:
        paths = [f"data.path={f / 'prepared'}", f"output={runs}", f"name={name}", "data.validation=2"]
        return ["train.py", *paths, f"trainer.num_steps={steps}", "trainer.log_every=1", *settings]

    def sample(name: str, checkpoint: Path, script: str | Path, *settings: str) -> list[str]:
        return ["sample.py", f"checkpoint={checkpoint}", f"script={script}", f"out={f / 'films' / name}", *settings]

    base = ["model=base", "moc=paper", "data.batch_tokens=65536"]
    wan = ["moc=paper", "data.batch_tokens=65536", "parallel.activation_checkpointing=true"]
    lora = ["model=wan", f"model.path={f / 'wan'}", "model.lora_rank=16", "model.lora_targets=[to_q,to_v]"]
    schedule = "schedule=[{step: 0, chunk_tokens: 10240, top_k: 5}, {step: 5, chunk_tokens: 1280, top_k: 5}]"
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_gpus)]
    world = [f"output={f / 'world'}", "scenes=160", "size=[128,192]", "shots=[4,6,8]", "mode=recall"]
    prepare, convert = "scripts/prepare_data.py", "scripts/convert_checkpoint.py"
    pair = [f"low_noise_checkpoint={runs / 'lora'}", "shift=12", "sampler.high_noise_guidance_scale=4", "offload=true"]
    commands = {
        "demo": ["scripts/demo.py", f"output={f / 'demo'}"],
        "make_storyworld": ["scripts/make_storyworld.py", *world],
        "prepare a manifest": [prepare, f"input={f / 'world'}", f"output={f / 'prepared'}", "size=[128,192]"],
        "prepare films": [prepare, f"input={f / 'world/videos'}", f"output={f / 'found'}", "size=[128,192]"],
        "train storyworld": train("small", 300, "experiment=storyworld", "data.batch_tokens=16384"),
        **{
            f"start {name} {caches}": train(f"start_{kind}_{caches}", 2, *settings, "trainer.validate_every=0")
            for name, kind, settings in (("base", "base", base), ("Wan 1.3B", "wan", ["model=wan_1.3b", *wan]))
            for caches in ("cold", "warm")
        },
        "train base": train("mine", 20, *base),
        "resume base": train("mine", 30, *base),
        "train by a schedule": train("schedule", 10, *base, schedule),
        "train base, all GPUs": [*launch, *train("spread", 20, *base)],
        "train Wan 1.3B": train("wan", 5, "model=wan_1.3b", *wan),
        "convert to diffusers": [convert, f"input={runs / 'wan'}", f"output={f / 'wan'}", "dtype=bfloat16"],
        "convert to original names": [convert, f"input={f / 'wan'}", f"output={f / 'wan.safetensors'}"],
        "train a LoRA on Wan 1.3B": train("lora", 5, *lora, *wan),
        "evaluate": ["scripts/evaluate.py", f"checkpoint={runs / 'mine'}", f"data.path={f / 'prepared'}"],
        "sample shot by shot": sample("mine", runs / "mine", story),
        "sample staggered": sample("staggered", runs / "small", SMALL_STORY, "sampler=staggered"),
        "sample joint": sample("joint", runs / "small", SMALL_STORY, "sampler=joint"),
        "sample a LoRA of Wan 1.3B": sample("lora", runs / "lora", SMALL_STORY),
        "sample two experts": sample("experts", runs / "wan", SMALL_STORY, *pair),
    }
    if num_gpus < 2:
        del commands["train base, all GPUs"]
    return commands


@command("benchmark_commands", CommandsConfig)
def main(config: CommandsConfig) -> None:
    check_gpu()
    folder, output = Path(config.folder).resolve(), Path(config.output)
    commands = plan(folder, torch.cuda.device_count())
    unknown = set(config.only) - commands.keys()
    if unknown:
        raise UserError(f"only={sorted(unknown)} names no command; there are {', '.join(commands)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "story.yaml").write_text(yaml.safe_dump(README_STORY, sort_keys=False))
    head = header() | {"gpus": torch.cuda.device_count()}
    failed = False
    for name in config.only or commands:
        log = folder / "logs" / f"{name}.log"
        row = start(commands[name], log, name) if name.startswith("start ") else run(commands[name], log)
        print(f"{name}: {row['seconds']} s, exit code {row['exit_code']}", flush=True)
        rows = put_row(output, {"name": name} | row, KEY, head)
        write_whole(output.with_suffix(".md"), table(rows, folder).encode())
        failed |= row["exit_code"] != 0
    if failed:
        sys.exit(1)


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


def start(arguments: list[str], log: Path, name: str) -> dict:
    """Runs a training to the end of its second step, with a cache of compiled kernels of its own, empty at first."""
    kernels = log.parents[1] / name.rsplit(" ", 1)[0].replace(" ", "_")
    given = dict(argument.split("=", 1) for argument in arguments[1:])
    metrics = Path(given["output"]) / given["name"] / "metrics.jsonl"
    return run(arguments, log, {"TRITON_CACHE_DIR": str(kernels)}, metrics)


def table(rows: list[dict], folder: Path) -> str:
    """Returns the record as a Markdown page, in which paths are shortened to `folder`."""
    about = (
        f"{measured_on(rows)} Each command in a fresh process, imports and start-up included, one after another on one "
        "machine, so that later ones find compiled kernels; `start` rows have a cache of kernels of their own, and end "
        "with the second step. Made by scripts/benchmark_commands.py."
    )
    lines = []
    for row in rows:
        told = " ".join(row["command"]).replace(f"{folder}/", "").replace("|", "\\|")
        gpus, commit = row["gpus"], str(row["commit"])[:7]
        lines.append([row["name"], gpus, f"{row['seconds']:.0f}", row["exit_code"], commit, f"`python {told}`"])
    columns = ["what", "GPUs", "s", "exit code", "commit", "command"]
    return f"# Every command on a GPU\n\n{about}\n\n{markdown_table(columns, lines)}\n"


if __name__ == "__main__":
    main()
