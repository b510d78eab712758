"""Token files on a node's own disk: copied once, checked, shared by runs, and never a reason to fail."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import processes

import slope_cli
from slope_cli.data.batches import Blocks
from slope_cli.data.dataset import Dataset, open_dataset, write_manifest
from slope_cli.data.local_copy import stage, staged
from slope_cli.data.token_file import write_token_file
from slope_cli.distributed.signals import Stopped
from slope_cli.errors import SlopeError
from slope_cli.utils import files

ROOT = str(Path(slope_cli.__file__).parents[1])


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Two sources, one of them with validation text of 40 kB."""
    folder = tmp_path / "data"
    files = []
    for at, name in enumerate(("train/a", "train/b", "val/a")):
        path = folder / f"{name}.tok"
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = np.random.default_rng(at).integers(0, 1000, 20_000)
        options = {"source": path.stem, "split": path.parent.name, "tokenizer": "test"}
        files.append(write_token_file(path, [ids], vocab_size=1000, separator_id=0, **options))
        os.utime(path, ns=(10**18 + at, 10**18 + at))
    (folder / "tokenizer").mkdir()
    write_manifest(folder, files, {"inputs": []})
    return open_dataset(folder)


def nothing() -> None:
    pass


def copied(dataset: Dataset, disk: Path) -> tuple[Dataset, list[str]]:
    """The data set after a copy, and what was said."""
    said: list[str] = []
    stage(dataset, disk, said.append, nothing)
    return staged(dataset, disk), said


def places(dataset: Dataset) -> set[Path]:
    return {file.path for file in (*dataset.train, *dataset.val.values())}


def test_a_copy_is_the_same_data(dataset: Dataset, tmp_path: Path) -> None:
    disk = tmp_path / "deep/disk"
    assert staged(dataset, disk) == dataset
    local, said = copied(dataset, disk)
    assert said == []
    folder = disk / f"slope-{os.getuid()}-{dataset.fingerprint[:32]}"
    assert places(local) == {folder / name for name in ("train/a.tok", "train/b.tok", "val/a.tok")}
    assert (local.folder, local.fingerprint) == (dataset.folder, dataset.fingerprint)
    for path in places(local):
        assert path.read_bytes() == (dataset.folder / path.relative_to(folder)).read_bytes()
    shutil.rmtree(dataset.folder)  # training needs it no more
    assert len(Blocks(local.train, 8)[4998]) == 9
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [".lock", "a.tok", "a.tok", "b.tok"]


def test_what_is_there_is_used_and_what_differs_is_copied_again(dataset: Dataset, tmp_path: Path) -> None:
    local, _ = copied(dataset, tmp_path / "disk")
    first, second = (file.path for file in local.train)
    inodes = {path: path.stat().st_ino for path in places(local)}
    second.write_bytes(second.read_bytes()[:-2])
    assert places(staged(dataset, tmp_path / "disk")) == places(local) - {second} | {dataset.train[1].path}
    local, _ = copied(dataset, tmp_path / "disk")
    assert {path for path in places(local) if path.stat().st_ino == inodes[path]} == places(local) - {second}
    os.utime(first, ns=(10**17, 10**17))
    assert first not in places(staged(dataset, tmp_path / "disk"))
    local, said = copied(dataset, tmp_path / "disk")
    assert (first in places(local), said) == (True, [])


def test_a_damaged_file_is_found_by_the_copy(dataset: Dataset, tmp_path: Path) -> None:
    path = dataset.train[1].path
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(SlopeError, match=r"data/train/b\.tok: damaged"):
        stage(open_dataset(dataset.folder, verify=False), tmp_path / "disk", print, nothing)
    assert not list((tmp_path / "disk").rglob("*b.tok*"))


@pytest.mark.parametrize("hindrance", ["full", "no room", "a file", "a link", "not writable"])
def test_a_disk_that_takes_no_copy_costs_a_warning(
    dataset: Dataset, tmp_path: Path, hindrance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves nothing there, so that what else needs the disk has it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    folder = disk / f"slope-{os.getuid()}-{dataset.fingerprint[:32]}"
    if hindrance == "no room":
        usage = shutil.disk_usage(disk)._replace(free=100_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    elif hindrance == "a file":
        shutil.rmtree(disk)
        disk.write_text("")
    elif hindrance == "a link":
        folder.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").mkdir()
    elif hindrance == "not writable":
        if os.getuid() == 0:
            pytest.skip("root may write everywhere")
        disk.chmod(0o500)
    if hindrance == "full":
        with processes.full_disk(20_000):
            local, said = copied(dataset, disk)
    else:
        local, said = copied(dataset, disk)
    assert places(local) == places(dataset)
    assert len(said) == 1
    assert said[0].startswith(f"data.local_copy={disk}: {disk}")
    assert said[0].endswith(f"the data are read from {dataset.folder}")
    assert "\n" not in said[0]
    assert not list(tmp_path.glob("elsewhere/*"))
    assert not [path for path in disk.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_stop_while_it_copies(dataset: Dataset, tmp_path: Path) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stopped("stopped")

    with pytest.raises(Stopped):
        stage(dataset, tmp_path / "disk", print, check)
    assert not list((tmp_path / "disk").rglob("*.tmp"))
    local, _ = copied(dataset, tmp_path / "disk")
    assert places(local).isdisjoint(places(dataset))


def test_a_copy_waits_for_that_of_another_run_as_long_as_it_takes(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "LOCK_WAIT", 0.0)
    local, _ = copied(dataset, tmp_path / "disk")
    folder = local.val["a"].path.parents[1]
    waits = 0

    def check() -> None:
        nonlocal waits
        waits += 1
        if waits == 3:
            raise Stopped("stopped")

    with files.held_folder(folder), pytest.raises(Stopped):
        stage(dataset, tmp_path / "disk", print, check)
    holder = f"process {os.getpid()} on {platform.node()}"
    assert capfd.readouterr().err == f"{folder}: another process is at work in it; waiting for {holder} to end\n"


def test_a_lock_that_leads_elsewhere_costs_a_warning(dataset: Dataset, tmp_path: Path) -> None:
    local, _ = copied(dataset, tmp_path / "disk")
    lock = local.val["a"].path.parents[1] / files.LOCK
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    _, said = copied(dataset, tmp_path / "disk")
    assert said == [
        f"data.local_copy={tmp_path / 'disk'}: {lock}: is a link or a pipe, and is not written to; remove it; "
        f"the data are read from {dataset.folder}"
    ]
    assert not (tmp_path / "elsewhere").exists()


COPY = """
import os
import platform
import signal
import sys
import time
from pathlib import Path
from slope_cli.data import token_file
from slope_cli.data.dataset import open_dataset
from slope_cli.data.local_copy import stage, staged

token_file.READ_TOKENS = 1000
checks = 0

def check():
    global checks
    checks += 1
    time.sleep(0.005)
    if checks == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

dataset = open_dataset(sys.argv[1])
stage(dataset, Path(sys.argv[2]), print, check)
places = {file.path for file in staged(dataset, Path(sys.argv[2])).train}
assert not any(path.is_relative_to(dataset.folder) for path in places)
"""


def test_two_runs_of_a_node_copy_once_and_a_killed_one_leaves_no_half_file(dataset: Dataset, tmp_path: Path) -> None:
    def start(dies_at: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-c", COPY, str(dataset.folder), str(tmp_path / "disk"), str(dies_at)]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ROOT}, stdout=subprocess.PIPE, text=True)

    runs = [start(dies_at) for dies_at in (30, 0, 0)]
    said = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs[1:]] == [0, 0], said
    assert said[1:] == ["", ""]
    local, _ = copied(dataset, tmp_path / "disk")
    for file in (*local.train, *local.val.values()):
        assert not file.path.is_relative_to(dataset.folder)
        file.verify()
