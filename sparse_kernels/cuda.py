"""Launches the kernels of kernels.cu on torch tensors: by address, on torch's current stream, with no copies.

Shape suffixes: O out features, I in features, both multiples of 16; K = I/2 kept entries of a row. 2:4 only.
"""

import ctypes
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_NAMES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
# The tiles and block sizes of kernels.cu.
_GATHER_BYTES, _GATHER_THREADS = 1024, 256
_REFRESH_TILE, _REFRESH_THREADS = (64, 128), 256
_MARKER_THREADS = 256
_METADATA_THREADS = 256
_EXPAND_THREADS = 256
_SILU_THREADS = 256
_NORM_PACKS = 4
SOURCE, COMMON = (Path(__file__).with_name(name) for name in ("kernels.cu", "common.cuh"))
OPTIONS = ("--std=c++17",)

_Arguments = tuple[int | float, ...]


@functools.cache
def missing(device_index: int) -> str:
    """Why the kernels cannot run on this CUDA device, in one line; empty if they can."""
    if torch.cuda.get_device_capability(device_index) < (8, 0):
        return f"{torch.cuda.get_device_name(device_index)} has compute capability below 8.0"
    try:
        _function("refresh_float_bf16", device_index)
    except ImportError:
        return f"CuPy is missing: pip install cupy-cuda{(torch.version.cuda or '13').split('.')[0]}x"
    except Exception as error:  # CuPy's compile and driver errors share no base class
        return f"CuPy could not build the kernels: {str(error).splitlines()[0]}"
    return ""


def source_text(source: Path) -> str:
    """A source with common.cuh in the place of its #include: CuPy knows what it has compiled before by this text."""
    return source.read_text().replace(f'#include "{COMMON.name}"', COMMON.read_text())


@functools.cache
def _module() -> Any:
    import cupy

    return cupy.RawModule(code=source_text(SOURCE), options=OPTIONS)


@functools.cache
def _function(name: str, device_index: int) -> Any:
    with torch.cuda.device(device_index):
        return _module().get_function(name).kernel


class _Pointer:
    """A raw stream in CUDA's stream protocol, which CuPy reads."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


@functools.cache
def _stream(pointer: int) -> Any:
    import cupy

    return cupy.cuda.Stream.from_external(_Pointer(pointer))


def raw_stream(device_index: int) -> int:
    """The address of torch's current stream; the call that Inductor's kernels make, far cheaper than an object."""
    return int(torch._C._cuda_getCurrentRawStream(device_index))


def compiled(
    source: Path, kernels: Mapping[str, int], definitions: Mapping[str, int], device_index: int
) -> dict[str, Any]:
    """Kernels of a source that is compiled for these definitions, by name; CuPy keeps the result on disk.

    kernels: by name, bytes of dynamic shared memory that a block may take, at most.
    """
    import cupy

    options = (*OPTIONS, *(f"-D{key}={value}" for key, value in definitions.items()))
    with torch.cuda.device(device_index):
        module = cupy.RawModule(code=source_text(source), options=options)
        functions = {name: module.get_function(name) for name in kernels}
        for name, shared_bytes in kernels.items():
            if shared_bytes:
                functions[name].max_dynamic_shared_size_bytes = shared_bytes
        return {name: function.kernel for name, function in functions.items()}


def _launch(name: str, grid: tuple[int, ...], threads: int, device: torch.device, args: _Arguments) -> None:
    index = device.index
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            return _launch(name, grid, threads, device, args)
    _function(name, index)(grid, (threads,), args, 0, _stream(raw_stream(index)))


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
    args: _Arguments,
    shared_bytes: int = 0,
    cluster: int = 1,
) -> None:
    """Launch a kernel of inference on torch's current stream, before the one in front of it has ended if it lets it.

    The kernel must wait (`griddepcontrol.wait`) before it reads what the one in front writes, and before it writes.

    Args:
        function: what `compiled` returned.
        args: integers are passed in 64 bits, floats too.
        cluster: blocks, neighbours along y, that share their memory; more than 1 from compute capability 9.0 on.
    """
    index = device.index
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            return launch_early(function, grid, threads, device, args, shared_bytes, cluster)
    if not overlaps(index):
        function(grid, (threads,), args, shared_bytes, _stream(raw_stream(index)))
        return
    values = [ctypes.c_double(arg) if isinstance(arg, float) else ctypes.c_int64(arg) for arg in args]
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


@functools.cache
def overlaps(device_index: int) -> bool:
    """Whether kernels can be launched before the one in front of them has ended, and in clusters of blocks."""
    return torch.cuda.get_device_capability(device_index) >= (9, 0)


def address(tensor: Tensor | None) -> int:
    """Of a tensor's first entry; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _check(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def gather_kept(dense_OI: Tensor, row_bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries of a dense matrix at the kept positions.

    Args:
        dense_OI: (O, I), float32, bfloat16 or float16.
        row_bits: uint8 (O, I/8), two bits in every nibble.
        dtype: of the result: float32 or that of `dense_OI`.

    Returns:
        (O, I/2) of `dtype`.
    """
    _check(dense_OI=dense_OI, row_bits=row_bits)
    kept_OK = dense_OI.new_empty(dense_OI.shape[0], dense_OI.shape[1] // 2, dtype=dtype)
    name = f"gather_kept_{_NAMES[dense_OI.dtype]}_{_NAMES[dtype]}"
    size = row_bits.numel()
    args = dense_OI.data_ptr(), row_bits.data_ptr(), kept_OK.data_ptr(), size
    _launch(name, (-(-size // _GATHER_BYTES),), _GATHER_THREADS, dense_OI.device, args)
    return kept_OK


class KernelLaunch(NamedTuple):
    """A kernel on one layer's tensors, ready to launch alone or together with other layers'."""

    kernel: str
    device: torch.device
    blocks: int
    threads: int
    args: tuple[int, ...]


def launch(one: KernelLaunch) -> None:
    """Launch a kernel on one layer."""
    _launch(one.kernel, (one.blocks,), one.threads, one.device, one.args)


# The arguments of many layers as the kernel reads them. Kept for good: a captured CUDA graph may hold the address, and
# there is a new table only where layers' memory has moved.
_TABLES: dict[tuple[torch.device, tuple[tuple[int, ...], ...]], Tensor] = {}


def launch_all(launches: Iterable[KernelLaunch]) -> None:
    """Launch kernels on many layers, in one launch for each kernel and device.

    In one launch for each layer where a CUDA graph is being captured and these layers are new: their table cannot be
    sent then.
    """
    alike: dict[tuple[str, torch.device], list[KernelLaunch]] = {}
    for one in launches:
        alike.setdefault((one.kernel, one.device), []).append(one)
    for (kernel, device), same in alike.items():
        key = device, tuple(one.args for one in same)
        if key not in _TABLES:
            if torch.cuda.is_current_stream_capturing():
                for one in same:
                    launch(one)
                continue
            _TABLES[key] = torch.tensor(key[1], dtype=torch.int64, device=device)
        grid = max(one.blocks for one in same), len(same)
        _launch(f"{kernel}_all", grid, same[0].threads, device, (_TABLES[key].data_ptr(),))


def refresh(
    values_OK: Tensor,
    row_bits: Tensor,
    backward_bits: Tensor,
    *,
    update_mask: bool = False,
    w: Tensor | None = None,
    w_t: Tensor | None = None,
    bias: Tensor | None = None,
    bias_out: Tensor | None = None,
    metadata: Tensor | None = None,
) -> KernelLaunch:
    """Write W^R, and W^{R,C} transposed, in 16 bits, packed or dense, in place, in one pass over the values.

    A packed matrix gets zeros in its filler slots (kernels.cu says which these are); its metadata stays, except that of
    a `w_t` whose mask is updated.

    Args:
        values_OK: (O, I/2), float32 or the dtype of what is written; read when the kernel runs, like the rest.
        row_bits: uint8 (O, I/8), W^R's mask.
        backward_bits: uint8 (I, O/8), W^{R,C}'s mask, transposed.
        update_mask: choose W^{R,C} first, into `backward_bits`, bit for bit as masks.double_prune does. The version of
            `backward_bits` counts up here, before the launch.
        w: bfloat16 or float16, (O, I/2) packed or (O, I) dense; None leaves it out.
        w_t: the same for the transpose: (I, O/2) packed or (I, O) dense.
        bias, bias_out: (O,), converted in the same launch; `bias` has the dtype of `values_OK`.
        metadata: with `update_mask`, that of a packed `w_t`, written as `metadata` below would, with its sides and
            alignment.
    """
    tensors = {"values_OK": values_OK, "row_bits": row_bits, "backward_bits": backward_bits, "w": w, "w_t": w_t}
    _check(**tensors, bias=bias, metadata=metadata)
    rows, columns = values_OK.shape[0], values_OK.shape[1] * 2
    half = values_OK.dtype if values_OK.dtype != torch.float32 else torch.bfloat16
    dtype = next((written.dtype for written in (w, w_t, bias_out) if written is not None), half)
    packed = w is not None and w.shape[1] != columns
    packed_t = w_t is not None and w_t.shape[1] != rows
    if update_mask:
        torch.autograd.graph.increment_version(backward_bits)
    addresses = map(address, (values_OK, row_bits, backward_bits, bias, w, w_t, bias_out, metadata))
    blocks = -(-rows // _REFRESH_TILE[0]) * -(-columns // _REFRESH_TILE[1])
    args = (*addresses, rows, columns, int(packed), int(packed_t))
    kernel = f"{'update' if update_mask else 'refresh'}_{_NAMES[values_OK.dtype]}_{_NAMES[dtype]}"
    return KernelLaunch(kernel, values_OK.device, blocks, _REFRESH_THREADS, args)


def metadata(bits: Tensor, target: Tensor) -> KernelLaunch:
    """Write a mask as the metadata of a packed 16-bit matrix, in the order that kernels.cu says.

    Args:
        bits: uint8 (R, C/8), R a multiple of 64, C of 32, at most two bits in every nibble.
        target: uint8 (R·C/8,), 8-byte aligned.
    """
    _check(bits=bits, target=target)
    args = bits.data_ptr(), target.data_ptr(), bits.shape[0], bits.shape[1] * 8
    blocks = -(-bits.numel() // (8 * _METADATA_THREADS))
    return KernelLaunch("metadata", bits.device, blocks, _METADATA_THREADS, args)


def slot_markers(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Ones at the two slots of every group, fillers included (see kernels.cu), and zeros elsewhere.

    Args:
        bits: uint8 (R, C/8), at most two bits in every nibble.
        dtype: bfloat16 or float16.

    Returns:
        (R, C) of `dtype`.
    """
    _check(bits=bits)
    marked_RC = torch.empty(bits.shape[0], bits.shape[1] * 8, dtype=dtype, device=bits.device)
    grid = (-(-bits.numel() // _MARKER_THREADS),)
    args = bits.data_ptr(), marked_RC.data_ptr(), bits.numel()
    _launch(f"slot_markers_{_NAMES[dtype]}", grid, _MARKER_THREADS, bits.device, args)
    return marked_RC


def expand(values_RK: Tensor, metadata: Tensor, columns: int) -> Tensor:
    """A packed matrix as a dense one.

    Args:
        values_RK: (R, C/2), bfloat16 or float16; C a multiple of 16.
        metadata: uint8, in tile order (tile_metadata.py).

    Returns:
        (R, C) of the values' dtype.
    """
    _check(values_RK=values_RK, metadata=metadata)
    rows = values_RK.shape[0]
    dense_RC = values_RK.new_empty(rows, columns)
    grid = (-(-(rows * columns // 8) // _EXPAND_THREADS),)
    args = values_RK.data_ptr(), metadata.data_ptr(), dense_RC.data_ptr(), rows, columns
    _launch(f"expand_{_NAMES[values_RK.dtype]}", grid, _EXPAND_THREADS, values_RK.device, args)
    return dense_RC


def takes(X: Tensor) -> bool:
    """Whether the kernels for inference can take a tensor: contiguous, on a GPU that they support, in 16 bits."""
    return supports(X) and X.is_contiguous() and X.shape[-1] % 16 == 0


def supports(X: Tensor) -> bool:
    """Whether there are kernels for inference on this tensor's device, in its dtype."""
    return X.is_cuda and X.dtype in (torch.bfloat16, torch.float16) and not missing(X.get_device())


def silu_mul(X_BF: Tensor) -> Tensor:
    """silu(gate) · up of gate and up side by side: (B, 2 F) -> (B, F), F a multiple of 8; see `takes`."""
    rows, columns = X_BF.shape
    Y_BF = X_BF.new_empty(rows, columns // 2)
    grid = (-(-(Y_BF.numel() // 8) // _SILU_THREADS),)
    args = X_BF.data_ptr(), Y_BF.data_ptr(), rows, columns // 2
    launch_early(_function(f"silu_mul_{_NAMES[X_BF.dtype]}", X_BF.device.index), grid, _SILU_THREADS, X_BF.device, args)
    return Y_BF


def norm(X_BW: Tensor, weight_W: Tensor, bias_W: Tensor | None, eps: float, *, layer: bool) -> Tensor:
    """A layer norm, or a root-mean-square norm, of rows (B, W) of at most 32,768 columns; see `takes`."""
    rows, columns = X_BW.shape
    Y_BW = torch.empty_like(X_BW)
    threads = min(1024, -(-columns // 8 // 32) * 32)
    if columns > 8 * _NORM_PACKS * threads:
        raise ValueError(f"a norm of {columns} columns is more than the kernel takes")
    args = (*map(address, (X_BW, weight_W, bias_W, Y_BW)), columns, float(eps), int(layer))
    launch_early(_function(f"norm_{_NAMES[X_BW.dtype]}", X_BW.device.index), (rows,), threads, X_BW.device, args)
    return Y_BW
