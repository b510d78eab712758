"""Compiles sources of CUDA kernels, through CuPy, and launches and captures what it made on torch's streams."""

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMMON = Path(__file__).with_name("common.cuh")
OPTIONS = ("--std=c++17",)

Arguments = tuple[int | float | bytes, ...]


def source_text(source: Path) -> str:
    """A source with common.cuh in the place of its #include: CuPy knows what it has compiled before by this text."""
    return source.read_text().replace(f'#include "{COMMON.name}"', COMMON.read_text())


class _Pointer:
    """A raw stream in CUDA's stream protocol, which CuPy reads."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


@functools.cache
def stream_at(pointer: int) -> Any:
    """A raw stream as CuPy takes it."""
    import cupy

    return cupy.cuda.Stream.from_external(_Pointer(pointer))


def raw_stream(device_index: int) -> int:
    """The address of torch's current stream; the call that Inductor's kernels make, far cheaper than an object."""
    return int(torch._C._cuda_getCurrentRawStream(device_index))


@functools.cache
def capture_stream(device_index: int) -> torch.cuda.Stream:
    """The one stream on which graphs are captured, and on which runs first what they hold.

    One, because cuBLAS keeps a workspace of 32 MB for every stream that it has seen, and torch has 32 to give.
    """
    return torch.cuda.Stream(device_index)


def captured(work: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of work on the current device that allocates the same each time, after two runs of it.

    At the first runs libraries allocate and kernels are chosen.
    """
    stream = capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph


def cache_folder() -> Path:
    """Where compiled kernels and choices of kernels are kept: SLOPE_CACHE_DIR, or the user's cache folder."""
    if own := os.environ.get("SLOPE_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slope"


def _cubin(source: Path, options: tuple[str, ...]) -> Path:
    """The file of a source compiled with these options, made at the first call; its name has its checksum."""
    from cupy_backends.cuda.libs import nvrtc

    code, folder = source_text(source), cache_folder() / "kernels"
    key = hashlib.sha256("\0".join((code, *options, str(nvrtc.getVersion()))).encode()).hexdigest()[:24]
    for file in folder.glob(f"{key}-*.cubin"):
        if file.stem == f"{key}-{_checksum(file.read_bytes())}":
            return file
    program = nvrtc.createProgram(code, source.name, (), ())
    try:
        nvrtc.compileProgram(program, options)
        made: bytes = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    finally:
        nvrtc.destroyProgram(program)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(made)
    file = folder / f"{key}-{_checksum(made)}.cubin"
    os.replace(name, file)
    return file


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def compiled(
    source: Path,
    kernels: Mapping[str, int],
    definitions: Mapping[str, int],
    device_index: int,
    *,
    architecture: str = "",
) -> dict[str, Any]:
    """Kernels of a source that is compiled for these definitions, by name; the result is kept on disk.

    Args:
        kernels: by name, bytes of dynamic shared memory that a block may take, at most.
        architecture: one that CuPy does not compile for by itself, as sm_90a.
    """
    import cupy

    options = (*OPTIONS, *(f"-D{key}={value}" for key, value in definitions.items()))
    with torch.cuda.device(device_index):
        if architecture:
            module = cupy.RawModule(path=str(_cubin(source, (*options, f"-arch={architecture}"))))
        else:
            module = cupy.RawModule(code=source_text(source), options=options)
        functions = {name: module.get_function(name) for name in kernels}
        for name, shared_bytes in kernels.items():
            if shared_bytes:
                functions[name].max_dynamic_shared_size_bytes = shared_bytes
        return {name: function.kernel for name, function in functions.items()}


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = [
        *((f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CU_LAUNCH_ATTRIBUTE_…


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def launch_early(
    function: Any,
    grid: tuple[int, ...],
    threads: int,
    device: torch.device,
    args: Arguments,
    shared_bytes: int = 0,
    cluster: int = 1,
) -> None:
    """Launch a kernel of inference on torch's current stream, before the one in front of it has ended if it lets it.

    The kernel must wait (`griddepcontrol.wait`) before it reads what the one in front writes, and before it writes.

    Args:
        function: what `compiled` returned.
        args: integers are passed in 64 bits, floats too, bytes as they are.
        cluster: blocks, neighbours along y, that share their memory; more than 1 from compute capability 9.0 on.
    """
    index = device.index
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            return launch_early(function, grid, threads, device, args, shared_bytes, cluster)
    if not overlaps(index):
        function(grid, (threads,), args, shared_bytes, stream_at(raw_stream(index)))
        return
    values = [_passed(arg) for arg in args]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    attributes = (_Attribute * 2)(
        _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1)),
        _Attribute(_CLUSTER_DIMENSION, 0, (ctypes.c_int * 16)(1, cluster, 1)),
    )
    count = 1 + (cluster > 1)
    config = _Config(*(*grid, 1, 1)[:3], threads, 1, 1, shared_bytes, raw_stream(index), attributes, count)
    status = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function.ptr), pointers, None)
    if status:
        raise RuntimeError(f"a kernel could not be launched: the driver's error {status}")


def _passed(arg: float | bytes) -> Any:
    if isinstance(arg, bytes):
        return ctypes.create_string_buffer(arg, len(arg))
    return ctypes.c_double(arg) if isinstance(arg, float) else ctypes.c_int64(arg)


_UINT16, _NO_INTERLEAVE, _SWIZZLE_128B, _L2_256B, _ZEROS_OUTSIDE = 1, 0, 3, 3, 0  # CU_TENSOR_MAP_…


@functools.lru_cache(4096)
def tensor_map(at: int, rows: int, columns: int, box_rows: int) -> bytes:
    """What the copy engine (from compute capability 9.0 on) needs to know of a matrix to copy tiles of it.

    Args:
        at: the address of a contiguous (rows, columns) of 16 bits, a multiple of 16; rows of a multiple of 16 bytes.
        box_rows: of a tile, at most 256. Its columns are 64: 128 bytes, whose 16-byte pieces are swizzled.
    """
    room = ctypes.create_string_buffer(192)
    made = -(-ctypes.addressof(room) // 64) * 64  # the driver wants it there
    sides, stride = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns * 2)
    box, steps = (ctypes.c_uint32 * 2)(64, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    modes = (_NO_INTERLEAVE, _SWIZZLE_128B, _L2_256B, _ZEROS_OUTSIDE)
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(made), _UINT16, 2, ctypes.c_void_p(at), sides, stride, box, steps, *modes
    )
    if status:
        raise RuntimeError(f"no tensor map of {rows} x {columns}: the driver's error {status}")
    return ctypes.string_at(made, 128)


@functools.cache
def overlaps(device_index: int) -> bool:
    """Whether kernels can be launched before the one in front of them has ended, and in clusters of blocks."""
    return torch.cuda.get_device_capability(device_index) >= (9, 0)


@functools.cache
def most_shared_bytes(device_index: int) -> int:
    """Of shared memory that a block may have."""
    import cupy

    return int(cupy.cuda.Device(device_index).attributes["MaxSharedMemoryPerBlockOptin"])


def address(tensor: Tensor | None) -> int:
    """Of a tensor's first entry; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
