"""Reads a packed model (docs/serving.md) with torch, safetensors and json alone: how other servers may begin.

    tensors, layers = load("exported/")   # what stays dense, and a PackedLayer for each packed one
    y = layers["model.layers.0.mlp.up_proj"](x)

`python packed_loader.py FOLDER OUT.safetensors` writes the whole model dense, adapters added: W + B·A.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear

GROUPS = (0, 4, 1, 5, 2, 6, 3, 7)  # the order of a row's eight groups in a tile


class PackedLayer:
    """One layer. x (..., in) -> (..., out)."""

    def __init__(self, shape: list[int], stored: dict[str, Tensor]) -> None:
        self.rows, self.columns = shape
        self.values, self.metadata = stored["values"], stored["metadata"]
        self.bias, self.lora_A, self.lora_B = (stored.get(name) for name in ("bias", "lora_A", "lora_B"))

    def kept_columns(self) -> Tensor:
        """The column of each value, int64 (out, in/2): read byte by byte as the format's description goes."""
        tiles_down, tiles_across = -(-self.rows // 64), -(-self.columns // 32)
        # [tile down, tile across, band of 16 rows, row r of 8, place of the group], a byte for rows r and r + 8
        packed = self.metadata.view(tiles_down, tiles_across, 4, 8, 8)
        nibbles = torch.empty(tiles_down, 4, 2, 8, tiles_across, 8, dtype=torch.uint8)
        for place, group in enumerate(GROUPS):
            by_row = packed[..., place].permute(0, 2, 3, 1)  # [tile down, band, r, tile across]
            nibbles[:, :, 0, :, :, group] = by_row & 15
            nibbles[:, :, 1, :, :, group] = by_row >> 4
        nibbles = nibbles.reshape(tiles_down * 64, tiles_across * 8)[: self.rows, : self.columns // 4].long()
        starts = torch.arange(0, self.columns, 4)
        return torch.stack([starts + (nibbles & 3), starts + (nibbles >> 2)], -1).flatten(1)

    def weight(self) -> Tensor:
        """W, dense (out, in), without the adapter."""
        dense = torch.zeros(self.rows, self.columns, dtype=self.values.dtype)
        return dense.scatter_(1, self.kept_columns(), self.values)

    def merged_weight(self) -> Tensor:
        """W + B·A, which is no longer sparse."""
        return self.weight() if self.lora_A is None else self.weight() + self.lora_B @ self.lora_A

    def __call__(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight(), self.bias)
        return y if self.lora_A is None else y + linear(linear(x, self.lora_A), self.lora_B)


def load(folder: str | Path, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, PackedLayer]]:
    """The dense tensors of a packed folder by name, and its packed layers; ValueError if a file is not as written."""
    folder = Path(folder)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    if settings["quant_method"] != "slope" or settings["version"] != 1:
        raise ValueError(f"{folder}: is of another format")
    index = json.loads((folder / "packed.safetensors.index.json").read_text())
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != index["metadata"]["sha256"][name]:
                raise ValueError(f"{folder / name}: is damaged")
        tensors |= load_file(folder / name)
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    layers = {}
    for name, layer in settings["layers"].items():
        parts = ("values", "metadata", "bias", "lora_A", "lora_B")
        stored = {part: tensors.pop(f"{name}.{part}") for part in parts if f"{name}.{part}" in tensors}
        layers[name] = PackedLayer(layer["shape"], stored)
    return tensors, layers


def dense(folder: str | Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor of the model as if nothing were packed; weights are (out, in)."""
    tensors, layers = load(folder, dtype)
    biases = {f"{name}.bias": layer.bias for name, layer in layers.items() if layer.bias is not None}
    return tensors | biases | {f"{name}.weight": layer.merged_weight() for name, layer in layers.items()}


if __name__ == "__main__":
    save_file(dense(sys.argv[1]), sys.argv[2], metadata={"format": "pt"})
