"""The binding without a GPU: where the library is looked for, what is refused, and, where it is installed, its ABI."""

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_kernels import autotune, cusparselt
from sparse_kernels.cusparselt import CuSparseLtError
from sparse_kernels.matmul_plan import MatmulShape


@pytest.fixture
def installed() -> cusparselt.Library:
    try:
        return cusparselt.library()
    except CuSparseLtError as error:
        pytest.skip(str(error))


@pytest.fixture
def build(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Compiles a library that says it is of some version, with the names given."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")

    def compile_library(version: tuple[int, int, int], names: list[str]) -> str:
        source = "".join(f"int cusparseLt{name}(void) {{ return 0; }}\n" for name in names)
        numbers = ", ".join(map(str, version))
        source += (
            f"int cusparseLtGetProperty(int kind, int *value) {{ *value = (int[]){{{numbers}}}[kind]; return 0; }}\n"
        )
        (tmp_path / "stub.c").write_text(source)
        path = str(tmp_path / "libstub.so")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", path, str(tmp_path / "stub.c")], check=True)
        return path

    return compile_library


def test_all_functions_have_signatures() -> None:
    assert len(cusparselt.SIGNATURES) == 18


def test_abi(installed: cusparselt.Library) -> None:
    assert installed.version >= (0, 8, 0)
    assert installed.functions["GetErrorString"](0)


def test_a_bad_status_is_raised_in_the_library_s_words(installed: cusparselt.Library) -> None:
    text = installed.functions["GetErrorString"](3).decode()
    with pytest.raises(CuSparseLtError) as caught:
        installed.call("GetProperty", 99, ctypes.byref(ctypes.c_int()))
    assert "cusparseLtGetProperty failed with status" in str(caught.value)
    with pytest.raises(CuSparseLtError, match=text):
        installed.fail("Matmul", 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_handle_without_a_gpu(installed: cusparselt.Library) -> None:
    with pytest.raises(CuSparseLtError, match="cusparseLtInit failed with status 1: "):
        cusparselt.Handle(installed)


def test_old_version_is_refused(build) -> None:  # type: ignore[no-untyped-def]
    names = [name for name in cusparselt.SIGNATURES if name != "GetProperty"]
    assert cusparselt.Library(build((0, 8, 1), names)).version == (0, 8, 1)
    with pytest.raises(CuSparseLtError, match=r"cuSPARSELt 0\.7\.1 .* is too old: 0\.8 or newer is needed") as caught:
        cusparselt.Library(str(Path(build((0, 7, 1), names)).rename(Path(build((0, 7, 1), names)).with_name("old.so"))))
    assert "\n" not in str(caught.value)


def test_missing_function_or_file_is_one_line(build, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for path in (build((0, 8, 0), ["Init"]), str(tmp_path / "absent.so")):
        with pytest.raises(CuSparseLtError, match="cannot be loaded") as caught:
            cusparselt.Library(path)
        assert "\n" not in str(caught.value)


def test_chosen_library_is_the_only_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOPE_CUSPARSELT_LIB", "/some/where/libcusparseLt.so.0")
    assert list(cusparselt.candidates()) == ["/some/where/libcusparseLt.so.0"]


def test_candidates_end_with_the_system_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLOPE_CUSPARSELT_LIB", raising=False)
    assert list(cusparselt.candidates())[-1] == cusparselt.SONAME


def test_structures_are_aligned_and_apart() -> None:
    structures = [cusparselt.Structure() for _ in range(50)]
    assert all(structure.address % 16 == 0 for structure in structures)
    starts = sorted(structure.address for structure in structures)
    assert all(b - a >= 512 for a, b in itertools.pairwise(starts))


def shape(**changes: int) -> MatmulShape:
    sides = {"rows": 768, "columns": 768, "tokens": 8192, **changes}
    return MatmulShape(**sides, dtype=torch.bfloat16, bias=True)


def test_shapes_that_are_not_searched() -> None:
    assert autotune.refusal(shape()) == ""
    assert "multiples" in autotune.refusal(shape(tokens=8193))
    assert "below 512" in autotune.refusal(shape(columns=256))
    assert "fewer than 256 tokens" in autotune.refusal(shape(tokens=64))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": 99, "plans": {}}', '{"format": 1}', '{"format": 1, "plans": {"a": {"x": 1}}}'],
)
def test_damaged_or_foreign_file_of_plans(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = autotune.cache_file()
    file.parent.mkdir()
    file.write_text(content)
    autotune.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="plans.json is not a readable file of plans") as caught:
        assert autotune.saved_choices() == {}
    assert len(caught) == 1
    choice = autotune.Choice(True, "1.40 times the speed of dense", 1.0, 1.4, {"config_id": 17})
    autotune.save_choice("gpu | shape", choice)
    assert autotune.saved_choices() == {"gpu | shape": choice}
    autotune.save_choice("gpu | other", choice)
    assert set(json.loads(file.read_text())["plans"]) == {"gpu | shape", "gpu | other"}
    assert {entry.name for entry in file.parent.iterdir()} == {"plans.json", "plans.lock"}


def test_processes_that_remember_at_once_lose_nothing(tmp_path: Path) -> None:
    code = """
import sys
from sparse_kernels import autotune
for number in range(20):
    autotune.save_choice(f"{sys.argv[1]} | {number}", autotune.Choice(False, ""))
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    each = [subprocess.Popen([sys.executable, "-P", "-c", code, name], env=environment) for name in "ab"]
    assert [process.wait(120) for process in each] == [0, 0]
    plans = json.loads((tmp_path / "slope" / "plans.json").read_text())["plans"]
    assert plans.keys() == {f"{name} | {number}" for name in "ab" for number in range(20)}


def test_unwritable_cache_folder_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    autotune.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning) as caught:
        autotune.save_choice("key", autotune.Choice(False, "slower"))
    assert any("cannot be kept" in str(warning.message) for warning in caught)
