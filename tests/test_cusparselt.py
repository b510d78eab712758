"""The binding without a GPU: where the library is looked for, what is refused, and, where it is installed, its ABI."""

import ctypes
import itertools
import json
import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import finish, forkserver

from sparse_kernels import cusparselt, kernel_choice
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
    assert kernel_choice.refusal(shape()) == ""
    assert "multiples" in kernel_choice.refusal(shape(tokens=8193))
    assert "below 512" in kernel_choice.refusal(shape(columns=256))
    assert "fewer than 256 tokens" in kernel_choice.refusal(shape(tokens=64))


@pytest.mark.parametrize(
    "content",
    [
        *(
            "",
            "{",
            "[]",
            "null",
            '{"format": 99, "plans": {}}',
            '{"format": 1}',
            '{"format": 1, "plans": {"a": {"x": 1}}}',
        ),
        *('{"format": 1, "plans": []}', '{"format": 1, "plans": {"a": null}}', '{"format": "\\u001b[2J", "plans": {}}'),
        *("[" * 100_000, "\xff", " " * (1 << 24) + "{}", '{"format": 1, "plans": {"a": {"sparse": true}}}'),
        *(
            json.dumps({"format": 1, "plans": {"gpu | a": {"sparse": True, "reason": "faster"} | wrong}})
            for wrong in (
                {"sparse": 1},
                {"reason": None},
                {"reason": "\x1b]0;title\x07"},
                {"sparse_ms": "1"},
                {"sparse_ms": -1.0},
                {"sparse_ms": True},
                {"dense_ms": float("nan")},
                {"dense_ms": float("inf")},
                {"algorithm": []},
                {"algorithm": {"config_id": "17"}},
                {"code": "import os"},
            )
        ),
    ],
)
def test_damaged_or_foreign_file_of_plans(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = kernel_choice.cache_file()
    file.parent.mkdir()
    file.write_text(content, encoding="latin-1")
    kernel_choice.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="plans.json is not a readable file of plans") as caught:
        assert kernel_choice.saved_choices() == {}
    assert len(caught) == 1
    assert str(caught[0].message).isprintable()
    choice = kernel_choice.Choice(True, "1.40 times the speed of dense", 1.0, 1.4, {"config_id": 17})
    kernel_choice.save_choice("gpu | shape", choice)
    assert kernel_choice.saved_choices() == {"gpu | shape": choice}
    kernel_choice.save_choice("gpu | other", choice)
    assert set(json.loads(file.read_text())["plans"]) == {"gpu | shape", "gpu | other"}
    assert {entry.name for entry in file.parent.iterdir()} == {"plans.json", "plans.lock"}


@pytest.mark.parametrize("name", ["plans.json", "plans.lock"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_strange_thing_in_the_place_of_a_file_of_plans_neither_hangs_nor_writes_elsewhere(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place, elsewhere = kernel_choice.cache_file().with_name(name), tmp_path / "elsewhere"
    place.parent.mkdir(parents=True)
    if kind == "link":
        place.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    kernel_choice.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert kernel_choice.saved_choices() == {}
        kernel_choice.save_choice("key", kernel_choice.Choice(False, "slower"))
        kept = kernel_choice.saved_choices()
    assert not elsewhere.exists()
    assert kept.keys() == {"key"} or any("cannot be kept" in str(warning.message) for warning in caught)


CRASH = "failed in a trial process: torch.AcceleratorError: CUDA error: an illegal instruction was encountered"


@pytest.mark.parametrize(
    ("reason", "lasting"),
    [
        ("failed in a trial process: Command '['python', '-P']' timed out after 300 seconds", False),
        ("failed in a trial process: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("failed in a trial process: MemoryError", False),
        ("failed in a trial process: [Errno 12] Cannot allocate memory: 'python'", False),
        ("failed in a trial process: exit -9", False),
        ("failed in a trial process: exit -15", False),
        ("failed in a trial process: ImportError: libcuda.so.1", False),
        ("cusparseLtMatmulSearch failed with status 2: allocation failed", False),
        ("cusparseLtMatmulSearch failed with status 11: insufficient resources", False),
        (CRASH, True),
        ("failed in a trial process: exit -4", True),
        ("failed in a trial process: exit -11", True),
        ("cusparseLtMatmulPlanInit failed with status 10: not supported", True),
        ("cuSPARSELt's product differs from the dense one", True),
        ("0.80 times the speed of dense", True),
    ],
)
def test_only_a_lasting_reason_keeps_a_shape_dense_in_later_processes(
    reason: str, lasting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an earlier version has written the others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = kernel_choice.Choice(True, "1.40 times the speed of dense", 1.0, 1.4)
    kernel_choice.save_choice("failed", kernel_choice.Choice(False, reason))
    kernel_choice.save_choice("other", other)
    assert kernel_choice.saved_choices().keys() == ({"failed", "other"} if lasting else {"other"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_trial_process_that_fails_without_a_gpu_says_why_and_nothing_lasting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a process of its own, which imports nothing from the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", str(tmp_path)]))
    half = MatmulShape(768, 768, 8192, torch.float16, bias=True)
    choice = kernel_choice._measure_in_a_process(half, 0)
    assert not choice.sparse
    assert re.match("failed in a trial process: [^\n]*(CUDA|NVIDIA)", choice.reason)
    assert not kernel_choice._lasting(choice)
    assert not (tmp_path / "imported").exists()


def remember(name: str, folder: Path) -> None:
    """In a process of its own: keep twenty choices."""
    os.environ["XDG_CACHE_HOME"] = str(folder)
    for number in range(20):
        kernel_choice.save_choice(f"{name} | {number}", kernel_choice.Choice(False, ""))


def test_processes_that_remember_at_once_lose_nothing(tmp_path: Path) -> None:
    each = [forkserver.Process(target=remember, args=(name, tmp_path)) for name in "ab"]
    for process in each:
        process.start()
    assert [finish(process) for process in each] == [0, 0]
    plans = json.loads((tmp_path / "slope" / "plans.json").read_text())["plans"]
    assert plans.keys() == {f"{name} | {number}" for name in "ab" for number in range(20)}


def test_unwritable_cache_folder_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kernel_choice.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning) as caught:
        kernel_choice.save_choice("key", kernel_choice.Choice(False, "slower"))
    assert any("cannot be kept" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {"a": None},
        {"a": {"x": 1}},
        {"a": {"sparse": 1, "reason": ""}},
        {"a": {"sparse": True, "reason": "", "sparse_ms": -1.0}},
    ],
)
def test_choices_that_are_none_are_refused_whole(content: Any) -> None:
    """They come from the manifest of a checkpoint, or from another process."""
    with pytest.raises(ValueError, match=r"not choices of kernels|wrong kind"):
        kernel_choice.use_choices(content)
    assert kernel_choice.kernel_choices() == {}


def test_choices_for_another_gpu_are_kept_and_passed_on() -> None:
    """A run that has moved to another model of GPU and back decides as before."""
    choice = {"sparse": False, "reason": "0.90 times the speed of dense", "sparse_ms": 1.0, "dense_ms": 0.9}
    given = {
        "a GPU | cuSPARSELt 0.8.0 | torch 2.11 | bfloat16 | 768x768x8192": choice | {"algorithm": {"config_id": 3}}
    }
    kernel_choice.use_choices(given)
    try:
        assert json.loads(json.dumps(kernel_choice.kernel_choices())) == given
    finally:
        kernel_choice.forget()
    assert kernel_choice.kernel_choices() == {}


def test_the_file_of_plans_can_be_given_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLOPE_CACHE_DIR", str(tmp_path / "node"))
    kernel_choice.save_choice("key", kernel_choice.Choice(False, "slower"))
    assert (tmp_path / "node/plans.json").is_file()
    assert not (tmp_path / "home").exists()
