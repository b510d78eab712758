"""Loading models: a run's newest checkpoint, an export, or a folder that transformers reads.

A run's model is built from its shape, brought into a phase, and given the tensors of a checkpoint, whether it is to be
resumed, evaluated, exported, linearized or fine-tuned.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.checkpoint import base_model, hf_folder, run_folder, store, weight_files
from slope_cli.config.schema import Config
from slope_cli.data.tokenizer import load_tokenizer
from slope_cli.distributed.collectives import Group
from slope_cli.errors import SlopeError, UsageError
from slope_cli.linearize import saved
from slope_cli.methods import phases_of
from slope_cli.methods.apply import apply
from slope_cli.methods.phases import Phase
from slope_cli.models import shapes
from slope_cli.models.build import build_model, run_model_config
from slope_cli.report import warned

KEPT = "keep_softmax"
"""The entry of a checkpoint's manifest with the layers that were chosen to keep softmax attention, once they are."""


class Loaded(NamedTuple):
    """A model with its sparse layers and adapters, in evaluation mode, and its tokenizer.

    folder: where its files are.
    config, manifest and phase: of the run and of its checkpoint; None for a folder that is no run.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    config: Config | None = None
    manifest: dict[str, Any] | None = None
    phase: Phase | None = None

    @property
    def name(self) -> str:
        """What it is called: see `hf_folder.model_name`."""
        return hf_folder.model_name(self.folder)

    @property
    def objective(self) -> shapes.Objective:
        """What the model predicts: the next token, or masked ones."""
        return shapes.objective(self.model.config)

    @property
    def step(self) -> int | None:
        """The finished steps of the run."""
        return None if self.manifest is None else int(self.manifest["step"])

    @property
    def seed(self) -> int:
        """The training seed; an export of a masked model records it, any other folder gets the default."""
        default = Config() if self.config is None else self.config
        return int(getattr(self.model.config, hf_folder.SEED, default.train.seed))


def load_model(
    folder: Path | str,
    device: torch.device | str = "cpu",
    *,
    checkpoint: store.Checkpoint | None = None,
    group: Group | None = None,
) -> Loaded:
    """The model of a run, an export, a finished fine-tuning, or any causal model of transformers.

    An export stores sparse weights with their zeros: a layer that keeps at most N of every M along its inputs becomes
    a sparse layer again, its W^{R,C} chosen by magnitude, and an adapter beside it joins it. Packed layers stay packed:
    they are for inference alone.

    Args:
        folder: its folder; of a run RUN, the newest sound checkpoint, or RUN@STEP, that of this step.
        checkpoint: the result of `store.latest` for a run, so that nothing is hashed twice.
        group: whose ranks share the hashing and each load the whole model; every rank calls it.

    Raises:
        UsageError: neither a run nor a model, a step that is not kept, or a tokenizer with more ids than the model has.
        SlopeError: no sound checkpoint, files that are not the checkpoint's, or that cannot be loaded.
    """
    step = run_folder.place(str(folder))[1]
    folder = hf_folder.model_folder(Path(folder))
    if step is None and not run_folder.is_run(folder):
        return Loaded(folder, *hf_folder.load(folder, device))
    config = run_folder.open_config(folder)
    if step is not None:
        checkpoint = store.at(folder, step, group)
    checkpoint = checkpoint or store.latest(folder, group)
    if checkpoint is None:
        raise SlopeError(f"{folder} has no checkpoint yet")
    for fault in checkpoint.faults if group is None or group.ranks.first else ():
        warned.warn(f"{fault}; using {checkpoint.folder.name}")
    manifest = checkpoint.manifest
    run_folder.require_same_config(config, folder, manifest)
    if wrong := run_folder.altered_tokenizer_files(folder, manifest):
        raise SlopeError(f"{wrong[0]} is missing or not what it was when {checkpoint.folder.name} was saved")
    phase = phases_of(config).at(manifest["step"] - 1)
    model = build(config, folder, device, phase, manifest.get(KEPT, ()))
    store.restore(checkpoint.folder, model, None)
    model.requires_grad_(True)  # what a run froze, it froze for itself alone
    tokenizer = load_tokenizer(str((folder / run_folder.TOKENIZER).resolve()))
    _set_special_ids(model, tokenizer)
    if shapes.objective(model.config) == "masked":
        setattr(model.config, hf_folder.SEED, config.train.seed)
    return Loaded(folder, model.eval(), tokenizer, config, manifest, phase)


def open_model(folder: Path | str) -> tuple[Loaded, weight_files.Weights] | None:
    """What `load_model` would load of a folder of transformers, on the meta device, and what reads its weights.

    Returns:
        None for a run, and where only `load_model` can read the files.

    Raises:
        UsageError, SlopeError: as `load_model`.
    """
    folder = hf_folder.model_folder(Path(folder))
    if run_folder.is_run(folder) or (opened := weight_files.open_folder(folder)) is None:
        return None
    return Loaded(folder, opened.model, opened.tokenizer), opened.weights


def build(
    config: Config,
    run: Path,
    device: torch.device | str,
    phase: Phase | None = None,
    kept: Collection[int | str] = (),
) -> PreTrainedModel:
    """The model of a run in a phase, whose weights and masks are then read from a checkpoint.

    Args:
        run: its folder, which says what a run linearizes.
        phase: None for the model as it is before its first one.
        kept: see `apply`; a checkpoint's manifest has them as KEPT.

    Raises:
        UsageError: sizes that do not fit.
        SlopeError: the description of the model that is linearized is missing or damaged.
    """
    if config.linearizes:
        model = base_model.build(run, device)
    else:
        model = build_model(run_model_config(config), device=str(device), seed=None)
    if phase is not None:
        apply(model, config, phase, kept=kept)
    return model


def _set_special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Replace a shape's published special ids by those of the tokenizer that the model was trained with."""
    for settings in filter(None, (model.config, getattr(model, "generation_config", None))):
        settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id


def shape_of(folder: Path) -> PreTrainedConfig:
    """transformers' config of what `load_model` would load, without its weights; raises as `load_model`."""
    folder = hf_folder.model_folder(folder)
    if not run_folder.is_run(folder):
        return hf_folder.settings(folder)
    if is_linearized(folder):
        return base_model.build(folder, "meta").config
    return run_model_config(run_folder.open_config(folder))


def is_linearized(folder: Path) -> bool:
    """Whether it is a run that linearizes, or such a run's export."""
    folder = hf_folder.model_folder(folder)
    if run_folder.is_run(folder):
        return run_folder.open_config(folder).linearizes
    return (folder / saved.FOLDER).is_dir()


def require_initial(folder: Path) -> None:
    """UsageError if no other run can start from a folder: it is linearized, or packed for inference."""
    hf_folder.require_trainable(folder)
    if is_linearized(folder):
        raise UsageError(f"{folder}: is linearized already; give the model that it was made of")
