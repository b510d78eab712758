"""The transition from one phase to a later one: of layers, attention, adapters and the optimizer."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slope_cli.config.schema import Config
from slope_cli.errors import UsageError
from slope_cli.linearize.swap import keep_softmax, linear_windows, linearize_attention, projections, softmax_units
from slope_cli.methods import optim, phases_of
from slope_cli.methods.phases import ADAPTERS, DENSE, MAPS, WEIGHTS, Layers, Phase
from slope_cli.methods.sparse import report_layers, which_layers
from sparse_kernels import (
    SparseLinear,
    add_adapters,
    check_adapters,
    defer_activations,
    fp8_obstacle,
    mask_layers,
    masked_layers,
    remove_masks,
    select_layers,
    set_fp8,
    sparse_layers,
    sparsify,
)
from sparse_kernels.convert import Norms
from sparse_kernels.formats import SIDE_MULTIPLE

Calibrate = Callable[[PreTrainedModel, Sequence[str]], Norms]
"""Measures the norms of the inputs of a model's layers of these names over the calibration sequences."""
UNTOUCHED = Phase(0)
"""A dense model with softmax attention and no adapters, as it is built."""


def apply(
    model: PreTrainedModel,
    config: Config,
    to: Phase,
    *,
    was: Phase = UNTOUCHED,
    optimizer: torch.optim.Optimizer | None = None,
    calibrate: Calibrate | None = None,
    kept: Collection[int | str] = (),
) -> None:
    """Bring a model, and its optimizer if there is one, from one phase into a later one, in place.

    Works on the meta device, where only shapes are made.

    Args:
        calibrate: for sparsity.mask=wanda; without it masks are chosen by magnitude, for a model whose masks are then
            read from a checkpoint.
        kept: the layers, or KV heads, that were chosen to keep softmax attention, as `keep_softmax` takes them; without
            them the first ones, for a model whose shapes alone matter.

    Raises:
        UsageError: a setting that does not fit the model.
    """
    set_fp8(model, ())  # so that layers are what they were, and can be swapped
    defer_activations(model, on=False)
    if to.layers.kind != was.layers.kind:
        _convert(model, config, was.layers, to.layers, optimizer, calibrate)
    if to.linearized and not was.linearized:
        _linearize(model, config)
    if to.softmax_units and not was.softmax_units:
        before = [p for window in linear_windows(model).values() for p in window.parameters()]
        keep_softmax(model, kept or softmax_units(model, heads=config.linearize.by_heads)[: to.softmax_units])
        left = {id(p) for window in linear_windows(model).values() for p in window.parameters()}
        if optimizer is not None:
            optim.drop_parameters(optimizer, [p for p in before if id(p) not in left])
    if to.adapters and not was.adapters:
        a = config.adapters
        names = projections(model, config.linearize.targets) if to.linearized else None
        how: dict[str, Any] = {"alpha": a.alpha, "init": a.init, "seed": config.train.seed}
        add_adapters(model, a.rank, names, beside=to.linearized, **how)
    if to.linearized and WEIGHTS in to.rates:
        model.requires_grad_(True)
    train_maps(model, to)
    if optimizer is not None:
        optim.join(optimizer, model, config)
    if to.fp8 and not fp8_obstacle(model.device):
        set_fp8(model, _fp8_layers(model, config))


def train_maps(model: PreTrainedModel, phase: Phase) -> None:
    """Let the feature maps and gates of linearized layers get gradients, or not, as a phase says."""
    for window in linear_windows(model).values():
        window.requires_grad_(MAPS in phase.rates)
        if window.gate is not None:
            window.gate.requires_grad_(ADAPTERS in phase.rates)


def _fp8_layers(model: PreTrainedModel, config: Config) -> list[str]:
    """The sparse or masked layers, or those that could be, with sides that fp8 products take."""
    layers: dict[str, Any] = {**dict(sparse_layers(model)), **dict(masked_layers(model))}
    sides = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    if not sides:
        rows = select_layers(model, **which_layers(config)).swapped
        sides = {row.name: (row.out_features, row.in_features) for row in rows}
    return [name for name, (rows, columns) in sides.items() if not (rows | columns) % SIDE_MULTIPLE]


def _convert(
    model: PreTrainedModel,
    config: Config,
    was: Layers,
    to: Layers,
    optimizer: torch.optim.Optimizer | None,
    calibrate: Calibrate | None,
) -> None:
    """Change the kind of the linear layers, and let the optimizer continue with the new parameters."""
    if to.kind == "unmasked":
        if was == DENSE:
            _convert(model, config, was, Layers("masked"), optimizer, calibrate)
        remove_masks(model)
        return
    report = report_layers(config, phases_of(config), model)
    assert report is not None
    names = [layer.name for layer in report.swapped]
    how: dict[str, Any] = {**which_layers(config), "seed": config.train.seed, "mask": config.sparsity.mask}
    if how["mask"] == "wanda" and calibrate is None:
        how["mask"] = "magnitude"
    elif how["mask"] == "wanda" and calibrate is not None:
        how["norms"] = calibrate(model, names)
    old = {name: model.get_submodule(name) for name in names}
    if to.kind == "masked":
        how |= {"transposable": to.transposable, "mvue": to.mvue, "straight_through": to.straight_through}
        how |= {"soft_threshold": to.soft_threshold}
        mask_layers(model, **how)
    else:
        how |= {"rescale": to.rescale, "backward_rescale": to.backward_rescale, "backend": config.sparsity.backend}
        how |= {"mask": "present"} if any(True for _ in masked_layers(model)) else {}
        sparsify(model, **how)
    if optimizer is not None:
        for layer in report.swapped:
            _replace_in_optimizer(
                optimizer, old[layer.name], model.get_submodule(layer.name), transposed=layer.transposed
            )


def _replace_in_optimizer(optimizer: torch.optim.Optimizer, old: Any, new: Any, *, transposed: bool) -> None:
    """Replace an old layer's parameters by those of the new one, with the weight's state in the new shape."""

    def like(dense: Tensor) -> Tensor:
        if isinstance(new, SparseLinear):
            return new.kept(dense, transposed=transposed)
        return dense.t().contiguous() if transposed else dense

    weight: nn.Parameter = new.values if isinstance(new, SparseLinear) else new.weight
    optim.replace_parameter(optimizer, old.weight, weight, like)
    if old.bias is not None:
        optim.replace_parameter(optimizer, old.bias, new.bias)


def _linearize(model: PreTrainedModel, config: Config) -> None:
    """Freeze a model and linearize its attention; UsageError if adapters that are added later would not fit."""
    if phases_of(config).adapter_step is not None:
        try:
            check_adapters(model, projections(model, config.linearize.targets), config.adapters.rank, beside=True)
        except ValueError as error:
            raise UsageError(f"adapters.rank={config.adapters.rank:g}: {error}") from None
    model.requires_grad_(False)
    linearize_attention(model, config.linearize, seed=config.train.seed)
