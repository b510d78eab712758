"""Swap a model's linear layers for sparse ones, add adapters, and turn the model back into a dense one."""

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sparse_kernels import masks
from sparse_kernels.layers import sparse_layers
from sparse_kernels.linear import LowRankAdapter, SparseLinear

# What stays dense: "the classification heads and the first linear layer following the input" (section 4.4.2).
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|decoder|seq_relationship|classifier|score|qa_outputs)$")
_FIRST_PROJECTION = re.compile(
    r"\.(c_attn|q_proj|k_proj|v_proj|query|key|value|query_key_value|qkv|qkv_proj|Wqkv|in_proj|project_in)$"
)
# Both of Hopper's and Ampere's 16-bit 2:4 products take sides that are multiples of 16.
_SIDE_MULTIPLE = 16


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer. `reason` is empty for a layer that was swapped."""

    name: str
    out_features: int
    in_features: int
    reason: str = ""

    @property
    def sparse(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Report:
    """Every linear layer of a model, in order, with the pattern it was considered for."""

    n: int
    m: int
    layers: tuple[LayerReport, ...]

    @property
    def swapped(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.sparse)

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if not layer.sparse)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} of {len(self.layers)} linear layers are {self.n}:{self.m} sparse; dense are:"]
        lines += [f"  {x.name} ({x.out_features} x {x.in_features}): {x.reason}" for x in self.skipped]
        return "\n".join(lines)


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2), a linear layer whose weight is stored (in, out); told by name to import nothing."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # Exactly nn.Linear: a subclass computes something else, and swapping it would change what.
    return ((name, module) for name, module in model.named_modules() if type(module) is nn.Linear or _is_conv1d(module))


def _stored_weight(linear: nn.Module) -> Tensor:
    """The weight as (out, in), however the layer stores it."""
    weight = cast(Tensor, linear.weight)
    return weight.t() if _is_conv1d(linear) else weight


def _first_layers(model: nn.Module, names: Sequence[str]) -> set[str]:
    """The linear layers that read the embedded input: the first block's projections, or else the first layer of all."""
    blocks = next((name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)), None)
    before = [name for name in names if name.endswith("project_in")]
    first = [
        name
        for name in names
        if blocks is not None and name.startswith(f"{blocks}.0.") and _FIRST_PROJECTION.search(name)
    ]
    return set(before or first or names[:1])


def plan(model: nn.Module, *, n: int = 2, m: int = 4, skip: Sequence[str] = ()) -> Report:
    """Decide for every linear layer whether it becomes sparse, changing nothing; works on a model on the meta device.

    Args:
        skip: regular expressions; a layer whose name one of them is found in stays dense.

    Raises:
        ValueError: no layer would be swapped, or a pattern of `skip` matches no layer.
    """
    if not 0 < n < m:
        raise ValueError(f"an N:M pattern needs 0 < n < m, got {n}:{m}")
    layers = list(_linear_layers(model))
    names = [name for name, _ in layers]
    for pattern in skip:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"skip pattern {pattern!r} matches no linear layer of {type(model).__name__}")
    first = _first_layers(model, names)
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    side = _SIDE_MULTIPLE if _SIDE_MULTIPLE % m == 0 else m

    def reason(name: str, linear: nn.Module) -> str:
        out_features, in_features = _stored_weight(linear).shape
        if matched := next((pattern for pattern in skip if re.search(pattern, name)), None):
            return f"matches skip pattern {matched!r}"
        if _HEAD.search(name):
            return "output head"
        if users[id(linear.weight)] > 1:
            return "weight is shared with another layer"
        if name in first:
            return "first layer after the input"
        if out_features % side or in_features % side:
            return f"sides are not multiples of {side}"
        return ""

    shapes = {name: _stored_weight(linear).shape for name, linear in layers}
    rows = (LayerReport(name, shapes[name][0], shapes[name][1], reason(name, linear)) for name, linear in layers)
    report = Report(n, m, tuple(rows))
    if not report.swapped:
        reasons = "; ".join(f"{count} x {why}" for why, count in Counter(x.reason for x in report.layers).items())
        raise ValueError(f"no linear layer of {type(model).__name__} can be made sparse ({reasons or 'it has none'})")
    return report


def sparsify(
    model: nn.Module, *, n: int = 2, m: int = 4, mask: str = "magnitude", seed: int = 0, skip: Sequence[str] = ()
) -> Report:
    """Replace linear layers (nn.Linear and transformers' Conv1D) by SparseLinear, in place.

    Output heads, the first layer after the input, shared weights and sides that no kernel takes stay dense.

    Args:
        n, m: keep n of every m consecutive weights of a row.
        mask: "magnitude" of the present weights, or "random" (from `seed` and the layer's name).
        skip: regular expressions of layer names that stay dense.

    Returns:
        A report of every linear layer: swapped, or why not.

    Raises:
        ValueError: nothing was swapped, a `skip` pattern matches nothing, or a bad pattern or mask kind.
    """
    report = plan(model, n=n, m=m, skip=skip)
    for layer in report.swapped:
        linear = model.get_submodule(layer.name)
        weight_OI = _stored_weight(linear).detach()
        row_mask_OI = masks.row_mask(weight_OI, n, m, kind=mask, seed=seed ^ zlib.crc32(layer.name.encode()))
        bias_O = cast(Tensor | None, linear.bias)
        sparse = SparseLinear(weight_OI, bias_O, row_mask_OI, n, m, conv1d=_is_conv1d(linear))
        model.set_submodule(layer.name, sparse)
    return report


def adapter_rank(rank: int | float, out_features: int, in_features: int) -> int:
    """A rank given as a number (1 or more), or as a share of the layer's smaller side (below 1); at least 1."""
    return max(1, round(rank * min(out_features, in_features))) if rank < 1 else int(rank)


def add_adapters(
    model: nn.Module, rank: int | float, *, alpha: float | None = None, seed: int = 0
) -> dict[str, LowRankAdapter]:
    """Give every SparseLinear a new low-rank adapter, which at first changes nothing.

    Args:
        rank: a number, or a share of the layer's smaller side if below 1 (0.0156 of 1024 is 16).
        alpha: the scale is alpha / rank; None for a scale of 1.

    Returns:
        The adapters by layer name; give their parameters to the optimizer (`add_param_group`).

    Raises:
        ValueError: no sparse layer, an adapter is there already, or a rank out of range.
    """
    layers = dict(sparse_layers(model))
    if not layers:
        raise ValueError("the model has no sparse layer to add adapters to")
    if rank <= 0 or (rank >= 1 and rank != int(rank)):
        raise ValueError(f"rank must be a positive whole number or a share below 1, got {rank}")
    for name, layer in layers.items():
        if layer.adapter is not None:
            raise ValueError(f"{name} has an adapter already")
        layer.adapter = LowRankAdapter(
            layer.in_features,
            layer.out_features,
            adapter_rank(rank, layer.out_features, layer.in_features),
            alpha=alpha,
            generator=torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode())),
            device=layer.values.device,
            dtype=layer.values.dtype,
        )
    return {name: layer.adapter for name, layer in layers.items() if layer.adapter is not None}


@torch.no_grad()
def densify(model: nn.Module, *, adapters: str = "refuse") -> None:
    """Turn every SparseLinear back into the nn.Linear or Conv1D it came from, zeros in place, in place.

    Args:
        adapters: "merge" adds them to the weight (which is then no longer sparse), "drop" leaves them out,
            "refuse" raises where there are any.

    Raises:
        ValueError: an adapter is there and `adapters` is "refuse", or another word.
    """
    if adapters not in ("refuse", "merge", "drop"):
        raise ValueError(f"adapters must be 'refuse', 'merge' or 'drop', got {adapters!r}")
    for name, layer in list(sparse_layers(model)):
        if layer.adapter is not None and adapters == "refuse":
            raise ValueError(f"{name} has an adapter: say adapters='merge' or adapters='drop'")
        weight_OI = layer.weight
        if layer.adapter is not None and adapters == "merge":
            weight_OI = weight_OI + layer.adapter.delta()
        model.set_submodule(name, _dense(layer, weight_OI))


def _dense(layer: SparseLinear, weight_OI: Tensor) -> nn.Module:
    if layer.conv1d:
        from transformers.pytorch_utils import Conv1D

        dense: nn.Module = Conv1D(layer.out_features, layer.in_features)
        dense.weight = nn.Parameter(weight_OI.t().contiguous())
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(weight_OI)
    dense.register_parameter("bias", layer.bias)
    return dense
