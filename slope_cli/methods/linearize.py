"""The phases of method=linearize: attention transfer, then low-rank adapters (LoLCATs, arXiv 2410.10254)."""

from typing import Any

from slope_cli.config.schema import Config
from slope_cli.methods.phases import ADAPTERS, MAPS, WEIGHTS, Phase, Rate, StepKind
from slope_cli.methods.sparse import adapter_rate

MENDING = 0.2
"""The share of the steps after the transfer that come before the choice of what keeps softmax attention.

Of a Llama with 4 layers, of which one looks things up, a tenth was enough to tell it from the layer whose transfer had
gone worst.
"""


def linearize(config: Config) -> list[Phase]:
    """Feature maps and mix factors learn each layer's own softmax attention, then adapters learn from text.

    The weights, dense or sparse, never change, unless linearize.train=all trains them with the adapters, or without
    any; the masks of sparse ones stay even then. Unlike in LoLCATs, a sparse layer's adapter from pretraining is
    trained too, side by side with the new one: it is the part of such a layer that is meant to be trained late.

    Where the layers or heads that keep softmax attention are chosen, that is after the transfer and some steps of the
    adapters: a layer's maps learn from the softmax model's hidden states, so that the errors of all layers add up, and
    right after the transfer the layer is chosen with which least is broken. The first steps mend that, and what is
    left is what linear attention cannot learn.
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
        how: dict[str, Any] = {"linearized": True, "adapters": adapters, "step": step, "rates": rates}
        phases.append(Phase(first, **how))
        if own.chosen:
            mended = max(1, round(MENDING * (steps - first)))
            phases.append(Phase(first + mended, softmax_units=own.chosen, **how))
    return phases
