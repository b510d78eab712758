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

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
ROUNDS_TO_ZERO = 2.0**-10
"""The largest magnitude that becomes zero in e4m3: half of its smallest."""
SMALLEST_SCALE = 2.0**-126
"""About the smallest float32 that has a reciprocal; a tensor of zeros has it, too."""
COUNTED = ("X", "dY")
"""The operands of a layer whose entries are counted in each product, in the order of `counts`."""


class Operand(NamedTuple):
    """A matrix as a product reads it: `data` times `scale`, which is float32 (); None for 1."""

    data: Tensor
    scale: Tensor | None = None

    def t(self) -> "Operand":
        """The transpose."""
        return Operand(self.data.t(), self.scale)


def operand(X: Tensor, *, fp8: bool, counts: Tensor | None = None) -> Operand:
    """A tensor of any shape as an operand: as it is, or rounded to e4m3.

    A value that is not finite makes all of them NaN in fp8, and so whatever is computed from them.

    Args:
        counts: int64 (2,), to which are added how many entries are not zero, and how many of them become zero.
    """
    if not fp8:
        return Operand(X)
    if not X.numel():
        return Operand(X.to(FP8), X.new_ones((), dtype=torch.float32))
    # By products, because compilers and GPUs divide each in their own way.
    scale = scale_of(X.abs().amax())
    scaled = X.float() * scale.reciprocal()  # in float32, to be rounded once
    if counts is not None:
        counts[0] += (scaled != 0).sum()
        counts[1] += ((scaled != 0) & (scaled.abs() <= ROUNDS_TO_ZERO)).sum()
    return Operand(scaled.to(FP8), scale)


def scale_of(largest: Tensor) -> Tensor:
    """The scale of a tensor with this largest magnitude, (): float32 ()."""
    exact = (largest.float() * (1 / LARGEST)).clamp(min=SMALLEST_SCALE)
    # Up to the next power of two, in the bits of float32: the mantissa becomes zero.
    power = ((exact.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(exact.isfinite(), power, exact)


def rows_of(counts: Tensor | None) -> tuple[bool, Tensor | None, Tensor | None]:
    """Whether a layer multiplies in fp8, which its counts, int64 (2, 2), are for; and those of X and dY."""
    return (False, None, None) if counts is None else (True, counts[0], counts[1])


def weight_operand(W: Tensor, dtype: torch.dtype, *, fp8: bool) -> Operand:
    """A weight of any shape as an operand: in the products' dtype, or rounded to e4m3 once, from its own."""
    return operand(W if fp8 else W.to(dtype), fp8=fp8)


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
    (A, scale_A), (B, scale_B) = A_RC, B_NC
    if scale_A is None or scale_B is None:
        return F.linear(A, B, bias_N)  # [R,C] · [N,C]^T -> [R,N]
    if not A.numel() * B.numel():
        empty_RN = A.new_zeros(len(A), len(B), dtype=dtype)
        return empty_RN if bias_N is None else empty_RN + bias_N
    if not A.is_cuda:
        # [R,C] · [N,C]^T -> [R,N]
        Y_RN = (F.linear(A.float(), B.float()) * (scale_A * scale_B)).to(dtype)
        return Y_RN if bias_N is None else Y_RN + bias_N
    if padding := -A.shape[1] % 16:  # tokens, in a weight gradient
        A, B = _padded(A, padding), _padded(B, padding)
    fused = bias_N if dtype.itemsize == 2 else None  # a GPU's product adds no bias of 32 bits
    how: dict[str, Any] = {"bias": fused, "out_dtype": dtype, "use_fast_accum": not exact}
    # Not F.scaled_mm, which torch 2.11 cannot compile. [R,C] · [C,N] -> [R,N]; in memory both matrices lie by C
    Y_RN = torch._scaled_mm(A.contiguous(), B.contiguous().t(), scale_A, scale_B, **how)
    return Y_RN if bias_N is None or fused is not None else Y_RN + bias_N


def _padded(matrix_RC: Tensor, columns: int) -> Tensor:
    zeros = torch.zeros(len(matrix_RC), columns, dtype=torch.uint8, device=matrix_RC.device)
    return torch.cat([matrix_RC.contiguous().view(torch.uint8), zeros], dim=1).view(matrix_RC.dtype)
