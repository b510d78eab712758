"""Whole optimizer steps on a GPU: from CUDA graphs as eagerly, through what a run does between them; and resume."""

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support import inductor
from torch import nn

from slope_cli.checkpoint import store
from slope_cli.config import configs, schema
from slope_cli.data.batches import IGNORED_LABEL
from slope_cli.errors import SlopeError
from slope_cli.methods import optim, phases_of
from slope_cli.methods.accounting import flops
from slope_cli.models import loss
from slope_cli.models.build import build_model, model_config
from slope_cli.train.changes import Changes
from slope_cli.train.cuda_graphs import GraphedStep
from slope_cli.train.step import MaskUpdate, Step, StepOutput
from sparse_kernels import (
    add_adapters,
    cuda,
    fp8_obstacle,
    layers,
    mask_layers,
    masked_layers,
    masks,
    packed,
    set_fp8,
    sparsify,
    update_backward_masks,
)
from sparse_kernels.formats import BF16, E4M3
from sparse_kernels.matmul_plan import MatmulPlan, MatmulShape, compress, random_mask

pytestmark = inductor.QUIET

SIZES = {
    "gpt2": ("gpt2-nano", {"n_embd": 512, "n_layer": 2, "n_head": 8}),
    "bert": (
        "bert-base",
        {
            "vocab_size": 272,
            "hidden_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "intermediate_size": 1024,
        },
    ),
}
SEQUENCES, LENGTH = 4, 128
Batch = dict[str, torch.Tensor]


class Setup(NamedTuple):
    """A model with its optimizer and the step that trains it."""

    model: Any
    optimizer: torch.optim.Optimizer
    step: Step | GraphedStep
    config: schema.Config

    def take(self, batches: Sequence[Batch], number: int = 0, update: MaskUpdate | None = None) -> StepOutput:
        phase = phases_of(self.config).at(number)
        optim.set_learning_rates(self.optimizer, phase, number, self.config.optim)
        return self.step(batches, update)

    def state(self) -> dict[str, torch.Tensor]:
        return {
            name: tensor.detach().clone() for name, tensor in store.state_tensors(self.model, self.optimizer).items()
        }


def setup(
    family: str = "gpt2",
    method: str = "slope",
    *,
    graphed: bool,
    compiled: bool = False,
    pattern: tuple[int, int] = (2, 4),
    dtype: torch.dtype | None = torch.bfloat16,
) -> Setup:
    name, overrides = SIZES[family]
    words = [f"method={method}", "optim.lr=2e-3", "optim.warmup=2", "train.steps=20", "adapters.start=0.2"]
    config = configs.load("gpt2-nano", words)
    model = build_model(model_config(name, overrides=overrides, dropout=0.0), device="cuda")
    if method == "slope":
        sparsify(model, n=pattern[0], m=pattern[1])
    optimizer = optim.build_optimizer(model, config, phases_of(config))
    return Setup(model, optimizer, new_step(model, optimizer, dtype, graphed, compiled), config)


def new_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype | None,
    graphed: bool,
    compiled: bool = False,
) -> Step | GraphedStep:
    step = Step(model, optimizer, dtype=dtype, clip=1.0, compiled=compiled)
    return GraphedStep(step) if graphed else step


def batches(family: str, count: int, seed: int) -> list[Batch]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(high: int, *sides: int) -> torch.Tensor:
        return torch.randint(high, sides, device="cuda", generator=generator)

    found = []
    for _ in range(count):
        batch = {name: draw(272, SEQUENCES, LENGTH) for name in ("input_ids", "labels")}
        if family == "bert":
            batch["labels"][draw(100, SEQUENCES, LENGTH) > 15] = IGNORED_LABEL
            batch["token_type_ids"] = draw(2, SEQUENCES, LENGTH)
            batch["next_sentence_label"] = draw(2, SEQUENCES)
        found.append(batch)
    return found


def assert_alike(one: Setup, other: Setup, rel: float = 1e-3) -> None:
    """Weights and state of two trainings: apart by no more than roundings that grow over a few steps."""
    ours, theirs = one.state(), other.state()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if not tensor.is_floating_point():
            differing = (tensor != theirs[name]).float().mean().item()
            assert differing < 0.05, f"{name}: {differing:.3f} of the bytes of a mask differ"
        else:
            distance = (tensor - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-8)
            assert distance < 20 * rel, f"{name}: {distance:.2e}"


def assert_same_steps(ours: Sequence[StepOutput], theirs: Sequence[StepOutput], rel: float = 1e-3) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a[:3] == pytest.approx(b[:3], rel=rel)


@pytest.fixture(autouse=True)
def new_compiler() -> None:
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_loss_is_that_of_all_logits(compiled: bool, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tokens left out, in 16 bits; and it takes less memory than the logits in float32."""
    tokens, vocabulary = 4 * 256, 8192
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", tokens * vocabulary // parts)
    sizes = {"n_embd": 128, "n_layer": 1, "n_head": 2, "vocab_size": vocabulary}
    model = build_model(model_config("gpt2-nano", overrides=sizes, dropout=0.0), device="cuda")
    ids, labels = (torch.randint(vocabulary, (4, 256), device="cuda") for _ in range(2))
    labels[:, ::7] = IGNORED_LABEL
    batch = {"input_ids": ids, "labels": labels}
    step = torch.compile(loss.loss_and_gradient_, dynamic=False) if compiled else loss.loss_and_gradient_
    found, gradients, peaks = [], [], []
    for compute in (
        lambda: loss.loss_fn(loss.forward(model, batch), batch),
        lambda: loss.training_loss(model, batch, loss_and_gradient=step),
    ):
        for _ in range(2):  # libraries allocate, and code is compiled, at the first
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                value = compute()
            value.token_loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append(value.token_loss.detach())
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))
    if compiled:
        assert peaks[1] < peaks[0] - 4 * tokens * vocabulary


# ---------------------------------------------------------------------------------------------- graphed is eager


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("method", ["dense", "slope"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_graphed_step_is_an_eager_one(family: str, method: str, count: int) -> None:
    runs = [setup(family, method, graphed=graphed) for graphed in (False, True)]
    outputs: list[list[StepOutput]] = [[], []]
    for number in range(8):
        step_batches = batches(family, count, number)
        for run, record in zip(runs, outputs, strict=True):
            record.append(run.take(step_batches, number))
    assert_same_steps(outputs[1], outputs[0])
    assert_alike(runs[1], runs[0])
    if method == "slope":
        assert any(row.forward and row.forward.sparse_ms for row in layers.backends(runs[1].model))
    assert all((one.total > one.loss) == (family == "bert") for one in outputs[1])  # with the next-sentence loss


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_compiled_and_graphed_is_eager_within_roundings(family: str) -> None:
    runs = [setup(family, graphed=False), setup(family, graphed=True, compiled=True)]
    outputs: list[list[StepOutput]] = [[], []]
    for number in range(8):
        step_batches = batches(family, 2, number)
        for run, record in zip(runs, outputs, strict=True):
            record.append(run.take(step_batches, number))
    assert_same_steps(outputs[1], outputs[0], rel=2e-2)
    assert [t.loss for t in outputs[1]] == pytest.approx([t.loss for t in outputs[0]], rel=5e-3)


def test_bert_total_is_both_losses() -> None:
    run = setup("bert", graphed=True)
    (batch,) = batches("bert", 1, 5)
    before = copy.deepcopy(run.model)
    output = run.take([batch])
    with torch.no_grad(), run.step.autocast():
        expected = before(**{key: batch[key] for key in ("input_ids", "token_type_ids")})
    words = nn.functional.cross_entropy(expected.prediction_logits.float().flatten(0, 1), batch["labels"].flatten())
    sentences = nn.functional.cross_entropy(expected.seq_relationship_logits.float(), batch["next_sentence_label"])
    assert output.loss == pytest.approx(words.item(), rel=1e-3)
    assert output.total == pytest.approx((words + sentences).item(), rel=1e-3)


def test_learning_rates_reach_a_captured_step() -> None:
    run = setup(graphed=True)
    step_batches = batches("gpt2", 1, 0)
    run.step(step_batches)
    for group in run.optimizer.param_groups:
        group["lr"].fill_(0.0)
    before = run.state()
    run.step(step_batches)
    after = run.state()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("optim.") for name in changed)


# ---------------------------------------------------------------------------------------------- between steps


@pytest.mark.parametrize("compiled", [False, True])
def test_adapters_join_a_graphed_run(compiled: bool) -> None:
    runs = [setup(graphed=False), setup(graphed=True, compiled=compiled)]
    outputs: list[list[StepOutput]] = [[], []]
    for at, (run, record) in enumerate(zip(runs, outputs, strict=True)):
        for number in range(8):
            if number == 4:
                adapters = add_adapters(run.model, 8, seed=1)
                optim.join(run.optimizer, run.model, run.config)
                step = new_step(run.model, run.optimizer, torch.bfloat16, graphed=bool(at), compiled=compiled)
                run = run._replace(step=step)
            record.append(run.take(batches("gpt2", 2, number), number))
        assert all(adapter.lora_B.abs().max() > 0 for adapter in adapters.values())
    assert [t.loss for t in outputs[1]] == pytest.approx([t.loss for t in outputs[0]], rel=5e-3)
    if not compiled:
        assert_same_steps(outputs[1], outputs[0])


def shake(model: nn.Module) -> None:
    """Change the kept magnitudes so that an update chooses a very different backward mask."""
    generator = torch.Generator("cuda").manual_seed(11)
    with torch.no_grad():
        for _, layer in layers.sparse_layers(model):
            noise = torch.randn(layer.values.shape, device="cuda", generator=generator)
            layer.values.mul_(1 + noise)


GRAPHED: list[tuple[tuple[int, int], packed.Backend, torch.dtype | None, bool]]
GRAPHED = [(pattern, "auto", torch.bfloat16, False) for pattern in ((2, 4), (1, 2), (2, 8), (4, 8))]
GRAPHED += [((2, 4), "dense", torch.bfloat16, False), ((2, 4), "reference", torch.bfloat16, False)]
GRAPHED += [((2, 4), "auto", None, False), ((2, 4), "auto", None, True), ((2, 8), "auto", torch.bfloat16, True)]
GRAPHED += [((2, 4), "auto", torch.bfloat16, True), ((2, 4), "reference", torch.bfloat16, True)]


@pytest.mark.parametrize(("pattern", "backend", "dtype", "compiled"), GRAPHED, ids=str)
def test_updated_masks_are_seen_by_the_next_replay(
    pattern: tuple[int, int], backend: packed.Backend, dtype: torch.dtype | None, compiled: bool
) -> None:
    eager, without = (setup(graphed=False, pattern=pattern, dtype=dtype) for _ in range(2))
    runs = [eager, without, setup(graphed=True, compiled=compiled, pattern=pattern, dtype=dtype)]
    for run in runs:
        layers.set_backend(run.model, backend)
    outputs: list[list[StepOutput]] = [[] for _ in runs]
    for number in range(4):
        if number == 2:
            for run in runs:
                shake(run.model)
                if run is not without:
                    update_backward_masks(run.model)
                layers.refresh(run.model)
            torch.cuda.empty_cache()
            torch.full((1 << 26,), torch.nan, device="cuda")  # what a stale graph would read is not what was there
        for run, record in zip(runs, outputs, strict=True):
            record.append(run.take(batches("gpt2", 2, number), number))
    rel = 2e-2 if compiled else 1e-3
    assert_same_steps(outputs[2], outputs[0], rel=rel)
    gap = abs(outputs[0][2].norm / outputs[1][2].norm - 1)
    assert gap > 1e-3  # the update matters
    assert abs(outputs[2][2].norm / outputs[0][2].norm - 1) < gap / 2


def assert_packed_weights_are_fresh(model: nn.Module) -> None:
    """They are what new ones, made from the layers as they are, would be; metadata included."""
    for _, layer in layers.sparse_layers(model):
        weight = packed.LayerWeight(layer.values, layer.row_mask_bits, layer.backward_mask_bits, layer.bias)
        for ours in packed.packed_layers(layer.row_mask_bits):
            theirs = packed.PackedLayer(ours.format, ours.backend)
            theirs.prepare(weight, SEQUENCES * LENGTH, backward=ours.backward is not None)
            for mine, other in ((ours.forward, theirs.forward), (ours.backward, theirs.backward)):
                if mine is not None and other is not None:
                    assert torch.equal(mine.target, other.target)
                    assert mine.packed == other.packed
                    if mine.metadata is not None and other.metadata is not None:
                        assert torch.equal(mine.metadata, other.metadata)
            if ours._bias is not None and theirs._bias is not None:
                assert torch.equal(ours._bias, theirs._bias)


@pytest.mark.parametrize("graphed", [False, True])
def test_training_in_fp8_holds_packed_weights_of_fp8_alone(graphed: bool) -> None:
    """Evaluation makes those of 16 bits, from the weights as they are then; training frees them, and writes none."""
    if reason := fp8_obstacle(torch.device("cuda")):
        pytest.skip(reason)
    run, (inputs,) = setup(graphed=graphed), batches("gpt2", 1, 9)
    sparse = dict(layers.sparse_layers(run.model))
    set_fp8(run.model, list(sparse))

    def formats() -> set[torch.dtype]:
        return {each.format.dtype for x in sparse.values() for each in packed.packed_layers(x.row_mask_bits)}

    def evaluated() -> torch.Tensor:
        run.model.eval()
        with torch.no_grad(), run.step.autocast():
            return run.model(input_ids=inputs["input_ids"]).logits.float()  # type: ignore[no-any-return]

    for number in range(4):
        run.model.train()
        run.take(batches("gpt2", 1, number), number, MaskUpdate())
        assert formats() == {E4M3.dtype}
        held = torch.cuda.memory_allocated()
        ours = evaluated()
        assert formats() == {E4M3.dtype, torch.bfloat16}
        run.model.train()
        assert formats() == {E4M3.dtype}
        if number:  # the first evaluation makes plans and workspaces, which stay
            assert torch.cuda.memory_allocated() == held + ours.nbytes
        with layers.using_backend(run.model, "reference"):
            theirs = evaluated()
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-2
        del ours, theirs


@pytest.mark.parametrize("pattern", [(2, 4), (2, 8)])
def test_masks_are_updated_from_a_graph_as_eagerly(pattern: tuple[int, int]) -> None:
    runs = [setup(graphed=graphed, pattern=pattern) for graphed in (False, True)]
    outputs: list[list[StepOutput]] = [[], []]
    for number in range(6):
        for run, record in zip(runs, outputs, strict=True):
            shake(run.model)
            layers.refresh(run.model)
            before = {name: layer.backward_mask_bits.clone() for name, layer in layers.sparse_layers(run.model)}
            versions = {name: layer.backward_mask_bits._version for name, layer in layers.sparse_layers(run.model)}
            record.append(run.take(batches("gpt2", 2, number), number, MaskUpdate()))
            assert_packed_weights_are_fresh(run.model)
            for name, layer in layers.sparse_layers(run.model):
                chosen = masks.double_prune(layer.weight.detach(), layer.row_mask(), *pattern)
                assert torch.equal(layer.backward_mask(), chosen)
                assert not torch.equal(layer.backward_mask_bits, before[name])
                assert layer.backward_mask_bits._version > versions[name]
    assert_same_steps(outputs[1], outputs[0])
    assert_alike(runs[1], runs[0])


def test_row_masks_that_change_between_replays_are_seen_by_the_next_one() -> None:
    run = setup(graphed=True)
    for number in range(6):
        share = 0.3 * (number % 2)
        before = {name: layer.row_mask_bits.clone() for name, layer in layers.sparse_layers(run.model)}
        run.take(batches("gpt2", 2, number), number, MaskUpdate(row_share=share))
        assert_packed_weights_are_fresh(run.model)
        for name, layer in layers.sparse_layers(run.model):
            layer.validate()
            assert torch.equal(layer.row_mask_bits, before[name]) == (not share)


def test_changes_are_measured_around_an_update_from_graphs_as_eagerly() -> None:
    found: list[list[Changes]] = [[], []]
    runs = [setup(graphed=graphed) for graphed in (False, True)]
    for number in range(4):
        for run, own in zip(runs, found, strict=True):
            before = [layer.backward_mask() for _, layer in layers.sparse_layers(run.model)]
            changes = Changes(run.model, None, norms=True, masks=True)
            output = run.step(batches("gpt2", 2, number), MaskUpdate(), changes)
            after = [layer.backward_mask() for _, layer in layers.sparse_layers(run.model)]
            flipped = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
            assert changes.masks_changed == pytest.approx(flipped / sum(mask.numel() for mask in after))
            norms = torch.tensor(list(changes.norms["gradient"].values()))
            assert norms.norm().item() == pytest.approx(output.norm, rel=1e-3)
            own.append(changes)
    for eager, graphed in zip(*found, strict=True):
        for name in ("gradient", "update", "relative_update"):
            assert graphed.norms[name] == pytest.approx(eager.norms[name], rel=2e-2)


@pytest.mark.parametrize("pattern", [(2, 4), (2, 8)])
def test_real_operations_are_those_of_the_products_that_run_sparse(pattern: tuple[int, int]) -> None:
    run = setup(graphed=False, pattern=pattern)
    run.take(batches("gpt2", 1, 0))
    choices = [c for row in layers.backends(run.model) for c in (row.forward, row.input_grad)]
    dense, real = flops(run.model, run.config) or (0, 0)
    assert dense > 0
    assert (real < dense) == any(choice is not None and choice.sparse for choice in choices)


@pytest.mark.parametrize("transposable", [False, True])
def test_masks_of_masked_layers_are_updated_from_a_graph_too(transposable: bool) -> None:
    runs, choose = [], masks.transposable_mask if transposable else masks.nm_mask
    for graphed in (False, True):
        run = setup(method="dense", graphed=graphed)
        mask_layers(run.model, transposable=transposable)
        optimizer = optim.build_optimizer(run.model, run.config, phases_of(run.config))
        runs.append(run._replace(optimizer=optimizer, step=new_step(run.model, optimizer, torch.bfloat16, graphed)))
    outputs: list[list[StepOutput]] = [[], []]
    for number in range(6):
        for run, record in zip(runs, outputs, strict=True):
            record.append(run.take(batches("gpt2", 1, number), number, MaskUpdate()))
            for _, layer in masked_layers(run.model):
                assert torch.equal(layer.mask, choose(layer.weight.detach().abs(), 2, 4))
    assert_same_steps(outputs[1], outputs[0])
    assert_alike(runs[1], runs[0])


@pytest.mark.parametrize("method", ["dense", "slope"])
def test_a_non_finite_step_raises_and_updates_nothing(method: str) -> None:
    run, twin = setup(method=method, graphed=True), setup(method=method, graphed=False)
    for number in range(2):
        for one in (run, twin):
            one.take(batches("gpt2", 2, number), number)
    layer = run.model.transformer.h[1].mlp.c_fc
    weight = layer.values if method == "slope" else layer.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.inf)
    layers.refresh(run.model)
    before = run.state()
    with pytest.raises(SlopeError, match=r"loss is not finite, first in the output of transformer\.h\.1\.mlp"):
        run.take(batches("gpt2", 2, 2), 2)
    after = run.state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        weight.copy_(kept)
    layers.refresh(run.model)
    ours, theirs = (one.take(batches("gpt2", 2, 2), 2) for one in (run, twin))
    assert_same_steps([ours], [theirs])
    assert_alike(run, twin)


# ---------------------------------------------------------------------------------------------- resume

WORDS = (
    *("model.overrides.n_embd=512", "model.overrides.n_layer=2", "model.overrides.n_head=8", "model.dropout=0.1"),
    *("train.steps=12", "train.tokens_per_step=1024", "train.micro_batch=4", "train.seq_len=128"),
    *("adapters.rank=8", "adapters.start=0.5", "adapters.lr=2e-3", "adapters.warmup=2"),
    *("optim.lr=2e-3", "optim.warmup=2", "log.every=1", "log.val_every=4", "log.val_tokens=1024", "log.sample_every=0"),
    *("log.save_every=5", "log.tensorboard=false"),
)
CHILD = """
import os, signal, sys
from pathlib import Path
from slope_cli.config import configs
from slope_cli.errors import SlopeError
from slope_cli.report.metrics import MetricsLog
from slope_cli.train.loop import pretrain
run, stop, *words = sys.argv[1:]
write = MetricsLog.write
def signalled(log, kind, step, **values):
    if kind == "train" and step == int(stop):
        os.kill(os.getpid(), signal.SIGTERM)
    return write(log, kind, step, **values)
MetricsLog.write = signalled
try:
    pretrain(configs.load("gpt2-nano", words), Path(run))
except SlopeError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def text_data(folder: Path) -> Path:
    from slope_cli.data.prepare import prepare

    rng, words = random.Random(0), ["the", "a", "cat", "dog", "saw", "took", "small", "green", "house", "river"]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": " ".join(rng.choices(words, k=60))}) + "\n" for _ in range(400)))
    prepare([f"text={text}"], folder / "data", val_fraction=0.1, workers=1, progress=False)
    return folder / "data"


def train(folder: Path, runs: dict[str, list[str]], stops: dict[str, int]) -> dict[str, int]:
    """Train runs at once, each in a process of its own; their exit codes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = {}
    for name, words in runs.items():
        command = [sys.executable, "-P", "-c", CHILD, str(folder / name), str(stops.get(name, 0)), *words]
        with (folder / f"{name}.log").open("ab") as log:
            started[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    return {name: process.wait(400) for name, process in started.items()}


def logs(folder: Path) -> str:
    return "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in folder.glob("*.log"))


def records(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock, and without "products" and "time", which each start writes anew."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept, anew = ("kind", "step", "loss", "grad_norm"), ("products", "time")
    return [{key: row[key] for key in kept if key in row} for row in rows if row["kind"] not in anew]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    found = store.latest(run)
    assert found is not None
    reader = FileSystemReader(str(found.folder))
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(tuple(x.size), dtype=x.properties.dtype) for name, x in entries.items()}
    load(state, storage_reader=reader, no_dist=True)
    return state


def differences(folder: Path, one: str, other: str) -> list[str]:
    """What differs between two finished runs: steps of the log, tensors of the last checkpoint."""
    ours, theirs = records(folder / one), records(folder / other)
    assert len(ours) == len(theirs)
    found = [f"{a} is not {b}" for a, b in zip(ours, theirs, strict=True) if a != b]
    mine, yours = final_state(folder / one), final_state(folder / other)
    assert mine.keys() == yours.keys()
    return found + [name for name in mine if not torch.equal(mine[name], yours[name])]


RUNS: dict[str, list[str]] = {
    "slope": [],  # the backward masks follow from the values: checkpoints leave them out
    "deterministic": ["slope.mask_update_interval=3", "train.deterministic=true"],  # they hold them
    "dense": ["method=dense"],
}
STOPS = {"slope": 4, "deterministic": 9, "dense": 4}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uninterrupted run and one that was stopped and resumed, of each of RUNS; all graphed."""
    folder = tmp_path_factory.mktemp("runs")
    data = [f"data.path={text_data(folder)}"]
    every = {f"{kind}-{way}": [*WORDS, *data, *words] for kind, words in RUNS.items() for way in ("whole", "stopped")}
    stopped = {name: words for name, words in every.items() if name.endswith("stopped")}
    codes = train(folder, every, {f"{kind}-stopped": stop for kind, stop in STOPS.items()})
    assert codes == {name: 75 if name in stopped else 0 for name in every}, logs(folder)
    assert set(train(folder, stopped, {}).values()) == {0}, logs(folder)
    return folder


@pytest.mark.xdist_group("resumed")  # one process makes the runs
@pytest.mark.parametrize("kind", RUNS)
def test_a_stopped_run_resumes_bit_for_bit(kind: str, resumed: Path) -> None:
    assert differences(resumed, f"{kind}-stopped", f"{kind}-whole") == []


def test_two_searches_give_one_result() -> None:
    """A resumed run searches anew: whatever algorithm is found, the product has the same bits."""
    rows, columns, tokens = 1536, 512, 512
    generator = torch.Generator("cuda").manual_seed(0)
    matrix = compress(cuda.slot_markers(random_mask(rows, columns, generator), torch.bfloat16))
    BF16.values(matrix, rows, columns).normal_(generator=generator)
    X = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda", generator=generator)
    bias = torch.randn(rows, dtype=torch.bfloat16, device="cuda", generator=generator)
    found: list[tuple[dict[str, int], torch.Tensor]] = []
    for _ in range(8):
        plan = MatmulPlan(MatmulShape(rows, columns, tokens, torch.bfloat16, True), 0)
        algorithm = plan.search(matrix, X, bias)
        found.append((algorithm, plan.matmul(matrix, X, bias)))
    assert all(torch.equal(Y, found[0][1]) for _, Y in found), [algorithm for algorithm, _ in found]
