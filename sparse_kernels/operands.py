"""Operands of a linear layer's products: matrices as they are, or in fp8 with one scale for each.

    forward      Y[B,out]   = X8[B,in] · W8[out,in]^T · (s_X · s_W) + bias
    input grad   dX[B,in]   = dY8[B,out] · W8[out,in] · (s_dY · s_W)      double-pruned: W^{R,C} with the scale of W^R
    weight grad  dW[out,in] = dY8[B,out]^T · X8[B,in] · (s_dY · s_X)

fp8 is e4m3 in all three: cuSPARSELt multiplies operands of one type alone, and a scale of its own gives a gradient the
range that it needs (DeepSeek-V3, arXiv 2412.19437, section 3.3, trains so). The scale is the smallest power of two that
brings a tensor's largest magnitude to that of e4m3, 448 (arXiv 2209.05433), or below: multiplying by it rounds nothing.
It comes from the tensor as it is and not from earlier steps, so a run resumes bit for bit, and nothing saturates; what
is counted is what becomes zero. Sums are in float32.

Shape suffixes: R, C, N rows and columns of any matrices.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels import cuda

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
ROUNDS_TO_ZERO = 2.0**-10
"""The largest magnitude that becomes zero in e4m3: half of its smallest."""
SMALLEST_SCALE = 2.0**-126
"""About the smallest float32 that has a reciprocal; a tensor of zeros has it, too."""
SUMMED = cuda.ROUND_SIDE
"""The rows over which one part of the sums of columns goes."""
COUNTED = ("X", "dY")
"""The operands of a layer whose entries are counted in each product, in the order of `counts`."""


class Operand(NamedTuple):
    """A matrix as a product reads it: `data` times `scale`, which is float32 (); None for 1.

    transposed: of an operand in fp8, the transpose as a matrix of its own, with zeros behind its columns up to a
    multiple of 16; None if it was not asked for. sums: float32 (n, C), of parts of each column before it was rounded,
    or None.
    """

    data: Tensor
    scale: Tensor | None = None
    transposed: Tensor | None = None
    sums: Tensor | None = None

    def t(self) -> "Operand":
        """The transpose."""
        return Operand(self.data.t() if self.transposed is None else self.transposed, self.scale)


def operand(
    X: Tensor, *, fp8: bool, rows: bool = True, columns: bool = False, sums: bool = False, counts: Tensor | None = None
) -> Operand:
    """A tensor as an operand: as it is, or rounded to e4m3.

    A value that is not finite makes all of them NaN in fp8, and so whatever is computed from them. On a GPU all that is
    asked for is written in one pass over a matrix; what is equal is computed once in a compiled graph.

    Args:
        X: of any shape; a matrix for `columns` and `sums`.
        rows: whether `data` is needed in fp8, as products read it that sum over the matrix's columns; else it is empty.
        columns: whether `transposed` is, for those that sum over its rows.
        sums: whether `sums` are.
        counts: int64 (2,), to which are added how many entries are not zero, and how many of them become zero.
    """
    if not fp8:
        return Operand(X)
    # By rows first: torch's compiler makes that a part of the kernel that writes the rows, such as a norm's.
    largest = X.abs().amax(-1).amax().float() if X.numel() else X.new_zeros((), dtype=torch.float32)
    data, transposed, scale, summed, counted = round_op(X, largest, rows, columns, sums)
    if counts is not None:
        counts += counted
    return Operand(data, scale, transposed if columns else None, summed if sums else None)


def _round(X: Tensor, largest: Tensor, rows: bool, columns: bool, sums: bool) -> tuple[Tensor, ...]:
    if X.numel() and cuda.rounds(X):
        return tuple(cuda.round_e4m3(X, largest, rows=rows, columns=columns, sums=sums))
    # By products, because compilers and GPUs divide each in their own way.
    scale = scale_of(largest)
    scaled = X.float() * scale.reciprocal()  # in float32, to be rounded once
    nonzero = scaled != 0
    counted = torch.stack([nonzero.sum(), (nonzero & (scaled.abs() <= ROUNDS_TO_ZERO)).sum()])
    data = scaled.to(FP8).contiguous() if rows else X.new_empty(0, dtype=FP8)
    # Padded before it is rounded: not every device pads fp8.
    transposed = F.pad(scaled.t(), (0, -len(X) % 16)).to(FP8).contiguous() if columns else X.new_empty(0, dtype=FP8)
    summed = X.new_empty(0, dtype=torch.float32)
    if sums:
        summed = F.pad(X, (0, 0, 0, -len(X) % SUMMED)).view(-1, SUMMED, X.shape[1]).sum(1, dtype=torch.float32)
    return data, transposed, scale, summed, counted


round_op = torch.library.custom_op(
    "slope::round_e4m3",
    _round,
    mutates_args=(),
    schema="(Tensor X, Tensor largest, bool rows, bool columns, bool sums) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@round_op.register_fake
def _(X: Tensor, largest: Tensor, rows: bool, columns: bool, sums: bool) -> tuple[Tensor, ...]:
    def made(*sides: int, dtype: torch.dtype) -> Tensor:
        return X.new_empty(sides, dtype=dtype)

    data = made(*X.shape, dtype=FP8) if rows else made(0, dtype=FP8)
    transposed = made(X.shape[1], -(-len(X) // 16) * 16, dtype=FP8) if columns else made(0, dtype=FP8)
    summed = made(-(-len(X) // SUMMED), X.shape[1], dtype=torch.float32) if sums else made(0, dtype=torch.float32)
    return data, transposed, made(dtype=torch.float32), summed, made(2, dtype=torch.int64)


def column_sums(X: Operand, of_RC: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums of a matrix's columns, (C,) of `dtype`: `of_RC`'s, or what was summed while it was rounded to X."""
    return of_RC.sum(0, dtype=dtype) if X.sums is None else X.sums.sum(0).to(dtype)


def scale_of(largest: Tensor) -> Tensor:
    """The scale of a tensor with this largest magnitude, (): float32 ()."""
    exact = (largest.float() * (1 / LARGEST)).clamp(min=SMALLEST_SCALE)
    # Up to the next power of two, in the bits of float32: the mantissa becomes zero.
    power = ((exact.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(exact.isfinite(), power, exact)


def rows_of(counts: Tensor | None) -> tuple[bool, Tensor | None, Tensor | None]:
    """Whether a layer multiplies in fp8, which its counts, int64 (2, 2), are for; and those of X and dY."""
    return (False, None, None) if counts is None else (True, counts[0], counts[1])


def weight_operand(W: Tensor, dtype: torch.dtype, *, fp8: bool, transposed: bool = False) -> Operand:
    """A weight of any shape as an operand: in the products' dtype, or rounded to e4m3 once, from its own.

    transposed: only the transpose of a matrix will be used.
    """
    return operand(W if fp8 else W.to(dtype), fp8=fp8, rows=not transposed, columns=transposed)


def product(
    A_RC: Operand, B_NC: Operand, bias_N: Tensor | None = None, *, dtype: torch.dtype, exact: bool = False
) -> Tensor:
    """A · B^T + bias, (R, N) in `dtype`.

    In fp8 on a GPU of compute capability 8.9 or newer by its tensor cores, whose sides must be multiples of 16; on a
    CPU in float32, of the same operands.

    Args:
        bias_N: (N,) in `dtype`, or None.
        exact: in fp8, sum in float32 throughout, and not for a while in the fewer bits of the tensor cores: slower.
    """
    (A, scale_A), (B, scale_B) = A_RC[:2], B_NC[:2]
    if scale_A is None or scale_B is None:
        return F.linear(A, B, bias_N)  # [R,C] · [N,C]^T -> [R,N]
    if not A.numel() * B.numel():
        empty_RN = A.new_zeros(len(A), len(B), dtype=dtype)
        return empty_RN if bias_N is None else empty_RN + bias_N
    A, B = _padded(A), _padded(B)
    if not A.is_cuda:
        # [R,C] · [N,C]^T -> [R,N]
        Y_RN = (F.linear(A.float(), B.float()) * (scale_A * scale_B)).to(dtype)
        return Y_RN if bias_N is None else Y_RN + bias_N
    fused = bias_N if dtype.itemsize == 2 else None  # a GPU's product adds no bias of 32 bits
    how: dict[str, Any] = {"bias": fused, "out_dtype": dtype, "use_fast_accum": not exact}
    # Not F.scaled_mm, which torch 2.11 cannot compile. [R,C] · [C,N] -> [R,N]; in memory both matrices lie by C
    Y_RN = torch._scaled_mm(A.contiguous(), B.contiguous().t(), scale_A, scale_B, **how)
    return Y_RN if bias_N is None or fused is not None else Y_RN + bias_N


def _padded(matrix_RC: Tensor) -> Tensor:
    """With zeros behind its columns up to a multiple of 16, as the tensor cores, and `Operand.transposed`, have it."""
    if not (columns := -matrix_RC.shape[1] % 16):
        return matrix_RC
    zeros = torch.zeros(len(matrix_RC), columns, dtype=torch.uint8, device=matrix_RC.device)
    return torch.cat([matrix_RC.contiguous().view(torch.uint8), zeros], dim=1).view(matrix_RC.dtype)
