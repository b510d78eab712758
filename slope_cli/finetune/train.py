"""`slope finetune`: a pretrained BERT, dense or sparse, trained on a task of GLUE or on SQuAD v1.1, and judged on dev.

OUT/result.json       settings, numbers and versions; written last, so that there is one only of what is finished
OUT/metrics.jsonl     a line for each step
OUT/predictions.jsonl a line for each row or question of dev

Shape letters: B rows of a batch, T tokens, L classes.
"""

import contextlib
import copy
import difflib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import slope_cli
from slope_cli.checkpoint import load
from slope_cli.config.load import flat
from slope_cli.config.schema import MAX_SEED, Config, OptimConfig
from slope_cli.data.sources import needed
from slope_cli.data.tokenizer import masking_ids
from slope_cli.distributed.launch import pick_device, require_one_process
from slope_cli.errors import SlopeError, UsageError
from slope_cli.finetune import examples, glue, squad
from slope_cli.finetune.examples import Example, Job
from slope_cli.methods import optim
from slope_cli.models import shapes
from slope_cli.models.loss import autocast
from slope_cli.report import metrics
from slope_cli.report.progress import Progress
from slope_cli.utils import files
from slope_cli.utils.environment import package_version, source_version
from sparse_kernels import masked_layers, set_backend, sparse_layers

RESULT, PREDICTIONS, FOLDER = "result.json", "predictions.jsonl", "finetune"
SQUAD = "SQuAD"
SQUAD_FILES = {"train": "train-v1.1.json", "dev": "dev-v1.1.json"}
HUB_SPLITS = {"train": "train", "dev": "validation"}
FEWEST_TOKENS = 8
"""The shortest sequence that holds two short texts and their special tokens."""
WARMUP, WEIGHT_DECAY, CLIP = 0.1, 0.01, 1.0
LOG_EVERY = 50


@dataclass(frozen=True)
class Settings:
    """What a fine-tuning is a function of, beside the model and the rows."""

    task: str
    epochs: int
    lr: float
    batch: int
    seq_len: int
    seed: int


def finetune(
    folder: Path,
    task: str,
    *,
    data: Path | None = None,
    out: Path | None = None,
    epochs: int | None = None,
    lr: float = 3e-5,
    batch: int | None = None,
    seq_len: int | None = None,
    seed: int = 1,
) -> dict[str, Any]:
    """Train on a task's training rows and judge on its dev rows.

    AdamW (weight decay 0.01 on matrices), linear warm-up over a tenth of the steps and linear decay to 0, gradients
    clipped at norm 1, dropout as in the model's config; bf16 autocast on a GPU. Sparse layers stay what they are: both
    masks as they were, only values and adapters are trained, the input gradient double-pruned.

    The defaults are the usual ones for BERT. The paper's for GLUE are `lr=2.4e-6, batch=4`; SQuAD's are the paper's.

    Args:
        folder: a BERT run, or an exported one.
        task: CoLA, SST-2, MRPC, STS-B, RTE or SQuAD, in any spelling.
        data: the folder of the official files: [TASK/]train.tsv and dev.tsv, or train-v1.1.json and dev-v1.1.json;
            None for the Hugging Face hub.
        out: None for FOLDER/finetune/TASK-SEED. A finished fine-tuning that is there is returned as it is, an
            interrupted one is done again.
        epochs: None for 3, of CoLA 5, of SQuAD 2.
        batch: None for 32, of SQuAD 24.
        seq_len: longest input in tokens; None for 128, of SQuAD 384.

    Returns:
        What result.json holds.

    Raises:
        UsageError: unknown task, no BERT, bad settings or rows, or something else is in `out`.
        SlopeError: no sound checkpoint, a loss that is not finite, a full disk.
    """
    require_one_process()
    name = find_task(task)
    is_squad = name == SQUAD
    settings = Settings(
        task=name,
        epochs=(2 if is_squad else glue.TASKS[name].epochs) if epochs is None else epochs,
        lr=lr,
        batch=(24 if is_squad else 32) if batch is None else batch,
        seq_len=(384 if is_squad else 128) if seq_len is None else seq_len,
        seed=seed,
    )
    _check_settings(settings)
    device = pick_device("auto")
    found = load.load(folder, device)
    if found.objective != "masked":
        kind = found.model.config.model_type
        raise UsageError(f"{folder}: holds a {kind} model; only BERT is fine-tuned, such as one of bert-base")
    positions = shapes.max_seq_len(found.model.config)
    if settings.seq_len > positions:
        raise UsageError(f"--seq-len {settings.seq_len}: the model has only {positions} positions; set it lower")
    out = out or folder / FOLDER / f"{name}-{seed}"
    rows, source = _load_rows(name, data)
    with _claimed(out):
        described = {"run": folder.resolve().name, "step": found.step, "settings": asdict(settings), "data": source}
        if (out / RESULT).is_file():
            return _finished(out, described)
        texts = (found.tokenizer, masking_ids(found.tokenizer), settings.seq_len)
        job = squad.job(rows, *texts) if is_squad else glue.job(name, rows, *texts)
        return _run(job, settings, found, device, out, described)


def find_task(name: str) -> str:
    """The task of this name in any spelling, such as `sst2` for SST-2; UsageError with a suggestion."""
    known = (*glue.TASKS, SQUAD)
    plain = {_letters(task): task for task in known}
    if _letters(name) in plain:
        return plain[_letters(name)]
    near = difflib.get_close_matches(_letters(name), plain, n=1)
    hint = f"did you mean {plain[near[0]]}?" if near else f"known are {', '.join(known)}"
    raise UsageError(f"unknown task {name!r}; {hint}")


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _check_settings(s: Settings) -> None:
    for option, value, least in (
        ("--epochs", s.epochs, 1),
        ("--batch", s.batch, 1),
        ("--seq-len", s.seq_len, FEWEST_TOKENS),
    ):
        if value < least:
            raise UsageError(f"{option} {value}: must be at least {least}")
    if not (math.isfinite(s.lr) and s.lr > 0):
        raise UsageError(f"--lr {s.lr}: must be positive")
    if not 0 <= s.seed <= MAX_SEED:
        raise UsageError(f"--seed {s.seed}: must be 0 or more and below 2^63")


# ------------------------------------------------------------------------------------------------ the folder


def _claimed(out: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the folder for this process; UsageError if it holds something else, or another process has it."""
    own = {RESULT, PREDICTIONS, metrics.JSONL, ".lock", *(f".{name}.tmp" for name in (RESULT, PREDICTIONS))}
    try:
        out.mkdir(parents=True, exist_ok=True)
        foreign = sorted(path.name for path in out.iterdir() if path.name not in own)
    except OSError as error:
        raise UsageError(f"cannot fine-tune in {out}: {error.strerror}") from None
    if foreign:
        raise UsageError(f"{out} holds something else than a fine-tuning (there is {foreign[0]}); choose another --out")
    return files.held_folder(out)


def _finished(out: Path, described: dict[str, Any]) -> dict[str, Any]:
    """The result that is there, if it is of the same model, rows and settings; UsageError if not."""
    try:
        result: dict[str, Any] = json.loads((out / RESULT).read_text())
    except ValueError:
        raise SlopeError(f"{out / RESULT}: damaged, not JSON; remove it to fine-tune again") from None
    before, now = flat({key: result.get(key) for key in described}), flat(described)
    changed = [f"{key}: {before.get(key)} -> {now.get(key)}" for key in now if before.get(key) != now[key]]
    if changed:
        raise UsageError(f"{out} holds another fine-tuning ({'; '.join(changed)}); choose another --out")
    return result


# -------------------------------------------------------------------------------------------------- the rows


def _load_rows(task: str, data: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of train and dev, and what the result says of where they come from."""
    if data is None:
        return _hub_rows(task)
    if task == SQUAD:
        paths = {split: data / name for split, name in SQUAD_FILES.items()}
        rows: dict[str, Any] = {split: squad.read_questions(path) for split, path in paths.items()}
    else:
        folder = data / task if (data / task).is_dir() else data
        paths = {split: folder / f"{split}.tsv" for split in HUB_SPLITS}
        rows = {split: glue.read_rows(task, path) for split, path in paths.items()}
    return rows, {split: files.file_sha256(path) for split, path in paths.items()}


def _hub_rows(task: str) -> tuple[dict[str, Any], dict[str, Any]]:
    name, configuration = (squad.HUB, None) if task == SQUAD else (glue.HUB, glue.TASKS[task].hub)
    datasets = needed("datasets", f"to read {name} from the Hugging Face hub (or give the official files with --data)")
    rows: dict[str, Any] = {}
    for split, theirs in HUB_SPLITS.items():
        try:
            records: Iterable[Mapping[str, Any]] = datasets.load_dataset(name, configuration, split=theirs)
        except Exception as error:  # hub, HTTP, config and split errors share no base class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"{name}: not to be had from the Hugging Face hub ({reason}); give the official files with --data"
            ) from error
        read = squad.hub_questions(records, theirs) if task == SQUAD else glue.hub_rows(task, records, theirs)
        rows[split] = read
    return rows, {"hub": name if configuration is None else f"{name} {configuration}"}


# ------------------------------------------------------------------------------------------------- the model


def build(model: PreTrainedModel, task: str, outputs: int, seed: int) -> PreTrainedModel:
    """A BertForSequenceClassification, or for SQuAD a BertForQuestionAnswering, that takes over the model's `.bert`.

    The encoder is not copied: sparse layers, adapters and all are the model's own. Question answering uses no pooler,
    which is dropped. The new head is drawn from `seed`: normal with the config's initializer_range, biases 0.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = outputs
    is_squad = task == SQUAD
    name, head = (
        ("BertForQuestionAnswering", "qa_outputs") if is_squad else ("BertForSequenceClassification", "classifier")
    )
    with torch.device("meta"):  # only a frame: nothing of it is kept but its code
        framed: PreTrainedModel = getattr(transformers, name)(config)
    bert: Any = model.bert
    if is_squad:
        bert.pooler = None
    linear = nn.Linear(config.hidden_size, outputs)
    with torch.no_grad():
        linear.weight.normal_(0, config.initializer_range, generator=torch.Generator().manual_seed(seed))
        linear.bias.zero_()
    framed.bert = bert
    setattr(framed, head, linear.to(next(bert.parameters()).device))
    return framed


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """float32: (B, L), or for question answering (B, 2, T), where padding has minus infinity."""
    output = model(**inputs)
    if "logits" in output:
        logits: Tensor = output.logits.float()
        return logits
    spans_B2T = torch.stack([output.start_logits, output.end_logits], 1).float()
    return spans_B2T.masked_fill(inputs["attention_mask"][:, None] == 0, -math.inf)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of classes, or of the two ends of answers; of a single output the mean squared error.

    logits (B, L) or (B, 2, T), targets (B, 1) or (B, 2), float32.
    """
    if logits.dim() == 3:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())
    if logits.shape[1] == 1:
        return F.mse_loss(logits, targets)
    return F.cross_entropy(logits, targets[:, 0].long())


# -------------------------------------------------------------------------------------------------- training


def _run(
    job: Job,
    settings: Settings,
    found: load.Pretrained,
    device: torch.device,
    out: Path,
    described: dict[str, Any],
) -> dict[str, Any]:
    """Train, judge, and write all of the folder, the result last."""
    if device.type == "cuda":
        backend = "auto" if found.config is None else found.config.sparsity.backend
        try:
            set_backend(backend)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise UsageError(f"sparsity.backend={backend}: {error}") from None
    model = build(found.model, settings.task, job.outputs, settings.seed)
    started = time.monotonic()
    steps, loss = _train(model, job.train, settings, found.tokenizer.pad_token_id, out)
    numbers, lines = job.judge(_predict(model, job.dev, settings, found.tokenizer.pad_token_id))
    _write(out / PREDICTIONS, "".join(json.dumps(line) + "\n" for line in lines))
    result = {
        **described,
        **job.facts,
        **numbers,
        "steps": steps,
        "train_loss": loss,
        "sparse_layers": len([*sparse_layers(model), *masked_layers(model)]),
        "seconds": round(time.monotonic() - started, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": "bf16" if device.type == "cuda" else "fp32",
        "versions": _versions(),
    }
    _write(out / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _versions() -> dict[str, Any]:
    packages = ("torch", "transformers", "tokenizers", "numpy")
    versions = {name: package_version(name) for name in packages}
    return {"slope": slope_cli.__version__, "source": source_version(), **versions}


def _write(path: Path, text: str) -> None:
    with files.atomic_file(path) as file:
        file.write(text.encode())


def _train(model: nn.Module, examples: list[Example], s: Settings, pad: int, out: Path) -> tuple[int, float]:
    """Train in place; the number of steps, and the mean loss of the last tenth of them.

    Raises:
        SlopeError: a loss or gradient is not finite; that step updated nothing.
    """
    config = OptimConfig(lr=s.lr, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY, schedule="linear", min_lr=0.0)
    for _, layer in masked_layers(model):
        layer.straight_through = False  # masks stay as they are
    optimizer = optim.build_optimizer(model, Config(method="dense", optim=config))
    device, losses = next(model.parameters()).device, []
    batches = list(order(len(examples), s))
    log = metrics.MetricsLog(out, 0, tensorboard=False)
    progress = Progress(0, len(batches), LOG_EVERY, 0)
    torch.manual_seed(s.seed)  # of dropout
    model.train()
    try:
        for step, indices in enumerate(batches):
            started = time.perf_counter()
            # The schedule of one step more, whose rate of 0 would only be a step lost.
            lr = optim.learning_rate(step, len(batches) + 1, WARMUP, s.lr, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            inputs = _inputs([examples[index] for index in indices], s, pad, device)
            targets = torch.tensor([examples[index].targets for index in indices], device=device)
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
            rate = inputs["input_ids"].numel() / (time.perf_counter() - started)
            progress.step(log.write("train", step + 1, **values, tokens_per_s=round(rate, 1)))
    finally:
        progress.close()
        log.close()
    return len(losses), float(np.mean(losses[-math.ceil(len(losses) / 10) :]))


def order(count: int, s: Settings) -> Iterator[NDArray[np.int64]]:
    """The rows of each step: every row once an epoch, in an order that depends on (seed, epoch) alone.

    A batch may span two epochs, so that all but the last have the same size.
    """
    epochs = [np.random.default_rng([s.seed, epoch]).permutation(count) for epoch in range(s.epochs)]
    rows = np.concatenate(epochs)
    return (rows[start : start + s.batch] for start in range(0, len(rows), s.batch))


def _predict(model: nn.Module, examples: list[Example], s: Settings, pad: int) -> list[NDArray[np.float32]]:
    """The logits of each example, without dropout."""
    device, logits = next(model.parameters()).device, []
    model.eval()
    with torch.no_grad(), autocast(device):
        for start in range(0, len(examples), s.batch):
            part = examples[start : start + s.batch]
            logits += list(_logits(model, _inputs(part, s, pad, device)).cpu().numpy())
    return logits


def _inputs(part: Sequence[Example], s: Settings, pad: int, device: torch.device) -> dict[str, Tensor]:
    # On a GPU all batches have one shape: the kernel library searches its algorithms anew for each number of tokens.
    arrays = examples.batch(part, pad, s.seq_len if device.type == "cuda" else None)
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


# ----------------------------------------------------------------------------------------------- what is said


def lines(result: Mapping[str, Any]) -> list[str]:
    """The result in words, for standard output."""
    task, epochs, steps = result["settings"]["task"], result["settings"]["epochs"], result["steps"]
    rows = f"{result['n_train']:,} training {'questions' if task == SQUAD else 'rows'}, on {result['n']:,} of dev"
    said = [f"{task} after {epochs} epoch{'s' * (epochs > 1)} ({steps:,} steps) of {rows}:"]
    for name, value in result["metric"].items():
        error = result["stderr"].get(name)
        number = "not defined, all predictions are equal" if value is None else f"{value:.4f}"
        said.append(f"  {name}: {number}" + (f" ± {error:.4f}" if error is not None else ""))
    if "majority" in result:
        said.append(f"  (accuracy of the most frequent label alone: {result['majority']:.4f})")
    if result.get("left_out"):
        said.append(f"  left out of training: {result['left_out']} questions whose answer is not where the file says")
    return said
