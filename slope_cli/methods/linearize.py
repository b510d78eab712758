"""The phases of method=linearize: attention transfer, then low-rank adapters (LoLCATs, arXiv 2410.10254)."""

from typing import Any

from slope_cli.config.schema import Config
from slope_cli.methods.phases import ADAPTERS, MAPS, WEIGHTS, Phase, Rate, StepKind
from slope_cli.methods.sparse import adapter_rate


def linearize(config: Config) -> list[Phase]:
    """Feature maps and mix factors learn each layer's own softmax attention, then adapters learn from text.

    The weights, dense or sparse, never change, unless linearize.train=all trains them with the adapters, or without
    any; the masks of sparse ones stay even then. Unlike in LoLCATs, a sparse layer's adapter from pretraining is
    trained too, side by side with the new one: it is the part of such a layer that is meant to be trained late.

    Where the layers that keep softmax attention are chosen, that is after the transfer and before the adapters: before,
    untrained maps would say which layers are hard to start with, and not which ones linear attention cannot learn;
    after, the adapters would have learned to do without softmax in layers that get it back, and be trained in vain.
    """
    own, steps, adapters, every = config.linearize, config.train.steps, config.adapters.rank > 0, config.linearize.every
    alone = own.transfer == 1 or not (adapters or every)
    first = steps if alone else config.train.step_at(own.transfer)
    rates = {MAPS: Rate(0, first, own.transfer_lr, config.optim.warmup)}
    phases = [Phase(0, linearized=True, step="transfer", rates=rates)]
    if not alone:
        weights = Rate(first, steps, config.optim.lr, config.optim.warmup)
        late = adapter_rate(config, first) if adapters else weights
        rates = {WEIGHTS: weights} if every else {}
        rates |= {ADAPTERS: late} if adapters or own.gated else {}
        rates |= {MAPS: late} if every or own.adjust_maps else {}
        step: StepKind = "distill" if config.distill.share else "train"
        how: dict[str, Any] = {"softmax_units": own.chosen, "adapters": adapters, "step": step, "rates": rates}
        phases.append(Phase(first, linearized=True, **how))
    return phases
