"""Launches the kernels of kernels.cu on torch tensors: by address, on torch's current stream, with no copies.

Shape suffixes: O out features, I in features, both multiples of 16; K = I/2 kept entries of a row. 2:4 only.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_NAMES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
# The tiles and block sizes of kernels.cu.
_GATHER_BYTES, _GATHER_THREADS = 1024, 256
_REFRESH_TILE, _REFRESH_THREADS = (64, 128), 256
_PRUNE_TILE, _PRUNE_THREADS = (128, 64), 128
_MARK_THREADS = 256
SOURCE = Path(__file__).with_name("kernels.cu")
OPTIONS = ("--std=c++17",)


@functools.cache
def missing(device_index: int) -> str:
    """Why the kernels cannot run on this CUDA device, in one line; empty if they can."""
    if torch.cuda.get_device_capability(device_index) < (8, 0):
        return f"{torch.cuda.get_device_name(device_index)} has compute capability below 8.0"
    try:
        _function("double_prune_float", device_index)
    except ImportError:
        return f"CuPy is missing: pip install cupy-cuda{(torch.version.cuda or '13').split('.')[0]}x"
    except Exception as error:  # CuPy's compile and driver errors share no base class
        return f"CuPy could not build the kernels: {str(error).splitlines()[0]}"
    return ""


@functools.cache
def _module() -> Any:
    import cupy

    return cupy.RawModule(code=SOURCE.read_text(), options=OPTIONS)


@functools.cache
def _function(name: str, device_index: int) -> Any:
    with torch.cuda.device(device_index):
        return _module().get_function(name).kernel


class _Pointer:
    """A raw stream as CUDA's stream protocol wants it, which CuPy reads."""

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


def _launch(name: str, grid: tuple[int, ...], threads: int, device: torch.device, arguments: tuple[int, ...]) -> None:
    index = device.index
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            return _launch(name, grid, threads, device, arguments)
    _function(name, index)(grid, (threads,), arguments, 0, _stream(raw_stream(index)))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def gather_kept(dense_OI: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries of a dense matrix at the kept positions.

    Args:
        dense_OI: (O, I), float32, bfloat16 or float16.
        positions: uint8 (O, I/8), two bits in every nibble.
        dtype: of the result: float32 or that of `dense_OI`.

    Returns:
        (O, I/2) of `dtype`.
    """
    _check(dense_OI=dense_OI, positions=positions)
    kept_OK = dense_OI.new_empty(dense_OI.shape[0], dense_OI.shape[1] // 2, dtype=dtype)
    name = f"gather_kept_{_NAMES[dense_OI.dtype]}_{_NAMES[dtype]}"
    size = positions.numel()
    arguments = dense_OI.data_ptr(), positions.data_ptr(), kept_OK.data_ptr(), size
    _launch(name, (-(-size // _GATHER_BYTES),), _GATHER_THREADS, dense_OI.device, arguments)
    return kept_OK


class Refresh(NamedTuple):
    """A rewrite of one layer's copies, ready to launch: the numbers that the kernel takes, and for which kernel."""

    kernel: str
    device: torch.device
    blocks: int
    numbers: tuple[int, ...]


def refresh(
    values_OK: Tensor,
    positions: Tensor,
    positions_t: Tensor,
    *,
    w: Tensor | None = None,
    w_t: Tensor | None = None,
    bias: Tensor | None = None,
    bias_copy: Tensor | None = None,
) -> Refresh:
    """What `launch` needs to write the 16-bit copies of W^R and of W^{R,C} transposed, in place, in one pass.

    A packed matrix gets zeros in its filler slots (see kernels.cu for which slots those are); its metadata is not here
    and not touched.

    Args:
        values_OK: (O, I/2), float32 or the dtype of the copies; read when the kernel runs, like the rest.
        positions: uint8 (O, I/8).
        positions_t: uint8 (I, O/8).
        w: bfloat16 or float16, (O, I/2) packed or (O, I) dense, or None to leave it out.
        w_t: the same for the transpose: (I, O/2) packed or (I, O) dense.
        bias, bias_copy: (O,), converted in the same launch; `bias` has the dtype of `values_OK`.
    """
    _check(values=values_OK, positions=positions, positions_t=positions_t, w=w, w_t=w_t, bias=bias)
    rows, columns = values_OK.shape[0], values_OK.shape[1] * 2
    dtype = next(copy.dtype for copy in (w, w_t, bias_copy) if copy is not None)
    packed = w is not None and w.shape[1] != columns
    packed_t = w_t is not None and w_t.shape[1] != rows
    addresses = map(_address, (values_OK, positions, positions_t, bias, w, w_t, bias_copy))
    blocks = -(-rows // _REFRESH_TILE[0]) * -(-columns // _REFRESH_TILE[1])
    numbers = (*addresses, rows, columns, int(packed), int(packed_t))
    return Refresh(f"{_NAMES[values_OK.dtype]}_{_NAMES[dtype]}", values_OK.device, blocks, numbers)


def launch(refresh: Refresh) -> None:
    """Run one layer's rewrite."""
    _launch(f"refresh_{refresh.kernel}", (refresh.blocks,), _REFRESH_THREADS, refresh.device, refresh.numbers)


# The numbers of many layers as the kernel reads them. Kept for good: a captured CUDA graph may hold the address, and
# there is a new one only where layers' memory has moved.
_TABLES: dict[tuple[tuple[int, ...], ...], Tensor] = {}


def launch_all(refreshes: Sequence[Refresh]) -> None:
    """Run the rewrites of many layers of one device and kernel, in one launch.

    In one launch each where a CUDA graph is being captured and these layers are new: their table cannot be sent then.
    """
    first = refreshes[0]
    key = tuple(refresh.numbers for refresh in refreshes)
    if key not in _TABLES:
        if torch.cuda.is_current_stream_capturing():
            for refresh in refreshes:
                launch(refresh)
            return
        _TABLES[key] = torch.tensor(key, dtype=torch.int64, device=first.device)
    grid = max(refresh.blocks for refresh in refreshes), len(refreshes)
    _launch(f"refresh_all_{first.kernel}", grid, _REFRESH_THREADS, first.device, (_TABLES[key].data_ptr(),))


def double_prune(values_OK: Tensor, positions: Tensor, positions_t: Tensor) -> None:
    """Choose W^{R,C} anew into `positions_t`, in place, bit for bit as masks.double_prune does.

    Args:
        values_OK: (O, I/2), float32, bfloat16 or float16.
        positions: uint8 (O, I/8).
        positions_t: uint8 (I, O/8), overwritten.
    """
    _check(values=values_OK, positions=positions, positions_t=positions_t)
    rows, columns = values_OK.shape[0], values_OK.shape[1] * 2
    arguments = values_OK.data_ptr(), positions.data_ptr(), positions_t.data_ptr(), rows, columns
    name = f"double_prune_{_NAMES[values_OK.dtype]}"
    grid = -(-columns // _PRUNE_TILE[1]), -(-rows // _PRUNE_TILE[0])
    _launch(name, grid, _PRUNE_THREADS, values_OK.device, arguments)
    torch.autograd.graph.increment_version(positions_t)


def mark(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Ones at the two slots of every group, fillers included (see kernels.cu), and zeros elsewhere.

    Args:
        bits: uint8 (R, C/8), at most two bits in every nibble.
        dtype: bfloat16 or float16.

    Returns:
        (R, C) of `dtype`.
    """
    _check(bits=bits)
    marked_RC = torch.empty(bits.shape[0], bits.shape[1] * 8, dtype=dtype, device=bits.device)
    grid = (-(-bits.numel() // _MARK_THREADS),)
    arguments = bits.data_ptr(), marked_RC.data_ptr(), bits.numel()
    _launch(f"mark_{_NAMES[dtype]}", grid, _MARK_THREADS, bits.device, arguments)
    return marked_RC
