"""Launches the kernels of kernels.cu on torch tensors: by address, on torch's current stream, with no copies.

Shape suffixes: O out features, I in features, both multiples of 16; K = I/2 kept entries of a row. 2:4 only.
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_NAMES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
# The tiles and block sizes of kernels.cu.
_GATHER_BYTES, _GATHER_THREADS = 1024, 256
_REFRESH_TILE, _REFRESH_THREADS = (64, 128), 256
_MARK_THREADS = 256
_METADATA_THREADS = 256
SOURCE = Path(__file__).with_name("kernels.cu")
OPTIONS = ("--std=c++17",)


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


class Work(NamedTuple):
    """One layer's part in a kernel's work, ready to launch alone or with other layers': the numbers that it takes."""

    kernel: str
    device: torch.device
    blocks: int
    threads: int
    numbers: tuple[int, ...]


def launch(work: Work) -> None:
    """Do one layer's work."""
    _launch(work.kernel, (work.blocks,), work.threads, work.device, work.numbers)


# The numbers of many layers as the kernel reads them. Kept for good: a captured CUDA graph may hold the address, and
# there is a new one only where layers' memory has moved.
_TABLES: dict[tuple[torch.device, tuple[tuple[int, ...], ...]], Tensor] = {}


def launch_all(works: Iterable[Work]) -> None:
    """Do the work of many layers, in one launch for each kernel and device.

    In one launch for each layer where a CUDA graph is being captured and these layers are new: their table cannot be
    sent then.
    """
    alike: dict[tuple[str, torch.device], list[Work]] = {}
    for work in works:
        alike.setdefault((work.kernel, work.device), []).append(work)
    for (kernel, device), same in alike.items():
        key = device, tuple(work.numbers for work in same)
        if key not in _TABLES:
            if torch.cuda.is_current_stream_capturing():
                for work in same:
                    launch(work)
                continue
            _TABLES[key] = torch.tensor(key[1], dtype=torch.int64, device=device)
        grid = max(work.blocks for work in same), len(same)
        _launch(f"{kernel}_all", grid, same[0].threads, device, (_TABLES[key].data_ptr(),))


def refresh(
    values_OK: Tensor,
    positions: Tensor,
    positions_t: Tensor,
    *,
    renew: bool = False,
    w: Tensor | None = None,
    w_t: Tensor | None = None,
    bias: Tensor | None = None,
    bias_copy: Tensor | None = None,
    metadata: Tensor | None = None,
) -> Work:
    """Write the 16-bit copies of W^R and of W^{R,C} transposed, in place, in one pass.

    A packed matrix gets zeros in its filler slots (see kernels.cu for which slots those are); its metadata stays, but
    for that of a `w_t` whose mask is renewed.

    Args:
        values_OK: (O, I/2), float32 or the dtype of the copies; read when the kernel runs, like the rest.
        positions: uint8 (O, I/8).
        positions_t: uint8 (I, O/8).
        renew: choose W^{R,C} anew first, into `positions_t`, bit for bit as masks.double_prune does. The version of
            `positions_t` counts up here, before the launch.
        w: bfloat16 or float16, (O, I/2) packed or (O, I) dense, or None to leave it out.
        w_t: the same for the transpose: (I, O/2) packed or (I, O) dense.
        bias, bias_copy: (O,), converted in the same launch; `bias` has the dtype of `values_OK`.
        metadata: if renewed, that of a packed `w_t`, written as `metadata` below would, with its sides and alignment.
    """
    _check(values=values_OK, positions=positions, positions_t=positions_t, w=w, w_t=w_t, bias=bias, metadata=metadata)
    rows, columns = values_OK.shape[0], values_OK.shape[1] * 2
    half = values_OK.dtype if values_OK.dtype != torch.float32 else torch.bfloat16
    dtype = next((copy.dtype for copy in (w, w_t, bias_copy) if copy is not None), half)
    packed = w is not None and w.shape[1] != columns
    packed_t = w_t is not None and w_t.shape[1] != rows
    if renew:
        torch.autograd.graph.increment_version(positions_t)
    addresses = map(_address, (values_OK, positions, positions_t, bias, w, w_t, bias_copy, metadata))
    blocks = -(-rows // _REFRESH_TILE[0]) * -(-columns // _REFRESH_TILE[1])
    numbers = (*addresses, rows, columns, int(packed), int(packed_t))
    kernel = f"{'renew' if renew else 'refresh'}_{_NAMES[values_OK.dtype]}_{_NAMES[dtype]}"
    return Work(kernel, values_OK.device, blocks, _REFRESH_THREADS, numbers)


def metadata(bits: Tensor, target: Tensor) -> Work:
    """Write a mask as the metadata of a packed 16-bit matrix, in the order that kernels.cu says.

    Args:
        bits: uint8 (R, C/8), R a multiple of 64, C of 32, at most two bits in every nibble.
        target: uint8 (R·C/8,), 8-byte aligned.
    """
    _check(bits=bits, target=target)
    numbers = bits.data_ptr(), target.data_ptr(), bits.shape[0], bits.shape[1] * 8
    blocks = -(-bits.numel() // (8 * _METADATA_THREADS))
    return Work("metadata", bits.device, blocks, _METADATA_THREADS, numbers)


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
