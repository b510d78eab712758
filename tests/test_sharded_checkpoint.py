"""Checkpoints of several processes: written together, whole or absent, and read by any number of processes."""

import functools
import os
import pickle
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data import prepared
from support.marks import slow
from support.processes import die_in_save
from support.ranks import Ranks, together
from support.runs import RECIPE, assert_same_run, sized, tiny
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from slope_cli.checkpoint import dcp, store
from slope_cli.config.schema import Config
from slope_cli.distributed.collectives import Group
from slope_cli.errors import SlopeError
from slope_cli.methods.optim import init_state
from slope_cli.report import metrics
from slope_cli.utils.files import read_sealed, write_sealed
from sparse_kernels import add_adapters, sparsify

METADATA: dict[str, Any] = {"data": "", "config": {}, "tokenizer": {}}


LAYOUTS = {"ddp": 1, "fsdp": 1, "hsdp": 2}
"""How many copies of each row a layout with sharded weights has; ddp has no such."""


def built(seed: int, layout: str = "ddp") -> tuple[nn.Module, torch.optim.AdamW]:
    """A small sparse model with adapters, and an optimizer; over 4 ranks its rows split unevenly, and one has none."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(18, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 5))
    sparsify(model)
    add_adapters(model, 4)
    if layout != "ddp":
        world, copies = torch.distributed.get_world_size(), LAYOUTS[layout]
        shape, names = ((copies, world // copies), ("replicate", "shard")) if copies > 1 else ((world,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    init_state(optimizer, model.parameters())
    return model, optimizer


def reference() -> dict[str, Tensor]:
    """All that a checkpoint of the model holds."""
    model, optimizer = built(0)
    for number, p in enumerate(model.parameters()):
        optimizer.state[p]["exp_avg"].uniform_(-1, 1)
        optimizer.state[p]["exp_avg_sq"].uniform_()
        optimizer.state[p]["step"].fill_(number)
    return store.state_tensors(model, optimizer)


def rows_of(whole: Tensor, tensor: Tensor) -> Tensor:
    """Of a whole tensor the rows that this rank has of another."""
    here, first = dcp.rows_here(tensor)
    return whole[first : first + len(here)] if here.dim() else whole


def filled(layout: str) -> dict[str, Tensor]:
    """The state of a model in a layout, equal to the reference."""
    tensors = store.state_tensors(*built(1, layout))
    for name, whole in reference().items():
        dcp.rows_here(tensors[name])[0].copy_(rows_of(whole.detach(), tensors[name]))
    return tensors


def restored(layout: str, folder: Path) -> list[str]:
    """The names of the tensors that a model in a layout does not read back as they were."""
    model, optimizer = built(2, layout)
    store.restore(folder, model, optimizer)
    tensors, whole = store.state_tensors(model, optimizer), reference()
    assert tensors.keys() == whole.keys()
    assert layout == "ddp" or any(isinstance(tensor, DTensor) for tensor in tensors.values())
    return [name for name, t in tensors.items() if not torch.equal(dcp.rows_here(t)[0], rows_of(whole[name], t))]


def _save_and_restore(group: Group, folder: Path, layouts: list[str]) -> tuple[list[str], list[str]]:
    """Save in some layouts, and read every checkpoint of a folder in each of them; what differs, and is not sound."""
    wrong, unsound = [], []
    for layout in layouts:
        run = folder / f"{layout}-{group.ranks.world}"
        store.save(run, 1, filled(layout), METADATA, keep=2, group=group)
    for run in sorted(folder.iterdir()):
        found = store.latest(run, group)
        if found is None or found.faults:
            unsound.append(run.name)
        wrong += [f"{run.name} in {layout}: {name}" for layout in layouts for name in restored(layout, run / STEP)]
    return wrong, unsound


STEP = Path("checkpoints/step-00000001")


@pytest.mark.slow
def test_any_number_of_ranks_in_any_layout_reads_what_any_other_wrote(tmp_path: Path) -> None:
    store.save(tmp_path / "single", 1, reference(), METADATA, keep=2)
    for world, layouts in ((2, ["ddp", "fsdp"]), (4, ["ddp", "fsdp", "hsdp"]), (3, ["fsdp"])):
        assert together(world, _save_and_restore, tmp_path, layouts) == [([], [])] * world
    runs = sorted(tmp_path.iterdir())
    assert len(runs) == 7
    for run in runs:
        assert restored("ddp", run / STEP) == [], run.name
        store.verify(run / STEP)
    for run in runs:
        if run.name == "single":
            continue
        world = int(run.name[-1])
        named = {f"__{rank}_0.distcp" for rank in range(world)} | {".metadata"}
        assert read_sealed(run / STEP / store.MANIFEST)["files"].keys() == named
        sizes = [(run / STEP / f"__{rank}_0.distcp").stat().st_size for rank in range(world)]
        assert max(sizes) < 2 * sum(sizes) / world, "the ranks share what each has whole"


def _read_parts(group: Group, run: Path) -> tuple[int, int]:
    """How many of the parts that a rank reads of split tensors are its own, and another's."""
    store.save(run, 1, filled("fsdp"), METADATA, keep=2, group=group)
    model, optimizer = built(2, "fsdp")
    read, parts = dcp.Part.read, list[dcp.Part]()

    def counting(part: dcp.Part) -> Tensor:
        parts.append(part)
        return read(part)

    dcp.Part.read = counting  # type: ignore[method-assign]
    store.restore(run / STEP, model, optimizer)
    split = {part for saved in dcp.saved_tensors(run / STEP).values() if len(saved.parts) > 1 for part in saved.parts}
    own = [part.path.name == f"__{group.ranks.rank}_0.distcp" for part in parts if part in split]
    return sum(own), len(own) - sum(own)


def test_a_rank_reads_its_own_rows_alone(tmp_path: Path) -> None:
    for own, others in together(2, _read_parts, tmp_path):
        assert (own > 10, others) == (True, 0)


# -------------------------------------------------------------------------------------------------------- failures


def _fill_disk_of_one_rank(group: Group, run: Path, full: int) -> tuple[str, list[str], str]:
    tensors = filled("fsdp")
    store.save(run, 1, tensors, METADATA, keep=5, group=group)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    error = ""
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000 if group.ranks.rank == full else most, most))
    try:
        store.save(run, 2, tensors, METADATA, keep=5, group=group)
    except SlopeError as raised:
        error = str(raised)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    left = group.first(lambda: sorted(os.listdir(run / "checkpoints")))
    return error, left, store.save(run, 3, tensors, METADATA, keep=5, group=group).name


@pytest.mark.parametrize("full", [0, 1])
def test_a_rank_that_cannot_write_is_named_by_all_and_the_next_save_works(full: int, tmp_path: Path) -> None:
    first, second = together(2, _fill_disk_of_one_rank, tmp_path, full)
    assert first == second
    error, left, folder = first
    assert error.startswith(f"the checkpoint of step 2 cannot be written: rank {full} on ")
    assert "the disk (or quota) is full" in error
    assert (left, folder) == (["step-00000001"], "step-00000003")
    assert store.latest(tmp_path) is not None


def _refuse(group: Group, run: Path) -> list[str]:
    """What saving rows of a tensor by one process alone raises."""
    tensors, errors = filled("fsdp"), []
    mesh = init_device_mesh("cpu", (2,))
    columns = {"model.x": distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)])}
    alone: tuple[Callable[[], Any], ...] = (
        lambda: store.save(run, 1, tensors, METADATA, keep=2),
        lambda: store.save_base(run, tensors, ""),
        lambda: store.save(run, 1, columns, METADATA, keep=2, group=group),
    )
    for save in alone:
        try:
            save()
        except TypeError as error:
            errors.append(str(error))
    return errors


def test_rows_are_not_saved_without_the_others(tmp_path: Path) -> None:
    for errors in together(2, _refuse, tmp_path):
        assert len(errors) == 3
        assert "only some of its rows are here, and this process writes alone" in errors[0]
        assert errors[1] == errors[0]
        assert "is split as (Shard(dim=1),), not by rows" in errors[2]
    assert not list(tmp_path.rglob("*.distcp"))


# ---------------------------------------------------------------------------------------------------- verification


def _verify(group: Group, run: Path) -> tuple[list[str], str, list[str]]:
    """The files that a rank hashes in search of the newest sound checkpoint, which that is, and the faults."""
    hashed, sha256 = [], store.file_sha256

    def noting(path: Path) -> str:
        hashed.append(f"{path.parent.name}/{path.name}")
        return sha256(path)

    store.file_sha256 = noting
    found = store.latest(run, group)
    assert found is not None
    return hashed, found.folder.name, found.faults


def _save_two(group: Group, run: Path) -> None:
    for step in (1, 2):
        store.save(run, step, filled("fsdp"), METADATA, keep=2, group=group)


@pytest.mark.parametrize("name", ["", "__1_0.distcp", *map(slow, ("__0_0.distcp", ".metadata", store.MANIFEST))])
def test_the_ranks_share_the_files_to_verify_and_agree(name: str, tmp_path: Path) -> None:
    together(2, _save_two, tmp_path)
    newest = tmp_path / "checkpoints/step-00000002"
    if name:
        with (newest / name).open("r+b") as file:
            file.seek(100)
            file.write(b"\0\1\2\3")
    first, second = together(2, _verify, tmp_path)
    assert first[1:] == second[1:]
    assert first[1] == f"step-0000000{1 if name else 2}"
    assert [str(newest / name) in fault for fault in first[2]] == ([True] if name else [])
    assert len(first[0] + second[0]) == len({*first[0], *second[0]}), "no file is read twice"
    whole = {f"{first[1]}/{file}" for file in (".metadata", "__0_0.distcp", "__1_0.distcp")}
    assert whole <= {*first[0], *second[0]}


def overlapping(metadata: Any, name: str) -> None:
    metadata.state_dict_metadata[name].chunks[1].offsets = torch.Size([15, 0])


def gap(metadata: Any, name: str) -> None:
    metadata.state_dict_metadata[name].chunks.pop()


def wide(metadata: Any, name: str) -> None:
    metadata.state_dict_metadata[name].chunks[1].sizes = torch.Size([16, 15])


def beside(metadata: Any, name: str) -> None:
    metadata.state_dict_metadata[name].chunks[1].offsets = torch.Size([16, 1])


def negative(metadata: Any, name: str) -> None:
    metadata.state_dict_metadata[name].chunks[0].sizes = torch.Size([-16, 16])


def too_many_dimensions(metadata: Any, name: str) -> None:
    metadata.state_dict_metadata[name].chunks[0].sizes = torch.Size([16, 16, 1])


def outside(metadata: Any, name: str) -> None:
    for index, place in metadata.storage_data.items():
        if index.fqn == name:
            place.relative_path = "../step-00000001/__0_0.distcp"


def absent(metadata: Any, name: str) -> None:
    for index in [index for index in metadata.storage_data if index.fqn == name][:1]:
        del metadata.storage_data[index]


def _save_one(group: Group, run: Path) -> None:
    store.save(run, 1, filled("fsdp"), METADATA, keep=2, group=group)


def test_parts_that_do_not_make_up_a_tensor_are_refused(tmp_path: Path) -> None:
    together(2, _save_one, tmp_path)
    path = tmp_path / STEP / ".metadata"
    written = path.read_bytes()
    names = dcp.saved_tensors(tmp_path / STEP)
    (name,) = (name for name in names if name == "model.2.values")
    assert [part.first for part in names[name].parts] == [0, 16]
    for forge in (overlapping, gap, wide, beside, negative, too_many_dimensions, outside, absent):
        metadata = FileSystemReader(tmp_path / STEP).read_metadata()
        forge(metadata, name)
        path.write_bytes(pickle.dumps(metadata))
        with pytest.raises(SlopeError, match=r"\.metadata: cannot be read: "):
            dcp.saved_tensors(tmp_path / STEP)
        path.write_bytes(written)


def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = store.save(tmp_path, 1, reference(), METADATA, keep=2)
    manifest = read_sealed(folder / store.MANIFEST)
    for name in ("../step-00000001/__0_0.distcp", str(folder / "__0_0.distcp")):
        forged = {**manifest, "files": {name: manifest["files"]["__0_0.distcp"]}}
        write_sealed(folder / store.MANIFEST, forged)
        with pytest.raises(SlopeError, match="is missing"):
            store.verify(folder)


# ------------------------------------------------------------------------------------------------------ runs of ranks


def words(run: Path, *more: str) -> list[str]:
    """The command line of a run of 12 steps that saves after each fourth."""
    settings = (f"data.path={prepared('bytes')}", "train.micro_batch=1", "model.dropout=0", *more)
    return ["pretrain", str(RECIPE), *sized("gpt2-nano"), *settings, "--out", str(run)]


def config() -> Config:
    return tiny(prepared("bytes"), "train.micro_batch=1", "model.dropout=0")


@pytest.mark.slow
def test_a_run_changes_its_layout_and_its_number_of_ranks_at_each_start(tmp_path: Path) -> None:
    """Masks that follow from the values are computed again in each; the log is that of one process, to rounding."""
    run, whole, more = tmp_path / "run", tmp_path / "whole", ("slope.mask_update_interval=1", "log.every=1")
    assert Ranks(1, words(whole, *more), tmp_path / "logs").finish() == [0]
    for world, layout, text in ((2, "fsdp", "step 3/"), (4, "ddp", "step 5/"), (4, "hsdp", "step 8/"), (1, "auto", "")):
        started = Ranks(world, words(run, *more, f"distributed.layout={layout}"), tmp_path / f"{world}-{layout}")
        if text:
            started.wait_for(text)
            started.send(world - 1, signal.SIGTERM)
        assert started.finish() == ([75] if text else [0]) + [0] * (world - 1), started.printed()
    ours, theirs = ([r["loss"] for r in metrics.read(folder) if r["kind"] == "train"] for folder in (run, whole))
    assert len(ours) == len(theirs) == 12
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-3


def _die(doomed: int, step: int, operation: int, rank: int) -> None:
    if rank == doomed:
        die_in_save(step, operation)


@pytest.mark.slow
@pytest.mark.parametrize("doomed", [0, 1])
def test_a_rank_killed_at_an_operation_of_a_save_loses_nothing(doomed: int, tmp_path: Path) -> None:
    """In the background, step 8, and at the end, step 12; before each write to the disk, rename and removal."""
    layout = "distributed.layout=fsdp"
    assert Ranks(2, words(tmp_path / "whole", layout), tmp_path / "logs").finish() == [0, 0]
    for step, operation in ((8, 1), (8, 2), (8, 4), (12, 1), (12, 3), (12, 5), (12, 7)):
        run, name = tmp_path / f"run-{step}-{operation}", f"{step}-{operation}"
        doom = functools.partial(_die, doomed, step, operation)
        ranks = Ranks(2, words(run, layout), tmp_path / name, prepare_child=doom)
        codes = ranks.finish(60)
        assert sorted(codes) in ([-signal.SIGKILL, 1], [0, 0]), ranks.printed()  # a rank other than 0 does less
        found = store.latest(run)
        assert found is not None
        assert found.faults == []
        assert Ranks(2, words(run, layout), tmp_path / f"{name}-again").finish() == [0, 0]
        assert_same_run(config(), run, tmp_path / "whole")
        left = [path.name for path in (run / "checkpoints").iterdir()]
        assert sorted(left) == ["step-00000008", "step-00000012"]
