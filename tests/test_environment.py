"""What a run notes of the program and the machine."""

import shutil
import sys
from pathlib import Path

import pytest

from slope_cli.utils.environment import program, source_hash, source_version

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


def test_the_program_is_named_as_the_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo` calls .venv/bin/slope, and no slope, or another one, may be on the path."""
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "slope").touch(0o755)
    own = str(tmp_path / "one/slope")
    for called, path, expected in (
        (own, "one", "slope"),
        (own, "other", own),
        (own, "neither", own),
        ("/site/slope_cli/__main__.py", "one", f"{sys.executable} -m slope_cli"),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        monkeypatch.setenv("PATH", str(tmp_path / path))
        assert program() == expected
