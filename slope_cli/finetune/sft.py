"""`slope finetune MODEL SFT`: supervised fine-tuning of a causal model, dense or sparse, on the answers of rows.

OUT/model/, a folder that transformers loads, stands beside what `loop` writes. With `--lora` the weights stay as they
are, and what was learned is PEFT's folder in it.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.checkpoint.hf_folder import MODEL
from slope_cli.checkpoint.load import Loaded, load_model, require_initial
from slope_cli.distributed.launch import pick_device, require_one_process
from slope_cli.errors import UsageError
from slope_cli.finetune import conversations, loop
from slope_cli.finetune.conversations import CausalExample, Examples, Row
from slope_cli.finetune.loop import SFT
from slope_cli.inference.engine import end_ids
from slope_cli.inference.export import write
from slope_cli.models.loss import autocast, forward, loss_fn
from slope_cli.report import warned
from slope_cli.report.tables import counted, plain_in_markdown
from slope_cli.utils import files
from sparse_kernels import add_adapters, find_sparse_layers, masked_layers, select_layers, sparse_layers, to_dense

LONGEST = 1024
"""The longest input, unless the model's run says with which length it was trained."""
SPLIT_SEED = 0
FEW_STEPS, FEW_ROWS = 50, 100
"""Fewer steps hardly train, and fewer held-out rows hardly measure: both are warned of."""


@dataclass(frozen=True)
class SftSettings(loop.Settings):
    """Those of all fine-tunings, and these; UsageError for a bad value.

    micro_batch: examples that the model reads at once.
    lora: the rank of the adapters that are trained alone; 0: the weights are trained.
    """

    micro_batch: int
    lora: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch < 1:
            raise UsageError(f"--micro-batch {self.micro_batch}: must be at least 1")
        if self.lora < 0:
            raise UsageError(f"--lora {self.lora}: must be a rank, at least 1")


def finetune(
    folder: Path,
    data: Path | None,
    *,
    val: str = "0.05",
    out: Path | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    batch: int | None = None,
    micro_batch: int | None = None,
    seq_len: int | None = None,
    lora: int = 0,
    seed: int = 1,
) -> dict[str, Any]:
    """Train on the answers of rows, measure the loss on others before and after, and write the model.

    As `loop.train`; bf16 autocast on a GPU. A sparse layer trains its values and adapter, its masks stay, and its input
    gradient is double-pruned; with `lora` all weights are frozen, and input gradients exact. A step's loss is the mean
    over its targets, however many micro-batches it is computed in.

    Args:
        folder: a causal model's run, its export, or any folder of a causal model of transformers.
        data: rows, in JSON Lines; see `conversations`.
        val: another such file, or which share of the rows to hold out, the same ones for every seed.
        out: None for FOLDER/finetune/SFT-SEED. If it contains the result of the same fine-tuning, that is returned;
            an interrupted fine-tuning starts again.
        epochs, batch, micro_batch: passes over the rows, examples of a step and of a forward pass; None for 3, 32, 8.
        lr: the peak learning rate; None for 2e-5, or with `lora` 2e-4.
        seq_len: tokens of an input at most; None for the run's, or 1,024.
        lora: the rank of adapters for the layers that are or could be 2:4, beside those that they have.
        seed: of the order of examples, of dropout and of adapters.

    Returns:
        The content of result.json.

    Raises:
        UsageError: not a causal model, bad settings or rows, or `out` contains something else.
        SlopeError: no sound checkpoint, a loss that is not finite, a full disk.
    """
    require_one_process()
    if data is None:
        raise UsageError("SFT: give the rows with --data FILE, in JSON Lines with messages, or prompt and completion")
    loaded = _load(folder)
    positions = loaded.model.config.max_position_embeddings
    usual = min(positions, LONGEST) if loaded.config is None else loaded.config.train.seq_len
    size = 32 if batch is None else batch
    settings = SftSettings(
        task=SFT,
        epochs=3 if epochs is None else epochs,
        lr=(2e-4 if lora else 2e-5) if lr is None else lr,
        batch=size,
        seq_len=usual if seq_len is None else seq_len,
        seed=seed,
        micro_batch=min(size, 8) if micro_batch is None else micro_batch,
        lora=lora,
    )
    loop.require_positions(loaded.model, settings.seq_len)
    rows, source = _load_rows(data, val)
    out = out or loop.default_folder(loaded.folder, SFT, seed)
    return loop.finished(loaded, settings, source, out, MODEL, lambda: _run(rows, settings, loaded, out))


def _load(folder: Path) -> Loaded:
    """A causal model in float32; UsageError for another."""
    require_initial(folder)
    loaded = load_model(folder, pick_device("auto"))
    if loaded.objective != "causal":
        kind = loaded.model.config.model_type
        raise UsageError(f"{folder}: contains a {kind} model; {SFT} is for models that predict the next token")
    loaded.model.float()  # small steps of weights in 16 bits would be rounded away
    return loaded


def _load_rows(data: Path, val: str) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """The rows of training and validation, and their source: the files' sha256, or the share that is held out."""
    rows, source = conversations.read(data), {"train": files.file_sha256(data)}
    if not re.fullmatch(r"[\d.]+(e-\d+)?", val):
        return {"train": rows, "val": conversations.read(Path(val))}, {**source, "val": files.file_sha256(Path(val))}
    share = float(val)
    held_out = max(1, round(share * len(rows)))
    if not 0 < share < 1 or held_out == len(rows):
        raise UsageError(
            f"--val {val}: must be a file, or a share of the {len(rows)} rows that leaves some to train on"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
    split = {"val": sorted(order[:held_out]), "train": sorted(order[held_out:])}
    return {name: [rows[place] for place in places] for name, places in split.items()}, {**source, "val": val}


def _run(rows: Mapping[str, list[Row]], s: SftSettings, loaded: Loaded, out: Path) -> dict[str, Any]:
    """Train, measure before and after, and write the model."""
    files.remove(out / MODEL)  # of an interrupted fine-tuning
    model, tokenizer = loaded.model, loaded.tokenizer
    conversations.set_template(tokenizer)
    made = {name: _examples(part, tokenizer, model, s.seq_len, name) for name, part in rows.items()}
    if s.lora:
        _add_lora(model, s)
    for line in _warnings(len(made["train"].kept), len(made["val"].kept), s):
        warned.warn(line)
    before = measure(model, made["val"].kept, s)
    losses = train(model, made["train"].kept, s, out)
    after = measure(model, made["val"].kept, s)
    counts = {name: {"rows": len(rows[name]), "cut": x.cut, "dropped": x.dropped} for name, x in made.items()}
    facts = loop.facts(model, losses)
    learned = f"loss on held-out answers {before['loss']:.4f} before, {after['loss']:.4f} after, nats per token"
    with_adapters = f", in adapters of rank {s.lora} alone" if s.lora else ""
    lines = [
        f"Fine-tuned from: {plain_in_markdown(loaded.name)}",
        f"Fine-tuned on: the answers of {len(made['train'].kept):,} rows, {s.epochs} times{with_adapters}; {learned}",
    ]
    write((out / MODEL).resolve(), model.cpu(), tokenizer, out.resolve().name, lines)
    return {"rows": counts, "before": before, "after": after, **facts}


def _examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, seq_len: int, name: str
) -> Examples:
    made = conversations.examples(rows, tokenizer, end_ids(model, tokenizer), seq_len)
    if not made.kept:
        raise UsageError(f"no {name} row has a part of its answer in the first {seq_len} tokens; raise --seq-len")
    return made


def _warnings(trained: int, held_out: int, s: SftSettings) -> Iterator[str]:
    """What is too little, of the examples of training and validation."""
    if (steps := math.ceil(trained * s.epochs / s.batch)) < FEW_STEPS:
        total = f"{counted(steps, 'step')} in all, fewer than {FEW_STEPS}"
        yield f"{total}, may teach little; raise --epochs or lower --batch"
    if held_out < FEW_ROWS:
        rows = f"{counted(held_out, 'held-out row')}, fewer than {FEW_ROWS}"
        yield f"{rows}: the loss before and after is no measurement; raise --val, or name a file of more rows"


def _add_lora(model: PreTrainedModel, s: SftSettings) -> None:
    """Freeze a model's weights and add adapters; UsageError for a rank that does not fit a layer."""
    if any(True for _ in masked_layers(model)):  # which have no adapters
        to_dense(model)
        find_sparse_layers(model)
    model.requires_grad_(False)
    names = [name for name, _ in sparse_layers(model)]
    with contextlib.suppress(ValueError):  # no other layer could be sparse
        names += [layer.name for layer in select_layers(model).swapped]
    try:
        adapters = add_adapters(model, s.lora, names, beside=True, seed=s.seed)
    except ValueError as error:
        raise UsageError(f"--lora {s.lora}: {error}") from None
    for adapter in adapters.values():
        adapter.requires_grad_(True)


# --------------------------------------------------------------------------------------------------------- the loss


def train(model: PreTrainedModel, examples: Sequence[CausalExample], s: SftSettings, out: Path) -> list[float]:
    """Train in place, and return the loss of each step, in nats per target; raises as `loop.train`."""

    def step(indices: NDArray[np.int64]) -> tuple[float, int]:
        batch = [examples[index] for index in indices]
        return gradient(model, batch, s)

    return loop.train(model, len(examples), s, step, out)


def gradient(model: PreTrainedModel, batch: Sequence[CausalExample], s: SftSettings) -> tuple[float, int]:
    """Add the gradient of the mean loss over all targets of a batch; that loss, and the tokens of the inputs."""
    count, total, tokens = conversations.targets(batch), 0.0, 0
    for part in conversations.parts(batch, s.micro_batch):
        inputs = _inputs(part, s, model.device)
        with autocast(model.device):
            mean, targets = loss_fn(forward(model, inputs), inputs)[:2]
        loss = mean * (targets / count)
        torch.autograd.backward(loss)
        total += loss.item()
        tokens += inputs["input_ids"].numel()
    return total, tokens


def measure(model: PreTrainedModel, examples: Sequence[CausalExample], s: SftSettings) -> dict[str, Any]:
    """The loss over all targets in nats, its perplexity, and how many they are."""
    model.eval()
    nats, count = 0.0, conversations.targets(examples)
    with torch.no_grad(), autocast(model.device):
        for part in conversations.parts(examples, s.micro_batch):
            inputs = _inputs(part, s, model.device)
            mean, targets = loss_fn(forward(model, inputs), inputs)[:2]
            nats += float(mean) * int(targets)
    loss = nats / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": count}


def _inputs(part: Sequence[CausalExample], s: SftSettings, device: torch.device) -> dict[str, Tensor]:
    length = max(len(example.input_ids) for example in part)
    if device.type == "cuda":  # few shapes, because cuSPARSELt searches an algorithm for each number of tokens
        length = min(s.seq_len, 1 << max(6, (length - 1).bit_length()))
    arrays = conversations.collate(part, length)
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


# ------------------------------------------------------------------------------------------------------- the report


def report_lines(result: Mapping[str, Any], out: Path) -> list[str]:
    """A result as lines of text; out: its folder."""
    settings, rows, before, after = (result[key] for key in ("settings", "rows", "before", "after"))
    lines = [
        f"SFT after {counted(settings['epochs'], 'epoch')} ({counted(result['steps'], 'step')}) "
        f"of {counted(rows['train']['rows'], 'row')}; "
        f"{counted(rows['val']['rows'], 'held-out row')}, {counted(after['tokens'], 'answer token')}:",
        f"  loss: {before['loss']:.4f} before, {after['loss']:.4f} after; "
        f"perplexity {before['perplexity']:.2f} before, {after['perplexity']:.2f} after",
    ]
    for name, count in rows.items():
        if count["cut"]:
            lines.append(
                f"  longer than --seq-len {settings['seq_len']} in {name}: {count['cut']} rows, "
                f"which were cut; {count['dropped']} of them had no answer left"
            )
    return [*lines, f"  model: {out / MODEL}"]
