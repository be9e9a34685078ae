"""What ends a command in one line, and what keeps its traceback."""

import errno
import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from tqdm import tqdm

import data.loading.loader  # noqa: F401 - it takes open_dataset from its module, before the tests replace it there
from configs.command import BesideBars, for_user, message_of
from configs.overrides import readable
from data.errors import DataError
from moc.errors import UserError
from tests.pipeline import ROOT, command, refusal


@pytest.mark.parametrize(
    "error",
    [
        UserError("seed=x"),
        DataError("zero-byte", "a.mp4", "the file is empty"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a"),
        PermissionError("no right"),
        OSError(errno.ENOSPC, "No space left on device"),
        ConnectionResetError("reset"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error):
    assert for_user(error)
    assert "\n" not in message_of(error)


@pytest.mark.parametrize(
    "error", [ValueError("zip() argument 2 is shorter"), KeyError("x"), OSError("odd"), OSError(errno.EBADF, "bad")]
)
def test_a_bug_is_not_for_the_user(error):
    assert not for_user(error)


def test_errors_of_files_name_the_file():
    assert message_of(FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b")) == (
        "a/b: No such file or directory"
    )
    assert message_of(UserError("two\n  lines")) == "two lines"


def test_a_disk_that_is_full_or_read_only_says_what_to_do():
    for number in (errno.ENOSPC, errno.EDQUOT):
        full = OSError(number, os.strerror(number), "shots/02.mp4")
        assert message_of(full) == f"shots/02.mp4: {full.strerror}; free some or choose another folder, then run again"
    frozen = OSError(errno.EROFS, os.strerror(errno.EROFS), "disc/film")
    assert message_of(frozen) == f"disc/film: {frozen.strerror}; choose a folder that can be written"


def test_a_bug_keeps_its_traceback(capsys, monkeypatch, tmp_path):
    def broken(*_):
        return list(zip([1], [1, 2], strict=True))

    monkeypatch.setattr("configs.world.open_dataset", broken)
    said = refusal(capsys, "train.py", f"output={tmp_path}", "parallel=cpu")
    assert "Traceback" in said
    assert "in broken" in said
    assert "ValueError: zip() argument 2 is longer" in said


def test_an_error_has_a_line_of_its_own_below_a_progress_bar(capsys, monkeypatch):
    def full_disk(*_):
        sys.bar = tqdm(total=3, desc="read")  # kept alive, as a traceback keeps a loop's bar alive
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("configs.world.open_dataset", full_disk)
    monkeypatch.setattr(sys, "bar", None, raising=False)
    with pytest.raises(SystemExit, match="error: No space left on device"):
        command("train.py", "parallel=cpu")
    assert capsys.readouterr().err.endswith("\n")


@pytest.mark.parametrize(("words", "line"), [([], "interrupted"), (["it goes on"], "interrupted; it goes on")])
def test_an_interrupt_is_one_line(capsys, monkeypatch, words, line):
    def interrupted(config, *_):
        raise KeyboardInterrupt(*words)

    monkeypatch.setattr("configs.world.open_dataset", interrupted)
    with pytest.raises(SystemExit) as ending:
        command("train.py", "parallel=cpu")
    assert ending.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == line


IMPORTED = """
import os, runpy, signal, sys

class Interrupting:
    @staticmethod
    def find_spec(name, path, target=None):
        if name in {"torch", "numpy", "tqdm", "hydra"}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, getattr(signal, sys.argv.pop()))
sys.meta_path.insert(0, Interrupting)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SCRIPTS = [file for file in sorted((ROOT / "scripts").glob("*.py")) if '__name__ == "__main__"' in file.read_text()]


@pytest.mark.parametrize("name", ["train.py", "sample.py", *(f"scripts/{file.name}" for file in SCRIPTS)])
def test_an_interrupt_while_a_command_imports_is_one_line(name):
    """It comes as the first library is looked for."""
    arguments = [sys.executable, "-c", IMPORTED, name]
    ended = subprocess.run([*arguments, "default_int_handler"], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_a_command_in_the_background_goes_on_ignoring_an_interrupt():
    arguments = [sys.executable, "-c", IMPORTED, "scripts/make_storyworld.py", "--help", "SIG_IGN"]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(("given", "taken"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_sleep_while_they_wait_unless_they_are_told_not_to(given, taken):
    """Threads that keep their cores busy hold up the other commands on the machine."""
    others = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    arguments = [sys.executable, "-c", "import configs.importing, os; print(os.environ['OMP_WAIT_POLICY'])"]
    ended = subprocess.run(arguments, cwd=ROOT, env=others | given, capture_output=True, text=True)
    assert ended.stdout.split() == [taken]


# The command line

TEXTS = ["/films [1]/a=b", "it's", "it's [1]", "a\\'[", "b[\\", "(1).mp4", "~/films", "{a}b", 'a"b', "é ü", "a, b [c]"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_arrive_as_they_were_typed(text):
    argument = readable(f"data.path={text}", ROOT / "configs")
    assert OverridesParser.create().parse_override(argument).value() == text


@pytest.mark.parametrize(
    "argument",
    ["optim.betas=[0.9,0.95]", "a={b: 1}", "a='x [1]'", "a=1,2", "+a=null", "~a", "--multirun", "-m", "a=[b}]"],
)
def test_what_hydra_can_read_is_left_as_it_is(argument):
    assert readable(argument, ROOT / "configs") == argument


def test_a_path_with_brackets_is_a_path(capsys, tmp_path):
    said = refusal(capsys, "train.py", f"data.path={tmp_path}/films [1]", "parallel=cpu")
    assert said.startswith(f"error: {tmp_path}/films [1]: no such folder")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("optim=null", "optim is a group of settings; leave it out or choose one of adamw"),
        ("moc=[dense,1]", "moc is a group of settings; leave it out or choose one of dense, forward"),
        ("data.path=[2024]", "data.path: Cannot convert .* quote a text with brackets twice"),
        ("experiment=none", "experiment=none does not exist; choose one of bunny, .*storyworld"),
        ("model=bas", "model=bas does not exist; choose one of 3b, base, debug, small"),  # "schema" is not offered
        ("hydra/launcher=none", "hydra/launcher=none does not exist; choose one of basic"),
        ("debug", "debug is no setting; say KEY=VALUE, without dashes or spaces"),
        ("data.path = x", r"data\.path is no setting; say KEY=VALUE"),
        ("--data.path=x", r"--data\.path=x is no setting; say KEY=VALUE"),
        ("--experiment=debug", "--experiment=debug is no setting"),
        ("--lr 3", "--lr is no setting"),
        ("trainer.steps=3", r"no setting trainer\.steps; did you mean .*trainer\.num_steps"),
        ("stepss=3", r"no setting stepss; did you mean .*trainer\.num_steps"),
        ("optm.lr=3", r"no setting optm\.lr; did you mean optim\.lr\?"),
        ("zzz=3", "no setting zzz; --help lists all"),
        ("optim.args.momentum=0.9", r"no setting optim\.args\.momentum; say \+optim\.args\.momentum=VALUE"),
        ("optim.betas=[0.9,{0.9]", "Error parsing override|no viable alternative|mismatched input"),
        ("--resolve", "The --resolve flag can only be used"),
        ("--config-dir nowhere", "Additional config directory '.*nowhere' not found"),
        ("data.path=s9://bucket data.local_cache=copies", "s9://bucket: cannot be opened .*s9"),
        ("data.path=a,b", "Ambiguous value for argument 'data.path=a,b'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(capsys, argument, said):
    message = refusal(capsys, "train.py", *argument.split(), "parallel=cpu")
    assert re.match(f"error: .*({said})", message)
    assert "\n" not in message


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_only_training_sweeps(capsys, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, "sample.py", "checkpoint=c", "script=s", "out=o", "sampler.seed=1,2", flag)
    assert said.startswith("error: -m is for sweeps of train.py; call this command once for each value")
    assert not list(tmp_path.iterdir())


# Devices

ABSENT = ["foo", "cuda:77", "meta", *([] if torch.cuda.is_available() else ["cuda"])]


@pytest.mark.parametrize("device", ABSENT)
def test_a_device_that_is_not_here_is_named(capsys, tmp_path, world, trained, device):
    (tmp_path / "story.yaml").write_text("shots: [{prompt: A cat., seconds: 1}]")
    refused = rf"error: device={device} is none that torch .* finds here; say one of auto, cpu"
    for script, *arguments in (
        ("sample.py", f"checkpoint={trained}", f"script={tmp_path / 'story.yaml'}", f"out={tmp_path / 'out'}"),
        ("scripts/evaluate.py", f"checkpoint={trained}", "data.path=nowhere"),
        ("scripts/prepare_data.py", f"input={world}", f"output={tmp_path / 'out'}"),
    ):
        assert re.match(refused, refusal(capsys, script, *arguments, f"device={device}"))
    assert not (tmp_path / "out").exists()


def test_what_is_logged_beside_a_progress_bar_has_a_line_of_its_own(capsys):
    with tqdm(total=2, file=sys.stderr):
        BesideBars().handle(logging.makeLogRecord({"msg": "told meanwhile"}))
    assert "told meanwhile" in capsys.readouterr().err.replace("\r", "\n").splitlines()
