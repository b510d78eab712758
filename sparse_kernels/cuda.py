"""Launches the kernels of kernels.cu on torch tensors: by address, on torch's current stream, with no copies.

Shape suffixes: O out features, I in features, both multiples of 16; K = I/2 kept entries of a row. 2:4 only.
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_kernels.driver import OPTIONS, Arguments, address, launch_early, raw_stream, source_text, stream_at

_NAMES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "e4m3"}
# The tiles and block sizes of kernels.cu.
_GATHER_BYTES, _GATHER_THREADS = 1024, 256
_REFRESH_TILE, _REFRESH_THREADS = (64, 128), 256
_MARKER_THREADS = 256
ROUND_SIDE, _ROUND_THREADS = 128, 256
_METADATA_THREADS = 256
_EXPAND_THREADS = 256
_SILU_THREADS = _REMEMBER_THREADS = 256
_NORM_PACKS, _NORM_ROWS = 4, 4
SOURCE = Path(__file__).with_name("kernels.cu")


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

    return cupy.RawModule(code=source_text(SOURCE), options=OPTIONS)


@functools.cache
def _function(name: str, device_index: int) -> Any:
    with torch.cuda.device(device_index):
        return _module().get_function(name).kernel


def _launch(name: str, grid: tuple[int, ...], threads: int, device: torch.device, args: Arguments) -> None:
    index = device.index
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            return _launch(name, grid, threads, device, args)
    _function(name, index)(grid, (threads,), args, 0, stream_at(raw_stream(index)))


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
    factor: Tensor | None = None,
) -> KernelLaunch:
    """Write W^R, and W^{R,C} transposed, in 16 or 8 bits, packed or dense, in place, in one pass over the values.

    A packed matrix gets zeros in its filler slots (kernels.cu says which these are); its metadata stays, except that of
    a `w_t` whose mask is updated.

    Args:
        values_OK: (O, I/2), float32 or the dtype of what is written; read when the kernel runs, like the rest.
        row_bits: uint8 (O, I/8), W^R's mask.
        backward_bits: uint8 (I, O/8), W^{R,C}'s mask, transposed.
        update_mask: choose W^{R,C} first, into `backward_bits`, bit for bit as masks.double_prune does. The version of
            `backward_bits` counts up here, before the launch.
        w: bfloat16, float16, or of float32 values e4m3, (O, I/2) packed or (O, I) dense; None leaves it out.
        w_t: the same for the transpose: (I, O/2) packed or (I, O) dense.
        bias, bias_out: (O,), converted in the same launch; `bias` has the dtype of `values_OK`.
        metadata: with `update_mask`, that of a packed `w_t`, written as `metadata` below would, with its sides and
            alignment.
        factor: float32 (), of what is written in e4m3.
    """
    tensors = {"values_OK": values_OK, "row_bits": row_bits, "backward_bits": backward_bits, "w": w, "w_t": w_t}
    _check(**tensors, bias=bias, metadata=metadata, factor=factor)
    rows, columns = values_OK.shape[0], values_OK.shape[1] * 2
    half = values_OK.dtype if values_OK.dtype != torch.float32 else torch.bfloat16
    dtype = next((written.dtype for written in (w, w_t, bias_out) if written is not None), half)
    packed = w is not None and w.shape[1] != columns
    packed_t = w_t is not None and w_t.shape[1] != rows
    if update_mask:
        torch.autograd.graph.increment_version(backward_bits)
    addresses = map(address, (values_OK, row_bits, backward_bits, bias, w, w_t, bias_out, metadata, factor))
    blocks = -(-rows // _REFRESH_TILE[0]) * -(-columns // _REFRESH_TILE[1])
    args = (*addresses, rows, columns, int(packed), int(packed_t))
    kernel = f"{'update' if update_mask else 'refresh'}_{_NAMES[values_OK.dtype]}_{_NAMES[dtype]}"
    return KernelLaunch(kernel, values_OK.device, blocks, _REFRESH_THREADS, args)


def metadata(bits: Tensor, target: Tensor, order: Tensor | None = None) -> KernelLaunch:
    """Write a mask as the metadata of a packed matrix.

    Args:
        bits: uint8 (R, C/8), at most two bits in every nibble; whole tiles of the order.
        target: uint8 (R·C/8,), 8-byte aligned.
        order: int32, on the device, `MetadataOrder.table`; None for that of 16 bits that kernels.cu says: R a multiple
            of 64, C of 32.
    """
    _check(bits=bits, target=target)
    sides = bits.shape[0], bits.shape[1] * 8
    blocks = -(-bits.numel() // ((8 if order is None else 4) * _METADATA_THREADS))
    pointers = (bits, target) if order is None else (bits, target, order)
    args = (*map(address, pointers), *sides)
    return KernelLaunch("metadata" if order is None else "metadata_in", bits.device, blocks, _METADATA_THREADS, args)


def slot_markers(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Ones at the two slots of every group, fillers included (see kernels.cu), and zeros elsewhere.

    Args:
        bits: uint8 (R, C/8), at most two bits in every nibble.
        dtype: bfloat16, float16 or e4m3.

    Returns:
        (R, C) of `dtype`.
    """
    _check(bits=bits)
    marked_RC = torch.empty(bits.shape[0], bits.shape[1] * 8, dtype=dtype, device=bits.device)
    grid = (-(-bits.numel() // _MARKER_THREADS),)
    args = bits.data_ptr(), marked_RC.data_ptr(), bits.numel()
    _launch(f"slot_markers_{_NAMES[dtype]}", grid, _MARKER_THREADS, bits.device, args)
    return marked_RC


class Rounded(NamedTuple):
    """A matrix (R, C) in e4m3, and what was found on the way; see `round_e4m3`.

    Attributes:
        data: (R, C), or empty.
        transposed: (C, R up to a multiple of 16), with zeros behind the rows, or empty.
        scale: float32 ().
        sums: float32 (R/128 up, C), the sums of each column over each 128 rows, or empty.
        counted: int64 (2,), how many entries are not zero, and how many of them become zero.
    """

    data: Tensor
    transposed: Tensor
    scale: Tensor
    sums: Tensor
    counted: Tensor


def rounds(X: Tensor) -> bool:
    """Whether `round_e4m3` takes a tensor: a matrix of 32 bits or bfloat16 that the device's kernels can round."""
    if not X.is_cuda or X.dim() != 2 or X.dtype not in (torch.float32, torch.bfloat16) or X.shape[1] % 16:
        return False
    return torch.cuda.get_device_capability(X.get_device()) >= (8, 9) and not missing(X.get_device())


def round_e4m3(X_RC: Tensor, largest: Tensor, *, rows: bool, columns: bool, sums: bool) -> Rounded:
    """A matrix divided by its scale, a power of two, and rounded to e4m3, in one pass over it.

    Args:
        X_RC: float32 or bfloat16; C a multiple of 16.
        largest: float32 (), its largest magnitude.
        rows, columns, sums: whether `data`, `transposed` and `sums` are written.
    """
    R, C = X_RC.shape
    if not X_RC.is_contiguous() and X_RC.t().is_contiguous() and R % 16 == 0 and not sums:
        other = round_e4m3(X_RC.t(), largest, rows=columns, columns=rows, sums=False)
        return other._replace(data=other.transposed, transposed=other.data)
    X_RC = X_RC.contiguous()
    if X_RC.data_ptr() % 16:
        X_RC = X_RC.clone()

    def made(on: bool, *sides: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
        return X_RC.new_empty(sides if on else (0,), dtype=dtype)

    scale, counted = X_RC.new_empty((), dtype=torch.float32), X_RC.new_zeros(2, dtype=torch.int64)
    data, transposed = made(rows, R, C), made(columns, C, -(-R // 16) * 16)
    summed = made(sums, -(-R // ROUND_SIDE), C, dtype=torch.float32)
    written = (address(one) if one.numel() else 0 for one in (data, transposed, scale, summed, counted))
    args = (X_RC.data_ptr(), largest.data_ptr(), *written, R, C)
    blocks = -(-R // ROUND_SIDE) * -(-C // ROUND_SIDE)
    _launch(f"round_{_NAMES[X_RC.dtype]}", (blocks,), _ROUND_THREADS, X_RC.device, args)
    return Rounded(data, transposed, scale, summed, counted)


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


def norm(
    X_BW: Tensor, weight_W: Tensor, bias_W: Tensor | None, eps: float, *, layer: bool, A_LW: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A layer norm, or a root-mean-square norm, of rows of at most 32,768 columns, and their product with A.

    A is read before the kernel in front has ended: that must not be one that writes it.

    Args:
        X_BW: (B, W); see `takes`. weight_W, bias_W: (W,) of its dtype.
        layer: whether rows lose their mean first.
        A_LW: (L, W) of the same dtype, L a multiple of 4. Each row of X reads it anew, so for few rows only.

    Returns:
        Y, the normed rows (B, W), and Y · A^T, (B, L), or None.
    """
    rows, columns = X_BW.shape
    threads, width = min(1024, -(-columns // 8 // 32) * 32), 0 if A_LW is None else len(A_LW)
    if columns > 8 * _NORM_PACKS * threads:
        raise ValueError(f"a norm of {columns} columns is more than the kernel takes")
    Y_BW, Z_BL = torch.empty_like(X_BW), None if A_LW is None else X_BW.new_empty(rows, width)
    operands = map(address, (X_BW, weight_W, bias_W, Y_BW))
    args = (*operands, columns, float(eps), int(layer), address(A_LW), address(Z_BL), width)
    function, grid = _function(f"norm_{_NAMES[X_BW.dtype]}", X_BW.device.index), (rows, 1 + width // _NORM_ROWS)
    launch_early(function, grid, threads, X_BW.device, args)
    return Y_BW, Z_BL  # [B,W] · [L,W]^T -> [B,L]


def remember(
    qkv_PTSD: Tensor, rotary: Tensor | None, keys_BGTD: Tensor, values_BGTD: Tensor, slots_P: Tensor, heads: int
) -> None:
    """Turn prompts' queries and keys in place by their positions, and copy keys and values to their slots' places.

    Args:
        qkv_PTSD: (P, T, H + 2 G, D), D a multiple of 16; see `takes`. heads: H.
        rotary: (2, P, T, D) cosines, and sines of which the first half is negated; None to turn nothing.
        keys_BGTD, values_BGTD: contiguous, of T places or more.
        slots_P: int64.
    """
    (P, T, S, D), places = qkv_PTSD.shape, keys_BGTD.shape[2]
    _check(qkv_PTSD=qkv_PTSD, keys_BGTD=keys_BGTD, values_BGTD=values_BGTD, slots_P=slots_P)
    rotary = None if rotary is None else rotary.contiguous()
    operands = map(address, (qkv_PTSD, rotary, keys_BGTD, values_BGTD, slots_P))
    grid = (-(-(P * T * S * D // 16) // _REMEMBER_THREADS),)
    args = (*operands, P * T, T, heads, (S - heads) // 2, D, places)
    function = _function(f"remember_{_NAMES[qkv_PTSD.dtype]}", qkv_PTSD.device.index)
    launch_early(function, grid, _REMEMBER_THREADS, qkv_PTSD.device, args)
