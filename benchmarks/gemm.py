"""The products of a transformer block by themselves: sparse against dense, and PyTorch's own 2:4 product."""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import linear

from sparse_kernels import kernel_choice
from sparse_kernels.matmul_plan import MatmulShape

from .records import GemmRow
from .timing import Timing, free, one_line

TOKENS, MORE_TOKENS = 8192, (1024, 2048, 4096, 16384)
TORCH_TIMING = Timing(warm_up=1, rounds=5, round_seconds=1.0, most_calls=10)


def gemm(widths: Sequence[int]) -> Iterator[GemmRow]:
    """The products of a block of each width, first for 8,192 tokens; last, PyTorch's own 2:4 product."""
    for tokens in (TOKENS, *MORE_TOKENS):
        for width in widths:
            try:
                yield from products(width, tokens)
            except Exception as error:
                yield GemmRow(width=width, tokens=tokens, error=one_line(error))
            free()
        kernel_choice.forget()  # it searches a limited number of token counts per matrix
    for width in widths:  # last, since a fault in it would end the process
        for matrix, (rows, columns) in sides(width).items():
            row = GemmRow(width=width, tokens=TOKENS, matrix=matrix, product="torch")
            try:
                yield replace(row, torch_ms=torch_semi_structured_ms(rows, columns, TOKENS))
            except Exception as error:
                yield replace(row, error=one_line(error))


def sides(width: int) -> dict[str, tuple[int, int]]:
    """(out, in) of the four matrices of a block."""
    return {"qkv": (3 * width, width), "proj": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}


def products(width: int, tokens: int) -> Iterator[GemmRow]:
    """The four matrices of a block, forward (with bias) and input gradient, as training would choose them."""
    for matrix, (out, inp) in sides(width).items():
        for product, rows, columns in (("forward", out, inp), ("input_grad", inp, out)):
            row = GemmRow(width=width, tokens=tokens, matrix=matrix, product=product, rows=rows, columns=columns)
            started = time.perf_counter()
            choice, _ = kernel_choice.choose(
                MatmulShape(rows, columns, tokens, torch.bfloat16, product == "forward"), 0
            )
            yield replace(row, choose_s=time.perf_counter() - started, **vars(choice))


def torch_semi_structured_ms(rows: int, columns: int, tokens: int) -> float:
    """Milliseconds of a forward product by torch.sparse.to_sparse_semi_structured, which can only be called eagerly."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    pattern = torch.tensor([1, 1, 0, 0], **options).repeat(rows, columns // 4)
    X, bias = torch.randn(tokens, columns, **options), torch.randn(rows, **options)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch calls it a prototype
        W = torch.sparse.to_sparse_semi_structured(torch.randn(rows, columns, **options) * pattern)
        linear(X, W, bias)
        (seconds,) = TORCH_TIMING.medians(lambda: linear(X, W, bias))
        return seconds * 1e3
