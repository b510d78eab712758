"""slope doctor: what it finds here, and what it says of what is missing."""

import configparser
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.runs import RECIPE, slope

from slope_cli import doctor
from slope_cli.train.step import require_compiler
from slope_cli.utils.environment import driver, gpu_libraries
from sparse_kernels import cusparselt

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")


def test_training_works_here_and_every_package_has_its_line() -> None:
    done = slope("doctor")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert any(line.split() == ["torch", torch.__version__] for line in lines)
    assert {"lm_eval", "peft", "accelerate", "fastapi"} <= {line.split()[0] for line in lines}
    assert lines[-1].split() == ["a", "training", "step", "works"]


def test_on_a_terminal_no_line_is_longer_than_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere a finding is one line, for programs that search."""
    monkeypatch.setattr(doctor, "package_version", lambda _: None)
    (peft,) = [line for line in doctor.examine()[1] if line.startswith("peft")]
    assert len(peft) > 80
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    lines = doctor.examine()[1]
    assert max(map(len, lines)) <= 80
    at = next(number for number, line in enumerate(lines) if line.startswith("peft"))
    assert lines[at + 1].startswith(" " * 17)
    assert f"{lines[at]} {lines[at + 1].strip()}" == peft


@no_gpu
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    record = json.loads(slope("doctor", "--json").out)
    assert record["training"] is True
    (gpu,) = [finding for finding in record["findings"] if finding["name"] == "GPU"]
    assert gpu["found"] == "none that torch can use"
    assert "the CPU" in gpu["fix"]


def test_a_step_that_fails_on_the_gpu_that_training_would_take_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of a GPU is made up here; the step on it then really fails where there is none."""
    card = SimpleNamespace(name="made up", total_memory=2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
    step = doctor.train_a_step

    def failing(device: str) -> None:
        if device == "cuda":
            raise RuntimeError("no kernel image is available")
        step(device)

    monkeypatch.setattr(doctor, "train_a_step", failing)
    done = slope("doctor")
    assert (done.code, done.err) == (1, "error: training cannot work here; see above\n")
    assert done.out.splitlines()[-1].endswith("fails; training cannot work: RuntimeError: no kernel image is available")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in an image without g++: nothing that was compiled before is left, and nothing can be."""
    require_compiler.cache_clear()
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        yield
    require_compiler.cache_clear()
    torch._dynamo.reset()


@no_gpu
@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_it_says_so_and_a_run_that_is_to_be_compiled_ends_in_one_line(tmp_path: Path) -> None:
    record = json.loads(slope("doctor", "--json").out)
    assert record["training"] is True  # on a CPU nothing is compiled by default
    (compiling,) = [finding for finding in record["findings"] if finding["name"] == "torch.compile"]
    assert compiling["found"] == "fails"
    fix = "install a C++ compiler such as g++, or set train.compile=false"
    assert "no-such-compiler" in compiling["fix"]
    assert compiling["fix"].endswith(fix)
    done = slope("pretrain", str(RECIPE), "train.compile=true", "--out", str(tmp_path / "run"))
    assert (done.code, done.out) == (1, "")
    (error,) = [line for line in done.err.splitlines() if "compile" in line]
    assert error.startswith("error: torch.compile fails here (")
    assert error.endswith(fix)
    assert done.err.splitlines()[-1] == error


@no_gpu
def test_without_a_compiler_training_on_a_gpu_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There, steps are compiled by default. That the step itself works is made up here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    finding = doctor.compiler_finding()
    assert (finding.found, finding.stops) == ("fails", True)


@no_gpu
def test_a_granted_gpu_that_torch_does_not_find_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    done = slope("doctor")
    assert (done.code, done.err) == (1, "error: training cannot work here; see above\n")
    assert "training cannot work: CUDA_VISIBLE_DEVICES=0, but torch finds no GPU" in done.out.splitlines()[-1]


def program(folder: Path, text: str) -> str:
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(("text", "version"), [("echo 580.1", "580.1"), ("exit 9", None), ("true", None)])
def test_the_driver_is_what_nvidia_smi_says(
    text: str, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", program(tmp_path, text))
    assert driver() == version


@no_gpu
def test_a_cpu_build_of_torch_beside_a_driver_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", program(tmp_path, "echo 580.1"))
    lines = slope("doctor").out.splitlines()
    if torch.version.cuda is None:
        assert any(line.startswith("CUDA of torch") and "install a CUDA build of torch" in line for line in lines)


def test_a_missing_library_says_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOPE_CUSPARSELT_LIB", str(tmp_path / "none.so"))
    cusparselt.library.cache_clear()
    finding = doctor.cusparselt_finding()
    assert finding.found == "missing"
    assert str(tmp_path / "none.so") in finding.fix
    assert gpu_libraries()["cusparselt"] is None


def test_a_failure_is_one_line() -> None:
    def fail() -> None:
        raise ValueError("two\nlines")

    assert doctor.failure(fail) == "ValueError: two lines"
    assert doctor.failure(lambda: None) == ""


def test_the_layers_self_test_passes_on_the_reference() -> None:
    doctor.check_layer("cpu")


def test_what_is_missing_is_installed_by_an_extra_that_setup_cfg_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda _: None)
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    extras = setup["options.extras_require"]
    fixes = {line.split()[0]: line for line in slope("doctor").out.splitlines() if "missing" in line}
    assert fixes["torch"].endswith("missing; pip install torch")
    assert fixes["peft"].endswith(
        "install the extra trainer (docs/start.md#install); only loading an export's adapters outside slope needs it"
    )
    for package, line in fixes.items():
        for extra in re.findall(r"\w+", (re.findall(r"the extra (.+?) \(", line) or [""])[0].replace(" or ", " ")):
            assert package in extras[extra] or (package, extra) == ("accelerate", "eval")  # lm_eval[hf] brings it
