"""The runs of `slope compare`: a recipe with other methods, sizes, learning rates and seeds."""

import bisect
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

from slope_cli.compare.budget import Budget, with_steps
from slope_cli.config import configs
from slope_cli.config.schema import METHODS, Config
from slope_cli.errors import UsageError
from slope_cli.methods import phases_of
from slope_cli.methods.accounting import account
from slope_cli.methods.sparse import report_layers
from slope_cli.models import shapes
from slope_cli.models.build import build_model, run_model_config
from slope_cli.train import advice
from slope_cli.train.dry_run import untrained_model

READY_MADE = ("half-depth", "same-active", "same-bytes", "dense-SHARE (such as dense-0.87)", "slope-r0")
_SHARE = re.compile(r"dense-(0?\.\d+)")
_FFN = {"gpt2": "n_inner", "opt": "ffn_dim"}
"""The families' own names for the width inside the MLPs, if not intermediate_size."""


@dataclass(frozen=True)
class Variant:
    """A named config.

    recipe, overrides: from which it was loaded, except the sizes of its model.
    note: how these sizes were chosen, if the user did not give them.
    share: of the baseline's steps, if it is the baseline once more for the exchange rate.
    budget: of a variant whose steps time decides.
    idle: a line for each setting that the user gave and that has no effect.
    """

    name: str
    config: Config
    recipe: str
    overrides: Sequence[str]
    note: str = ""
    share: float | None = None
    budget: Budget | None = None
    idle: Sequence[str] = ()

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

    def lasting(self, steps: int) -> "Variant":
        """The variant with another number of steps."""
        overrides = [*self.overrides, f"train.steps={steps}"]
        return replace(self, config=with_steps(self.config, steps), overrides=overrides)

    def within(self, budget: Budget) -> "Variant":
        """The variant with a budget that its steps fill."""
        return replace(self, budget=budget)

    def shortened(self, share: float) -> "Variant":
        """The variant once more with a share of its steps; UsageError if that is none of them, or all."""
        steps = self.config.train.steps
        fewer = round(share * steps) if 0 < share < 1 else 0  # nan is no share, either
        if not 0 < fewer < steps:
            rule = f"must be a share of {self.name}'s {steps:,} steps that leaves some of them, and not all"
            raise UsageError(f"--exchange {share:g}: {rule}")
        note = f"{fewer:,} of {steps:,} steps, for the exchange rate"
        return replace(self.lasting(fewer), name=f"{self.name}-{share:g}-steps", note=note, share=share)

    def at(self, lr: float) -> Config:
        """The config at another learning rate, with all values that follow from it."""
        config = configs.load(self.recipe, [*self.overrides, f"optim.lr={lr}"])
        return replace(config, model=self.config.model)

    def advice(self, config: Config, *, tries_rates: bool) -> list[str]:
        """What one of its configs tells before it is trained; a learning rate that is tried is meant."""
        usual = None if tries_rates else configs.load_with_usual_rates(self.recipe, self.overrides)
        decides = {"train.seed": "--seeds"} | ({"optim.lr": "--lrs"} if tries_rates else {})
        given = {key: value for word in self.overrides for key, value in configs.parse_override(word).items()}
        idle = [f"{key}={given[key]}: has no effect with {decides[key]}" for key in decides if key in given]
        return [*self.idle, *idle, *advice.warnings_of(config, advice.prepared_data(config), usual)]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    lr: None unless learning rates are tried. share, budget: the variant's.
    advice: what its configuration tells before it is trained, as `advice.warnings_of` words it.
    """

    variant: str
    lr: float | None
    seed: int
    config: Config
    share: float | None = None
    budget: Budget | None = None
    advice: Sequence[str] = ()

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
    return _with_idle(chosen, overrides)


def _with_idle(chosen: Sequence[Variant], shared: Sequence[str]) -> list[Variant]:
    """The variants, with the settings that have no effect; of those that all of them share, what none of them uses."""

    def idle(each: Variant, words: Sequence[str]) -> dict[str, str]:
        return {line.partition("=")[0]: line for line in configs.without_effect(each.config, words)}

    in_all = set[str].intersection(*(set(idle(each, shared)) for each in chosen))
    found = []
    for each in chosen:
        own = idle(each, each.overrides[len(shared) :])
        lines = [line for key, line in idle(each, each.overrides).items() if key in own or key in in_all]
        found.append(replace(each, idle=lines))
    return found


def planned_runs(chosen: Sequence[Variant], seeds: Sequence[int], lrs: Sequence[float] = ()) -> list[PlannedRun]:
    """Each variant at each learning rate (its own if `lrs` is empty) with each seed.

    Raises:
        UsageError: no seed, a duplicate one, or a value out of range.
    """
    if not seeds:
        raise UsageError("--seeds: give at least one number")
    planned = []
    for variant, lr in itertools.product(chosen, lrs or (None,)):
        config = variant.config if lr is None else variant.at(lr)
        told = variant.advice(config, tries_rates=lr is not None)
        for seed in seeds:
            own = replace(config, train=replace(config.train, seed=seed))
            planned.append(PlannedRun(variant.name, lr, seed, own, variant.share, variant.budget, told))
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
    share = _SHARE.fullmatch(name)
    if share is None and name not in READY_MADE:
        configs.load(recipe, overrides)  # first, so that a wrong override is not reported as a wrong name
        try:
            return Variant.load(name, recipe, [*overrides, f"method={name}"])
        except UsageError as error:
            raise UsageError(str(error) if name in METHODS else f"{error}; or {', '.join(READY_MADE)}") from None
    dense = Variant.load("dense", recipe, [*overrides, "method=dense"])
    if name == "half-depth":
        return _half_depth(dense)
    if share is not None:
        if not float(share[1]):
            raise UsageError(f"{name}: must be a share above 0, such as dense-0.87")
        target = round(float(share[1]) * linear_weights(run_model_config(dense.config)))
        of = f"that are {float(share[1]):g} of the dense model's (without head and embeddings)"
        return _narrower(dense, name, "linear weights", linear_weights, target, of)
    base = configs.load(recipe, overrides)
    sparse = configs.load(recipe, [*overrides, "method=slope"]) if phases_of(base).dense else base
    if name == "same-bytes":
        target = account(untrained_model(sparse), sparse).inference_bytes
        return _narrower(dense, name, "bytes in 16 bits", dense_bytes, target, "that the sparse model takes, packed")
    kept = linear_weights(run_model_config(dense.config)) - _pruned(sparse)
    of = "that the sparse model keeps (without head, embeddings and adapters)"
    return _narrower(dense, name, "linear weights", linear_weights, kept, of)


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


def _narrower(
    dense: Variant, name: str, what: str, size: Callable[[PreTrainedConfig], int], target: int, of: str
) -> Variant:
    """A narrower dense model whose size is as near to the target as the widths that are possible allow.

    Heads keep their width, so there are fewer heads. The width inside the MLPs compensates for the rounding.

    Args:
        what, size: what is to be as large as the target, as text and as a function.
        of: what the target is.
    """
    settings = run_model_config(dense.config)
    heads: int = settings.num_attention_heads
    hidden: int = settings.hidden_size
    group = heads // shapes.kv_heads(settings)  # query heads per key-value head
    each = hidden // heads * group
    step = math.lcm(64, each)
    if step * 8 > hidden:  # too coarse
        step = each
    field = _FFN.get(settings.model_type, "intermediate_size")
    ffn: int = getattr(settings, field) or 4 * hidden  # GPT-2's n_inner may be None

    def sized(width: int, inside: int, note: str = "") -> Variant:
        sizes = {"hidden_size": width, "num_attention_heads": heads * width // hidden, field: inside}
        if group > 1:
            sizes["num_key_value_heads"] = sizes["num_attention_heads"] // group
        return dense.resized(name, settings, note, **sizes)

    def measured(width: int, inside: int) -> int:
        return size(run_model_config(sized(width, inside).config))

    def root(steps: int) -> float:
        # Sizes grow with the square of the width, or a little slower.
        return math.sqrt(measured(steps * step, max(1, ffn * steps * step // hidden)))

    most = hidden // step
    low = bisect.bisect_left(range(1, most), math.sqrt(target), key=root)  # the last that is too small, or 0
    below, above = (root(low) if low else 0.0), root(low + 1)
    width = max(1, round(low + (math.sqrt(target) - below) / (above - below))) * step
    unit = 64 if ffn >= 1024 else 16
    # Each feature inside the MLPs has a fixed size, so the missing size determines their number.
    each_feature = (measured(width, 2 * unit) - measured(width, unit)) // unit
    narrow = max(1, round((target - measured(width, unit)) / each_feature / unit) + 1) * unit
    reached = measured(width, narrow)
    note = (
        f"width {width} of {hidden}, {heads * width // hidden} of {heads} heads, MLP {narrow} of {ffn}: "
        f"{reached:,} {what}, {reached / target:.4f} of the {target:,} {of}"
    )
    return sized(width, narrow, note)


def linear_weights(settings: PreTrainedConfig) -> int:
    """The number of weights in a model's linear layers, without the head that predicts tokens."""
    model = build_model(settings, device="meta")
    head = model.get_output_embeddings()
    linear = (module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head)
    return sum(module.weight.numel() for module in linear)


def dense_bytes(settings: PreTrainedConfig) -> int:
    """The bytes of a dense model's weights in 16 bits."""
    model = build_model(settings, device="meta")
    return sum(2 * parameter.numel() for parameter in model.parameters())


def _pruned(config: Config) -> int:
    """The number of weights that the sparse layers of a run prune."""
    model = build_model(run_model_config(config), device="meta")
    report = report_layers(config, phases_of(config), model)
    assert report is not None
    return sum(layer.weights - layer.kept_weights for layer in report.swapped)
