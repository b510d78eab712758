"""`slope finetune`: train a pretrained BERT, dense or sparse, on a task of GLUE or on SQuAD v1.1; evaluate it on dev.

OUT/result.json       settings, metrics and versions; written last, so that only a finished fine-tuning has one
OUT/metrics.jsonl     a line for each step
OUT/predictions.jsonl a line for each row of dev

Shape letters: B examples of a batch, T tokens, L outputs of the head.
"""

import copy
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from slope_cli.checkpoint import hf_folder
from slope_cli.checkpoint.load import Loaded, load_model
from slope_cli.config.schema import MAX_SEED, OptimConfig
from slope_cli.config.values import flat
from slope_cli.distributed.launch import pick_device, require_one_process
from slope_cli.errors import SlopeError, UsageError, did_you_mean, first_line
from slope_cli.finetune import glue, squad
from slope_cli.finetune.examples import Example, Logits, Task, collate
from slope_cli.methods import optim
from slope_cli.methods.phases import Rate
from slope_cli.models.loss import autocast
from slope_cli.report import metrics
from slope_cli.report.progress import Progress
from slope_cli.report.timing import Speed
from slope_cli.utils import files
from slope_cli.utils.environment import environment
from sparse_kernels import check_backend, masked_layers, sparse_layers

TASKS: dict[str, Task] = {task.name: task for task in (*glue.TASKS, squad.SQUAD)}
RESULT, PREDICTIONS, FOLDER = "result.json", "predictions.jsonl", "finetune"
FEWEST_TOKENS = 8
"""The shortest sequence that holds two short texts and their special tokens."""
WARMUP, WEIGHT_DECAY, CLIP = 0.1, 0.01, 1.0
LOG_EVERY = 50


@dataclass(frozen=True)
class Settings:
    """The settings of a fine-tuning; UsageError for a bad value."""

    task: str
    epochs: int
    lr: float
    batch: int
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 1), ("seq_len", FEWEST_TOKENS)):
            if (value := getattr(self, name)) < least:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"--lr {self.lr}: must be positive")
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"--seed {self.seed}: must be at least 0 and below 2^63")


def finetune(
    folder: Path,
    task_name: str,
    *,
    data: Path | None = None,
    out: Path | None = None,
    epochs: int | None = None,
    lr: float = 3e-5,
    batch: int | None = None,
    seq_len: int | None = None,
    seed: int = 1,
) -> dict[str, Any]:
    """Train on a task's training rows and evaluate on its dev rows.

    AdamW (weight decay 0.01 on matrices), linear warm-up over a tenth of the steps and linear decay to 0, gradients
    clipped at norm 1, dropout as in the model's config; bf16 autocast on a GPU. All masks stay fixed: a sparse layer
    trains its values and adapter, and its input gradient is double-pruned; a masked layer has exact gradients.

    The defaults are the usual ones for BERT. The paper uses `lr=2.4e-6, batch=4` for GLUE, and the defaults for SQuAD.

    Args:
        folder: a BERT run, or an exported one.
        task_name: CoLA, SST-2, MRPC, STS-B, RTE or SQuAD, in any spelling.
        data: the folder of the official files: [TASK/]train.tsv and dev.tsv, or train-v1.1.json and dev-v1.1.json;
            None for the Hugging Face Hub.
        out: None for FOLDER/finetune/TASK-SEED. If it contains the result of the same fine-tuning, that is
            returned; an interrupted fine-tuning starts again.
        epochs, batch, seq_len: passes over the rows, examples of a step, longest input in tokens; None for 3, 32 and
            128 (CoLA: 5 epochs; SQuAD: 2, 24 and 384).
        lr, seed: the peak learning rate; the seed of the head, the order of examples and dropout.

    Returns:
        The content of result.json.

    Raises:
        UsageError: an unknown task, not a BERT, bad settings or rows, or `out` contains something else.
        SlopeError: no sound checkpoint, a loss that is not finite, a full disk.
    """
    require_one_process()
    task = find_task(task_name)
    settings = Settings(
        task=task.name,
        epochs=task.epochs if epochs is None else epochs,
        lr=lr,
        batch=task.batch if batch is None else batch,
        seq_len=task.seq_len if seq_len is None else seq_len,
        seed=seed,
    )
    loaded = _load_bert(folder, settings.seq_len)
    rows, source = load_rows(task, data)
    identity = {"run": folder.resolve().name, "step": loaded.step, "settings": asdict(settings), "data": source}
    out = out or default_folder(folder, task.name, seed)
    with files.claimed_folder(out, "fine-tuning", _is_own_file):
        if (out / RESULT).is_file():
            return _finished_result(out, identity)
        return _run(rows, settings, loaded, out, identity)


def _load_bert(folder: Path, seq_len: int) -> Loaded:
    """UsageError for a model that cannot be fine-tuned, or not on inputs of this length."""
    hf_folder.require_trainable(folder)
    loaded = load_model(folder, pick_device("auto"))
    if loaded.objective != "masked":
        raise UsageError(f"{folder}: contains a {loaded.model.config.model_type} model; only BERT can be fine-tuned")
    if seq_len > (positions := loaded.model.config.max_position_embeddings):
        raise UsageError(f"--seq-len {seq_len}: the model has only {positions} positions; set it lower")
    return loaded


def default_folder(folder: Path, task: str, seed: int) -> Path:
    """FOLDER/finetune/TASK-SEED; UsageError if it is a link, since the folder may be a stranger's."""
    out = folder / FOLDER / f"{task}-{seed}"
    if link := next((path for path in (out.parent, out) if path.is_symlink()), None):
        raise UsageError(f"{link}: is a link, which is not written through; choose another folder with --out")
    return out


def find_task(name: str) -> Task:
    """The task of this name in any spelling, such as `sst2` for SST-2; UsageError with a suggestion."""
    for task in TASKS.values():
        if _letters(task.name) == _letters(name):
            return task
    raise UsageError(f"unknown task {name!r}; {did_you_mean(name, TASKS)}")


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


# ------------------------------------------------------------------------------------------------------- the folder


def _is_own_file(path: Path) -> bool:
    """Whether a fine-tuning writes this file, or a temporary one for it."""
    return path.name.removeprefix(".").removesuffix(".tmp") in (RESULT, PREDICTIONS, metrics.JSONL)


def _finished_result(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The result in a folder; UsageError if it is of another model, other rows or other settings."""
    try:
        result: dict[str, Any] = json.loads((out / RESULT).read_text())
    except ValueError:
        raise SlopeError(f"{out / RESULT}: damaged, not JSON; remove it to fine-tune again") from None
    before, now = flat({key: result.get(key) for key in identity}), flat(identity)
    changed = [f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        raise UsageError(f"{out}: contains another fine-tuning ({'; '.join(changed)}); choose another --out")
    return result


# --------------------------------------------------------------------------------------------------------- the rows


def load_rows(task: Task, data: Path | None) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """The rows of train and dev, and their source: the sha256 of each file, or the name of the data set on the Hub.

    Raises:
        UsageError: rows cannot be read or downloaded, or are not as published.
    """
    if data is None:
        return _hub_rows(task)
    folder = data / task.name if (data / task.name).is_dir() else data
    paths = {split: folder / name for split, name in zip(("train", "dev"), task.files, strict=True)}
    rows = {split: _not_empty(task.read(path), path) for split, path in paths.items()}
    return rows, {split: files.file_sha256(path) for split, path in paths.items()}


def _hub_rows(task: Task) -> tuple[dict[str, list[Any]], dict[str, str]]:
    import datasets  # slow to import, and not needed for local files

    name, configuration = task.hub
    title = name if configuration is None else f"{name} {configuration}"
    rows = {}
    for split, hub_split in (("train", "train"), ("dev", "validation")):
        try:
            records = datasets.load_dataset(name, configuration, split=hub_split)
        except Exception as error:  # Hub, HTTP, config and split errors share no base class
            raise UsageError(
                f"{title}: could not be downloaded from the Hugging Face Hub ({first_line(error)}); "
                "give the official files with --data"
            ) from error
        where = f"{title} {hub_split}"
        read = [task.from_hub(record, f"{where} row {number}") for number, record in enumerate(records, 1)]
        rows[split] = _not_empty(read, where)
    return rows, {"hub": title}


def _not_empty(rows: list[Any], where: Path | str) -> list[Any]:
    if not rows:
        raise UsageError(f"{where}: contains no rows")
    return rows


# -------------------------------------------------------------------------------------------------------- the model


def build(model: PreTrainedModel, task: Task, seed: int) -> PreTrainedModel:
    """A model with a new head on the encoder, `model.bert`, with its sparse layers and adapters.

    The encoder is not copied, and loses its pooler if the architecture has none. The weight of the head is drawn from
    `seed`, normal with the config's initializer_range; its bias is 0.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = task.outputs
    with torch.device("meta"):  # its encoder and head are replaced
        built: Any = task.architecture(config)
    bert: Any = model.bert
    if built.bert.pooler is None:
        bert.pooler = None
    (head_name,) = (name for name, module in built.named_children() if isinstance(module, nn.Linear))
    head = nn.Linear(config.hidden_size, task.outputs)
    with torch.no_grad():
        head.weight.normal_(0, config.initializer_range, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    built.bert = bert
    setattr(built, head_name, head.to(model.device))
    result: PreTrainedModel = built
    return result


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """float32: (B, L), or for question answering (B, 2, T) with minus infinity at padding."""
    output = model(**inputs)
    if "logits" in output:
        logits_BL: Tensor = output.logits.float()
        return logits_BL
    logits_B2T = torch.stack([output.start_logits, output.end_logits], 1).float()
    return logits_B2T.masked_fill(inputs["attention_mask"][:, None] == 0, -math.inf)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of classes, or of the two ends of answers; mean squared error of a single output.

    Args:
        logits: (B, L) or (B, 2, T), float32.
        targets: (B, 1) or (B, 2), float32.
    """
    if logits.dim() == 3:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())
    if logits.shape[1] == 1:
        return F.mse_loss(logits, targets)
    return F.cross_entropy(logits, targets[:, 0].long())


# --------------------------------------------------------------------------------------------------------- training


def _run(
    rows: dict[str, list[Any]], s: Settings, loaded: Loaded, out: Path, identity: dict[str, Any]
) -> dict[str, Any]:
    """Train, evaluate on dev, and write all files, the result last."""
    task, device, pad = TASKS[s.task], loaded.model.device, loaded.tokenizer.pad_token_id
    if device.type == "cuda":
        backend = "auto" if loaded.config is None else loaded.config.sparsity.backend
        try:
            check_backend(backend)
        except RuntimeError as error:
            raise UsageError(f"sparsity.backend={backend}: {error}") from None
    trainable = task.trainable(rows["train"])
    train, dev = (task.examples(part, loaded.tokenizer, s.seq_len) for part in (trainable, rows["dev"]))
    model = build(loaded.model, task, s.seed)
    started = time.monotonic()
    losses = _train(model, train, s, pad, out)
    scores, predictions = task.evaluate(rows["dev"], dev, _predict(model, dev, s, pad))
    with files.atomic_file(out / PREDICTIONS) as file:
        file.writelines(json.dumps(prediction).encode() + b"\n" for prediction in predictions)
    result = {
        **identity,
        "n_train": len(trainable),
        "left_out": len(rows["train"]) - len(trainable),
        "n": len(rows["dev"]),
        "examples": {"train": len(train), "dev": len(dev)},
        **scores,
        "steps": len(losses),
        "train_loss": float(np.mean(losses[-math.ceil(len(losses) / 10) :])),  # of the last tenth
        "sparse_layers": len([*sparse_layers(model), *masked_layers(model)]),
        "seconds": round(time.monotonic() - started, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": "bf16" if device.type == "cuda" else "fp32",
        "versions": environment(),
    }
    files.write_json(out / RESULT, result)
    return result


def _train(model: nn.Module, examples: list[Example], s: Settings, pad: int, out: Path) -> list[float]:
    """Train in place, and return the loss of each step.

    Raises:
        SlopeError: a loss or gradient is not finite; that step updates nothing.
    """
    for _, layer in masked_layers(model):  # fixed masks: only kept weights have a gradient, and it is exact
        layer.straight_through = layer.mvue = False
    config = OptimConfig(lr=s.lr, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY, schedule="linear", min_lr=0.0)
    optimizer = optim.make_optimizer(model, config, adapter_decay=WEIGHT_DECAY)
    device, losses = next(model.parameters()).device, []
    steps = list(step_indices(len(examples), s))
    rate = Rate(0, len(steps) + 1, s.lr, WARMUP)  # one more step, because the last learning rate is 0
    log = metrics.MetricsLog(out, 0)
    progress, speed = Progress(len(steps), every=LOG_EVERY), Speed()
    torch.manual_seed(s.seed)  # of dropout
    model.train()
    try:
        for step, indices in enumerate(steps):
            started = time.perf_counter()
            lr = optim.learning_rate(rate, step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = [examples[index] for index in indices]
            inputs = _inputs(batch, s, pad, device)
            targets = torch.tensor([example.targets for example in batch], device=device)
            with autocast(device):
                loss = loss_of(_logits(model, inputs), targets)
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            values = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
            if not all(map(math.isfinite, values.values())):
                raise SlopeError(f"step {step + 1}: loss or gradient is not finite; lower --lr")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(values["loss"])
            tokens, seconds = inputs["input_ids"].numel(), time.perf_counter() - started
            speed.add(tokens, seconds, first=step == 0)
            progress.step(log.write("train", step + 1, **values, tokens_per_s=round(tokens / seconds, 1)), speed)
    finally:
        progress.close()
        log.close()
    return losses


def step_indices(count: int, s: Settings) -> Iterator[NDArray[np.int64]]:
    """The examples of each step: each once per epoch, in an order that depends only on seed and epoch.

    A batch may span two epochs, so that all but the last have the same size.
    """
    epochs = [np.random.default_rng([s.seed, epoch]).permutation(count) for epoch in range(s.epochs)]
    indices = np.concatenate(epochs)
    return (indices[start : start + s.batch] for start in range(0, len(indices), s.batch))


def _predict(model: nn.Module, examples: list[Example], s: Settings, pad: int) -> Logits:
    """The logits of each example, without dropout."""
    device = next(model.parameters()).device
    logits: list[NDArray[np.float32]] = []
    model.eval()
    with torch.no_grad(), autocast(device):
        for start in range(0, len(examples), s.batch):
            part = examples[start : start + s.batch]
            logits += list(_logits(model, _inputs(part, s, pad, device)).cpu().numpy())
    return logits


def _inputs(examples: Sequence[Example], s: Settings, pad: int, device: torch.device) -> dict[str, Tensor]:
    # On a GPU all batches have one shape, because cuSPARSELt searches an algorithm for each number of tokens.
    arrays = collate(examples, pad, s.seq_len if device.type == "cuda" else None)
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


# ------------------------------------------------------------------------------------------------------- the report


def report_lines(result: Mapping[str, Any]) -> list[str]:
    """A result as lines of text."""
    settings, epochs = result["settings"], result["settings"]["epochs"]
    lines = [
        f"{settings['task']} after {epochs} epoch{'s' * (epochs > 1)} ({result['steps']:,} steps) "
        f"of {result['n_train']:,} training rows, evaluated on {result['n']:,} dev rows:"
    ]
    for name, value in result["metric"].items():
        error = result["stderr"].get(name)
        number = "undefined, all predictions or labels are equal" if value is None else f"{value:.4f}"
        lines.append(f"  {name}: {number}" + (f" ± {error:.4f}" if error is not None else ""))
    if "majority" in result:
        lines.append(f"  (accuracy of the most frequent label: {result['majority']:.4f})")
    if result["left_out"]:
        lines.append(f"  left out of training: {result['left_out']} questions without an answer at `answer_start`")
    return lines
