"""The kernels compile without a GPU, for the oldest and the newest card they are meant for, with every entry point."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.marks import slow

from sparse_kernels.driver import source_text

SOURCES = Path(__file__).parents[1] / "sparse_kernels"
ENTRIES = {
    *(f"gather_kept_{x}" for x in ("bf16_float", "bf16_bf16", "fp16_float", "fp16_fp16", "float_float")),
    *(
        f"{name}_{x}{all}"
        for name in ("refresh", "update")
        for all in ("", "_all")
        for x in ("float_bf16", "float_fp16", "bf16_bf16", "fp16_fp16", "float_e4m3")
    ),
    "metadata",
    "metadata_all",
    "metadata_in",
    "metadata_in_all",
    "slot_markers_e4m3",
    "round_bf16",
    "round_float",
    *(f"{name}_{x}" for name in ("slot_markers", "expand", "silu_mul", "norm", "remember") for x in ("bf16", "fp16")),
}
# By source: definitions, entry points. Of kernels that are compiled for a shape, one of each kind.
WORK = ("KIND", "NT", "MT", "WM", "WK", "DEPTH", "SLICE", "HALF", "ADAPTERS")
COMPILED: list[tuple[str, dict[str, int], set[str]]] = [
    ("kernels.cu", {}, ENTRIES),
    *(
        ("few_tokens.cu", dict(zip(WORK, work, strict=True)), {"few_tokens"})
        for work in (
            (0, 1, 1, 1, 16, 1, 32, 0, 1),
            (0, 2, 2, 2, 4, 2, 16, 1, 0),
            (1, 1, 1, 4, 2, 3, 2, 1, 1),
            (1, 8, 2, 4, 2, 2, 2, 0, 1),
            (2, 2, 1, 4, 2, 3, 2, 1, 0),
            (2, 8, 2, 8, 1, 3, 1, 0, 1),
            (2, 4, 1, 16, 1, 5, 1, 0, 1),
        )
    ),
    *(
        ("decode_attention.cu", {"HALF": half, "D": dim, "P": shared, "KV_SPLITS": splits}, {"decode_attention"})
        for half, dim, shared, splits in ((0, 64, 1, 1), (1, 80, 3, 4), (0, 128, 8, 16))
    ),
]


def nvrtc() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    return next((str(file) for folder in folders for file in folder.glob("*/lib/libnvrtc.so.*")), None)


def with_nvcc(source: Path, definitions: list[str], architecture: str, tmp_path: Path) -> str:
    nvcc = shutil.which("nvcc") or pytest.skip("no nvcc")
    target = tmp_path / "kernels.ptx"
    options = (f"-arch=sm_{architecture}", "-std=c++17", "-Werror", "all-warnings", "--ptx", *definitions)
    subprocess.run([nvcc, *options, "-o", target, source], check=True)
    return target.read_text()


def with_nvrtc(source: Path, definitions: list[str], architecture: str, tmp_path: Path) -> str:
    library = ctypes.CDLL(nvrtc() or pytest.skip("no NVRTC"))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    name = source.name.encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source_text(source).encode(), name, 0, None, None) == 0
    words = [f"--gpu-architecture=compute_{architecture}", "--std=c++17", *definitions]
    options = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
    status = library.nvrtcCompileProgram(program, len(words), options)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    library.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    library.nvrtcGetPTX(program, ptx)
    return ptx.value.decode()


@pytest.mark.parametrize("compiler", [with_nvcc, with_nvrtc])
@pytest.mark.parametrize("architecture", [slow("80"), "90"])
@pytest.mark.parametrize("case", COMPILED, ids=lambda case: f"{case[0]}-{'-'.join(map(str, case[1].values()))}")
def test_compiles(compiler, architecture: str, case: tuple[str, dict[str, int], set[str]], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    name, values, entries = case
    if values.get("KIND") == 2:  # for warpgroups, which one architecture has
        if architecture == "80":
            return
        architecture = "90a"
    ptx = compiler(SOURCES / name, [f"-D{key}={value}" for key, value in values.items()], architecture, tmp_path)
    assert set(re.findall(r"\.entry (\w+)", ptx)) == entries
    assert ".local" not in ptx  # an array that was indexed at run time would live there
