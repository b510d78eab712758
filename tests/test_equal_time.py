"""`slope compare --equal time`: the steps that time buys, how it is measured, and what a loss is worth in steps."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.data import prepared, scratch
from support.processes import has_content, stopped, wait_until
from support.runs import RECIPE, copied, slope, small

from slope_cli.benchmarks.timing import Timing
from slope_cli.compare import budget, results, step_times, summary, table, variants
from slope_cli.compare.budget import Budget, PhaseTime
from slope_cli.compare.rows import FailedRun
from slope_cli.compare.step_times import FILE, StepTime
from slope_cli.compare.summary import Comparison, Curve, Spread, Summary
from slope_cli.config import configs
from slope_cli.config.schema import Config
from slope_cli.distributed.signals import StopFlag
from slope_cli.errors import UsageError
from slope_cli.methods import phases_of
from slope_cli.report import metrics
from slope_cli.train import starts
from slope_cli.train.loop import pretrain
from slope_cli.utils import jsonl
from slope_cli.utils.environment import environment
from slope_cli.utils.typed_json import from_json

PHASED = {
    "dense": "",
    "slope": "adapters.start=0.5",
    "slope-late": "method=slope adapters.start=0.99",
    "slope-three": "method=slope sparsity.start=0.3 adapters.start=0.8",
    "sr_ste": "sparsity.start=0.25",
    "fst": "fst.dense_finish=0.17 sparsity.start=0.1",
}
"""Variants with one to three phases, and their settings."""


def words(*more: str) -> list[str]:
    own = [word for word in small("gpt2-nano") if not word.startswith("train.seed")]
    return [*own, f"data.path={prepared()}", "log.val_every=2", *more]


def phased(name: str, steps: int) -> Config:
    own = PHASED[name].split()
    method = [] if "-" in name else [f"method={name}"]
    return configs.load(str(RECIPE), words(*method, *own, f"train.steps={steps}"))


def one_by_one(config: Config, step_seconds: dict[str, float]) -> float:
    """The time of a run, step by step."""
    return sum(step_seconds[phases_of(config).at(step).name] for step in range(config.train.steps))


# ----------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("name", PHASED)
def test_time_buys_as_many_steps_as_fit_and_no_more(name: str) -> None:
    draw = random.Random(name)
    for _ in range(6):
        config = phased(name, 60)
        step_seconds = {phase.name: draw.uniform(0.3, 3.0) for phase in phases_of(config).distinct}
        whole = one_by_one(config, step_seconds)
        assert budget.budget(config, step_seconds, "").seconds == pytest.approx(whole)
        assert budget.steps_bought(config, step_seconds, whole) == 60  # its own time buys its own steps
        seconds = draw.uniform(5, 100)
        found = budget.steps_bought(config, step_seconds, seconds)
        assert one_by_one(budget.with_steps(config, found), step_seconds) <= seconds
        assert one_by_one(budget.with_steps(config, found + 1), step_seconds) > seconds


def test_a_budget_counts_the_steps_of_each_phase() -> None:
    config = phased("slope-three", 50)
    found = budget.budget(config, {"dense": 1.0, "sparse": 0.5, "sparse, with adapters": 2.0}, "a rule")
    assert [(each.phase, each.steps) for each in found.phases] == [
        ("dense", 15),
        ("sparse", 25),
        ("sparse, with adapters", 10),
    ]
    assert (found.steps, found.seconds) == (50, 15 + 12.5 + 20)
    assert [found.seconds_until(step) for step in (0, 10, 15, 17, 40, 41)] == [0, 10, 15, 16, 27.5, 29.5]


def test_time_buys_one_step_at_least_and_a_phase_that_was_not_measured_takes_the_slowest() -> None:
    config = phased("slope-three", 50)
    times = {"sparse": 0.5, "sparse, with adapters": 2.0}
    assert budget.steps_bought(config, times, 1e-6) == 1
    assert budget.budget(config, times, "").phases[0] == PhaseTime("dense", 15, 2.0)


# --------------------------------------------------------------------------------------- what a loss is worth


def run(name: str, steps: int, seconds: float, by_seed: dict[int, float]) -> Summary:
    """A variant's summary by its losses."""
    none = Spread(None, None, 0)
    return Summary(
        **{"variant": name, "lr": None, "seeds": [*by_seed], "failed_seeds": [], "by_seed": by_seed},
        **{"loss": none, "perplexity": none, "by_source": {}, "tokens": None, "tokens_per_s": None},
        **{"train_seconds": seconds, "peak_memory": None, "curve": Curve([], [], [], []), "steps": steps},  # type: ignore[arg-type]
    )


def law(steps: float) -> float:
    return 5 - 0.2 * math.log(steps)


def worth(variant: Summary, baseline: Summary, shorter: Summary) -> summary.Worth | None:
    gap = summary.paired(variant.by_seed, baseline.by_seed)
    return summary.worth(replace(variant, gap=gap), baseline, summary.exchange_rate(shorter, baseline))


@pytest.mark.parametrize("steps", [850, 900, 990, 700, 1100, 1500])
def test_a_gap_is_worth_the_steps_at_which_the_baseline_has_that_loss(steps: int) -> None:
    """By losses that fall with the logarithm of the steps; the seeds differ by a constant that pairing removes."""
    noise = {1: 0.0, 2: 0.03, 3: -0.01}
    baseline, shorter, variant = (
        run(name, length, time, {seed: law(at) + extra for seed, extra in noise.items()})
        for name, length, time, at in (
            ("dense", 1000, 50.0, 1000),
            ("dense-0.8-steps", 800, 40.0, 800),
            ("x", 1234, 25.0, steps),
        )
    )
    found = worth(variant, baseline, shorter)
    assert found is not None
    assert found.steps == pytest.approx(steps - 1000)
    assert found.time == pytest.approx(steps / 1000 * 50 / 25 - 1)
    assert found.error == pytest.approx(0, abs=1e-6)
    assert found.extrapolated == (not 800 <= steps <= 1000)


def test_the_error_of_a_worth_is_that_of_draws() -> None:
    rng = np.random.default_rng(0)
    gaps, rates = rng.normal(0.02, 0.004, 20000), rng.normal(0.05, 0.005, 20000) / math.log(1000 / 800)
    expected = np.std(np.exp(-gaps / rates)) / np.mean(np.exp(-gaps / rates))
    spread = {1: -1.0, 2: 1.0}  # the standard error of two values is half of their distance
    baseline = run("dense", 1000, 1.0, {1: 3.0, 2: 3.0})
    shorter = run("short", 800, 0.8, {seed: 3.05 + 0.005 * at for seed, at in spread.items()})
    variant = run("x", 1000, 1.0, {seed: 3.02 + 0.004 * at for seed, at in spread.items()})
    found = worth(variant, baseline, shorter)
    assert found is not None
    assert found.error == pytest.approx(expected, rel=0.1)
    single = [replace(each, by_seed={1: each.by_seed[1]}) for each in (variant, baseline, shorter)]
    alone = worth(*single)
    assert alone is not None
    assert alone.error is None


def test_no_exchange_rate_no_worth() -> None:
    baseline = run("dense", 1000, 1.0, {1: 3.0, 2: 3.0})
    near = run("x", 1000, 1.0, {1: 3.01, 2: 3.01})
    shorter = run("short", 800, 0.8, {1: 3.05, 2: 3.06})
    assert worth(near, baseline, shorter) is not None
    assert worth(near, baseline, run("short", 800, 0.8, {1: 3.00, 2: 3.05})) is None  # undecided
    assert worth(near, baseline, run("short", 800, 0.8, {1: 2.95, 2: 2.94})) is None  # fewer steps are not better
    assert worth(run("x", 1000, 1.0, {1: 4.0, 2: 4.0}), baseline, shorter) is None  # a fourth of the steps, or fewer
    assert worth(baseline, baseline, shorter) is None
    assert worth(shorter, baseline, shorter) is None  # which the rate is of: it would say its own steps
    assert summary.exchange_rate(run("short", 800, 0.8, {3: 3.0}), baseline) is None


def test_a_difference_smaller_than_twice_its_standard_error_is_undecided() -> None:
    theirs = dict.fromkeys((1, 2, 3, 4), 3.0)
    for shift, undecided in ((0.00, True), (0.019, True), (0.021, False), (-0.021, False)):
        ours = {seed: 3.0 + shift + at for seed, at in zip(theirs, (-0.015, 0.015, -0.0185, 0.0185), strict=True)}
        found = summary.paired(ours, theirs)
        assert found.stderr == pytest.approx(0.00972, abs=1e-4)
        assert found.undecided is undecided
    assert summary.paired({1: 2.0}, {1: 3.0}).undecided is None


# ------------------------------------------------------------------------------------------------- comparisons


def measured(out: Path, ratios: dict[str, dict[str, float]], extra: Sequence[str] = (), *more: str) -> None:
    """Write the step times that an earlier call has measured for the variants dense and slope, and others."""
    found = variants.variants(str(RECIPE), words(*more), ["dense", "slope"], extra)
    out.mkdir(parents=True, exist_ok=True)
    for variant in found:
        for phase, ratio in ratios.get(variant.name, {}).items():
            keys = {"key": step_times.key_of(variant.config), "baseline_key": step_times.key_of(found[0].config)}
            row = StepTime(
                **keys, variant=variant.name, phase=phase, ratio=ratio, ratio_error=0.01, step_seconds=0.5 * ratio,
                baseline_seconds=0.5, alternated=True, environment=environment(),
            )  # fmt: skip
            jsonl.append(out / FILE, asdict(row))


def trained(out: Path, seeds: Sequence[int], shorter: Sequence[variants.Variant] = ()) -> None:
    """Train in this process what `compare` would train in others, where it then finds it."""
    found = variants.variants(str(RECIPE), words(), ["dense", "slope"], [])
    with StopFlag() as stop:
        longer, _ = step_times.equal_time([*found, *shorter], out, stop)
    for planned in variants.planned_runs(longer, seeds):
        pretrain(planned.config, out / planned.name)


def compared(out: Path, *more: str, **options: Any) -> Comparison:
    how: dict[str, Any] = {"methods": ["dense", "slope"], "equal": "time"}
    return results.compare(str(RECIPE), words(*more), out=out, **{**how, **options})


RATIOS = {"slope": {"sparse": 0.5, "sparse, with adapters": 0.75}}


@cache
def finished() -> Path:
    """A comparison's folder with its runs; copy it before you alter it."""
    out = scratch() / "equal-time"
    measured(out, RATIOS)
    (dense,) = variants.variants(str(RECIPE), words(), ["dense"], [])
    trained(out, [1, 2], [dense.shortened(0.5)])
    return out


def test_the_first_variant_keeps_its_steps_and_the_others_get_its_time(tmp_path: Path) -> None:
    out = copied(finished(), tmp_path)
    found = compared(out, seeds=[1, 2], exchange=0.5)
    dense_row, slope_row, shorter = found.variants
    # 6 steps of 0.5 s; of slope's 9, the first 4 (half, rounded to even) take 0.25 s each and 5 take 0.375.
    assert (found.equal, dense_row.steps, slope_row.steps, shorter.steps) == ("time", 6, 9, 3)
    assert (dense_row.budget_seconds, slope_row.budget_seconds) == (3.0, 4 * 0.25 + 5 * 0.375)
    assert shorter.budget_seconds == 1.5
    assert slope_row.step_seconds == pytest.approx(2.875 / 9)
    assert slope_row.curve.tokens == [128, 256, 384, 512, 576]
    assert slope_row.curve.seconds == pytest.approx([0.5, 1.0, 1.75, 2.5, 2.875])
    assert (slope_row.tokens, dense_row.tokens, shorter.share) == (9 * 64, 6 * 64, 0.5)
    assert found.exchange is not None
    assert (found.exchange.variant, found.exchange.steps, found.exchange.nats) == ("dense-0.5-steps", 3, shorter.gap)
    written = json.loads((out / "compare.json").read_text())
    assert from_json(Comparison, written) == found
    text = (out / "compare.md").read_text()
    assert "over dense's 500 ms, in alternating rounds, ± standard error: slope: sparse 0.500 ± 0.010, sparse," in text
    assert f"torch {torch.__version__}" in text
    assert "| a step | time | logged | tokens |" in text
    assert "dense-0.5-steps: 3 of 6 steps, for the exchange rate" in text
    assert "seconds of training steps as measured" in (out / "compare-time.svg").read_text()
    # The learning rate follows the new length: warm-up, then the lowest in the last step.
    rates = [record["lr"] for record in jsonl.read(out / "slope-s1" / "metrics.jsonl") if "lr" in record]
    assert (len(rates), rates.index(max(rates)), rates[-1]) == (9, 0, min(rates))


def step_seconds(run: Path) -> dict[int, float]:
    """The time of each step by the log of a run of 64 tokens a step."""
    return {row["step"]: 64 / row["tokens_per_s"] for row in metrics.read(run) if row["kind"] == "train"}


def test_the_time_that_steps_took_is_compared_with_the_first_variants(tmp_path: Path) -> None:
    """By the logs of both, seed by seed; a machine is free to be slower than when the steps were timed."""
    out = copied(finished(), tmp_path)
    found = compared(out, seeds=[1, 2], exchange=0.5)
    dense, slope, shorter = found.variants
    assert (dense.time_gap, shorter.time_gap) == (None, None)
    assert slope.time_gap is not None
    ours, theirs = ([step_seconds(out / f"{name}-s{seed}") for seed in (1, 2)] for name in ("slope", "dense"))
    ratios = [sum(own.values()) / sum(other.values()) for own, other in zip(ours, theirs, strict=True)]
    assert slope.time_gap.logged == pytest.approx(np.mean(ratios) - 1)

    def steady(times: dict[int, float], *firsts: int) -> float:
        usual = float(np.median([*times.values()]))
        return sum(times.values()) - sum(max(0, times[step] - usual) for step in firsts)

    ratios = [steady(own, 1, 5) / steady(other, 1) for own, other in zip(ours, theirs, strict=True)]  # adapters joined
    assert slope.time_gap.steady == pytest.approx(np.mean(ratios) - 1)
    assert from_json(Comparison, json.loads((out / "compare.json").read_text())) == found
    # A comparison of equal tokens does not say how long its variants took.
    runs = [out / f"{name}-s1" for name in ("dense", "slope")]
    assert [each.time_gap for each in results.compare_runs(runs, out=tmp_path, allow_different=True).variants] == [
        None
    ] * 2


def test_a_run_that_is_slower_than_its_time_allows_is_named(tmp_path: Path) -> None:
    """As on a GPU that is busy: of slope's log each step takes three times as long as one of the first variant's."""
    out = copied(finished(), tmp_path)
    found = compared(out, seeds=[1, 2])
    dense = {run.seed: run.train_seconds for run in found.runs if run.variant == "dense"}

    def with_seconds(share: float) -> Comparison:
        rows = [
            replace(run, train_seconds=share * dense[run.seed], first_seconds=0.0) if run.variant == "slope" else run
            for run in found.runs
        ]
        return summary.summarize(rows, [], allow_different=False)

    assert [with_seconds(share).unequal for share in (1.0, 1.029, 0.971)] == [[], [], []]
    (note,) = with_seconds(1.5).unequal
    said, _, steady = note.partition(" (")
    assert said == "by the logs slope's steps took 50.0% more time than dense's"
    assert re.fullmatch(r"\d+\.\d% more without the first steps, which compile\)", steady)
    (note,) = with_seconds(0.9).unequal
    assert note.startswith("by the logs slope's steps took 10.0% less time than dense's (")
    assert f"* NOT EQUAL TIME: {note}\n" in table.document(with_seconds(0.9)).markdown()
    older = [replace(each, time_gap=summary.TimeGap(0.1, None)) for each in found.variants[1:]]
    assert summary.unequal_times("dense", older) == ["by the logs slope's steps took 10.0% more time than dense's"]


def test_first_steps_are_those_of_starts_and_phases(tmp_path: Path) -> None:
    config = configs.load(str(RECIPE), words("method=slope", "log.save_every=2", "train.seed=1"))
    pretrain(config, tmp_path / "run")
    rows = metrics.read(tmp_path / "run")
    assert starts.first_steps(tmp_path / "run", rows) == {1, 4}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    pretrain(config, tmp_path / "run")
    assert starts.first_steps(tmp_path / "run", metrics.read(tmp_path / "run")) == {1, 4, 5}


def test_a_share_of_the_runs_is_of_equal_tokens_if_the_whole_is(tmp_path: Path) -> None:
    """As a task of a job array that has the shorter run alone."""
    (dense,) = variants.variants(str(RECIPE), words(), ["dense"], [])
    for planned in variants.planned_runs([dense, dense.shortened(0.5)], [1]):
        pretrain(planned.config, tmp_path / planned.name)
    how: dict[str, Any] = {"methods": ["dense"], "exchange": 0.5, "equal": "tokens"}
    assert [compared(tmp_path, **how, shard=f"{number}/2").equal for number in (1, 2)] == ["tokens"] * 2


def test_a_restart_measures_nothing_and_a_new_variant_alone_is_measured(tmp_path: Path) -> None:
    out = copied(finished(), tmp_path)
    before = (out / FILE).read_bytes()
    assert [run.final.step for run in compared(out).runs] == [6, 9]
    assert (out / FILE).read_bytes() == before
    assert not (out / "step-times.log").exists()
    assert "a gap over one seed has no standard error" in (out / "compare.md").read_text()
    assert "gaps in steps: not measured; --exchange 0.8" in (out / "compare.md").read_text()
    found = variants.variants(str(RECIPE), words(), ["dense", "slope", "half-depth"], [])
    unknown = [name for name, times in step_times._found(found, out).items() if None in times.values()]
    assert unknown == ["half-depth"]
    other = variants.variants(str(RECIPE), words("train.seq_len=16"), ["dense", "slope"], [])
    assert [*step_times._found(other, out)["slope"].values()] == [None, None]
    same = variants.variants(str(RECIPE), words("train.seed=7", "optim.lr=0.3", "log.every=1"), ["dense", "slope"], [])
    assert None not in step_times._found(same, out)["slope"].values()


@pytest.mark.slow
def test_comparisons_at_equal_time_merge_and_do_not_mix_with_those_of_equal_tokens(tmp_path: Path) -> None:
    files = []
    for seed, ratio in ((1, 0.5), (2, 1.5)):  # two machines, on which slope gets other steps
        out = tmp_path / str(seed)
        measured(out, {"slope": dict.fromkeys(RATIOS["slope"], ratio)})
        trained(out, [seed])
        compared(out, seeds=[seed])
        files.append(out / "compare.json")
    found = results.compare_runs(files, out=tmp_path / "both")
    assert found.equal == "time"
    assert [(each.variant, each.seeds) for each in found.variants] == [("dense", [1, 2]), ("slope", [1, 2])]
    assert [run.final.step for run in found.runs] == [6, 12, 6, 4]
    rule = "differ in tokens: what the time of 384 tokens of dense buys and 384"
    with pytest.raises(UsageError, match=rule):
        results.compare_runs([files[0], tmp_path / "2" / "dense-s2"], out=tmp_path / "mixed")


def test_step_times_are_measured_with_the_training_loops_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_times, "TIMING", Timing(warm_up=1, rounds=3))
    found = variants.variants(str(RECIPE), words(), ["slope", "dense"], [])
    for each in found:
        (tmp_path / f"{each.name}.yaml").write_text(configs.dump(each.config))
    step_times.measure(tmp_path, tmp_path, "slope", ["slope", "dense"])
    rows = [from_json(StepTime, record) for record in jsonl.read(tmp_path / FILE)]
    assert [(row.variant, row.phase) for row in rows] == [("slope", "sparse, with adapters"), ("dense", "dense")]
    for row in rows:
        assert row.alternated
        assert min(row.ratio, row.step_seconds, row.baseline_seconds) > 0
        assert {"torch", "processor", "gpu", "date"} <= row.environment.keys()
        assert row.baseline_key == step_times.key_of(found[0].config)
    with StopFlag() as stop:  # all is known, and no process starts
        assert [each.name for each in step_times.equal_time(found, tmp_path, stop)[0]] == ["slope", "dense"]
    assert not (tmp_path / "step-times.log").exists()


def test_steps_of_a_phase_go_round_with_its_share_of_mask_updates(tmp_path: Path) -> None:
    config = configs.load(str(RECIPE), words("method=slope", "slope.mask_update_interval=3", "train.steps=12"))
    last = phases_of(config).distinct[-1]
    steps = step_times.Steps(config, last, tmp_path / "run")
    try:
        assert steps._trainer.phase is not None
        assert (steps._trainer.phase.name, steps.each) == ("sparse, with adapters", 3)
        seen = []
        for _ in range(4):
            seen.append(steps._trainer.step)
            steps()
    finally:
        steps.close()
    assert set(seen) <= {6, 9, 12}
    assert steps._trainer.optimizer.param_groups[-1]["params"]


class Alone(step_times.Steps):
    """Steps that do not fit into memory beside others."""

    held = 0

    def __init__(self, *where: Any) -> None:
        if Alone.held:
            raise torch.OutOfMemoryError("CUDA out of memory")
        Alone.held += 1
        super().__init__(*where)

    def close(self) -> None:
        super().close()
        Alone.held -= 1


def test_a_rate_that_is_not_known_yet_is_not_recommended_again(tmp_path: Path) -> None:
    """The comparison was stopped before the shorter runs, or they failed."""
    found = compared(copied(finished(), tmp_path), seeds=[1, 2], exchange=0.5)
    rows = [run for run in found.runs if run.share is None]
    failed = FailedRun("dense-0.5-steps-s1", "dense-0.5-steps", None, 1, "killed", share=0.5)
    said = "gaps in steps: not measured, as no seed of dense-0.5-steps and dense is finished in both"
    assert said in table.document(summary.summarize([*rows, failed], [], allow_different=False)).below


def test_what_does_not_fit_into_memory_together_is_timed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "TIMING", Timing(warm_up=1, rounds=2))
    config = configs.load(str(RECIPE), words("method=dense"))
    (phase,) = phases_of(config).distinct

    def make() -> step_times.Steps:
        return Alone(config, phase, tmp_path / "run")

    rounds, together = step_times.alternated(make, make)
    assert (len(rounds), together, Alone.held) == (2, False, 0)
    assert all(len(row) == 2 and min(row) > 0 for row in rounds)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"equal": "bytes"}, "--equal bytes: choose tokens or time; .* the variant same-bytes"),
        ({"methods": ["dense"]}, "--equal time: needs a second variant"),
        ({"methods": ["dense"], "exchange": 0.5}, "--equal time: needs a second variant"),
        ({"extra": ["short: train.steps=3"]}, "short: leave train.steps out of it, which --equal time decides"),
        ({"exchange": 1.5}, "--exchange 1.5: must be a share of dense's 6 steps that leaves some of them, and not all"),
        ({"exchange": 0.01}, "--exchange 0.01: must be a share"),
        ({"exchange": float("nan")}, "--exchange nan: must be a share"),
        ({"extra": ["other: data.path=embedded"]}, "differ in data"),
    ],
)
def test_wrong_usage(how: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        compared(tmp_path, **how)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option",
    [
        "--equal time",
        "--exchange 0.8",
        "--methods dense",
        "--variant x:",
        "--seeds 2",
        "--lrs 1",
        "--jobs 2",
        "--shard 1/2",
    ],
)
def test_what_is_for_runs_to_train_is_refused_with_runs_that_exist(option: str, tmp_path: Path) -> None:
    result = slope("compare", "--runs", tmp_path, *option.split())
    assert result.code == 2
    assert f"{option.split()[0]}: is for runs that are still to be trained" in result.err


def test_budgets_are_read_back() -> None:
    own = Budget("a rule", [PhaseTime("dense", 3, 0.5), PhaseTime("sparse", 4, 0.25)])
    assert from_json(Budget, json.loads(json.dumps(asdict(own)))) == own


def test_times_are_measured_again_for_what_they_depend_on_alone() -> None:
    def key(*overrides: str) -> str:
        return step_times.key_of(configs.load(str(RECIPE), words("optim.name=muon", *overrides)))

    same = ("optim.lr=3e-3", "optim.muon_lr=1e-3", "train.seed=9", "train.steps=77", "log.every=3")
    assert {key(each) for each in same} == {key()}
    other = ("train.precision=bf16", "train.precision=fp8", "optim.name=adamw", "model.overrides.n_layer=1")
    assert len({key(), *map(key, other)}) == 1 + len(other)


@pytest.mark.slow
def test_a_whole_comparison_at_equal_time_in_processes_of_its_own(tmp_path: Path) -> None:
    options = ["--methods", "dense,slope", "--equal", "time", "--exchange", "0.5", "--out", tmp_path, "--json"]
    result = slope("compare", RECIPE, *words("train.steps=20"), *options)
    assert result.code == 0, result.err
    found = from_json(Comparison, json.loads(result.out))
    dense, sparse, _ = found.variants
    rows = {row["phase"]: row for row in jsonl.read(tmp_path / FILE)}
    assert set(rows) == {"sparse", "sparse, with adapters"}
    assert dense.budget_seconds is not None
    assert sparse.budget_seconds is not None
    assert sparse.steps is not None
    assert sparse.budget_seconds <= dense.budget_seconds
    longest = max(row["ratio"] for row in rows.values()) * dense.budget_seconds / 20
    assert sparse.budget_seconds > dense.budget_seconds - 1.01 * longest
    before = (tmp_path / FILE).read_bytes()
    again = slope("compare", RECIPE, *words("train.steps=20"), *options)
    assert again.out == result.out
    assert (tmp_path / FILE).read_bytes() == before
    # What cannot be built cannot be timed.
    wide = slope("compare", RECIPE, *words("train.steps=20"), *options, "--variant", "wide: model.overrides.n_head=3")
    assert wide.code == 1
    assert "wide, sparse: could not be timed: model gpt2-nano: 3 attention heads do not divide" in wide.err


@pytest.mark.slow
def test_a_signal_while_steps_are_timed_ends_with_75_and_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "slope_cli", "compare", str(RECIPE), *words("train.steps=20")]
    command += ["--methods", "dense,slope", "--equal", "time", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    log = tmp_path / "step-times.log"
    wait_until(lambda: has_content(log))
    err = stopped(process)
    assert "stopped by SIGTERM while step times were measured; run the same command to resume" in err
    size = log.stat().st_size
    time.sleep(1)
    assert log.stat().st_size == size
    assert not (tmp_path / "dense-s1").exists()
