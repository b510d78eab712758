"""Writing files with torch.distributed.checkpoint, and reading them without running code that is in them.

Its planner and writer write: each rank its own rows of a sharded tensor, and a share of what every rank has whole.

Its .metadata is a pickle, which may call anything when it is loaded, and a run may come from a stranger. Here it may
name only the few classes that describe tensors, none of which is called: each becomes an inert record of its arguments.
"""

import io
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Replicate, Shard

from slope_cli.distributed.collectives import Group
from slope_cli.errors import SlopeError, first_line
from slope_cli.utils.files import file_sha256, write_error
from sparse_kernels.sharded import local, local_rows

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


def rows_here(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of a tensor that this rank has, sharing its memory, and the number of the first one.

    Raises:
        TypeError: it is a DTensor that is split otherwise than by rows.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor, 0
    splits = [placement for placement in tensor.placements if not isinstance(placement, Replicate)]
    if len(splits) > 1 or any(type(split) is not Shard or split.dim for split in splits):
        raise TypeError(f"a tensor of shape {list(tensor.shape)} is split as {tensor.placements}, not by rows")
    return local(tensor), local_rows(tensor).start


# ------------------------------------------------------------------------------------------------------------- writing


class _Planner(DefaultSavePlanner):
    """Reads tensors, or takes them from their copies, where there are any."""

    copies: Mapping[str, Tensor] | None = None
    read: Callable[[str], Tensor] | None = None

    def lookup_object(self, index: MetadataIndex) -> Any:
        if self.read is not None:
            return self.read(index.fqn)
        return super().lookup_object(index) if self.copies is None else self.copies[index.fqn]


class Plan:
    """Which rank writes what of some tensors: of those that are whole on every rank, each is written by one.

    Every rank makes it, and writes it.

    Attributes:
        metadata: what the manifest is to say of the tensors.
        whole_bytes: of the tensors, over all ranks.
        copy_bytes: of host memory that a copy of what this rank writes takes.
        files: once they are written, the names of the files that .metadata names, and its own.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        group: Group,
        metadata: Mapping[str, Any] = MappingProxyType({}),
        *,
        read: Callable[[str], Tensor] | None = None,
    ) -> None:
        """
        Args:
            read: returns a tensor by its name when it is written; `tensors` may then lie on the meta device.

        Raises:
            TypeError: a tensor is split otherwise than by rows, or its other rows are on ranks that are not in `group`.
        """
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor) and rows_here(tensor)[0].shape != tensor.shape and not group.several:
                raise TypeError(f"{name}: only some of its rows are here, and this process writes alone")
        self.metadata, self.files = metadata, set[str]()
        self.whole_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self._planner = _Planner()
        self._planner.set_up_planner(dict(tensors), is_coordinator=group.ranks.first)
        # Each rank does the same, so that nobody need tell the others.
        plans, self._metadata = self._planner.create_global_plan(group.gather(self._planner.create_local_plan()))
        self._plan = plans[group.ranks.rank]
        self.copy_bytes = sum(_host_bytes(self._planner.lookup_object(item.index)) for item in self._plan.items)
        self._planner.read = read

    def copy(self, into: dict[str, Tensor]) -> None:
        """Copy what this rank writes into host memory, so that the tensors may change before they are written.

        Args:
            into: memory that earlier copies of the same tensors left; what does not fit is replaced.
        """
        gpu = False
        for item in self._plan.items:
            name, live = item.index.fqn, self._planner.lookup_object(item.index).detach()
            held = into.get(name)
            if held is None or (held.shape, held.dtype, held.stride()) != (live.shape, live.dtype, live.stride()):
                into[name] = torch.empty_like(live, device="cpu", pin_memory=live.is_cuda)
            into[name].copy_(live, non_blocking=True)
            gpu = gpu or live.is_cuda
        if gpu:
            torch.cuda.current_stream().synchronize()
        for name in into.keys() - {item.index.fqn for item in self._plan.items}:
            del into[name]
        self._planner.copies, self._planner.state_dict = into, {}

    def write(self, folder: Path, group: Group) -> dict[str, dict[str, Any]]:
        """Write to an existing folder, on the disk of all ranks.

        Returns:
            Size and hash of every file by its name, on every rank.
        """
        # Tensors are not copied from the GPU ahead: so they are in one order in the file, wherever they were. Those
        # that are read one by one have a file each: the writer keeps all of a file until it is written.
        together = self._planner.read is None
        writer = FileSystemWriter(folder, single_file_per_rank=together, per_thread_copy_ahead=0)
        rank = group.ranks.rank
        # A file is called after the place of its plan among those of all ranks.
        plan = writer.prepare_global_plan([SavePlan([])] * rank + [self._plan])[rank]
        results = group.gather(group.agreed(lambda: self._write(writer, plan, folder)))
        group.first(lambda: writer.finish(self._metadata, results))
        # Not from the metadata itself: versions of torch differ in whether `finish` completes it or a copy.
        self.files = {result.storage_data.relative_path for own in results for result in own} | {METADATA}
        own = group.agreed(lambda: _hashed(folder, rank))
        return dict(sorted(item for files in group.gather(own) for item in files.items()))

    def _write(self, writer: FileSystemWriter, plan: SavePlan, folder: Path) -> list[WriteResult]:
        if not plan.items:
            return []
        try:
            return writer.write_data(self._planner.finish_plan(plan), self._planner).wait()
        except OSError as error:
            raise write_error(folder, error) from error


def _host_bytes(tensor: Tensor) -> int:
    """Of a copy in host memory; torch makes pinned memory in powers of two."""
    return 1 << max(tensor.nbytes - 1, 0).bit_length() if tensor.is_cuda else tensor.nbytes


def _hashed(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and hash of each file that a rank wrote, after it is on the disk."""
    files = {}
    for path in [*folder.glob(f"__{rank}_*"), *([folder / METADATA] if rank == 0 else [])]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return files


# ------------------------------------------------------------------------------------------------------------- reading


class Part(NamedTuple):
    """Rows of a tensor: `length` bytes from `offset` of a file, as torch.save wrote them."""

    path: Path
    offset: int
    length: int
    first: int
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        """The number of the row after its last one."""
        return self.first + (self.shape[0] if self.shape else 1)

    def read(self) -> Tensor:
        """The rows; SlopeError if the file does not hold them."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                tensor = torch.load(io.BytesIO(file.read(self.length)), map_location="cpu", weights_only=True)
            if not isinstance(tensor, Tensor) or tensor.shape != self.shape:
                raise ValueError(f"holds no tensor of shape {list(self.shape)}")
            return tensor
        except Exception as error:  # zip's, pickle's and torch's errors share no base class
            raise SlopeError(f"{self.path}: cannot be read: {first_line(error)}") from None


class SavedTensor(NamedTuple):
    """Where a tensor lies: in parts, which follow one another."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def read(self, into: Tensor) -> None:
        """Copy the tensor into another of its shape, of which this rank may have only some rows; raises as `Part`."""
        here, first = rows_here(into)
        here = torch.atleast_1d(here)
        for part in self.parts:
            begin, end = max(first, part.first), min(first + len(here), part.end)
            if begin < end:
                rows = torch.atleast_1d(part.read())
                here[begin - first : end - first].copy_(rows[begin - part.first : end - part.first])


def saved_tensors(folder: Path) -> dict[str, SavedTensor]:
    """The tensors of a checkpoint by the names in it; SlopeError if .metadata does not describe tensors."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load().state
        places = {
            (index.state["fqn"], tuple(index.state["offset"])): info.state
            for index, info in metadata["storage_data"].items()
        }
        return {
            name: _saved_tensor(folder, name, places, entry.state)
            for name, entry in metadata["state_dict_metadata"].items()
        }
    except Exception as error:  # a forged pickle can raise anything
        raise SlopeError(f"{path}: cannot be read: {first_line(error)}") from None


def _saved_tensor(
    folder: Path, name: str, places: Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]], entry: Mapping[str, Any]
) -> SavedTensor:
    shape = _numbers(name, entry["size"])
    parts = []
    for chunk in entry["chunks"]:
        offsets, sizes = _numbers(name, chunk.state["offsets"]), _numbers(name, chunk.state["sizes"])
        if len(offsets) != len(shape) or any(offsets[1:]) or sizes[1:] != shape[1:] or len(sizes) != len(shape):
            raise ValueError(f"{name!r} has a part that is not some of its rows")
        place = places[name, offsets]
        file = place["relative_path"]
        if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
            raise ValueError(f"{file!r} is no file of the checkpoint")
        offset, length = _numbers(name, (place["offset"], place["length"]))
        parts.append(Part(folder / file, offset, length, offsets[0] if offsets else 0, sizes))
    parts.sort(key=lambda part: (part.first, part.end))
    ends = [0, *(part.end for part in parts)]
    if [*(part.first for part in parts), shape[0] if shape else 1] != ends:
        raise ValueError(f"the parts of {name!r} do not make up the whole")
    return SavedTensor(shape, tuple(parts))


def _numbers(name: str, numbers: Any) -> tuple[int, ...]:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{name!r} has no such part")
    return tuple(numbers)


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
