"""What the linear layers of a run are at each of its steps, and how a model passes from one stage to the next.

A stage is a function of the config and the step, so a checkpoint does not say which it was saved in.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slope_cli.config.schema import Config
from slope_cli.errors import UsageError
from slope_cli.linearize.swap import linear_windows, linearize_attention, projections
from slope_cli.methods import optim
from sparse_kernels import (
    MLP,
    Report,
    SparseLinear,
    add_adapters,
    extend_adapters,
    finish_dense,
    input_norms,
    mask_layers,
    masked_layers,
    sparsify,
)
from sparse_kernels import plan as plan_layers
from sparse_kernels.adapters import check_room
from sparse_kernels.convert import adapter_rank

Calibrate = Callable[["PreTrainedModel"], None]
"""Feeds a model the sequences that the norms of its inputs are taken over."""


class Stage(NamedTuple):
    """layers: dense; masked (dense weights times a mask); lifted (such layers without their mask); sparse.

    In a run that linearizes, what is trained: transfer (the maps, each layer against its own softmax attention), then
    adjust (the adapters); the weights themselves, dense or sparse, are those of the model that it began with.
    """

    layers: Literal["dense", "masked", "lifted", "sparse", "transfer", "adjust"]
    adapters: bool = False


DENSE = Stage("dense")
TRANSFER = Stage("transfer")
ADJUST = Stage("adjust", adapters=True)


def stage(config: Config, step: int) -> Stage:
    """What the model is in a step, counted from 0."""
    if config.method == "dense":
        return DENSE
    if config.method == "linearize":
        return TRANSFER if config.adapter_step is None or step < config.adapter_step else ADJUST
    if step < config.sparse_step:
        return Stage("masked" if config.method == "slope" and config.sparsity.before == "sr_ste" else "dense")
    if config.method == "slope":
        return Stage("sparse", config.adapter_step is not None and step >= config.adapter_step)
    lifted = config.method == "fst" and step >= round(config.train.steps * (1 - config.sparsity.dense_finish))
    return Stage("lifted" if lifted else "masked")


def renew_every(config: Config, now: Stage) -> int:
    """Steps between two renewals of the masks that may change in a stage; 0 for never."""
    if config.method == "slope" and now.layers == "masked":
        return 1  # as SR-STE itself; sparsity.renew_every is about the columns, later
    usual = {"slope": 1, "sr_ste": 1, "fst": 40}.get(config.method, 0)  # the others have no mask that may change
    every = config.sparsity.renew_every
    return usual if every is None or not usual else every


def renews(config: Config, now: Stage, step: int) -> bool:
    """Whether the masks are renewed at the end of a step, counted from 0."""
    every = renew_every(config, now)
    return every > 0 and (step + 1) % every == 0


def plan(config: Config, model: nn.Module) -> Report | None:
    """Which layers of a run's model become sparse, changing nothing; None for a run that makes none sparse.

    Raises:
        UsageError: no layer can, a skip pattern matches none, or the adapters' rank does not fit one.
    """
    if config.method in ("dense", "linearize"):
        return None
    try:
        report = plan_layers(model, **_layers(config))
    except ValueError as error:
        raise UsageError(f"sparsity: {error}") from None
    for layer in report.swapped:
        side = min(layer.out_features, layer.in_features)
        if (
            config.method == "slope"
            and adapter_rank(config.adapters.rank, layer.out_features, layer.in_features) > side
        ):
            raise UsageError(f"adapters.rank={config.adapters.rank:g}: {layer.name} has a side of only {side}")
    return report


def enter(
    model: PreTrainedModel,
    config: Config,
    was: Stage,
    to: Stage,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    calibrate: Calibrate | None = None,
) -> None:
    """Bring a model, and its optimizer if there is one, from one stage into a later one, in place.

    calibrate: for sparsity.mask=wanda; without it masks are chosen by magnitude, which is for a model whose masks are
    about to be read from a checkpoint.
    """
    if config.method == "linearize":
        _enter_linearized(model, config, was, to, optimizer)
        return
    if to.layers != was.layers:
        if was.layers == "dense" and to.layers == "lifted":
            enter(model, config, was, Stage("masked"), optimizer=optimizer)
        if to.layers == "lifted":
            finish_dense(model)
        else:
            _swap(model, config, to, optimizer, calibrate)
    if to.adapters and not was.adapters:
        a = config.adapters
        adapters = add_adapters(model, a.rank, alpha=a.alpha, init=a.init, seed=config.train.seed)
        if optimizer is not None:
            optim.add_adapter_group(optimizer, [p for x in adapters.values() for p in x.parameters()], config)


def _enter_linearized(
    model: PreTrainedModel, config: Config, was: Stage, to: Stage, optimizer: torch.optim.Optimizer | None
) -> None:
    """From a model with softmax attention into transfer, from there into adjust.

    As in LoLCATs, transfer trains the maps and mix factors alone and adjust the adapters alone; the weights never
    change. One thing is of this program: where a sparse layer has an adapter from its pretraining, the new one is put
    beside it, one product, and both are trained. It is the part of such a layer that was made to be trained late, and
    the masks and kept values, which make it sparse, stay bit for bit. Adapters of other layers, the MLPs', stay too.

    Raises:
        UsageError: the settings do not fit the model, or the adapters' rank does not fit a layer.
    """
    a, names = config.adapters, projections(model, config.linearize.targets)
    if was == DENSE:
        if config.adapter_step is not None:  # not only when the transfer is done
            try:
                check_room(model, names, a.rank)
            except ValueError as error:
                raise UsageError(f"adapters.rank={a.rank:g}: {error}") from None
        model.requires_grad_(False)
        linearize_attention(model, config.linear_attention)
    if to.adapters and not was.adapters:
        for linear in linear_windows(model).values():
            linear.requires_grad_(config.linearize.adjust_maps)
        adapters = extend_adapters(model, names, a.rank, alpha=a.alpha, init=a.init, seed=config.train.seed)
        if optimizer is not None:
            optim.add_adapter_group(optimizer, [p for x in adapters.values() for p in x.parameters()], config)


def _layers(config: Config) -> dict[str, Any]:
    """Which layers become sparse and how, for sparse_kernels."""
    s = config.sparsity
    blocks = [(*map(int, blocks.split("-")), *pattern) for blocks, pattern in s.blocks.items()]
    return {"n": s.n, "m": s.m, "blocks": blocks, "skip": s.skip, "only": [MLP] if config.method == "fst" else []}


def _swap(
    model: PreTrainedModel,
    config: Config,
    to: Stage,
    optimizer: torch.optim.Optimizer | None,
    calibrate: Calibrate | None,
) -> None:
    """Make the layers masked or sparse, and let the optimizer go on with the new parameters."""
    s, report = config.sparsity, plan(config, model)
    assert report is not None
    names = [layer.name for layer in report.swapped]
    how: dict[str, Any] = {**_layers(config), "seed": config.train.seed}
    kind = "wanda" if config.method == "wanda" else s.mask
    if kind == "wanda" and calibrate is None:  # the masks are about to be read from a checkpoint
        kind = "magnitude"
    elif kind == "wanda" and calibrate is not None:
        how["norms"] = input_norms(model, names, partial(calibrate, model))
    old = {name: model.get_submodule(name) for name in names}
    if to.layers == "masked":
        fst = config.method == "fst"
        # A mask that stays has no use for gradients of what it prunes: they would only count in the clipping.
        mask_layers(model, **how, mask=kind, transposable=fst, mvue=fst, straight_through=config.method != "wanda")
    else:
        mask = "present" if any(True for _ in masked_layers(model)) else kind
        sparsify(model, **how, mask=mask, rescale=s.rescale, column_rescale=s.column_rescale)
    if optimizer is not None:
        for layer in report.swapped:
            _hand_over(optimizer, old[layer.name], model.get_submodule(layer.name), transposed=layer.transposed)


def _hand_over(optimizer: torch.optim.Optimizer, old: Any, new: Any, *, transposed: bool) -> None:
    """Put the parameters of a new layer where those of the old one were, its weight's state in the new shape."""

    def like(dense: Tensor) -> Tensor:
        if isinstance(new, SparseLinear):
            return new.kept(dense, transposed=transposed)
        return dense.t().contiguous() if transposed else dense

    optim.replace_parameter(optimizer, old.weight, new.values if isinstance(new, SparseLinear) else new.weight, like)
    if old.bias is not None:
        optim.replace_parameter(optimizer, old.bias, new.bias, lambda state: state)
