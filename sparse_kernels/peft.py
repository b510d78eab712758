"""A model's adapters as a folder of PEFT (a LoRA), beside an export's weights.

Shape suffixes: O out features, I in features, R adapter rank.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparse_kernels.adapters import adapted_layers, adapters_of, add_adapters

FOLDER = "adapter"


class _Adapter(NamedTuple):
    """lora_A (rank, in) and lora_B (out, rank) of one layer; its output is scaled by alpha / rank."""

    A: Tensor
    B: Tensor
    alpha: float
    fan_in_fan_out: bool


def write(folder: Path, model: PreTrainedModel) -> None:
    """Write the adapters of a model, which has some, into a new folder."""
    adapters = adapters_of(model)
    folder.mkdir()
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    alphas = {name: adapter.scaling * adapter.rank for name, adapter in adapters.items()}
    first = next(iter(adapters))
    task = {"task_type": "CAUSAL_LM"} if model.can_generate() else {}
    config = {
        "peft_type": "LORA",
        **task,
        "base_model_name_or_path": None,  # a relative path would be read from the working folder
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        "target_modules": sorted(adapters),
        "fan_in_fan_out": any(layer.conv1d for _, layer in adapted_layers(model)),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    tensors = {}
    for name, adapter in adapters.items():
        for side, tensor in (("A", adapter.lora_A), ("B", adapter.lora_B)):
            tensors[_key(name, side)] = tensor.detach().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _read(folder: Path) -> dict[str, _Adapter]:
    """Adapters by the names of their layers."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name: _Adapter(
            tensors[_key(name, "A")],
            tensors[_key(name, "B")],
            config["alpha_pattern"].get(name, config["lora_alpha"]),
            config["fan_in_fan_out"],
        )
        for name in config["target_modules"]
    }


def _key(name: str, side: str) -> str:
    return f"base_model.model.{name}.lora_{side}.weight"


@torch.no_grad()
def add(model: PreTrainedModel, folder: Path) -> None:
    """Give layers the adapters of a folder, in place; ValueError for a layer that the model does not have."""
    for name, saved in _read(folder).items():
        try:
            adapter = add_adapters(model, len(saved.A), [name], beside=True, alpha=saved.alpha)[name]
        except (AttributeError, ValueError) as error:
            raise ValueError(f"{folder}: has an adapter for {name}: {error}") from None
        adapter.lora_A.copy_(saved.A)
        adapter.lora_B.copy_(saved.B)


@torch.no_grad()
def merge(model: PreTrainedModel, folder: Path) -> None:
    """Add a folder's products B·A to the weights of a model of transformers, in place, as PEFT would."""
    for name, saved in _read(folder).items():
        delta_OI = (saved.alpha / len(saved.A)) * (saved.B @ saved.A)  # [O,R] · [R,I] -> [O,I]
        model.get_submodule(name).weight.add_(delta_OI.t() if saved.fan_in_fan_out else delta_OI)
