"""Every line about a file that the system refuses names the file, the reason and what to do."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from support.runs import slope

from slope_cli.errors import ADVICE, SlopeError, UsageError, os_reason
from slope_cli.utils import files, jsonl

IN_THE_WAY = "Not a directory; a part of the path is a file: choose another path"


def test_every_reason_has_advice() -> None:
    for number in (*errno.errorcode, None):
        error = OSError(number, os.strerror(number)) if number else OSError("bad data")
        reason, _, advice = os_reason(error).partition("; ")
        assert reason == (os.strerror(number) if number else "bad data")
        assert advice == ADVICE.get(number or 0, "mend this, and run the same command again")


@pytest.mark.parametrize("read", [files.file_sha256, files.read_sealed, jsonl.read])
def test_a_file_that_cannot_be_read(read: object, tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(SlopeError) as caught:
        read(path)  # type: ignore[operator]
    assert str(caught.value) == f"{path}: cannot be read: Is a directory; give the path of a file"


def test_a_folder_that_cannot_be_made_or_locked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for opened in (files.claimed_folder(tmp_path / "file/run", "run", bool), files.held_folder(tmp_path / "file")):
        with pytest.raises(SlopeError) as caught, opened:
            pass
        assert str(caught.value).endswith(IN_THE_WAY)
        assert str(caught.value).startswith(f"{tmp_path / 'file'}")


def test_the_command_line_says_it_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = slope("pretrain", "gpt2-nano", "--out", tmp_path / "file/run")
    assert done.code == 2
    assert done.err == f"error: {tmp_path / 'file/run'}: cannot be made or read: {IN_THE_WAY}\n"


def test_two_processes_that_write_one_folder_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "export"
    with files.atomic_folder(out) as first:
        (first / "a").write_text("first")
        refused = pytest.raises(UsageError, match="export: another process is writing it; wait until it ends")
        with refused, files.atomic_folder(out):
            pass
        assert (first / "a").read_text() == "first"
    assert [path.name for path in out.iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    with pytest.raises(ZeroDivisionError), files.atomic_folder(tmp_path / "other"):
        raise ZeroDivisionError
    with files.atomic_folder(tmp_path / "other"):
        pass


def test_who_comes_second_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the other one's end falls between the steps of this one."""
    out, make = tmp_path / "export", Path.mkdir
    refused = pytest.raises(UsageError, match="export: another process has written it meanwhile")
    with refused, files.atomic_folder(out) as folder:
        (folder / "own").touch()
        out.mkdir()
        (out / "a").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["export", "export/a"]

    def made_and_taken(path: Path, **how: Any) -> None:
        make(path, **how)
        monkeypatch.undo()
        path.rename(tmp_path / "other")

    monkeypatch.setattr(Path, "mkdir", made_and_taken)
    with files.atomic_folder(tmp_path / "again") as folder:
        (folder / "own").touch()
    assert (tmp_path / "again/own").is_file()


def test_what_a_killed_process_left_is_removed_and_no_link_is_followed(tmp_path: Path) -> None:
    left, elsewhere = tmp_path / ".tmp-export", tmp_path / "elsewhere"
    (left / "part").mkdir(parents=True)
    (left / "file").touch()
    with files.atomic_folder(tmp_path / "export") as folder:
        assert [*folder.iterdir()] == []
    elsewhere.mkdir()
    left.symlink_to(elsewhere)
    with files.atomic_folder(tmp_path / "export") as folder:
        (folder / "a").touch()
    assert [*elsewhere.iterdir()] == []
    assert not left.is_symlink()


def test_who_may_read_a_folder_may_read_its_files(tmp_path: Path) -> None:
    """safetensors, for one, makes files that only their owner reads."""
    with files.atomic_folder(tmp_path / "export") as folder:
        os.close(os.open(folder / "model.safetensors", os.O_CREAT | os.O_WRONLY, 0o600))
        (folder / "adapter").mkdir()
        os.close(os.open(folder / "adapter" / "model.safetensors", os.O_CREAT | os.O_WRONLY, 0o600))
    (tmp_path / "plain").touch()
    made = [path for path in (tmp_path / "export").rglob("*") if path.is_file()]
    assert [path.stat().st_mode for path in made] == [(tmp_path / "plain").stat().st_mode] * 2
