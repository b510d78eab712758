"""Which linear layers of a model become sparse, in which pattern, and why the others do not."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from sparse_kernels import masks
from sparse_kernels.deprecated import renamed_arguments
from sparse_kernels.formats import SIDE_MULTIPLE
from sparse_kernels.masked_linear import MaskedLinear
from sparse_kernels.replace import obstacle

# What stays dense: "the classification heads and the first linear layer following the input" (section 4.4.2).
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|decoder|seq_relationship|classifier|score|qa_outputs)$")
_FIRST_PROJECTION = re.compile(
    r"\.(c_attn|q_proj|k_proj|v_proj|query|key|value|query_key_value|qkv|qkv_proj|Wqkv|in_proj|project_in)$"
)
MLP = r"(^|\.)mlp\.|(^|\.)(fc[12]|intermediate\.dense)$|(?<!attention)\.output\.dense$"
"""For `target_modules`: the feed-forward layers of GPT-2, Llama and their like (mlp.*), OPT (fc1, fc2) and BERT."""

PatternOverrides = Sequence[tuple[int, int, int, int]]
"""(first, last, n, m): the blocks from `first` to `last`, both included, are n:m."""


@dataclass(frozen=True)
class LayerReport:
    """The verdict on one linear layer. `reason` is empty for a layer that is swapped.

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

    @property
    def weights(self) -> int:
        """Entries of the dense weight."""
        return self.out_features * self.in_features

    @property
    def kept_weights(self) -> int:
        """Entries that the pattern keeps."""
        return self.weights * self.n // self.m

    @property
    def mask_bytes(self) -> int:
        """Of a row mask and a backward mask: a bit for each weight in both, padded to whole bytes along a row."""
        return self.out_features * -(-self.in_features // 8) + self.in_features * -(-self.out_features // 8)


@dataclass(frozen=True)
class ModelReport:
    """Every linear layer of a model, in order. n, m: the pattern outside of the overrides' ranges."""

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
        """The pattern of the swapped layers, such as 2:4; if there are several, how many layers have each."""
        counts = Counter(f"{layer.n}:{layer.m}" for layer in self.swapped)
        if len(counts) > 1:
            return ", ".join(f"{count} {pattern}" for pattern, count in counts.items())
        return next(iter(counts), f"{self.n}:{self.m}")

    def __str__(self) -> str:
        mixed = "," in self.pattern
        sparse = f"sparse ({self.pattern})" if mixed else f"{self.pattern} sparse"
        lines = [f"{len(self.swapped)} of {len(self.layers)} linear layers are {sparse}; these stay dense:"]
        lines += [f"  {x.name} ({x.out_features} x {x.in_features}): {x.reason}" for x in self.skipped]
        return "\n".join(lines)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2), a linear layer whose weight is stored (in, out); told by name to import nothing."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).__mro__
    )


def stored_weight(linear: nn.Module) -> Tensor:
    """The weight as (out, in), however the layer stores it."""
    weight = cast(Tensor, linear.weight)
    return weight.t() if is_conv1d(linear) else weight


@renamed_arguments
def select_layers(
    model: nn.Module,
    *,
    n: int = 2,
    m: int = 4,
    target_modules: Sequence[str] = (),
    exclude_modules: Sequence[str] = (),
    pattern_overrides: PatternOverrides = (),
) -> ModelReport:
    """Decide for every linear layer whether it becomes sparse, changing nothing; works on a model on the meta device.

    Args:
        n, m: keep n of every m consecutive weights of a row.
        target_modules: regular expressions searched for in layer names; if there are any, no other layer becomes
            sparse. `MLP` is one.
        exclude_modules: regular expressions; layers whose name contains a match stay dense. A module that is used at
            several places is one layer, with a name for each; any of them may match.
        pattern_overrides: other patterns for ranges of the model's first module list.

    Raises:
        ValueError: no layer would be swapped, an expression matches no layer, a bad N:M, ranges that overlap or that
            the model does not have, or two patterns for one layer.
    """
    layers = _linear_layers(model)
    names = [name for places in layers.values() for name in places]
    patterns = _patterns(model, layers.values(), n, m, pattern_overrides)
    _require_matches(model, names, exclude_modules=exclude_modules, target_modules=target_modules)
    first = _first_layers(model, names)
    users = parameter_users(model)

    def reason(places: Sequence[str], linear: nn.Module) -> str:
        if matched := _first_match(exclude_modules, places):
            return f"matches exclude_modules {matched!r}"
        if fixed := stays_itself(places, linear, users):
            return fixed
        if target_modules and not _first_match(target_modules, places):
            if tuple(target_modules) == (MLP,):
                return "not in an MLP"
            return f"matches none of target_modules ({', '.join(map(repr, target_modules))})"
        if not first.isdisjoint(places):
            return "first layer after the input"
        if any(name.endswith("_orig_mod") for name in places):
            return "is compiled on its own: compile afterwards"
        return _unfit_sides(linear, patterns[places[0]][1])

    def row(linear: nn.Module, places: Sequence[str]) -> LayerReport:
        why, name = reason(places, linear), places[0]
        return LayerReport(name, *_sides(linear), why, *patterns[name], is_conv1d(linear))

    report = ModelReport(n, m, tuple(row(linear, places) for linear, places in layers.items()))
    if not report.swapped:
        reasons = "; ".join(f"{count} x {why}" for why, count in Counter(x.reason for x in report.layers).items())
        raise ValueError(f"no linear layer of {type(model).__name__} can be made sparse ({reasons or 'it has none'})")
    return report


def _require_matches(model: nn.Module, names: Sequence[str], **expressions: Sequence[str]) -> None:
    """ValueError for an expression that matches none of the names; `expressions` by the argument they were given as."""
    for what, given in expressions.items():
        for expression in given:
            if not any(re.search(expression, name) for name in names):
                raise ValueError(f"{what}: {expression!r} matches no linear layer of {type(model).__name__}")


def _linear_layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every linear layer with all its names: one that is used at several places is still one."""
    layers: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | MaskedLinear) or is_conv1d(module):
            layers.setdefault(module, []).append(name)
    return layers


def _unfit_sides(linear: nn.Module, m: int) -> str:
    """Why no kernel takes a layer's sides; empty if one does."""
    side = SIDE_MULTIPLE if SIDE_MULTIPLE % m == 0 else m
    return f"sides are not multiples of {side}" if any(length % side for length in _sides(linear)) else ""


def _sides(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; of a subclass, whose weight may be packed, those that it names."""
    if type(linear) is not nn.Linear and isinstance(linear, nn.Linear):
        return linear.out_features, linear.in_features
    out_features, in_features = stored_weight(linear).shape
    return out_features, in_features


def stays_itself(places: Sequence[str], linear: nn.Module, users: Counter[int]) -> str:
    """Why no other layer may take a linear layer's place, whatever its weights; empty if one may.

    places: all its names. users: of the model's `parameter_users`.
    """
    if any(_HEAD.search(name) for name in places):
        return "output head"
    if lost := obstacle(linear):
        return lost
    shared = [kind for kind, p in linear.named_parameters(recurse=False) if users[_memory(p)] > 1]
    return f"{shared[0]} is shared with another layer" if shared else ""


def parameter_users(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter's memory."""
    held: Counter[int] = Counter()
    for module in model.modules():
        tensors = (*module._parameters.values(), *module._buffers.values())
        held.update({_memory(tensor) for tensor in tensors if tensor is not None})
    return held


def _memory(tensor: Tensor) -> int:
    """What tells tensors of the same memory; without any, as on the meta device, the tensor itself."""
    return (tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0) or id(tensor)


def _block_list(model: nn.Module) -> tuple[str, int]:
    """The model's first module list, its transformer blocks: the prefix of their layers' names, and their number."""
    lists = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    name, blocks = next(lists, ("", ()))
    return f"{name}." if name else "", len(blocks)


def _first_layers(model: nn.Module, names: Sequence[str]) -> set[str]:
    """The linear layers that read the embedded input: the first block's projections, or else the first layer of all."""
    prefix, count = _block_list(model)
    before = [name for name in names if name.endswith("project_in")]
    first = [name for name in names if count and name.startswith(f"{prefix}0.") and _FIRST_PROJECTION.search(name)]
    return set(before or first or names[:1])


def _patterns(
    model: nn.Module, layers: Iterable[Sequence[str]], n: int, m: int, overrides: PatternOverrides
) -> dict[str, tuple[int, int]]:
    """The N:M of every layer, by its first name; raises as `select_layers`. layers: the names of each."""
    prefix, count = _block_list(model)
    of_block: dict[int, tuple[int, int]] = {}
    masks.check_pattern(n, m)
    for first, last, block_n, block_m in overrides:
        masks.check_pattern(block_n, block_m)
        if not 0 <= first <= last < count:
            raise ValueError(f"blocks {first}-{last}: {type(model).__name__} has blocks 0 to {count - 1}")
        if shared := of_block.keys() & range(first, last + 1):
            raise ValueError(f"blocks {first}-{last}: block {min(shared)} has a pattern already")
        of_block |= dict.fromkeys(range(first, last + 1), (block_n, block_m))

    def pattern_of(name: str) -> tuple[int, int]:
        index = name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else ""
        return of_block.get(int(index), (n, m)) if index.isdecimal() else (n, m)

    patterns = {}
    for places in layers:
        patterns[places[0]] = pattern_of(places[0])
        if other := next((name for name in places if pattern_of(name) != patterns[places[0]]), None):
            raise ValueError(f"pattern_overrides: {places[0]} and {other} are one layer, and have two patterns")
    return patterns


def _first_match(patterns: Sequence[str], places: Sequence[str]) -> str | None:
    return next((pattern for pattern in patterns if any(re.search(pattern, name) for name in places)), None)
