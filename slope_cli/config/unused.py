"""Words of the command line that change a key for nothing, because the run's method does not look at it."""

from collections.abc import Sequence

from omegaconf import OmegaConf

from slope_cli.config.load import fixed, flat
from slope_cli.config.schema import Config

_USED_BY = {
    "mask": ("slope", "sr_ste", "fst"),
    "before": ("slope",),
    "rescale": ("slope",),
    "renew_every": ("slope", "sr_ste", "fst"),
    "column_mask": ("slope",),
    "column_rescale": ("slope",),
    "decay": ("slope", "sr_ste", "fst"),
    "dense_finish": ("fst",),
}
"""The methods that look at a key of `sparsity`; all sparse ones at those that are not here."""
_TRANSFER = ("linearize.transfer_lr", "linearize.mse_weight", "linearize.entropy_weight")
_ADJUST = ("optim.lr", "linearize.targets", "linearize.adjust_maps", "linearize.distill")
"""Keys of one stage of method=linearize."""


def without_effect(config: Config, words: Sequence[str]) -> list[str]:
    """A line for each key that KEY=VALUE words set to another value than its default, for nothing.

    What a recipe says is not looked at: under another method than its own, its keys may well have no effect.
    """
    default, own = fixed(Config()), fixed(config)
    keys = [key for word in words for key in flat(OmegaConf.from_dotlist([word]))]
    changed = [key for key in dict.fromkeys(keys) if own.get(key) != default.get(key)]
    return [f"{key}={own[key]}: has no effect with {why}" for key in changed if (why := _idle(config, key))]


def _idle(config: Config, key: str) -> str:
    """What makes a key have no effect, as KEY=VALUE; empty if it has one."""
    section, name = (*key.split("."), "")[:2]
    if config.method == "linearize":
        return _idle_linearized(config, key)
    if section == "adapters":
        return _idle_adapters(config, name)
    if section == "linearize":
        return f"method={config.method}"
    method, s = config.method, config.sparsity
    if section != "sparsity" or (name == "mask" and method == s.mask):
        return ""
    if method not in _USED_BY.get(name, ("slope", "sr_ste", "fst", "wanda")):
        return f"method={method}"
    if name == "before" and not s.start:
        return "sparsity.start=0"
    if name == "decay" and method == "slope" and not (s.start and s.before == "sr_ste"):
        return "method=slope"
    return f"sparsity.mask={s.mask}" if name == "calibration" and "wanda" not in (method, s.mask) else ""


def _idle_adapters(config: Config, name: str) -> str:
    a = config.adapters
    if config.method != "slope":
        return f"method={config.method}" if a.rank else ""
    if not a.rank:
        return "adapters.rank=0" if name != "rank" else ""
    return "adapters.schedule=run" if name == "warmup" and a.schedule == "run" else ""


def _idle_linearized(config: Config, key: str) -> str:
    section, share, rank = key.partition(".")[0], config.linearize.transfer, config.adapters.rank
    if section == "sparsity" or key in ("adapters.start", "optim.weight_decay"):
        return "method=linearize"  # linearize.transfer says when adapters join
    if share == 0 and key in _TRANSFER:
        return "linearize.transfer=0"
    if share == 1 and (section == "adapters" or key in _ADJUST):
        return "linearize.transfer=1"
    if not rank and (section == "adapters" or key in ("optim.lr", "linearize.targets")):
        return "adapters.rank=0" if key != "adapters.rank" else ""
    return "adapters.schedule=run" if key == "adapters.warmup" and config.adapters.schedule == "run" else ""
