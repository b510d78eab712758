"""The model of a run: as its config says, and as its newest checkpoint has it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slope_cli import checkpoint, modelfolder, models, runs, stages
from slope_cli.config import Config
from slope_cli.durable import read_sealed
from slope_cli.errors import SlopeError
from slope_cli.linearize import base
from slope_cli.tokenizer import load_tokenizer
from sparse_kernels import Report

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


def model_config(config: Config) -> "PreTrainedConfig":
    """transformers' config of a run's model; UsageError for sizes that do not fit."""
    m = config.model
    return models.model_config(m.name, overrides=m.overrides, seq_len=config.train.seq_len, dropout=m.dropout)


def build(
    config: Config, device: torch.device | str, run: Path | None = None
) -> "tuple[PreTrainedModel, Report | None]":
    """The model of a run in the stage of its first step, for weights and masks from a checkpoint; and its report.

    run: its folder, where the config is not all that the model is built from: in a run that linearizes.

    Raises:
        UsageError: sizes that do not fit.
        SlopeError: the run's description of the model that it linearizes is missing or damaged.
    """
    if config.method == "linearize" and run is not None:
        model = base.rebuild(read_sealed(run / base.BASE), device)
    else:
        model = models.build_model(model_config(config), device=str(device), seed=config.train.seed)
    report = stages.plan(config, model)
    stages.enter(model, config, stages.DENSE, stages.stage(config, 0))
    return model, report


def load(
    run: Path, device: torch.device | str = "cpu", *, found: runs.Found | None = None
) -> "tuple[Config, PreTrainedModel, PreTrainedTokenizerFast, dict[str, Any]]":
    """A run's config, the model of its newest sound checkpoint, its tokenizer, and the checkpoint's manifest.

    Args:
        found: what `checkpoint.latest` said of this run, to hash nothing twice.

    Raises:
        UsageError: not the folder of a run.
        SlopeError: it has no sound checkpoint, its config or tokenizer is not the checkpoint's, or as `build`.
    """
    config = runs.open_config(run)
    found = found or checkpoint.latest(run)
    if found is None:
        raise SlopeError(f"{run} has no checkpoint yet")
    folder, manifest, faults = found
    for fault in faults:
        print(f"warning: {fault}; using {folder.name}", file=sys.stderr)
    runs.require_same_config(config, run, manifest)
    if wrong := runs.altered_tokenizer_files(run, manifest):
        raise SlopeError(f"{wrong[0]} is missing or not what it was when {folder.name} was saved")
    model, _ = build(config, device, run)
    stages.enter(model, config, stages.stage(config, 0), stages.stage(config, manifest["step"] - 1))
    checkpoint.restore(folder, model, None)
    model.requires_grad_(True)  # what a run froze, it froze for itself alone
    tokenizer = load_tokenizer(str((run / runs.TOKENIZER).resolve()))
    # A shape brings the published ids of its own tokenizer; what the model was trained with is another.
    for settings in filter(None, (model.config, getattr(model, "generation_config", None))):
        settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if models.objective(model.config) == "masked":
        setattr(model.config, modelfolder.SEED, config.train.seed)
    return config, model.eval(), tokenizer, manifest
