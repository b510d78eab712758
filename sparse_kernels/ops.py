"""The products of a 2:4 layer on a GPU as torch custom ops.

    linear(X, values, bias, positions, positions_t) -> Y        forward, by the copy of W^R
    input_grad(dY, values, positions, positions_t) -> dX        by the copy of W^{R,C} transposed
    weight_grad(dY, X, values, positions) -> dV                 dense product, then gather_kept

The copies are those of copies.py. The ops are functions of their arguments alone: on a CPU or in another dtype they
give the same by plain torch. Shape suffixes: B tokens, O out features, I in features, K = I/2 kept entries of a row.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_kernels import cuda, masks, packed, reference
from sparse_kernels.packed import Weight

# Of two entries at most one, of four at most two: to the kernels 1:2 is a case of 2:4.
TWO_OF_FOUR = ((2, 4), (1, 2))
HALF = (torch.bfloat16, torch.float16)


# The ops, registered as slope::<name> for torch.compile, which sees them as opaque. In eager mode the fast bodies are
# called directly: the dispatcher would double their cost on the host.


@functools.cache
def _usable(device_index: int) -> bool:
    if reason := cuda.missing(device_index):
        warnings.warn(f"2:4 layers run on the reference backend: {reason}", RuntimeWarning, stacklevel=2)
    return not reason


def fast(X: Tensor, values_OK: Tensor) -> bool:
    """Whether the kernels take this input and 2:4 weight: X in bfloat16 or float16, values in float32 or the same."""
    return X.dtype in HALF and values_OK.dtype in (X.dtype, torch.float32) and X.is_cuda and fast_weight(values_OK)


def fast_weight(values_OK: Tensor) -> bool:
    """Whether the kernels take a 2:4 weight at all: on CUDA, float32 or 16 bits, sides that are multiples of 16."""
    if packed.backend() == "reference" or not values_OK.is_cuda or (values_OK.shape[0] | values_OK.shape[1] * 2) % 16:
        return False
    return values_OK.dtype in (torch.float32, *HALF) and _usable(values_OK.get_device())


def _aligned(X: Tensor) -> Tensor:
    X = X.contiguous()
    return X.clone() if X.data_ptr() % 16 else X


def _scatter(weight: Weight, mask_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """(O, I): the values where `mask_OI` keeps them too, by plain torch."""
    row_mask_OI = masks.unpack_bits(weight.positions, weight.sides[1])
    dense_OI = torch.zeros_like(row_mask_OI, dtype=weight.values.dtype).masked_scatter_(row_mask_OI, weight.values)
    return (dense_OI * mask_OI).to(dtype)


def _linear_fast(X_BI: Tensor, values: Tensor, bias: Tensor | None, positions: Tensor, positions_t: Tensor) -> Tensor:
    return packed.copies_of(positions, X_BI.dtype).linear(_aligned(X_BI), Weight(values, positions, positions_t), bias)


def _input_grad_fast(dY_BO: Tensor, values: Tensor, positions: Tensor, positions_t: Tensor) -> Tensor:
    return packed.copies_of(positions, dY_BO.dtype).input_grad(_aligned(dY_BO), Weight(values, positions, positions_t))


def _weight_grad_fast(dY_BO: Tensor, X_BI: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return cuda.gather_kept(dY_BO.t() @ X_BI, positions, values.dtype)  # [O,B] · [B,I] -> [O,I] -> [O,K]


def _linear(X_BI: Tensor, values: Tensor, bias: Tensor | None, positions: Tensor, positions_t: Tensor) -> Tensor:
    if fast(X_BI, values):
        return _linear_fast(X_BI, values, bias, positions, positions_t)
    weight = Weight(values, positions, positions_t)
    W_OI = _scatter(weight, masks.unpack_bits(positions, weight.sides[1]), X_BI.dtype)
    return F.linear(X_BI, W_OI, None if bias is None else bias.to(X_BI.dtype))


def _input_grad(dY_BO: Tensor, values: Tensor, positions: Tensor, positions_t: Tensor) -> Tensor:
    if fast(dY_BO, values):
        return _input_grad_fast(dY_BO, values, positions, positions_t)
    weight = Weight(values, positions, positions_t)
    return dY_BO @ _scatter(weight, masks.unpack_bits(positions_t, weight.sides[0]).t(), dY_BO.dtype)


def _exact_input_grad(dY_BO: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    row_mask_OI = masks.unpack_bits(positions, values.shape[1] * 2)
    return dY_BO @ torch.zeros_like(row_mask_OI, dtype=values.dtype).masked_scatter_(row_mask_OI, values).to(
        dY_BO.dtype
    )


def _weight_grad(dY_BO: Tensor, X_BI: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    if fast(X_BI, values):
        return _weight_grad_fast(dY_BO, X_BI, values, positions)
    dW_OI = dY_BO.t() @ X_BI
    index_OK = reference.kept_columns(masks.unpack_bits(positions, dW_OI.shape[1]), 2, 4)  # 1:2 too is 2 of 4
    return reference.gather_kept(dW_OI, index_OK).to(values.dtype)


linear_op = torch.library.custom_op("slope::linear", _linear, mutates_args=())
input_grad_op = torch.library.custom_op("slope::input_grad", _input_grad, mutates_args=())
weight_grad_op = torch.library.custom_op("slope::weight_grad", _weight_grad, mutates_args=())


@linear_op.register_fake
def _(X_BI: Tensor, values: Tensor, bias: Tensor | None, positions: Tensor, positions_t: Tensor) -> Tensor:
    return X_BI.new_empty(X_BI.shape[0], values.shape[0])


@input_grad_op.register_fake
def _(dY_BO: Tensor, values: Tensor, positions: Tensor, positions_t: Tensor) -> Tensor:
    return dY_BO.new_empty(dY_BO.shape[0], positions_t.shape[0])


@weight_grad_op.register_fake
def _(dY_BO: Tensor, X_BI: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return torch.empty_like(values)


def _save(ctx: Any, X_BI: Tensor, values: Tensor, bias: Tensor | None, positions: Tensor, positions_t: Tensor) -> None:
    ctx.save_for_backward(X_BI, values, positions, positions_t)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(
    ctx: Any, dY_BO: Tensor, input_grad: Callable[..., Tensor], weight_grad: Callable[..., Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    X_BI, values, positions, positions_t = ctx.saved_tensors
    dX = dV = db = None
    if ctx.needs_input_grad[0]:
        frozen = not ctx.needs_input_grad[1]
        dX = (
            _exact_input_grad(dY_BO, values, positions) if frozen else input_grad(dY_BO, values, positions, positions_t)
        )
    if ctx.needs_input_grad[1]:
        dV = weight_grad(dY_BO, X_BI, values, positions)
    if ctx.needs_input_grad[2]:
        db = dY_BO.sum(0, dtype=ctx.bias_dtype)
    return dX, dV, db, None, None


linear_op.register_autograd(
    lambda ctx, dY_BO: _gradients(ctx, dY_BO, input_grad_op, weight_grad_op),
    setup_context=lambda ctx, inputs, output: _save(ctx, *inputs),
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, X_BI: Tensor, values: Tensor, bias: Tensor | None, positions: Tensor, positions_t: Tensor
    ) -> Tensor:
        _save(ctx, X_BI, values, bias, positions, positions_t)
        return _linear_fast(X_BI, values, bias, positions, positions_t)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY_BO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        return _gradients(ctx, dY_BO, _input_grad_fast, _weight_grad_fast)


def linear(X: Tensor, values: Tensor, bias: Tensor | None, positions: Tensor, positions_t: Tensor) -> Tensor:
    """Y = X · W^R^T + bias, whose gradient with respect to X goes through W^{R,C}; through W^R if values are frozen.

    Args:
        X: (..., I); decides the dtype of the three products. On CUDA and not compiled: what `fast` takes.
        values: (O, K), the kept entries of W^R in column order.
        bias: (O,) or None.
        positions: uint8 (O, I/8), the bits of W^R's mask.
        positions_t: uint8 (I, O/8), the bits of W^{R,C}'s mask, transposed.

    Returns:
        (..., O), the dtype of X.
    """
    X_BI = X if X.dim() == 2 else X.reshape(-1, X.shape[-1])
    run: Callable[..., Tensor] = linear_op
    if X.is_cuda and not torch.compiler.is_compiling():
        run = _Linear.apply if torch.is_grad_enabled() else _linear_fast
    Y_BO = run(X_BI, values, bias, positions, positions_t)
    return Y_BO if X.dim() == 2 else Y_BO.view(*X.shape[:-1], values.shape[0])
