"""The model that a run linearizes, as the run's own folder describes it from the start on.

RUN/base.json says how it is built: the config of transformers, its sparse layers, their adapters. RUN/base/ holds its
weights, masks and adapters, written once: checkpoints hold what differs from them (see slope_cli.checkpoint). So a run
goes on, and is loaded, without what it began with.
"""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from slope_cli.checkpoint import hf_folder
from slope_cli.models import shapes
from slope_cli.models.build import build_model
from sparse_kernels import adapters_of, extend_adapters, sparse_layers

BASE = "base.json"


def describe(model: PreTrainedModel, *, dropout: float | None = None) -> dict[str, Any]:
    """What `rebuild` makes the same model of, apart from its weights; dropout: all of the family's rates, if given."""
    settings = {key: value for key, value in model.config.to_dict().items() if key != "dtype"}
    if dropout is not None:
        settings |= dict.fromkeys(shapes.FAMILIES[model.config.model_type].dropouts, dropout)
    sparse = {
        name: {"pattern": [layer.n, layer.m], "column_rescale": layer.column_rescale}
        for name, layer in sparse_layers(model)
    }
    adapters = {name: [adapter.rank, adapter.scale] for name, adapter in adapters_of(model).items()}
    return {"config": settings, "tied": _tied(model), "sparse": sparse, "adapters": adapters}


def _tied(model: PreTrainedModel) -> bool:
    """Whether embedding and head are one: transformers leaves what differs in the files two, tied or not."""
    return bool(model.get_input_embeddings().weight is model.get_output_embeddings().weight)


def rebuild(description: dict[str, Any], device: torch.device | str) -> PreTrainedModel:
    """A float32 model of a description, in training mode; its weights and masks are for others to bring."""
    settings = dict(description["config"])
    config_class = getattr(transformers, shapes.FAMILIES[settings["model_type"]].config_class)
    config = config_class.from_dict(settings, attn_implementation="sdpa")
    model = build_model(config)
    if _tied(model) and not description.get("tied", True):
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    patterns = {name: (n, m) for name, layer in description["sparse"].items() for n, m in [layer["pattern"]]}
    hf_folder.sparsify_as(model, patterns)
    for name, layer in sparse_layers(model):
        layer.column_rescale = description["sparse"][name]["column_rescale"]
    for name, (rank, scale) in description["adapters"].items():
        extend_adapters(model, [name], rank)[name].scale = scale
    return model.to(device)
