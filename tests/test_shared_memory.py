"""A full /dev/shm: one line that names it where several processes need it, and no error where none does."""

import subprocess
import sys
from pathlib import Path

import pytest

FULL = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/full && exec "$@"'


def in_full_memory(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a mount namespace of its own, whose /dev/shm is full."""
    return subprocess.run(["unshare", "-m", "sh", "-c", FULL, "sh", *command], capture_output=True, text=True)


@pytest.fixture(scope="module")
def may_mount() -> None:
    try:
        done = in_full_memory("true")
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")


@pytest.mark.slow
@pytest.mark.usefixtures("may_mount")
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--workers", "2"], 1, "error: /dev/shm: several processes cannot share it: No space left on device; free"),
        (["--workers", "1"], 0, "prepared: "),
        ([], 0, "prepared: "),
    ],
)
def test_prepare_in_a_full_shared_memory(words: list[str], code: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A short text. " * 50)
    slope = [sys.executable, "-P", "-m", "slope_cli", "data", "prepare"]
    done = in_full_memory(*slope, str(tmp_path / "text.txt"), "--out", str(tmp_path / "data"), *words)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1].startswith(says), done.stderr
    if code:
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.strip().endswith("or prepare in one process (--workers 1)")
