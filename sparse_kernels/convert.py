"""Swap a model's linear layers for sparse or masked ones, add adapters, and turn the model back into a dense one."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparse_kernels import masks
from sparse_kernels.layers import layer_seed, sparse_layers
from sparse_kernels.lora import AdaptedLinear, LowRankAdapter
from sparse_kernels.masked_linear import MaskedLinear, masked_layers
from sparse_kernels.sparse_linear import SparseLinear

# What stays dense: "the classification heads and the first linear layer following the input" (section 4.4.2).
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|decoder|seq_relationship|classifier|score|qa_outputs)$")
_FIRST_PROJECTION = re.compile(
    r"\.(c_attn|q_proj|k_proj|v_proj|query|key|value|query_key_value|qkv|qkv_proj|Wqkv|in_proj|project_in)$"
)
MLP = r"(^|\.)mlp\.|(^|\.)(fc[12]|intermediate\.dense)$|(?<!attention)\.output\.dense$"
"""For `only`: the feed-forward layers of GPT-2, Llama and their like (mlp.*), OPT (fc1, fc2) and BERT."""
# Both of Hopper's and Ampere's 16-bit 2:4 products take sides that are multiples of 16.
_SIDE_MULTIPLE = 16


Blocks = Sequence[tuple[int, int, int, int]]
"""(first, last, n, m): the blocks from `first` to `last`, itself too, are n:m."""


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer. `reason` is empty for a layer that was swapped.

    n, m: the pattern that it was considered for. transposed: its weight is, or was, (in, out), as a Conv1D's.
    """

    name: str
    out_features: int
    in_features: int
    reason: str = ""
    n: int = 2
    m: int = 4
    transposed: bool = False

    @property
    def sparse(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Report:
    """Every linear layer of a model, in order. n, m: the pattern outside of the ranges that `blocks` gave others."""

    n: int
    m: int
    layers: tuple[LayerReport, ...]

    @property
    def swapped(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.sparse)

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if not layer.sparse)

    @property
    def pattern(self) -> str:
        """The pattern of the swapped layers, as 2:4; with how many have which, where there are several."""
        counts = Counter(f"{layer.n}:{layer.m}" for layer in self.swapped)
        if len(counts) > 1:
            return ", ".join(f"{count} {pattern}" for pattern, count in counts.items())
        return next(iter(counts), f"{self.n}:{self.m}")

    def __str__(self) -> str:
        mixed = "," in self.pattern
        are = f"sparse ({self.pattern})" if mixed else f"{self.pattern} sparse"
        lines = [f"{len(self.swapped)} of {len(self.layers)} linear layers are {are}; dense are:"]
        lines += [f"  {x.name} ({x.out_features} x {x.in_features}): {x.reason}" for x in self.skipped]
        return "\n".join(lines)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2), a linear layer whose weight is stored (in, out); told by name to import nothing."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # Exactly these types: a subclass computes something else, and swapping it would change what.
    kinds = (nn.Linear, MaskedLinear)
    return ((name, module) for name, module in model.named_modules() if type(module) in kinds or is_conv1d(module))


def stored_weight(linear: nn.Module) -> Tensor:
    """The weight as (out, in), however the layer stores it."""
    weight = cast(Tensor, linear.weight)
    return weight.t() if is_conv1d(linear) else weight


def _block_list(model: nn.Module) -> tuple[str, int]:
    """The model's first module list, its transformer blocks: what its layers' names begin with, and its length."""
    lists = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    name, blocks = next(lists, ("", ()))
    return f"{name}." if name else "", len(blocks)


def _first_layers(model: nn.Module, names: Sequence[str]) -> set[str]:
    """The linear layers that read the embedded input: the first block's projections, or else the first layer of all."""
    prefix, count = _block_list(model)
    before = [name for name in names if name.endswith("project_in")]
    first = [name for name in names if count and name.startswith(f"{prefix}0.") and _FIRST_PROJECTION.search(name)]
    return set(before or first or names[:1])


def _patterns(model: nn.Module, names: Sequence[str], n: int, m: int, blocks: Blocks) -> dict[str, tuple[int, int]]:
    """The N:M of every layer, by name.

    Raises:
        ValueError: a bad pattern, or ranges of blocks that overlap or that the model does not have.
    """
    prefix, count = _block_list(model)
    of_block: dict[int, tuple[int, int]] = {}
    for pattern in ((n, m), *((n, m) for _, _, n, m in blocks)):
        if not 0 < pattern[0] < pattern[1]:
            raise ValueError(f"an N:M pattern needs 0 < n < m, got {pattern[0]}:{pattern[1]}")
    for first, last, block_n, block_m in blocks:
        if not 0 <= first <= last < count:
            raise ValueError(f"blocks {first}-{last}: {type(model).__name__} has blocks 0 to {count - 1}")
        if shared := of_block.keys() & range(first, last + 1):
            raise ValueError(f"blocks {first}-{last}: block {min(shared)} has a pattern already")
        of_block |= dict.fromkeys(range(first, last + 1), (block_n, block_m))

    def pattern_of(name: str) -> tuple[int, int]:
        index = name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else ""
        return of_block.get(int(index), (n, m)) if index.isdecimal() else (n, m)

    return {name: pattern_of(name) for name in names}


def _first_match(patterns: Sequence[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if re.search(pattern, name)), None)


def plan(
    model: nn.Module,
    *,
    n: int = 2,
    m: int = 4,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    blocks: Blocks = (),
) -> Report:
    """Decide for every linear layer whether it becomes sparse, changing nothing; works on a model on the meta device.

    Args:
        n, m: keep n of every m consecutive weights of a row.
        skip: regular expressions; a layer whose name one of them is found in stays dense.
        only: regular expressions; if there are any, all other layers stay dense. `MLP` is one.
        blocks: other patterns, as (first, last, n, m), for ranges of the model's first module list; both ends are in.

    Raises:
        ValueError: no layer would be swapped, a pattern of `skip` or `only` matches no layer, a bad N:M, or ranges that
            overlap or that the model does not have.
    """
    layers = list(_linear_layers(model))
    names = [name for name, _ in layers]
    patterns = _patterns(model, names, n, m, blocks)
    for what, expressions in (("skip", skip), ("only", only)):
        for expression in expressions:
            if not any(re.search(expression, name) for name in names):
                raise ValueError(f"{what} pattern {expression!r} matches no linear layer of {type(model).__name__}")
    first = _first_layers(model, names)
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))

    def reason(name: str, linear: nn.Module) -> str:
        out_features, in_features = stored_weight(linear).shape
        if matched := _first_match(skip, name):
            return f"matches skip pattern {matched!r}"
        if _HEAD.search(name):
            return "output head"
        if users[id(linear.weight)] > 1:
            return "weight is shared with another layer"
        if only and not _first_match(only, name):
            if tuple(only) == (MLP,):
                return "is in no MLP"
            return f"matches none of the patterns of only ({', '.join(map(repr, only))})"
        if name in first:
            return "first layer after the input"
        layer_m = patterns[name][1]
        side = _SIDE_MULTIPLE if _SIDE_MULTIPLE % layer_m == 0 else layer_m
        if out_features % side or in_features % side:
            return f"sides are not multiples of {side}"
        return ""

    def row(name: str, linear: nn.Module) -> LayerReport:
        sides = stored_weight(linear).shape
        return LayerReport(name, sides[0], sides[1], reason(name, linear), *patterns[name], is_conv1d(linear))

    report = Report(n, m, tuple(row(name, linear) for name, linear in layers))
    if not report.swapped:
        reasons = "; ".join(f"{count} x {why}" for why, count in Counter(x.reason for x in report.layers).items())
        raise ValueError(f"no linear layer of {type(model).__name__} can be made sparse ({reasons or 'it has none'})")
    return report


Norms = Mapping[str, Tensor]
"""The norms of layers' inputs by the layers' names; what `input_norms` returns."""


def sparsify(
    model: nn.Module,
    *,
    n: int = 2,
    m: int = 4,
    mask: str = "magnitude",
    seed: int = 0,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    blocks: Blocks = (),
    norms: Norms | None = None,
    rescale: bool = False,
    column_rescale: bool = False,
) -> Report:
    """Replace linear layers (nn.Linear, transformers' Conv1D, MaskedLinear) by SparseLinear, in place.

    Output heads, the first layer after the input, shared weights and sides that no kernel takes stay what they are. The
    parameters are new ones: `SparseLinear.kept` brings an optimizer's state into their shape.

    Args:
        n, m, skip, only, blocks: which layers, and their patterns; see `plan`.
        mask: "magnitude" of the present weights, "random" (from `seed` and the layer's name), "wanda" (see `norms`), or
            "present": that of each MaskedLinear, all layers being such.
        norms: for "wanda", from `input_norms`.
        rescale: multiply what each layer keeps by ||W|| / ||W ⊙ mask||, so that its outputs keep the dense variance.
        column_rescale: what it is set to in each layer; see `SparseLinear.column_rescale`.

    Returns:
        A report of every linear layer: swapped, or why not.

    Raises:
        ValueError: what `plan` raises, another mask kind, norms that are missing, or a present mask that is not the
            layer's N:M. Nothing was swapped.
    """
    report = plan(model, n=n, m=m, skip=skip, only=only, blocks=blocks)
    _check_choice(model, report, mask, norms)
    for row in report.swapped:
        linear = model.get_submodule(row.name)
        weight_OI = stored_weight(linear).detach()
        if mask == "present":
            row_mask_OI = cast(MaskedLinear, linear).mask
        else:
            row_mask_OI = masks.nm_mask(_score(row, weight_OI, mask, seed, norms), row.n, row.m)
        bias_O = cast(Tensor | None, linear.bias)
        sparse = SparseLinear(weight_OI, bias_O, row_mask_OI, row.n, row.m, conv1d=_becomes_conv1d(linear))
        if rescale:
            _rescale(sparse, weight_OI)
        if column_rescale:
            sparse.column_rescale = True
        model.set_submodule(row.name, sparse)
    return report


def mask_layers(
    model: nn.Module,
    *,
    n: int = 2,
    m: int = 4,
    mask: str = "magnitude",
    seed: int = 0,
    transposable: bool = False,
    mvue: bool = False,
    straight_through: bool = True,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    blocks: Blocks = (),
    norms: Norms | None = None,
) -> Report:
    """Replace linear layers by MaskedLinear, in place: the same layers that `sparsify` would.

    Args:
        transposable: masks that are N:M along both sides.
        mvue: prune the output's gradient without bias for the weight's gradient.
        straight_through: let pruned weights have a gradient, which a mask that stays has no use for.
        mask: how the first masks are chosen: "magnitude", "random" or "wanda". It and the others are `sparsify`'s.

    Returns:
        A report of every linear layer: swapped, or why not.

    Raises:
        ValueError: as for `sparsify`, or m > 4 and transposable. Nothing was swapped.
    """
    report = plan(model, n=n, m=m, skip=skip, only=only, blocks=blocks)
    if mask == "present":
        raise ValueError("mask kind 'present' is for sparsify alone")
    _check_choice(model, report, mask, norms)
    if transposable and (largest := max(row.m for row in report.swapped)) > masks.LARGEST_TRANSPOSABLE:
        raise ValueError(f"transposable masks are searched for up to m={masks.LARGEST_TRANSPOSABLE}, got m={largest}")
    for row in report.swapped:
        linear = model.get_submodule(row.name)
        weight_OI = stored_weight(linear).detach()
        masked = MaskedLinear(
            weight_OI,
            cast(Tensor | None, linear.bias),
            row.n,
            row.m,
            score_OI=_score(row, weight_OI, mask, seed, norms),
            transposable=transposable,
            mvue=mvue,
            straight_through=straight_through,
            conv1d=_becomes_conv1d(linear),
        )
        model.set_submodule(row.name, masked)
    return report


def _becomes_conv1d(linear: nn.Module) -> bool:
    return linear.conv1d if isinstance(linear, MaskedLinear) else is_conv1d(linear)


def _score(row: LayerReport, weight_OI: Tensor, mask: str, seed: int, norms: Norms | None) -> Tensor:
    norms_I = None if norms is None else norms.get(row.name)
    return masks.mask_score(weight_OI, mask, seed=layer_seed(seed, row.name), norms_I=norms_I)


def _check_choice(model: nn.Module, report: Report, mask: str, norms: Norms | None) -> None:
    """Raise ValueError if the masks of a report cannot be chosen in this way, before any layer is swapped."""
    if mask not in ("magnitude", "random", "wanda", "present"):
        raise ValueError(f"mask kind must be 'magnitude', 'random', 'wanda' or 'present', got {mask!r}")
    for row in report.swapped:
        linear = model.get_submodule(row.name)
        if mask == "wanda" and (norms is None or row.name not in norms or norms[row.name].shape != (row.in_features,)):
            raise ValueError(f"mask kind 'wanda' needs the norms of the {row.in_features} inputs of {row.name}")
        if mask == "present" and not (isinstance(linear, MaskedLinear) and masks.is_nm(linear.mask, row.n, row.m)):
            has = f"has another than {row.n}:{row.m}" if isinstance(linear, MaskedLinear) else "has none"
            raise ValueError(f"mask kind 'present' keeps the masks that are there, and {row.name} {has}")


@torch.no_grad()
def _rescale(layer: SparseLinear, weight_OI: Tensor) -> None:
    """Scale the values up to the dense weight's sum of squares."""
    dense, kept = (torch.linalg.vector_norm(W, dtype=torch.float64) for W in (weight_OI, layer.values))
    layer.values.mul_(torch.where(kept > 0, dense / kept, 1))


def input_norms(model: nn.Module, names: Iterable[str], run: Callable[[], object]) -> dict[str, Tensor]:
    """The L2 norm of each input feature of some layers, over all tokens that `run` feeds the model.

    Args:
        names: of the layers, as in `model.named_modules()`.
        run: called once, without gradients; put the model in eval mode for it where dropout would blur the norms.

    Returns:
        For each name (in,), float32, on the layer's device.

    Raises:
        ValueError: a name that the model does not have, or a layer that no token reached.
    """
    modules = dict(model.named_modules())
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            X_BI = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            sums_I = X_BI.float().square().sum(0)
            squares[name] = squares[name] + sums_I if name in squares else sums_I

        return hook

    wanted = list(names)
    if unknown := [name for name in wanted if name not in modules]:
        raise ValueError(f"{type(model).__name__} has no layer {unknown[0]!r}")
    handles = [modules[name].register_forward_pre_hook(watch(name)) for name in wanted]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # else blocks are compiled anew with the hooks
            run()
    finally:
        for handle in handles:
            handle.remove()
    if silent := [name for name in wanted if name not in squares]:
        raise ValueError(f"no token reached {silent[0]}")
    return {name: squares[name].sqrt() for name in wanted}


def adapter_rank(rank: int | float, out_features: int, in_features: int) -> int:
    """A rank given as a number (1 or more), or as a share of the layer's smaller side (below 1); at least 1."""
    return max(1, round(rank * min(out_features, in_features))) if rank < 1 else int(rank)


def add_adapters(
    model: nn.Module, rank: int | float, *, alpha: float | None = None, init: str = "lora", seed: int = 0
) -> dict[str, LowRankAdapter]:
    """Give every SparseLinear a new low-rank adapter, which at first changes nothing.

    Args:
        rank: a number, or a share of the layer's smaller side if below 1 (0.0156 of 1024 is 16).
        alpha: the scale is alpha / rank; None for the scale of `init`.
        init: "lora", A uniform and a scale of 1, or "gaussian", A from N(0, 1) and a scale of 1 / rank.

    Returns:
        The adapters by layer name; give their parameters to the optimizer (`add_param_group`).

    Raises:
        ValueError: no sparse layer, an adapter is there already, a rank out of range, or another init.
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
            init=init,
            generator=torch.Generator().manual_seed(layer_seed(seed, name)),
            device=layer.values.device,
            dtype=layer.values.dtype,
        )
    return {name: layer.adapter for name, layer in layers.items() if layer.adapter is not None}


@torch.no_grad()
def densify(model: nn.Module, *, adapters: str = "refuse") -> None:
    """Turn every SparseLinear, MaskedLinear and AdaptedLinear back into the nn.Linear or Conv1D it came from, in place.

    Pruned weights become zeros.

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
    for name, adapted in [(name, x) for name, x in model.named_modules() if isinstance(x, AdaptedLinear)]:
        if adapters == "refuse":
            raise ValueError(f"{name} has an adapter: say adapters='merge' or adapters='drop'")
        weight_OI = adapted.weight.t() if adapted.conv1d else adapted.weight
        model.set_submodule(
            name, _dense(adapted, weight_OI + adapted.adapter.delta() if adapters == "merge" else weight_OI)
        )
    for name, masked in list(masked_layers(model)):
        model.set_submodule(name, _dense(masked, masked.masked_weight))


def _dense(layer: SparseLinear | MaskedLinear | AdaptedLinear, weight_OI: Tensor) -> nn.Module:
    if layer.conv1d:
        dense: nn.Module = Conv1D(layer.out_features, layer.in_features)
        dense.weight = nn.Parameter(weight_OI.t().contiguous())
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(weight_OI)
    dense.register_parameter("bias", layer.bias)
    return dense
