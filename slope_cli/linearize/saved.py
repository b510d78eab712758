"""What linearizing added to a model, as a folder beside its weights: settings.json and maps.safetensors."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from slope_cli.config.methods import LinearizeConfig
from slope_cli.errors import UsageError
from slope_cli.linearize.swap import added_state, kept_softmax, linearize_attention, load_added_state

FOLDER = "linearize"
KEYS = ("feature_map", "features", "window", "cache", "state", "mix", "window_dropout", "keep_softmax")
"""The config keys in settings.json, which also has `terrace` (a boolean) and `seed`."""


def write(folder: Path, model: PreTrainedModel, config: LinearizeConfig, *, seed: int) -> None:
    """Write the maps and mix factors of a linearized model, and the settings that it was linearized with."""
    folder.mkdir()
    settings = {key: getattr(config, key) for key in KEYS} | {"terrace": config.kind == "terrace", "seed": seed}
    settings["keep_softmax"] = kept_softmax(model)  # where they were chosen, the configuration has their number alone
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in added_state(model).items()}
    save_file(tensors, folder / "maps.safetensors", metadata={"format": "pt"})


def settings(folder: Path) -> LinearizeConfig:
    """The settings that a model was linearized with; UsageError if they are of another version."""
    file = folder / "settings.json"
    try:
        written = dict(json.loads(file.read_text(encoding="utf-8")))
        kind, _ = "terrace" if written.pop("terrace") else "standard", written.pop("seed")
        written = {"cache": 0, "state": "additive", **written}  # of before version 0.2
        if odd := sorted(written.keys() ^ set(KEYS)):
            raise KeyError(odd[0])
        return LinearizeConfig(kind=kind, **written)
    except (TypeError, KeyError, ValueError, UsageError) as error:
        raise UsageError(f"{file}: is not of this version ({error})") from None


def read(folder: Path, model: PreTrainedModel) -> None:
    """Linearize the model that `write` had, in place.

    Raises:
        UsageError: settings of another version, or of another base model.
    """
    linearize_attention(model, settings(folder))
    load_added_state(model, load_file(folder / "maps.safetensors"))
