"""Checkpoints: whole or absent, never loaded damaged, nothing lost on a full disk."""

import hashlib
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import finish, full_disk, printed, start
from support.runs import assert_same_run, final_state, tiny
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem

from slope_cli.checkpoint import store
from slope_cli.errors import SlopeError
from slope_cli.report import metrics
from slope_cli.train.loop import pretrain
from slope_cli.utils.files import write_sealed
from sparse_kernels import add_adapters, sparsify

METADATA: dict[str, Any] = {"data": "", "config": {}, "tokenizer": {}}
"""What every manifest has besides its files."""


def trained_model(seed: int = 0, *, adapters: bool = True) -> tuple[nn.Module, torch.optim.AdamW]:
    """A small model with a tied weight, sparse layers and adapters, and an optimizer after a step of it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 16, bias=False))
    model[3].weight = model[0].weight
    sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    if adapters:
        added = add_adapters(model, 4)
        optimizer.add_param_group({"params": [p for adapter in added.values() for p in adapter.parameters()]})
    model(torch.arange(16)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def tensors(seed: int = 0) -> dict[str, Tensor]:
    return store.state_tensors(*trained_model(seed))


def save(run: Path, *steps: int, keep: int = 5) -> list[Path]:
    return [store.save(run, step, tensors(step), METADATA | {"note": step}, keep=keep) for step in steps]


def flip(path: Path, where: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ save and restore


def test_a_restored_model_and_optimizer_are_equal_bit_for_bit_and_go_on_alike(tmp_path: Path) -> None:
    model, optimizer = trained_model()
    folder = store.save(tmp_path, 1, store.state_tensors(model, optimizer), {}, keep=2)
    other, fresh = trained_model(seed=1)
    fresh.state.clear()
    store.restore(folder, other, fresh)
    for _ in range(2):
        ours, theirs = store.state_tensors(other, fresh), store.state_tensors(model, optimizer)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        for net, stepper in ((model, optimizer), (other, fresh)):
            net(torch.arange(16)).sum().backward()
            stepper.step()
            stepper.zero_grad()


def test_every_tensor_is_there_once() -> None:
    names = set(tensors())
    assert "model.0.weight" in names
    assert "model.3.weight" not in names  # tied to it
    assert {"model.2.values", "model.2.row_mask_bits", "model.2.backward_mask_bits", "model.2.adapter.lora_A"} <= names
    assert {"optim.2.values.exp_avg", "optim.2.values.exp_avg_sq", "optim.step"} <= names


def test_the_model_alone_can_be_restored(tmp_path: Path) -> None:
    model, optimizer = trained_model()
    folder = store.save(tmp_path, 1, store.state_tensors(model, optimizer), {}, keep=2)
    other, _ = trained_model(seed=1)
    store.restore(folder, other, None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_another_model_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, 1)
    model, optimizer = trained_model(adapters=False)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(SlopeError, match=r"step-00000001 is of another model: .* tensors differ, the first is"):
        store.restore(folder, model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert [folder.name for folder in store.folders(tmp_path)] == ["step-00000004", "step-00000003"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def test_a_checkpoint_stays_as_long_as_it_was_to_be_kept(tmp_path: Path) -> None:
    """A later start with a smaller number does not take away what an earlier one was to keep."""
    save(tmp_path, 1, 2, 3, keep=4)
    store.prune(tmp_path, 2)
    save(tmp_path, 4, keep=2)
    assert [store.step_of(folder) for folder in store.folders(tmp_path)] == [4, 3, 2, 1]
    save(tmp_path, 5, 6, keep=2)
    assert [store.step_of(folder) for folder in store.folders(tmp_path)] == [6, 5, 3]
    (tmp_path / "checkpoints/step-00000003" / store.MANIFEST).write_text("{")
    store.prune(tmp_path, 2)
    assert [store.step_of(folder) for folder in store.folders(tmp_path)] == [6, 5]


def test_an_existing_step_is_never_written_to(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, 1)
    before = content(folder)
    assert store.save(tmp_path, 1, tensors(9), {"note": 9}, keep=2) == folder
    assert content(folder) == before


def test_leftovers_are_no_checkpoints_and_are_cleaned_up(tmp_path: Path) -> None:
    save(tmp_path, 1)
    parent = tmp_path / "checkpoints"
    for name in (".tmp-step-00000002", ".dead-step-00000000", "step-notes", "step-²", "damaged-0-step-00000007"):
        (parent / name).mkdir()
    found = store.latest(tmp_path)
    assert found is not None
    assert (found[0].name, found[1]["note"], found[2]) == ("step-00000001", 1, [])
    store.clean(tmp_path)
    assert sorted(p.name for p in parent.iterdir()) == [
        "damaged-0-step-00000007",
        "step-00000001",
        "step-notes",
        "step-²",
    ]


def test_no_checkpoint_at_all_is_no_fault(tmp_path: Path) -> None:
    assert store.latest(tmp_path) is None


# ------------------------------------------------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped at the start": lambda path: flip(path, 0),
    "flipped in the middle": flip,
    "flipped at the end": lambda path: flip(path, 1),
    "truncated": truncate,
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", store.MANIFEST])
def test_any_damage_to_any_file_is_named_and_the_previous_one_taken(tmp_path: Path, name: str, damage: str) -> None:
    old, new = save(tmp_path, 1, 2)
    DAMAGE[damage](new / name)
    with pytest.raises(SlopeError, match=f"step-00000002/{name}"):
        store.verify(new)
    found = store.latest(tmp_path)
    assert found is not None
    folder, manifest, faults = found
    assert (folder, manifest["step"], len(faults)) == (old, 1, 1)
    assert str(new / name) in faults[0]


def test_a_checkpoint_has_no_other_files_than_those_damaged_above(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, 1)
    assert sorted(content(folder)) == [".metadata", "__0_0.distcp", store.MANIFEST]


def test_every_flipped_byte_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, 1)
    path = folder / store.MANIFEST
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(SlopeError, match="damaged"):
            store.verify(folder)


def test_a_checkpoint_under_another_number_is_not_taken(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, 1)
    folder.rename(folder.with_name("step-00000005"))
    with pytest.raises(SlopeError, match="step-00000005 holds the checkpoint of step 1"):
        store.latest(tmp_path)


@pytest.mark.parametrize("content", [{}, {"step": 2}, {"rows": []}, {"step": "2", "files": {}}, {"files": {"a": 1}}])
def test_a_sealed_file_of_another_kind_is_no_manifest(tmp_path: Path, content: dict[str, Any]) -> None:
    """Its seal is right; the older checkpoint is taken."""
    old, new = save(tmp_path, 1, 2)
    write_sealed(new / store.MANIFEST, content)
    found = store.latest(tmp_path)
    assert found is not None
    assert found.folder == old
    assert "step-00000002/manifest.json: is a file of another kind" in found.faults[0]


def test_a_checkpoint_that_is_dropped_while_it_is_verified_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is training saves and drops checkpoints while another process looks for the newest."""
    save(tmp_path, 1, keep=1)
    digest = hashlib.file_digest

    def dropping(*args: Any) -> Any:
        monkeypatch.setattr(hashlib, "file_digest", digest)
        save(tmp_path, 2, 3, keep=1)
        return digest(*args)

    monkeypatch.setattr(hashlib, "file_digest", dropping)
    found = store.latest(tmp_path)
    assert found is not None
    assert (found.folder.name, found.faults) == ("step-00000003", [])


def test_when_none_is_sound_each_is_named(tmp_path: Path) -> None:
    for folder in save(tmp_path, 1, 2):
        flip(folder / "__0_0.distcp")
    with pytest.raises(SlopeError, match=r"no checkpoint of .* is sound: .*step-00000002.*; .*step-00000001"):
        store.latest(tmp_path)


def test_damaged_ones_are_set_aside_time_after_time(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for _ in range(2):
        (new,) = save(tmp_path, 2)
        flip(new / ".metadata")
        before = content(new)
        store.set_aside_newer(tmp_path, 1)
        assert before in [content(path) for path in (tmp_path / "checkpoints").glob("damaged-*")]
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["damaged-0-step-00000002", "damaged-1-step-00000002", "step-00000001"]


def test_a_run_warns_resumes_from_the_previous_one_and_saves_under_the_number_again(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    flip(run / "checkpoints" / "step-00000012" / "__0_0.distcp")
    pretrain(tiny(data), run)
    err = capsys.readouterr().err
    assert "warning: " in err
    assert "step-00000012/__0_0.distcp is damaged: its checksum does not fit; resuming from step-00000008" in err
    assert (run / "checkpoints" / "damaged-0-step-00000012").is_dir()
    assert_same_run(tiny(data), run, finished)


def test_a_run_with_no_sound_checkpoint_stops_and_overwrites_nothing(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for folder in store.folders(run):
        flip(folder / ".metadata")
    before = content(run)
    with pytest.raises(SlopeError, match=r"no checkpoint of .* is sound"):
        pretrain(tiny(data), run)
    after = content(run)
    added = ("environment.jsonl", "starts.jsonl")  # each start adds a line
    assert all(after.pop(name).startswith(before.pop(name)) for name in added)
    for files in (before, after):
        files.pop("verified.json", None)  # which of its data files it found sound
    assert after == before


# ----------------------------------------------------------------------------------- a full disk, an interruption


def test_a_save_that_does_not_fit_leaves_what_was_there(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = content(tmp_path)
    with full_disk(20_000), pytest.raises(SlopeError, match=r"^the checkpoint of step 2 cannot be written: [^\n]*$"):
        save(tmp_path, 2)
    assert content(tmp_path) == before
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_a_save_is_not_tried_where_the_space_is_short(tmp_path: Path) -> None:
    huge = {"model.x": torch.empty(1, dtype=torch.uint8).expand(1 << 60)}
    with pytest.raises(SlopeError, match=r"cannot be written: .* GB free, .* GB needed"):
        store.save(tmp_path, 1, huge, {}, keep=2)


def test_a_second_ctrl_c_in_the_middle_of_a_save_interrupts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model_tensors = tensors()
    monkeypatch.setattr(filesystem.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.save(tmp_path, 1, model_tensors, {}, keep=2)
    assert store.latest(tmp_path) is None


def fill_disk_during_save(step: int) -> None:
    """In a child: while it saves the step, no file can grow beyond 20 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = store.save
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(run: Path, at: int, *args: Any, **kwargs: Any) -> Path:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if at == step else most, most))
        try:
            return save(run, at, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    store.save = limited


@pytest.mark.slow
def test_when_a_periodic_save_fails_training_goes_on(data: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert finish(start(tiny(data), run, fill_disk_during_save, 8)) == 0
    assert "warning: the checkpoint of step 8 cannot be written" in printed(run)
    assert [folder.name for folder in store.folders(run)] == ["step-00000012", "step-00000004"]
    assert_same_run(tiny(data), run, finished)


@pytest.mark.slow
def test_when_the_last_save_fails_the_run_fails_and_can_be_done_again(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert finish(start(tiny(data), run, fill_disk_during_save, 12)) == 1
    assert printed(run).splitlines()[-1].startswith("error: the checkpoint of step 12 cannot be written")
    assert [folder.name for folder in store.folders(run)] == ["step-00000008", "step-00000004"]
    pretrain(tiny(data), run)
    assert_same_run(tiny(data), run, finished)


def fill_disk() -> None:
    """In a child: once training has begun, no file can grow beyond 6 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    write = metrics.MetricsLog.write

    def limited(log: metrics.MetricsLog, *args: Any, **kwargs: Any) -> dict[str, Any]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return write(log, *args, **kwargs)

    metrics.MetricsLog.write = limited  # type: ignore[method-assign]


@pytest.mark.parametrize("tensorboard", ["true", "false"])
def test_a_log_that_cannot_be_written_is_one_line(data: Path, tmp_path: Path, tensorboard: str) -> None:
    run = tmp_path / "run"
    words = ("train.steps=80", "log.save_every=0", "log.val_every=0", f"log.tensorboard={tensorboard}")
    assert finish(start(tiny(data, *words), run, fill_disk)) == 1
    said = printed(run).splitlines()
    assert said[-1].endswith("metrics.jsonl: cannot be written, the disk (or quota) is full: File too large")
    if tensorboard == "true":  # its copy ends first, which does not stop the run
        assert any(line.startswith(f"warning: {run / 'tensorboard'} ends at step") for line in said)
    else:
        assert [line for line in said if "rror" in line] == said[-1:]


def test_saving_changes_nothing(data: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(tiny(data, "log.save_every=1", "log.val_every=1", "log.sample_every=2"), run)
    ours, theirs = final_state(tiny(data), run), final_state(tiny(data), finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
