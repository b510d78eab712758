"""kernels.cu compiles without a GPU, for the oldest and the newest card it is meant for, and has every entry point."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "sparse_kernels" / "kernels.cu"
ENTRIES = {
    *(f"gather_kept_{x}" for x in ("bf16_float", "bf16_bf16", "fp16_float", "fp16_fp16", "float_float")),
    *(
        f"{name}_{x}{all}"
        for name in ("refresh", "update")
        for all in ("", "_all")
        for x in ("float_bf16", "float_fp16", "bf16_bf16", "fp16_fp16")
    ),
    "metadata",
    "metadata_all",
    *(f"slot_markers_{x}" for x in ("bf16", "fp16")),
}


def nvrtc() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    return next((str(file) for folder in folders for file in folder.glob("*/lib/libnvrtc.so.*")), None)


def with_nvcc(architecture: str, tmp_path: Path) -> str:
    nvcc = shutil.which("nvcc") or pytest.skip("no nvcc")
    target = tmp_path / "kernels.ptx"
    subprocess.run(
        [nvcc, f"-arch=sm_{architecture}", "-Werror", "all-warnings", "--ptx", "-o", target, SOURCE], check=True
    )
    return target.read_text()


def with_nvrtc(architecture: str, tmp_path: Path) -> str:
    library = ctypes.CDLL(nvrtc() or pytest.skip("no NVRTC"))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert library.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), b"kernels.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture=compute_{architecture}".encode(), b"--std=c++17")
    status = library.nvrtcCompileProgram(program, 2, options)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    library.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    library.nvrtcGetPTX(program, ptx)
    return ptx.value.decode()


@pytest.mark.parametrize("compiler", [with_nvcc, with_nvrtc])
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_compiles(compiler, architecture: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ptx = compiler(architecture, tmp_path)
    assert set(re.findall(r"\.entry (\w+)", ptx)) == ENTRIES
    assert ".local" not in ptx  # an array that was indexed at run time would live there
