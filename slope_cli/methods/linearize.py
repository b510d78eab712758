"""The phases of method=linearize: attention transfer, then low-rank adapters (LoLCATs, arXiv 2410.10254)."""

from slope_cli.config.schema import Config
from slope_cli.methods.phases import ADAPTERS, MAPS, Phase, Rate, StepKind
from slope_cli.methods.sparse import adapter_rate


def linearize(config: Config) -> list[Phase]:
    """Feature maps and mix factors learn each layer's own softmax attention, then adapters learn from text.

    The weights, dense or sparse, never change. Unlike in LoLCATs, a sparse layer's adapter from pretraining is trained
    too, side by side with the new one: it is the part of such a layer that is meant to be trained late.
    """
    own, steps = config.linearize, config.train.steps
    alone = own.transfer == 1 or not config.adapters.rank
    first = steps if alone else config.train.step_at(own.transfer)
    rates = {MAPS: Rate(0, first, own.transfer_lr, config.optim.warmup)}
    phases = [Phase(0, linearized=True, step="transfer", rates=rates)]
    if not alone:
        rate = adapter_rate(config, first)
        rates = {ADAPTERS: rate} | ({MAPS: rate} if own.adjust_maps else {})
        step: StepKind = "distill" if config.distill.share else "train"
        phases.append(Phase(first, linearized=True, adapters=True, step=step, rates=rates))
    return phases
