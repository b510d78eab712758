"""Attention transfer by ranges of layers, for models larger than the device's memory (linearize.layers_at_once).

A layer learns from the softmax model's hidden states and its own loss alone. So the first layers take all steps of the
transfer, and leave behind the hidden states of every step, which the next layers begin with, until the last ones have
learned. Then what the ranges have learned, their optimizer's state and their records are joined: the run has the log
and the checkpoint of a transfer of all layers at once, and goes on, or ends, as any other.

RUN/transfer/0-7/ is of layers 0 to 7: checkpoints as a run has them, and a log. A range that was interrupted goes on
after its newest checkpoint. Hidden states are stored in the precision of products.

Shape suffixes: S micro-batches of a step, B sequences, T positions, D hidden size.
"""

import contextlib
import gc
import hashlib
import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from slope_cli.checkpoint import base_model, run_folder, store
from slope_cli.config.schema import Config
from slope_cli.data.tokenizer import load_tokenizer, save_tokenizer
from slope_cli.distributed.collectives import Group
from slope_cli.distributed.signals import StopFlag, Stopped
from slope_cli.errors import SlopeError, UsageError
from slope_cli.linearize.hidden_states import HiddenStates, require_room, states_on_disk
from slope_cli.linearize.layer_range import Passage, learning_ranges, name_of, ranges_of
from slope_cli.linearize.linear_window import Mode
from slope_cli.linearize.swap import linear_windows, linearize_attention, using
from slope_cli.linearize.transfer import headless
from slope_cli.methods import optim, phases_of
from slope_cli.methods.apply import train_maps
from slope_cli.methods.phases import MAPS
from slope_cli.models import shapes
from slope_cli.report import metrics, warned
from slope_cli.report.progress import Progress
from slope_cli.report.tables import bytes_text, counted
from slope_cli.report.timing import Speed, Times
from slope_cli.train import advice, init
from slope_cli.train.batches import Batches
from slope_cli.train.changes import Changes
from slope_cli.train.linearize_steps import INPUTS
from slope_cli.train.make_step import make_step, products_dtype, set_matmul_precision
from slope_cli.train.parallel import agree_on_kernels, set_up_torch
from slope_cli.train.run_data import open_run_data
from slope_cli.train.run_log import manifest_entries, open_log
from slope_cli.train.starts import Start
from slope_cli.train.step import eager, step_seed
from slope_cli.train.validation import Validation, check_evaluation, validation_line
from slope_cli.utils.environment import program
from slope_cli.utils.files import file_sha256, remove
from sparse_kernels import kernel_choices

REFERENCES: tuple[tuple[str, Mode], ...] = (("teacher", "softmax"), ("swapped", "linear"))
"""The kinds of records that a linearized model is compared with, and the mode that its layers are in for each."""


class LayerRanges:
    """The attention transfer of a run, by ranges of layers, on one device.

    Attributes:
        steps: of the transfer, which each range takes.
        ranges: of layers, as far as any of them learns.
    """

    def __init__(self, config: Config, run: Path, device: torch.device, stop: StopFlag, start: Start) -> None:
        """Set up what all ranges need, and check that it fits together; raises as `pretrain`."""
        self.config, self.run, self.device, self.stop, self.start = config, run, device, stop, start
        self.phase, self.group, self.times = phases_of(config).at(0), Group(), Times()
        self.steps = self.phase.rates[MAPS].last
        set_up_torch(config, device)
        set_matmul_precision(config, device)
        self.dataset = open_run_data(config, run, self.group, stop)
        tokenizer = load_tokenizer(str(self.dataset.folder / "tokenizer"))
        begun = next((run / run_folder.TRANSFER).glob("*/checkpoints/step-*"), None) is not None
        shape = init.run_shape(config, run if begun else None)
        self.dataset.check_model(shape.vocab_size, config.train.seq_len)
        self.batches = Batches(config, self.dataset, tokenizer, shapes.objective(shape), device)
        check_evaluation(config, self.dataset, self.batches, tokenizer, shape)
        self.whole = ranges_of(shape.num_hidden_layers, config.linearize.layers_at_once)
        self.ranges = learning_ranges(shape.num_hidden_layers, config.linearize)
        self.dtype = products_dtype(config, device)
        self.scratch = _scratch(config, run)
        self._require_room(shape)
        self.origin = None if begun else init.keep_base(config, run, tokenizer)
        if self.origin is None:
            store.verify_base(run, self._saved(self.ranges[0]).manifest)  # the first range's comes before all others
        else:
            self._say(str(self.origin))
            save_tokenizer(tokenizer, run / run_folder.TOKENIZER)
        self.states = (config.train.accumulation(), config.train.micro_batch, config.train.seq_len, shape.hidden_size)
        run_folder.write_config(run, config)

    def transfer(self) -> None:
        """Take the steps of all ranges that are not done, and join them; raises as `pretrain`."""
        for layers in self.ranges:
            self._transfer(layers)
            gc.collect()  # a model is tied into circles, and would stay on the device beside the next one
        validation = self._validate("linear", learned=True)
        self._join(validation)

    # --------------------------------------------------------------------------------------------------- one range

    def _transfer(self, layers: range) -> None:
        """Take the steps of a range that are left to take, and drop the hidden states that it began with."""
        folder, checkpoint = self._folder(layers), store.latest(self._folder(layers))
        step = 0 if checkpoint is None else int(checkpoint.manifest["step"])
        mark = None if checkpoint is None else store.log_mark(checkpoint.manifest, metrics.JSONL)
        if checkpoint is not None:
            self._require_same(checkpoint.manifest)
            for fault in checkpoint.faults:
                warned.warn(f"{fault}; resuming from {checkpoint.folder.name}", self._say)
            store.set_aside_newer(folder, step)
        with contextlib.ExitStack() as opened:
            entering = self._hidden(layers.start, opened) if layers.start else None
            if step == self.steps:
                if entering is not None:
                    entering.path.unlink()
                return
            leaving = self._hidden(layers.stop, opened) if layers != self.ranges[-1] else None
            if entering is not None:
                entering.require(self.steps)
            if leaving is not None:
                leaving.cut(step)
            references = self._references() if self.origin is not None and layers == self.ranges[0] else {}
            log = opened.enter_context(contextlib.closing(metrics.MetricsLog(_made(folder), step, saved=mark)))
            for kind, record in references.items():
                log.write(kind, 1, **record)
            work = _Range(self, layers, log, {} if checkpoint is None else checkpoint.manifest.get("kernels", {}))
            if checkpoint is not None:
                store.restore(checkpoint.folder, work.windows, work.optimizer)
            self._take_steps(work, step, entering, leaving)
        if entering is not None:
            entering.path.unlink()

    def _take_steps(
        self, work: "_Range", step: int, entering: HiddenStates | None, leaving: HiddenStates | None
    ) -> None:
        """Take the steps of a range after `step`, with a checkpoint when one is due, on a signal, and at the end."""
        log_config = self.config.log
        self._say(f"layers {name_of(work.layers)} of {self.whole[-1].stop}: attention transfer from step {step + 1}")
        with contextlib.closing(Progress(self.steps, step, every=log_config.every)) as progress:
            self.times.credit("start")
            for number in range(step, self.steps):
                began = time.perf_counter()
                if entering is not None:
                    work.passage.entering.extend(entering.read(number))
                record = work.step(number)
                if leaving is not None:
                    leaving.append(torch.stack(work.passage.leaving))
                work.passage.leaving.clear()
                seconds = time.perf_counter() - began
                self.start.step(seconds)
                work.write(record, number + 1, seconds, progress, first=number == step)
                self.times.credit("start" if number == step else "steps")
                stopped = self.stop.name
                due = log_config.save_every and not (number + 1) % log_config.save_every
                if due or stopped or number + 1 == self.steps:
                    if leaving is not None:
                        leaving.sync()
                    self._save(work, number + 1)
                if stopped:
                    done = f"stopped by {stopped} after step {number + 1} of layers {name_of(work.layers)}"
                    raise Stopped(f"{done}, checkpoint saved; run the same command to resume")

    def _save(self, work: "_Range", step: int) -> None:
        """Write a checkpoint of a range, bound to the run's base as one of a student is to its teacher."""
        work.log.write("time", step, **self.times.record())
        entries = manifest_entries(self.config, self.run, self.dataset, work.log.sync())
        entries |= {
            "kernels": kernel_choices(),
            "teacher": file_sha256(self.run / store.BASE / store.MANIFEST),
            "steps": self.steps,
            "hidden_states": str(self.dtype or torch.float32),
        }
        tensors = store.state_tensors(work.windows, work.optimizer)
        store.save(self._folder(work.layers), step, tensors, entries, keep=self.config.log.keep)
        self.times.credit("saving")

    def _require_same(self, manifest: Mapping[str, Any]) -> None:
        """UsageError or SlopeError if a range was trained on other data, or in another configuration."""
        if manifest["data"] != self.dataset.fingerprint:
            rule = f"was trained on other data than {self.dataset.folder}; choose another --out"
            raise UsageError(f"{self.run} {rule}")
        run_folder.require_same_config(self.config, self.run, manifest)
        if manifest["hidden_states"] != str(self.dtype or torch.float32):
            rule = f"the hidden states on the disk are in {manifest['hidden_states']}; change it after the transfer"
            raise UsageError(f"train.precision={self.config.train.precision}: {rule}")
        if manifest["steps"] != self.steps:
            rule = f"its ranges of layers have begun a transfer of {manifest['steps']} steps, not of {self.steps}"
            raise UsageError(f"{self.run}: {rule}; extend the run once its transfer is done")

    # ------------------------------------------------------------------------------------------ validation and the end

    def _references(self) -> dict[str, dict[str, Any]]:
        """The records that a run begins with: its origin, and how the original and the untrained model validate."""
        assert self.origin is not None
        found: dict[str, dict[str, Any]] = {metrics.INIT: self.origin._asdict()}
        for kind, mode in REFERENCES:
            found[kind] = self._validate(mode)
            self._say(validation_line(kind, found[kind]))
        return found

    def _validate(self, mode: Mode, *, learned: bool = False) -> dict[str, Any]:
        """Validate the whole model, range after range; Stopped if a signal came.

        Args:
            learned: with the maps that the ranges have learned, instead of those that they begin with.
        """
        states, dtype, record = list[torch.Tensor](), self.dtype, dict[str, Any]()
        for layers in self.whole:
            model, passage = self.model_of(layers, head=layers == self.whole[-1])
            if learned and layers in self.ranges:
                store.restore(self._saved(layers).folder, nn.ModuleList(linear_windows(model).values()), None)
            passage.entering.extend(states)
            autocast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
            with using(model, mode=mode):
                if layers != self.whole[-1]:
                    found = self._pass_on(model, passage, autocast)
                else:
                    found = Validation(self.dataset, self.batches, self.group, None)(model, autocast, self.stop)
            if found is None:
                raise Stopped(f"{self.run}: stopped by {self.stop.name}; run the same command to resume")
            record, states = found, passage.leaving
            del model, passage
            gc.collect()  # a model is tied into circles, and would stay on the device beside the next one
        self.times.credit("validation")
        return record

    def _pass_on(
        self, model: PreTrainedModel, passage: Passage, autocast: contextlib.AbstractContextManager[Any]
    ) -> dict[str, Any] | None:
        """Let the validation text go through layers that are not the last; None once there is a signal."""
        with torch.no_grad(), autocast, eager(), headless(model.eval()):
            for source in self.dataset.val:
                for batch in self.batches.validation(source):
                    model(**{key: batch[key] for key in INPUTS if key in batch}, use_cache=False)
                    passage.leaving[-1] = passage.leaving[-1].cpu()
                    if self.stop.name:
                        return None
        return {}

    def _join(self, validation: Mapping[str, Any]) -> None:
        """Write the log and the checkpoint of a transfer of all layers at once, and remove what ranges have left."""
        with contextlib.closing(open_log(self.config, self.run, 0, None)) as log:
            for record in joined_records([metrics.read(self._folder(layers)) for layers in self.ranges]):
                log.write(record.pop("kind"), record.pop("step"), **record)
            record = log.write("val", self.steps, **validation)
            if self.steps < self.config.train.steps:
                self._say(validation_line(f"step {self.steps}", record))
            elif self.batches.causal:  # each token of a sample would read all weights from the disk once more
                self._say(f"no text sample: {program()} generate {shlex.quote(str(self.run))} loads the whole model")
            log.write("time", self.steps, **self.times.record())
            model = base_model.build(self.run, "meta")
            self._linearize(model)
            optimizer = optim.build_optimizer(model, self.config, phases_of(self.config))
            windows = list(linear_windows(model).values())
            for layers in self.ranges:
                own = [windows.pop(0) for layer in layers if layer not in self.config.linearize.kept]
                store.restore(self._saved(layers).folder, nn.ModuleList(own), optimizer)
            plan = store.planned(self.run, store.state_tensors(model, optimizer), beside_base=True)
            entries = manifest_entries(self.config, self.run, self.dataset, log.sync())
            entries["kernels"] = kernel_choices()
            folder = store.save(self.run, self.steps, plan, entries, keep=self.config.log.keep)
        self._say(f"step {self.steps}: saved {folder}")
        for place in (self.run / run_folder.TRANSFER, self.scratch):
            remove(place)

    # ------------------------------------------------------------------------------------------------ models and files

    def model_of(self, layers: range, *, head: bool = False) -> tuple[PreTrainedModel, Passage]:
        """A range of layers on the device, linearized, with its maps as they begin; see `base_model.read_layers`."""
        return base_model.read_layers(self.run, self.device, layers, self._linearize, head=head)

    def _linearize(self, model: PreTrainedModel) -> None:
        model.requires_grad_(False)
        linearize_attention(model, self.config.linearize, seed=self.config.train.seed, device="cpu")
        train_maps(model, self.phase)

    def _folder(self, layers: range) -> Path:
        return self.run / run_folder.TRANSFER / name_of(layers)

    def _saved(self, layers: range) -> store.Checkpoint:
        """The newest sound checkpoint of a range that has one."""
        checkpoint = store.latest(self._folder(layers))
        if checkpoint is None:
            raise SlopeError(f"{self._folder(layers)}: has no checkpoint, though layers after it have begun")
        return checkpoint

    def _hidden(self, layer: int, opened: contextlib.ExitStack) -> HiddenStates:
        """The hidden states that come to a layer."""
        states = HiddenStates(self.scratch / f"layer-{layer}.states", self.states, self.dtype or torch.float32)
        opened.callback(states.close)
        return states

    def _require_room(self, shape: PreTrainedConfig) -> None:
        """Say what the hidden states take on the disk; SlopeError if it has less free."""
        tokens, dtype = self.config.train.tokens_per_step, self.dtype or torch.float32
        need = states_on_disk(self.steps, tokens, shape.hidden_size, len(self.ranges), dtype)
        what = f"{counted(len(self.ranges), 'range')} of up to {counted(len(self.whole[0]), 'layer')}"
        self._say(f"attention transfer in {what}: hidden states on disk: {bytes_text(need)} ({need:,} bytes)")
        require_room(self.scratch, need)

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr)


class _Range:
    """A range of layers in training: its model, the maps alone as `windows`, their optimizer, and the log."""

    def __init__(self, whole: LayerRanges, layers: range, log: metrics.MetricsLog, kernels: Mapping[str, Any]) -> None:
        """
        Args:
            kernels: `kernel_choices` of the start that a checkpoint is of, to go on with; empty for none.
        """
        self.layers, self.log, self._config, self._phase = layers, log, whole.config, whole.phase
        self._batches, self._speed = whole.batches, Speed()
        self.model, self.passage = whole.model_of(layers)
        self.model.train()
        self.windows = nn.ModuleList(linear_windows(self.model).values())
        self.optimizer = optim.build_optimizer(self.model, self._config, phases_of(self._config))
        if whole.device.type == "cuda" and whole.dtype is not None:
            train = self._config.train
            agree_on_kernels(self.model, train.micro_batch * train.seq_len, whole.dtype, whole.group, kernels)
        own: dict[str, Any] = {"device": whole.device, "group": whole.group, "sharding": None}
        self._take_step = make_step(self._config, whole.run, self._phase, self.model, self.optimizer, **own)

    def step(self, number: int) -> dict[str, Any]:
        """Take a step, counted from 0, and return what the log says of it."""
        config = self._config
        lr = optim.set_learning_rates(self.optimizer, self._phase, number, config.optim)
        self.changes = Changes(self.model, None, norms=_due(number + 1, config.log.norms_every))
        # The first layers draw what all at once would; others do not draw the same again.
        torch.manual_seed(step_seed(config.train.seed, number, self.layers.start))
        try:
            output = self._take_step(self._batches.of_step(number), None, self.changes)
        except SlopeError as error:
            raise SlopeError(advice.after_failure(error, self._phase, number)) from None
        return {"lr": lr, **output.record(layers=_due(number + 1, config.log.every))}

    def write(self, record: Mapping[str, Any], step: int, seconds: float, progress: Progress, *, first: bool) -> None:
        """Log a step, and show it."""
        tokens = self._config.train.tokens_per_step
        self._speed.add(tokens, seconds, first=first)
        rates = {"tokens": step * tokens, "tokens_per_s": round(tokens / seconds, 1)}
        written = self.log.write("transfer", step, **record, **rates, linearized=len(self.windows))
        progress.step(written, self._speed, first=first)
        if self.changes.norms:
            self.log.write("norms", step, **self.changes.norms)


def transfer(
    config: Config,
    run: Path,
    device: torch.device,
    *,
    group: Group,
    stop: StopFlag,
    start: Start,
    usual: Config | None,
) -> bool:
    """Take the steps of attention transfer by ranges of layers, if the configuration says so and they are not taken.

    Afterwards the run has the checkpoint of a transfer of all layers at once, after its last step.

    Returns:
        Whether they were taken by this start.

    Raises:
        UsageError: several processes, or as `pretrain`.
        Stopped, SlopeError: as `pretrain`.
    """
    if not by_ranges(config) or group.first(lambda: bool(store.folders(run))):
        return False
    if group.several:
        at_once = f"linearize.layers_at_once={config.linearize.layers_at_once}"
        rule = "transfers attention in one process; several go on with the run once that is done"
        raise UsageError(f"{at_once}: {rule}")
    ranges = LayerRanges(config, run, device, stop, start)
    with contextlib.closing(ranges.batches):
        advice.warn(config, ranges.dataset, usual)
        ranges.transfer()
    return True


def ended(config: Config, run: Path) -> bool:
    """Whether a run has no steps left and needed none but those of a transfer by ranges of layers."""
    alone = phases_of(config).end.step == "transfer"
    return by_ranges(config) and alone and store.newest_step(run) == config.train.steps


def by_ranges(config: Config) -> bool:
    """Whether a run transfers attention by ranges of layers."""
    return config.linearizes and bool(config.linearize.layers_at_once) and phases_of(config).at(0).step == "transfer"


def joined_records(logs: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The records of a transfer of all layers at once, from those of its ranges.

    Squared errors and totals are means over layers, norms those of the whole gradient, and a step's time is the sum.
    """
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    norms: dict[int, list[Mapping[str, Any]]] = {}
    for record in (record for log in logs for record in log):
        if record["kind"] in ("transfer", "norms"):
            (by_step if record["kind"] == "transfer" else norms).setdefault(record["step"], []).append(record)
        elif record["kind"] != "time":
            yield dict(record)
    for step, parts in by_step.items():
        count = sum(part["linearized"] for part in parts)
        means = {key: sum(part[key] * part["linearized"] for part in parts) / count for key in ("mse", "total")}
        layers = {name: error for part in parts for name, error in part.get("layers", {}).items()}
        yield {
            "kind": "transfer",
            "step": step,
            "lr": parts[0]["lr"],
            "mse": means["mse"],
            "grad_norm": math.hypot(*(part["grad_norm"] for part in parts)),
            "total": means["total"],
            **({"layers": layers} if layers else {}),
            "tokens": parts[0]["tokens"],
            "tokens_per_s": round(1 / sum(1 / part["tokens_per_s"] for part in parts), 1),
        }
        if own := norms.get(step):
            kinds = {key for part in own for key, value in part.items() if isinstance(value, dict)}
            yield {"kind": "norms", "step": step} | {
                kind: {name: norm for part in own for name, norm in part.get(kind, {}).items()}
                for kind in sorted(kinds)
            }
    yield from (dict(record) for log in logs for record in log if record["kind"] == "time")


def _scratch(config: Config, run: Path) -> Path:
    """The folder of a run's hidden states."""
    if config.linearize.scratch is None:
        return run / run_folder.TRANSFER / "states"
    name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]
    return Path(config.linearize.scratch).expanduser() / f"{run.resolve().name}-{name}"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
