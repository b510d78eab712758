"""Fixtures of the tests on a real SLURM."""

import fcntl
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
from support.data import write_data


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of the tests share, with the tokens `data`."""
    if not jobs.CONF.is_file():
        pytest.skip("needs a cluster: `make test-slurm`, or as root tests/slurm/cluster.sh up")
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if folder.name.startswith("popen-") else folder
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "data").is_dir():
            write_data(folder)
    return folder


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No job outlives its test."""
    yield
    if jobs.SUBMITTED:
        jobs.command("scancel", "--quiet", *jobs.SUBMITTED)
        jobs.SUBMITTED.clear()
