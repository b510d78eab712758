"""The training loop.

A step is a pure function of the weights, the optimizer's state and the step's number: its batch comes from
slope_cli.data, and every random draw in it (dropout) from a generator seeded by (seed, step). So a checkpoint needs no
random state, and a resumed run repeats an uninterrupted one bit for bit on the same device.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.checkpoint import run_folder, run_model, store
from slope_cli.config import schema
from slope_cli.config.schema import Config, TrainConfig
from slope_cli.data.batches import (
    Ahead,
    Batch,
    Blocks,
    MaskingIds,
    bigram_loss,
    causal_batch,
    masked_batch,
    sample_indices,
    sample_numbers,
    val_batches,
)
from slope_cli.data.dataset import MANIFEST, NO_VALIDATION, Dataset, open_dataset
from slope_cli.data.prepare import prepare
from slope_cli.data.tokenizer import load_tokenizer, masking_ids, save_tokenizer
from slope_cli.distributed.launch import pick_device, require_one_process
from slope_cli.distributed.signals import StopFlag, Stopped
from slope_cli.errors import SlopeError, UsageError
from slope_cli.inference.generate import continue_text, prompt_ids
from slope_cli.linearize.swap import linear_windows, using
from slope_cli.methods import optim, phases
from slope_cli.models import shapes
from slope_cli.models.build import run_model_config
from slope_cli.models.loss import Loss, batch_loss
from slope_cli.report import metrics, plots
from slope_cli.report.progress import Progress
from slope_cli.train import init
from slope_cli.train.linearize_steps import DistillStep, Transferred, TransferStep
from slope_cli.train.step import Renewal, Step, Taken, eager
from slope_cli.utils.environment import note_environment
from sparse_kernels import Report, backends, set_backend, sparse_layers

BIGRAM_LIMIT = 4096
"""Vocabularies up to this size are compared with a bigram model."""


@dataclass
class Trainer:
    """What the steps of a run share."""

    config: Config
    run: Path
    dataset: Dataset
    blocks: Blocks
    masking: MaskingIds | None
    tokenizer: PreTrainedTokenizerFast
    device: torch.device
    model: PreTrainedModel
    stage: phases.Stage
    optimizer: torch.optim.Optimizer
    step: Step | TransferStep
    batches: Ahead


def pretrain(config: Config, run: Path, *, fresh: bool = False, stop: StopFlag | None = None) -> dict[str, Any]:
    """Train, or go on training, in the folder `run`.

    Args:
        fresh: refuse to go on with a run that is there.
        stop: one that is open already, so that it knows of signals that came before; else one is opened here.

    Returns:
        The last validation record, with `bigram_loss` where the vocabulary is small; of a run that linearizes with the
        perplexities of its `teacher`, and as `swapped` of itself before its first step.

    Raises:
        UsageError: the config does not fit the data, the machine, or what is in the folder.
        Stopped: a signal asked for it, and a checkpoint is saved.
        SlopeError: a non-finite loss, a damaged file, a full disk.
    """
    require_one_process()
    device = pick_device(config.train.device)
    opening = contextlib.nullcontext(stop) if stop else StopFlag()
    with run_folder.claimed(run, config, fresh=fresh), opening as stop, _own_precision():
        store.clean(run)
        note_environment(run, device)
        trainer = _prepare(config, run, device)
        step = _resume(trainer, run)
        run_folder.write_config(run, config)  # not before what is in the folder has turned out to fit
        print(_start_line(trainer, run), file=sys.stderr)
        tensorboard = config.log.tensorboard and step < config.train.steps
        log = metrics.MetricsLog(run, step, tensorboard=tensorboard)
        progress = Progress(step, config.train.steps, config.log.every, config.train.tokens_per_step)
        try:
            _fit(trainer, run, step, stop, log, progress)
        finally:
            trainer.batches.close()
            progress.close()
            log.close()
    return _summary(trainer, run)


@contextlib.contextmanager
def _own_precision() -> Iterator[None]:
    """Within it, the precision of float32 products may be set: what comes after in this process has its own again."""
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _fit(t: Trainer, run: Path, step: int, stop: StopFlag, log: metrics.MetricsLog, progress: Progress) -> None:
    """Take the steps from `step` to the last; after each, if `stop` is set, save a checkpoint and raise Stopped."""
    config, steps = t.config, t.config.train.steps
    t.model.train()
    first = step
    if config.method == "linearize" and step == 0:
        for kind, record in _references(t).items():
            log.write(kind, 1, **record)  # of the first step, not of none before: a restart must not write it twice
            progress.say(f"{kind}: validation loss {record['loss']:.4f}, perplexity {record['perplexity']:.2f}")
    while step < steps:
        if entered := phases.stage(config, step) != t.stage:
            kind, facts, text = _enter(t, phases.stage(config, step), calibrate=True)
            # The first step in the stage, not the last before: a checkpoint between the two must not keep this record.
            log.write(kind, step + 1, **facts)
            progress.say(f"step {step + 1}: {text}")
        started = time.perf_counter()
        lr = optim.set_learning_rates(t.optimizer, step, config)
        taken = _train_step(t, step)
        if (entered or step == first) and (products := _products(t.model)):
            log.write("products", step + 1, **products)
            progress.say(f"step {step + 1}: products of the sparse layers: {products}")
        step += 1
        kind, values = _step_record(t, step, taken, time.perf_counter() - started)
        progress.step(log.write(kind, step, lr=lr, **values))

        last = step == steps
        # The end of a transfer is worth knowing, and no later validation tells of it.
        ends = config.method == "linearize" and step == config.adapter_step
        if last or ends or _due(step, config.log.val_every):
            record = log.write("val", step, **_validate(t))
            progress.say(f"step {step}: validation loss {record['loss']:.4f}, perplexity {record['perplexity']:.2f}")
        if (last or _due(step, config.log.sample_every)) and t.masking is None:
            prompt, count = config.log.sample_prompt, config.log.sample_tokens
            with eager():
                text = continue_text(t.model, t.tokenizer, prompt, tokens=count, seed=config.train.seed)
            progress.say(f"step {step}: {log.write('sample', step, text=text)['text']!r}")
        stopped_by = "" if last else stop.name  # read once: a signal from here on is for the next step
        if last or stopped_by or _due(step, config.log.save_every):
            log.sync()
            _save(t, run, step, must=last or bool(stopped_by), progress=progress)
        if stopped_by:
            raise Stopped(f"stopped by {stopped_by} after step {step}, checkpoint saved; run the same command to go on")


def _products(model: PreTrainedModel) -> dict[str, int]:
    """On a GPU, how many of the sparse layers' two products run as what: the kernel library's, or cuBLAS's dense."""
    choices = [choice for layer in backends(model) for choice in (layer.forward, layer.input_grad) if choice]
    counts = {"cusparselt": sum(choice.sparse for choice in choices)}
    return {**counts, "dense": len(choices) - counts["cusparselt"]} if choices else {}


def _step_record(
    t: Trainer, step: int, taken: Taken | Transferred, seconds: float
) -> tuple[str, dict[str, float | dict[str, float]]]:
    """What the log says of a step, beside its learning rate: one of metrics.STEPS, and the numbers."""
    values: dict[str, float | dict[str, float]]
    if isinstance(taken, Taken):
        kind, values = "train", {"loss": taken.loss, "grad_norm": taken.norm}
        if taken.total != taken.loss:  # the loss is comparable with validation's, the total is what was optimised
            values["total"] = taken.total
    else:
        kind, values = "transfer", {"mse": taken.mse, "grad_norm": taken.norm, "total": taken.total}
        if _due(step, t.config.log.every):
            values["layers"] = taken.layers
    tokens = t.config.train.tokens_per_step
    values |= {"tokens": step * tokens, "tokens_per_s": round(tokens / seconds, 1)}
    return kind, values | ({"peak_memory": torch.cuda.max_memory_allocated()} if t.device.type == "cuda" else {})


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _train_step(t: Trainer, step: int) -> Taken | Transferred:
    """Forward, backward and update over one step's tokens, and the renewal of the masks if it is due."""
    torch.manual_seed(_mix(t.config.train.seed, step))
    try:
        batches = [_to_device(batch, t.device) for batch in t.batches(step)]
        if isinstance(t.step, Step) and phases.renews(t.config, t.stage, step):
            return t.step(batches, Renewal(t.config.sparsity.column_mask, _mix(t.config.train.seed, step + 1)))
        return t.step(batches)
    except SlopeError as error:
        raise SlopeError(f"step {step + 1}: {error}") from None


def _mix(seed: int, step: int) -> int:
    """One number below 2^63 for (seed, step): neighbours give unrelated generators."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def _objective(t: Trainer) -> shapes.Objective:
    return "causal" if t.masking is None else "masked"


def _train_batch(train: TrainConfig, blocks: Blocks, masking: MaskingIds | None, step: int, micro: int) -> Batch:
    where: dict[str, int] = {"world": 1, "micro_batch": train.micro_batch, "accumulation": train.accumulation}
    indices = sample_indices(step, micro, 0, **where, seed=train.seed, length=len(blocks))
    if masking is None:
        return causal_batch(blocks, indices)
    numbers = sample_numbers(step, micro, 0, **where)
    return masked_batch(blocks, indices, special=masking, seed=train.seed, sample_numbers=numbers)


def _to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    if device.type == "cuda":
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    return tensors


def _validate(t: Trainer) -> dict[str, Any]:
    """Mean token loss and perplexity of each source's validation text, and over all of it."""
    sums = {}
    t.model.eval()
    with torch.no_grad(), t.step.autocast(), eager():
        for source in t.dataset.val:
            batches = (_to_device(batch, t.device) for batch in _val_batches(t, source))
            losses = [batch_loss(t.model, batch, _objective(t)) for batch in batches]
            if losses:
                sums[source] = _weighted(losses)
    t.model.train()
    loss = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
    by_source = {source: total / count for source, (total, count) in sums.items()}
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "by_source": by_source}


def _references(t: Trainer) -> dict[str, dict[str, Any]]:
    """Validation of what a linearized model is compared with: the original, and itself before any training."""
    with using(t.model, mode="softmax"):
        teacher = _validate(t)
    return {"teacher": teacher, "swapped": _validate(t)}


def _val_batches(t: Trainer, source: str) -> Iterator[Batch]:
    train = t.config.train
    where: dict[str, int] = {"tokens": t.config.log.val_tokens, "micro_batch": train.micro_batch, "seed": train.seed}
    return val_batches(t.dataset.val[source], seq_len=train.seq_len, masking=t.masking, **where)


def _weighted(losses: list[Loss]) -> tuple[float, int]:
    """Summed token loss and number of targets over batches."""
    counts = [int(loss.targets) for loss in losses]
    return sum(float(loss.token_loss) * count for loss, count in zip(losses, counts, strict=True)), sum(counts)


def _enter(t: Trainer, to: phases.Stage, *, calibrate: bool) -> tuple[str, dict[str, Any], str]:
    """Bring the model into a later stage; returns the record for the log, and what to say."""
    known = {id(p): p for p in t.model.parameters()}  # held, so that no new one can get the id of one that went
    feed = _calibration(t.config, t.blocks, t.masking, t.device) if calibrate else None
    phases.enter(t.model, t.config, t.stage, to, optimizer=t.optimizer, calibrate=feed)
    was, t.stage = t.stage, to
    t.step = _step(t.config, t.run, t.model, to, t.optimizer, t.device)  # what was compiled knows nothing of this
    if to.layers != was.layers and to.layers != "adjust":
        return "layers", {"layers": to.layers, "adapters": to.adapters}, f"the layers are {to.layers} from here on"
    count = sum(p.numel() for p in t.model.parameters() if id(p) not in known)
    return "adapters", {"parameters": count}, f"low-rank adapters join ({count:,} parameters)"


def _calibration(config: Config, blocks: Blocks, masking: MaskingIds | None, device: torch.device) -> phases.Calibrate:
    """The first training sequences."""

    def feed(model: PreTrainedModel) -> None:
        train = config.train
        model.eval()
        for number, start in enumerate(range(0, config.sparsity.calibration, train.micro_batch)):
            whole = _train_batch(train, blocks, masking, *divmod(number, train.accumulation))
            batch = {name: rows[: config.sparsity.calibration - start] for name, rows in whole.items()}
            with torch.no_grad():
                batch_loss(model, _to_device(batch, device), "causal" if masking is None else "masked")
        model.train()

    return feed


def _save(t: Trainer, run: Path, step: int, *, must: bool, progress: Progress) -> None:
    """Save a checkpoint; a failure in the middle of a run is shown and training goes on."""
    facts = {"adapters": t.stage.adapters, "data": t.dataset.fingerprint, **run_folder.facts(t.config, run)}
    tensors, linearizes = store.state_tensors(t.model, t.optimizer), t.config.method == "linearize"
    try:
        folder = store.save(run, step, tensors, facts, keep=t.config.log.keep, beside_base=linearizes)
    except SlopeError as error:
        if must:
            raise
        progress.say(f"warning: {error}; training goes on")
    else:
        progress.say(f"step {step}: saved {folder}")


def _resume(t: Trainer, run: Path) -> int:
    """Restore the newest sound checkpoint, if there is one, and the tokenizer; returns the number of finished steps."""
    found = store.latest(run)
    if found is None:
        save_tokenizer(t.tokenizer, run / run_folder.TOKENIZER)
        return 0
    folder, manifest, faults = found
    for fault in faults:
        print(f"warning: {fault}; going on from {folder.name}", file=sys.stderr)
    if manifest["data"] != t.dataset.fingerprint:
        raise UsageError(f"{run} was trained on other data than {t.dataset.folder}; choose another --out")
    run_folder.require_same_config(t.config, run, manifest)
    # Only then: another version of transformers may write other files, and these are what the checkpoint names.
    if run_folder.altered_tokenizer_files(run, manifest):
        save_tokenizer(t.tokenizer, run / run_folder.TOKENIZER)
    if (then := phases.stage(t.config, manifest["step"] - 1)) != t.stage:
        _enter(t, then, calibrate=False)
    store.restore(folder, t.model, t.optimizer)
    store.set_aside_newer(run, manifest["step"])
    print(f"going on from {folder}", file=sys.stderr)
    return int(manifest["step"])


def _prepare(config: Config, run: Path, device: torch.device) -> Trainer:
    """Everything a step needs, and the checks that it fits together."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, torch refuses cuBLAS
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        try:
            set_backend(config.sparsity.backend)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise UsageError(f"sparsity.backend={config.sparsity.backend}: {error}") from None
    dataset = open_data(config, run)
    tokenizer = load_tokenizer(str(dataset.folder / "tokenizer"))
    blocks = Blocks(dataset.train, config.train.seq_len)
    model, report = _open_model(config, run, device, blocks, tokenizer)
    dataset.check_model(shapes.vocab_size(model.config), config.train.seq_len)
    print(report or _no_report(model), file=sys.stderr)
    optimizer = optim.build_optimizer(model, config)
    masking = masking_ids(tokenizer) if shapes.objective(model.config) == "masked" else None

    def batches(step: int) -> list[Batch]:
        return [_train_batch(config.train, blocks, masking, step, micro) for micro in range(config.train.accumulation)]

    trainer = Trainer(
        config=config,
        run=run,
        dataset=dataset,
        blocks=blocks,
        masking=masking,
        tokenizer=tokenizer,
        device=device,
        model=model,
        stage=phases.stage(config, 0),
        optimizer=optimizer,
        step=_step(config, run, model, phases.stage(config, 0), optimizer, device),
        batches=Ahead(batches, config.train.steps),
    )
    _check_evaluation(trainer)
    return trainer


def _open_model(
    config: Config, run: Path, device: torch.device, blocks: Blocks, tokenizer: PreTrainedTokenizerFast
) -> tuple[PreTrainedModel, Report | None]:
    """The model of a run in the stage of its first step, with weights unless a checkpoint has them; and its report."""
    if store.folders(run):
        return run_model.build(config, device, run)
    if config.method == "linearize":
        return init.start_linearized(config, run, device, tokenizer), None
    masked = shapes.objective(run_model_config(config)) == "masked"
    feed = _calibration(config, blocks, masking_ids(tokenizer) if masked else None, device)
    return init.start(config, device, feed)


def _no_report(model: PreTrainedModel) -> str:
    """What a run that makes no layer sparse says of its layers."""
    if windows := linear_windows(model):
        sparse = sum(1 for _ in sparse_layers(model))
        return f"{len(windows)} attention layers become linear; {sparse} linear layers are sparse and stay as they are"
    return "dense run: no layer is sparse"


def _start_line(t: Trainer, run: Path) -> str:
    name = torch.cuda.get_device_name(t.device) if t.device.type == "cuda" else str(t.device)
    dtype = "fp32" if t.step.dtype is None else "bf16"
    trained = sum(p.numel() for p in t.model.parameters() if p.requires_grad)
    tokens = t.config.train.steps * t.config.train.tokens_per_step
    return f"{run}: on {name} in {dtype}, {trained:,} trained parameters, {tokens:,} tokens in all"


def _step(
    config: Config,
    run: Path,
    model: PreTrainedModel,
    stage: phases.Stage,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> Step | TransferStep:
    """How this run takes its steps of a stage on this device."""
    train, gpu = config.train, device.type == "cuda"
    if train.cuda_graph and not gpu:
        raise UsageError(f"train.cuda_graph=true: needs a GPU, and the device is {device}")
    dtype = torch.bfloat16 if train.dtype == "bf16" or (train.dtype == "auto" and gpu) else None
    if config.method == "linearize" and gpu and dtype is not None:
        # Linearized attention computes in float32, of q, k and v that come in 16 bits. TF32 holds these exactly, and
        # features and states to 10 bits, as bf16's products would not.
        torch.set_float32_matmul_precision("high")
    compiled = gpu if train.compile is None else train.compile
    if stage.layers == "transfer":
        weights = {"mse_weight": config.linearize.mse_weight, "entropy_weight": config.linearize.entropy_weight}
        return TransferStep(model, optimizer, dtype=dtype, clip=config.optim.clip, compiled=compiled, **weights)
    graphed = gpu and config.method != "linearize" if train.cuda_graph is None else train.cuda_graph
    how: dict[str, Any] = {"dtype": dtype, "clip": config.optim.clip, "compiled": compiled, "graphed": graphed}
    if stage.layers == "adjust" and (share := config.linearize.distill):
        teacher = init.softmax_teacher(run, model, device)
        return DistillStep(model, optimizer, shapes.objective(model.config), teacher=teacher, share=share, **how)
    return Step(model, optimizer, shapes.objective(model.config), **how)


def _check_evaluation(t: Trainer) -> None:
    """UsageError for what validation and sampling would only stumble over later: no text to validate on, no prompt."""
    if not any(True for source in t.dataset.val for _ in _val_batches(t, source)):
        raise UsageError(f"{t.dataset.folder}: has no validation text, {NO_VALIDATION}")
    if t.masking is None:
        length, room = len(prompt_ids(t.tokenizer, t.config.log.sample_prompt)), shapes.max_seq_len(t.model.config)
        rule = f"must have at least 1 token and fewer than the model's {room} positions, not {length}"
        if not 0 < length < room:
            raise UsageError(f"log.sample_prompt: {rule}")


def open_data(config: Config, run: Path) -> Dataset:
    """The data set of a run; the embedded text is made into token files inside the run's folder."""
    folder = run_folder.data_folder(config, run)
    if config.data.path != schema.EMBEDDED or (folder / MANIFEST).exists():
        return open_dataset(folder, verify=config.data.verify)
    with resources.as_file(resources.files("slope_cli") / "assets" / "austen.jsonl.xz") as text:
        return prepare([str(text)], folder, tokenizer="bytes", val_fraction=0.05, workers=1, progress=False)


def _summary(t: Trainer, run: Path) -> dict[str, Any]:
    """Draw the run's plot and collect what is worth printing of it."""
    records = metrics.read(run)
    plots.draw_loss([run], run / "loss")
    summary = dict([record for record in records if record["kind"] == "val"][-1])
    if t.dataset.vocab_size <= BIGRAM_LIMIT:
        files = list(t.dataset.val.values())
        summary["bigram_loss"] = bigram_loss(t.dataset.train, files, t.dataset.vocab_size)
    references = [record for record in records if record["kind"] in ("teacher", "swapped")]
    summary |= {record["kind"]: record["perplexity"] for record in references}
    samples = [record["text"] for record in records if record["kind"] == "sample"]
    return summary | ({"sample": samples[-1]} if samples else {})
