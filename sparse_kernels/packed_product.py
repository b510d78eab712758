"""The product of a PackedLinear on a GPU, as a custom operator that compilers and CUDA graphs see as one node.

Up to 64 tokens few_tokens.py multiplies, adapters and residual included. More tokens are padded to a power of two, so
that a few of cuSPARSELt's plans serve all lengths; where the library's order of metadata is another one, or it has no
plan, the matrix is made dense for the product.

Shape suffixes: B tokens, O out features, I in features, S segments, L ranks of each segment.
"""

import contextlib
import functools
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
) -> Tensor:
    """X · W^R^T + bias + residual, and of each segment (X · A^T) · B^T: (B, O).

    Args:
        X_BI: (B, I), bfloat16 or float16 as all others.
        packed: from `pack`.
        rows: of each of at most 3 segments, multiples of 16; their sum is O.
        lora_A, lora_B: (S·L, I) and (O, L), L a multiple of 16; or None.
        residual_BO: (B, O) or None.
    """
    X_BI = X_BI.contiguous()
    (tokens, columns), out = X_BI.shape, sum(rows)
    values_OK, metadata = parts(packed, out, columns, X_BI.dtype)
    if 0 < tokens <= few_tokens.MOST_TOKENS:
        work = few_tokens.work_for(out, columns, tokens, X_BI.dtype, X_BI.device.index)
        adapters = None
        if lora_A is not None and lora_B is not None:
            adapters = few_tokens.Adapters(lora_A, lora_B, tuple(rows))
        return few_tokens.matmul(work, values_OK, metadata, X_BI, bias_O, residual_BO, adapters)
    chunks = [_planned(X, packed, out, bias_O) for X in X_BI.split(_MOST_PLANNED)]
    Y_BO = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
    if lora_A is not None and lora_B is not None:
        Z_BR = F.linear(X_BI, lora_A)  # [B,I] · [S·L,I]^T -> [B,S·L]
        L, segments = lora_B.shape[1], zip(Y_BO.split([*rows], 1), lora_B.split([*rows]), strict=True)
        for (Y_Bo, B_oL), Z_BL in zip(segments, Z_BR.split(L, 1), strict=True):
            Y_Bo.addmm_(Z_BL, B_oL.t())  # [B,L] · [o,L]^T -> [B,o]
    return Y_BO if residual_BO is None else Y_BO.add_(residual_BO)


@packed_linear.register_fake
def _(X_BI: Tensor, packed: Tensor, rows: Sequence[int], *others: Tensor | None) -> Tensor:
    return X_BI.new_empty(X_BI.shape[0], sum(rows))


def _planned(X_BI: Tensor, packed: Tensor, rows: int, bias_O: Tensor | None) -> Tensor:
    """X · W^R^T + bias by the library: (B, O)."""
    tokens, columns = X_BI.shape
    padded = max(_FEWEST_PLANNED, 1 << (tokens - 1).bit_length()) if tokens else 0
    shape = MatmulShape(rows, columns, padded, X_BI.dtype, bias_O is not None)
    plan = _plan(shape, X_BI.device.index) if tokens else None
    if plan is None:
        dense_OI = cuda.expand(*parts(packed, rows, columns, X_BI.dtype), columns)
        return F.linear(X_BI, dense_OI, bias_O)  # [B,I] · [O,I]^T -> [B,O]
    if tokens < padded:
        X_BI = F.pad(X_BI, (0, 0, 0, padded - tokens))
    return plan.matmul(packed, X_BI, bias_O)[:tokens]


@functools.cache
def _plan(shape: MatmulShape, device_index: int) -> MatmulPlan | None:
    """A plan of the library, if it reads metadata in tile order."""

    def make() -> MatmulPlan | None:
        with contextlib.suppress(CuSparseLtError):  # no library
            if writes_metadata(shape.rows, shape.columns, shape.dtype, device_index):
                return kernel_choice.plan_for(shape, device_index)
        return None

    return None if kernel_choice.refusal(shape) else outside_graphs(make)
