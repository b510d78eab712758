"""What a trained model is worth: perplexity on a prepared data set, and zero-shot tasks.

Shape suffixes: B sequences, T positions, V vocabulary.
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import slope_cli
from slope_cli.checkpoint import load, run_folder
from slope_cli.checkpoint.load import Pretrained
from slope_cli.config import schema
from slope_cli.data.batches import IGNORED, Batch, val_batches
from slope_cli.data.dataset import NO_VALIDATION, Dataset, open_dataset
from slope_cli.data.token_file import TokenFile
from slope_cli.data.tokenizer import load_tokenizer, masking_ids, require_same_tokens
from slope_cli.distributed.launch import pick_device
from slope_cli.errors import SlopeError, UsageError
from slope_cli.evaluate import lm_tasks
from slope_cli.linearize.settings import BRANCHES
from slope_cli.linearize.swap import linear_windows, using
from slope_cli.models import shapes
from slope_cli.models.loss import autocast
from slope_cli.utils import files
from slope_cli.utils.environment import package_version, source_version
from sparse_kernels import set_backend
from sparse_kernels.packed import backend

LONGEST = 1024
"""Tokens of a block for a folder that does not say what its model was trained on."""
BATCH = 8
REQUESTS = 16
NARROWEST = 64
"""Positions of the first bucket; each later one ends at twice the position."""


class Blocks(NamedTuple):
    """What the blocks of one source's text cost: summed loss in nats, and predicted tokens, of each block; and the same
    of each position, over all blocks."""

    nats: list[float]
    counts: list[int]
    nats_at: list[float]
    counts_at: list[int]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return sum(self.nats) / sum(self.counts)

    def variance(self) -> float:
        """Of the summed loss, from how the blocks differ; NaN for a single block."""
        number = len(self.nats)
        if number < 2:
            return math.nan
        squares = sum((n - self.loss * count) ** 2 for n, count in zip(self.nats, self.counts, strict=True))
        return squares * number / (number - 1)


def evaluate(
    folder: Path,
    *,
    data_folder: Path | None = None,
    perplexity: bool = True,
    tokens: int | None = None,
    seq_len: int | None = None,
    task_names: Sequence[str] = (),
    task_data: Path | None = None,
    limit: int | None = None,
    batch: int | None = None,
    branch: str | None = None,
    out: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, or a folder with a model of transformers, such as `slope export` writes.

    Sparse layers stay sparse, and adapters are part of the model. On a GPU in bf16, else in float32.

    Args:
        data_folder: prepared data whose validation text is taken; None for the run's own.
        perplexity: False leaves it out.
        tokens: at most so many tokens of each source, evenly spaced; None for all blocks.
        seq_len: tokens of a block; None for the run's own, or 1,024 at most.
        task_names: of slope_cli.tasks.LAYOUTS.
        task_data: a folder with rows, see `tasks.load`; None for the hub.
        limit: at most so many rows of each task, the first ones (of MMLU: of each subject).
        batch: sequences at a time; None for the run's own, and 16 requests of a task.
        branch: of a linearized model, which weights of its attention count: "both", "window" or "linear".
        out: a file that the result is written to, as JSON.

    Returns:
        run or folder (its name), step, objective, branch if it was given, perplexity (see `measure`) or None, tasks
        (see `tasks.score`), versions.

    Raises:
        UsageError: no run and no model, a branch that is none or of a model that has none, other data than the model's
            tokenizer made or ids that it has no rows for, no validation text, a block longer than the positions, tasks
            with a masked model, and what `tasks.load` raises.
        SlopeError: no sound checkpoint, damaged data, a loss that is not finite, `out` cannot be written.
    """
    if not perplexity and not task_names:
        raise UsageError("nothing to evaluate: give --tasks, or leave out --no-perplexity")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UsageError(f"--out {out}: " + ("is a folder; name a file" if out.is_dir() else "its folder is missing"))
    names = lm_tasks.check_names(task_names)
    subject = load.load(folder, pick_device(device))
    if names and subject.objective == "masked":
        raise UsageError(f"{folder}: predicts masked tokens, not the next one; --tasks needs a causal model")
    dataset = _dataset(subject, data_folder) if perplexity else None
    ready = lm_tasks.load(names, task_data) if names else []
    result: dict[str, Any] = {"folder" if subject.config is None else "run": folder.resolve().name}
    result |= {"step": subject.step, "objective": subject.objective, "perplexity": None, "tasks": {}}
    result |= {"branch": branch} if branch else {}
    with _products_by_cublas(subject.model), _counting(subject, branch):
        if dataset is not None:
            result["perplexity"] = measure(subject, dataset, tokens=tokens, seq_len=seq_len, batch=batch)
        if ready:
            lm = _harness(subject, batch or REQUESTS)
            result["tasks"] = {task.name: lm_tasks.score(lm, task, limit) for task in ready}
    result["versions"] = _versions(subject.model.device)
    if out is not None:
        with files.atomic_file(out) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
    return result


def _counting(subject: Pretrained, branch: str | None) -> contextlib.AbstractContextManager[Any]:
    """Within it only this branch of a linearized model counts."""
    if branch is None:
        return contextlib.nullcontext()
    if branch not in BRANCHES:
        raise UsageError(f"--branch {branch}: choose one of {', '.join(BRANCHES)}")
    if not linear_windows(subject.model):
        raise UsageError(f"{subject.folder}: is not linearized, so it has no branches; leave out --branch")
    return using(subject.model, branch=branch)


@contextlib.contextmanager
def _products_by_cublas(model: PreTrainedModel) -> Iterator[None]:
    """Within it, sparse layers on a GPU multiply by their masked copies with cuBLAS.

    The requests of a task have all lengths, and each would want a plan of its own from the sparse library.
    """
    before = backend()
    if model.device.type == "cuda" and before != "reference":
        set_backend("dense")
    try:
        yield
    finally:
        if backend() != before:
            set_backend(before)


def _harness(subject: Pretrained, batch: int) -> Any:
    """lm-eval's wrapper of the model."""
    from lm_eval.models.huggingface import HFLM

    tokenizer, on_gpu = subject.tokenizer, subject.model.device.type == "cuda"
    # Only what lm-eval would not find by itself: its own choice is the beginning or the end of a text.
    has_ends = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
    precision = {"mixed_precision_dtype": "bfloat16", "softmax_dtype": "float32"} if on_gpu else {}
    with lm_tasks.quiet():
        return HFLM(
            pretrained=subject.model,
            tokenizer=tokenizer,
            batch_size=batch,
            prefix_token_id=None if has_ends else tokenizer.sep_token_id,
            **precision,
        )


def _versions(device: torch.device) -> dict[str, Any]:
    packages = ("torch", "transformers", "tokenizers", "lm_eval")
    found = {name: version for name in packages if (version := package_version(name))}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"slope": slope_cli.__version__, "source": source_version(), **found, "device": device.type, "gpu": gpu}


# ------------------------------------------------------------------------------------------------------ perplexity


def _dataset(subject: Pretrained, given: Path | None) -> Dataset:
    """The data set to take validation text from, if the model's tokenizer made it."""
    if given is None and subject.config is None:
        raise UsageError(f"{subject.folder}: is no run with data of its own; give --data, or --no-perplexity")
    folder = given or run_folder.data_folder(subject.config, subject.folder)  # type: ignore[arg-type]
    dataset = open_dataset(folder)
    rows = shapes.vocab_size(subject.model.config)
    for file in dataset.val.values():
        if file.header.max_id >= rows:
            raise UsageError(f"{file.path}: token id {file.header.max_id} is above the model's vocabulary of {rows}")
    made_with = load_tokenizer(str(folder / "tokenizer"))
    require_same_tokens(str(folder), made_with, str(subject.folder), subject.tokenizer)
    return dataset


def measure(
    subject: Pretrained, dataset: Dataset, *, tokens: int | None, seq_len: int | None, batch: int | None
) -> dict[str, Any]:
    """The loss of a model on the validation text of a data set, over all of it and by source.

    The blocks are those of validation in training, and for a masked model so are the masked tokens: the rest of a
    source after its last whole block is left out.

    Returns:
        loss (nats per token), its standard error over blocks (None for a single block), perplexity, tokens (predicted
        ones), blocks, positions (loss, perplexity and tokens of buckets of the inputs' positions in a block, "first" to
        "last"); for a causal model nats_per_byte and bits_per_byte of the text, which can be compared between
        vocabularies; all this also for each of `sources`; seq_len; `data`, the fingerprint of the data set.

    Raises:
        UsageError: no validation text, or seq_len is beyond the positions.
        SlopeError: a loss that is not finite.
    """
    config = subject.config or schema.Config()
    positions = shapes.max_seq_len(subject.model.config)
    own = min(positions, LONGEST) if subject.config is None else config.train.seq_len
    length = seq_len or own
    if length > positions:
        raise UsageError(f"--seq-len {length}: the model has only {positions} positions")
    masking = masking_ids(subject.tokenizer) if subject.objective == "masked" else None
    size = batch or (BATCH if subject.config is None else config.train.micro_batch)
    found = {}
    for source, file in dataset.val.items():
        batches = val_batches(
            file,
            seq_len=length,
            tokens=tokens or file.header.tokens,
            micro_batch=size,
            masking=masking,
            seed=subject.seed,
        )
        if (blocks := _blocks(subject, batches)).counts:
            found[source] = blocks
            print(f"{source}: {sum(blocks.counts):,} tokens, loss {blocks.loss:.4f}", file=sys.stderr)
    if not found:
        raise UsageError(f"{dataset.folder}: has no validation text, {NO_VALIDATION}")
    ratios = {source: _bytes_per_token(dataset.val[source], subject.objective) for source in found}
    summaries = {source: _summary([blocks], [ratios[source]]) for source, blocks in found.items()}
    whole = _summary(list(found.values()), list(ratios.values()))
    return whole | {"sources": summaries, "seq_len": length, "data": dataset.fingerprint}


def _bytes_per_token(file: TokenFile, objective: shapes.Objective) -> float | None:
    """Bytes of the text that the tokens of a file were made of; None where not known, and where only some are read."""
    if objective == "masked" or not file.header.text_bytes:
        return None
    return file.header.text_bytes / file.header.tokens


def _blocks(subject: Pretrained, batches: Iterator[Batch]) -> Blocks:
    device, parts = subject.model.device, []
    with torch.no_grad(), autocast(device):
        for batch in batches:
            tensors = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
            nats_BT, counted_BT = _token_losses(subject, tensors)
            parts.append((nats_BT.sum(1), counted_BT.sum(1), nats_BT.sum(0), counted_BT.sum(0)))
    if not parts:
        return Blocks([], [], [], [])
    nats, counts, nats_at, counts_at = zip(*parts, strict=True)
    by_block = (torch.cat(column).tolist() for column in (nats, counts))
    by_position = (torch.stack(column).sum(0).tolist() for column in (nats_at, counts_at))
    blocks = Blocks(*by_block, *by_position)
    if not all(map(math.isfinite, blocks.nats)):
        raise SlopeError(f"{subject.folder}: the loss is not finite")
    return blocks


def _token_losses(subject: Pretrained, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss in nats, float64, 0 where nothing is predicted; and whether something is: both (B, T)."""
    labels_BT = batch["labels"]
    if subject.objective == "masked":
        logits_BTV = subject.model(
            input_ids=batch["input_ids"], token_type_ids=batch["token_type_ids"]
        ).prediction_logits
    else:
        logits_BTV = subject.model(input_ids=batch["input_ids"], use_cache=False).logits
    losses = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(labels_BT).double(), labels_BT != IGNORED


def _summary(sources: Sequence[Blocks], ratios: Sequence[float | None]) -> dict[str, Any]:
    """What the blocks of some sources say together. The sources are not a sample: only blocks within one vary."""
    nats, count = sum(sum(blocks.nats) for blocks in sources), sum(sum(blocks.counts) for blocks in sources)
    error = math.sqrt(sum(blocks.variance() for blocks in sources)) / count
    loss = nats / count
    summary: dict[str, Any] = {
        "loss": loss,
        "stderr": error if math.isfinite(error) else None,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": count,
        "blocks": sum(len(blocks.counts) for blocks in sources),
        "positions": _positions(sources),
    }
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) == len(sources):
        size = sum(sum(blocks.counts) * ratio for blocks, ratio in zip(sources, known, strict=True))
        summary |= {"nats_per_byte": nats / size, "bits_per_byte": nats / size / math.log(2)}
    return summary


def _positions(sources: Sequence[Blocks]) -> list[dict[str, Any]]:
    """Loss by position; buckets in which nothing is predicted are left out."""
    nats_T = [sum(column) for column in zip(*(blocks.nats_at for blocks in sources), strict=True)]
    counts_T = [sum(column) for column in zip(*(blocks.counts_at for blocks in sources), strict=True)]
    found, first = [], 0
    while first < len(nats_T):
        end = min(max(2 * first, NARROWEST), len(nats_T))
        if count := sum(counts_T[first:end]):
            loss = sum(nats_T[first:end]) / count
            row = {"first": first, "last": end - 1, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}
            found.append(row | {"tokens": count})
        first = end
    return found


# ----------------------------------------------------------------------------------------------------- the report


def lines(result: dict[str, Any], *, positions: bool = False) -> list[str]:
    """A result of `evaluate` as text; positions: with the loss by position, of all sources together."""
    where = f"{result.get('run') or result.get('folder')}" + (f", step {result['step']}" if result["step"] else "")
    where += f", branch {result['branch']}" if "branch" in result else ""
    text = [where]
    if (found := result["perplexity"]) is not None:
        text.append(f"validation text, blocks of {found['seq_len']} tokens; loss in nats per {_unit(result)}")
        named = found["sources"] if len(found["sources"]) > 1 else {}
        text += [_perplexity_line(name, row) for name, row in [*named.items(), ("all", found)]]
        if positions:
            text += [_perplexity_line(f"{row['first']}-{row['last']}", row) for row in found["positions"]]
    if scores := result["tasks"]:
        text += ["zero-shot, by lm-eval", *(_task_line(name, row) for name, row in scores.items())]
        if guessed := [name for name, row in scores.items() if not row["above_chance"]]:
            text.append(
                f"near chance (not two standard errors above a guess), as small models are: {', '.join(guessed)}"
            )
        text += [
            f"{name}: {row['truncated']:,} of {row['n']:,} rows are longer than the model's positions; "
            "their beginning was left out"
            for name, row in scores.items()
            if row["truncated"]
        ]
    return text


def _unit(result: dict[str, Any]) -> str:
    return "masked token" if result["objective"] == "masked" else "token"


def _perplexity_line(name: str, row: dict[str, Any]) -> str:
    text = f"  {name:16} loss {_with_error(row['loss'], row.get('stderr'))}  perplexity {row['perplexity']:,.2f}"
    if "bits_per_byte" in row:
        text += f"  bits per byte {row['bits_per_byte']:.4f}"
    return f"{text}  ({row['tokens']:,} tokens)"


def _task_line(name: str, row: dict[str, Any]) -> str:
    text = f"  {name:16} acc {_with_error(row['acc'], row['acc_stderr'])}"
    if "acc_norm" in row:
        text += f"  acc_norm {_with_error(row['acc_norm'], row['acc_norm_stderr'])}"
    return f"{text}  chance {row['chance']:.4f}  ({row['n']:,} rows, {row['split']})"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
