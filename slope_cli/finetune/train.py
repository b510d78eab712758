"""`slope finetune`: train a pretrained BERT, dense or sparse, on a task of GLUE or on SQuAD v1.1; evaluate it on dev.

OUT/predictions.jsonl, a line for each row of dev, stands beside what `loop` writes.

Shape letters: B examples of a batch, T tokens, L outputs of the head.
"""

import copy
import json
import math
from collections.abc import Mapping, Sequence
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
from slope_cli.distributed.launch import pick_device, require_one_process
from slope_cli.errors import UsageError, did_you_mean, first_line
from slope_cli.finetune import glue, loop, squad
from slope_cli.finetune.examples import Example, Logits, Task, collate
from slope_cli.finetune.loop import Settings
from slope_cli.models.loss import autocast
from slope_cli.report.tables import counted
from slope_cli.utils import files

TASKS: dict[str, Task] = {task.name: task for task in (*glue.TASKS, squad.SQUAD)}
PREDICTIONS = "predictions.jsonl"


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
    out = out or loop.default_folder(folder, task.name, seed)
    return loop.finished(loaded, settings, source, out, PREDICTIONS, lambda: _run(rows, settings, loaded, out))


def _load_bert(folder: Path, seq_len: int) -> Loaded:
    """UsageError for a model that cannot be fine-tuned, or not on inputs of this length."""
    hf_folder.require_trainable(folder)
    loaded = load_model(folder, pick_device("auto"))
    if loaded.objective != "masked":
        kind = loaded.model.config.model_type
        raise UsageError(
            f"{folder}: contains a {kind} model; only BERT can be fine-tuned on it, others with {loop.SFT}"
        )
    loop.require_positions(loaded.model, seq_len)
    return loaded


def find_task(name: str) -> Task:
    """The task of this name in any spelling, such as `sst2` for SST-2; UsageError with a suggestion."""
    for task in TASKS.values():
        if _letters(task.name) == _letters(name):
            return task
    raise UsageError(f"unknown task {name!r}; {did_you_mean(name, [*TASKS, loop.SFT])}")


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


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


def _run(rows: dict[str, list[Any]], s: Settings, loaded: Loaded, out: Path) -> dict[str, Any]:
    """Train, evaluate on dev, and write the predictions."""
    task, pad = TASKS[s.task], loaded.tokenizer.pad_token_id
    trainable = task.trainable(rows["train"])
    train, dev = (task.examples(part, loaded.tokenizer, s.seq_len) for part in (trainable, rows["dev"]))
    model = build(loaded.model, task, s.seed)
    losses = _train(model, train, s, pad, out)
    scores, predictions = task.evaluate(rows["dev"], dev, _predict(model, dev, s, pad))
    with files.atomic_file(out / PREDICTIONS) as file:
        file.writelines(json.dumps(prediction).encode() + b"\n" for prediction in predictions)
    return {
        "n_train": len(trainable),
        "left_out": len(rows["train"]) - len(trainable),
        "n": len(rows["dev"]),
        "examples": {"train": len(train), "dev": len(dev)},
        **scores,
        **loop.facts(model, losses),
    }


def _train(model: nn.Module, examples: list[Example], s: Settings, pad: int, out: Path) -> list[float]:
    """Train in place, and return the loss of each step; raises as `loop.train`."""
    device = next(model.parameters()).device

    def step(indices: NDArray[np.int64]) -> tuple[float, int]:
        batch = [examples[index] for index in indices]
        inputs = _inputs(batch, s, pad, device)
        targets = torch.tensor([example.targets for example in batch], device=device)
        with autocast(device):
            loss = loss_of(_logits(model, inputs), targets)
        torch.autograd.backward(loss)
        return loss.item(), inputs["input_ids"].numel()

    return loop.train(model, len(examples), s, step, out)


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
    settings = result["settings"]
    lines = [
        f"{settings['task']} after {counted(settings['epochs'], 'epoch')} ({counted(result['steps'], 'step')}) "
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
