"""The model that a run linearizes, as stored in the run's own folder from the start.

RUN/base.json says how it is built: the config of transformers, its sparse layers, their adapters. RUN/base/ holds its
weights, masks and adapters, written once: checkpoints hold what differs from them (see slope_cli.checkpoint.store). So
a run can be resumed and loaded without the model that it began with.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from slope_cli.checkpoint import store
from slope_cli.checkpoint.weight_files import Weights
from slope_cli.errors import SlopeError, first_line
from slope_cli.linearize.layer_range import Passage, keep_layers
from slope_cli.models import shapes
from slope_cli.models.build import build_model
from slope_cli.utils.files import as_json, content_sha256, read_sealed, write_sealed
from sparse_kernels import adapters_of, add_adapters, sparse_layers
from sparse_kernels.convert import sparsify_as

BASE = "base.json"


def write(run: Path, model: PreTrainedModel, *, dropout: float | None = None, weights: Weights | None = None) -> None:
    """Write a model and its description to a run that has no checkpoint yet.

    Args:
        dropout: all of the family's rates in the description, if given.
        weights: what reads the tensors of a model on the meta device.

    Raises:
        SlopeError: it could not be written (a full disk, say).
    """
    content = as_json(describe(model, dropout=dropout))
    read = None if weights is None else lambda name: weights.read(name.removeprefix("model."))
    store.save_base(run, store.state_tensors(model, None), content_sha256(content), read)
    write_sealed(run / BASE, content)


def read(run: Path, device: torch.device | str) -> PreTrainedModel:
    """The model that `write` wrote, in float32 and in training mode; on the meta device its shapes alone.

    Raises:
        SlopeError: its description or its tensors are missing or damaged.
    """
    model = build(run, device)
    if model.device.type != "meta":
        store.restore(run / store.BASE, model, None)
    return model


def read_layers(
    run: Path,
    device: torch.device | str,
    layers: range,
    linearize: Callable[[PreTrainedModel], object],
    *,
    head: bool = False,
) -> tuple[PreTrainedModel, Passage]:
    """A range of the layers of the model that `write` wrote, linearized, in float32 and in training mode.

    No other layer's weights are read: host and device hold those of the range, the device beside them what lies outside
    of all layers.

    Args:
        linearize: freezes the whole model, which lies on the meta device, and linearizes it; what that adds is real.
        head: with the model's head.

    Returns:
        The model, and where hidden states enter and leave it.

    Raises:
        SlopeError: its description or its tensors are missing or damaged.
    """
    model = build(run, "meta")
    linearize(model)
    first = store.first_names(model)
    passage = keep_layers(model, layers, head=head)
    unread = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    computed = [module for module in model.modules() if any(map(_is_meta, module.buffers(recurse=False)))]
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    for module in computed:
        if module._non_persistent_buffers_set and not any(True for _ in module.parameters(recurse=False)):
            model._init_weights(module)  # what is in no checkpoint, such as the frequencies of rotary positions
    saved, tensors = store.saved_tensors(run / store.BASE), model.state_dict()
    for name in unread:
        saved[f"model.{first[name]}"].read(into=tensors[name])
    return model, passage


def _is_meta(tensor: Tensor) -> bool:
    return tensor.is_meta


def build(run: Path, device: torch.device | str) -> PreTrainedModel:
    """The model that `write` wrote, without its weights and masks; SlopeError if its description is damaged."""
    try:
        return rebuild(description(run), device)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SlopeError(f"{run / BASE}: describes no model ({first_line(error)})") from None


def description(run: Path) -> dict[str, Any]:
    """The description of the model, by `describe`; SlopeError if it is missing, damaged, or that of other weights.

    The manifest of the weights, to which checkpoints are bound, holds its hash. That of an earlier version does not.
    """
    content, own = read_sealed(run / BASE), run / store.BASE / store.MANIFEST
    # A run made before there were bases holds all weights in its checkpoints.
    bound_to = read_sealed(own).get("description") if own.exists() else None
    if bound_to not in (None, content_sha256(content)):
        raise SlopeError(f"{run / BASE} is not what it was when {run / store.BASE} was written")
    return content


def describe(model: PreTrainedModel, *, dropout: float | None = None) -> dict[str, Any]:
    """What `rebuild` needs to build the same model, without weights; dropout: all of the family's rates, if given."""
    settings = {key: value for key, value in model.config.to_dict().items() if key != "dtype"}
    if dropout is not None:
        settings |= dict.fromkeys(shapes.FAMILIES[model.config.model_type].dropouts, dropout)
    sparse = {
        name: {"pattern": [layer.n, layer.m], "backward_rescale": layer.backward_rescale}
        for name, layer in sparse_layers(model)
    }
    adapters = {name: [adapter.rank, adapter.scaling] for name, adapter in adapters_of(model).items()}
    return {"config": settings, "tied": _tied(model), "sparse": sparse, "adapters": adapters}


def _tied(model: PreTrainedModel) -> bool:
    """Whether embedding and head are one: transformers keeps them apart if they differ in the files, tied or not."""
    return bool(model.get_input_embeddings().weight is model.get_output_embeddings().weight)


def rebuild(description: dict[str, Any], device: torch.device | str) -> PreTrainedModel:
    """A float32 model of a description, in training mode; the caller reads its weights and masks."""
    # An implementation of attention could be one that is fetched from a hub and executed.
    settings = {key: value for key, value in description["config"].items() if not key.endswith("_implementation")}
    config_class = getattr(transformers, shapes.FAMILIES[settings["model_type"]].config_class)
    model = build_model(config_class.from_dict(settings, attn_implementation="sdpa"), device=str(device), seed=None)
    if _tied(model) and not description.get("tied", True):
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    patterns = {name: (n, m) for name, layer in description["sparse"].items() for n, m in [layer["pattern"]]}
    sparsify_as(model, patterns)
    for name, layer in sparse_layers(model):
        saved = description["sparse"][name]
        layer.backward_rescale = saved["column_rescale"] if "column_rescale" in saved else saved["backward_rescale"]
    for name, (rank, scaling) in description["adapters"].items():
        add_adapters(model, rank, [name], beside=True)[name].scaling = scaling
    return model
