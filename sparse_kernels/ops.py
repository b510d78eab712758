"""The products of a 2:4 layer on a GPU as torch custom ops.

    linear(X, values, bias, bits..., backend) -> Y             forward, by the packed W^R
    input_grad(dY, values, bits..., backend, exact) -> dX      by the packed W^{R,C}; exact: by W^R, of frozen values
    weight_grad(dY, X, values, bits..., backend) -> dV         dense product, then gather_kept

In fp8 the first two multiply rounded data, and also return the weights' scale (operands.py); `fp8_linear` rounds and
scales outside of them, where torch's compiler fuses it: cuSPARSELt 0.8.0 takes pointers to scales of A and B in fp8 and
ignores them, and refuses a vector for alpha.

The packed weights are those of packed.py. The ops are functions of their arguments alone: on a CPU or in another dtype
they give the same by plain torch. Shape suffixes: B tokens, O out features, I in features, K = I/2 kept entries of a
row. row_bits is uint8 (O, I/8), W^R's mask; backward_bits uint8 (I, O/8), W^{R,C}'s mask, transposed.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sparse_kernels import cuda, kernel_choice, masks, reference
from sparse_kernels.formats import E4M3, FORMATS, HALVES, SIDE_MULTIPLE
from sparse_kernels.operands import Operand, column_sums, operand, product, rows_of
from sparse_kernels.packed import Backend, LayerWeight, PackedLayer, packed_layer

# Of two entries at most one, of four at most two: to the kernels 1:2 is a case of 2:4.
TWO_OF_FOUR = ((2, 4), (1, 2))


@functools.cache
def _usable(device_index: int) -> bool:
    if reason := cuda.missing(device_index):
        warnings.warn(f"2:4 layers run on the reference backend: {reason}", RuntimeWarning, stacklevel=2)
    return not reason


def fast(X: Tensor, values_OK: Tensor, backend: str) -> bool:
    """Whether the kernels take this input and 2:4 weight: X in a format's dtype, values in float32 or the same."""
    supported = X.dtype in FORMATS and values_OK.dtype in (X.dtype, torch.float32) and X.is_cuda
    return supported and fast_weight(values_OK, backend)


def fast_weight(values_OK: Tensor, backend: str) -> bool:
    """Whether the kernels take a 2:4 weight at all: on CUDA, float32 or 16 bits, sides that are multiples of 16."""
    if backend == "reference" or not values_OK.is_cuda or (values_OK.shape[0] | values_OK.shape[1] * 2) % SIDE_MULTIPLE:
        return False
    return values_OK.dtype in (torch.float32, *HALVES) and _usable(values_OK.get_device())


def fast_fp8(values_OK: Tensor, backend: str) -> bool:
    """Whether the kernels take a 2:4 weight in fp8: of float32 values."""
    sides = (values_OK.shape[0] | values_OK.shape[1] * 2) % E4M3.sides
    return values_OK.dtype == torch.float32 and not sides and fast_weight(values_OK, backend)


def _aligned(X: Tensor) -> Tensor:
    X = X.contiguous()
    return X.clone() if X.data_ptr() % 16 else X


def _packed(X: Tensor, row_bits: Tensor, backend: str) -> PackedLayer:
    return packed_layer(row_bits, X.dtype, cast(Backend, backend))


# ---------------------------------------------------------------------------------------------------------------------
# By the kernels. In eager mode these are called directly: the dispatcher would double their cost on the host.


def _linear_fast(
    X_BI: Tensor, values: Tensor, bias: Tensor | None, row_bits: Tensor, backward_bits: Tensor, backend: str
) -> Tensor:
    weight = LayerWeight(values, row_bits, backward_bits, bias)
    return _packed(X_BI, row_bits, backend).linear(_aligned(X_BI), weight)


def _input_grad_fast(
    dY_BO: Tensor, values: Tensor, row_bits: Tensor, backward_bits: Tensor, backend: str, exact: bool
) -> Tensor:
    packed, weight = _packed(dY_BO, row_bits, backend), LayerWeight(values, row_bits, backward_bits)
    return packed.exact_input_grad(dY_BO, weight) if exact else packed.input_grad(_aligned(dY_BO), weight)


def _weight_grad_fast(dY_BO: Tensor, X_BI: Tensor, values: Tensor, row_bits: Tensor, backend: str) -> Tensor:
    return cuda.gather_kept(dY_BO.t() @ X_BI, row_bits, values.dtype)  # [O,B] · [B,I] -> [O,I] -> [O,K]


# ---------------------------------------------------------------------------------------------------------------------
# The ops, registered as slope::<name> for torch.compile, which sees them as opaque


def _linear(
    X_BI: Tensor, values: Tensor, bias: Tensor | None, row_bits: Tensor, backward_bits: Tensor, backend: str
) -> Tensor:
    if fast(X_BI, values, backend):
        return _linear_fast(X_BI, values, bias, row_bits, backward_bits, backend)
    W_OI = masks.scatter(values, masks.unpack_bits(row_bits, X_BI.shape[1])).to(X_BI.dtype)
    return F.linear(X_BI, W_OI, None if bias is None else bias.to(X_BI.dtype))  # [B,I] · [O,I]^T -> [B,O]


def _input_grad(
    dY_BO: Tensor, values: Tensor, row_bits: Tensor, backward_bits: Tensor, backend: str, exact: bool
) -> Tensor:
    if fast(dY_BO, values, backend):
        return _input_grad_fast(dY_BO, values, row_bits, backward_bits, backend, exact)
    W_OI = masks.scatter(values, masks.unpack_bits(row_bits, backward_bits.shape[0]))
    if not exact:
        W_OI = W_OI * masks.unpack_bits(backward_bits, values.shape[0]).t()
    return dY_BO @ W_OI.to(dY_BO.dtype)  # [B,O] · [O,I] -> [B,I]


def _weight_grad(dY_BO: Tensor, X_BI: Tensor, values: Tensor, row_bits: Tensor, backend: str) -> Tensor:
    if fast(X_BI, values, backend):
        return _weight_grad_fast(dY_BO, X_BI, values, row_bits, backend)
    return _gathered(dY_BO.t() @ X_BI, values, row_bits)  # [O,B] · [B,I] -> [O,I] -> [O,K]


def _gathered(dW_OI: Tensor, values: Tensor, row_bits: Tensor) -> Tensor:
    return reference.gather_kept(dW_OI, _kept_columns(row_bits, dW_OI.shape[1])).to(values.dtype)


def _kept_columns(row_bits: Tensor, columns: int) -> Tensor:
    return reference.kept_columns(masks.unpack_bits(row_bits, columns), 2, 4)  # 1:2 too is 2 of 4


linear_op = torch.library.custom_op("slope::linear", _linear, mutates_args=())
input_grad_op = torch.library.custom_op("slope::input_grad", _input_grad, mutates_args=())
weight_grad_op = torch.library.custom_op("slope::weight_grad", _weight_grad, mutates_args=())


@linear_op.register_fake
def _(
    X_BI: Tensor, values: Tensor, bias: Tensor | None, row_bits: Tensor, backward_bits: Tensor, backend: str
) -> Tensor:
    return X_BI.new_empty(X_BI.shape[0], values.shape[0])


@input_grad_op.register_fake
def _(dY_BO: Tensor, values: Tensor, row_bits: Tensor, backward_bits: Tensor, backend: str, exact: bool) -> Tensor:
    return dY_BO.new_empty(dY_BO.shape[0], backward_bits.shape[0])


@weight_grad_op.register_fake
def _(dY_BO: Tensor, X_BI: Tensor, values: Tensor, row_bits: Tensor, backend: str) -> Tensor:
    return torch.empty_like(values)


def _save(
    ctx: Any, X_BI: Tensor, values: Tensor, bias: Tensor | None, row_bits: Tensor, backward_bits: Tensor, backend: str
) -> None:
    ctx.save_for_backward(X_BI, values, row_bits, backward_bits)
    ctx.bias_dtype, ctx.backend = None if bias is None else bias.dtype, backend


def _gradients(
    ctx: Any, dY_BO: Tensor, input_grad: Callable[..., Tensor], weight_grad: Callable[..., Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
    X_BI, values, row_bits, backward_bits = ctx.saved_tensors
    needs_X, needs_values, needs_bias = ctx.needs_input_grad[:3]
    dX = dV = db = None
    if needs_X:
        dX = input_grad(dY_BO, values, row_bits, backward_bits, ctx.backend, not needs_values)
    if needs_values:
        dV = weight_grad(dY_BO, X_BI, values, row_bits, ctx.backend)
    if needs_bias:
        db = dY_BO.sum(0, dtype=ctx.bias_dtype)
    return dX, dV, db, None, None, None


linear_op.register_autograd(
    lambda ctx, dY_BO: _gradients(ctx, dY_BO, input_grad_op, weight_grad_op),
    setup_context=lambda ctx, inputs, output: _save(ctx, *inputs),
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, *inputs)
        return _linear_fast(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY_BO: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dY_BO, _input_grad_fast, _weight_grad_fast)


def linear(
    X: Tensor, values: Tensor, bias: Tensor | None, row_bits: Tensor, backward_bits: Tensor, backend: Backend = "auto"
) -> Tensor:
    """Y = X · W^R^T + bias, whose gradient with respect to X goes through W^{R,C}; through W^R if values are frozen.

    Args:
        X: (..., I); decides the dtype of the three products. On CUDA and not compiled: what `fast` takes.
        values: (O, K), the kept entries of W^R in column order.
        bias: (O,) or None.
        row_bits: uint8 (O, I/8), W^R's mask.
        backward_bits: uint8 (I, O/8), W^{R,C}'s mask, transposed.
        backend: see `sparse_kernels.set_backend`.

    Returns:
        (..., O), the dtype of X.
    """
    X_BI = X if X.dim() == 2 else X.reshape(-1, X.shape[-1])
    run: Callable[..., Tensor] = linear_op
    # A dispatch mode, such as that of selective activation checkpointing, sees ops alone.
    if X.is_cuda and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode():
        run = _Linear.apply if torch.is_grad_enabled() else _linear_fast
    Y_BO = run(X_BI, values, bias, row_bits, backward_bits, backend)
    return Y_BO if X.dim() == 2 else Y_BO.view(*X.shape[:-1], values.shape[0])


# ---------------------------------------------------------------------------------------------------------------------
# In fp8


def _linear_fp8(
    X_BI: Tensor, values: Tensor, row_bits: Tensor, backward_bits: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    if fast_fp8(values, backend):
        packed = _packed(X_BI, row_bits, backend)
        Y_BO = packed.linear(_aligned(X_BI), LayerWeight(values, row_bits, backward_bits))
        return Y_BO, packed.scale
    kept = operand(values, fp8=True)
    W_OI = _scattered(kept.data, row_bits, X_BI.shape[1])
    return kernel_choice.dense(X_BI, W_OI), _scale(kept)  # [B,I] · [O,I]^T -> [B,O]


def _input_grad_fp8(
    dY_BO: Tensor, values: Tensor, row_bits: Tensor, backward_bits: Tensor, backend: str, exact: bool
) -> tuple[Tensor, Tensor]:
    if fast_fp8(values, backend) and not exact:
        packed = _packed(dY_BO, row_bits, backend)
        dX_BI = packed.input_grad(_aligned(dY_BO), LayerWeight(values, row_bits, backward_bits))
        return dX_BI, packed.scale
    kept = operand(values, fp8=True)
    W_OI = _scattered(kept.data, row_bits, backward_bits.shape[0]).view(torch.uint8)
    if not exact:
        W_OI = W_OI * masks.unpack_bits(backward_bits, values.shape[0]).t()
    return kernel_choice.dense(dY_BO, W_OI.view(kept.data.dtype).t()), _scale(kept)  # [B,O] · [O,I] -> [B,I]


def _scale(one: Operand) -> Tensor:
    assert one.scale is not None
    return one.scale


def _gather_kept(dW_OI: Tensor, values: Tensor, row_bits: Tensor, backend: str) -> Tensor:
    if fast_fp8(values, backend):
        return cuda.gather_kept(dW_OI, row_bits, values.dtype)
    return _gathered(dW_OI, values, row_bits)


def _scattered(values_OK: Tensor, row_bits: Tensor, columns: int) -> Tensor:
    return reference.scatter_kept(values_OK, _kept_columns(row_bits, columns), columns)


linear_fp8_op = torch.library.custom_op("slope::linear_fp8", _linear_fp8, mutates_args=())
input_grad_fp8_op = torch.library.custom_op("slope::input_grad_fp8", _input_grad_fp8, mutates_args=())
gather_kept_op = torch.library.custom_op("slope::gather_kept", _gather_kept, mutates_args=())


@linear_fp8_op.register_fake
def _(X_BI: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    Y_BO = X_BI.new_empty(X_BI.shape[0], values.shape[0], dtype=E4M3.result)
    return Y_BO, X_BI.new_empty((), dtype=torch.float32)


@input_grad_fp8_op.register_fake
def _(dY_BO: Tensor, values: Tensor, row_bits: Tensor, backward_bits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    dX_BI = dY_BO.new_empty(dY_BO.shape[0], backward_bits.shape[0], dtype=E4M3.result)
    return dX_BI, dY_BO.new_empty((), dtype=torch.float32)


@gather_kept_op.register_fake
def _(dW_OI: Tensor, values: Tensor, *_: object) -> Tensor:
    return torch.empty_like(values)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        X_BI: Tensor,
        values: Tensor,
        bias: Tensor | None,
        row_bits: Tensor,
        backward_bits: Tensor,
        counts: Tensor,
        backend: str,
    ) -> Tensor:
        _, of_X, _ = rows_of(counts)
        X = operand(X_BI, fp8=True, columns=ctx.needs_input_grad[1], counts=of_X)
        ctx.save_for_backward(X.transposed, X.scale, values, row_bits, backward_bits, counts)
        ctx.bias_dtype, ctx.backend = None if bias is None else bias.dtype, backend
        product_BO, scale = linear_fp8_op(X.data, values, row_bits, backward_bits, backend)
        Y_BO: Tensor = product_BO * (_scale(X) * scale)
        return Y_BO if bias is None else Y_BO + bias.to(Y_BO.dtype)

    @staticmethod
    def backward(ctx: Any, dY_BO: Tensor) -> tuple[Tensor | None, ...]:
        data_IB, scale, values, row_bits, backward_bits, counts = ctx.saved_tensors
        needs_X, needs_values, needs_bias = ctx.needs_input_grad[:3]
        _, _, of_dY = rows_of(counts)
        dY = operand(dY_BO, fp8=True, rows=needs_X, columns=needs_values, sums=needs_bias, counts=of_dY)
        dX = dV = db = None
        if needs_X:
            how = values, row_bits, backward_bits, ctx.backend, not needs_values
            product_BI, of_W = input_grad_fp8_op(dY.data, *how)
            dX = product_BI * (_scale(dY) * of_W)
        if needs_values:
            # [O,B] · [B,I] -> [O,I]
            dW_OI = product(dY.t(), Operand(data_IB, scale), dtype=E4M3.result, exact=True)
            dV = gather_kept_op(dW_OI, values, row_bits, ctx.backend)
        if needs_bias:
            db = column_sums(dY, dY_BO, ctx.bias_dtype)
        return dX, dV, db, None, None, None, None


def fp8_linear(
    X: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_bits: Tensor,
    backward_bits: Tensor,
    counts: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """As `linear`, with the operands of all three products rounded to e4m3.

    Args:
        X: (..., I), bfloat16.
        counts: int64 (2, 2); see operands.py.
        Others are those of `linear`.

    Returns:
        (..., O), bfloat16.
    """
    X_BI = X if X.dim() == 2 else X.reshape(-1, X.shape[-1])
    Y_BO: Tensor = _Fp8Linear.apply(X_BI, values, bias, row_bits, backward_bits, counts, backend)
    return Y_BO if X.dim() == 2 else Y_BO.view(*X.shape[:-1], values.shape[0])
