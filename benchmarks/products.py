"""The measurements of `slope bench products`: the products of a block for few tokens, 2:4 against dense.

    python -m slope_cli.benchmarks.measure products opt-6.7b '{"tokens": [1, 16]}'

2:4 is the engine's layer, PackedLinear, without adapters; dense is F.linear. Each is repeated over several matrices in
turn, so that the GPU's cache holds none of them when its turn comes, in one CUDA graph.

Shape suffixes: N tokens, O out features, I in features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slope_cli.inference.decoder import FAMILIES
from slope_cli.models.build import build_model
from sparse_kernels.packed_linear import PackedLinear
from sparse_kernels.selection import stored_weight

from . import variants
from .records import Plan, ProductRow
from .timing import Timing, free, graphed, one_line

DEFAULT = ("opt-6.7b", "llama3-8b")
TIMING = Timing(warm_up=0, rounds=5, round_seconds=0.03, most_calls=200, heat_seconds=0.2)
CACHED = 256 * 2**20
"""Bytes of 2:4 matrices in turn: several times those of any GPU's cache."""


def matrices(name: str) -> dict[str, tuple[int, int, bool]]:
    """(out, in) of the products of a model's block, and whether they have biases: those of one input are one product.

    Raises:
        UsageError: no shape or folder of a model.
    """
    config, _, _ = variants.shape(name, None)
    config.num_hidden_layers = 1
    families, model = FAMILIES[config.model_type], build_model(config, device="meta")
    (block,) = model.get_submodule(f"{families.decoder}.{families.blocks}").children()
    found = {}
    for part, names in (
        ("qkv", families.qkv),
        ("out", (families.out,)),
        ("up", families.up),
        ("down", (families.down,)),
    ):
        layers: list[nn.Module] = [block.get_submodule(layer) for layer in names]
        rows = sum(stored_weight(layer).shape[0] for layer in layers)
        found[part] = rows, stored_weight(layers[0]).shape[1], getattr(layers[0], "bias", None) is not None
    return found


def rows(name: str, plan: Plan, device: torch.device, timing: Timing = TIMING) -> Iterator[ProductRow]:
    """The rows of a model's products, by matrix and then by tokens."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for part, (out, inp, bias) in matrices(name).items():
        row = ProductRow(model=name, matrix=part, rows=out, columns=inp, tokens=0)
        dense, sparse = layers(out, inp, bias, device, dtype)
        size = sum(tensor.nbytes for tensor in (sparse[0].values, sparse[0].metadata))
        row = replace(row, bound=dense[0][0].nbytes / size)
        for tokens in plan.tokens:
            row = replace(row, tokens=tokens)
            try:
                dense_s, sparse_s = times(dense, sparse, torch.randn(tokens, inp, dtype=dtype, device=device), timing)
                yield replace(row, dense_ms=dense_s * 1e3, sparse_ms=sparse_s * 1e3, ratio=dense_s / sparse_s)
            except Exception as error:  # the others are still measured
                yield replace(row, error=one_line(error))
        del dense, sparse
        free()


Dense = tuple[Tensor, Tensor | None]


def layers(
    out: int, inp: int, bias: bool, device: torch.device, dtype: torch.dtype
) -> tuple[list[Dense], list[PackedLinear]]:
    """As many random dense (weight, bias), and 2:4 layers, as make CACHED bytes; on a CPU two."""
    count = max(2, -(-CACHED // (out * inp * 9 // 8))) if device.type == "cuda" else 2
    dense: list[Dense] = []
    sparse = []
    for _ in range(count):
        weight = torch.empty(out, inp, dtype=dtype, device=device).normal_(std=inp**-0.5)
        bias_O = torch.zeros(out, dtype=dtype, device=device) if bias else None
        dense.append((weight, bias_O))
        sparse.append(variants.pruned(weight, bias_O, ((out, 0),)))
    return dense, sparse


def times(
    dense: Sequence[Dense], sparse: Sequence[PackedLinear], X_NI: Tensor, timing: Timing = TIMING
) -> tuple[float, float]:
    """Seconds of one dense and of one 2:4 product, in alternating rounds."""

    def all_dense() -> None:
        for weight_OI, bias_O in dense:
            F.linear(X_NI, weight_OI, bias_O)  # [N,I] · [O,I]^T -> [N,O]

    def all_sparse() -> None:
        for layer in sparse:
            layer(X_NI)

    dense_s, sparse_s = timing.medians(*(graphed(each, X_NI.device) for each in (all_dense, all_sparse)))
    return dense_s / len(dense), sparse_s / len(sparse)
