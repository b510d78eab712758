"""The product of a PackedLinear on a GPU, as a custom operator that compilers and CUDA graphs see as one node.

Up to 64 tokens few_tokens.py multiplies, adapters and residual included. More tokens are padded to a power of two, so
that a few of cuSPARSELt's plans serve all lengths; where the library's order of metadata is another one, or it has no
plan, the matrix is made dense for the product. cuBLAS multiplies the adapters, before the product or after it,
whichever was faster.

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
from sparse_kernels.few_tokens import Adapters
from sparse_kernels.formats import FORMATS
from sparse_kernels.kernel_choice import Choice
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
    adapters = None
    if lora_A is not None and lora_B is not None:
        adapters = Adapters(lora_A, lora_B, tuple(rows), Z_BR)
    if 0 < tokens <= few_tokens.MOST_TOKENS:
        lora = adapters.shape if adapters else ()
        work = few_tokens.work_for(out, columns, tokens, X_BI.dtype, X_BI.device.index, lora)
        return few_tokens.matmul(work, values_OK, metadata, X_BI, bias_O, residual_BO, adapters)
    residuals = itertools.repeat(None) if residual_BO is None else residual_BO.split(_MOST_PLANNED)
    pairs = zip(X_BI.split(_MOST_PLANNED), residuals, strict=False)
    chunks = [_planned(X, packed, out, bias_O, residual, adapters) for X, residual in pairs]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


@packed_linear.register_fake
def _(X_BI: Tensor, packed: Tensor, rows: Sequence[int], *others: Tensor | None) -> Tensor:
    return X_BI.new_empty(X_BI.shape[0], sum(rows))


def _planned(
    X_BI: Tensor, packed: Tensor, out: int, bias_O: Tensor | None, residual_BO: Tensor | None, adapters: Adapters | None
) -> Tensor:
    """The same by the library, and by cuBLAS the adapters: added in place, or where the library adds its product to."""
    tokens, columns = X_BI.shape
    padded = max(_FEWEST_PLANNED, 1 << (tokens - 1).bit_length()) if tokens else 0
    shape = MatmulShape(out, columns, padded, X_BI.dtype, bias_O is not None)
    plan = _plan(shape, X_BI.device.index) if tokens else None
    if plan is None:
        dense_OI = cuda.expand(*parts(packed, out, columns, X_BI.dtype), columns)
        Y_BO = F.linear(X_BI, dense_OI, bias_O)  # [B,I] · [O,I]^T -> [B,O]
        if residual_BO is not None:
            Y_BO.add_(residual_BO)
    elif adapters and residual_BO is None and _adapters_first(shape, X_BI.device.index, adapters.shape):
        return _after_adapters(plan, _padded(X_BI, padded), packed, bias_O, adapters)[:tokens]
    else:
        residual_BO = None if residual_BO is None else _padded(residual_BO, padded)
        Y_BO = plan.matmul(packed, _padded(X_BI, padded), bias_O, residual_BO)[:tokens]
    if adapters:
        adapters.add_to(Y_BO, X_BI)
    return Y_BO


def _padded(X_BI: Tensor, tokens: int) -> Tensor:
    return X_BI if len(X_BI) == tokens else F.pad(X_BI, (0, 0, 0, tokens - len(X_BI)))


def _after_adapters(
    plan: MatmulPlan, X_BI: Tensor, packed: Tensor, bias_O: Tensor | None, adapters: Adapters
) -> Tensor:
    plus_BO = X_BI.new_empty(len(X_BI), plan.shape.rows)
    adapters.add_to(plus_BO, X_BI, beta=0)
    return plan.matmul(packed, X_BI, bias_O, plus_BO)


@functools.cache
def _adapters_first(shape: MatmulShape, device_index: int, lora: tuple[int, ...]) -> bool:
    """Whether a product is faster that the library adds to the adapters' than one which they are added to.

    Measured once for a shape and its adapters (`Adapters.shape`) on a GPU model, and kept on disk.
    """
    sides = f"{shape.rows}x{shape.columns}x{shape.tokens}{' bias' if shape.bias else ''}"
    gpu, dtype = torch.cuda.get_device_name(device_index), str(shape.dtype).removeprefix("torch.")
    key = " | ".join((gpu, f"adapters {'x'.join(map(str, lora))}", f"torch {torch.__version__}", dtype, sides))
    plan = _plan(shape, device_index)
    if plan is None:
        return False

    @torch.no_grad()
    def measure() -> Choice:
        packed, _, X_BI, bias_O = kernel_choice.random_operands(shape, device_index)
        ranks, *rows = lora
        A_LI, B_OL = X_BI.new_zeros(len(rows) * ranks, shape.columns), X_BI.new_zeros(shape.rows, ranks)
        adapters = Adapters(A_LI.normal_(), B_OL.normal_(), tuple(rows))
        first_ms, last_ms = kernel_choice.graph_ms(
            lambda: _after_adapters(plan, X_BI, packed, bias_O, adapters),
            lambda: adapters.add_to(plan.matmul(packed, X_BI, bias_O), X_BI),
        )
        order = {"adapters_first": int(first_ms < last_ms)}
        return Choice(True, "the faster order of a product and its adapters", min(first_ms, last_ms), algorithm=order)

    algorithm = kernel_choice.measured_once(key, ["adapters_first"], lambda: outside_graphs(measure))
    return bool(algorithm["adapters_first"])


@functools.cache
def _plan(shape: MatmulShape, device_index: int) -> MatmulPlan | None:
    """A plan of the library, if it reads metadata in tile order."""

    def make() -> MatmulPlan | None:
        with contextlib.suppress(CuSparseLtError):  # no library
            if writes_metadata(shape.rows, shape.columns, shape.dtype, device_index):
                return kernel_choice.plan_for(shape, device_index)
        return None

    return None if kernel_choice.refusal(shape) else outside_graphs(make)
