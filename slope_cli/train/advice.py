"""What configuration and data tell about a run before hours are lost, and what to do once it has diverged."""

from collections.abc import Iterator
from pathlib import Path

from slope_cli.config import schema
from slope_cli.config.schema import Config
from slope_cli.data.dataset import MANIFEST, Dataset, largely_held_out, open_dataset
from slope_cli.errors import SlopeError
from slope_cli.methods import phases_of
from slope_cli.methods.optim import span
from slope_cli.methods.phases import ADAPTERS, MAPS, MATRICES, WEIGHTS, Phase
from slope_cli.report import warned
from slope_cli.train.step import NonFinite

RATES = {WEIGHTS: "optim.lr", MATRICES: "optim.muon_lr", ADAPTERS: "adapters.lr", MAPS: "linearize.transfer_lr"}
"""The keys of the learning rates of groups of parameters."""
FAR = 10
"""The factor between a learning rate and the recipe's from which there is a warning."""


def warn(config: Config, data: Dataset | None, usual: Config | None) -> None:
    """Warn of what `warnings_of` finds; for one rank of a run, before its first step."""
    for line in warnings_of(config, data, usual):
        warned.warn(line)


def warnings_of(config: Config, data: Dataset | None = None, usual: Config | None = None) -> list[str]:
    """A line for each thing that is likely to be a mistake, and what to set.

    Args:
        data: that of the run; None if it is not known yet.
        usual: the recipe's configuration, with the recipe's learning rates.
    """
    lines = [*dict.fromkeys(_long_warmups(config)), *_long_decay(config), *_late_adapters(config)]
    lines += _unusual_rates(config, usual) if usual else []
    return lines + ([*_epochs(config, data), *largely_held_out(data)] if data else [])


def prepared_data(config: Config) -> Dataset | None:
    """The data of a configuration, not verified; None if it is not there yet, as the embedded text before a run."""
    folder = Path(config.data.path).expanduser()
    is_there = config.data.path != schema.EMBEDDED and (folder / MANIFEST).is_file()
    return open_dataset(folder, verify=False) if is_there else None


def after_failure(error: SlopeError, phase: Phase, step: int) -> str:
    """What stopped a step, counted from 0; if loss or gradient was not finite, also what to set."""
    if not isinstance(error, NonFinite):
        return f"step {step + 1}: {error}"
    if step == 0:
        cause = "before any update: check the weights that it begins with (model.init), or set train.precision=fp32"
        return f"the {error.what} was non-finite at step 1, {cause} ({error})"
    rates: dict[float, str] = {}
    for group, rate in phase.rates.items():
        rates.setdefault(rate.peak, f"{RATES[group]}, now {rate.peak:g}")
    return f"the {error.what} became non-finite at step {step + 1}: lower {' or '.join(rates.values())} ({error})"


def _long_warmups(config: Config) -> Iterator[str]:
    for phase in phases_of(config).distinct:
        for group, rate in phase.rates.items():
            steps, own = rate.last - rate.first, phase.adapters and group not in (WEIGHTS, MATRICES)
            if rate.warmup > 1 and steps <= rate.warmup:
                key = "adapters.warmup" if own and config.adapters.schedule == "own" else "optim.warmup"
                span = f"the {steps:,} steps that the learning rate has"
                late = f"the warm-up is not over before {span}; lower it, or set a share such as 0.01"
                yield f"{key}={rate.warmup:g}: {late}"


def _long_decay(config: Config) -> Iterator[str]:
    o, steps = config.optim, config.train.steps
    left = steps - span(o.warmup, steps)
    if o.schedule == "wsd" and 0 < left < span(o.decay, steps):
        short = (
            f"is longer than the {left:,} steps after the warm-up, so that the learning rate never stays at its peak"
        )
        yield f"optim.decay={o.decay:g}: {short}; lower it, or set a share such as 0.2"


def _late_adapters(config: Config) -> Iterator[str]:
    steps, linearizes = config.train.steps, config.linearizes
    key = "linearize.transfer" if linearizes else "adapters.start"
    share = config.linearize.transfer if linearizes else config.adapters.start
    if phases_of(config).adapter_step == steps - 1 and round(share * steps) >= steps:
        late = f"adapters would join after the end of the {steps:,} steps, so that only the last step trains them"
        yield f"{key}={share:g}: {late}; lower it, or set adapters.rank=0 for none"


def _unusual_rates(config: Config, usual: Config) -> Iterator[str]:
    followed = config.following_lr & usual.following_lr
    for key in RATES.values():
        section, _, name = key.partition(".")
        own, theirs = getattr(config, section), getattr(usual, section)
        idle = name in own.unused(config) or (section == "linearize" and not config.linearizes)
        now, then = getattr(own, name), getattr(theirs, name)
        if idle or key in followed or then is None:
            continue
        if not 1 / FAR <= now / then <= FAR:
            times = f"{now / then:,.0f} times" if now > then else f"1/{then / now:,.0f} of"
            yield f"{key}={now:g}: is {times} the recipe's {then:g}; is it meant?"


def _epochs(config: Config, data: Dataset) -> Iterator[str]:
    tokens = config.train.steps * config.train.tokens_per_step
    if tokens > data.train_tokens:
        asked = f"asks for {tokens:,} tokens, and {data.folder} has {data.train_tokens:,} to train on"
        epochs = f"the run goes through them {tokens / data.train_tokens:.1f} times (epochs)"
        yield f"train.steps={config.train.steps}: {asked}: {epochs}; prepare more text, or lower train.steps"
