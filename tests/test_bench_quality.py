"""`slope_cli.benchmarks.quality`: grids that grow, rates that are chosen, finals that merge, and all its stages."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.data import prepared, scratch, write_data
from support.runs import RECIPE, small

from slope_cli.benchmarks import quality, render
from slope_cli.benchmarks.quality import SCALES, VARIANTS, Bench, beside, merged, next_rates
from slope_cli.benchmarks.records import QualityResults, TunedVariant
from slope_cli.compare import results, step_times, variants
from slope_cli.compare.step_times import FILE, StepTime
from slope_cli.compare.summary import Comparison, Curve, Spread, Summary, best_rate
from slope_cli.config import configs
from slope_cli.distributed.signals import StopFlag
from slope_cli.errors import UsageError
from slope_cli.train.loop import pretrain
from slope_cli.utils import jsonl
from slope_cli.utils.environment import environment

# ------------------------------------------------------------------------------------------------------ learning rates


def tried(lr: float, loss: float | None) -> Summary:
    """A variant at one learning rate; without a loss its run failed."""
    nothing: dict[str, Any] = dict.fromkeys(("tokens", "tokens_per_s", "train_seconds", "peak_memory"))
    nothing |= {"perplexity": Spread(None, None, 0), "by_source": {}, "curve": Curve([], [], [], [])}
    seeds: tuple[list[int], list[int]] = ([], [1]) if loss is None else ([1], [])
    by_seed = {} if loss is None else {1: loss}
    return Summary("dense", lr, *seeds, loss=Spread(loss, None, len(by_seed)), by_seed=by_seed, **nothing)


def searched(grid: Sequence[float], best: float, fails_from: float = math.inf, extensions: int = 4) -> list[Summary]:
    """All rates that are tried where the loss grows with the distance from the best one."""
    found: list[Summary] = []
    while rates := next_rates(grid, found, extensions):
        found += [tried(lr, None if lr >= fails_from else 3 + math.log2(lr / best) ** 2) for lr in rates]
    return found


def test_rates_are_a_series_of_which_each_third_is_the_double() -> None:
    assert [beside(2e-3, steps) for steps in range(-2, 4)] == [1e-3, 1.41e-3, 2e-3, 2.83e-3, 4e-3, 5.66e-3]
    for scale in SCALES.values():
        rates = {rate for grid in scale.rates.values() for rate in grid}
        assert {beside(rate, 0) for rate in rates} == rates


@pytest.mark.parametrize(
    ("best", "fails_from", "lrs"),
    [
        (4e-3, math.inf, [2.83e-3, 4e-3, 5.66e-3]),
        (8e-3, math.inf, [2.83e-3, 4e-3, 5.66e-3, 8e-3, 1.13e-2]),
        (1e-3, math.inf, [2.83e-3, 4e-3, 5.66e-3, 2e-3, 1.41e-3, 1e-3, 7.07e-4]),
        (8e-3, 8e-3, [2.83e-3, 4e-3, 5.66e-3, 8e-3]),  # a rate that fails ends the grid
        (1.41e-3, 2.83e-3, [2.83e-3, 4e-3, 5.66e-3, 2e-3, 1.41e-3, 1e-3]),
    ],
)
def test_a_grid_grows_until_its_best_rate_is_inside(best: float, fails_from: float, lrs: list[float]) -> None:
    found = searched((2.83e-3, 4e-3, 5.66e-3), best, fails_from)
    assert [each.lr for each in found] == lrs
    assert not best_rate(found).lr_at_edge


def test_a_grid_grows_no_further_than_it_may() -> None:
    found = searched((4e-3, 8e-3), 1.0, extensions=2)
    assert [each.lr for each in found] == [4e-3, 8e-3, 1.13e-2, 1.6e-2]
    assert best_rate(found).lr_at_edge
    assert len(searched((4e-3, 8e-3), 1.0, fails_from=0.0, extensions=3)) == 5


# ----------------------------------------------------------------------------------------------------------- settings


def bench(folder: Path, scale: str = "mini", tuned: Sequence[TunedVariant] = (), **how: Any) -> Bench:
    found = QualityResults(scale=scale, recipe=SCALES[scale].recipe, tokens=1000, tuning_tokens=250, tuned=[*tuned])
    given: dict[str, Any] = {"names": SCALES[scale].variants, "seeds": [1], "jobs": 1, "stop": StopFlag()}
    where = {"data": Path(prepared()), "work": folder / "work", "out": folder / "out.json"}
    return Bench(scale=SCALES[scale], results=found, **where, **{**given, **how})


def tuned(name: str, losses: Mapping[float, float], words: str = "") -> TunedVariant:
    rates = [tried(lr, loss) for lr, loss in losses.items()]
    return TunedVariant(variant=name, words=words.split(), rates=rates, lr=best_rate(rates).lr, inside=True)


@pytest.mark.parametrize("scale", SCALES)
def test_every_variant_has_settings_that_have_an_effect(scale: str, tmp_path: Path) -> None:
    found = bench(tmp_path, scale)
    for name in SCALES[scale].variants:
        words = [*found._common(), *found._words(name)]
        config = configs.load(SCALES[scale].recipe, words)
        assert configs.without_effect(config, words) == [], name
        if sizes := VARIANTS[name].sizes:
            (ready,) = variants.variants(SCALES[scale].recipe, found._common(), [sizes], [])
            assert config.model == ready.config.model


def test_a_variant_takes_the_rate_and_the_optimizer_of_the_best_among_others(tmp_path: Path) -> None:
    dense = tuned("dense", {1e-3: 3.2, 2e-3: 3.1})
    for loss, optimizer, lr in ((3.0, "muon", 8e-3), (3.15, "adamw", 2e-3)):
        muon = tuned("dense-muon", {8e-3: loss}, "method=dense optim.name=muon")
        found = bench(tmp_path, tuned=[dense, muon])
        words = [*found._common(), *found._words("dense-0.87")]
        assert configs.load("gpt2-mini", words).optim.name == optimizer
        assert found._model("dense-0.87").lr == lr


# -------------------------------------------------------------------------------------------------------------- merging


def finals(out: Path, seed: int, name: str, ratio: float, second: float, lr: float = 0.01) -> Comparison:
    """The finals of one seed, of dense and another variant, with measured step times; trained in this process."""
    words = [*small("gpt2-nano"), f"data.path={prepared()}", "log.val_every=2", "adapters.rank=0"]
    extra = [f"dense: method=dense optim.lr={lr}", f"{name}: {VARIANTS[name].words} optim.lr={lr}"]
    chosen = variants.variants(str(RECIPE), words, [], extra)
    out.mkdir(parents=True)
    keys = {"key": step_times.key_of(chosen[1].config), "baseline_key": step_times.key_of(chosen[0].config)}
    phase = "dense" if "method=dense" in VARIANTS[name].words else "sparse"
    times = {"step_seconds": ratio * second, "baseline_seconds": second, "alternated": True}
    row = StepTime(variant=name, phase=phase, ratio=ratio, ratio_error=0.01, environment=environment(), **keys, **times)  # type: ignore[arg-type]
    jsonl.append(out / FILE, asdict(row))
    with StopFlag() as stop:
        timed, _ = step_times.equal_time([*chosen, chosen[0].shortened(0.5)], out, stop)
    for planned in variants.planned_runs(timed, [seed]):
        pretrain(planned.config, out / planned.name)
    return results.compare(str(RECIPE), words, out=out, extra=extra, seeds=[seed], equal="time", exchange=0.5)


@cache
def parts() -> list[Comparison]:
    """Of two seeds and two variants; the second machine is twice as slow."""
    folder = scratch() / "quality"
    return [
        finals(folder / "1", 1, "slope", 0.5, 0.25),
        finals(folder / "2", 2, "slope", 0.75, 0.5),
        finals(folder / "3", 1, "dense-muon", 1.5, 0.25),
    ]


def test_finals_of_other_seeds_and_variants_merge_on_one_clock(tmp_path: Path) -> None:
    found = merged(parts(), tmp_path)
    assert found is not None
    assert [(each.variant, each.seeds) for each in found.variants] == [
        ("dense", [1, 2]),
        ("slope", [1, 2]),
        ("dense-muon", [1]),
        ("dense-0.5-steps", [1, 2]),
    ]
    assert found.equal == "time"
    assert [run.final.step for run in found.runs] == [6, 6, 12, 8, 4, 3, 3]
    budgets = [run.budget.seconds for run in found.runs if run.budget]
    assert budgets == pytest.approx([6 * 0.25] * 5 + [3 * 0.25] * 2)
    assert found.exchange is not None
    assert found.exchange.nats.seeds == [1, 2]
    assert sum("in alternating rounds" in note for note in found.notes) == 3
    first = parts()[0].runs[1]
    assert [run for run in found.runs if (run.variant, run.seed) == ("slope", 1)] == [first]
    again = merged([found, *parts()], tmp_path)
    assert again is not None
    assert (again.variants, again.notes) == (found.variants, found.notes)
    assert (tmp_path / "compare-time.png").is_file()
    assert merged([replace(parts()[0], runs=[first])], tmp_path) is None  # no dense run, no clock


def test_a_variant_at_two_learning_rates_does_not_merge(tmp_path: Path) -> None:
    other = finals(tmp_path / "other", 3, "slope", 0.5, 0.25, lr=0.02)
    with pytest.raises(UsageError, match="names two configurations"):
        merged([parts()[0], other], tmp_path / "merged")


def test_the_file_says_what_was_not_run_and_the_table_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {5e-3: 3.0, 1e-2: 2.0, 2e-2: 3.0}
    rows = [tuned("dense", losses), replace(tuned("slope", losses), inside=False), tuned("half-depth", losses)]
    found = bench(tmp_path, "small", rows, names=["dense", "slope", "half-depth", "dense-muon", "slope-muon"])
    found.errors["slope-muon"] = "CUDA out of memory"
    for part in parts()[:2]:
        found._add(part)
    written = quality.read(tmp_path / "out.json", "small")
    assert written.finals == found.results.finals
    assert written.not_run == {
        "half-depth": "the command ended before it",
        "dense-muon": "its learning rate was not tuned",
        "slope-muon": "CUDA out of memory",
        "half-depth-muon": "left out (--only)",
    }
    assert (tmp_path / "out.png").is_file()
    table = quality.finals_table(written)
    cells = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert set(cells) == {"dense", "slope"}
    assert cells["slope"]["settings"].startswith("method=slope")
    assert "optim.lr" not in cells["slope"]["settings"]
    assert "train.steps" not in cells["slope"]["settings"]
    assert cells["slope"]["learning rate"] == "0.01 (edge)"
    assert cells["dense"]["learning rate"] == "0.01"
    assert cells["dense"]["steps"] == "6"
    assert cells["dense"]["bytes to serve"].endswith("KiB")
    assert "(2)" in cells["slope"]["gap to dense"]
    assert "Not run: half-depth, dense-muon" in table.note
    assert quality.rates_table(written).rows[1][:3] == ["slope", "0.01", "at the edge of its grid"]
    with pytest.raises(UsageError, match="is of the scale small, and not mini"):
        quality.read(tmp_path / "out.json", "mini")
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    empty = "<!-- result: equal-time-small -->\n<!-- end -->"
    assert render.render(empty) == empty
    (tmp_path / "out.json").rename(tmp_path / "equal-time-small.json")
    text = render.render(empty)
    assert "| slope | method=slope" in text
    assert "[Picture](../benchmarks/results/equal-time-small.png);" in text


def test_nothing_is_trained_twice_nor_after_a_stop(tmp_path: Path) -> None:
    losses = {2e-3: 3.0, 2.83e-3: 2.0, 4e-3: 3.0}
    rows = [tuned("dense", losses), tuned("slope", losses)]
    found = bench(tmp_path, "tiny", rows, names=["dense", "slope"])
    found.scale = replace(found.scale, exchange=0.5)
    found._add(parts()[0])
    found.tune()
    found.finals()
    assert not (tmp_path / "work" / "finals").exists()


# --------------------------------------------------------------------------------------------------------- all stages


def start(tmp_path: Path, name: str, *more: str) -> subprocess.CompletedProcess[str]:
    where = {"data": tmp_path / "text" / "data", "work": tmp_path / name, "out": tmp_path / f"{name}.json"}
    words = [f"--{key}={value}" for key, value in where.items()]
    command = [sys.executable, "-P", "-m", "slope_cli.benchmarks.quality", *words, "--scale=tiny", *more]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stages_of_two_days_make_one_file(tmp_path: Path) -> None:
    write_data(tmp_path / "text")
    few = ("--only=dense-fp8", "--jobs=2")
    assert start(tmp_path, "first", *few, "--budget=0").returncode == 75
    done = start(tmp_path, "first", *few, "--stages=tune")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "first.json").read_text())
    assert [(row["variant"], row["like"]) for row in result["tuned"]] == [("dense", ""), ("dense-fp8", "dense")]
    assert all(row["lr"] for row in result["tuned"])
    assert result["not_run"]["dense-fp8"] == "the command ended before it"
    assert result["not_run"]["slope"] == "left out (--only)"
    done = start(tmp_path, "first", *few, "--seeds=1")
    assert done.returncode == 0, done.stderr
    assert "--lrs" not in done.stderr
    done = start(tmp_path, "second", *few, "--seeds=2", "--tuned", str(tmp_path / "first.json"))
    assert done.returncode == 0, done.stderr
    assert "--lrs" not in done.stderr
    done = start(tmp_path, "first", *few, "--merge", str(tmp_path / "second.json"), "--stages=merge")
    assert done.returncode == 0, done.stderr
    assert "slope compare" not in done.stderr
    result = json.loads((tmp_path / "first.json").read_text())
    assert {row["variant"]: row["seeds"] for row in result["finals"]["variants"]} == {
        "dense": [1, 2],
        "dense-fp8": [1, 2],
        "dense-0.8-steps": [1, 2],
    }
    assert result["finals"]["equal"] == "time"
    assert result["machine"]["torch"]
    assert "| dense-fp8 | train.precision=fp8" in done.stdout
    again = start(tmp_path, "first", *few)
    assert (again.returncode, "slope compare" in again.stderr, again.stdout) == (0, False, done.stdout)
    assert start(tmp_path, "first", "train.seed=7").returncode == 2
