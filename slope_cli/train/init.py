"""The model that a run starts from: new, loaded from model.init, or that one linearized."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.checkpoint import base_model, load, run_folder, store
from slope_cli.checkpoint.load import Loaded, load_model
from slope_cli.checkpoint.weight_files import Weights
from slope_cli.config import configs
from slope_cli.config.schema import INIT, Config
from slope_cli.data.tokenizer import require_same_tokens
from slope_cli.distributed.collectives import Group
from slope_cli.distributed.sharding import Sharding
from slope_cli.errors import SlopeError, UsageError
from slope_cli.methods import phases_of
from slope_cli.methods.apply import UNTOUCHED, Calibrate, apply
from slope_cli.methods.phases import Phase
from slope_cli.methods.sparse import which_layers
from slope_cli.models import shapes
from slope_cli.models.build import build_model, model_config, run_model_config
from slope_cli.report import metrics
from sparse_kernels import find_sparse_layers, masked_layers, sparse_layers, to_dense

LONGEST = 1024
"""Tokens of a sequence for a model whose training length is not known."""
SEQUENCES = 8
SIZES = ("seq_len", "micro_batch", "tokens_per_step")


class Origin(NamedTuple):
    """The model that a run begins with, as the run's log has it.

    source: its folder.
    source_step: the finished steps of the run that it is of; None for a folder that is no run.
    source_tokens: the tokens that its weights were trained on, with those of the runs before; None for a folder that is
        no run, and for a run that linearizes, which counts its own.
    optimizer: whether the optimizer's state comes along.
    """

    source: str
    source_step: int | None
    source_tokens: int | None
    optimizer: bool

    @classmethod
    def of(cls, loaded: Loaded, config: Config) -> "Origin":
        """That of a run of a configuration which begins with a loaded model."""
        tokens = None
        if loaded.config is not None and loaded.step is not None and not config.linearizes:
            before = metrics.beginning(loaded.folder) or {}
            tokens = loaded.step * loaded.config.train.tokens_per_step + (before.get("source_tokens") or 0)
        return cls(str(loaded.folder), loaded.step, tokens, config.model.init_optimizer)

    def __str__(self) -> str:
        if self.source_step is None:
            return f"begins with {self.source}"
        state = f"{'with' if self.optimizer else 'without'} its optimizer's state"
        return f"begins with {self.source} at step {self.source_step:,}, {state}"


def start(
    config: Config,
    run: Path,
    device: torch.device | str,
    *,
    calibrate: Calibrate,
) -> tuple[PreTrainedModel, Origin | None]:
    """The model of a run in its first phase, before its first step; if it linearizes, of what `keep_base` has written.

    On the meta device its shapes alone: model.init is not read, and nothing is calibrated.

    Returns:
        The model, and what it began with, if model.init was read.

    Raises:
        UsageError: model.init is no run and no model, of another shape, or a setting that does not fit it.
        SlopeError: it cannot be read.
    """
    first, origin = phases_of(config).at(0), None
    if first.linearized:
        # Rebuilt and read back: the loaded model is freed by now, so memory never holds it twice.
        model, now = base_model.read(run, device), UNTOUCHED
    else:
        model, now, origin = _start_from_init(config, device, first)
    apply(model, config, first, was=now, calibrate=None if model.device.type == "meta" else calibrate)
    return model, origin


def run_shape(config: Config, run: Path | None = None) -> PreTrainedConfig:
    """transformers' config of a run's model, without its weights; UsageError for sizes that do not fit.

    Args:
        run: its folder, if it has begun: model.init may be gone by then.
    """
    if config.model.name != INIT:
        return run_model_config(config)
    if run is not None and (run / base_model.BASE).is_file():
        return base_model.build(run, "meta").config
    init = _linearized_folder(config)
    load.require_initial(init)
    shape = load.shape_of(init)
    with _named_init(str(init)):
        shapes.family_of(shape)
    shape._attn_implementation = "sdpa"
    return shape


# -------------------------------------------------------------------------------------------------- weights of a model


def _start_from_init(
    config: Config, device: torch.device | str, first: Phase
) -> tuple[PreTrainedModel, Phase, Origin | None]:
    """A model with the weights of model.init, or new ones, the phase that it is in, and what it began with."""
    loaded = None
    if config.model.init is not None and str(device) != "meta":
        loaded = _loaded("model.init", config.model.init)
    model = build_model(run_model_config(config), device=str(device), seed=config.train.seed)
    if loaded is None:
        return model, UNTOUCHED, None
    now, sparse = UNTOUCHED, dict(sparse_layers(loaded.model))
    if (sparse and first.layers.kind == "sparse") or _same_masks(config, loaded, first):
        had_adapters = any(layer.adapter is not None for layer in sparse.values())
        now = Phase(0, first.layers, adapters=had_adapters and first.adapters)
        apply(model, config, now)
    else:
        to_dense(loaded.model, adapters="merge")
    _take_over(model, loaded, config)
    return model, now, Origin.of(loaded, config)


def _same_masks(config: Config, loaded: Loaded, first: Phase) -> bool:
    """Whether a run's masked layers are what a new run begins with, so that it keeps masks and pruned weights."""
    if loaded.config is None or loaded.phase is None or loaded.phase.layers != first.layers:
        return False
    return any(True for _ in masked_layers(loaded.model)) and which_layers(loaded.config) == which_layers(config)


def restore_optimizer(
    config: Config, model: PreTrainedModel, optimizer: torch.optim.Optimizer, group: Group | None = None
) -> None:
    """Read the optimizer's state of the run model.init into that of a model that has begun with it, split or whole.

    What the run did not train begins anew. Every rank of the group calls it.

    Raises:
        UsageError: model.init is no run, or of another optimizer or model.
        SlopeError: it cannot be read.
    """
    group, init = group or Group(), str(config.model.init)
    folder, step = run_folder.place(init)
    if not group.first(lambda: run_folder.is_run(folder)):
        raise UsageError(f"model.init_optimizer=true: model.init={init} is no run, and has no optimizer's state")
    own, theirs = config.optim.name, group.first(lambda: run_folder.open_config(folder).optim.name)
    if own != theirs:
        raise UsageError(f"model.init_optimizer=true: model.init={init} has the state of {theirs}, not of {own}")
    with _named_init(init):
        checkpoint = store.latest(folder, group) if step is None else store.at(folder, step, group)
        if checkpoint is None:
            raise SlopeError(f"{folder}: has no checkpoint yet")
        group.agreed(lambda: store.restore(checkpoint.folder, model, optimizer, weights=False))


def began_with(begun: Config, init: str) -> bool:
    """Whether a run began with `init`, RUN or RUN@STEP, however it is spelled; a RUN stands for any step of it."""
    if begun.model.init is None:
        return False
    (own, at), (folder, step) = run_folder.place(begun.model.init), run_folder.place(init)
    return own.resolve() == folder.resolve() and step in (None, at)


def begins_with(init: str, model: PreTrainedModel) -> str:
    """Check model.init without its weights: "" if a run can start from it, else what it still lacks.

    Args:
        model: the run's own, dense; it may lie on the meta device.

    Raises:
        UsageError, SlopeError: as `start`.
    """
    folder, step = run_folder.place(init)
    if not folder.exists():
        return "does not exist yet"
    with _named_init(init):
        load.require_initial(folder)
        theirs = build_model(load.shape_of(folder), device="meta")
    _require_same_shapes(model, theirs, init)
    if run_folder.is_run(folder) and step is not None:
        return "" if step in map(store.step_of, store.folders(folder)) else f"has no checkpoint of step {step}"
    return "has no checkpoint yet" if run_folder.is_run(folder) and not store.folders(folder) else ""


@contextlib.contextmanager
def _named_init(init: str, key: str = "model.init") -> Iterator[None]:
    """Let an error about model.init, or about another key's model, name it by its key."""
    try:
        yield
    except SlopeError as error:
        reason = str(error).removeprefix(str(run_folder.place(init)[0])).removeprefix(":").strip()
        raise type(error)(f"{key}={init}: {reason}") from error


def _take_over(model: PreTrainedModel, initial: Loaded, config: Config) -> None:
    """Copy weights, masks and adapters of a model of the same shape."""
    theirs = dict(sparse_layers(initial.model))
    ranks: list[float] = [layer.adapter.rank for layer in theirs.values() if layer.adapter is not None]
    if ranks and initial.config is not None:
        ranks = [initial.config.adapters.rank]  # as it was configured: it may be a share of each layer's sides
    _require_same_shapes(model, initial.model, str(config.model.init), rank=next(iter(ranks), 0))
    model.load_state_dict(initial.model.state_dict())
    for name, layer in sparse_layers(model):
        if layer.adapter is not None and (adapter := theirs[name].adapter) is not None:
            with torch.no_grad():  # B absorbs the ratio of the scalings, so that the function stays the same
                layer.adapter.lora_B.mul_(adapter.scaling / layer.adapter.scaling)


def _require_same_shapes(model: PreTrainedModel, initial: PreTrainedModel, init: str, *, rank: float = 0) -> None:
    """UsageError if the tensors of two models differ in name or shape; rank: of the adapters that `initial` has."""
    own, other = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, initial))
    if wrong := sorted(name for name in {*own, *other} if own.get(name) != other.get(name)):
        if all(".adapter." in name for name in wrong):
            rule = f"adapters.start=0 adapters.rank={rank:g} would keep them"
            raise UsageError(f"model.init={init}: has other adapters than this run begins with; {rule}")
        name = wrong[0]
        differ = f"{name} is {other.get(name, 'absent')} there and {own.get(name, 'absent')} here"
        raise UsageError(f"model.init={init}: is another model: {differ} ({len(wrong)} differ in all)")


# --------------------------------------------------------------------------------------------------------- linearizing


def linearize_overrides(init: Path, recipe: str = "linearize", run: Path | None = None) -> list[str]:
    """The overrides for linearizing a run or a folder: its shape, its data, and its sequence length and batch size
    unless the recipe sets them.

    Args:
        run: the one to go on with, if there is one. If it started from `init`, the overrides are those it started with:
            `init` may be gone by now, or spelled differently.

    Raises:
        UsageError: neither a run nor a model folder.
        SlopeError: a config.json that cannot be read.
    """
    begun = None if run is None else run_folder.open_config(run)
    if begun and begun.linearizes and began_with(begun, str(init)):
        sizes = {name: getattr(begun.train, name) for name in SIZES}
        return _overrides(str(begun.model.init), begun.data.path, sizes)
    folder = run_folder.place(str(init))[0]
    if run_folder.is_run(folder):
        base = run_folder.open_config(folder)
        path, length, sequences = base.data.path, base.train.seq_len, base.train.micro_batch
    else:
        path, length, sequences = None, min(_positions(init), LONGEST), SEQUENCES
    train = (yaml.safe_load(configs.recipe_text(recipe)) or {}).get("train") or {}
    length, sequences = train.get("seq_len", length), train.get("micro_batch", sequences)
    sizes = {"seq_len": length, "micro_batch": sequences, "tokens_per_step": length * sequences} | train
    return _overrides(str(init), path, sizes)


def _overrides(init: str, path: str | None, sizes: Mapping[str, int]) -> list[str]:
    model = [f"model.name={INIT}", f"model.init={json.dumps(init)}"]
    data = [] if path is None else [f"data.path={json.dumps(path)}"]
    return [*model, *data, *(f"train.{name}={sizes[name]}" for name in SIZES)]


def _positions(folder: Path) -> int:
    shape = load.shape_of(folder)
    return shape.max_position_embeddings if shape.model_type in shapes.FAMILIES else LONGEST


def teacher(
    run: Path,
    model: PreTrainedModel,
    device: torch.device | str,
    *,
    shares: bool,
    group: Group | None = None,
    sharding: Sharding | None = None,
) -> PreTrainedModel:
    """The model that a run has kept to linearize it, or to learn from it, in evaluation mode and frozen.

    Args:
        shares: take the tensors that `model` has frozen in place of equal ones, as one has whose adapters are trained.
        group: all processes of the run.
        sharding: of `model`, if it is split: then the teacher is split as well, and shares nothing.

    Raises:
        SlopeError: it cannot be read.
    """
    place = "cpu" if sharding is None else sharding.place  # so that the device never holds the model twice
    group = group or Group()
    if not shares:  # a model that is linearized was verified with the checkpoint
        store.verify_base(run, {}, group)
    kept = group.agreed(lambda: base_model.read(run, place)).requires_grad_(False).eval()
    if sharding is not None:
        sharding.split_frozen(kept)
        return kept
    own = model.state_dict(keep_vars=True) if shares else {}
    for name, tensor in kept.state_dict(keep_vars=True).items():
        if name in own and not own[name].requires_grad:
            tensor.data = own[name].data
    return kept.to(device)


def keep_teacher(config: Config, run: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the teacher of a run, and its description, to the run's folder, as base/ and base.json.

    Args:
        tokenizer: of the run's data.

    Raises:
        UsageError: it is no run and no model, not causal, too short for the sequences, or has another tokenizer.
        SlopeError: it cannot be read, or not be written to the run's folder.
    """
    key = "distill.teacher" if config.distill.teacher else "model.init"
    named = str(config.teacher)
    loaded = _loaded(key, named)
    if shapes.objective(loaded.model.config) != "causal" or shapes.objective(run_model_config(config)) != "causal":
        raise UsageError(f"{key}={named}: a teacher and its student predict the next token; one of them does not")
    to_dense(loaded.model, adapters="merge")
    if (positions := loaded.model.config.max_position_embeddings) < config.train.seq_len:
        raise UsageError(f"train.seq_len={config.train.seq_len}: {key}={named} has only {positions} positions")
    require_same_tokens(f"data.path={config.data.path}", tokenizer, named, loaded.tokenizer)
    own, theirs = run_model_config(config).vocab_size, loaded.model.config.vocab_size
    if own != theirs:
        raise UsageError(f"{key}={named}: has logits of {theirs} tokens, and this run's model of {own}")
    base_model.write(run, loaded.model, dropout=0.0)


def _loaded(key: str, named: str) -> Loaded:
    """The model that a key names, RUN or RUN@STEP or a folder, on the CPU."""
    with _named_init(named, key):
        load.require_initial(Path(named))
        return load_model(named)


def keep_base(config: Config, run: Path, tokenizer: PreTrainedTokenizerFast) -> Origin:
    """Write the model of model.init and its description to a run's folder, as base/ and base.json.

    Args:
        tokenizer: of the run's data.

    Returns:
        What it is the model of.

    Raises:
        UsageError: model.init is no run and no model, of another shape or tokenizer, or a setting that does not fit it.
        SlopeError: it cannot be read, or not be written to the run's folder.
    """
    loaded, weights = _to_linearize(config)
    _check_base(config, loaded, tokenizer)
    trial = base_model.rebuild(base_model.describe(loaded.model), "meta")
    apply(trial, config, phases_of(config).end)  # raises before anything is written
    base_model.write(run, loaded.model, dropout=config.model.dropout, weights=weights)
    return Origin.of(loaded, config)


def _to_linearize(config: Config) -> tuple[Loaded, Weights | None]:
    """The model of model.init on the CPU, its pruned layers sparse layers.

    Where linearize.layers_at_once spares memory and its folder can be read tensor by tensor, it is on the meta device,
    with what reads its weights.
    """
    init = _linearized_folder(config)
    load.require_initial(init)
    if config.linearize.layers_at_once and (opened := load.open_model(init)) is not None:
        shapes.family_of(opened[0].model.config)
        return opened
    loaded = load_model(init)
    shapes.family_of(loaded.model.config)
    if any(True for _ in masked_layers(loaded.model)):
        to_dense(loaded.model)
        find_sparse_layers(loaded.model)
    return loaded, None


def _linearized_folder(config: Config) -> Path:
    if config.model.init is None:
        raise UsageError("model.init=null: say which model to linearize, a run or a folder of transformers")
    return Path(config.model.init).expanduser()


def _check_base(config: Config, loaded: Loaded, tokenizer: PreTrainedTokenizerFast) -> None:
    """UsageError if a model does not match the configuration and the data."""
    init, own = config.model.init, loaded.model.config
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
    if (positions := own.max_position_embeddings) < config.train.seq_len:
        raise UsageError(f"train.seq_len={config.train.seq_len}: {init} has only {positions} positions")
    require_same_tokens(f"data.path={config.data.path}", tokenizer, str(init), loaded.tokenizer)
