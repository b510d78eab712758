"""The model that a run linearizes: found once, at the start, and from then on described in the run's own folder.

RUN/base.json says how it is built: the config of transformers, its sparse layers, their adapters. RUN/base/ holds its
weights, masks and adapters, written once: checkpoints hold what differs from them (see slope_cli.checkpoint). So a run
goes on, and is loaded, without what it began with.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slope_cli import checkpoint, models, stages
from slope_cli.config import INIT, Config
from slope_cli.durable import read_sealed, write_sealed
from slope_cli.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from slope_cli.pretrained import Pretrained

BASE = "base.json"
ALREADY = "is linearized already; give the model that it was made of"


def start(
    config: Config, run: Path, device: "torch.device | str", tokenizer: "PreTrainedTokenizerFast"
) -> "PreTrainedModel":
    """The model of a run before its first step, linearized and frozen but for what is trained; writes base.json, base/.

    Args:
        tokenizer: of the run's data.

    Raises:
        UsageError: model.init is no model, of an unsupported family or another shape than model.name, linearized
            already, of another tokenizer, or too short for the sequences; or the settings do not fit it.
        SlopeError: it cannot be read, or not be written to the run's folder.
    """
    _keep(config, run, tokenizer)
    # Built anew and read back: the memory of what was loaded is free by now, so it never holds the model twice.
    model = rebuild(read_sealed(run / BASE), device)
    checkpoint.restore(run / checkpoint.BASE, model, None)
    stages.enter(model, config, stages.DENSE, stages.stage(config, 0))
    return model


def _keep(config: Config, run: Path, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Write the model of model.init and its description to a run's folder; errors as for `start`."""
    found = load(config)
    _check(config, found, tokenizer)
    description = describe(found.model, dropout=config.model.dropout)
    tensors = checkpoint.state_tensors(found.model, None)
    stages.enter(found.model, config, stages.DENSE, stages.stage(config, 0))  # what does not fit shows before the write
    checkpoint.save_base(run, tensors)
    write_sealed(run / BASE, description)


def restart(config: Config, run: Path, device: "torch.device | str") -> "PreTrainedModel":
    """The model of a run in the stage of its first step, for weights and masks from a checkpoint and the base.

    Raises:
        SlopeError: the description is missing or damaged.
    """
    model = rebuild(read_sealed(run / BASE), device)
    stages.enter(model, config, stages.DENSE, stages.stage(config, 0))
    return model


def load(config: Config) -> "Pretrained":
    """The model of model.init on the CPU, its pruned layers sparse layers; errors as for `start`."""
    from slope_cli import pretrained
    from slope_cli.linearize.swap import linear_windows
    from sparse_kernels import densify, masked_layers

    init = config.model.init
    if init is None:
        raise UsageError("model.init=null: say which model to linearize, a run or a folder of transformers")
    found = pretrained.load(Path(init).expanduser())
    models.objective(found.model.config)
    if linear_windows(found.model):
        raise UsageError(f"{init}: {ALREADY}")
    if any(True for _ in masked_layers(found.model)):
        densify(found.model)
        pretrained.find_sparse_layers(found.model)
    return found


def _check(config: Config, found: "Pretrained", tokenizer: "PreTrainedTokenizerFast") -> None:
    from slope_cli.tokenizer import require_same_tokens

    init, own = config.model.init, found.model.config
    if config.model.name == INIT:
        if config.model.overrides:
            key = next(iter(config.model.overrides))
            raise UsageError(f"model.overrides.{key}: the shape is that of model.init={init}; leave it out")
    else:
        named = models.model_config(config.model.name, overrides=config.model.overrides)
        for key in ("model_type", *models.FAMILIES[named.model_type].sizes):
            here, there = getattr(named, key), getattr(own, key, None)
            if here != there and "positions" not in key and "position_embeddings" not in key:
                raise UsageError(f"model.init={init}: is no {config.model.name}: {key} is {there} there, not {here}")
    if (positions := models.max_seq_len(own)) < config.train.seq_len:
        raise UsageError(f"train.seq_len={config.train.seq_len}: {init} has only {positions} positions")
    require_same_tokens(f"data.path={config.data.path}", tokenizer, str(init), found.tokenizer)


def describe(model: "PreTrainedModel", *, dropout: float | None = None) -> dict[str, Any]:
    """What `rebuild` makes the same model of, apart from its weights; dropout: all of the family's rates, if given."""
    from sparse_kernels import adapters_of, sparse_layers

    settings = {key: value for key, value in model.config.to_dict().items() if key != "dtype"}
    if dropout is not None:
        settings |= dict.fromkeys(models.FAMILIES[model.config.model_type].dropouts, dropout)
    sparse = {
        name: {"pattern": [layer.n, layer.m], "column_rescale": layer.column_rescale}
        for name, layer in sparse_layers(model)
    }
    adapters = {name: [adapter.rank, adapter.scale] for name, adapter in adapters_of(model).items()}
    return {"config": settings, "tied": _tied(model), "sparse": sparse, "adapters": adapters}


def _tied(model: "PreTrainedModel") -> bool:
    """Whether embedding and head are one: transformers leaves what differs in the files two, tied or not."""
    return bool(model.get_input_embeddings().weight is model.get_output_embeddings().weight)


def rebuild(description: dict[str, Any], device: "torch.device | str") -> "PreTrainedModel":
    """A float32 model of a description, in training mode; its weights and masks are for others to bring."""
    import torch
    import transformers

    from slope_cli.pretrained import sparsify_as
    from sparse_kernels import extend_adapters, sparse_layers

    settings = dict(description["config"])
    config_class = getattr(transformers, models.FAMILIES[settings["model_type"]].config_class)
    config = config_class.from_dict(settings, attn_implementation="sdpa")
    model = models.build_model(config)
    if _tied(model) and not description.get("tied", True):
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    sparsify_as(model, {name: (n, m) for name, layer in description["sparse"].items() for n, m in [layer["pattern"]]})
    for name, layer in sparse_layers(model):
        layer.column_rescale = description["sparse"][name]["column_rescale"]
    for name, (rank, scale) in description["adapters"].items():
        extend_adapters(model, [name], rank)[name].scale = scale
    return model.to(device)
