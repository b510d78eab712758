"""A folder that transformers reads: an export of a run, or any other causal model's or BERT's."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from slope_cli.checkpoint import run_folder
from slope_cli.data.tokenizer import load_tokenizer, vocabulary_size
from slope_cli.errors import SlopeError, UsageError, first_line
from slope_cli.linearize import saved
from slope_cli.models import shapes
from sparse_kernels import find_sparse_layers, peft
from sparse_kernels.transformers import METHOD  # the import lets transformers load packed folders

SEED = "slope_seed"
"""The key of a masked model's config.json for the seed that its masked tokens are drawn from."""
RESULT, MODEL = "result.json", "model"
"""What a finished fine-tuning's folder has: its result, and the folder of its model."""
NEXT_SENTENCE = ("bert.pooler", "cls.seq_relationship")


def model_folder(folder: Path) -> Path:
    """Where the files of a model are: of RUN@STEP in RUN, else in the folder that is given, or in `model/` of a
    finished fine-tuning's."""
    folder = run_folder.place(str(folder))[0]
    return folder / MODEL if _is_fine_tuning(folder) and not (folder / "config.json").is_file() else folder


def model_name(folder: Path) -> str:
    """What a model is called: as its folder; a fine-tuning's model as the folder of the fine-tuning."""
    folder = run_folder.place(str(folder))[0].resolve()
    return folder.parent.name if folder.name == MODEL and _is_fine_tuning(folder.parent) else folder.name


def _is_fine_tuning(folder: Path) -> bool:
    return (folder / RESULT).is_file() and (folder / MODEL / "config.json").is_file()


def load(folder: Path, device: torch.device | str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model of a folder, in evaluation mode, and its tokenizer.

    Raises:
        UsageError: no model, one that predicts masked tokens but is no BERT's, without its head, or with a tokenizer
            of more ids than it has.
        SlopeError: files that cannot be loaded.
    """
    config = settings(folder)
    logging.disable_progress_bar()
    with named(folder):
        masked = shapes.objective(config) == "masked"
        kind = AutoModelForPreTraining if masked else AutoModelForCausalLM
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
        with torch.random.fork_rng(devices=[]):  # transformers initializes missing weights at random
            torch.default_generator.manual_seed(0)
            model, loading = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
        # The head that predicts the next sentence may be missing.
        if missing := sorted(name for name in loading["missing_keys"] if not name.startswith(NEXT_SENTENCE)):
            raise UsageError(f"{folder}: holds no weights for {missing[0]}; export the model with its language head")
        find_sparse_layers(model)
        if (folder / peft.FOLDER).is_dir():
            try:
                peft.add(model, folder / peft.FOLDER)
            except ValueError as error:
                raise UsageError(str(error)) from None
        if (folder / saved.FOLDER).is_dir():
            saved.read(folder / saved.FOLDER, model)
    return model.to(device).eval(), tokenizer_of(folder, model.config)


def tokenizer_of(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of a model's folder; UsageError if it has more ids than the model."""
    tokenizer = load_tokenizer(str(folder.resolve()))
    ids, rows = vocabulary_size(tokenizer), config.vocab_size
    if ids > rows:
        raise UsageError(f"{folder}: its tokenizer has {ids} ids, and the model a vocabulary of only {rows}")
    return tokenizer


def settings(folder: Path) -> PreTrainedConfig:
    """transformers' config of a folder's model, without its weights; errors as for `load`."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: is neither a run (no {run_folder.CONFIG}) nor a model folder (no config.json)")
    with named(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        forget_implementations(config)
        if shapes.objective(config) == "causal" and any("MaskedLM" in name for name in config.architectures or ()):
            raise ValueError(f"{config.model_type} predicts masked tokens; of such models only BERT is supported")
        return config


def forget_implementations(config: PreTrainedConfig) -> None:
    """Let transformers choose its own code for a config's model and its parts.

    A config.json may name others, for attention or experts: kernels that are fetched from a hub and executed.
    """
    for name in [name for name in vars(config) if name.endswith(("_implementation", "_implementation_internal"))]:
        setattr(config, name, None)
    for part in (value for value in vars(config).values() if isinstance(value, PreTrainedConfig)):
        forget_implementations(part)


def is_packed(folder: Path) -> bool:
    """Whether a folder's layers are packed for inference."""
    config = model_folder(folder) / "config.json"
    if not config.is_file():
        return False
    with named(folder):
        quantization = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}
        return quantization.get("quant_method") == METHOD


def require_trainable(folder: Path) -> None:
    """UsageError if a folder's layers are packed for inference."""
    if is_packed(folder):
        raise UsageError(f"{folder}: is packed for inference; give the run or the folder that it was made of")


@contextlib.contextmanager
def named(folder: Path) -> Iterator[None]:
    """Turn any error about a folder's files into one line."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # transformers', safetensors' and JSON's errors share no base class
        raise SlopeError(f"{folder}: cannot be loaded as a model ({first_line(error)})") from error
