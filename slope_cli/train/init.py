"""The model that a run begins with: new, of model.init, or that one linearized."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.checkpoint import base_model, hf_folder, load, run_folder, store
from slope_cli.config.schema import INIT, Config
from slope_cli.data.tokenizer import require_same_tokens
from slope_cli.errors import SlopeError, UsageError
from slope_cli.linearize.swap import linear_windows
from slope_cli.methods import phases
from slope_cli.models import shapes
from slope_cli.models.build import build_model, model_config, run_model_config
from slope_cli.utils.files import read_sealed, write_sealed
from sparse_kernels import Report, densify, masked_layers, sparse_layers

ALREADY = "is linearized already; give the model that it was made of"


def start(
    config: Config, device: torch.device | str, calibrate: phases.Calibrate
) -> tuple[PreTrainedModel, Report | None]:
    """The model of a run as it is before its first step, and the report of its layers.

    Raises:
        UsageError: model.init is no run and no model, or of another shape.
        SlopeError: it cannot be read.
    """
    initial = None
    if config.model.init is not None:
        folder = Path(config.model.init).expanduser()
        with _named_init(folder):
            load.settings(folder)  # refuses what no run begins with
            initial = load.load(folder).model
    model = build_model(run_model_config(config), device=str(device), seed=config.train.seed)
    report, now, first = phases.plan(config, model), phases.DENSE, phases.stage(config, 0)
    if initial is not None:
        found = dict(sparse_layers(initial))
        if found and first.layers == "sparse":  # a sparse run goes on with the masks of a sparse one
            had_adapters = any(layer.adapter is not None for layer in found.values())
            now = phases.Stage("sparse", adapters=had_adapters and first.adapters)
            phases.enter(model, config, phases.DENSE, now)
        else:
            densify(initial, adapters="merge")
        _take_over(model, initial, config)
    phases.enter(model, config, now, first, calibrate=calibrate)
    return model, report


def state(init: str, model: PreTrainedModel) -> str:
    """What is known of a model.init without its weights: "" if it may be begun with, else what it still lacks.

    Args:
        model: the run's own, dense; it may lie on the meta device.

    Raises:
        UsageError, SlopeError: as `start`.
    """
    folder = Path(init).expanduser()
    if not folder.exists():
        return "is not there yet"
    with _named_init(folder):
        theirs = build_model(load.settings(folder), device="meta")
    _require_same_shapes(model, theirs, init)
    return "has no checkpoint yet" if run_folder.is_run(folder) and not store.folders(folder) else ""


@contextlib.contextmanager
def _named_init(folder: Path) -> Iterator[None]:
    """Let an error about model.init name it by its key."""
    try:
        yield
    except SlopeError as error:
        reason = str(error).removeprefix(str(folder)).removeprefix(":").strip()
        raise type(error)(f"model.init={folder}: {reason}") from error


def _take_over(model: PreTrainedModel, initial: PreTrainedModel, config: Config) -> None:
    """Copy weights, masks and adapters of a model of the same shape."""
    _require_same_shapes(model, initial, str(config.model.init))
    model.load_state_dict(initial.state_dict())
    theirs = dict(sparse_layers(initial))
    for name, layer in sparse_layers(model):
        if layer.adapter is not None and (adapter := theirs[name].adapter) is not None:
            with torch.no_grad():  # B carries what the scales differ by, so that the model is the same function
                layer.adapter.B.mul_(adapter.scale / layer.adapter.scale)


def _require_same_shapes(model: PreTrainedModel, initial: PreTrainedModel, init: str) -> None:
    """UsageError if two models hold other tensors."""
    own, other = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, initial))
    if wrong := sorted(name for name in {*own, *other} if own.get(name) != other.get(name)):
        if all(".adapter." in name for name in wrong):
            rule = "adapters.start=0 and its rank would keep them"
            raise UsageError(f"model.init={init}: has other adapters than this run begins with; {rule}")
        name = wrong[0]
        shapes = f"{name} is {other.get(name, 'absent')} there and {own.get(name, 'absent')} here"
        raise UsageError(f"model.init={init}: is another model: {shapes} ({len(wrong)} differ in all)")


def start_linearized(
    config: Config, run: Path, device: torch.device | str, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
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
    model = _read_base(run, device)
    phases.enter(model, config, phases.DENSE, phases.stage(config, 0))
    return model


def softmax_teacher(run: Path, model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """The model that a run linearizes, in evaluation mode and frozen. A tensor that `model` froze is one in both."""
    teacher = _read_base(run, "cpu")  # so that the device never holds the model twice
    own = model.state_dict(keep_vars=True)
    for name, tensor in teacher.state_dict(keep_vars=True).items():
        if name in own and not own[name].requires_grad:
            tensor.data = own[name].data
    return teacher.to(device).requires_grad_(False).eval()


def _read_base(run: Path, device: torch.device | str) -> PreTrainedModel:
    """The model that a run linearizes, as `_keep` wrote it."""
    model = base_model.rebuild(read_sealed(run / base_model.BASE), device)
    store.restore(run / store.BASE, model, None)
    return model


def _keep(config: Config, run: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model of model.init and its description to a run's folder; errors as for `start_linearized`."""
    found = _to_linearize(config)
    _check(config, found, tokenizer)
    description = base_model.describe(found.model, dropout=config.model.dropout)
    tensors = store.state_tensors(found.model, None)
    phases.enter(found.model, config, phases.DENSE, phases.stage(config, 0))  # what does not fit shows before the write
    store.save_base(run, tensors)
    write_sealed(run / base_model.BASE, description)


def _to_linearize(config: Config) -> load.Pretrained:
    """The model of model.init on the CPU, its pruned layers sparse layers; errors as for `start_linearized`."""
    init = config.model.init
    if init is None:
        raise UsageError("model.init=null: say which model to linearize, a run or a folder of transformers")
    found = load.load(Path(init).expanduser())
    shapes.objective(found.model.config)
    if linear_windows(found.model):
        raise UsageError(f"{init}: {ALREADY}")
    if any(True for _ in masked_layers(found.model)):
        densify(found.model)
        hf_folder.find_sparse_layers(found.model)
    return found


def _check(config: Config, found: load.Pretrained, tokenizer: PreTrainedTokenizerFast) -> None:
    init, own = config.model.init, found.model.config
    if config.model.name == INIT:
        if config.model.overrides:
            key = next(iter(config.model.overrides))
            raise UsageError(f"model.overrides.{key}: the shape is that of model.init={init}; leave it out")
    else:
        named = model_config(config.model.name, overrides=config.model.overrides)
        for key in ("model_type", *shapes.FAMILIES[named.model_type].sizes):
            here, there = getattr(named, key), getattr(own, key, None)
            if here != there and "positions" not in key and "position_embeddings" not in key:
                raise UsageError(f"model.init={init}: is no {config.model.name}: {key} is {there} there, not {here}")
    if (positions := shapes.max_seq_len(own)) < config.train.seq_len:
        raise UsageError(f"train.seq_len={config.train.seq_len}: {init} has only {positions} positions")
    require_same_tokens(f"data.path={config.data.path}", tokenizer, str(init), found.tokenizer)
