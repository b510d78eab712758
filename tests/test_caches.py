"""Caches of compilers on a node's own disk: where, whose, and only where there are several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slope_cli.distributed.caches import CACHES, node_caches
from slope_cli.distributed.launch import Ranks

SEVERAL = Ranks(rank=3, world=8, local_rank=1, local_world=2, launcher="srun")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in CACHES:
        monkeypatch.setenv(key, "")  # so that it is set back, whatever the test sets
        del os.environ[key]
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))


def test_several_processes_share_a_folder_of_their_node(tmp_path: Path) -> None:
    assert node_caches(Ranks()) == {}
    assert not os.listdir(tmp_path)
    chosen = node_caches(SEVERAL)
    assert chosen.keys() == CACHES.keys()
    assert all(os.environ[key] == place and Path(place).is_relative_to(tmp_path) for key, place in chosen.items())
    assert len(set(chosen.values())) == 4
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o700}
    assert node_caches(SEVERAL) == {}
    for key in CACHES:
        del os.environ[key]
    assert node_caches(Ranks(rank=2, world=8, local_world=2)) == chosen


def test_what_the_user_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    assert node_caches(SEVERAL).keys() == CACHES.keys() - {"TRITON_CACHE_DIR"}
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"


@pytest.mark.parametrize("hindrance", ["open to all", "a link", "a file", "another user's", "no such place"])
def test_a_folder_that_is_not_this_user_s_alone_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hindrance: str
) -> None:
    """What lies in a cache is run: in /tmp others could have made it first."""
    own = tmp_path / f"slope-caches-{os.getuid()}"
    if hindrance == "open to all":
        own.mkdir()
        own.chmod(0o777)
    elif hindrance == "a link":
        (tmp_path / "elsewhere").mkdir()
        own.symlink_to(tmp_path / "elsewhere")
    elif hindrance == "a file":
        own.write_text("")
    elif hindrance == "no such place":
        monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "none"))
    elif os.getuid():
        pytest.skip("only root can give a folder away")
    else:
        own.mkdir(0o700)
        os.chown(own, 12345, 12345)
    assert node_caches(SEVERAL) == {}
    assert not any(key in os.environ for key in CACHES)


@pytest.mark.slow
def test_inductor_and_triton_and_plans_go_there(tmp_path: Path) -> None:
    """By a compilation in another process, as each rank has it."""
    code = """
import sys
from slope_cli.distributed.caches import node_caches
from slope_cli.distributed.launch import Ranks
chosen = node_caches(Ranks(world=2))
assert not {"torch", "triton", "cupy", "numpy"} & set(sys.modules)
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir
from sparse_kernels import kernel_choice
assert cache_dir() == chosen["TORCHINDUCTOR_CACHE_DIR"]
kernel_choice.save_choice("key", kernel_choice.Choice(False, "slower"))
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)
    assert [path.parent.name for path in tmp_path.rglob("plans.json")] == ["slope"]
