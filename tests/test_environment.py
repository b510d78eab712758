"""What a run notes of the program and the machine."""

import shutil
from pathlib import Path

from slope_cli.utils.environment import source_hash, source_version

ROOT = Path(__file__).parent.parent


def test_a_wheel_and_a_checkout_of_one_version_have_one_source_hash(tmp_path: Path) -> None:
    """A wheel has recipes and benchmarks inside slope_cli."""
    for name in ("slope_cli", "sparse_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("recipes", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / "slope_cli" / name)
    assert source_hash(tmp_path) == source_hash(ROOT) == source_version()["sha256"]


def test_code_that_moves_between_files_of_one_name_changes_the_source_hash(tmp_path: Path) -> None:
    for name in ("slope_cli", "sparse_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name)
    before = source_hash(tmp_path)
    one, other = (tmp_path / "slope_cli" / package / "batches.py" for package in ("data", "train"))
    code, more = one.read_bytes(), other.read_bytes()
    one.write_bytes(more)
    other.write_bytes(code)
    assert source_hash(tmp_path) != before
