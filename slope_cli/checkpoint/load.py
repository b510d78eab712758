"""A trained model to go on from or to judge: a run's newest checkpoint, or a folder that transformers reads."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.checkpoint import hf_folder, run_folder, run_model
from slope_cli.config.schema import Config
from slope_cli.errors import UsageError
from slope_cli.linearize import saved
from slope_cli.models import shapes
from slope_cli.models.build import run_model_config


class Pretrained(NamedTuple):
    """A model with its sparse layers and adapters; config and step are None for a folder that is no run."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    config: Config | None
    step: int | None

    @property
    def objective(self) -> shapes.Objective:
        """What the model predicts: the next token, or masked ones."""
        return "masked" if self.model.config.model_type == hf_folder.MASKED else "causal"

    @property
    def seed(self) -> int:
        """What the model was trained with; an export of a masked model says it, any other folder has the default."""
        default = Config() if self.config is None else self.config
        return int(getattr(self.model.config, hf_folder.SEED, default.train.seed))


def load(folder: Path, device: torch.device | str = "cpu") -> Pretrained:
    """The model in the folder of a run, of an export, or of any causal model of transformers, in evaluation mode.

    An export stores sparse weights with their zeros: a layer that keeps at most N of every M along its inputs becomes
    a sparse layer again, its W^{R,C} chosen by magnitude, and an adapter beside it joins it.

    Raises:
        UsageError: neither a run nor a model, or a tokenizer with more ids than the model has.
        SlopeError: no sound checkpoint, or files that cannot be loaded.
    """
    if run_folder.is_run(folder):
        config, model, tokenizer, manifest = run_model.load(folder, device)
        return Pretrained(folder, model, tokenizer, config, manifest["step"])
    return Pretrained(folder, *hf_folder.load(folder, device), None, None)


def settings(folder: Path) -> PreTrainedConfig:
    """transformers' config of what `load` would load, without its weights; raises what `load` does."""
    if not run_folder.is_run(folder):
        return hf_folder.settings(folder)
    config = run_folder.open_config(folder)
    if config.method == "linearize":
        raise UsageError(f"{folder}: is linearized, so no other run begins with it; give what it was made of")
    return run_model_config(config)


def linearized(folder: Path) -> bool:
    """Whether it is a run that linearizes, or such a run's export."""
    if run_folder.is_run(folder):
        return run_folder.open_config(folder).method == "linearize"
    return (folder / saved.FOLDER).is_dir()
