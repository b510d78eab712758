"""The phases of the methods that train dense and sparse layers, and which layers they are."""

from dataclasses import replace
from typing import Any

from torch import nn

from slope_cli.config.schema import MLP, Config
from slope_cli.errors import UsageError
from slope_cli.methods.phases import ADAPTERS, DENSE, MATRICES, WEIGHTS, Layers, Phase, Phases, Rate
from sparse_kernels import MLP as MLP_LAYERS
from sparse_kernels import ModelReport, adapter_rank, select_layers


def dense(config: Config) -> list[Phase]:
    """Dense layers throughout."""
    return [_phase(config, 0, DENSE)]


def slope(config: Config) -> list[Phase]:
    """Dense or masked layers until sparsity.start, then double-pruned ones; with adapters from adapters.start on."""
    own, start = config.slope, _sparse_step(config)
    masked = Layers("masked", mask_update_interval=1, decay=own.decay)
    sparse = Layers(
        "sparse",
        mask_update_interval=own.mask_update_interval,
        row_mask_update_interval=own.row_mask_update_interval,
        row_mask_share=own.row_mask_share,
        backward_mask=own.backward_mask,
        rescale=own.rescale,
        backward_rescale=own.backward_rescale,
    )
    before = _phase(config, 0, masked if own.before == "sr_ste" else DENSE)
    row_masks_end = config.train.step_at(own.row_mask_until, rest=0)
    phases = [*([before] if start else []), replace(_phase(config, start, sparse), row_masks_end=row_masks_end)]
    if config.adapters.rank:
        first = max(start, config.train.step_at(config.adapters.start))
        rates = {**phases[-1].rates, ADAPTERS: adapter_rate(config, first)}
        phases.append(replace(phases[-1], first=first, adapters=True, rates=rates))
    return phases


def sr_ste(config: Config) -> list[Phase]:
    """Magnitude masks, updated every sr_ste.mask_update_interval steps."""
    own = config.sr_ste
    layers = Layers("masked", mask_update_interval=own.mask_update_interval, decay=own.decay)
    return [_phase(config, 0, DENSE), _phase(config, _sparse_step(config), layers)]


def fst(config: Config) -> list[Phase]:
    """Transposable masks and pruned output gradients, then a dense end."""
    own, start = config.fst, _sparse_step(config)
    layers = Layers("masked", own.mask_update_interval, transposable=True, mvue=True, decay=own.decay)
    end = max(start, config.train.step_at(1 - own.dense_finish, rest=0))
    dense_end = [_phase(config, end, Layers("unmasked"))] if end < config.train.steps else []
    return [_phase(config, 0, DENSE), _phase(config, start, layers), *dense_end]


def s_ste(config: Config) -> list[Phase]:
    """Weights made N:M by soft thresholding, and pruned output gradients. The masks follow what it keeps."""
    layers = Layers("masked", mask_update_interval=1, mvue=config.s_ste.mvue, soft_threshold=True)
    return [_phase(config, 0, DENSE), _phase(config, _sparse_step(config), layers)]


def wanda(config: Config) -> list[Phase]:
    """Masks chosen once. Pruned weights get no gradient, which would only count in clipping."""
    return [_phase(config, 0, DENSE), _phase(config, _sparse_step(config), Layers("masked", straight_through=False))]


def _phase(config: Config, first: int, layers: Layers) -> Phase:
    optim, steps = config.optim, config.train.steps
    rates = {WEIGHTS: Rate(0, steps, optim.lr, optim.warmup)}
    if optim.name == "muon":
        assert optim.muon_lr is not None  # the configuration fills it in
        rates[MATRICES] = Rate(0, steps, optim.muon_lr, optim.warmup)
    return Phase(first, layers, rates=rates)


def adapter_rate(config: Config, first: int) -> Rate:
    """The learning rate of adapters that are added at a step."""
    a, steps = config.adapters, config.train.steps
    assert a.lr is not None  # the configuration fills it in
    return Rate(first, steps, a.lr, a.warmup) if a.schedule == "own" else Rate(0, steps, a.lr, config.optim.warmup)


def _sparse_step(config: Config) -> int:
    return config.train.step_at(config.sparsity.start)


# --------------------------------------------------------------------------------------------------------- the layers


def which_layers(config: Config) -> dict[str, Any]:
    """The arguments of `sparse_kernels.select_layers` and its like."""
    s = config.sparsity
    overrides = [(*map(int, blocks.split("-")), *pattern) for blocks, pattern in s.pattern_overrides.items()]
    targets = [MLP_LAYERS if target == MLP else target for target in s.target_modules]
    which = {"target_modules": targets, "exclude_modules": s.exclude_modules, "pattern_overrides": overrides}
    return {"n": s.n, "m": s.m, **which}


def report_layers(config: Config, phases: Phases, model: nn.Module) -> ModelReport | None:
    """Which layers of a run's model become sparse or masked, changing nothing; None if none does in any phase.

    Raises:
        UsageError: no layer can, an expression matches none, or the adapters' rank does not fit a layer.
    """
    if phases.dense:
        return None
    try:
        report = select_layers(model, **which_layers(config))
    except ValueError as error:
        raise UsageError(f"sparsity: {error}") from None
    if phases.adapter_step is not None:
        sides = {layer.name: min(layer.out_features, layer.in_features) for layer in report.swapped}
        name, side = min(sides.items(), key=lambda item: item[1])
        if adapter_rank(config.adapters.rank, side, side) > side:
            reason = f"must be at most {side}: {name} has a side of only {side}"
            raise UsageError(f"adapters.rank={config.adapters.rank:g}: {reason}")
    return report
