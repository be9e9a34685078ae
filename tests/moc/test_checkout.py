"""These tests are about what git says of the checkout, where there is one and where there is none."""

import os
import subprocess

from moc import checkout


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert checkout.commit() == head


def test_asking_writes_nothing_into_the_checkout(tmp_path, monkeypatch):
    """A file's new time would have the index renewed."""
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    subprocess.run(["git", "-C", str(tmp_path), "init", "--quiet"], check=True)
    (tmp_path / "file").write_text("a")
    subprocess.run(["git", "-C", str(tmp_path), "add", "file"], check=True)
    os.utime(tmp_path / "file", (1, 1))
    before = (tmp_path / ".git/index").read_bytes()
    assert checkout.git("status", "--porcelain") == "A  file"
    assert (tmp_path / ".git/index").read_bytes() == before


def test_an_installed_package_has_none(tmp_path, monkeypatch):
    subprocess.run(["git", "-C", str(tmp_path), "init", "--quiet"], check=True)
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(checkout, "ROOT", tmp_path / "site-packages")
    assert checkout.commit() is None


def test_where_there_is_no_git(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout.commit() is None
