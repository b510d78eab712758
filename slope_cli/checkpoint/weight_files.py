"""The weights of a folder that transformers reads, one tensor at a time, for models that no memory holds whole.

Shape suffixes: O out features, I in features.
"""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.checkpoint import hf_folder, store
from slope_cli.models.build import build_model
from sparse_kernels import SparseLinear, masks, peft, select_layers, sparse_layers
from sparse_kernels.convert import pattern, sparsify_as

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SPARSE = ("values", "row_mask_bits", "backward_mask_bits")
"""The tensors of a sparse layer that are made of its weight."""


class Opened(NamedTuple):
    """A model on the meta device, as `hf_folder.load` would load it, its tokenizer, and its weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    weights: "Weights"


def open_folder(folder: Path) -> Opened | None:
    """The model of a folder without its weights, and what reads them.

    Returns:
        None for a folder that only `hf_folder.load` can load: with adapters, with other files than safetensors, or with
        names of tensors, or a tie of embedding and head, that transformers makes fit.

    Raises:
        UsageError, SlopeError: as `hf_folder.load`.
    """
    config = hf_folder.settings(folder)
    with hf_folder.named(folder):
        files = _files(folder)
        if not files or (folder / peft.FOLDER).is_dir():
            return None
        config._attn_implementation = "sdpa"
        model = build_model(config, device="meta")
        keys = _keys(model, files)
        if keys is None:
            return None
        weights = Weights(files, keys)
        weights.find_sparse_layers(model)
        return Opened(model.eval(), hf_folder.tokenizer_of(folder, config), weights)


class Weights:
    """Reads the tensors of a model folder by their names in the model, in float32."""

    def __init__(self, files: dict[str, Path], keys: dict[str, str]) -> None:
        """
        Args:
            files: of each tensor of the folder, by its name there.
            keys: that name, by the one in the model.
        """
        self._files, self._keys = files, keys
        self._patterns: dict[str, tuple[int, int]] = {}
        self._transposed: dict[str, bool] = {}
        self._last: tuple[str, SparseLinear] | None = None

    def find_sparse_layers(self, model: PreTrainedModel) -> None:
        """Make the layers whose zeros are N:M sparse layers of the model, which lies on the meta device."""
        try:
            linear = select_layers(model).swapped
        except ValueError:  # too small for any
            return
        self._transposed = {layer.name: layer.transposed for layer in linear}
        found = {layer.name: pattern(self._weight(layer.name)) for layer in linear}
        self._patterns = {name: n_m for name, n_m in found.items() if n_m is not None}
        sparsify_as(model, self._patterns)
        assert len(self._patterns) == sum(1 for _ in sparse_layers(model))

    def read(self, name: str) -> Tensor:
        """A tensor of the model's state_dict, on the CPU."""
        layer, _, own = name.rpartition(".")
        if layer not in self._patterns or own not in SPARSE:
            tensor = self._read(name)
            return tensor.float() if tensor.is_floating_point() else tensor
        if self._last is None or self._last[0] != layer:
            (n, m), weight_OI = self._patterns[layer], self._weight(layer)
            self._last = layer, SparseLinear(weight_OI, None, masks.row_mask(weight_OI, n, m), n, m)
        made: Tensor = self._last[1].state_dict()[own]
        return made

    def _weight(self, layer: str) -> Tensor:
        """Of a linear layer, (out, in), float32, however it is stored."""
        weight = self._read(f"{layer}.weight").float()
        return weight.t() if self._transposed[layer] else weight

    def _read(self, name: str) -> Tensor:
        key = self._keys[name]
        with safe_open(self._files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor


def _files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a folder, by the tensor's name; empty if they are not safetensors."""
    if (folder / INDEX).is_file():
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {key: folder / Path(file).name for key, file in names.items()}
    if not (folder / WEIGHTS).is_file():
        return {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / WEIGHTS)


def _keys(model: PreTrainedModel, files: dict[str, Path]) -> dict[str, str] | None:
    """The names in the files of a model's tensors, by those in the model; None if one is not found.

    A folder of a model without its head, such as GPT-2's own, leaves out the prefix of all names. A tied tensor that is
    there under both of its names may be two.
    """
    prefix, keys = f"{model.base_model_prefix}.", dict[str, str]()
    for name, first in store.first_names(model).items():
        key = next((key for key in (name, name.removeprefix(prefix)) if key in files), None)
        if (key is None) is (name == first):
            return None
        if key is not None:
            keys[name] = key
    return keys
