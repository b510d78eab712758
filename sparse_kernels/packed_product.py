"""The product of a PackedLinear on a GPU, as a custom operator that compilers and CUDA graphs see as one node.

Up to 64 tokens few_tokens.py multiplies, adapters and residual included. More tokens are padded to a power of two, so
that a few of cuSPARSELt's plans serve all lengths; where the library's order of metadata is another one, or it has no
plan, the matrix is made dense for the product.

Shape suffixes: B tokens, O out features, I in features, S segments, L ranks of each segment.
"""

import contextlib
import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels import cuda, few_tokens, kernel_choice, tile_metadata
from sparse_kernels.cusparselt import CuSparseLtError
from sparse_kernels.formats import FORMATS
from sparse_kernels.matmul_plan import MatmulPlan, MatmulShape, writes_metadata
from sparse_kernels.packed import outside_graphs

_FEWEST_PLANNED, _MOST_PLANNED = 256, 8192


def pack(values_OK: Tensor, metadata: Tensor) -> Tensor:
    """Values and metadata in one uint8 buffer, as the kernels and the library read them; that whose parts they are."""
    whole, size = values_OK.untyped_storage(), values_OK.nbytes
    padding = -(size + len(metadata)) % 256
    places = whole.data_ptr(), whole.data_ptr() + size, size + len(metadata) + padding
    if values_OK.is_contiguous() and (values_OK.data_ptr(), metadata.data_ptr(), whole.nbytes()) == places:
        return metadata.new_empty(0).set_(whole)
    return F.pad(torch.cat([values_OK.reshape(-1).view(torch.uint8), metadata]), (0, padding))


def parts(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The views of `pack`'s buffer: values (O, I/2), and metadata."""
    size = FORMATS[dtype].value_bytes(rows, columns)
    values_OK = FORMATS[dtype].values(packed, rows, columns)
    return values_OK, packed[size : size + tile_metadata.metadata_bytes(rows, columns)]


@torch.library.custom_op("slope::packed_linear", mutates_args=())
def packed_linear(
    X_BI: Tensor,
    packed: Tensor,
    rows: Sequence[int],
    bias_O: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    residual_BO: Tensor | None,
    Z_BR: Tensor | None,
) -> Tensor:
    """X · W^R^T + bias + residual, and of each segment (X · A^T) · B^T: (B, O).

    Args:
        X_BI: (B, I), bfloat16 or float16 as all others.
        packed: from `pack`.
        rows: of each of at most 3 segments, multiples of 16; their sum is O.
        lora_A, lora_B: (S·L, I) and (O, L), L a multiple of 16; or None.
        residual_BO: (B, O) or None.
        Z_BR: X · A^T, (B, S·L), of at most 64 tokens, where it is there already.
    """
    X_BI, residual_BO = X_BI.contiguous(), None if residual_BO is None else residual_BO.contiguous()
    (tokens, columns), out = X_BI.shape, sum(rows)
    values_OK, metadata = parts(packed, out, columns, X_BI.dtype)
    if 0 < tokens <= few_tokens.MOST_TOKENS:
        work = few_tokens.work_for(out, columns, tokens, X_BI.dtype, X_BI.device.index)
        adapters = None
        if lora_A is not None and lora_B is not None:
            adapters = few_tokens.Adapters(lora_A, lora_B, tuple(rows), Z_BR)
        return few_tokens.matmul(work, values_OK, metadata, X_BI, bias_O, residual_BO, adapters)
    residuals = itertools.repeat(None) if residual_BO is None else residual_BO.split(_MOST_PLANNED)
    pairs = zip(X_BI.split(_MOST_PLANNED), residuals, strict=False)
    chunks = [_planned(X, packed, rows, bias_O, lora_A, lora_B, residual) for X, residual in pairs]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


@packed_linear.register_fake
def _(X_BI: Tensor, packed: Tensor, rows: Sequence[int], *others: Tensor | None) -> Tensor:
    return X_BI.new_empty(X_BI.shape[0], sum(rows))


def _planned(
    X_BI: Tensor,
    packed: Tensor,
    rows: Sequence[int],
    bias_O: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    residual_BO: Tensor | None,
) -> Tensor:
    """The same by the library: the adapters' products and the residual are what it adds its product to."""
    (tokens, columns), out = X_BI.shape, sum(rows)
    padded = max(_FEWEST_PLANNED, 1 << (tokens - 1).bit_length()) if tokens else 0
    shape = MatmulShape(out, columns, padded, X_BI.dtype, bias_O is not None)
    plan = _plan(shape, X_BI.device.index) if tokens else None
    plus_BO = residual_BO
    if lora_A is not None and lora_B is not None:
        plus_BO = X_BI.new_empty(tokens if plan is None else padded, out)
        _adapt(X_BI, rows, lora_A, lora_B, residual_BO, plus_BO[:tokens])
    if plan is None:
        dense_OI = cuda.expand(*parts(packed, out, columns, X_BI.dtype), columns)
        Y_BO = F.linear(X_BI, dense_OI, bias_O)  # [B,I] · [O,I]^T -> [B,O]
        return Y_BO if plus_BO is None else Y_BO.add_(plus_BO)
    if tokens < padded:
        X_BI = F.pad(X_BI, (0, 0, 0, padded - tokens))
        if plus_BO is residual_BO and residual_BO is not None:
            plus_BO = F.pad(residual_BO, (0, 0, 0, padded - tokens))
    return plan.matmul(packed, X_BI, bias_O, plus_BO)[:tokens]


def _adapt(
    X_BI: Tensor, rows: Sequence[int], lora_A: Tensor, lora_B: Tensor, residual_BO: Tensor | None, out_BO: Tensor
) -> None:
    """Write (X · A^T) · B^T of each segment, plus the residual."""
    ranks, Z_BR = lora_B.shape[1], F.linear(X_BI, lora_A)  # [B,I] · [S·L,I]^T -> [B,S·L]
    residuals = itertools.repeat(None) if residual_BO is None else residual_BO.split([*rows], 1)
    segments = zip(out_BO.split([*rows], 1), Z_BR.split(ranks, 1), lora_B.split([*rows]), residuals, strict=False)
    for out_Bo, Z_BL, B_oL, residual_Bo in segments:  # [B,L] · [o,L]^T -> [B,o]
        if residual_Bo is None:
            torch.mm(Z_BL, B_oL.t(), out=out_Bo)
        else:
            torch.addmm(residual_Bo, Z_BL, B_oL.t(), out=out_Bo)


@functools.cache
def _plan(shape: MatmulShape, device_index: int) -> MatmulPlan | None:
    """A plan of the library, if it reads metadata in tile order."""

    def make() -> MatmulPlan | None:
        with contextlib.suppress(CuSparseLtError):  # no library
            if writes_metadata(shape.rows, shape.columns, shape.dtype, device_index):
                return kernel_choice.plan_for(shape, device_index)
        return None

    return None if kernel_choice.refusal(shape) else outside_graphs(make)
