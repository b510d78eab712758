"""Attention transfer by ranges of layers: the same run as of all layers at once, with few layers in memory."""

import contextlib
import gc
import json
import os
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.data import prepared, scratch
from support.marks import slow
from support.models import SHAPES, tiny_model, tokens
from support.processes import finish, printed, start
from support.ranks import Ranks
from support.runs import LINEARIZED, Result, copied, final_state, records, slope, trained
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from slope_cli.checkpoint import base_model, dcp, load, run_folder, store, weight_files
from slope_cli.checkpoint.load import load_model
from slope_cli.config import configs
from slope_cli.config.methods import LinearizeConfig
from slope_cli.config.schema import Config
from slope_cli.errors import SlopeError
from slope_cli.linearize.hidden_states import HiddenStates, require_room, states_bytes, states_on_disk
from slope_cli.linearize.layer_range import ranges_of
from slope_cli.linearize.swap import added_state, linear_windows, linearize_attention, using
from slope_cli.linearize.transfer import headless
from slope_cli.train import layer_ranges
from slope_cli.train.init import linearize_overrides
from slope_cli.train.parallel import require_whole
from sparse_kernels import sparse_layers

WORDS = (*LINEARIZED, "train.steps=12", "linearize.window=2", "linearize.transfer=0.5")
BASES: dict[str, tuple[str, ...]] = {
    "gpt2": ("gpt2-nano", "train.steps=8", "model.overrides.n_layer=5"),
    "llama": ("llama3-8b", "method=dense", "train.steps=8", "model.overrides.num_hidden_layers=5"),
    "bert": ("bert-base", "method=dense", "train.steps=8", "model.overrides.num_hidden_layers=5"),
}
LAYERS = 5
AT_ONCE = "linearize.layers_at_once=2"


@cache
def linearized(kind: str, *more: str) -> Path:
    """A finished run of `slope linearize`. Copy it before you alter it."""
    run = scratch() / "-".join(["ranges", kind, *more]).replace("/", "_")
    result = slope("linearize", trained(*BASES[kind]), *WORDS, *more, "--out", run)
    if result.code:
        raise RuntimeError(result.err)
    return run


def config_of(kind: str, *more: str) -> Config:
    return configs.load("linearize", [*linearize_overrides(trained(*BASES[kind])), *WORDS, *more])


def assert_equal_but_for_rounding(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """Records of the same kinds and steps, whose numbers are equal to double precision."""
    assert len(one) == len(other) > 0
    for ours, theirs in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            equal = pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
            assert ours[key] == equal, (ours, theirs)


# ---------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gpt2", ()),
        slow("llama", ("linearize.keep_softmax=auto:1", "distill.share=0.5")),
        slow("gpt2", ("linearize.keep_softmax=[4,1/0,2/1]",)),
        slow("llama", ("linearize.state=delta",)),
        slow("gpt2", ("linearize.state=gated",)),
        slow("bert", ()),
    ],
)
def test_ranges_learn_what_all_layers_at_once_do(kind: str, more: tuple[str, ...]) -> None:
    """Bit for bit where products are in float32: maps, optimizer state, adapters; the log but for sums' rounding."""
    whole, ranges = linearized(kind, *more), linearized(kind, *more, AT_ONCE)
    assert_equal_but_for_rounding(records(ranges), records(whole))
    ours, theirs = final_state(config_of(kind, *more, AT_ONCE), ranges), final_state(config_of(kind, *more), whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert not (ranges / run_folder.TRANSFER).exists()


@pytest.mark.slow
def test_a_transfer_alone_ends_as_any_run(tmp_path: Path) -> None:
    words = ("linearize.transfer=1", "linearize.keep_softmax=[0,4]", "log.norms_every=5")
    run, whole = linearized("llama", *words, AT_ONCE), linearized("llama", *words)
    one, other = (added_state(load_model(folder).model) for folder in (run, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    kinds = ("init", "teacher", "swapped", "transfer", "norms", "val")
    ours, theirs = ([x for x in records(folder) if x["kind"] in kinds] for folder in (run, whole))
    assert [x["kind"] for x in ours] == [x["kind"] for x in theirs]
    assert [any(x["kind"] == "sample" for x in records(folder)) for folder in (run, whole)] == [False, True]
    again = slope("linearize", trained(*BASES["llama"]), *WORDS, *words, AT_ONCE, "--out", run)
    assert (again.code, "finished: all of its 12 steps are done" in again.err) == (0, True), again
    for command in (("eval", run), ("check", run), ("export", run, tmp_path / "out")):
        assert slope(*command).code == 0
    assert torch.equal(*(next(iter(added_state(load_model(x).model).values())) for x in (run, tmp_path / "out")))


@pytest.mark.slow
def test_hidden_states_in_16_bits_change_what_is_learned_by_little() -> None:
    words = ("train.precision=bf16", "linearize.transfer=1")
    whole, ranges = (linearized("llama", *words, *more) for more in ((), (AT_ONCE,)))
    for step in (0, -1):
        one, other = ([x["mse"] for x in records(run) if x["kind"] == "transfer"][step] for run in (whole, ranges))
        assert other != one
        assert other == pytest.approx(one, rel=0.02)


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_range_computes_what_its_layers_do_in_the_whole_model(name: str, at_once: int, tmp_path: Path) -> None:
    model = tiny_model(name, **({"n_layer": 4} if "n_layer" in SHAPES[name] else {"num_hidden_layers": 4}))
    base_model.write(tmp_path, model)

    def linearize(part: PreTrainedModel) -> None:
        part.requires_grad_(False)
        linearize_attention(part, LinearizeConfig(window=5), seed=3, device="cpu")

    linearize(model)
    for mode in ("softmax", "linear"):
        states = list[torch.Tensor]()
        with torch.no_grad(), using(model, mode=mode):  # type: ignore[arg-type]
            expected_BTV = model(tokens(20))[0]
        for layers in ranges_of(4, at_once):
            part, passage = base_model.read_layers(tmp_path, "cpu", layers, linearize, head=layers.stop == 4)
            assert list(linear_windows(part)) == list(linear_windows(model))[layers.start : layers.stop]
            assert not any(p.is_meta for p in (*part.parameters(), *part.buffers()))
            passage.entering.extend(states)
            whole = contextlib.nullcontext() if layers.stop == 4 else headless(part)
            with torch.no_grad(), using(part.eval(), mode=mode), whole:  # type: ignore[arg-type]
                found_BTV = part(tokens(20))[0]
            states = passage.leaving
        assert torch.equal(found_BTV, expected_BTV)


# ---------------------------------------------------------------------------------------------------- memory


@contextlib.contextmanager
def counting(found: list[int]) -> Iterator[None]:
    """Within it, each forward pass of a block, and each tensor that is read from a base, adds how many blocks' weights
    there are in this process, on any device but meta."""

    def count(module: object = None, inputs: object = None) -> None:
        if module is None or type(module).__name__ in BLOCKS:
            blocks = [x for x in gc.get_objects() if type(x).__name__ in BLOCKS]
            found.append(sum(not any(p.is_meta for p in block.parameters()) for block in blocks))

    def read(self: dcp.SavedTensor, into: torch.Tensor) -> None:
        count()
        read_in_fact(self, into)

    gc.collect()
    gc.freeze()  # what other tests have left is none of the objects, and looking through them takes no time
    hook, read_in_fact = register_module_forward_pre_hook(count), dcp.SavedTensor.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp.SavedTensor, "read", read)
        try:
            yield
        finally:
            hook.remove()
            gc.unfreeze()


BLOCKS = ("GPT2Block", "LlamaDecoderLayer")


@pytest.mark.parametrize(("kind", "at_once"), [slow("sparse", 1), ("llama", 2)])
def test_no_more_layers_than_that_are_in_memory_at_once(kind: str, at_once: int, tmp_path: Path) -> None:
    words = [*WORDS, "linearize.transfer=1", "train.steps=2", f"linearize.layers_at_once={at_once}"]
    folder, seen = exported(kind), list[int]()
    layers = load.shape_of(folder).num_hidden_layers
    with counting(seen):
        result = slope("linearize", folder, *words, f"data.path={prepared()}", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert f" generate {tmp_path / 'run'} loads the whole model" in result.err
    assert max(seen) == at_once < layers
    assert len(seen) > 5 * layers


@cache
def exported(kind: str) -> Path:
    """The base as a folder of transformers."""
    folder = scratch() / f"ranges-exported-{kind}"
    assert slope("export", trained(*EXPORTED[kind]), folder).code == 0
    return folder


EXPORTED = {
    **{kind: BASES[kind] for kind in ("llama", "bert")},
    "dense": ("gpt2-nano", "method=dense"),
    "opt": ("opt-125m", "method=dense"),
    "sparse": ("gpt2-nano", "adapters.rank=0", "model.overrides.n_layer=4"),
    "sparse-opt": ("opt-125m", "adapters.rank=0", "sparsity.m=8"),
}


@pytest.mark.parametrize("kind", list(EXPORTED))
def test_a_folder_is_read_tensor_by_tensor_as_it_is_as_a_whole(kind: str) -> None:
    whole, opened = load_model(exported(kind)), load.open_model(exported(kind))
    assert opened is not None
    (parts, weights), expected = opened, store.state_tensors(whole.model, None)
    assert all(p.is_meta for p in parts.model.parameters())
    assert any(True for _ in sparse_layers(parts.model)) is kind.startswith("sparse")
    assert base_model.describe(parts.model) == base_model.describe(whole.model)
    assert store.state_tensors(parts.model, None).keys() == expected.keys()
    for name, tensor in expected.items():
        found = weights.read(name.removeprefix("model."))
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name


def test_what_cannot_be_read_tensor_by_tensor_is_loaded_as_a_whole(tmp_path: Path) -> None:
    """A run; adapters beside the weights; a name or a tie of embedding and head that transformers makes fit."""
    assert load.open_model(trained(*BASES["llama"])) is None
    adapted = tmp_path / "adapted"
    assert slope("export", trained(*BASES["gpt2"]), adapted).code == 0
    assert load.open_model(adapted) is None
    renamed, tied, prefixed = (copied(exported("llama"), tmp_path / name) for name in ("renamed", "tied", "prefixed"))
    settings = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    tensors = load_file(renamed / "model.safetensors")
    tensors["model.norm.other"] = tensors.pop("model.norm.weight")
    save_file(tensors, renamed / "model.safetensors", metadata={"format": "pt"})
    assert load.open_model(renamed) is load.open_model(tied) is None
    tensors = load_file(prefixed / "model.safetensors")
    names = {name: name.removeprefix("model.") for name in tensors}
    save_file({names[name]: tensor.bfloat16() for name, tensor in tensors.items()}, prefixed / "model.safetensors")
    opened = load.open_model(prefixed)
    assert opened is not None
    assert torch.equal(opened[1].read("model.norm.weight"), tensors["model.norm.weight"].bfloat16().float())


@pytest.mark.parametrize("kind", [slow("dense"), slow("llama"), "sparse"])
def test_a_base_is_written_with_one_tensor_in_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a tensor is read there are besides at most the one before it, and that one as it is written."""
    folder, read, held = exported(kind), weight_files.Weights._read, list[int]()

    def alive() -> int:
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and not x.is_meta]
        return sum(tensor.nbytes for tensor in tensors)

    def observed(self: weight_files.Weights, name: str) -> torch.Tensor:
        held.append(alive() - before)
        return read(self, name)

    words = [*WORDS, f"data.path={prepared()}", "train.steps=2", "linearize.transfer=1", AT_ONCE]
    whole = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    largest = max(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    monkeypatch.setattr(weight_files.Weights, "_read", observed)
    gc.collect()
    gc.freeze()  # what was there before is none of the objects
    before = alive()
    result = slope("linearize", folder, *words, "--out", tmp_path / "run")
    gc.unfreeze()
    assert result.code == 0, result.err
    assert len(held) > 20
    assert max(held) <= 2 * largest < 0.5 * whole


# ---------------------------------------------------------------------------------------------------- resuming


def ends_at_save(number: int, by: int) -> None:
    """Let this process get a signal right before its n-th checkpoint, from 1."""
    save, saves = store.save, 0

    def counted(*args: Any, **kwargs: Any) -> Path:
        nonlocal saves
        saves += 1
        if saves == number:
            os.kill(os.getpid(), by)
        return save(*args, **kwargs)

    store.save = counted


@pytest.mark.slow
@pytest.mark.parametrize("scratch_folder", [False, True])
def test_an_interrupted_range_goes_on_where_it_was(scratch_folder: bool, tmp_path: Path) -> None:
    """Killed in the second range after its first checkpoint, stopped in the third one, then killed before the join."""
    words = [AT_ONCE, "log.save_every=2", *([f"linearize.scratch={tmp_path / 'states'}"] * scratch_folder)]
    config, run = config_of("llama", *words), tmp_path / "run"
    assert finish(start(config, run, ends_at_save, 5, signal.SIGKILL)) == -signal.SIGKILL
    assert [store.newest_step(run / "transfer" / name) for name in ("0-1", "2-3", "4-4")] == [6, 2, 0]
    (states,) = tmp_path.rglob("layer-2.states")
    assert states.is_relative_to(run) is not scratch_folder
    assert finish(start(config, run, ends_at_save, 4, signal.SIGTERM)) == 75
    assert "stopped by SIGTERM after step" in printed(run)
    assert finish(start(config, run, ends_at_save, 3, signal.SIGKILL)) == -signal.SIGKILL
    assert finish(start(config, run)) == 0
    said = printed(run)
    assert "layers 2-3 of 5: attention transfer from step 3\n" in said
    assert_equal_but_for_rounding(records(run), records(linearized("llama", "log.save_every=2")))
    ours, theirs = final_state(config, run), final_state(config_of("llama"), linearized("llama"))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert not list(tmp_path.rglob("*.states"))


def test_a_range_goes_on_before_its_damaged_checkpoint(tmp_path: Path) -> None:
    config, run = config_of("gpt2", AT_ONCE, "log.save_every=2"), tmp_path / "run"
    assert finish(start(config, run, ends_at_save, 3, signal.SIGKILL)) == -signal.SIGKILL
    path = run / "transfer" / "0-1" / "checkpoints" / "step-00000004" / store.MANIFEST
    path.write_bytes(path.read_bytes()[:-9])
    assert finish(start(config, run)) == 0
    assert "; resuming from step-00000002\nlayers 0-1 of 5: attention transfer from step 3\n" in printed(run)
    ours, theirs = final_state(config, run), final_state(config_of("gpt2"), linearized("gpt2"))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_another_config_or_length_does_not_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert finish(start(config_of("gpt2", AT_ONCE), run, ends_at_save, 2, signal.SIGKILL)) == -signal.SIGKILL
    base = trained(*BASES["gpt2"])
    for more, line in (
        (("linearize.window=3",), "holds a run of another config (linearize.window: 2 -> 3)"),
        (("train.precision=bf16",), "precision=bf16: the hidden states on the disk are in torch.float32; change it af"),
        (("train.steps=14",), "have begun a transfer of 6 steps, not of 7; extend the run once its transfer is done"),
    ):
        result = slope("linearize", base, *WORDS, AT_ONCE, *more, "--out", run)
        assert (result.code, line in result.err) == (2, True), result.err
    (run / "transfer" / "states" / "layer-2.states").write_bytes(b"")
    result = slope("linearize", base, *WORDS, AT_ONCE, "--out", run)
    assert result.code == 1
    assert "layer-2.states: has not the hidden states of 6 steps" in result.err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------- hidden states


@given(st.tuples(*[st.integers(1, 4)] * 4), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 4))
def test_hidden_states_come_back_as_they_are_stored(shape: tuple[int, ...], dtype: torch.dtype, steps: int) -> None:
    path = scratch() / "hidden.states"
    path.unlink(missing_ok=True)
    written = [torch.randn(shape, generator=torch.Generator().manual_seed(step)) for step in range(steps)]
    file = HiddenStates(path, shape, dtype)
    for states in (*written, torch.zeros(shape)):
        file.append(states)
    file.cut(steps)
    for step in reversed(range(steps)):
        assert torch.equal(file.read(step), written[step].to(dtype))
    assert path.stat().st_size == states_bytes(steps, torch.Size(shape[:-1]).numel(), shape[-1], dtype)
    file.close()


@pytest.mark.parametrize(("place", "step"), [(0, 0), (7, 0), (-1, 1)])
def test_a_flipped_bit_of_hidden_states_is_noticed(place: int, step: int, tmp_path: Path) -> None:
    file = HiddenStates(tmp_path / "hidden.states", (1, 2, 3, 4), torch.bfloat16)
    for _ in range(2):
        file.append(torch.ones(1, 2, 3, 4))
    content = bytearray(file.path.read_bytes())
    content[place] ^= 16
    file.path.write_bytes(content)
    assert torch.equal(file.read(1 - step), torch.ones(1, 2, 3, 4, dtype=torch.bfloat16))
    with pytest.raises(SlopeError, match=rf"hidden\.states: the hidden states of step {step + 1} are damaged"):
        file.read(step)
    file.close()


def test_a_disk_without_room_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states_on_disk(10, 100, 8, 1, torch.bfloat16) == 0
    assert states_on_disk(10, 100, 8, 2, torch.bfloat16) == 10 * (4 + 1600)
    assert states_on_disk(10, 100, 8, 5, torch.bfloat16) == 2 * 10 * (4 + 1600)
    require_room(tmp_path / "absent", 1000)
    with pytest.raises(SlopeError, match=r"absent: \S+ GB free, 1000000000\.00 GB needed for hidden states; set lin"):
        require_room(tmp_path / "absent", 10**18)
    monkeypatch.setattr(layer_ranges, "states_on_disk", lambda *_: 10**18)
    result = slope("linearize", trained(*BASES["gpt2"]), *WORDS, AT_ONCE, "--out", tmp_path / "run")
    assert (result.code, "needed for hidden states" in result.err.splitlines()[-1]) == (1, True), result.err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------- bad input


def refused(*words: str, out: Path) -> str:
    result: Result = slope("linearize", trained(*BASES["gpt2"]), *WORDS, *words, "--out", out)
    assert result.code == 2, result
    return result.err.splitlines()[-1]


def test_bad_settings_are_one_line(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert refused("linearize.layers_at_once=-1", out=out).endswith("linearize.layers_at_once=-1: must be 0 or more")
    line = refused("linearize.layers_at_once=1", "linearize.keep_softmax=[1]", out=out)
    assert line.endswith("linearize.layers_at_once=1: layers 1-1 all keep softmax attention; choose more at once")
    unused = slope("linearize", trained(*BASES["gpt2"]), *WORDS, f"linearize.scratch={tmp_path}", "--dry-run")
    assert "has no effect with linearize.layers_at_once=0" in unused.err


# ---------------------------------------------------------------------------------------------------- several ranks


@pytest.mark.slow
def test_several_ranks_go_on_once_the_transfer_is_done(tmp_path: Path) -> None:
    run, base = tmp_path / "run", trained(*BASES["llama"])
    words = ["linearize", str(base), *WORDS, AT_ONCE, "train.micro_batch=1", "--out", str(run)]
    refused = Ranks(2, words, tmp_path / "refused")
    assert refused.finish() == [2, 2]
    assert "linearize.layers_at_once=2: transfers attention in one process; several go on" in refused.printed(0)
    config = config_of("llama", AT_ONCE, "train.micro_batch=1")
    assert finish(start(config, run, ends_at_save, 5, signal.SIGKILL)) == -signal.SIGKILL
    assert [store.step_of(folder) for folder in store.folders(run)] == [6]
    several = Ranks(2, words, tmp_path / "several")
    assert several.finish() == [0, 0], several.printed(0)
    whole = [record["loss"] for record in records(linearized("llama")) if record["kind"] == "train"]
    assert [x["loss"] for x in records(run) if x["kind"] == "train"] == pytest.approx(whole, rel=1e-4)


def test_a_whole_model_that_does_not_fit_is_one_line() -> None:
    run, config = linearized("gpt2", AT_ONCE), config_of("gpt2", AT_ONCE)
    require_whole(config, run, 1 << 30)
    with pytest.raises(SlopeError, match="the transfer is done and saved; the adapters train the whole model, which"):
        require_whole(config, run, 1 << 16)


# ---------------------------------------------------------------------------------------------------- a dry run


@pytest.mark.parametrize(("kind", "at_once", "ranges"), [("gpt2", 2, 3), slow("llama", 3, 2)])
def test_a_dry_run_says_what_ranges_take(kind: str, at_once: int, ranges: int, tmp_path: Path) -> None:
    """The bytes are those of the hidden states of a run, and of the largest of its models."""
    words = [*WORDS, f"linearize.layers_at_once={at_once}", "train.precision=fp32"]
    run, base = tmp_path / "run", trained(*BASES[kind])
    record = json.loads(slope("linearize", base, *words, "--dry-run", "--json").out)["ranges"]
    assert finish(start(config_of(kind, *words), run, ends_at_save, 2, signal.SIGKILL)) == -signal.SIGKILL
    assert f" ({record['disk_bytes']:,} bytes)\n" in printed(run)
    sizes = [path.stat().st_size for path in (run / "transfer" / "states").iterdir()]
    assert (record["ranges"], max(sizes) * min(2, ranges - 1)) == (ranges, record["disk_bytes"])
    held = []
    for layers in ranges_of(LAYERS, at_once):
        how = {"head": layers.stop == LAYERS}
        model, _ = base_model.read_layers(run, "cpu", layers, lambda whole: whole.requires_grad_(False), **how)
        held.append(sum(tensor.nbytes for tensor in model.state_dict().values()))
    assert max(held) == record["device_bytes"]
    lines = slope("linearize", base, *words, "--dry-run").out
    assert f"# transfer                    in {ranges} ranges of up to {at_once} layers\n" in lines
