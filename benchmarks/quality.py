"""What variants of a small GPT-2 learn in the time that the dense one takes, each at its best learning rate.

    python -m slope_cli.benchmarks.quality --data DIR --work DIR --out FILE [--only NAME,...] [--seeds 1] [--budget S]

--data is a folder of `slope data prepare`. The stages: `tune` trains each variant for a quarter of the final steps at
every learning rate of its grid, with equal tokens; while the best one is at an end of the grid, it tries another beyond
that end, up to Scale.extensions. `finals` trains all at their best rates, with several seeds, for the time of dense.
`merge` adds the finals of other result files, of other seeds or variants. All is done by `slope compare`, whose
commands are shown, in the order of VARIANTS.

FILE is written after each comparison, and says what was not run, and why. What it has is not trained again, wherever it
is taken; a stopped run resumes in the folder of --work. The folder of a tuned variant may be removed. Another machine
trains dense again beside other variants, and FILE keeps the first of two such runs; other seeds there waste nothing.
KEY=VALUE... are settings of all runs.
"""

import argparse
import json
import math
import shlex
import shutil
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slope_cli.compare.results import FILE, compare, compare_runs
from slope_cli.compare.rows import Run
from slope_cli.compare.summary import Comparison, Summary, best_rate
from slope_cli.compare.table import tables
from slope_cli.compare.variants import numbers, variants
from slope_cli.config import configs
from slope_cli.distributed.signals import StopFlag, Stopped
from slope_cli.errors import SlopeError, UsageError
from slope_cli.report.tables import NONE, Document, Table, number
from slope_cli.utils.files import write_json
from slope_cli.utils.typed_json import from_json

from .records import QualityResults, TunedVariant

BASELINE = "dense"
STAGES = ("merge", "tune", "finals")
TUNING_SEED = 1


@dataclass(frozen=True)
class Settings:
    """What is a variant's own.

    sizes: the ready-made variant whose sizes it has. like: it is not tuned, and takes the optimizer and the learning
    rate of the one among these that was best when it was tuned.
    """

    words: str
    sizes: str = ""
    like: tuple[str, ...] = ()


VARIANTS = {
    BASELINE: Settings("method=dense"),
    "half-depth": Settings("method=dense", sizes="half-depth"),
    "slope": Settings("method=slope"),
    "dense-muon": Settings("method=dense optim.name=muon"),
    "slope-muon": Settings("method=slope optim.name=muon"),
    "half-depth-muon": Settings("method=dense optim.name=muon", sizes="half-depth"),
    "dense-0.87": Settings("method=dense", sizes="dense-0.87", like=(BASELINE, "dense-muon")),
    "slope-r0": Settings("method=slope adapters.rank=0", like=("slope",)),
    "slope-fp8": Settings("method=slope train.precision=fp8", like=("slope",)),
    "dense-fp8": Settings("method=dense train.precision=fp8", like=(BASELINE,)),
    "slope-dense-start": Settings("method=slope sparsity.start=0.1", like=("slope",)),
    "slope-half": Settings("method=slope adapters.start=0.5 adapters.rank=0.0625", like=("slope",)),
    "s_ste": Settings("method=s_ste"),
    "slope-row-masks": Settings("method=slope slope.row_mask_until=0.25", like=("slope",)),
    "sparse-relu2": Settings("method=dense model.activation=sparse_relu2"),
}
"""By name, the most important first."""
SIMULATED = ("s_ste", "sparse-relu2")
"""Variants that compute with dense products, so that the time of a step is not the method's."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A recipe and its lengths.

    steps: of dense in the finals. rates: where a variant's grid begins, by its name, or else by its optimizer.
    extensions: rates beyond the ends of a grid, at most. exchange: see `slope compare --exchange`. words: of all runs.
    """

    recipe: str
    steps: int
    rates: Mapping[str, tuple[float, ...]]
    extensions: int = 4
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (1, 2)
    exchange: float | None = 0.8
    words: tuple[str, ...] = ()

    @property
    def tuning_steps(self) -> int:
        """Of a run that tries a learning rate."""
        return self.steps // 4


SCALES = {
    # 210 million tokens, 20 for each parameter of the hidden matrices.
    "mini": Scale(
        recipe="gpt2-mini",
        steps=3204,
        rates={"adamw": (2.83e-3, 4e-3, 5.66e-3), "muon": (4e-3, 5.66e-3, 8e-3)},
    ),
    # 300 million tokens, and rates around those that were best before.
    "small": Scale(
        recipe="gpt2-small-short",
        steps=4578,
        rates={"adamw": (1e-3, 1.41e-3), "slope": (2e-3, 2.83e-3), "muon": (2e-3, 2.83e-3)},
        extensions=0,
        variants=(BASELINE, "half-depth", "slope", "dense-muon", "slope-muon", "half-depth-muon"),
        exchange=None,
    ),
    "tiny": Scale(
        recipe="gpt2-nano",
        steps=24,
        rates={"adamw": (2e-3, 2.83e-3), "muon": (2e-3, 2.83e-3)},
        extensions=1,
        words=(
            *("train.device=cpu", "train.tokens_per_step=256", "train.seq_len=64", "train.micro_batch=4"),
            *("optim.warmup=0.1", "log.val_tokens=1024", "log.sample_tokens=4"),
        ),
    ),
}


# ------------------------------------------------------------------------------------------------------ learning rates


def beside(rate: float, steps: int) -> float:
    """The rate so many steps of √2 above another one, of the series that has 1e-3, in three digits."""
    place = round(2 * math.log2(rate / 1e-3)) + steps
    return float(f"{1e-3 * 2 ** (place / 2):.3g}")


def next_rates(grid: Sequence[float], tried: Sequence[Summary], extensions: int) -> list[float]:
    """The rates to try next: those of the grid that were not tried, then one beyond the end at which the best one is.

    Below all of them, if every one failed. Empty when the best is inside, or after so many extensions.
    """
    known = [each.lr for each in tried if each.lr is not None]
    if missing := [rate for rate in grid if rate not in known]:
        return missing
    best = best_rate(tried)
    if len(known) >= len(grid) + extensions or (best.seeds and not best.lr_at_edge):
        return []
    return [beside(max(known), 1) if best.seeds and best.lr == max(known) else beside(min(known), -1)]


# ------------------------------------------------------------------------------------------------------------- merging


def merged(comparisons: Iterable[Comparison], folder: Path) -> Comparison | None:
    """The runs of several comparisons at equal time as one, and its pictures in a folder; None without a dense run.

    Of a run that is there twice the first counts. Each comparison has timed its steps on a GPU of another temperature,
    so all are put on the clock of the first one, on which dense takes as long in each.

    Raises:
        UsageError: the runs cannot be compared, such as those of one variant at two learning rates.
    """
    runs: dict[tuple[str, int], Run] = {}
    notes, clock = dict[str, None](), 0.0
    for each in comparisons:
        seconds = next((run.budget.seconds for run in each.runs if run.variant == BASELINE and run.budget), 0.0)
        clock = clock or seconds
        for run in each.runs if seconds else ():
            runs.setdefault((run.variant, run.seed), _slower(run, clock / seconds))
        notes |= dict.fromkeys(each.notes)
    if not runs:
        return None
    order = [*VARIANTS]
    whole = sorted(runs.values(), key=lambda run: order.index(run.variant) if run.variant in order else len(order))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "runs.json", {"runs": [asdict(run) for run in whole]})
    found = compare_runs([folder / "runs.json"], out=folder)
    return replace(found, notes=[*dict.fromkeys([*found.notes, *notes])])


def _slower(run: Run, factor: float) -> Run:
    """A run whose steps take so many times as long."""
    assert run.budget is not None
    phases = [replace(phase, step_seconds=factor * phase.step_seconds) for phase in run.budget.phases]
    val = [replace(each, seconds=factor * (each.seconds or 0.0)) for each in run.val]
    return replace(run, budget=replace(run.budget, phases=phases), val=val)


# -------------------------------------------------------------------------------------------------------------- stages


@dataclass
class Bench:
    """The stages, and what they have found.

    names: the variants of the finals. merges: other result files. errors: of the variants that could not be trained.
    """

    scale: Scale
    data: Path
    work: Path
    results: QualityResults
    names: Sequence[str]
    seeds: Sequence[int]
    jobs: int
    out: Path
    stop: StopFlag
    merges: Sequence[Path] = ()
    errors: dict[str, str] = field(default_factory=dict)

    def merge(self) -> None:
        """Add the finals of other result files."""
        for file in self.merges:
            self._add(read(file, self.results.scale).finals)

    def tune(self) -> None:
        """Find the learning rates of the variants, and of those whose rates they take."""
        asked = {*self.names, *(each for name in self.names for each in VARIANTS[name].like)}
        for name in (name for name in VARIANTS if name in asked):
            if VARIANTS[name].like:
                model = self._model(name)
                self._note(replace(model, variant=name, words=self._words(name), rates=[], like=model.variant))
            else:
                self._tune(name)

    def _tune(self, name: str) -> None:
        words, scale = self._words(name), self.scale
        usual = scale.rates["muon" if "optim.name=muon" in words else "adamw"]
        grid, tried = scale.rates.get(name, usual), [*self._tuned(name).rates]
        while rates := next_rates(grid, tried, scale.extensions):
            steps = [f"train.steps={scale.tuning_steps}", "log.val_every=0"]
            found = self._compare(self.work / "tune" / name, steps, [name], [TUNING_SEED], lrs=rates)
            tried = sorted([*tried, *found.rates], key=lambda each: each.lr or 0.0)
            best = best_rate(tried)
            lr = best.lr if best.seeds else None
            inside = lr is not None and not best.lr_at_edge
            self._note(TunedVariant(variant=name, words=words, rates=tried, lr=lr, inside=inside))

    def finals(self) -> None:
        """Train the variants at their best rates for the time of dense, as many at once as there are jobs for."""
        scale, others = self.scale, [name for name in self.names if name != BASELINE and self._tuned(name).lr]
        shorter = f"{BASELINE}-{scale.exchange:g}-steps" if scale.exchange else BASELINE
        waiting = [name for name in others if self._lacks(name)] if self._tuned(BASELINE).lr else []
        if not waiting and self._tuned(BASELINE).lr and self._lacks(shorter):
            waiting = others[:1]
        size = max(1, self.jobs // len(self.seeds))
        words = [f"train.steps={scale.steps}", f"log.val_every={max(1, scale.steps // 16)}"]
        kept = self.work / "finals" / FILE
        for first in range(0, len(waiting), size):
            group, exchange = waiting[first : first + size], scale.exchange if self._lacks(shorter) else None
            kept.unlink(missing_ok=True)
            try:
                found = self._compare(
                    kept.parent, words, [BASELINE, *group], self.seeds, equal="time", exchange=exchange
                )
                self.errors |= {failed.variant: failed.error for failed in found.failures}
            except (Stopped, UsageError):
                raise
            except SlopeError as error:  # one cannot be timed; the others can
                self.errors |= dict.fromkeys(group, str(error))
            finally:  # also what was finished before a stop
                if kept.is_file():
                    self._add(from_json(Comparison, json.loads(kept.read_text())))

    def _compare(
        self, out: Path, words: Sequence[str], names: Sequence[str], seeds: Sequence[int], **how: Any
    ) -> Comparison:
        """`slope compare`; the variants are at their best rates unless others are tried."""
        self.stop.check(out)
        words = [*self._common(), *words]
        own = {name: [*self._words(name)] for name in names}
        for name in names if "lrs" not in how else ():
            own[name].append(f"optim.lr={self._tuned(name).lr:g}")
        extra = [f"{name}: {' '.join(each)}" for name, each in own.items()]
        given = {"seeds": ",".join(map(str, seeds)), "out": out, "jobs": self.jobs}
        given |= {key: ",".join(map(str, value)) if key == "lrs" else value for key, value in how.items() if value}
        options = [f"--{key}={value}" for key, value in given.items()] + [f"--variant={text}" for text in extra]
        print(shlex.join(["slope", "compare", self.scale.recipe, *words, *options]), file=sys.stderr, flush=True)
        return compare(
            self.scale.recipe, words, out=out, extra=extra, seeds=seeds, jobs=self.jobs, stop=self.stop, **how
        )

    def _common(self) -> list[str]:
        """The settings of all runs."""
        log = ["log.sample_every=0", "log.plot=false", "log.tensorboard=false"]
        return [f"data.path={self.data.resolve()}", *log, *self.scale.words, *self.results.words]

    def _words(self, name: str) -> list[str]:
        """The settings of a variant, but for the learning rate."""
        own = VARIANTS[name]
        words = own.words.split()
        if own.like:
            words += [word for word in self._model(name).words if word.startswith("optim.")]
        if own.sizes:
            recipe, common = self.scale.recipe, self._common()
            (sized,) = variants(recipe, common, [own.sizes], [])
            usual = configs.load(recipe, common).model.overrides
            changed = {key: size for key, size in sized.config.model.overrides.items() if usual.get(key) != size}
            words += [f"model.overrides.{key}={size}" for key, size in changed.items()]
        return words

    def _model(self, name: str) -> TunedVariant:
        """The one whose learning rate a variant takes."""
        rows = [row for row in map(self._tuned, VARIANTS[name].like) if row.lr is not None]
        return min(rows, key=lambda row: best_rate(row.rates).loss.mean or math.inf, default=TunedVariant(variant=""))

    def _tuned(self, name: str) -> TunedVariant:
        return tuned(self.results, name)

    def _lacks(self, name: str) -> bool:
        """Whether a variant still has to be trained with one of the seeds."""
        runs = self.results.finals.runs if self.results.finals else []
        return not {(name, seed) for seed in self.seeds} <= {(run.variant, run.seed) for run in runs}

    def _note(self, row: TunedVariant) -> None:
        self.results.tuned = in_order([*self.results.tuned, row])
        self.write()

    def _add(self, found: Comparison | None) -> None:
        self.results.finals = merged(filter(None, [self.results.finals, found]), self.work / "merged")
        self.write()

    def write(self) -> None:
        """Write the file, and the picture of the finals beside it."""
        self.results.not_run = {name: why for name in self.scale.variants if (why := self._not_run(name))}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.out, asdict(self.results))
        picture = self.work / "merged" / "compare-time.png"
        if self.results.finals and picture.is_file():
            shutil.copyfile(picture, self.out.with_suffix(".png"))

    def _not_run(self, name: str) -> str:
        """Why the finals lack a variant, or some of its runs; empty if they do not."""
        if error := self.errors.get(name):
            return error
        if self.results.finals and any(run.variant == name for run in self.results.finals.runs):
            return ""
        if name not in self.names:
            return "left out (--only)"
        row = self._tuned(name)
        if row.lr is None:
            return "no learning rate ended its run" if row.rates else "its learning rate was not tuned"
        return "the command ended before it"


def read(file: Path, scale: str) -> QualityResults:
    """A result file; UsageError for one of another scale."""
    found = from_json(QualityResults, json.loads(file.read_text()))
    if found.scale != scale:
        raise UsageError(f"{file}: is of the scale {found.scale}, and not {scale}")
    return found


def tuned(results: QualityResults, name: str) -> TunedVariant:
    """What is known of the learning rate of a variant."""
    return next((row for row in results.tuned if row.variant == name), TunedVariant(variant=name))


def in_order(rows: Iterable[TunedVariant]) -> list[TunedVariant]:
    """Those of VARIANTS, of one that is there twice the last."""
    known = {row.variant: row for row in rows}
    return [known[name] for name in VARIANTS if name in known]


# ---------------------------------------------------------------------------------------------------------- the report

COLUMNS = ("settings", "learning rate", "steps", "validation loss", "gap to dense", "gap in time", "inference")
IGNORED = ("optim.lr=", "train.steps=")


def finals_table(results: QualityResults) -> Table:
    """The variants at their best rates, by their losses."""
    finals = results.finals
    cells: dict[str, dict[str, str]] = {}
    for found in tables(finals) if finals else ():
        for line in found.rows:
            cells.setdefault(line[0], {}).update(zip(found.columns[1:], line[1:], strict=True))
    shown = [each for each in (finals.variants if finals else ()) if each.share is None]
    rows = []
    for each in sorted(shown, key=lambda each: each.loss.mean or 0.0):
        own = cells[each.variant]
        words = [word for word in own.get("settings", NONE).split() if not word.startswith(IGNORED)]
        rate = tuned(results, each.variant)
        edge = "" if rate.inside else " (edge)"
        own |= {"settings": " ".join(words) or NONE, "learning rate": number(rate.lr, "g") + edge}
        if each.worth and each.worth.extrapolated:
            own["gap in time"] += " (extrapolated)"
        rows.append([each.variant, *(own.get(name, NONE) for name in COLUMNS)])
    note = f"What the time of {results.tokens / 1e6:.3g} million tokens of dense buys; mean ± standard error (seeds)."
    if finals and finals.exchange and finals.exchange.per_log_step:
        note += f" Gap in time: how much longer dense would take for the loss, at {finals.exchange.per_log_step:.3f}"
        note += " nats for a unit of the logarithm of its steps."
    if any("(edge)" in row[2] for row in rows):
        note += " (edge): the best rate is the lowest or highest that was tried."
    if simulated := [name for name in SIMULATED if name in cells]:
        note += f" {' and '.join(simulated)}: simulated with dense products, whose time is not the method's."
    if results.not_run:
        note += f" Not run: {', '.join(results.not_run)}."
    columns = ["variant", *COLUMNS[:-1], "bytes to serve"]
    return Table("Quality at equal time", columns, rows, note=note, left=["settings"])


def rates_table(results: QualityResults) -> Table:
    """The grids, and what was chosen."""
    rows = []
    for row in results.tuned:
        losses = [f"{number(each.lr, 'g')}: {number(each.loss.mean, '.4f')}" for each in row.rates]
        where = f"of {row.like}" if row.like else "inside" if row.inside else "at the edge of its grid"
        rows.append([row.variant, number(row.lr, "g"), where, "; ".join(losses) or NONE])
    note = f"Losses after {results.tuning_tokens / 1e6:.3g} million tokens, of one seed."
    return Table("Learning rates", ["variant", "best", "where", "losses"], rows, note=note, left=["where", "losses"])


def main() -> None:
    """Run stages, and write and show what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of `slope data prepare`")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs; one for each scale")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, or to go on with")
    parser.add_argument("--scale", choices=SCALES, default="mini")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--only", help=f"variants beside dense, comma-separated, of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", help="of the finals, comma-separated")
    parser.add_argument("--tuned", type=Path, help="an earlier result file, whose learning rates are taken")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="result files whose finals are added")
    parser.add_argument("--budget", type=float, help="seconds after which all is stopped, as by a signal")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="settings of all runs")
    given = parser.parse_args()
    scale, stages, only = SCALES[given.scale], given.stages.split(","), (given.only or "").split(",")
    if unknown := [name for name in stages if name not in STAGES]:
        parser.error(f"--stages {unknown[0]}: choose some of {', '.join(STAGES)}")
    if unknown := [name for name in only if name not in ("", *scale.variants)]:
        parser.error(f"--only {unknown[0]}: choose some of {', '.join(scale.variants)}")
    names = [name for name in scale.variants if not given.only or name in (BASELINE, *only)]
    with StopFlag() as stop:
        clock = threading.Timer(given.budget or 0.0, lambda: setattr(stop, "name", stop.name or "--budget"))
        clock.daemon = True
        if given.budget is not None:
            clock.start()
        try:
            results = _results(given.out, given.scale, given.words)
            if given.tuned:
                results.tuned = in_order([*read(given.tuned, given.scale).tuned, *results.tuned])
            seeds = numbers("--seeds", given.seeds, int) if given.seeds else scale.seeds
            bench = Bench(
                scale, given.data, given.work, results, names, seeds, given.jobs, given.out, stop, given.merge
            )
            try:
                for stage in (stage for stage in STAGES if stage in stages):
                    getattr(bench, stage)()
            finally:
                bench.write()
                Document("Quality", [finals_table(results), rates_table(results)]).show()
        except SlopeError as error:
            parser.exit(error.exit_code, f"{'' if isinstance(error, Stopped) else 'error: '}{error}\n")


def _results(file: Path, scale: str, words: Sequence[str]) -> QualityResults:
    """Those of a file to go on with, or new ones."""
    if file.is_file():
        found = read(file, scale)
        if found.words != words:
            raise UsageError(f"{file}: is of runs with {' '.join(found.words) or 'no settings'}; choose another --out")
        return found
    own = SCALES[scale]
    step, tuning = configs.load(own.recipe, [*own.words, *words]).train.tokens_per_step, own.tuning_steps
    how: dict[str, Any] = {"tokens": own.steps * step, "tuning_tokens": tuning * step, "words": [*words]}
    return QualityResults(scale=scale, recipe=own.recipe, **how)


if __name__ == "__main__":
    main()
