"""The time of a step of each variant in each of its phases, over that of the baseline, the first variant.

OUT/step-times.jsonl   a line for each phase of each variant as soon as it is measured: with hardware and versions
OUT/step-times.log     the output of the process that measures

A GPU lowers its clock as it gets hot, so that the model that is timed first, or alone, seems a few per cent faster. So
every phase is timed in alternating rounds with the baseline's first phase, in one process, and only the ratio counts.
Steps are those of the training loop itself, on the run's own data: with mask updates, adapters, and the optimizer.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from slope_cli.benchmarks.timing import Timing, free
from slope_cli.compare.budget import budget, steps_bought
from slope_cli.compare.processes import last_line, started
from slope_cli.compare.summary import mean_and_error
from slope_cli.compare.variants import Variant
from slope_cli.config import configs
from slope_cli.config.schema import MICRO_BATCH, Config
from slope_cli.distributed import launch
from slope_cli.distributed.signals import StopFlag, Stopped
from slope_cli.errors import SlopeError, UsageError
from slope_cli.methods import phases_of
from slope_cli.methods.phases import Phase
from slope_cli.train.loop import Trainer
from slope_cli.utils import jsonl
from slope_cli.utils.environment import environment
from slope_cli.utils.files import content_sha256, held_folder
from slope_cli.utils.typed_json import from_json

FILE = "step-times.jsonl"
TIMING = Timing(warm_up=3, rounds=9, round_seconds=0.2, most_calls=50, heat_seconds=3.0)
_NO_EFFECT = (MICRO_BATCH, "train.seed", "train.steps", "train.extended", "optim.lr", "optim.muon_lr", "adapters.lr")
"""Keys that may change without another measurement: the micro-batch as in a run that resumes."""


@dataclass(frozen=True)
class StepTime:
    """How long a step of one phase takes.

    key, baseline_key: of the configs that were timed, see `key_of`.
    ratio: the median, over the rounds, of its time over that of the baseline in its first phase; ratio_error: the
    standard error over the rounds. step_seconds, baseline_seconds: medians over the same rounds.
    alternated: false if both did not fit into memory together, and each was timed alone.
    """

    variant: str
    phase: str
    key: str
    baseline_key: str
    ratio: float
    ratio_error: float
    step_seconds: float
    baseline_seconds: float
    alternated: bool
    environment: dict[str, Any] = field(default_factory=dict)


def key_of(config: Config) -> str:
    """The hash of what a step's time depends on."""
    keys = {**configs.fixed(config), "train.precision": config.train.precision}
    return content_sha256({key: value for key, value in keys.items() if key not in _NO_EFFECT})


def equal_time(variants: Sequence[Variant], out: Path, stop: StopFlag) -> tuple[list[Variant], list[str]]:
    """The variants, each with the steps that the time of the first one buys, and lines about the step times.

    A variant that is the first one with a share of its steps keeps them.

    Step times in OUT/step-times.jsonl are used again, so that runs which have begun keep their steps.

    Raises:
        UsageError: fewer than two variants, or one whose own train.steps would have no effect.
        SlopeError: a variant cannot be timed.
        Stopped: `stop` was set meanwhile.
    """
    first, *others = variants
    timed = [first, *(each for each in others if each.share is None)]
    steps, tokens = first.config.train.steps, first.config.train.tokens_per_step
    if len(timed) < 2:
        raise UsageError("--equal time: needs a second variant, which gets the time of the first")
    if own := next((each.name for each in timed if each.config.train.steps != steps), None):
        raise UsageError(f"{own}: leave train.steps out of it, which --equal time decides")
    out.mkdir(parents=True, exist_ok=True)
    # The tasks of a job array come here together: one measures, the others wait.
    with held_folder(out, "step-times", check=lambda: stop.check(out)):
        times = _found(timed, out)
        if waiting := [name for name, found in times.items() if None in found.values()]:
            _measure([first, *(each for each in timed if each.name in waiting)], out, stop)
            times = _found(timed, out)
    rows = [row for found in times.values() for row in found.values() if row is not None]
    if missing := next((f"{name}, {at}" for name, found in times.items() for at in found if found[at] is None), None):
        reason = last_line((out / "step-times.log").read_bytes()) or "it was killed"
        raise SlopeError(f"{missing}: could not be timed: {reason}")
    unit = median(row.baseline_seconds for row in rows)
    rule = f"what the time of {steps * tokens:,} tokens of {first.name} buys"
    seconds: dict[str, dict[str, float]] = {
        name: {phase: unit * row.ratio for phase, row in found.items() if row} for name, found in times.items()
    }
    seconds[first.name][_phases(first.config)[0].name] = unit
    whole = budget(first.config, seconds[first.name], rule).seconds

    def filled(each: Variant) -> Variant:
        own = seconds[first.name if each.share is not None else each.name]
        longer = each.lasting(steps_bought(each.config, own, whole)) if each in timed[1:] else each
        return longer.within(budget(longer.config, own, rule))

    return [filled(each) for each in variants], _lines(first.name, rows)


def _phases(config: Config) -> list[Phase]:
    return phases_of(config).distinct


def _found(variants: Sequence[Variant], out: Path) -> dict[str, dict[str, StepTime | None]]:
    """By variant and phase the times that were measured already, None for others; not of the baseline's first phase."""
    path = out / FILE
    rows = [from_json(StepTime, record) for record in jsonl.read(path)] if path.is_file() else []
    known = {(row.variant, row.phase, row.key, row.baseline_key): row for row in rows}
    baseline = key_of(variants[0].config)
    found = {}
    for number, each in enumerate(variants):
        names = [phase.name for phase in _phases(each.config)[number == 0 :]]
        found[each.name] = {name: known.get((each.name, name, key_of(each.config), baseline)) for name in names}
    return found


def _measure(variants: Sequence[Variant], out: Path, stop: StopFlag) -> None:
    """Time the variants after the first, the baseline, in a process of their own, which ends when `stop` is set."""
    names = list(dict.fromkeys(each.name for each in variants))
    print(f"measuring the step times of {', '.join(names)}; the log is {out / 'step-times.log'}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, (out / "step-times.log").open("wb") as log:
        for each in variants:
            (Path(folder) / f"{each.name}.yaml").write_text(configs.dump(each.config), encoding="utf-8")
        work = "from slope_cli.compare.step_times import main; main(*sys.argv[1:])"
        process = started(work, [str(out), folder, *(each.name for each in variants)], log)
        try:
            while process.poll() is None and not stop.name:
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    if stop.name:
        raise Stopped(f"stopped by {stop.name} while step times were measured; run the same command to resume")


def _lines(baseline: str, rows: Sequence[StepTime]) -> list[str]:
    """What was measured, and where."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        alone = "" if row.alternated else " (timed alone)"
        parts.setdefault(row.variant, []).append(f"{row.phase} {row.ratio:.3f} ± {row.ratio_error:.3f}{alone}")
    unit = median(row.baseline_seconds for row in rows)
    each = "; ".join(f"{name}: {', '.join(phases)}" for name, phases in parts.items())
    where = dict.fromkeys(
        f"{row.environment['gpu'] or row.environment['processor']}, torch {row.environment['torch']}, "
        f"{row.environment['date']}"
        for row in rows
    )
    return [
        f"a step's time over {baseline}'s {1e3 * unit:.4g} ms, in alternating rounds, ± standard error: {each}",
        f"step times were measured on {' and '.join(where)}",
    ]


# ------------------------------------------------------------------------------------------- in the process of its own


class Steps:
    """Takes the steps of one phase of a run, again and again.

    Attributes:
        each: the steps of a call: mask updates have the share in them that they have in the run.
    """

    def __init__(self, config: Config, phase: Phase, run: Path) -> None:
        self._trainer = Trainer(config, run, launch.pick_device(config.train.device))
        firsts = [each.first for each in _phases(config)] + [config.train.steps]
        self._first, self._end = phase.first, firsts[firsts.index(phase.first) + 1]
        for to in _phases(config)[1:]:
            if to.first <= phase.first:
                self._trainer.enter(to)
        self._trainer.step = self._first
        self._trainer.model.train()
        self.each = min(max(1, phase.layers.mask_update_interval), self._end - self._first)
        for _ in range(TIMING.warm_up):
            self()

    def __call__(self) -> None:
        for _ in range(self.each):
            if self._trainer.step == self._end:
                self._trainer.step = self._first
            self._trainer.train_step()

    def close(self) -> None:
        """End the thread that prepares batches."""
        self._trainer.batches.close()


def alternated(make: Callable[[], Steps], baseline: Callable[[], Steps]) -> tuple[list[tuple[float, float]], bool]:
    """Seconds of a step of both in each round; and whether rounds alternated, for which both must fit into memory."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return _rounds(make, baseline), True
    free()
    return [(ours, theirs) for (ours,), (theirs,) in zip(_rounds(make), _rounds(baseline), strict=True)], False


def _rounds(*make: Callable[[], Steps]) -> list[Any]:
    """Seconds of a step of each, by rounds."""
    with contextlib.ExitStack() as stack:
        work = [stack.enter_context(contextlib.closing(each())) for each in make]
        seconds = TIMING.alternating(*work)
        each = [steps.each for steps in work]
    del work
    free()
    return [tuple(call / count for call, count in zip(row, each, strict=True)) for row in seconds]


def main(out: str, folder: str, baseline: str, *names: str) -> None:
    """As `measure`; an error is one line."""
    try:
        measure(Path(out), Path(folder), baseline, names)
    except SlopeError as error:
        raise SystemExit(f"error: {error}") from None


def measure(out: Path, folder: Path, baseline: str, names: Sequence[str]) -> None:
    """Time all phases of variants, whose configs are NAME.yaml in a folder, and append each to OUT/step-times.jsonl."""
    torch._dynamo.config.recompile_limit = 64  # every phase compiles the code of a block again
    loaded = {name: configs.load(str(folder / f"{name}.yaml")) for name in (baseline, *names)}
    first, run = loaded[baseline], folder / "run"
    for name in dict.fromkeys(names):
        for number, phase in enumerate(_phases(loaded[name])):
            if name == baseline and number == 0:
                continue
            rounds, together = alternated(
                lambda config=loaded[name], phase=phase: Steps(config, phase, run),  # type: ignore[misc]
                lambda: Steps(first, _phases(first)[0], run),
            )
            ratios = [ours / theirs for ours, theirs in rounds]
            row = StepTime(
                variant=name,
                phase=phase.name,
                key=key_of(loaded[name]),
                baseline_key=key_of(first),
                ratio=median(ratios),
                ratio_error=mean_and_error(ratios).stderr or 0.0,
                step_seconds=median(ours for ours, _ in rounds),
                baseline_seconds=median(theirs for _, theirs in rounds),
                alternated=together,
                environment=environment(),
            )
            jsonl.append(out / FILE, asdict(row))
