"""What linearizing added to a model, as a folder beside its weights: settings.json and maps.safetensors."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from slope_cli.errors import UsageError
from slope_cli.linearize.settings import LinearizeSettings
from slope_cli.linearize.swap import added_state, linearize_attention, load_added_state

FOLDER = "linearize"


def write(folder: Path, model: PreTrainedModel, settings: LinearizeSettings) -> None:
    """Write the maps and mix factors of a linearized model, and the settings that it was linearized with."""
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in added_state(model).items()}
    save_file(tensors, folder / "maps.safetensors", metadata={"format": "pt"})


def settings(folder: Path) -> LinearizeSettings:
    """What a model was linearized with; UsageError for settings of another version."""
    file = folder / "settings.json"
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        return LinearizeSettings(**{**written, "keep_softmax": tuple(written["keep_softmax"])})
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(f"{file}: is not of this version ({error})") from None


def read(folder: Path, model: PreTrainedModel) -> None:
    """Linearize the model that `write` had, in place.

    Raises:
        UsageError: settings of another version, or of another base model.
    """
    linearize_attention(model, settings(folder))
    load_added_state(model, load_file(folder / "maps.safetensors"))
