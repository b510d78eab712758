"""`slope linearize`: transfer and adapters on tiny trained models, resumed, evaluated, exported, loaded."""

import json
import re
import shutil
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from support.data import prepared, scratch, texts
from support.marks import slow
from support.models import linearized as tiny_linearized
from support.models import tiny_model, tokens
from support.processes import die_in_save, die_in_save_base, finish, start
from support.runs import LINEARIZED, assert_same_run, copied, slope, trained
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import PreTrainedModel

from slope_cli.checkpoint import base_model, run_folder, store, verify
from slope_cli.checkpoint.load import load_model
from slope_cli.compare import results
from slope_cli.config import configs
from slope_cli.data.batches import IGNORED_LABEL
from slope_cli.distributed.layouts import Layout, memory_of
from slope_cli.inference.export import SOURCE
from slope_cli.linearize.swap import added_state, linear_windows, projections, using
from slope_cli.methods import phases_of
from slope_cli.methods.accounting import attention_memory, phase_sizes
from slope_cli.models.build import build_model, model_config
from slope_cli.models.loss import kl_divergence
from slope_cli.report import metrics
from slope_cli.train.dry_run import describe, untrained_model
from slope_cli.train.init import linearize_overrides
from slope_cli.train.init import teacher as teacher_of
from slope_cli.train.linearize_steps import DistillStep
from slope_cli.train.loop import Trainer, pretrain
from slope_cli.utils.files import file_sha256
from sparse_kernels import AdaptedLinear, adapters_of, add_adapters, sparse_layers
from sparse_kernels.formats import BF16
from sparse_kernels.layers import alike

WORDS = (
    *LINEARIZED,
    "train.steps=60",
    "linearize.window=2",
)
SMALL_BERT = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
BASES: dict[str, tuple[str, ...]] = {
    "dense": ("gpt2-nano", "method=dense", "train.steps=120"),
    "sparse": ("gpt2-nano", "train.steps=120"),
    "llama": ("llama3-8b", "method=dense", "train.steps=120"),
    "opt": ("opt-125m", "train.steps=20"),
    "masked": ("gpt2-nano", "method=sr_ste"),
    "soft thresholded": ("gpt2-nano", "method=s_ste", "model.activation=sparse_relu2"),
    "bert": ("bert-base", "method=dense"),
}


class Linearized(NamedTuple):
    """A base, the run that linearized it, and what that printed."""

    base: Path
    run: Path
    out: str
    err: str

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in metrics.read(self.run) if record["kind"] == kind]


@cache
def linearized(kind: str, *more: str) -> Linearized:
    """A finished run of `slope linearize`. Copy it before you alter it."""
    base, run = trained(*BASES[kind]), scratch() / "-".join(["linear", kind, *more]).replace("/", "_")
    result = slope("linearize", base, *WORDS, *more, "--out", run)
    if result.code:
        raise RuntimeError(result.err)
    return Linearized(base, run, result.out, result.err)


# ---------------------------------------------------------------------------------------------------- quality


@pytest.mark.parametrize("kind", ["llama", *map(slow, ("dense", "sparse"))])
def test_transfer_and_adapters_bring_the_model_back(kind: str) -> None:
    done = linearized(kind)
    transfer = done.records("transfer")
    assert len(transfer) == 36
    assert transfer[-1]["mse"] < 0.7 * transfer[0]["mse"]
    (teacher,), (swapped,), (transferred, adjusted) = map(done.records, ("teacher", "swapped", "val"))
    assert transferred["step"] == 36
    assert teacher["loss"] < transferred["loss"] < swapped["loss"]
    assert adjusted["loss"] < transferred["loss"]
    (phase,) = done.records("phase")
    model = load_model(done.run).model
    adapted = [adapter for name, adapter in adapters_of(model).items() if "mlp" not in name]
    adapters = sum(p.numel() for adapter in adapted for p in adapter.parameters())
    counts = {"trained_parameters": adapters, "adapter_parameters": adapters}
    kind = {"layers": "dense", "linearized": True, "adapters": True}
    assert {key: value for key, value in phase.items() if key != "time"} == {
        "kind": "phase",
        "step": 37,
        "name": "train, with adapters",
        **kind,
        **counts,
    }
    assert f", the model it began with {teacher['perplexity']:.2f} (" in done.out.splitlines()[0]


def test_each_phase_logs_its_own_loss() -> None:
    """A squared error and a cross-entropy are two curves, and the picture has a panel for each."""
    done = linearized("llama", "log.every=6", "log.plot=true")
    transfer, train = done.records("transfer"), done.records("train")
    assert [record["step"] for record in (*transfer, *train)] == list(range(1, 61))
    assert not any("loss" in record for record in transfer)
    with_layers = [record for record in transfer if "layers" in record]
    assert [record["step"] for record in with_layers] == [6, 12, 18, 24, 30, 36]
    for record in with_layers:
        assert list(record["layers"]) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
        assert sum(record["layers"].values()) / 2 == pytest.approx(record["mse"], rel=1e-6)
    svg = (done.run / "loss.svg").read_text()
    for text in ("transfer", "training", "validation", "mean squared error"):
        assert f">{text}</text>" in svg, text


def test_a_run_of_transfer_alone_draws_and_keeps_its_config() -> None:
    done = linearized("dense", "linearize.transfer=1", "train.steps=20", "optim.min_lr=1")
    assert not done.records("train")
    assert slope("plot", done.run, "--out", done.run / "again").code == 0
    other = slope("linearize", done.base, *WORDS, "train.steps=19", "--out", done.run)
    assert other.code == 2
    assert "does not become shorter" in other.err
    assert "another config, too (" in other.err


def test_the_teacher_is_the_model_that_the_run_began_with() -> None:
    done = linearized("dense", "train.steps=2")
    own = [record for record in metrics.read(done.base) if record["kind"] == "val"][-1]
    again = slope("eval", done.base, "--tokens", "512", "--json")
    teacher = done.records("teacher")[0]
    assert teacher["loss"] == pytest.approx(json.loads(again.out)["perplexity"]["loss"], rel=1e-5)
    assert own["step"] == 120


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler's own
@pytest.mark.filterwarnings("ignore:The .grad")
def test_a_compiled_run_learns_and_writes_the_same() -> None:
    words = ("train.steps=6", "linearize.transfer=0.5", "distill.share=0.5", "log.val_every=2")
    eager = linearized("sparse", *words)
    torch._dynamo.utils.counters.clear()
    # Whole, as torch's own operators: Inductor's code has a test of its own.
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        compiled = linearized("sparse", *words, "train.compile=true")
        text, same = (slope("generate", compiled.run, "The ", "--tokens", "8", *more) for more in ((), ("--compile",)))
    for kind, key in (("transfer", "mse"), ("train", "loss"), ("val", "loss")):
        expected = [record[key] for record in eager.records(kind)]
        assert [record[key] for record in compiled.records(kind)] == pytest.approx(expected, rel=1e-4)
        assert len(expected) >= 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2
    assert (same.code, same.out) == (0, text.out), same.err
    refused = slope("generate", eager.base, "The ", "--compile")
    assert (refused.code, "is not linearized" in refused.err) == (2, True)


# --------------------------------------------------------------------------------------------- what stays as it is


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "sparse", "llama", "opt", "bert"])
def test_weights_and_masks_are_bit_identical(kind: str) -> None:
    done = linearized(kind)
    before, after = (load_model(folder).model.state_dict() for folder in (done.base, done.run))
    own = {name for name in after if ".linear." not in name and ".adapter." not in name}
    assert own == {name for name in before if ".adapter." not in name}
    for name in own:
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("kind", ["sparse", slow("bert")])
def test_a_loaded_model_can_be_trained_further(kind: str) -> None:
    """What the run froze, it froze for itself: fine-tuning, say, trains a model whole."""
    assert all(p.requires_grad for p in load_model(linearized(kind).run).model.parameters())


def test_adapters_stand_beside_those_of_a_sparse_model() -> None:
    done = linearized("sparse")
    base, model = (load_model(folder).model for folder in (done.base, done.run))
    ranks = {name: adapter.rank for name, adapter in adapters_of(model).items()}
    before = {name: adapter.rank for name, adapter in adapters_of(base).items()}
    assert {name.split(".", 3)[3] for name in before} == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    for name, rank in ranks.items():
        assert rank == before.get(name, 0) + (4 if ".attn." in name else 0)
    assert isinstance(model.get_submodule("transformer.h.0.attn.c_attn"), AdaptedLinear)
    for _, layer in sparse_layers(model):
        layer.validate()


def test_the_maps_are_trained_in_transfer_alone() -> None:
    transferred = linearized("dense", "linearize.transfer=1", "train.steps=20", "optim.min_lr=1")
    adjusted = linearized("dense", "linearize.transfer=0.5", "train.steps=40", "optim.min_lr=1")
    one, other = (added_state(load_model(x.run).model) for x in (transferred, adjusted))
    assert not adapters_of(load_model(transferred.run).model)
    # The warm-up and the schedule are shares of the transfer, which in both is 20 steps.
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_maps_may_be_trained_on_with_the_adapters() -> None:
    words = ("linearize.transfer=0.5", "train.steps=40", "optim.min_lr=1")
    adjusted, both = linearized("dense", *words), linearized("dense", *words, "linearize.adjust_maps=true")
    one, other = (added_state(load_model(x.run).model) for x in (adjusted, both))
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert both.records("val")[0] == adjusted.records("val")[0]


def test_a_divergence_is_of_the_positions_that_have_a_label() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BTV, teacher_BTV = (2 * torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    labels_BT = torch.randint(7, (2, 5), generator=generator)
    labels_BT[0, 1:3] = IGNORED_LABEL
    log_p, log_q = (x[labels_BT >= 0].log_softmax(-1) for x in (teacher_BTV, logits_BTV))
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    torch.testing.assert_close(kl_divergence(logits_BTV, teacher_BTV, labels_BT), expected)
    assert kl_divergence(logits_BTV, logits_BTV, labels_BT) == 0
    assert kl_divergence(logits_BTV, teacher_BTV, torch.full_like(labels_BT, IGNORED_LABEL)) == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["llama3-8b", "bert-base"])
def test_a_step_of_distillation_is_as_worked_by_hand(name: str, share: float) -> None:
    """(1 - share) · cross-entropy + share · KL(teacher || student), of two micro-batches with other numbers of labels.

    Plain gradient descent at a rate of 1 changes each parameter by its gradient.
    """
    teacher, model = tiny_model(name), tiny_linearized(name, window=5).requires_grad_(False)
    adapters = add_adapters(model, 3, projections(model, "qkvo"), seed=1)
    trained = [p for adapter in adapters.values() for p in adapter.parameters()]
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_B.normal_(std=0.05, generator=torch.Generator().manual_seed(4))
    batches = [{"input_ids": ids_BT, "labels": ids_BT.roll(-1, 1)} for ids_BT in (tokens(20), tokens(20).flip(1))]
    if name == "bert-base":
        batches[0]["labels"][0, :15] = IGNORED_LABEL
    cross_entropy = divergence = torch.zeros(())
    counts = [batch["labels"][batch["labels"] >= 0].numel() for batch in batches]
    for batch in batches:
        student_BTV, teacher_BTV = (_token_logits(m, batch["input_ids"]) for m in (model, teacher))
        p_BTV, q_BTV, labelled_BT = teacher_BTV.softmax(-1), student_BTV.softmax(-1), batch["labels"] >= 0
        picked_BT = q_BTV.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
        cross_entropy = cross_entropy - picked_BT.log()[labelled_BT].detach().sum() / sum(counts)
        kl_BT = (p_BTV * (p_BTV / q_BTV).log()).sum(-1)
        divergence = divergence + kl_BT[labelled_BT].detach().sum() / sum(counts)
        truth_BTV = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), q_BTV.shape[-1])
        target_BTV = (1 - share) * truth_BTV + share * p_BTV
        student_BTV.backward((labelled_BT[..., None] * (q_BTV - target_BTV) / sum(counts)).detach())
    gradients, before = [p.grad.clone() for p in trained if p.grad is not None], [p.detach().clone() for p in trained]
    assert len(gradients) == len(trained)
    model.zero_grad()
    step = DistillStep(model, torch.optim.SGD(trained, lr=1.0), teacher=teacher, share=share, dtype=None, clip=0.0)
    output = step(batches)
    assert output.loss == pytest.approx(float(cross_entropy), rel=1e-5)
    assert output.total == pytest.approx(float((1 - share) * cross_entropy + share * divergence), rel=1e-5)
    assert output.norm == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-4)
    for parameter, old, gradient in zip(trained, before, gradients, strict=True):
        torch.testing.assert_close(old - parameter.detach(), gradient, rtol=1e-4, atol=1e-6)
    assert float(divergence) > 0.01
    assert all(p.grad is None for p in teacher.parameters())


def _token_logits(model: Any, ids_BT: Tensor) -> Tensor:
    output = model(input_ids=ids_BT)
    found: Tensor = output.prediction_logits if "prediction_logits" in output else output.logits
    return found


@pytest.mark.slow
def test_adapters_may_learn_from_the_softmax_model() -> None:
    """Its predictions bring them nearer to it than the text does; the record's loss is the text's cross-entropy."""
    words = ("linearize.transfer=0.3", "train.steps=60", "optim.min_lr=1", "linearize.window=1")
    distances, losses = [], []
    for done in (linearized("sparse", *words), linearized("sparse", *words, "distill.share=1")):
        model, teacher = (load_model(folder).model for folder in (done.run, done.base))
        ids_T = load_model(done.base).tokenizer(texts().read_text()).input_ids
        ids_BT = torch.tensor(ids_T[:1024]).view(-1, 16)
        with torch.no_grad():
            student_BTV, teacher_BTV = (m(input_ids=ids_BT).logits for m in (model, teacher))
        distances.append(kl_divergence(student_BTV, teacher_BTV, ids_BT).item())
        losses.append([record["loss"] for record in done.records("train")])
    assert distances[1] < distances[0]
    assert losses[1][0] == losses[0][0]  # before the first update


def test_the_softmax_model_is_what_the_run_began_with_and_is_not_held_twice() -> None:
    done = linearized("sparse", "distill.share=1", "train.steps=10")
    loaded = load_model(done.run)
    config, model = loaded.config, loaded.model.requires_grad_(False)
    for adapter in adapters_of(model).values():
        adapter.requires_grad_(True)
    teacher, began = teacher_of(done.run, model, "cpu", shares=True), load_model(done.base).model
    ids_BT = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(teacher(input_ids=ids_BT).logits, began(input_ids=ids_BT).logits)
    own = model.state_dict(keep_vars=True)
    apart = {name for name, t in teacher.state_dict().items() if t.data_ptr() != own[name].data_ptr()}
    assert apart
    assert all(".adapter." in name for name in apart)
    assert config is not None
    assert config.distill.share == 1


def test_a_run_without_transfer_trains_adapters_alone() -> None:
    done = linearized("dense", "linearize.transfer=0", "train.steps=6")
    assert not done.records("transfer")
    model = load_model(done.run).model
    assert all(adapter.lora_B.any() for adapter in adapters_of(model).values())


def test_layers_may_keep_softmax() -> None:
    done = linearized("llama", "linearize.keep_softmax=[0]", "train.steps=6")
    model = load_model(done.run).model
    assert list(linear_windows(model)) == ["model.layers.1.self_attn"]
    assert "attention of 1 layer becomes linear attention; 0 linear layers are sparse and stay so" in done.err


@pytest.mark.parametrize("kind", ["masked", "soft thresholded"])
def test_a_masked_run_becomes_sparse_layers_that_stay(kind: str) -> None:
    done = linearized(kind, "train.steps=6")
    model, base = load_model(done.run).model, load_model(done.base).model
    found = list(sparse_layers(model))
    assert found
    for name, layer in found:
        assert (layer.n, layer.m) == (2, 4)
        assert torch.equal(layer.weight.detach(), base.get_submodule(name).masked_weight.detach())
    assert model.config.activation_function == base.config.activation_function


# --------------------------------------------------------------------------------------------------- resumed


ALL = ("linearize.train=all", "distill.share=0.5")
ADJUSTED = [
    (),
    ("linearize.adjust_maps=true",),
    ("distill.share=0.5",),
    ("linearize.state=gated",),
    ("linearize.state=delta",),
    ALL,
    (*ALL, "linearize.state=gated", "adapters.rank=0"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "adjust"), [(4, ADJUSTED[0]), *((8, words) for words in ADJUSTED)])
def test_a_killed_run_resumes_bit_for_bit(step: int, adjust: tuple[str, ...], tmp_path: Path) -> None:
    """Killed while it saves: the first time in transfer, then with the adapters."""
    base = trained(*BASES["sparse"])
    words = (
        *WORDS,
        "train.steps=10",
        "linearize.window_dropout=0.2",
        "log.save_every=2",
        "train.precision=fp32",
        *adjust,
    )
    config = configs.load("linearize", [*linearize_overrides(base), *words])
    whole, run = tmp_path / "whole", tmp_path / "run"
    pretrain(config, whole)
    assert finish(start(config, run, die_in_save, step, 3)) == -signal.SIGKILL
    pretrain(config, run)
    assert_same_run(config, run, whole)


def test_a_run_is_extended_and_replaced(tmp_path: Path) -> None:
    base, run = trained(*BASES["sparse"]), tmp_path / "run"
    for steps, transfer, train in (("4", 2, 2), ("7", 2, 5), ("3", 2, 1)):
        more = ["--overwrite"] if steps == "3" else []
        result = slope("linearize", base, *WORDS, "linearize.transfer=0.5", f"train.steps={steps}", *more, "--out", run)
        assert result.code == 0, result.err
        kinds = [record["kind"] for record in metrics.read(run)]
        assert (kinds.count("transfer"), kinds.count("train")) == (transfer, train)


def untimed(out: str) -> list[str]:
    """What a finished run prints, without the shares of its time: each start adds to them."""
    lines = out.splitlines()
    assert [line.partition(" ")[0] for line in lines].count("time:") == 1
    return [line for line in lines if not line.startswith("time: ")]


@pytest.mark.slow
def test_a_run_resumes_without_what_it_began_with(tmp_path: Path) -> None:
    base = copied(trained(*BASES["sparse"]), tmp_path)
    first = slope("linearize", base, *WORDS, "train.steps=4", "--out", tmp_path / "run")
    assert first.code == 0, first.err
    spelled = tmp_path / "." / "run" / ".." / base.name
    again = slope("linearize", spelled, *WORDS, "train.steps=4", "--out", tmp_path / "run")
    assert (again.code, untimed(again.out)) == (0, untimed(first.out)), again.err
    base.rename(tmp_path / "elsewhere")
    again = slope("linearize", base, *WORDS, "train.steps=4", "--out", tmp_path / "run")
    assert (again.code, untimed(again.out)) == (0, untimed(first.out)), again.err
    assert again.err.startswith("finished: all of its 4 steps are done; ")
    assert again.err.count("\n") == 1
    other = slope("linearize", tmp_path / "elsewhere", *WORDS, "train.steps=4", "--out", tmp_path / "run")
    assert other.code == 2
    assert "model.init" in other.err
    run = tmp_path / "run"
    for words in (("generate", run, "The ", "--tokens", "4"), ("eval", run), ("export", run, tmp_path / "export")):
        again = slope(*words)
        assert again.code == 0, again.err
    assert "base: sound" in slope("check", run).out


# ------------------------------------------------------------------------------------------------- what is kept once


def names_of(folder: Path) -> set[str]:
    """The tensors in a checkpoint or a base."""
    return {name for name, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items() if entry}


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_checkpoint_holds_only_what_is_trained(kind: str) -> None:
    """In transfer the maps, then the adapters too: those of a sparse model's q, k, v and o with the new beside them."""
    done = linearized(kind, "log.save_every=30")
    adjusted, transferred = store.folders(done.run)
    model = load_model(done.run).model
    maps = {f"model.{name}" for name in added_state(model)}
    adapters = {f"model.{name}" for name in model.state_dict() if ".adapter." in name and ".attn." in name}
    assert names_of(done.run / store.BASE) == set(store.state_tensors(load_model(done.base).model, None))
    for folder, expected in ((transferred, maps), (adjusted, maps | adapters)):
        names = names_of(folder)
        assert {name for name in names if name.startswith("model.")} == expected
        moments = {name.removeprefix("optim.").rpartition(".")[0] for name in names if name.startswith("optim.")}
        assert moments - {""} == {name.removeprefix("model.") for name in expected}
    written = b"".join(path.read_bytes() for path in done.run.rglob("*") if path.is_file())
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and f"model.{name}" not in maps | adapters]
    assert len(matrices) >= 10
    assert [written.count(matrix.detach().numpy().tobytes()) for matrix in matrices] == [1] * len(matrices)


def test_a_check_hashes_each_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return file_sha256(path)

    run = linearized("sparse").run
    monkeypatch.setattr(store, "file_sha256", counted)
    assert not verify.check(run)["faults"]
    folders = store.folders(run)
    written = {path for folder in (run / store.BASE, *folders) for path in folder.iterdir()}
    assert sorted(hashed) == sorted(written - {folder / store.MANIFEST for folder in folders})


@pytest.mark.slow
def test_a_start_that_was_killed_begins_again(tmp_path: Path) -> None:
    """Killed before each operation on the disk in turn, each time on top of what the one before left."""
    config = configs.load("linearize", [*linearize_overrides(trained(*BASES["sparse"])), *WORDS, "train.steps=2"])
    run, whole, left = tmp_path / "run", tmp_path / "whole", set()
    for operation in range(1, 100):
        if finish(start(config, run, die_in_save_base, operation)) == 0:
            break
        left.add(tuple(sorted(path.name for path in run.glob("*base*"))))
    assert operation >= 8
    assert {(), (".tmp-base",), ("base",)} <= left, left
    pretrain(config, run)
    pretrain(config, whole)
    assert_same_run(config, run, whole)
    assert not list(run.glob(".*base*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", store.MANIFEST])
def test_a_damaged_base_is_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    run = copied(linearized("sparse").run, tmp_path)
    path = run / store.BASE / name
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    other = linearized("dense").run / store.BASE / name
    for damaged in (bytes(flipped), content[:-1], other.read_bytes(), None):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        for words in (("eval", run), ("generate", run, "The "), ("export", run, tmp_path / "out")):
            result = slope(*words)
            assert (result.code, len(result.err.splitlines())) == (1, 1), result.err
            assert str(path) in result.err
        again = slope("linearize", trained(*BASES["sparse"]), *WORDS, "--out", run)
        assert (again.code, str(path) in again.err.splitlines()[-1]) == (1, True), again.err
        assert f"base: FAULT: {path}" in "".join(slope("check", run).out), damaged
        path.touch()
    path.write_bytes(content)
    assert slope("check", run).code == 0
    shutil.rmtree(path.parent)
    assert slope("eval", run).err == f"error: {path.with_name(store.MANIFEST)}: missing\n"


def test_a_run_whose_checkpoints_hold_everything_resumes(tmp_path: Path) -> None:
    words = [*WORDS, "train.steps=8", "log.save_every=4", "train.precision=fp32"]
    config = configs.load("linearize", [*linearize_overrides(trained(*BASES["sparse"])), *words])
    whole = tmp_path / "whole"
    pretrain(config, whole)
    run = copied(whole, tmp_path)
    last, half = store.folders(run)
    shutil.rmtree(last)
    trainer = Trainer(config, run, torch.device("cpu"))
    trainer.batches.close()
    facts = {key: value for key, value in store.verify(half).items() if key not in ("step", "files", "base")}
    for folder in (half, run / store.BASE):
        shutil.rmtree(folder)
    store.save(run, 4, store.state_tensors(trainer.model, trainer.optimizer), facts, keep=2)
    assert slope("eval", run).code == 0
    pretrain(config, run)
    assert not (run / store.BASE).exists()
    assert_same_run(config, run, whole)


# ------------------------------------------------------------------------------------- eval, generate, export


def test_branches() -> None:
    done = linearized("dense")
    losses = {}
    for branch in ("both", "window", "linear"):
        result = json.loads(slope("eval", done.run, "--branch", branch, "--json").out)
        assert result["branch"] == branch
        losses[branch] = result["perplexity"]["loss"]
    assert losses["both"] == json.loads(slope("eval", done.run, "--json").out)["perplexity"]["loss"]
    assert losses["both"] < min(losses["window"], losses["linear"])


def test_generating_goes_through_the_cache() -> None:
    model, tokenizer = load_model(linearized("sparse").run)[1:3]
    ids_1T = tokenizer("The weights ", return_tensors="pt").input_ids
    how = {"attention_mask": torch.ones_like(ids_1T), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(ids_1T, use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("kind", ["sparse", "llama", *map(slow, ("dense", "bert"))])
@pytest.mark.parametrize("merge", [False, True])
def test_an_export_loads_back(kind: str, merge: bool, tmp_path: Path) -> None:
    done = linearized(kind)
    result = slope("export", done.run, tmp_path / "out", *(["--merge"] if merge else []))
    assert result.code == 0, result.err
    model, back = load_model(done.run).model, load_model(tmp_path / "out").model
    ids_BT = torch.randint(5, 30, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(back(ids_BT)[0], model(ids_BT)[0], rtol=1e-4, atol=1e-4)
        with using(model, mode="softmax"):
            assert not torch.allclose(back(ids_BT)[0], model(ids_BT)[0], atol=1e-4)
    assert bool(adapters_of(back)) is not merge
    evaluated = slope("eval", tmp_path / "out", "--data", done.base / "absent", "--branch", "window", "--json")
    assert evaluated.code != 0


def test_an_export_of_version_0_1_computes_what_it_did_there() -> None:
    """The one of tests/old_runs/linear, with the logits of every third position that version 0.1 had."""
    folder = Path(__file__).parent / "old_runs" / "linear-exported"
    expected, model = load_file(folder / "expected.safetensors"), load_model(folder).model
    assert list(linear_windows(model)) == ["transformer.h.0.attn"]
    assert {adapter.rank for adapter in adapters_of(model).values()} == {2, 4, 6}
    for mode, like in (("linear", True), ("softmax", False)):
        with torch.no_grad(), using(model, mode=mode):  # type: ignore[arg-type]
            logits_TV = model(input_ids=expected["input_ids"]).logits[0, 2::3]
        assert torch.allclose(logits_TV, expected["logits"], rtol=0, atol=1e-5) is like


def test_the_card_of_an_export_says_what_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = linearized("llama")
    assert slope("export", done.run, tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: slope-cli\ntags: [slope, linearized]\n---\n")
    assert f"- Loads with: slope; {SOURCE}\n- With transformers' from_pretrained: softmax attention" in card
    train = run_folder.open_config(done.run).train
    assert (
        f"- Linearized on: {60 * train.tokens_per_step:,} tokens (60 steps), in sequences of {train.seq_len}\n" in card
    )
    assert "- Architecture: llama with vocab_size 272, hidden_size 32, num_hidden_layers 2, " in card
    monkeypatch.chdir(tmp_path / "out")
    found: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], found)
    assert linear_windows(found["model"])
    printed = " ".join(slope("export", "--help").out.split())
    assert "For a linearized run only slope loads the feature maps" in printed


def test_an_exported_model_can_be_linearized(tmp_path: Path) -> None:
    base, folder = trained(*BASES["sparse"]), tmp_path / "export"
    assert slope("export", base, folder).code == 0
    words = [*WORDS, f"data.path={prepared()}", "train.steps=6"]
    result = slope("linearize", folder, *words, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    one, other = (dict(sparse_layers(load_model(x).model)) for x in (base, tmp_path / "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].values, other[name].values) for name in one)


def test_a_head_that_only_the_config_ties_keeps_its_bias() -> None:
    """Of BERT: the bias of its head is tied whether or not the weight is."""
    model = build_model(model_config("bert-base", overrides=SMALL_BERT))
    model.cls.predictions.decoder.weight = torch.nn.Parameter(torch.randn_like(model.cls.predictions.decoder.weight))
    rebuilt = base_model.rebuild(base_model.describe(model), "cpu")
    assert store.state_tensors(rebuilt, None).keys() == store.state_tensors(model, None).keys()
    assert base_model.describe(rebuilt) == base_model.describe(model)


def test_weights_that_only_the_config_ties_stay_two(tmp_path: Path) -> None:
    """transformers leaves them untied where the files hold both and they differ."""
    folder = tmp_path / "export"
    assert slope("export", trained(*BASES["llama"]), folder).code == 0
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    result = slope("linearize", folder, *WORDS, f"data.path={prepared()}", "train.steps=2", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    one, other = (load_model(path).model for path in (folder, tmp_path / "run"))
    assert not torch.equal(other.lm_head.weight, other.model.embed_tokens.weight)
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)


# ---------------------------------------------------------------------------------------------------- bad input


def fault(*words: str | Path, base: Path | None = None) -> str:
    """The one line of a command that must fail by the user's own fault."""
    result = slope("linearize", base or trained(*BASES["dense"]), *WORDS, *words)
    assert result.code == 2, result
    line = result.err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_bad_settings(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    assert fault("linearize.window=0", *out) == "linearize.window=0: must be positive"
    assert (
        fault("linearize.feature_map=hedgehgo", *out) == "linearize.feature_map=hedgehgo: choose one of hedgehog, t2r"
    )
    assert fault("linearize.features=0", *out) == "linearize.features=0: must be positive"
    assert fault("linearize.targets=[x]", *out) == (
        "linearize.targets=['x']: choose some of q, k, v, o; for no adapters set adapters.rank=0"
    )
    assert fault("linearize.keep_softmax=[7]", *out).startswith("linearize.keep_softmax=[7]: there is no layer 7")
    assert fault("adapters.rank=64", "train.steps=2", "linearize.transfer=0", *out).startswith("adapters.rank=64: ")
    assert fault("linearize.window=32", *out).startswith("linearize.window=32: must be below train.seq_len=32")
    terrace = ("linearize.window=16", "linearize.kind=terrace")
    assert fault(*terrace, *out).startswith("linearize.window=16: must be below half of train.seq_len=32")
    assert "seq_len" in fault("train.seq_len=128", "train.tokens_per_step=256", "train.micro_batch=2", *out)
    assert fault("model.overrides.n_layer=3", *out).startswith("model.overrides.n_layer: the shape is that of")


@pytest.mark.parametrize(("kind", "rank", "largest"), [("dense", 33, 32), ("sparse", 29, 28)])
def test_a_rank_that_does_not_fit_is_refused_before_the_transfer(
    kind: str, rank: int, largest: int, tmp_path: Path
) -> None:
    """Beside an adapter of rank 4 there is room for rank 28."""
    line = fault(f"adapters.rank={rank}", "--out", tmp_path / "run", base=trained(*BASES[kind]))
    assert line.startswith(f"adapters.rank={rank}: must be at most {largest}: transformer.h.")
    assert "a side of only 32" in line
    assert not any((tmp_path / "run" / name).exists() for name in ("metrics.jsonl", store.BASE))


def test_bad_bases(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    assert "neither a run" in fault(*out, base=tmp_path)
    assert "is linearized already" in fault(*out, base=linearized("dense").run)
    assert fault("model.name=gpt2-small", *out).endswith("is no gpt2-small: vocab_size is 272 there, not 50257")
    for words in (("--dry-run",), ("--out", tmp_path / "other")):
        result = slope("pretrain", "gpt2-nano", f"model.init={linearized('dense').run}", *words)
        assert (result.code, "is linearized" in result.err) == (2, True), result.err
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    result = slope("linearize", unknown, f"data.path={prepared()}", *out)
    assert result.code in (1, 2)
    assert str(unknown) in result.err.splitlines()[-1]


def test_what_is_linearized_already_is_refused_by_a_dry_run_too(tmp_path: Path) -> None:
    done, folder = linearized("dense"), tmp_path / "export"
    assert slope("export", done.run, folder).code == 0
    for words in (("--dry-run",), ("--out", tmp_path / "run")):
        for init in (done.run, folder):
            line = fault(f"data.path={prepared()}", *words, base=init)
            assert line == f"{init}: is linearized already; give the model that it was made of"


@pytest.mark.parametrize("kind", ["llama", "sparse"])
def test_all_weights_are_trained_and_the_teacher_keeps_its_own(kind: str, tmp_path: Path) -> None:
    done, folder = linearized(kind, *ALL), tmp_path / "export"
    transferred, adjusted = done.records("val")
    assert adjusted["loss"] < transferred["loss"]
    model, began = load_model(done.run).model, load_model(done.base).model
    before, after = (dict(each.named_parameters()) for each in (began, model))
    assert all(not torch.equal(after[name], p) for name, p in before.items() if ".adapter." not in name)
    for name, layer in sparse_layers(began):
        assert torch.equal(model.get_submodule(name).row_mask_bits, layer.row_mask_bits)  # type: ignore[arg-type]
    (phase,) = done.records("phase")
    assert phase["trained_parameters"] == sum(p.numel() for p in model.parameters())
    teacher = teacher_of(done.run, model, "cpu", shares=False)
    ids_BT = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(teacher(input_ids=ids_BT).logits, began(input_ids=ids_BT).logits)
    assert slope("export", done.run, folder).code == 0
    with torch.no_grad():
        found, expected = (each(input_ids=ids_BT).logits for each in (load_model(folder).model, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_all_weights_may_be_trained_without_adapters() -> None:
    done = linearized("dense", "linearize.train=all", "adapters.rank=0", "train.steps=20")
    model, began = load_model(done.run).model, load_model(done.base).model
    assert not adapters_of(model)
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], p) for name, p in began.named_parameters())
    assert [record["adapters"] for record in done.records("phase")] == [False]


def test_a_dry_run_counts_weights_that_are_trained_and_the_teacher() -> None:
    done = linearized("llama", *ALL)
    result = slope("linearize", done.base, *WORDS, *ALL, "--dry-run", "--json")
    record, held = json.loads(result.out)["account"], store.state_tensors(load_model(done.run).model, None)
    weights = sum(t.numel() for name, t in held.items() if not any(part in name for part in (".linear.", ".adapter.")))
    assert (record["trained_parameters"], record["frozen_parameters"]) == (weights, 0)
    checkpoint = store.latest(done.run)
    assert checkpoint is not None
    saved = FileSystemReader(checkpoint.folder).read_metadata().state_dict_metadata
    moments = sum(4 * entry.size.numel() for name, entry in saved.items() if name.endswith(("exp_avg", "exp_avg_sq")))
    state = record["state_bytes"]
    beside = state["adapters with their state"] + state["maps with their state"]
    assert state["AdamW moments"] == 8 * weights
    assert moments == state["AdamW moments"] + beside // 2
    assert state["teacher"] == 4 * weights
    lines = slope("linearize", done.base, *WORDS, *ALL, "--dry-run").out
    assert f"# weights                     {weights:,} parameters, trained after step 36\n" in lines
    assert f"# teacher                     its own copy, {4 * weights:,} bytes\n" in lines


@pytest.mark.parametrize("split", [False, True])
def test_a_dry_run_counts_the_masks_and_the_packed_weights_of_a_sparse_teacher(split: bool) -> None:
    done = linearized("sparse", *ALL)
    teacher = teacher_of(done.run, load_model(done.run).model, "cpu", shares=False)
    config = run_folder.open_config(done.run)
    config = replace(config, train=replace(config.train, tokens_per_step=2 * config.train.tokens_per_step))
    record, _ = describe(config, (2, 80))
    name, shard = ("fsdp, gather=block", 2) if split else ("ddp", 1)
    found = record["cluster"]["layouts"][name]["memory"]
    last = phase_sizes(untrained_model(config), config)[-1]
    alone = memory_of(replace(last, teacher=None), Layout(name.partition(",")[0], shard, "block" if split else ""))
    weights = sum(p.numel() for p in teacher.parameters())
    masks = [bits for _, x in sparse_layers(teacher) for bits in (x.row_mask_bits, x.backward_mask_bits)]
    entries = [x.out_features * x.in_features for _, x in sparse_layers(teacher)]
    if split:  # layers of the same sides share theirs
        entries = [x.out_features * x.in_features for x, *_ in alike(teacher)]
    mask_bytes, packed = sum(bits.nbytes for bits in masks), BF16.packed_bytes(1, sum(entries))  # of one product
    assert mask_bytes > 0
    assert found["weights"] - alone.weights == 4 * weights // shard
    assert found["masks"] - alone.masks == mask_bytes
    assert found["packed"] - alone.packed == packed
    assert record["account"]["state_bytes"]["teacher"] == 4 * weights + mask_bytes


def assert_export_is_the_run(run: Path, folder: Path, models: list[PreTrainedModel]) -> None:
    """A run and its export, loaded as `models`, have the same logits and write the same text."""
    ids_BT = tokens(40)
    with torch.no_grad():
        found, expected = (model(ids_BT).logits for model in models)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    written = [slope("generate", place, "It is a truth ", "--tokens", "30") for place in (run, folder)]
    assert written[0].code == 0, written[0].err
    assert written[0].out == written[1].out != ""


def test_an_exact_cache_is_trained_exported_and_decoded(tmp_path: Path) -> None:
    done, folder = linearized("llama", "linearize.cache=6", "train.steps=12"), tmp_path / "export"
    assert done.records("transfer")[-1]["mse"] < done.records("transfer")[0]["mse"]
    assert slope("export", done.run, folder).code == 0
    models = [load_model(place).model for place in (done.run, folder)]
    assert all(linear.pattern.cache == 6 for model in models for linear in linear_windows(model).values())
    assert_export_is_the_run(done.run, folder, models)


@pytest.mark.parametrize("kind", [slow("llama"), "sparse"])
def test_a_state_of_the_delta_rule_is_trained_exported_and_decoded(kind: str, tmp_path: Path) -> None:
    done, folder = linearized(kind, "linearize.state=delta"), tmp_path / "export"
    transfer = done.records("transfer")
    assert transfer[-1]["mse"] < transfer[0]["mse"]
    (swapped,), (transferred, adjusted) = map(done.records, ("swapped", "val"))
    assert adjusted["loss"] < transferred["loss"] < swapped["loss"]
    assert slope("export", done.run, folder).code == 0
    models = [load_model(place).model for place in (done.run, folder)]
    for linear in linear_windows(models[0]).values():
        assert linear.gate is not None
        assert linear.beta is not None
        assert linear.share is not None
        assert all((part.weight != 0).all() for part in (linear.gate, linear.beta, linear.share))
    assert_export_is_the_run(done.run, folder, models)
    branches = {name: slope("eval", done.run, "--branch", name, "--json") for name in ("both", "window", "linear")}
    found = {name: json.loads(said.out)["perplexity"]["perplexity"] for name, said in branches.items()}
    assert found["both"] < min(found["window"], found["linear"])


def test_an_export_of_before_the_cache_and_the_gate_has_none(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    assert slope("export", linearized("dense").run, folder).code == 0
    file = folder / "linearize" / "settings.json"
    own = json.loads(file.read_text()).items()
    file.write_text(json.dumps({key: value for key, value in own if key not in ("cache", "state")}))
    windows = linear_windows(load_model(folder).model).values()
    assert {(linear.pattern.cache, linear.gate) for linear in windows} == {(0, None)}


@pytest.mark.parametrize("kind", [slow("llama"), "sparse"])
def test_a_gated_state_is_trained_with_the_adapters_exported_and_decoded(kind: str, tmp_path: Path) -> None:
    """The transfer is that of an additive state: until it ends every gate is 1."""
    done, folder = linearized(kind, "linearize.state=gated", "linearize.kind=terrace"), tmp_path / "export"
    additive = linearized(kind, "linearize.kind=terrace")
    both = [[record["mse"] for record in each.records("transfer")] for each in (done, additive)]
    assert both[0] == pytest.approx(both[1], rel=1e-3)
    transferred, adjusted = done.records("val")
    assert transferred["loss"] == pytest.approx(additive.records("val")[0]["loss"])
    assert adjusted["loss"] < transferred["loss"]
    assert slope("export", done.run, folder).code == 0
    models = [load_model(place).model for place in (done.run, folder)]
    gates = [[linear.gate for linear in linear_windows(model).values()] for model in models]
    assert all(gate is not None and (gate.weight != 0).all() for gate in gates[0])
    gates_of_all = sum(p.numel() for gate in gates[0] if gate is not None for p in gate.parameters())
    adapters = done.records("phase")[0]["adapter_parameters"]
    assert done.records("phase")[0]["trained_parameters"] == adapters + gates_of_all
    assert_export_is_the_run(done.run, folder, models)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("linearize.cache=6",), "the exact cache ranks tokens by an additive state; set linearize.cache=0"),
        (("linearize.transfer=1",), "its gates are trained with the adapters; set linearize.transfer below 1"),
        (("adapters.rank=0",), "its gates are trained with the adapters; set linearize.transfer below 1"),
    ],
)
def test_a_gated_state_that_cannot_be_is_one_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    line = fault("linearize.state=gated", *words, "--out", tmp_path / "run")
    assert line.startswith(f"linearize.state=gated: {message}")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("linearize.cache=6", "linearize.state=delta: the exact cache ranks tokens by an additive state"),
        ("linearize.kind=terrace", "linearize.state=delta: by the delta rule tokens join the state one at a time"),
        (
            "linearize.entropy_weight=1",
            "linearize.entropy_weight=1.0: a state of the delta rule gives tokens no weights",
        ),
    ],
)
def test_a_state_of_the_delta_rule_that_cannot_be_is_one_line(word: str, message: str, tmp_path: Path) -> None:
    assert fault("linearize.state=delta", word, "--out", tmp_path / "run").startswith(message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "linearize.cache=-1: must be 0, or 4 or more: the first tokens"),
        (3, "linearize.cache=3: must be 0, or 4 or more: the first tokens"),
        (999, "linearize.cache=999: must be below the "),
    ],
)
def test_a_cache_of_a_wrong_size_is_one_line(value: int, message: str, tmp_path: Path) -> None:
    done = slope("linearize", trained(*BASES["dense"]), *WORDS, f"linearize.cache={value}", "--out", tmp_path / "run")
    assert (done.code, len(done.err.strip().splitlines())) == (2, 1), done.err
    assert done.err.startswith(f"error: {message}"), done.err


def test_settings_of_another_version_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    assert slope("export", linearized("dense").run, folder).code == 0
    file = folder / "linearize" / "settings.json"
    written = json.loads(file.read_text())
    without = {key: value for key, value in written.items() if key != "keep_softmax"}
    for text in (json.dumps(without), json.dumps({**written, "new": 1}), "[]", "{", '{"keep_softmax": 1}'):
        file.write_text(text)
        for words in (("bench", "linearize", folder, "--out", tmp_path / "bench"), ("generate", folder, "The ")):
            result = slope(*words)
            assert (result.code, len(result.err.splitlines())) == (2, 1), result.err
            assert result.err.startswith(f"error: {file}: is not of this version (")


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": "gpt2", "n_layer": "two"}'])
def test_a_config_of_transformers_that_cannot_be_read_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    for words in (("linearize", tmp_path, "--dry-run"), ("bench", "linearize", tmp_path)):
        result = slope(*words)
        assert (result.code, len(result.err.splitlines())) == (1, 1), result.err
        assert result.err.startswith(f"error: {tmp_path}: cannot be loaded as a model (")


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    line = fault(f"model.init={absent}", "--dry-run")
    assert line == f"{absent}: is neither a run (no config.yaml) nor a model folder (no config.json)"


def test_data_of_another_tokenizer(tmp_path: Path) -> None:
    texts()
    line = fault(f"data.path={prepared('wordpiece')}", "--out", tmp_path / "run")
    assert "was prepared with another tokenizer" in line


def test_branches_of_what_is_not_linearized() -> None:
    result = slope("eval", trained(*BASES["dense"]), "--branch", "window")
    assert result.code == 2
    assert "is not linearized" in result.err
    result = slope("eval", linearized("dense").run, "--branch", "left")
    assert result.code == 2
    assert "choose one of both, window, linear" in result.err


def test_a_changed_file_of_the_base_shows(tmp_path: Path) -> None:
    run = copied(linearized("dense").run, tmp_path)
    file = run / "base.json"
    file.write_text(file.read_text().replace('"n_layer": 2', '"n_layer": 3'))
    result = slope("generate", run, "The ")
    assert result.code == 1
    assert "base.json" in result.err


# ------------------------------------------------------------------------------------------------------ dry run


@pytest.mark.parametrize("kind", ["llama", "sparse", "masked"])
def test_a_dry_run_counts_what_a_run_holds_and_trains(kind: str) -> None:
    done = linearized(kind)
    record = json.loads(slope("linearize", done.base, *WORDS, "--dry-run", "--json").out)["account"]
    held = store.state_tensors(load_model(done.run).model, None)
    maps, adapters = ({name for name in held if part in name} for part in (".linear.", ".adapter."))
    if kind == "sparse":  # those of the MLPs are as they were
        adapters = {name for name in adapters if ".attn." in name}
    frozen = [tensor for name, tensor in held.items() if name not in maps | adapters]
    assert record["map_parameters"] == sum(held[name].numel() for name in maps)
    assert record["adapter_parameters"] == sum(held[name].numel() for name in adapters)
    assert record["frozen_parameters"] == sum(tensor.numel() for tensor in frozen if tensor.is_floating_point())
    state = record["state_bytes"]
    assert state["frozen (float32)"] + state["masks"] == sum(tensor.nbytes for tensor in frozen)
    assert phases_of(run_folder.open_config(done.run)).adapter_step == 36


def test_a_dry_run_says_what_it_does_not_know(tmp_path: Path) -> None:
    base, folder = trained(*BASES["sparse"]), tmp_path / "export"
    assert slope("export", base, folder).code == 0
    known, unknown = (slope("linearize", x, *WORDS, f"data.path={prepared()}", "--dry-run").out for x in (base, folder))
    assert "# frozen                     " in known
    assert "# frozen, as if dense        " in unknown
    (line,) = [line for line in known.splitlines() if line.startswith("# adapters  ")]
    assert re.search(r" [\d,]+ parameters, joining after step 36, [\d,]+ of them pretrained$", line)


@pytest.mark.parametrize("kind", ["standard", "terrace"])
@pytest.mark.parametrize("name", ["gpt2-nano", "llama3-8b"])
def test_what_a_sequence_takes_is_what_a_filled_cache_holds(name: str, kind: str) -> None:
    model = tiny_linearized(name, window=4, kind=kind, keep_softmax=[1]).to(torch.bfloat16)
    with torch.no_grad():
        layers = model(tokens(40, rows=1), use_cache=True).past_key_values.layers
    softmax = layers[1].keys.nbytes + layers[1].values.nbytes
    found = attention_memory(model)
    assert (found.layers, found.linear_layers) == (2, 1)
    assert (found.state_bytes, found.cache_bytes_per_token) == (layers[0].nbytes(), softmax // 40)


def test_a_dry_run_counts_what_a_cache_holds() -> None:
    done = linearized("dense")
    record = json.loads(slope("linearize", done.base, *WORDS, "--dry-run", "--json").out)["attention"]
    model = load_model(done.run).model.to(torch.bfloat16)
    with torch.no_grad():
        layers = model(torch.ones(1, 20, dtype=torch.long), use_cache=True).past_key_values.layers
    assert record["state_bytes"] == sum(layer.nbytes() for layer in layers)


def test_a_recipe_that_says_how_long_its_sequences_are_keeps_them(tmp_path: Path) -> None:
    base = trained(*BASES["sparse"])
    had = run_folder.open_config(base).train
    recipe = tmp_path / "own.yaml"
    for said, sizes in (
        ("{}", [had.seq_len, had.micro_batch, had.seq_len * had.micro_batch]),
        ("{micro_batch: 3}", [had.seq_len, 3, had.seq_len * 3]),
        ("{seq_len: 32, micro_batch: 2, tokens_per_step: 256}", [32, 2, 256]),
    ):
        recipe.write_text(f"method: linearize\nlinearize: {{window: 8}}\ntrain: {said}\n")
        train = configs.load(str(recipe), linearize_overrides(base, str(recipe))).train
        assert [train.seq_len, train.micro_batch, train.tokens_per_step] == sizes


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_comparison_counts_what_a_linearized_run_has(kind: str, tmp_path: Path) -> None:
    done = linearized(kind)
    (found,) = results.compare_runs([done.run], out=tmp_path).variants
    model = load_model(done.run).model
    parameters = sum(p.numel() for p in model.parameters())
    layers = [layer for _, layer in sparse_layers(model)]
    places, kept = (sum(x) for x in ([n.weight.numel() for n in layers], [n.values.numel() for n in layers]))
    trained = [p for name, p in model.named_parameters() if ".adapter." in name and not re.search("mlp|fc", name)]
    assert found.parameters is not None
    assert found.parameters.active == parameters
    assert found.parameters.all == parameters + places - kept
    assert found.parameters.trained == sum(p.numel() for p in trained)
    assert found.inference_bytes == 2 * parameters + places // 8
    assert "| – |" in (tmp_path / "compare.md").read_text()
