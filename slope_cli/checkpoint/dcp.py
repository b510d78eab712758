"""Reading the files of torch.distributed.checkpoint without running code that is in them.

Its .metadata is a pickle, which may call anything when it is loaded, and a run may come from a stranger. Here it may
name only the few classes that describe tensors, none of which is called: each becomes an inert record of its arguments.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slope_cli.errors import SlopeError, first_line

METADATA = ".metadata"
_DESCRIBING = {
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    # Of the folder that the checkpoint was saved in:
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}


class SavedTensor(NamedTuple):
    """Where a tensor lies: `length` bytes from `offset` of a file, as torch.save wrote them."""

    path: Path
    offset: int
    length: int
    shape: tuple[int, ...]

    def read(self, into: Tensor) -> None:
        """Copy the tensor into another of its shape; SlopeError if the file does not hold it."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                tensor = torch.load(io.BytesIO(file.read(self.length)), map_location="cpu", weights_only=True)
            if not isinstance(tensor, Tensor) or tensor.shape != into.shape:
                raise ValueError(f"holds no tensor of shape {list(into.shape)}")
            into.detach().copy_(tensor)
        except Exception as error:  # zip's, pickle's and torch's errors share no base class
            raise SlopeError(f"{self.path}: cannot be read: {first_line(error)}") from None


def saved_tensors(folder: Path) -> dict[str, SavedTensor]:
    """The tensors of a checkpoint by the names in it; SlopeError if .metadata does not describe tensors."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load().state
        places = {index.state["fqn"]: info.state for index, info in metadata["storage_data"].items()}
        return {
            name: _saved_tensor(folder, places[name], entry.state)
            for name, entry in metadata["state_dict_metadata"].items()
        }
    except Exception as error:  # a forged pickle can raise anything
        raise SlopeError(f"{path}: cannot be read: {first_line(error)}") from None


def _saved_tensor(folder: Path, place: Mapping[str, Any], entry: Mapping[str, Any]) -> SavedTensor:
    (_,) = entry["chunks"]  # one process saves each tensor whole
    name, shape = place["relative_path"], entry["size"]
    if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
        raise ValueError(f"{name!r} is no file of the checkpoint")
    if not all(type(number) is int and number >= 0 for number in (place["offset"], place["length"], *shape)):
        raise ValueError(f"{name!r} has no such part")
    return SavedTensor(folder / name, place["offset"], place["length"], tuple(shape))


class _Inert:
    """What an object was made of: the arguments of its class and its state."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Loads what describes tensors, and refuses any other name; torch.dtype's and torch.Size's are themselves."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for a class; a new one each time, since a pickle can set attributes of a class."""
        if name in _DESCRIBING.get(module, ()):
            return type("_Inert", (_Inert,), {})
        if module == "torch" and name == "Size":
            return tuple
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"names {module}.{name}, which describes no tensor")
