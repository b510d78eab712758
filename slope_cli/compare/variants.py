"""The runs of `slope compare`: a recipe with other methods, sizes, learning rates and seeds."""

import itertools
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from slope_cli.config import configs
from slope_cli.config.schema import METHODS, Config
from slope_cli.errors import UsageError
from slope_cli.methods import phases_of
from slope_cli.methods.sparse import report_layers
from slope_cli.models.build import build_model, run_model_config

READY_MADE = ("half-depth", "same-active", "slope-r0")
_FFN = {"gpt2": "n_inner", "opt": "ffn_dim"}
"""The families' own names for the width inside the MLPs, if not intermediate_size."""


@dataclass(frozen=True)
class Variant:
    """A named config.

    recipe, overrides: from which it was loaded, except the sizes of its model.
    note: how these sizes were chosen, if the user did not give them.
    """

    name: str
    config: Config
    recipe: str
    overrides: Sequence[str]
    note: str = ""

    @classmethod
    def load(cls, name: str, recipe: str, overrides: Sequence[str], note: str = "") -> "Variant":
        """The variant of a recipe and overrides; UsageError for a wrong key or value."""
        return cls(name, configs.load(recipe, overrides), recipe, overrides, note)

    def resized(self, name: str, settings: PreTrainedConfig, note: str, **sizes: int) -> "Variant":
        """Another variant with other sizes, under the names of the family whichever names the overrides used."""
        aliases: dict[str, str] = getattr(settings, "attribute_map", {})
        own = {aliases.get(key, key): size for key, size in sizes.items()}
        model = self.config.model
        kept = {key: value for key, value in model.overrides.items() if aliases.get(key, key) not in own}
        config = replace(self.config, model=replace(model, overrides={**kept, **own}))
        return replace(self, name=name, config=config, note=note)

    def at(self, lr: float) -> Config:
        """The config at another learning rate, with all values that follow from it."""
        config = configs.load(self.recipe, [*self.overrides, f"optim.lr={lr}"])
        return replace(config, model=self.config.model)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison; lr: None unless learning rates are tried."""

    variant: str
    lr: float | None
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """The name of its folder."""
        rate = "" if self.lr is None else f"-lr{self.lr}"
        return f"{self.variant}{rate}-s{self.seed}"


def variants(recipe: str, overrides: Sequence[str], methods: Sequence[str], extra: Sequence[str]) -> list[Variant]:
    """The variants, in the order given.

    Args:
        overrides: KEY=VALUE, of all variants.
        methods: methods or names in READY_MADE, which also name the variants.
        extra: texts such as "wide: model.overrides.n_embd=256 optim.lr=1e-3".

    Raises:
        UsageError: an unknown or duplicate name, a wrong key or value, or no variant at all.
    """
    chosen = [_named(recipe, overrides, name) for name in methods]
    chosen += [_custom(recipe, overrides, text) for text in extra]
    if name := next((variant.name for variant in chosen if variant.config.linearizes), None):
        raise UsageError(f"{name}: slope linearize needs a trained model; compare finished runs with --runs")
    if not chosen:
        raise UsageError("nothing to compare: give --methods dense,slope or --variant 'NAME: KEY=VALUE'")
    _refuse_duplicates("variant", [variant.name for variant in chosen])
    return chosen


def planned_runs(chosen: Sequence[Variant], seeds: Sequence[int], lrs: Sequence[float] = ()) -> list[PlannedRun]:
    """Each variant at each learning rate (its own if `lrs` is empty) with each seed.

    Raises:
        UsageError: no seed, a duplicate one, or a value out of range.
    """
    if not seeds:
        raise UsageError("--seeds: give at least one number")
    planned = []
    for variant, lr, seed in itertools.product(chosen, lrs or (None,), seeds):
        config = variant.config if lr is None else variant.at(lr)
        planned.append(PlannedRun(variant.name, lr, seed, replace(config, train=replace(config.train, seed=seed))))
    _refuse_duplicates("run", [run.name for run in planned])
    return planned


def numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """The comma-separated numbers of an option; UsageError for anything else."""
    try:
        return [kind(number) for number in text.split(",") if number]
    except ValueError:
        raise UsageError(f"{option} {text}: give comma-separated numbers") from None


def _refuse_duplicates(kind: str, names: Sequence[str]) -> None:
    if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
        raise UsageError(f"{twice}: duplicate {kind}")


def _named(recipe: str, overrides: Sequence[str], name: str) -> Variant:
    if name == "slope-r0":
        return Variant.load(name, recipe, [*overrides, "method=slope", "adapters.rank=0"], "no adapters")
    if name not in READY_MADE:
        configs.load(recipe, overrides)  # first, so that a wrong override is not reported as a wrong name
        try:
            return Variant.load(name, recipe, [*overrides, f"method={name}"])
        except UsageError as error:
            raise UsageError(str(error) if name in METHODS else f"{error}; or {', '.join(READY_MADE)}") from None
    dense = Variant.load("dense", recipe, [*overrides, "method=dense"])
    if name == "half-depth":
        return _half_depth(dense)
    base = configs.load(recipe, overrides)
    sparse = configs.load(recipe, [*overrides, "method=slope"]) if phases_of(base).dense else base
    return _same_active(dense, sparse)


def _custom(recipe: str, overrides: Sequence[str], text: str) -> Variant:
    name, colon, rest = text.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name.strip()):
        raise UsageError(
            f"--variant {text!r}: write 'NAME: KEY=VALUE KEY=VALUE', with a name of letters, digits and . _ + -"
        )
    try:
        return Variant.load(name.strip(), recipe, [*overrides, *shlex.split(rest)])
    except ValueError as error:
        raise UsageError(f"--variant {text!r}: {error}") from None


def _half_depth(dense: Variant) -> Variant:
    settings = run_model_config(dense.config)
    layers: int = settings.num_hidden_layers
    if layers < 2:
        raise UsageError(f"half-depth: {dense.config.model.name} has only one layer")
    note = f"{layers // 2} of {layers} layers"
    return dense.resized("half-depth", settings, note, num_hidden_layers=layers // 2)


def _same_active(dense: Variant, sparse: Config) -> Variant:
    """A narrower dense model with as many linear weights as the sparse one keeps; adapters do not count.

    Heads keep their width, so there are fewer heads. The width inside the MLPs compensates for the rounding.
    """
    settings = run_model_config(dense.config)
    whole, pruned = linear_weights(settings), _pruned(sparse)
    heads: int = settings.num_attention_heads
    group = heads // (getattr(settings, "num_key_value_heads", None) or heads)  # query heads per key-value head
    each = settings.hidden_size // heads * group
    step = math.lcm(64, each)
    if step * 8 > settings.hidden_size:  # too coarse
        step = each
    width = max(1, round(settings.hidden_size * math.sqrt(1 - pruned / whole) / step)) * step
    sizes = {"hidden_size": width, "num_attention_heads": heads * width // settings.hidden_size}
    if group > 1:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"] // group

    field = _FFN.get(settings.model_type, "intermediate_size")

    def sized(ffn: int, note: str = "") -> Variant:
        return dense.resized("same-active", settings, note, **sizes, **{field: ffn})

    def weights(ffn: int) -> int:
        return linear_weights(run_model_config(sized(ffn).config))

    ffn: int = getattr(settings, field) or 4 * settings.hidden_size  # GPT-2's n_inner may be None
    unit = 64 if ffn >= 1024 else 16
    # Each feature inside the MLPs has a fixed number of weights, so the missing weights determine their number.
    each_feature = (weights(2 * unit) - weights(unit)) // unit
    narrow = max(1, round((whole - pruned - weights(unit)) / each_feature / unit) + 1) * unit
    reached, target = weights(narrow), whole - pruned
    note = (
        f"width {width} of {settings.hidden_size}, {sizes['num_attention_heads']} of {heads} heads, MLP {narrow} of "
        f"{ffn}: {reached:,} linear weights, {reached / target:.4f} of the {target:,} that the sparse model keeps "
        "(without head, embeddings and adapters)"
    )
    return sized(narrow, note)


def linear_weights(settings: PreTrainedConfig) -> int:
    """The number of weights in a model's linear layers, without the head that predicts tokens."""
    model = build_model(settings, device="meta")
    head = model.get_output_embeddings()
    linear = (module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head)
    return sum(module.weight.numel() for module in linear)


def _pruned(config: Config) -> int:
    """The number of weights that the sparse layers of a run prune."""
    model = build_model(run_model_config(config), device="meta")
    report = report_layers(config, phases_of(config), model)
    assert report is not None
    return sum(layer.weights - layer.kept_weights for layer in report.swapped)
