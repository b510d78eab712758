"""NVIDIA's cuSPARSELt through ctypes: locating the library, the functions used here, and their opaque structures.

Nothing here needs torch, and everything but `handle` works on a machine without a GPU.
"""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Any

SONAME = "libcusparseLt.so.0"
OLDEST = (0, 8, 0)  # before it the structures had other sizes and the attributes other numbers
_STRUCTURE_BYTES, _ALIGNMENT = 512, 16


class CuSparseLtError(RuntimeError):
    """cuSPARSELt is missing, too old, or refused a call; the message is one line."""


class Order(IntEnum):
    COLUMN = 1
    ROW = 2


class DataType(IntEnum):
    FLOAT16 = 2
    BFLOAT16 = 14
    E4M3 = 28


class AlgorithmAttribute(IntEnum):
    CONFIG_ID = 0
    CONFIG_MAX_ID = 1
    SEARCH_ITERATIONS = 2
    SPLIT_K = 3
    SPLIT_K_MODE = 4
    SPLIT_K_BUFFERS = 5


NON_TRANSPOSE = 0
COMPUTE_FLOAT32 = 2
BIAS_POINTER = 8
SPARSITY_50_PERCENT = 0
ALGORITHM_DEFAULT = 0

_P, _SIZES = c_void_p, POINTER(c_size_t)
_ATTRIBUTE = [_P, _P, c_int, _P, c_size_t]
_MATMUL = [_P, _P, _P, _P, _P, _P, _P, _P, _P, POINTER(c_void_p), c_int32]
_DENSE = [_P, _P, c_int64, c_int64, c_int64, c_uint32, c_int, c_int]

# Argument types by name, without the prefix "cusparseLt". Every function but GetErrorString returns a status.
SIGNATURES: dict[str, list[Any]] = {
    "Init": [_P],
    "GetProperty": [c_int, POINTER(c_int)],
    "GetErrorString": [c_int],
    "DenseDescriptorInit": _DENSE,
    "StructuredDescriptorInit": [*_DENSE, c_int],
    "MatDescriptorDestroy": [_P],
    "MatmulDescriptorInit": [_P, _P, c_int, c_int, _P, _P, _P, _P, c_int],
    "MatmulDescSetAttribute": _ATTRIBUTE,
    "MatmulAlgSelectionInit": [_P, _P, _P, c_int],
    "MatmulAlgSelectionDestroy": [_P],
    "MatmulAlgGetAttribute": _ATTRIBUTE,
    "MatmulGetWorkspace": [_P, _P, _SIZES],
    "MatmulPlanInit": [_P, _P, _P, _P],
    "MatmulPlanDestroy": [_P],
    "Matmul": _MATMUL,
    "MatmulSearch": _MATMUL,
    "SpMMACompressedSize2": [_P, _P, _SIZES, _SIZES],
    "SpMMACompress2": [_P, _P, c_int, c_int, _P, _P, _P, _P],
}


class Structure:
    """An opaque structure of the library: 512 bytes at a fixed address that is a multiple of 16.

    The library keeps pointers to what a plan was made from, so whoever owns the plan must own these as long.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(_STRUCTURE_BYTES + _ALIGNMENT)
        start = ctypes.addressof(self._buffer)
        self.address = start + -start % _ALIGNMENT


class Library:
    """One loaded cuSPARSELt. `call` runs a function by its name without the prefix and raises on a bad status.

    Raises:
        CuSparseLtError: the file cannot be loaded, lacks a function, or is older than 0.8.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(path)
            self.functions = {name: getattr(self._library, f"cusparseLt{name}") for name in SIGNATURES}
        except (OSError, AttributeError) as error:
            raise CuSparseLtError(f"cuSPARSELt cannot be loaded from {path}: {error}") from None
        for name, function in self.functions.items():
            function.argtypes = SIGNATURES[name]
            function.restype = c_char_p if name == "GetErrorString" else c_int
        self.version = self._version()
        if self.version < OLDEST:
            version = ".".join(map(str, self.version))
            raise CuSparseLtError(
                f"cuSPARSELt {version} ({path}) is too old: 0.8 or newer is needed (pip install nvidia-cusparselt-cu13)"
            )

    def _version(self) -> tuple[int, ...]:
        number, parts = c_int(), []
        for kind in range(3):  # major, minor, patch
            self.call("GetProperty", kind, ctypes.byref(number))
            parts.append(number.value)
        return tuple(parts)

    def call(self, name: str, *arguments: object) -> None:
        status = self.functions[name](*arguments)
        if status:
            self.fail(name, status)

    def fail(self, name: str, status: int) -> None:
        """Raise for a status other than success, with the library's own message."""
        text = self.functions["GetErrorString"](status) or b"unknown status"
        raise CuSparseLtError(f"cusparseLt{name} failed with status {status}: {text.decode()}")

    def sizes(self, name: str, *arguments: object, count: int) -> tuple[int, ...]:
        """The `count` sizes that a function writes to its last arguments."""
        sizes = [c_size_t() for _ in range(count)]
        self.call(name, *arguments, *map(ctypes.byref, sizes))
        return tuple(size.value for size in sizes)


def candidates() -> Iterator[str]:
    """Where the library may be, best first: SLOPE_CUSPARSELT_LIB alone if it is set.

    Otherwise the one that torch has loaded already (two in one process made launches fail), NVIDIA's wheels, and the
    system's search path.
    """
    if chosen := os.environ.get("SLOPE_CUSPARSELT_LIB"):
        yield chosen
        return
    yield from _loaded()
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        for part in ("cu13", "cusparselt"):
            file = Path(folder) / part / "lib" / SONAME
            if file.is_file():
                yield str(file)
    yield SONAME


def _loaded() -> list[str]:
    """The cuSPARSELt files that are mapped into this process, on Linux."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return list(dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if "/libcusparseLt.so" in line))


@functools.cache
def library() -> Library:
    """The process's cuSPARSELt.

    Raises:
        CuSparseLtError: there is none, or the first candidate is unusable.
    """
    for path in candidates():
        try:
            return Library(path)
        except CuSparseLtError:
            if path != SONAME:
                raise
    raise CuSparseLtError(
        "cuSPARSELt was not found: pip install nvidia-cusparselt-cu13, or set SLOPE_CUSPARSELT_LIB to the file"
    )


class Handle:
    """A library handle on the device that is current when it is made; kept for the life of the process."""

    def __init__(self, library: Library) -> None:
        self.library, self._structure = library, Structure()
        self.address = self._structure.address
        library.call("Init", self.address)


@functools.cache
def handle(device_index: int) -> Handle:
    """The one handle of a CUDA device.

    Raises:
        CuSparseLtError: no library, or it refuses this device.
    """
    import torch

    with torch.cuda.device(device_index):
        return Handle(library())
