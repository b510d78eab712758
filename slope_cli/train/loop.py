"""The training loop.

A step is a pure function of the weights, the optimizer's state and the step's number: its batch comes from
slope_cli.data, and every random draw in it (dropout) from a generator seeded by (seed, step). So a checkpoint needs no
random state, and a resumed run repeats an uninterrupted one bit for bit on the same device.
"""

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slope_cli.checkpoint import load, replaced, run_folder, store
from slope_cli.checkpoint.background import Saver
from slope_cli.config.schema import Config
from slope_cli.data.tokenizer import load_tokenizer, save_tokenizer
from slope_cli.distributed import launch
from slope_cli.distributed.collectives import Group, join
from slope_cli.distributed.sharding import Sharding
from slope_cli.distributed.signals import StopFlag, Stopped
from slope_cli.errors import SlopeError, UsageError
from slope_cli.inference.sampling import Sampling
from slope_cli.linearize.swap import using
from slope_cli.methods import optim, phases_of
from slope_cli.methods.accounting import Flops, flops
from slope_cli.methods.phases import ADAPTERS, Phase
from slope_cli.methods.sparse import report_layers
from slope_cli.models import shapes
from slope_cli.models.build import build_model
from slope_cli.report import metrics, warned
from slope_cli.report.loggers import require_wandb
from slope_cli.report.progress import Progress
from slope_cli.report.timing import Cores, Speed, Times
from slope_cli.train import advice, init, layer_ranges, starts
from slope_cli.train.batches import Batches
from slope_cli.train.changes import Changes
from slope_cli.train.cuda_graphs import GraphedStep
from slope_cli.train.keep_softmax import choose_kept, trial_lines, trial_warning
from slope_cli.train.length import extension_lines, finished_line
from slope_cli.train.make_step import kernels_of, make_step, products_dtype
from slope_cli.train.parallel import agree_on_kernels, built_on, enter, layout_of, require_whole, set_up_torch
from slope_cli.train.run_data import open_run_data
from slope_cli.train.run_log import manifest_entries, open_log
from slope_cli.train.sample import sample_text
from slope_cli.train.start_lines import start_lines
from slope_cli.train.starts import Start
from slope_cli.train.step import MaskUpdate, Step, StepOutput, eager, step_seed
from slope_cli.train.summary import summarize
from slope_cli.train.validation import Validation, check_evaluation, validation_line
from slope_cli.utils.environment import note_environment
from slope_cli.utils.gpus import dense_peak
from sparse_kernels import adapters_of, fp8_obstacle, fp8_underflow, kernel_choices


def pretrain(
    config: Config,
    run: Path,
    *,
    existing: run_folder.Existing = "resume",
    stop: StopFlag | None = None,
    usual: Config | None = None,
) -> dict[str, Any]:
    """Train, or resume training, in the folder `run`, as one of the processes that srun or torchrun started.

    A start that fails before its first step leaves nothing new there.

    Args:
        existing: what to do with a run in the folder: resume it, refuse it, or replace it by a new one. The start of
            a requeued job always goes on with the run that this job has started.
        stop: an open flag, which may have caught earlier signals; by default one is opened here.
        usual: see `advice.warnings_of`.

    Returns:
        The last validation record, with `bigram_loss` if the vocabulary is small; for a run that linearizes also the
        perplexities of the `teacher`, and of the model before its first step as `swapped`. Empty on ranks other than 0.

    Raises:
        UsageError: the config does not fit the data, the machine, the processes, or what is in the folder.
        Stopped: stopped by a signal, after saving a checkpoint.
        SlopeError: a non-finite loss, a damaged file, a full disk.
    """
    ranks = launch.ranks()
    device = launch.pick_device(config.train.device, ranks)
    opening = contextlib.nullcontext(stop) if stop else StopFlag()
    with opening as stop, contextlib.ExitStack() as held, _own_precision():
        group = join(ranks, device, stop, seconds=config.distributed.rendezvous_timeout)

        def begin() -> tuple[Start, Config]:
            if config.log.wandb:
                require_wandb()
            how = "resume" if starts.is_restart(run) else existing
            start = Start()
            settled = held.enter_context(run_folder.claimed(run, config, how, lambda: start.has_stepped))
            held.enter_context(starts.recorded(run, start))
            held.enter_context(warned.kept(run))
            store.clean(run)
            note_environment(run, device, group.members)
            return start, settled

        start, config = group.first(begin)
        if group.first((run / store.REPLACED).is_dir):
            group.agreed(lambda: replaced.require_seen(run))
        how: dict[str, Any] = {"group": group, "stop": stop, "start": start, "usual": usual}
        taken = layer_ranges.transfer(config, run, device, **how)
        # The whole model may be larger than the device's memory.
        if group.first(lambda: layer_ranges.ended(config, run)):
            dataset = open_run_data(config, run, group, stop)
            if ranks.first and not taken:
                print(finished_line(config), file=sys.stderr)
            summary = group.first(lambda: summarize(run, config, dataset))
            return summary if ranks.first else {}
        if layer_ranges.by_ranges(config) and device.type == "cuda" and not group.several:
            require_whole(config, run, torch.cuda.get_device_properties(device).total_memory)
        trainer = Trainer(config, run, device, stop, group)
        with contextlib.closing(trainer.batches):
            if not taken:
                group.first(lambda: advice.warn(config, trainer.dataset, usual))
            trainer.fit(stop, start)
        summary = group.first(lambda: summarize(run, config, trainer.dataset, trainer.times))
        return summary if ranks.first else {}


@contextlib.contextmanager
def _own_precision() -> Iterator[None]:
    """Restore the process's float32 matmul precision at the end."""
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Trainer:
    """Trains the model of one run, resuming from its newest sound checkpoint if there is one.

    Attributes:
        step: the finished steps.
        phase: what the model is in at present.
        changes: what was measured of the last step's update.
        times: where the time went that is in no record yet.
    """

    def __init__(
        self,
        config: Config,
        run: Path,
        device: torch.device,
        stop: StopFlag | None = None,
        group: Group | None = None,
    ) -> None:
        """Set up everything that a step needs, and check that it fits together; raises as `pretrain`."""
        self.times, self.speed = Times(), Speed()
        self.cores: Cores | None = None
        self.config, self.run, self.device, self.phases = config, run, device, phases_of(config)
        self.group = group = group or Group()
        self.speaks = group.ranks.first
        self.saver = Saver(run, group)
        set_up_torch(config, device)
        self.dataset = open_run_data(config, run, group, stop)
        self.tokenizer = load_tokenizer(str(self.dataset.folder / "tokenizer"))
        checkpoint = self._find_checkpoint()
        shape = init.run_shape(config, run if checkpoint else None)
        self.dataset.check_model(shape.vocab_size, config.train.seq_len)
        self.objective = shapes.objective(shape)
        self.batches = Batches(config, self.dataset, self.tokenizer, self.objective, device, group.ranks)
        check_evaluation(config, self.dataset, self.batches, self.tokenizer, shape)
        self.step = 0 if checkpoint is None else int(checkpoint.manifest["step"])
        finished = self.step == config.train.steps
        if finished:
            self._say(finished_line(config))
        self.saved_kernels = checkpoint and checkpoint.manifest.get("kernels")
        self.saved_log = checkpoint and store.log_mark(checkpoint.manifest, metrics.JSONL)
        self.phase = self.phases.at(max(0, self.step - 1))  # the one that a checkpoint was saved in
        self.kept: list[int | str] = [] if checkpoint is None else checkpoint.manifest.get(load.KEPT, [])
        report = report_layers(config, self.phases, build_model(shape, device="meta"))
        layout = layout_of(config, run, group.ranks.world, group.ranks.local_world, device)
        dtype = products_dtype(config, device)
        self.sharding = Sharding(layout, group.ranks.world, device, dtype) if layout.gather else None
        place = built_on(config, self.sharding, device)
        self.origin: init.Origin | None = None
        if checkpoint is None:
            if self.phase.linearized:
                self.origin = group.first(lambda: init.keep_base(config, run, self.tokenizer))
            elif config.learns_from_teacher:
                group.first(lambda: init.keep_teacher(config, run, self.tokenizer))
            begin = partial(init.start, config, run, place, calibrate=self.batches.input_norms)
            self.model, origin = group.agreed(begin)
            self.origin = self.origin or origin
            if self.origin is not None:
                self._say(str(self.origin))
        else:
            self.model = group.agreed(lambda: load.build(config, run, place, self.phase, self.kept))
        if self.sharding is not None:
            self.sharding.split(self.model)
        self.validation = Validation(self.dataset, self.batches, group, self.sharding)
        self.optimizer = optim.build_optimizer(self.model, config, self.phases, group)
        if checkpoint is None:
            if config.model.init_optimizer and not self.phase.linearized:
                init.restore_optimizer(config, self.model, self.optimizer, group)
            group.first(lambda: save_tokenizer(self.tokenizer, run / run_folder.TOKENIZER))
        else:
            self._restore(checkpoint)
            for line in () if finished else (f"resuming from {checkpoint.folder}", *extension_lines(config, self.step)):
                self._say(line)
        self.take_step = self._make_step()
        self.flops: Flops | None = None
        self.peak = self._peak()
        group.first(lambda: run_folder.write_config(run, config))  # only after all checks
        if not finished:
            for line in start_lines(config, run, report, self.phase, self.model, dtype, group, layout):
                self._say(line)
            if self.speaks and self.phase.fp8 and (obstacle := fp8_obstacle(device)):
                warned.warn(f"train.precision=fp8: {obstacle}; products are in bf16")

    # ------------------------------------------------------------------------------------------------------- the steps

    def fit(self, stop: StopFlag, start: Start | None = None) -> None:
        """Train to the last step; once `stop` is set, save a checkpoint after the current step and raise Stopped."""
        log_config, steps = self.config.log, self.config.train.steps
        log = self.group.agreed(self._open_log)
        progress = Progress(steps, self.step, every=log_config.every, quiet=not self.speaks)
        with contextlib.closing(log), contextlib.closing(progress), self._saving(progress):
            self.model.train()
            self.times.credit("start")
            if self.step == 0 and self.origin is not None:  # as step 1, so that a restart does not log it again
                log.write(metrics.INIT, 1, **self.origin._asdict())
            if self.phase.linearized and self.step == 0:
                self._log_references(log, progress, stop)
            phase_begins = True
            self.cores = Cores(torch.get_num_threads()) if self.device.type == "cpu" else None
            # What a signal has interrupted:
            stopped_by = self._evaluate(log, progress, stop, present=self.group.broadcast(log.kinds))
            while self.step < steps and not stopped_by:
                if (to := self.phases.at(self.step)) != self.phase:
                    if to.softmax_units and not self.phase.softmax_units:
                        self._choose_kept(to.softmax_units, log, progress)
                    self._log_phase(self.enter(to), log, progress)
                    phase_begins = True
                self._log_step(log, progress, start, first=phase_begins)
                self.times.credit("start" if phase_begins else "steps")
                phase_begins = False
                self._report_save(progress, wait=False)
                stopped_by = self._evaluate(log, progress, stop)
                last = self.step == steps
                if not (stopped_by or last):
                    stopped_by = self.group.stopped_by(stop)
                if last or stopped_by or _due(self.step, log_config.save_every):
                    log.write("time", self.step, **self.times.record())
                    self._save(progress, log, must=last or bool(stopped_by))
                    self.times.credit("saving")
        if stopped_by:
            done = f"stopped by {stopped_by} after step {self.step}, checkpoint saved"
            raise Stopped(f"{done}; run the same command to resume")

    def enter(self, to: Phase) -> dict[str, Any]:
        """Move model and optimizer into a later phase, and return its log record."""
        now: dict[str, Any] = {"was": self.phase, "model": self.model, "optimizer": self.optimizer}
        how: dict[str, Any] = {"sharding": self.sharding, "calibrate": self.batches.input_norms, "kept": self.kept}
        self.model, self.optimizer = enter(self.config, self.run, to, **now, **how)
        self.phase = to
        self.take_step = self._make_step()  # compiled code belongs to the old phase
        gc.collect()  # a model that was split is tied into circles by FSDP2, and would stay on the GPU
        adapters = [p for adapter in adapters_of(self.model).values() for p in adapter.parameters()]
        return {
            "name": to.name,
            "layers": to.layers.kind,
            "linearized": to.linearized,
            "adapters": to.adapters,
            "trained_parameters": _numel(p for p in self.model.parameters() if p.requires_grad),
            "adapter_parameters": _numel(p for p in adapters if p.requires_grad),
        }

    def train_step(self) -> tuple[StepOutput, float]:
        """Take the next step, and update the masks if due.

        Returns:
            The step's output and its learning rate.
        """
        step, seed = self.step, self.config.train.seed
        lr = optim.set_learning_rates(self.optimizer, self.phase, step, self.config.optim)
        due = self.phase.updates_masks(step)
        backward, share = self.phase.layers.backward_mask, self.phase.row_mask_share(step)
        update = MaskUpdate(backward, step_seed(seed, step + 1), share) if due else None
        self.changes = self._to_measure()
        torch.manual_seed(step_seed(seed, step, self.group.ranks.rank))
        try:
            output = self.take_step(self.batches.of_step(step), update, self.changes)
        except SlopeError as error:
            raise SlopeError(advice.after_failure(error, self.phase, step)) from None
        self.step += 1
        return output, lr

    def _choose_kept(self, count: int, log: metrics.Log, progress: Progress) -> None:
        """Choose what keeps softmax attention, the same on every rank: a function of weights, data and seed."""
        self.model.eval()
        with self.take_step.autocast(), eager():
            how = self.config, self.dataset, self.tokenizer, self.model
            chosen, trials = self.group.broadcast(choose_kept(count, *how))
        self.model.train()
        if self.sharding is not None:
            self.sharding.reshard(self.model)
        self.kept = chosen
        log.write(load.KEPT, self.step + 1, kept=chosen, trials=[trial._asdict() for trial in trials])
        setting = self.config.linearize.keep_softmax
        for line in trial_lines(setting, chosen, trials):
            progress.say(line)
        if line := trial_warning(setting, chosen, trials):
            warned.warn(line, progress.say)
        self.times.credit("validation")

    def _log_phase(self, changes: dict[str, Any], log: metrics.Log, progress: Progress) -> None:
        # Logged under the phase's first step, so that resuming from a checkpoint before it drops the record.
        log.write("phase", self.step + 1, **changes)
        count = f"{changes['trained_parameters']:,} trained parameters, {changes['adapter_parameters']:,} in adapters"
        progress.say(f"step {self.step + 1}: from here on {changes['name']}: {count}")

    def _log_step(self, log: metrics.Log, progress: Progress, start: Start | None, *, first: bool) -> None:
        """Take a step and log it; first: of a start or a phase, so that kernels have just been chosen."""
        started = time.perf_counter()
        output, lr = self.train_step()
        tokens, seconds = self.config.train.tokens_per_step, time.perf_counter() - started
        if self.cores is not None and (warning := self.cores.warning()):
            warned.warn(warning, progress.say)
        if start is not None:
            start.step(seconds)
        self.speed.add(tokens, seconds, first=first)
        if first:
            self.flops = flops(self.model, self.config)
            if kernels := kernels_of(self.model):
                log.write("products", self.step, **kernels)
                progress.say(f"step {self.step}: products of the sparse layers: {kernels}")
        values: dict[str, Any] = output.record(layers=_due(self.step, self.config.log.every))
        values |= {} if self.changes.masks_changed is None else {"masks_changed": self.changes.masks_changed}
        if (rate := self.phase.rates.get(ADAPTERS)) is not None:
            values["adapters_lr"] = optim.learning_rate(rate, self.step - 1, self.config.optim)
        if _due(self.step, self.config.log.every):
            values |= {f"fp8_underflow_{name}": share for name, share in fp8_underflow(self.model).items()}
        values |= {"tokens": self.step * tokens, "tokens_per_s": round(tokens / seconds, 1)}
        record = log.write(output.kind, self.step, lr=lr, **values, **self._utilization(tokens / seconds))
        progress.step(record, self.speed, self._utilization(self.speed.tokens_per_s), first=first)
        if self.changes.norms:
            log.write("norms", self.step, **self.changes.norms)

    def _to_measure(self) -> Changes:
        """What is measured of the next step's update."""
        step, every, interval = self.step + 1, self.config.log.every, self.phase.layers.mask_update_interval
        masks = self.phase.updates_masks(self.step) and step % every < interval  # the first one in `every` steps
        norms = _due(step, self.config.log.norms_every)
        return Changes(self.model, self.sharding, norms=norms, masks=masks)

    def _peak(self) -> float | None:
        """The FLOP/s of dense products of all GPUs together, at most; None if that is not known."""
        if self.device.type != "cuda" or self.take_step.dtype != torch.bfloat16:
            return None
        peak = dense_peak(torch.cuda.get_device_name(self.device), "bf16")
        return peak and peak * self.group.ranks.world

    def _utilization(self, tokens_per_s: float) -> dict[str, float]:
        """Model FLOPs utilization at a speed; {} if the peak or the operations are not known."""
        return self.flops.utilization(tokens_per_s, self.peak) if self.flops and self.peak else {}

    def _open_log(self) -> metrics.Log:
        """The log of the run; on ranks other than 0 one that nobody sees."""
        return open_log(self.config, self.run, self.step, self.saved_log) if self.speaks else metrics.Log()

    def _make_step(self) -> Step | GraphedStep:
        """What takes the steps of the present phase on this device."""
        if self.device.type == "cuda" and (dtype := products_dtype(self.config, self.device)) is not None:
            train = self.config.train
            agree_on_kernels(self.model, train.micro_batch * train.seq_len, dtype, self.group, self.saved_kernels)
        own: dict[str, Any] = {"group": self.group, "sharding": self.sharding}
        return make_step(self.config, self.run, self.phase, self.model, self.optimizer, device=self.device, **own)

    # ------------------------------------------------------------------------------------- validation, samples, saving

    def _evaluate(self, log: metrics.Log, progress: Progress, stop: StopFlag, present: Collection[str] = ()) -> str:
        """Validate and sample if due after this step, and at the end; validate at the end of a transfer, too.

        Args:
            present: the kinds of records that an earlier start has written.

        Returns:
            The signal that interrupted it, or "".
        """
        config, step, last = self.config.log, self.step, self.step == self.config.train.steps
        say: Callable[[str], None] = (lambda _: None) if last else progress.say  # the summary says the last ones
        transferred = self.phase.step == "transfer" and self.phases.at(step) != self.phase
        if "val" not in present and step and (last or transferred or _due(step, config.val_every)):
            validation = self.validate(stop)
            self.times.credit("validation")
            if validation is None:
                return self.group.stopped_by(stop)
            peak = max(self.group.gather(torch.cuda.max_memory_allocated()))  # since the start; 0 without a GPU
            validation |= {"peak_memory": peak} if peak else {}
            say(validation_line(f"step {step}", log.write("val", step, **validation)))
        sampled = "sample" in present or self.objective != "causal" or not (self.speaks or self.sharding)
        if not sampled and step and (last or _due(step, config.sample_every)):
            sampling = Sampling(config.sample_tokens, temperature=0.8, top_k=50, seed=self.config.train.seed)
            how = config.sample_prompt, sampling, self.take_step.dtype or torch.float32
            with eager():
                text = sample_text(self.model, self.tokenizer, *how)
            say(f"step {step}: {log.write('sample', step, text=text)['text']!r}")
            if self.sharding is not None:
                self.sharding.reshard(self.model)
            self.times.credit("sampling")
        return ""

    def validate(self, stop: StopFlag | None = None) -> dict[str, Any] | None:
        """The loss on validation text; None once `stop` is set on any rank."""
        return self.validation(self.model, self.take_step.autocast(), stop)

    def _log_references(self, log: metrics.Log, progress: Progress, stop: StopFlag) -> None:
        """Validate what a linearized model is compared with: the original, and itself before any training.

        Logged as step 1, so that a restart does not log it again.
        """
        with using(self.model, mode="softmax"):
            teacher = self.validate(stop)
        for kind, record in (("teacher", teacher), ("swapped", teacher and self.validate(stop))):
            if record is None:
                signal = self.group.stopped_by(stop)
                raise Stopped(f"stopped by {signal} before the first step; run the same command to start again")
            log.write(kind, 1, **record)
            progress.say(validation_line(kind, record))
        self.times.credit("validation")

    def _save(self, progress: Progress, log: metrics.Log, *, must: bool) -> None:
        """Save a checkpoint, in the background unless it `must` be saved: then a failure is not only reported."""
        self._report_save(progress, wait=True)
        try:
            folder = self._write_checkpoint(self.group.first(log.sync), wait=must)
        except SlopeError as error:
            if must:
                raise
            warned.warn(f"{error}; training continues", progress.say)
        else:
            if folder is not None:
                progress.say(f"step {self.step}: saved {folder}")

    def _report_save(self, progress: Progress, *, wait: bool) -> None:
        """Show how a save in the background went, once it is done, or after a `wait` for that."""
        try:
            done = self.saver.finished(wait=wait)
        except SlopeError as error:
            warned.warn(f"{error}; training continues", progress.say)
        else:
            if done is not None:
                progress.say(f"step {done[0]}: saved {done[1]}")

    @contextlib.contextmanager
    def _saving(self, progress: Progress) -> Iterator[None]:
        """At its end nothing is being saved; only a second Ctrl-C does not wait for that."""
        try:
            yield
        except Exception:
            self._report_save(progress, wait=True)
            raise
        self._report_save(progress, wait=True)

    def _write_checkpoint(self, log: dict[str, Any], *, wait: bool) -> Path | None:
        metadata = self.group.first(lambda: manifest_entries(self.config, self.run, self.dataset, log))
        metadata |= {"kernels": kernel_choices()} | ({load.KEPT: self.kept} if self.kept else {})
        derived = self.phase.layers.backward_mask_is_derived
        tensors = store.state_tensors(self.model, self.optimizer, derived=not derived)
        plan = store.planned(self.run, tensors, beside_base=self.phase.linearized, group=self.group)
        how: dict[str, Any] = {"keep": self.config.log.keep, "derived": derived}
        return self.saver.save(self.step, plan, metadata, wait=wait, **how)

    # ---------------------------------------------------------------------------------------------------- the beginning

    def _find_checkpoint(self) -> store.Checkpoint | None:
        """The newest sound checkpoint of the run, checked against this data and this configuration."""
        checkpoint = store.latest(self.run, self.group)
        if checkpoint is None:
            return None
        for fault in checkpoint.faults:
            warned.warn(f"{fault}; resuming from {checkpoint.folder.name}", self._say)
        if checkpoint.manifest["data"] != self.dataset.fingerprint:
            raise UsageError(f"{self.run} was trained on other data than {self.dataset.folder}; choose another --out")
        self.group.first(lambda: run_folder.require_same_config(self.config, self.run, checkpoint.manifest))
        return checkpoint

    def _restore(self, checkpoint: store.Checkpoint) -> None:
        whole = self.sharding is None
        self.group.agreed(lambda: store.restore(checkpoint.folder, self.model, self.optimizer, derive=whole))
        if self.sharding is not None and store.is_derived(checkpoint.manifest):
            self.sharding.update_masks(self.model, "magnitude", seed=0)
        self.group.first(lambda: self._tidy(checkpoint))

    def _tidy(self, checkpoint: store.Checkpoint) -> None:
        """Bring the run's folder to what it was when a checkpoint was saved."""
        # Only if needed: another version of transformers may write other files than those the checkpoint names.
        if run_folder.altered_tokenizer_files(self.run, checkpoint.manifest):
            save_tokenizer(self.tokenizer, self.run / run_folder.TOKENIZER)
        store.set_aside_newer(self.run, self.step)
        store.prune(self.run, self.config.log.keep)  # a kill may have come before it

    def _say(self, line: str) -> None:
        """Show a line; the other ranks are silent."""
        if self.speaks:
            print(line, file=sys.stderr)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
