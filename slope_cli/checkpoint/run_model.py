"""The model of a run: as its config says, and as its newest checkpoint has it."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.checkpoint import base_model, hf_folder, run_folder, store
from slope_cli.config.schema import Config
from slope_cli.data.tokenizer import load_tokenizer
from slope_cli.errors import SlopeError
from slope_cli.methods import phases
from slope_cli.models import shapes
from slope_cli.models.build import build_model, run_model_config
from slope_cli.utils.files import read_sealed
from sparse_kernels import Report


def build(config: Config, device: torch.device | str, run: Path | None = None) -> tuple[PreTrainedModel, Report | None]:
    """The model of a run in the stage of its first step, for weights and masks from a checkpoint; and its report.

    run: its folder, where the config is not all that the model is built from: in a run that linearizes.

    Raises:
        UsageError: sizes that do not fit.
        SlopeError: the run's description of the model that it linearizes is missing or damaged.
    """
    if config.method == "linearize" and run is not None:
        model = base_model.rebuild(read_sealed(run / base_model.BASE), device)
    else:
        model = build_model(run_model_config(config), device=str(device), seed=config.train.seed)
    report = phases.plan(config, model)
    phases.enter(model, config, phases.DENSE, phases.stage(config, 0))
    return model, report


def load(
    run: Path, device: torch.device | str = "cpu", *, found: run_folder.Found | None = None
) -> tuple[Config, PreTrainedModel, PreTrainedTokenizerFast, dict[str, Any]]:
    """A run's config, the model of its newest sound checkpoint, its tokenizer, and the checkpoint's manifest.

    Args:
        found: what `checkpoint.latest` said of this run, to hash nothing twice.

    Raises:
        UsageError: not the folder of a run.
        SlopeError: it has no sound checkpoint, its config or tokenizer is not the checkpoint's, or as `build`.
    """
    config = run_folder.open_config(run)
    found = found or store.latest(run)
    if found is None:
        raise SlopeError(f"{run} has no checkpoint yet")
    folder, manifest, faults = found
    for fault in faults:
        print(f"warning: {fault}; using {folder.name}", file=sys.stderr)
    run_folder.require_same_config(config, run, manifest)
    if wrong := run_folder.altered_tokenizer_files(run, manifest):
        raise SlopeError(f"{wrong[0]} is missing or not what it was when {folder.name} was saved")
    model, _ = build(config, device, run)
    phases.enter(model, config, phases.stage(config, 0), phases.stage(config, manifest["step"] - 1))
    store.restore(folder, model, None)
    model.requires_grad_(True)  # what a run froze, it froze for itself alone
    tokenizer = load_tokenizer(str((run / run_folder.TOKENIZER).resolve()))
    # A shape brings the published ids of its own tokenizer; what the model was trained with is another.
    for settings in filter(None, (model.config, getattr(model, "generation_config", None))):
        settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if shapes.objective(model.config) == "masked":
        setattr(model.config, hf_folder.SEED, config.train.seed)
    return config, model.eval(), tokenizer, manifest
