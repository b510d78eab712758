"""Checkpoints that are whole or absent, and never loaded damaged.

RUN/checkpoints/step-00000100/ holds torch.distributed.checkpoint's files and manifest.json with the SHA-256 of each.
It is written under a temporary name, hashed, given its manifest last, synced to disk and renamed; so a folder named
step-* is complete, and a flipped byte anywhere in it shows as a wrong hash. Each rank of a run writes and hashes files
of its own; rank 0 does the rest once all have. Any number of processes reads what any other number wrote.

A run that trains little beside a large frozen model writes that model once, in the same way, to RUN/base/. Its
checkpoints leave out what is there and has no gradient, name the base they were saved beside, and are read with it.

A mask that follows from the values is left out as well, named under "derived" in the manifest, and computed again.
"""

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slope_cli.checkpoint import dcp
from slope_cli.distributed.collectives import Group
from slope_cli.errors import SlopeError, UsageError
from slope_cli.methods.optim import MOMENTS, init_state
from slope_cli.utils.files import atomic_folder, file_sha256, read_sealed, remove, write_sealed
from sparse_kernels import update_backward_masks
from sparse_kernels.deprecated import TENSORS

MANIFEST = "manifest.json"
BASE = "base"
REPLACED = "replaced"
"""The folder, in a run's, of the run that it replaces; see slope_cli.checkpoint.replaced."""
FORMAT = 2
"""Of checkpoints, in their manifests; those without one are of format 1, with the tensors' names of version 0.1."""
DERIVED = "backward_mask_bits"
"""The buffer that a checkpoint leaves out where it follows from values and row mask."""
_BASE = {"files": dict, "tensors": list}
_CHECKPOINT = {"files": dict, "step": int, "data": str, "config": dict, "tokenizer": dict}
"""The keys that a manifest must have."""


class Checkpoint(NamedTuple):
    """A sound checkpoint, its manifest, and the faults of newer ones that are not sound."""

    folder: Path
    manifest: dict[str, Any]
    faults: list[str]


def state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, *, derived: bool = True
) -> dict[str, Tensor]:
    """All that a checkpoint holds, as live tensors by name: parameters, buffers, and the optimizer's state.

    A tied weight appears once. The steps AdamW counts for each parameter are one vector, in parameter order; LAMB's
    and Muon's updates depend on none.

    Args:
        derived: with the masks that follow from the values, too.
    """
    named, first = model.state_dict(keep_vars=True), first_names(model)
    if not derived:
        named = {name: tensor for name, tensor in named.items() if not name.endswith(f".{DERIVED}")}
    tensors = {f"model.{name}": tensor for name, tensor in named.items() if first[name] == name}
    if optimizer is not None:
        states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
        for name, state in states.items():
            tensors |= {f"optim.{name}.{key}": state[key] for key in MOMENTS if key in state}
        if counts := [state["step"] for state in states.values() if "step" in state]:
            tensors["optim.step"] = torch.stack([count.float().cpu() for count in counts])
    return tensors


def first_names(model: nn.Module) -> dict[str, str]:
    """The name that a checkpoint has each tensor of a model under, by its own: of a tied one that of the first."""
    named = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(named.items())}
    return {name: first[id(tensor)] for name, tensor in named.items()}


def restore(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    derive: bool = True,
    weights: bool = True,
) -> None:
    """Read a verified checkpoint into a model, and an optimizer with the same parameters, in place.

    What the checkpoint does not hold is read from the base that it was saved beside. Of a tensor that is sharded, the
    rows of this rank are read.

    Args:
        folder: of a checkpoint, or a run's base.
        derive: compute the masks that follow from the values, if they were left out. Of a sharded model the caller
            does so.
        weights: read the model; otherwise the optimizer's state alone.

    Raises:
        SlopeError: its tensors are not those of this model, or it cannot be read.
    """
    manifest = read_sealed(folder / MANIFEST)
    base = folder.parents[1] / BASE if "base" in manifest else None
    derived = is_derived(manifest)
    saved = saved_tensors(folder)
    held = saved if base is None else saved_tensors(base) | saved
    if optimizer is not None:
        init_state(optimizer, (p for name, p in model.named_parameters() if f"optim.{name}.exp_avg" in saved))
    parts = ("model.",) * weights + ("optim.",) * (optimizer is not None)
    every = state_tensors(model, optimizer, derived=not derived)
    tensors = {name: tensor for name, tensor in every.items() if name.startswith(parts)}
    expected = {name: tuple(t.shape) for name, t in tensors.items()}
    kept = {name: saved_as.shape for name, saved_as in held.items() if name.startswith(parts)}
    if kept != expected:
        wrong = sorted(name for name in {*kept, *expected} if kept.get(name) != expected.get(name))
        raise SlopeError(f"{folder} is of another model: {len(wrong)} tensors differ, the first is {wrong[0]}")
    for name, tensor in tensors.items():
        held[name].read(into=tensor)
    if derived and derive and weights:
        update_backward_masks(model)
    if optimizer is not None:
        states = (optimizer.state[p] for p in model.parameters() if p in optimizer.state)
        counts = [state["step"] for state in states if "step" in state]
        for count, saved_count in zip(counts, tensors.get("optim.step", torch.empty(0)), strict=True):
            count.copy_(saved_count)


def is_derived(manifest: Mapping[str, Any]) -> bool:
    """Whether a checkpoint leaves out the masks that follow from the values."""
    return DERIVED in manifest.get("derived", ())


def saved_tensors(folder: Path) -> dict[str, dcp.SavedTensor]:
    """Where the tensors of a checkpoint or base lie, by their current names."""
    return {_current_name(name): saved for name, saved in dcp.saved_tensors(folder).items()}


def _current_name(name: str) -> str:
    """The current name of a tensor of a checkpoint of any format."""
    return ".".join(TENSORS.get(part, part) for part in name.split("."))


def planned(
    run: Path, tensors: Mapping[str, Tensor], *, beside_base: bool = False, group: Group | None = None
) -> dcp.Plan:
    """Which rank writes what of a checkpoint of these tensors; every rank calls it.

    Args:
        beside_base: leave out the tensors without gradient that the run's base holds. Runs made before
            there were bases have none.

    Raises:
        TypeError: other ranks, which are not in `group`, have a part of a tensor.
    """
    group, base, metadata = group or Group(), run / BASE / MANIFEST, {}
    if beside_base and group.first(base.parent.is_dir):
        names, own_hash = group.first(lambda: (read_sealed(base)["tensors"], file_sha256(base)))
        frozen = {_current_name(name) for name in names}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad or name not in frozen}
        metadata = {"base": own_hash}
    return dcp.Plan(tensors, group, metadata)


def save(
    run: Path,
    step: int,
    tensors: Mapping[str, Tensor] | dcp.Plan,
    metadata: Mapping[str, Any],
    *,
    keep: int,
    derived: bool = False,
    group: Group | None = None,
) -> Path:
    """Write a checkpoint, then drop what it makes superfluous, as `prune`; every rank calls it.

    Args:
        step: finished steps; a checkpoint of that step that is there already is left as it is.
        tensors: or what `planned` made of them.
        metadata: goes into the manifest as it is (JSON).
        derived: the masks that follow from the values are left out.

    Returns:
        The checkpoint's folder.

    Raises:
        SlopeError: it could not be written (a full disk, say); what was there before is untouched.
    """
    group = group or Group()
    final = _folder(run, step)
    if group.first(final.exists):
        return final
    plan = tensors if isinstance(tensors, dcp.Plan) else planned(run, tensors, group=group)
    metadata = {"step": step, "keep": keep, **metadata, **plan.metadata} | ({"derived": [DERIVED]} if derived else {})
    _write(final, f"the checkpoint of step {step}", plan, metadata, group)
    group.first(lambda: prune(run, keep))
    return final


def prune(run: Path, keep: int) -> None:
    """Once there is a checkpoint, drop all but the newest `keep`, and the run that this one replaces.

    One that was saved with a larger `keep` stays while it is among that many: a command that goes on with a run and
    leaves the number out does not take away what an earlier one was to keep.
    """
    with contextlib.suppress(OSError):  # an old checkpoint that cannot be removed is no reason to stop
        for newer, old in enumerate(folders(run)):
            if newer < keep or newer < _promised(old):
                continue
            dead = old.with_name(f".dead-{old.name}")  # renamed first, so that a kill cannot leave half a step-* folder
            os.rename(old, dead)
            remove(dead)
        if folders(run):
            remove(run / REPLACED)


def _promised(folder: Path) -> int:
    """How many of the newest checkpoints were to be kept when this one was saved; 0 if nothing readable says so."""
    if folder.is_symlink():  # not a checkpoint of this run
        return 0
    try:
        return int(read_sealed(folder / MANIFEST).get("keep", 0))
    except (SlopeError, OSError, TypeError, ValueError):
        return 0


def save_base(
    run: Path, tensors: Mapping[str, Tensor], description: str, read: Callable[[str], Tensor] | None = None
) -> None:
    """Write the model that a run without checkpoints begins with, in place of one that an earlier start left.

    Args:
        description: the hash of what else belongs to the model, for the manifest.
        read: see `dcp.Plan`.

    Raises:
        SlopeError: it could not be written (a full disk, say).
        TypeError: other ranks have a part of a tensor.
    """
    shutil.rmtree(run / BASE, ignore_errors=True)
    metadata = {"tensors": sorted(tensors), "description": description}
    plan = dcp.Plan(tensors, Group(), read=read)
    _write(run / BASE, "the model that the run begins with", plan, metadata, Group())


def _write(final: Path, what: str, plan: dcp.Plan, metadata: Mapping[str, Any], group: Group) -> None:
    """Write a folder that appears when it is whole, with its manifest; what: for the error."""
    try:
        with contextlib.ExitStack() as opened:
            temporary = group.first(lambda: _open(final, plan, opened))
            files = plan.write(temporary, group)

            def commit() -> None:
                present = {path.name for path in temporary.iterdir()}
                if wrong := sorted(present ^ files.keys() | plan.files ^ files.keys()):
                    raise SlopeError(f"{temporary / wrong[0]}: not all ranks see the same files there")
                write_sealed(temporary / MANIFEST, {"format": FORMAT, "files": files, **metadata})
                opened.close()

            group.first(commit)
    except (SlopeError, OSError, RuntimeError, MemoryError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SlopeError(f"{what} cannot be written: {reason[-1]}") from None


def _open(final: Path, plan: dcp.Plan, opened: contextlib.ExitStack) -> Path:
    """A temporary folder, with room for a plan, that becomes `final` when `opened` is closed."""
    temporary, need = opened.enter_context(atomic_folder(final)), int(1.2 * plan.whole_bytes)
    if (free := shutil.disk_usage(temporary).free) < need:
        raise SlopeError(f"{final.parent}: {free / 1e9:.2f} GB free, {need / 1e9:.2f} GB needed")
    return temporary


def clean(run: Path) -> None:
    """Remove what an interrupted save or prune left behind."""
    for leftover in (*run.glob(f".tmp-{BASE}"), *run.glob("checkpoints/.tmp-*"), *run.glob("checkpoints/.dead-*")):
        remove(leftover)


def verify(folder: Path, group: Group | None = None) -> dict[str, Any]:
    """Hash every file of a checkpoint, but for the run's base, and compare with its manifest, which is returned.

    Args:
        group: whose ranks share the files; every rank calls it.

    Raises:
        SlopeError: naming the first file that is missing, of another size, or altered.
    """
    group = group or Group()

    def described() -> dict[str, Any]:
        manifest = read_sealed(folder / MANIFEST)
        _require_kind(folder / MANIFEST, manifest, _CHECKPOINT)
        if manifest["step"] != step_of(folder):
            raise SlopeError(f"{folder} holds the checkpoint of step {manifest['step']}")
        return manifest

    manifest = group.first(described)
    _verify_files(folder, manifest, group)
    return manifest


def _require_kind(path: Path, manifest: Mapping[str, Any], keys: Mapping[str, type]) -> None:
    """SlopeError for a sealed file that is no manifest with these keys: a file of another kind put in its place."""
    wrong = [key for key, kind in keys.items() if type(manifest.get(key)) is not kind]
    entries = [] if wrong else manifest["files"].values()
    if wrong or not all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries):
        raise SlopeError(f"{path}: is a file of another kind, whose {(wrong or ['files'])[0]} is not a manifest's")


def log_mark(manifest: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """What a log of the run was when a checkpoint was saved (see slope_cli.utils.jsonl); None in earlier versions."""
    logs = manifest.get("logs")
    mark = logs.get(name) if isinstance(logs, dict) else None
    return mark if isinstance(mark, dict) and type(mark.get("bytes")) is int and "sha256" in mark else None


def base_hash(manifest: Mapping[str, Any]) -> str | None:
    """The hash of the base, or the teacher in its place, that a checkpoint was saved beside; None without one."""
    found: str | None = manifest.get("base", manifest.get("teacher"))
    return found


def verify_base(run: Path, manifest: Mapping[str, Any], group: Group | None = None) -> dict[str, Any]:
    """Hash the base that a checkpoint with this manifest was saved beside, or a teacher that is kept in its place.

    Args:
        manifest: empty before there is a checkpoint.

    Returns, raises: as `verify`.
    """
    path, group = run / BASE / MANIFEST, group or Group()
    bound_to = base_hash(manifest)

    def described() -> dict[str, Any]:
        base = read_sealed(path)
        if bound_to is not None and file_sha256(path) != bound_to:
            raise SlopeError(f"{path} is not what it was when step {manifest['step']} was saved")
        _require_kind(path, base, _BASE)
        return base

    base = group.first(described)
    _verify_files(path.parent, base, group)
    return base


def _verify_files(folder: Path, manifest: Mapping[str, Any], group: Group) -> None:
    """Each rank hashes its share of the files; SlopeError, the same on all, for the first one that is wrong."""
    own = list(enumerate(manifest["files"].items()))[group.ranks.rank :: group.ranks.world]
    faults = ((number, _fault(folder, name, entry)) for number, (name, entry) in own)
    first = next((found for found in faults if found[1]), None)
    if found := sorted(filter(None, group.gather(first))):
        raise SlopeError(found[0][1])


def _fault(folder: Path, name: str, entry: Mapping[str, Any]) -> str:
    """What is wrong with a file of a checkpoint, or ""."""
    path = folder / name
    if path.name != name or path.is_symlink() or not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{path} has {size} bytes, its manifest says {entry['bytes']}"
    try:
        sound = file_sha256(path) == entry["sha256"]
    except SlopeError as error:
        return str(error)
    return "" if sound else f"{path} is damaged: its checksum does not fit"


def latest(run: Path, group: Group | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies, the same on all ranks; None where none was ever saved.

    Args:
        group: whose ranks share the files; every rank calls it.

    Raises:
        SlopeError: there are checkpoints, and every one is damaged, or the base that the newest sound one needs is.
    """
    group = group or Group()
    faults: list[str] = []
    for folder in (found := group.first(lambda: folders(run))):
        try:
            manifest = verify(folder, group)
        except SlopeError as error:
            if group.first(folder.exists):  # otherwise a run that is training dropped it meanwhile
                faults.append(str(error))
            continue
        if "base" in manifest:
            verify_base(run, manifest, group)  # an older checkpoint needs it too
        return Checkpoint(folder, manifest, faults)
    if faults:
        raise SlopeError(f"no checkpoint of {run} is sound: {'; '.join(faults)}")
    return latest(run, group) if found else None


def set_aside_newer(run: Path, step: int) -> None:
    """Rename the damaged checkpoints beyond `step`, so that training can save under their names again."""
    for folder in folders(run):
        if step_of(folder) > step:
            names = (folder.with_name(f"damaged-{number}-{folder.name}") for number in itertools.count())
            folder.rename(next(path for path in names if not path.exists()))


def folders(run: Path) -> list[Path]:
    """Every step-* folder of a run, newest first."""
    steps = (folder for folder in run.glob("checkpoints/step-*") if re.fullmatch(r"step-[0-9]+", folder.name))
    return sorted(steps, key=step_of, reverse=True)


def at(run: Path, step: int, group: Group | None = None) -> Checkpoint:
    """The checkpoint of a step; every rank of the group calls it.

    Raises:
        UsageError: there is none.
        SlopeError: it is damaged, or the base that it needs is.
    """
    group = group or Group()
    folder = group.first(lambda: require_step(run, step))
    manifest = verify(folder, group)
    if "base" in manifest:
        verify_base(run, manifest, group)
    return Checkpoint(folder, manifest, [])


def require_step(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint, not verified; UsageError, with the steps that are kept, if there is none."""
    if (folder := _folder(run, step)).is_dir():
        return folder
    there = ", ".join(str(step_of(each)) for each in reversed(folders(run)))
    raise UsageError(f"{run}: has no checkpoint of step {step}" + (f", but of {there}" if there else ""))


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint, by its name; 0 without any."""
    return next(map(step_of, folders(run)), 0)


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    return int(folder.name.rpartition("-")[2])
