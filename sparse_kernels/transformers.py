"""Packed models in transformers: importing this lets its `from_pretrained` load their folders.

    import sparse_kernels.transformers
    model = AutoModelForCausalLM.from_pretrained(folder)

A folder holds config.json, whose `quantization_config` lists the packed layers, weights in packed-*.safetensors, and
INDEX, with the tensors of each weight file and the SHA-256 of every file. Weight files have names of their own:
without this plugin transformers warns of an unknown method only, and would draw the packed layers' weights at random.
It then looks for UNREGISTERED, which is in no folder, and its error names what is missing.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparse_kernels import tile_metadata
from sparse_kernels.packed_linear import DTYPES, PackedLinear
from sparse_kernels.packing import packed_linears
from sparse_kernels.replace import replace_module
from sparse_kernels.selection import stored_weight
from sparse_kernels.sparse_relu import NAME, SparseSquaredReLU

ACT2FN[NAME] = SparseSquaredReLU  # a transformers without it refuses a config.json that names it
METHOD = "slope"
VERSION = 1
"""Of the format; an older reader refuses a newer one."""
INDEX = "packed.safetensors.index.json"
UNREGISTERED = "import-sparse_kernels.transformers-to-load-this.safetensors.index.json"
"""What config.json names as its weights."""
SHARD = "4GB"
"""Bytes of a weight file at most."""


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed folder.

    Attributes:
        layers: for the name of each packed layer its `shape` (out, in), the `rank` of its adapter (0: none), and
            whether it has a `bias`.
        dtype: of the stored tensors.
        version: of the format.
    """

    def __init__(self, layers: Mapping[str, Mapping[str, Any]], dtype: str, version: int, **_: Any) -> None:
        """
        Raises:
            ValueError: a newer version than this one.
        """
        self.quant_method = METHOD
        self.layers, self.dtype, self.version = dict(layers), dtype, version
        if version > VERSION:
            raise ValueError(f"packed in format {version}, and this slope reads up to {VERSION}: install a newer one")


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts a PackedLinear in the place of each packed layer before the weights are loaded, which it verifies."""

    requires_calibration = True  # nothing is packed while it is loaded
    is_trainable = False
    is_compileable = True

    def is_serializable(self) -> bool:
        """False: `save_packed` writes packed models."""
        return False

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Called before the weight files are looked for: name them."""
        config.transformers_weights = INDEX
        return config

    update_tp_plan = update_attn_implementation  # what transformers before 5.21 calls at this point

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that was asked for; ValueError if packed layers cannot have it."""
        if dtype not in DTYPES:
            names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
            raise ValueError(f"packed layers are in {names}, not in {dtype}")
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        if checkpoint_files:
            verify(Path(checkpoint_files[0]).parent)
        for name, layer in self.quantization_config.layers.items():
            old = _submodule(model, name)
            if old is None or list(stored_weight(old).shape) != layer["shape"]:
                raise ValueError(f"{type(model).__name__} has no layer {name} of {layer['shape']}, which is packed")
            rows, columns = layer["shape"]
            new = PackedLinear(columns, ((rows, layer["rank"]),), bias=layer["bias"], dtype=self.dtype, device="meta")
            replace_module(model, old, new)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, layer in packed_linears(model).items():
            if not layer.metadata.is_meta and not tile_metadata.is_sound(layer.metadata):
                raise ValueError(f"{name}.metadata is no 2:4 metadata")
        return model.requires_grad_(False)


def _submodule(model: PreTrainedModel, name: str) -> nn.Module | None:
    """A linear layer of a model, or of its base model alone, as AutoModel makes it; None if it has none."""
    modules = dict(model.named_modules())
    found = modules.get(name) or modules.get(name.removeprefix(f"{model.base_model_prefix}."))
    return found if isinstance(getattr(found, "weight", None), torch.Tensor) else None


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def save_packed(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write a model, its layers packed by `pack_layers`, into a folder; hash what is in the folder, the tokenizer too.

    Args:
        dtype: of the tensors of the other layers; the model is cast to it, in place.
    """
    model.to(dtype).save_pretrained(folder, max_shard_size=SHARD)
    weight_map: dict[str, str] = {}
    files = sorted(folder.glob("model*.safetensors"))
    for number, file in enumerate(files, 1):
        path = file.rename(folder / f"packed-{number:05}-of-{len(files):05}.safetensors")
        with safe_open(path, framework="pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), path.name)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    layers = {
        name: {
            "shape": [layer.out_features, layer.in_features],
            "rank": 0 if layer.lora_A is None else len(layer.lora_A),
            "bias": layer.bias is not None,
        }
        for name, layer in packed_linears(model).items()
    }
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = PackedConfig(layers, str(dtype).removeprefix("torch."), VERSION).to_dict()
    _write_json(
        folder / "config.json", config | {"quantization_config": quantization, "transformers_weights": UNREGISTERED}
    )
    hashes = _hashes(folder, [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()])
    total = sum((folder / name).stat().st_size for name in {*weight_map.values()})
    metadata = {"total_size": total, "version": VERSION, "sha256": hashes}
    _write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def verify(folder: Path) -> None:
    """Compare a packed folder's files with the hashes in its index.

    Raises:
        ValueError: a weight file is missing, or any file is not what was written; or the index is damaged.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        hashes, weights = dict(index["metadata"]["sha256"]), set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX}: cannot be read as the index of a packed model ({error})") from None
    if unknown := sorted(weights - hashes.keys()):
        raise ValueError(f"{folder / INDEX}: has no hash of {unknown[0]}")
    # A download may have left out files that are not asked for.
    present = [name for name in sorted(hashes) if name in weights or (folder / name).is_file()]
    for name, found in _hashes(folder, present).items():
        if found != hashes[name]:
            raise ValueError(f"{folder / name}: is missing or not what was written, by its SHA-256 in {INDEX}")


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    """The SHA-256 of files in hex; "" of one that is missing."""

    def sha256(name: str) -> str:
        path = folder / name
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as threads:  # hashing leaves Python's lock
        return dict(zip(names, threads.map(sha256, names), strict=True))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
