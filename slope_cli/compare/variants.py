"""What `slope compare` compares: a recipe under other methods, other sizes, other learning rates and seeds."""

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from slope_cli.config import load as configs
from slope_cli.config.schema import Config
from slope_cli.errors import UsageError
from slope_cli.methods import phases
from slope_cli.models.build import build_model, run_model_config

READY_MADE = ("half-depth", "same-active", "slope-r0")
_FFN = {"gpt2": "n_inner", "opt": "ffn_dim"}
"""The family's own name of the width inside its MLPs, where it is not intermediate_size."""


@dataclass(frozen=True)
class Variant:
    """A name, what it stands for, and how its sizes were found where they were not given."""

    name: str
    config: Config
    note: str = ""


@dataclass(frozen=True)
class Planned:
    """One run of a comparison; `lr` is None unless several learning rates are tried."""

    variant: str
    lr: float | None
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Of its folder."""
        rate = "" if self.lr is None else f"-lr{self.lr}"
        return f"{self.variant}{rate}-s{self.seed}"


def variants(recipe: str, overrides: Sequence[str], methods: Sequence[str], extra: Sequence[str]) -> list[Variant]:
    """The variants, in the order given.

    Args:
        overrides: KEY=VALUE words that all of them share.
        methods: names of methods, each the variant of that name, or of READY_MADE.
        extra: texts such as "wide: model.overrides.n_embd=256 optim.lr=1e-3".

    Raises:
        UsageError: an unknown name, a wrong key or value, the same name twice, or nothing to compare.
    """
    found = [_named(recipe, overrides, name) for name in methods]
    found += [_written(recipe, overrides, text) for text in extra]
    if alone := next((variant.name for variant in found if variant.config.method == "linearize"), None):
        raise UsageError(f"{alone}: slope linearize begins with a trained model; give finished runs to --runs")
    if not found:
        raise UsageError("nothing to compare: say --methods dense,slope or --variant 'NAME: KEY=VALUE'")
    _refuse_twice("variant", [variant.name for variant in found])
    return found


def plan(found: Sequence[Variant], seeds: Sequence[int], lrs: Sequence[float] = ()) -> list[Planned]:
    """Every run: each variant at each learning rate (its own if `lrs` is empty) with each seed.

    Raises:
        UsageError: no seed, one twice, or a value out of range.
    """
    if not seeds:
        raise UsageError("--seeds: needs one number at least")
    planned = []
    for variant in found:
        for lr in lrs or (None,):
            for seed in seeds:
                c = replace(variant.config, train=replace(variant.config.train, seed=seed))
                if lr is not None:
                    c = replace(c, optim=replace(c.optim, lr=lr))
                planned.append(Planned(variant.name, lr, seed, c))
    _refuse_twice("run", [run.name for run in planned])
    return planned


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
        raise UsageError(f"{twice}: this {what} is there twice")


def _named(recipe: str, overrides: Sequence[str], name: str) -> Variant:
    if name == "slope-r0":
        return Variant(name, configs.load(recipe, [*overrides, "method=slope", "adapters.rank=0"]), "no adapters")
    if name not in READY_MADE:
        base = configs.load(recipe, overrides)  # what is wrong with these is not wrong with the name
        try:
            return Variant(name, configs.load(recipe, [*overrides, f"method={name}"]))
        except UsageError as error:
            raise UsageError(f"{error}; or {', '.join(READY_MADE)}" if base.method != name else str(error)) from None
    dense = configs.load(recipe, [*overrides, "method=dense"])
    if name == "half-depth":
        return _half_depth(dense)
    base = configs.load(recipe, overrides)
    sparse = configs.load(recipe, [*overrides, "method=slope"]) if base.method == "dense" else base
    return _same_active(dense, sparse)


def _written(recipe: str, overrides: Sequence[str], text: str) -> Variant:
    name, colon, rest = text.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name.strip()):
        raise UsageError(
            f"--variant {text!r}: say 'NAME: KEY=VALUE KEY=VALUE', the name of letters, digits and . _ + -"
        )
    try:
        words = shlex.split(rest)
        return Variant(name.strip(), configs.load(recipe, [*overrides, *words]))
    except ValueError as error:
        raise UsageError(f"--variant {text!r}: {error}") from None


def _half_depth(dense: Config) -> Variant:
    settings = run_model_config(dense)
    layers: int = settings.num_hidden_layers
    if layers < 2:
        raise UsageError(f"half-depth: {dense.model.name} has one layer only")
    return Variant(
        "half-depth", _resized(dense, settings, num_hidden_layers=layers // 2), f"{layers // 2} of {layers} layers"
    )


def _same_active(dense: Config, sparse: Config) -> Variant:
    """The dense model, narrower, with as many linear weights as the sparse one keeps; adapters do not count.

    Heads keep their width, so there are fewer of them; the width inside the MLPs makes up for the rounding.
    """
    settings = run_model_config(dense)
    whole, pruned = linear_weights(settings), _pruned(sparse)
    heads, group = settings.num_attention_heads, _group(settings)
    each: int = settings.hidden_size // heads * group
    step = math.lcm(64, each)
    if step * 8 > settings.hidden_size:  # too coarse
        step = each
    width = max(1, round(settings.hidden_size * math.sqrt(1 - pruned / whole) / step)) * step
    sizes = {"hidden_size": width, "num_attention_heads": heads * width // settings.hidden_size}
    if group > 1:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"] // group

    def sized(ffn: int) -> Config:
        return _resized(dense, settings, **sizes, **{_ffn_field(settings): ffn})

    def weights(ffn: int) -> int:
        return linear_weights(run_model_config(sized(ffn)))

    ffn = _ffn(settings)
    unit = 64 if ffn >= 1024 else 16
    # So many weights for each feature inside the MLPs, and so many features for what is missing.
    each_feature = (weights(2 * unit) - weights(unit)) // unit
    narrow = max(1, round((whole - pruned - weights(unit)) / each_feature / unit) + 1) * unit
    found, target = weights(narrow), whole - pruned
    note = (
        f"width {width} of {settings.hidden_size}, {sizes['num_attention_heads']} of {heads} heads, MLP {narrow} of "
        f"{ffn}: {found:,} linear weights, {found / target:.4f} of the {target:,} that the sparse model keeps "
        f"(heads, embeddings and adapters aside)"
    )
    return Variant("same-active", sized(narrow), note)


def linear_weights(settings: PreTrainedConfig) -> int:
    """Weights of a model's linear layers, apart from the head that predicts tokens."""
    model = build_model(settings, device="meta")
    head = model.get_output_embeddings()
    linear = (module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head)
    return sum(module.weight.numel() for module in linear)


def _pruned(config: Config) -> int:
    """Weights that the sparse layers of a run leave out."""
    report = phases.plan(config, build_model(run_model_config(config), device="meta"))
    assert report is not None
    sizes = ((layer.out_features * layer.in_features, layer) for layer in report.swapped)
    return sum(size - size * layer.n // layer.m for size, layer in sizes)


def _group(settings: PreTrainedConfig) -> int:
    """Query heads that share a head of keys and values."""
    heads: int = settings.num_attention_heads
    return heads // int(getattr(settings, "num_key_value_heads", heads) or heads)


def _ffn_field(settings: PreTrainedConfig) -> str:
    return _FFN.get(settings.model_type, "intermediate_size")


def _ffn(settings: PreTrainedConfig) -> int:
    return int(getattr(settings, _ffn_field(settings)) or 4 * settings.hidden_size)  # GPT-2's n_inner may be None


def _resized(config: Config, settings: PreTrainedConfig, **sizes: int) -> Config:
    """The config with other sizes, each under the family's own name, whichever name the overrides had for it."""
    aliases: dict[str, str] = getattr(settings, "attribute_map", {})
    own = {aliases.get(name, name): size for name, size in sizes.items()}
    kept = {name: value for name, value in config.model.overrides.items() if aliases.get(name, name) not in own}
    return replace(config, model=replace(config.model, overrides={**kept, **own}))
