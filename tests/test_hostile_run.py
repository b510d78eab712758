"""A run from a stranger: no code in it is executed, and no link in it lets anything be written elsewhere.

Whoever makes a file makes its seal, so every checksum here is right.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import copied, slope, tiny, trained
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers import AutoModelForCausalLM

from slope_cli.checkpoint import base_model, dcp, hf_folder, store
from slope_cli.checkpoint.load import load_model
from slope_cli.errors import SlopeError, UsageError
from slope_cli.finetune.loop import default_folder
from slope_cli.train.loop import pretrain
from slope_cli.utils import files

STEP = "checkpoints/step-00000006"


class Touch:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def seal(folder: Path) -> None:
    """Write the hashes of a checkpoint's or base's files into its manifest."""
    manifest = files.read_sealed(folder / store.MANIFEST)
    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": files.file_sha256(path)}
    files.write_sealed(folder / store.MANIFEST, manifest)


@pytest.fixture(scope="module")
def linearized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("linearized") / "run"
    words = ("train.steps=2", "linearize.window=8", "log.tensorboard=false", "log.sample_tokens=4")
    result = slope("linearize", trained(), "--out", run, *words)
    assert result.code == 0, result.err
    return run


# ------------------------------------------------------------------------------------------------------- nothing runs


def whole(touch: Touch, metadata: Any) -> Any:
    return touch


def inside(touch: Touch, metadata: Any) -> Any:
    metadata.planner_data = touch
    return metadata


def as_bytes(touch: Touch, metadata: Any) -> Any:
    """torch.distributed.checkpoint itself unpickles an entry that is no tensor."""
    entry = BytesStorageMetadata()
    (name, tensor), *_ = metadata.state_dict_metadata.items()
    entry.__dict__.update(vars(tensor))
    metadata.state_dict_metadata[name] = entry
    return metadata


def elsewhere(touch: Touch, metadata: Any) -> Any:
    for place in metadata.storage_data.values():
        place.relative_path = str(touch.path.with_name("weights"))
    return metadata


def as_a_class(touch: Touch, metadata: Any) -> Any:
    """A name that is no description of tensors, though it is torch's."""
    metadata.planner_data = torch.load
    return metadata


FORGED = (whole, inside, as_bytes, elsewhere, as_a_class)
COMMANDS = ("check", "pretrain", "generate", "eval", "export")


def words(command: str, run: Path, tmp_path: Path) -> list[str | Path]:
    """The command on a run."""
    return {
        "check": ["check", run],
        "pretrain": ["pretrain", run / "config.yaml", "--out", run],
        "generate": ["generate", run, "The "],
        "eval": ["eval", run],
        "export": ["export", run, tmp_path / "exported"],
    }[command]


@pytest.mark.parametrize("forge", FORGED)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_pickle_in_a_checkpoint_executes_nothing(
    command: str, forge: Callable[[Touch, Any], Any], tmp_path: Path
) -> None:
    run, target = copied(trained(), tmp_path), tmp_path / "executed"
    shutil.copyfile(run / STEP / "__0_0.distcp", tmp_path / "weights")
    metadata = FileSystemReader(run / STEP).read_metadata()
    (run / STEP / dcp.METADATA).write_bytes(pickle.dumps(forge(Touch(target), metadata)))
    seal(run / STEP)
    result = slope(*words(command, run, tmp_path))
    assert not target.exists()
    assert result.code == 1
    assert f"{run / STEP / dcp.METADATA}: cannot be read: " in result.err.splitlines()[-1]


def test_a_pickle_in_a_base_executes_nothing(linearized: Path, tmp_path: Path) -> None:
    run, target = copied(linearized, tmp_path), tmp_path / "executed"
    (run / "base" / dcp.METADATA).write_bytes(pickle.dumps(Touch(target)))
    seal(run / "base")
    checkpoint = store.folders(run)[0]
    manifest = files.read_sealed(checkpoint / store.MANIFEST)
    base = files.file_sha256(run / "base" / store.MANIFEST)
    files.write_sealed(checkpoint / store.MANIFEST, manifest | {"base": base})
    with pytest.raises(SlopeError, match=r"base/\.metadata: cannot be read: names posix\.system"):
        load_model(run)
    assert not target.exists()


def test_a_pickle_in_place_of_the_weights_executes_nothing(tmp_path: Path) -> None:
    run, target = copied(trained(), tmp_path), tmp_path / "executed"
    metadata = FileSystemReader(run / STEP).read_metadata()
    torch.save(Touch(target), run / STEP / "__0_0.distcp")
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, (run / STEP / "__0_0.distcp").stat().st_size
    (run / STEP / dcp.METADATA).write_bytes(pickle.dumps(metadata))
    seal(run / STEP)
    with pytest.raises(SlopeError, match=r"__0_0\.distcp: cannot be read"):
        load_model(run)
    assert not target.exists()


def test_a_pickle_cannot_change_the_program(tmp_path: Path) -> None:
    """It may set attributes of what it names, which is therefore not the class itself."""
    set_attribute = b"\x80\x04cpathlib\nPosixPath\nN}X\x0b\x00\x00\x00__truediv__X\x01\x00\x00\x00as\x86b."
    (tmp_path / dcp.METADATA).write_bytes(set_attribute)
    with pytest.raises(SlopeError, match="cannot be read"):
        dcp.saved_tensors(tmp_path)
    assert tmp_path / "a" == tmp_path.joinpath("a")


# ------------------------------------------------------------------------------------------ nothing is written outside


LINKS = (
    files.LOCK,
    ".config.yaml.tmp",
    "metrics.jsonl",
    "environment.jsonl",
    "checkpoints",
    "checkpoints/.tmp-step-00000009",
    "checkpoints/.dead-step-00000003",
    "tokenizer",
    "tokenizer/tokenizer.json",
    "tensorboard",
    "loss.png",
    "base",
    ".tmp-base",
    "base.json",
    ".base.json.tmp",
)


def outside(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_a_run_leads_no_write_out_of_it(name: str, tmp_path: Path) -> None:
    """To what is there already, or, for a file, to where none is yet."""
    for target in ("there", "not there"):
        run, other = copied(trained(), tmp_path / target), tmp_path / target / "outside"
        path, goal = run / name, other / "goal"
        other.mkdir()
        if path.is_dir():
            shutil.move(path, goal)
        elif target == "there":
            goal.write_bytes(path.read_bytes() if path.exists() else b"mine")
            path.unlink(missing_ok=True)
        else:
            path.unlink(missing_ok=True)
        path.symlink_to(goal)
        before = outside(other)
        words = ("train.steps=6", "log.sample_every=1", "log.plot=true")
        result = slope("pretrain", run / "config.yaml", *words, "--out", run)
        assert (result.code, result.err.count("Traceback")) == (2, 0)
        assert f"{path}: is a link" in result.err.splitlines()[-1]
        assert outside(other) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.jsonl"])
def test_a_hard_link_is_not_written_through(name: str, tmp_path: Path) -> None:
    run = copied(trained(), tmp_path)
    os.link(run / name, tmp_path / "mine")
    before = (tmp_path / "mine").read_bytes()
    result = slope("pretrain", run / "config.yaml", "--out", run)
    assert result.code == 2
    assert f"{run / name}: has other names (hard links)" in result.err
    assert (tmp_path / "mine").read_bytes() == before


def test_a_temporary_name_is_made_anew(tmp_path: Path) -> None:
    mine, temporary = tmp_path / "mine", tmp_path / ".config.tmp"
    mine.write_text("mine")
    for link in (os.link, os.symlink):
        link(mine, temporary)
        files.write_json(tmp_path / "config", {"a": 1})
        assert mine.read_text() == "mine"
        assert not temporary.exists()


@pytest.mark.parametrize("name", [files.LOCK, "metrics.jsonl", "environment.jsonl"])
def test_a_pipe_does_not_hang(name: str, tmp_path: Path) -> None:
    run = copied(trained(), tmp_path)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    result = slope("pretrain", run / "config.yaml", "--out", run)
    assert (result.code in (1, 2), result.err.count("Traceback")) == (True, 0)
    assert f"{run / name}: " in result.err.splitlines()[-1]


def test_a_link_within_a_run_and_a_run_behind_a_link_are_no_harm(data: Path, finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    (run / "newest").symlink_to("checkpoints/step-00000012")
    (tmp_path / "link").symlink_to(run)
    assert pretrain(tiny(data), tmp_path / "link")["step"] == 12


def test_links_in_the_place_of_checkpoints_are_removed_alone(tmp_path: Path) -> None:
    run = copied(trained(), tmp_path)
    for name in ("step-00000001", ".tmp-step-00000002", ".dead-step-00000002"):
        (run / "checkpoints" / name).symlink_to("step-00000006")
    store.clean(run)
    store.prune(run, 1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert store.latest(run) is not None


@pytest.mark.parametrize("name", ["finetune", "finetune/SST-2-1"])
def test_a_fine_tuning_beside_a_model_is_not_written_through_a_link(name: str, tmp_path: Path) -> None:
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is a link"):
        default_folder(tmp_path / "run", "SST-2", 1)


# ------------------------------------------------------------------------------------------------- base.json is bound


def test_a_base_description_of_another_run_is_refused(linearized: Path, tmp_path: Path) -> None:
    """Soundly sealed, it would change activation, epsilon and the adapters' scale."""
    run = copied(linearized, tmp_path)
    content = base_model.description(run)
    content["config"]["layer_norm_epsilon"] *= 10
    files.write_sealed(run / base_model.BASE, content)
    result = slope("check", run)
    assert result.code == 1
    assert f"{run}/base.json is not what it was when {run}/base was written" in result.err
    for command in COMMANDS[1:]:
        said = slope(*words(command, run, tmp_path))
        assert (said.code, said.err.count("Traceback")) == (1, 0), command
        assert "base.json is not what it was" in said.err


@pytest.mark.parametrize("content", [{}, {"config": {"model_type": "x"}}, {"config": [], "sparse": 1, "adapters": 2}])
def test_a_base_description_that_describes_no_model_is_one_line(content: dict[str, Any], tmp_path: Path) -> None:
    run = copied(Path(__file__).parent / "old_runs" / "linear", tmp_path)  # which is not bound to its description
    files.write_sealed(run / base_model.BASE, content)
    with pytest.raises(SlopeError, match=r"base\.json: describes no model"):
        base_model.build(run, "cpu")


def test_a_base_without_the_hash_of_its_description_still_loads(tmp_path: Path) -> None:
    run = copied(Path(__file__).parent / "old_runs" / "linear", tmp_path)
    assert "description" not in files.read_sealed(run / "base" / store.MANIFEST)
    assert load_model(run).step == 8


IMPLEMENTATIONS = ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation")


@pytest.mark.parametrize("key", [*IMPLEMENTATIONS, *(f"{key}_internal" for key in IMPLEMENTATIONS)])
def test_a_config_json_names_no_code_for_transformers_to_fetch(key: str, tmp_path: Path) -> None:
    """Of any kind of layer: transformers would fetch a kernel of that name from a hub and execute it."""
    shape = {"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 272, "bos_token_id": None, "eos_token_id": None}
    content = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **shape, key: "stranger/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = hf_folder.settings(tmp_path)
    assert "stranger/kernel" not in vars(config).values()
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == "sdpa"
