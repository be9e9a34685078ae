"""What ends a command in one line, and what keeps its traceback."""

import errno

import pytest

from configs.command import for_user, message_of
from data.errors import DataError
from moc.errors import UserError
from tests.pipeline import refusal


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


def test_a_bug_keeps_its_traceback(capsys, monkeypatch, tmp_path):
    def broken(config):
        return list(zip([1], [1, 2], strict=True))

    monkeypatch.setattr("data.dataset.open_dataset", broken)
    said = refusal(capsys, "train.py", f"output={tmp_path}", "parallel=cpu")
    assert "Traceback" in said
    assert "in broken" in said
    assert "ValueError: zip() argument 2 is longer" in said
