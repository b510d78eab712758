"""`slope compare`: what is compared, that it can be compared, and every number against one worked out here."""

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.data import prepared, scratch
from support.marks import slow
from support.processes import has_content, stopped, wait_until
from support.runs import OVERRIDES, RECIPE, copied, sized, small

from slope_cli.checkpoint import run_folder, store
from slope_cli.checkpoint.load import load_model
from slope_cli.compare import processes, results, rows, summary, table, variants
from slope_cli.compare.summary import Comparison, Curve, Spread, Summary
from slope_cli.config import configs
from slope_cli.distributed.signals import StopFlag, Stopped
from slope_cli.errors import UsageError
from slope_cli.methods import phases_of
from slope_cli.methods.apply import apply
from slope_cli.models.build import build_model, run_model_config
from slope_cli.report import metrics
from slope_cli.train.loop import pretrain
from slope_cli.utils import jsonl
from slope_cli.utils.files import file_sha256
from slope_cli.utils.typed_json import from_json
from sparse_kernels import masked_layers
from sparse_kernels.packing import pack_layers

CURVE = "log.val_every=2"


def words(*more: str) -> list[str]:
    """Of the tiny recipe; its seeds are given beside them."""
    own = [word for word in small("gpt2-nano") if not word.startswith("train.seed")]
    return [*own, f"data.path={prepared()}", CURVE, *more]


def compared(out: Path, *more: str, **options: Any) -> Comparison:
    """`compare` of the tiny recipe."""
    return results.compare(str(RECIPE), words(*more), out=out, **options)


def train_here(
    out: Path, methods: Sequence[str], seeds: Sequence[int], extra: Sequence[str] = (), lrs: Sequence[float] = ()
) -> None:
    """Train in this process what `compare` with the same arguments would train in others, where it then finds it."""
    found = variants.variants(str(RECIPE), words(), methods, extra)
    for run in variants.planned_runs(found, seeds, lrs):
        pretrain(run.config, out / run.name)


@cache
def finished() -> Path:
    """A comparison's folder with its runs; copy it before you alter it."""
    out = scratch() / "compared"
    train_here(out, ["dense", "slope"], [1, 2, 3])
    return out


@cache
def result() -> Comparison:
    return compared(finished(), methods=["dense", "slope"], seeds=[1, 2, 3])


def in_json(result: Comparison) -> Any:
    """As compare.json has it."""
    return json.loads(json.dumps(asdict(result)))


def last_loss(run: Path) -> float:
    return float([record for record in metrics.read(run) if record["kind"] == "val"][-1]["loss"])


def stamps(out: Path) -> dict[str, int]:
    """When each file of each checkpoint was written."""
    return {str(path): path.stat().st_mtime_ns for path in out.glob("*/checkpoints/*/*")}


# ------------------------------------------------------------------------------------------------ statistics


def test_mean_and_standard_error_are_numpys() -> None:
    values = [3.1, 2.9, 3.4, 3.0]
    found = summary.mean_and_error(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.stderr == pytest.approx(np.std(values, ddof=1) / np.sqrt(4))
    assert found.n == 4
    assert summary.mean_and_error([2.0]) == Spread(2.0, None, 1)
    assert summary.mean_and_error([]) == Spread(None, None, 0)


def test_differences_are_paired_by_seed() -> None:
    ours, theirs = {1: 3.5, 2: 4.0, 4: 9.0}, {2: 3.8, 1: 3.4, 3: 1.0}
    differences = np.array([3.5 - 3.4, 4.0 - 3.8])
    found = summary.paired(ours, theirs)
    assert found.seeds == [1, 2]
    assert found.mean == pytest.approx(differences.mean())
    assert found.stderr == pytest.approx(differences.std(ddof=1) / np.sqrt(2))
    assert summary.paired({1: 1.0}, {2: 1.0}).n == 0


def rate(lr: float, by_seed: Mapping[int, float], failed: Sequence[int] = ()) -> Summary:
    """A variant at one learning rate, with the losses of its seeds."""
    nothing: dict[str, Any] = dict.fromkeys(("tokens", "tokens_per_s", "train_seconds", "peak_memory"))
    none = Spread(None, None, 0)
    nothing |= {"loss": none, "perplexity": none, "by_source": {}, "curve": Curve([], [], [], [])}
    return Summary("dense", lr, [*by_seed], [*failed], by_seed=dict(by_seed), **nothing)


def test_the_best_rate_is_marked_at_the_edge_only() -> None:
    def both(lr: float, loss: float) -> Summary:
        return rate(lr, {1: loss, 2: loss})

    inside = summary.best_rate([both(1e-3, 4.0), both(2e-3, 3.0), both(4e-3, 3.5)])
    assert (inside.lr, inside.lr_at_edge) == (2e-3, False)
    for losses, best in (((3.0, 3.2, 3.5), 1e-3), ((4.0, 3.2, 3.1), 4e-3)):
        found = summary.best_rate([both(lr, loss) for lr, loss in zip((1e-3, 2e-3, 4e-3), losses, strict=True)])
        assert (found.lr, found.lr_at_edge) == (best, True)
    # The highest rate diverged: it was tried, so the one below it is no edge. A rate that lost a seed is not compared.
    found = summary.best_rate([both(1e-3, 4.0), both(2e-3, 3.0), rate(4e-3, {}, [1]), rate(3e-3, {1: 1.0}, [2])])
    assert (found.lr, found.lr_at_edge) == (2e-3, False)
    assert not summary.best_rate([rate(1e-3, {}, [1]), rate(2e-3, {}, [1])]).lr_at_edge


def test_rates_are_judged_by_the_seeds_they_share() -> None:
    """Seed 2, a bad one, was only trained at the higher rate."""
    assert summary.best_rate([rate(1e-3, {1: 3.0}), rate(2e-3, {1: 2.9, 2: 4.0})]).lr == 2e-3
    assert summary.best_rate([rate(1e-3, {1: 3.0}), rate(2e-3, {2: 2.9})]).lr == 2e-3
    assert summary.best_rate([rate(1e-3, {1: 3.0}, [2]), rate(2e-3, {1: 2.0}, [2])]).lr == 2e-3


# ---------------------------------------------------------------------------------------------- whole results


def test_every_number_is_the_runs_own() -> None:
    out, found = finished(), result()
    dense, slope = found.variants
    assert [each.variant for each in found.variants] == ["dense", "slope"]
    for each in (dense, slope):
        losses = [last_loss(out / f"{each.variant}-s{seed}") for seed in (1, 2, 3)]
        assert each.loss.mean == pytest.approx(np.mean(losses))
        assert each.loss.stderr == pytest.approx(np.std(losses, ddof=1) / np.sqrt(3))
        assert each.by_seed == dict(zip((1, 2, 3), losses, strict=True))
        assert each.curve.tokens == [128, 256, 384]
        assert each.curve.mean[-1] == pytest.approx(np.mean(losses))
        assert (each.curve.low[-1], each.curve.high[-1]) == (min(losses), max(losses))
        assert each.tokens == 384
        assert each.peak_memory is None
    pairs = [last_loss(out / f"slope-s{s}") - last_loss(out / f"dense-s{s}") for s in (1, 2, 3)]
    assert slope.gap is not None
    assert slope.gap.mean == pytest.approx(np.mean(pairs))
    assert slope.gap.stderr == pytest.approx(np.std(pairs, ddof=1) / np.sqrt(3))
    train = [r for r in metrics.read(out / "dense-s1") if r["kind"] == "train"]
    run = found.runs[0]
    assert run.tokens_per_s == pytest.approx(np.median([r["tokens_per_s"] for r in train]))  # a tenth of 6 is 0 steps
    assert run.train_seconds == pytest.approx(sum(64 / r["tokens_per_s"] for r in train))
    assert (found.failures, found.different, found.rates) == ([], [], [])


def test_parameters_and_bytes_are_those_of_the_checkpoint() -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    counted = {}
    for each in result().variants:
        folder = store.folders(finished() / f"{each.variant}-s1")[0]
        saved = FileSystemReader(folder).read_metadata().state_dict_metadata
        sizes = {name: int(np.prod(entry.size)) for name, entry in saved.items() if hasattr(entry, "size")}
        moments = sum(size for name, size in sizes.items() if name.endswith("exp_avg"))
        masks = sum(size for name, size in sizes.items() if "mask_bits" in name)
        assert each.parameters is not None
        assert each.parameters.trained == each.parameters.active == moments
        assert each.training_bytes == 16 * moments + masks
        row_masks = sum(size for name, size in sizes.items() if name.endswith("row_mask_bits"))
        assert each.inference_bytes == 2 * moments + row_masks
        counted[each.variant] = each.parameters
    assert counted["dense"].all == counted["dense"].trained < counted["slope"].all
    assert counted["slope"].active < counted["dense"].active


@pytest.mark.parametrize(("method", "pruned"), [("sr_ste", True), slow("fst", False), slow("wanda", True)])
def test_sizes_of_the_methods_are_those_of_their_models_at_the_end(method: str, pruned: bool, tmp_path: Path) -> None:
    """All of them train dense weights; fst's are dense again at the end."""
    more = [f"method={method}", "adapters.rank=0", *(["sparsity.start=0.5"] if method == "wanda" else [])]
    run = tmp_path / method
    config = configs.load(str(RECIPE), words(*more))
    pretrain(config, run)
    model = load_model(run).model
    masks = [layer.mask for _, layer in masked_layers(model) if not layer.unmasked]
    dense = sum(parameter.numel() for parameter in model.parameters())
    left_out = sum(int((~mask).sum()) for mask in masks)
    assert bool(left_out) == pruned
    (found,) = results.compare_runs([run], out=tmp_path / "out").variants
    assert found.parameters == rows.Parameters(all=dense, trained=dense, active=dense - left_out)
    assert found.inference_bytes == 2 * (dense - left_out) + sum(mask.numel() // 8 for mask in masks if pruned)


def test_files_tables_and_picture() -> None:
    out, found = finished(), result()
    written = json.loads((out / "compare.json").read_text())
    assert written == in_json(found)
    assert from_json(Comparison, written) == found
    text = (out / "compare.md").read_text()
    assert (gap := found.variants[1].gap) is not None
    assert f"{gap.mean:+.4f} ± {gap.stderr:.4f} (3)" in text
    for part in ("# dense against slope", "| variant | validation loss | perplexity | gap to dense |", "## Cost"):
        assert part in text
    assert "Failed" not in text
    assert "Learning rates" not in text
    svg = (out / "compare.svg").read_text()
    for label in ("dense", "slope", "tokens", "validation loss (nats per token)"):
        assert f">{label}</text>" in svg
    assert (out / "compare.png").stat().st_size > 10_000


def test_results_name_nothing_of_the_machine() -> None:
    import platform

    result()
    for name in ("compare.json", "compare.md"):
        text = (finished() / name).read_text()
        assert str(scratch()) not in text
        assert f'"{platform.node()}"' not in text
    environment = result().runs[0].environment[0]
    assert {"torch", "slope", "python", "gpu"} <= environment.keys()
    assert not {"host", "command", "slurm_job", "time"} & environment.keys()
    text = "/a/b c: /home/me/x.json: gone, 1/2 of runs/y"
    assert rows.without_folders(text) == "b c: x.json: gone, 1/2 of runs/y"


def test_on_a_terminal_and_in_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table.document(result()).show()
    assert capsys.readouterr().out == (finished() / "compare.md").read_text()
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "200"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    table.document(result()).show()
    drawn = capsys.readouterr().out
    assert "│" in drawn or "┃" in drawn
    assert "gap to dense" in drawn


def test_sources_have_columns_where_there_are_several() -> None:
    found, spread = result(), Spread(1.0, None, 1)
    several = [replace(each, by_source={"a": spread, "b": spread}) for each in found.variants]
    (quality, *_) = table.tables(replace(found, variants=several))
    assert quality.columns[-2:] == ["a", "b"]
    assert quality.rows[0][-1] == "1.0000 (1)"


# --------------------------------------------------------------------------------- reuse, resumption, failure


@pytest.mark.slow
def test_a_second_call_trains_nothing() -> None:
    result()
    before = stamps(finished())
    assert len(before) > 6
    again = compared(finished(), methods=["dense", "slope"], seeds=[1, 2, 3])
    assert (again, stamps(finished())) == (result(), before)
    fewer = compared(finished(), methods=["slope"], seeds=[2])
    assert fewer.variants[0].loss == Spread(last_loss(finished() / "slope-s2"), None, 1)
    assert stamps(finished()) == before
    compared(finished(), methods=["dense", "slope"], seeds=[1, 2, 3])  # what the other tests look at


@pytest.mark.slow
def test_shards_train_their_runs_and_leave_the_comparison_to_the_whole(tmp_path: Path) -> None:
    """As the tasks of a job array: at the end nothing is left to train."""
    how: dict[str, Any] = {"methods": ["dense"], "seeds": [1, 2, 3]}
    trained = [[run.run for run in compared(tmp_path, **how, shard=f"{number}/2").runs] for number in (1, 2)]
    assert trained == [["dense-s1", "dense-s3"], ["dense-s2"]]
    assert not list(tmp_path.glob("compare.*"))
    starts = (tmp_path / "starts.jsonl").read_bytes()
    assert [run.run for run in compared(tmp_path, **how).runs] == ["dense-s1", "dense-s2", "dense-s3"]
    assert (tmp_path / "starts.jsonl").read_bytes() == starts
    assert (tmp_path / "compare.json").is_file()


def test_a_share_of_the_runs_says_that_it_is_one(tmp_path: Path) -> None:
    out = copied(finished(), tmp_path)
    found = compared(out, methods=["dense", "slope"], seeds=[1], shard="2/2")
    assert [run.run for run in found.runs] == ["slope-s1"]
    assert found.notes == ["only the runs of --shard 2/2; the same command without it compares all"]


def test_a_damaged_note_of_starts_costs_no_result(tmp_path: Path) -> None:
    out = copied(finished(), tmp_path)
    for jobs in (2, 3):
        jsonl.append(out / "starts.jsonl", {"run": "dense-s1", "jobs": jobs})
    (out / "starts.jsonl").write_bytes(b"\0" * 8 + (out / "starts.jsonl").read_bytes())
    (note,) = compared(out, methods=["dense"]).notes
    assert note.startswith("up to 3 runs at a time")


def test_notes_of_earlier_results_stay(tmp_path: Path) -> None:
    """Of how sizes were chosen, and of a machine that was shared."""
    out = copied(finished(), tmp_path)
    train_here(out, ["half-depth"], [1])
    jsonl.append(out / "starts.jsonl", {"run": "dense-s1", "jobs": 2})
    found = compared(out, methods=["dense", "half-depth"])
    assert [note.partition(":")[0] for note in found.notes] == [
        "half-depth",
        "up to 2 runs at a time shared the machine",
    ]
    assert results.compare_runs([out], out=tmp_path / "again").notes == found.notes


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/5"])
def test_a_shard_that_there_is_not_is_refused(shard: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^--shard {shard}: .*sbatch --array=1-"):
        compared(tmp_path, methods=["dense", "slope"], seeds=[1, 2], shard=shard)


def test_each_checkpoint_is_hashed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return file_sha256(path)

    result()
    monkeypatch.setattr(store, "file_sha256", counted)
    names = ("dense-s1", "dense-s2", "slope-s1", "slope-s2")
    written = [path for name in names for path in store.folders(finished() / name)[0].iterdir()]
    compared(copied(finished(), tmp_path), methods=["dense", "slope"], seeds=[1, 2])
    assert len(hashed) == len(written) - len(names)  # all but the manifests
    hashed.clear()
    results.compare_runs([finished() / name for name in names], out=tmp_path / "again")
    assert len(hashed) == len(written) - len(names)


@pytest.mark.slow
def test_a_killed_run_resumes_and_a_failing_one_is_a_row(tmp_path: Path) -> None:
    """In processes of their own: slope-s1 was killed after step 3 of 6; `wide` cannot be built."""
    (planned,) = variants.planned_runs(variants.variants(str(RECIPE), words(), ["slope"], []), [1])
    run = tmp_path / "slope-s1"
    pretrain(configs.load(str(RECIPE), words("log.save_every=3", "train.seed=1")), run)
    checkpoint_of_6 = store.folders(run)[0]
    for path in checkpoint_of_6.iterdir():
        path.unlink()
    checkpoint_of_6.rmdir()
    first = stamps(tmp_path)
    wide = "wide: method=dense model.overrides.n_head=3"
    found = compared(tmp_path, methods=["slope"], extra=[wide], jobs=2)
    assert "resuming from" in (tmp_path / f"{planned.name}.log").read_text()
    assert first.items() <= stamps(tmp_path).items()
    assert last_loss(run) == last_loss(finished() / "slope-s1")
    assert [each.failed_seeds for each in found.variants] == [[], [1]]
    (failed,) = found.failures
    assert failed.run == "wide-s1"
    assert failed.error == "model gpt2-nano: 3 attention heads do not divide the width 32"
    text = (tmp_path / "compare.md").read_text()
    assert f"| wide-s1 | {failed.error} |" in text
    assert "| wide | – | – | – |" in text
    assert "up to 2 runs at a time shared the machine" in text


def test_the_error_of_a_process_is_one_line(tmp_path: Path) -> None:
    (planned,) = variants.planned_runs(variants.variants(str(RECIPE), words(), ["slope"], []), [1])
    child = processes.Child(planned, tmp_path, 1)
    child.process.kill()
    assert child.error(child.process.wait()) == "killed by SIGKILL"
    child.log.write_text("Traceback\n  one\nValueError: two\n\n")
    assert child.error(1) == "ValueError: two"
    child.log.write_text("")
    assert child.error(3) == "exit code 3"


@pytest.mark.slow
def test_a_signal_stops_every_run_with_75_and_the_same_command_resumes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (str(RECIPE), words("train.steps=100000", "log.val_every=0"))
    program = f"""
import sys
from pathlib import Path
from slope_cli import cli
from slope_cli.compare.results import compare
def run():
    compare(*{arguments!r}, out=Path({str(out)!r}), methods=["dense"], seeds=[1, 2])
cli.app = lambda prog_name: run()
cli.main()
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program], stderr=subprocess.PIPE, text=True, env=environment
    )
    wait_until(lambda: has_content(out / "dense-s1" / metrics.JSONL))
    err = stopped(process)
    last = "stopped by SIGTERM: 0 of 2 runs are finished; run the same command to resume"
    assert err.splitlines()[-1] == last
    assert store.latest(out / "dense-s1") is not None
    assert not (out / "dense-s2").exists()
    assert not (out / "compare.json").exists()


def test_a_stopped_comparison_shows_what_is_finished(tmp_path: Path) -> None:
    out = copied(finished(), tmp_path)
    with StopFlag() as stop:
        stop.name = "SIGTERM"
        with pytest.raises(Stopped, match="2 of 3 runs are finished"):
            compared(out, methods=["dense"], seeds=[1, 2, 9], stop=stop)
    assert json.loads((out / "compare.json").read_text())["variants"][0]["seeds"] == [1, 2]


@pytest.mark.slow
def test_earlier_results_are_taken_without_their_runs(tmp_path: Path) -> None:
    """As when the runs lay on a machine that is gone."""
    one, two = (
        results.compare_runs([finished() / f"dense-s{seed}", finished() / f"slope-s{seed}"], out=tmp_path / str(seed))
        for seed in (1, 2)
    )
    files = [tmp_path / str(seed) / "compare.json" for seed in (1, 2)]
    found = results.compare_runs([*files], out=tmp_path / "both")
    whole = compared(finished(), methods=["dense", "slope"], seeds=[1, 2])
    assert found.variants == whole.variants
    assert [run.run for run in found.runs] == [run.run for run in (*one.runs, *two.runs)]
    for row in (altered := json.loads(files[1].read_text()))["runs"]:
        row["lr"] = 0.01
    (tmp_path / "rated.json").write_text(json.dumps(altered))
    mixed = results.compare_runs([files[0], tmp_path / "rated.json"], out=tmp_path / "mixed")
    assert {(rate.variant, rate.lr) for rate in mixed.rates} == {
        (name, lr) for name in ("dense", "slope") for lr in (None, 0.01)
    }
    assert "| dense | – |" in (tmp_path / "mixed" / "compare.md").read_text()
    folders = results.compare_runs([path.parent for path in files], out=tmp_path / "folders")
    assert folders == found
    with pytest.raises(UsageError, match="dense-s1: duplicate run"):
        results.compare_runs([files[0], files[0]], out=tmp_path / "twice")
    altered = json.loads(files[1].read_text())
    altered["runs"][0]["config"]["optim"]["lr"] = 1.0
    files[1].write_text(json.dumps(altered))
    with pytest.raises(UsageError, match="dense-s2: dense names two configurations"):
        results.compare_runs([*files], out=tmp_path / "altered")


def test_a_result_of_an_older_version_is_read(tmp_path: Path) -> None:
    """Version 0.1.0 had failed runs among the others, and keys that are gone."""
    path = Path(__file__).parent.parent / "benchmarks" / "results" / "quality-gpt2-small.json"
    older = json.loads(path.read_text())
    older["runs"].append({"run": "wide-s1", "variant": "wide", "lr": None, "seed": 1, "error": "killed"})
    (tmp_path / "compare.json").write_text(json.dumps(older))
    found = results.compare_runs([tmp_path / "compare.json"], out=tmp_path / "again", allow_different=True)
    assert [run.run for run in found.runs] == [run["run"] for run in older["runs"][:-1]]
    assert len(found.variants) == 8
    for new, old in zip(found.variants, older["variants"], strict=True):
        new = json.loads(json.dumps(asdict(new)))
        for part, before in ((new, old), (new["gap"], old["gap"]), (new["curve"], old["curve"])):
            assert {key: part[key] for key in before if part[key] != before[key] and key not in ("gap", "curve")} == {}
        assert (new["steps"], new["budget_seconds"], new["worth"]) == (old["tokens"] // 65536, None, None)


@pytest.mark.parametrize("content", [None, "no JSON", "[]", "{}", '{"runs": [1]}', '{"runs": [{"run": "dense-s1"}]}'])
def test_what_is_no_comparison_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"other\.json: is not a result of slope compare"):
        results.compare_runs([path], out=tmp_path / "none")


def test_a_comparison_all_of_whose_runs_failed_is_refused(tmp_path: Path) -> None:
    failed = rows.FailedRun("dense-s1", "dense", None, 1, "killed")
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(asdict(summary.summarize([failed], [], allow_different=False))))
    with pytest.raises(UsageError, match=r"compare\.json: holds no finished run"):
        results.compare_runs([path], out=tmp_path / "none")


def test_a_run_and_a_comparison_that_has_it_are_one(tmp_path: Path) -> None:
    results.compare_runs([finished() / "dense-s1"], out=tmp_path)
    with pytest.raises(UsageError, match="dense-s1: duplicate run"):
        results.compare_runs([tmp_path / "compare.json", finished() / "dense-s1"], out=tmp_path / "twice")


def as_in_0_1(config: dict[str, Any]) -> None:
    """Write the config of a run of method=slope as version 0.1 did, which had fewer keys at first."""
    own, sparsity = config.pop("slope"), config["sparsity"]
    sparsity |= {"renew_every": own["mask_update_interval"], "column_mask": own["backward_mask"]}
    sparsity |= {key: own[key] for key in ("before", "rescale", "decay")}
    sparsity |= {"blocks": sparsity.pop("pattern_overrides"), "skip": sparsity.pop("exclude_modules")}
    del sparsity["target_modules"], config["optim"]["power"]
    config["adapters"]["lr"] = config["train"]["cuda_graph"] = config["train"]["compile"] = None
    config["train"]["dtype"] = config["train"].pop("precision")
    config["linearize"] = {"map": "hedgehog", "window": 64}


def test_results_of_a_version_with_other_keys_are_of_the_same_variant(tmp_path: Path) -> None:
    for seed in (1, 2):
        results.compare_runs([finished() / f"slope-s{seed}"], out=tmp_path / str(seed))
    files = [tmp_path / str(seed) / "compare.json" for seed in (1, 2)]
    older = json.loads(files[0].read_text())
    for row in older["runs"]:
        as_in_0_1(row["config"])
    files[0].write_text(json.dumps(older))
    (found,) = results.compare_runs(files, out=tmp_path / "both").variants
    assert found.seeds == [1, 2]
    older["runs"][0]["config"]["sparsity"]["renew_every"] = 4
    files[0].write_text(json.dumps(older))
    with pytest.raises(UsageError, match="slope names two configurations"):
        results.compare_runs(files, out=tmp_path / "two")
    older["runs"][0]["config"]["sparsity"] = {"renew_evry": 3}
    files[0].write_text(json.dumps(older))
    with pytest.raises(UsageError, match=r"slope-s1: sparsity\.renew_evry: unknown key"):
        results.compare_runs(files, out=tmp_path / "unknown")


# ------------------------------------------------------------------------------------ what cannot be compared


def test_runs_of_another_config_data_or_validation_are_not_taken_over(tmp_path: Path) -> None:
    out = finished()
    with pytest.raises(UsageError, match=r"dense-s1 holds a run of another config \(optim.lr: 0.01 -> 0.02\)"):
        compared(out, "optim.lr=0.02", methods=["dense"])
    with pytest.raises(UsageError, match=r"validated on other text \(log.val_tokens: 128 -> 64\)"):
        compared(out, "log.val_tokens=64", methods=["dense"])
    with pytest.raises(UsageError, match="dense-s1 was trained on other data than"):
        compared(out, "data.path=embedded", methods=["dense"])


def test_budgets_and_data_must_be_the_same_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dense-s1 and short-s1 differ in tokens: 384 and 192; add --allow-different"):
        compared(tmp_path, methods=["dense"], extra=["short: method=dense train.steps=3"])
    with pytest.raises(UsageError, match="differ in validation: 128 tokens of each source in sequences of 32 and"):
        compared(tmp_path, methods=["dense"], extra=["other: log.val_tokens=64"])
    with pytest.raises(UsageError, match="differ in data: "):
        compared(tmp_path, methods=["dense"], extra=["other: data.path=embedded"])
    with pytest.raises(UsageError, match="no such data folder"):
        compared(tmp_path, methods=["dense"], extra=["other: data.path=/no/such"])
    assert list(tmp_path.iterdir()) == []


def test_what_differs_in_many_runs_is_said_once() -> None:
    terms: dict[str, rows.Terms] = {
        "a": {"tokens": 1, "data": "x"},
        "b": {"tokens": 2, "data": "x"},
        "c": {"tokens": 2, "data": "y"},
    }
    assert rows.require_alike(terms, True) == [
        "a and b, c differ in tokens: 1 and 2",
        "a and c differ in data: x and y",
    ]


def test_settings_of_an_older_version_have_their_names_of_today(tmp_path: Path) -> None:
    found = results.compare_runs([finished() / name for name in ("dense-s1", "slope-s1")], out=tmp_path)
    altered = in_json(found)
    dense, slope = sorted(altered["runs"], key=lambda run: str(run["variant"]))
    as_in_0_1(slope["config"])
    slope["config"]["optim"]["power"] = 0.7
    dense["config"]["model"]["overrides"] = {}  # what a variant overrides is a setting all the same
    for absent in ("power", "eps"):  # which the baseline's version did not have
        del dense["config"]["optim"][absent]
    settings = dict(table.settings(from_json(Comparison, altered)).rows)["slope"].split()
    assert {"method=slope", "slope.mask_update_interval=3", "model.overrides.n_layer=2"} <= set(settings)
    assert [word for word in settings if word.startswith("optim")] == ["optim.power=0.7"]
    assert not [word for word in settings if word.startswith(("sparsity", "linearize"))]


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ("method=fst", "method=fst"),
        ("method=wanda sparsity.start=0.5", "method=wanda sparsity.start=0.5"),
        ("method=fst sparsity.target_modules=[attn]", "method=fst sparsity.target_modules=['attn']"),
        (
            "method=slope adapters.rank=0 optim.lr=0.02",
            "adapters.rank=0.0 adapters.start=0.5 adapters.warmup=1.0 optim.lr=0.02",
        ),
        ("method=slope optim.lr=0.02", "adapters.rank=4.0 adapters.start=0.5 adapters.warmup=1.0 optim.lr=0.02"),
        ("method=slope adapters.lr=0.02", "adapters.start=0.5 adapters.lr=0.02 adapters.warmup=1.0"),
    ],
)
def test_what_follows_from_other_settings_is_not_shown(more: str, shown: str) -> None:
    (dense, *_) = result().runs
    other = replace(dense, variant="other", config=rows.portable(configs.load(str(RECIPE), words(*more.split()))))
    settings = table.settings(replace(result(), runs=[dense, other], variants=result().variants[:1]))
    assert settings.rows == []
    both = [result().variants[0], replace(result().variants[1], variant="other")]
    settings = table.settings(replace(result(), runs=[dense, other], variants=both))
    assert settings.rows[0] == ["dense", "–"]
    assert settings.rows[1][1].endswith(shown)


def test_existing_runs_are_compared_by_their_configs(tmp_path: Path) -> None:
    folders = [finished() / name for name in ("slope-s1", "dense-s2", "slope-s2")]
    found = results.compare_runs(folders, out=tmp_path)
    slope, dense = found.variants
    assert (slope.variant, slope.seeds, dense.variant, dense.seeds) == ("slope", [1, 2], "dense", [2])
    assert found.baseline == "slope"
    assert dense.gap is not None
    assert dense.gap.mean == pytest.approx(last_loss(folders[1]) - last_loss(folders[2]))
    assert dense.gap.seeds == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"compare-time.{ending}" for ending in ("png", "svg")),
        *(f"compare.{ending}" for ending in ("json", "md", "png", "svg")),
    ]


@pytest.mark.slow
def test_runs_with_other_budgets_or_data_are_refused_unless_allowed(tmp_path: Path) -> None:
    run, other = finished() / "dense-s1", copied(finished() / "slope-s1", tmp_path)
    config = (other / run_folder.CONFIG).read_text()
    manifest = store.folders(other)[0] / store.MANIFEST
    sound = manifest.read_text()
    (other / run_folder.CONFIG).write_text(config.replace("val_tokens: 128", "val_tokens: 64"))
    with pytest.raises(UsageError, match=r"dense-s1 and copy differ in validation: .* and 64 tokens"):
        results.compare_runs([run, other], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = results.compare_runs([run, other], out=tmp_path / "out", allow_different=True)
    assert "NOT COMPARABLE: dense-s1 and copy differ in validation" in (tmp_path / "out" / "compare.md").read_text()
    assert len(found.different) == 1
    (other / run_folder.CONFIG).write_text(config)
    content = store.read_sealed(manifest)
    store.write_sealed(manifest, {**content, "data": "f" * 64})
    with pytest.raises(UsageError, match="dense-s1 and copy differ in data: "):
        results.compare_runs([run, other], out=tmp_path / "out")
    manifest.write_text(sound)
    with pytest.raises(UsageError, match="copy: duplicate run, with the config and seed of slope-s1"):
        results.compare_runs([finished() / "slope-s1", other], out=tmp_path / "out")


def test_unfinished_and_strange_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not the folder of a run"):
        results.compare_runs([tmp_path], out=tmp_path / "out")
    with pytest.raises(UsageError, match="give the folder of at least one run"):
        results.compare_runs([], out=tmp_path)
    run = copied(finished() / "dense-s1", tmp_path)
    (run / run_folder.CONFIG).write_text((run / run_folder.CONFIG).read_text().replace("steps: 6", "steps: 8"))
    with pytest.raises(UsageError, match="is unfinished, step 6 of 8"):
        results.compare_runs([run], out=tmp_path / "out")


# --------------------------------------------------------------------------------------------- learning rates


@pytest.mark.slow
def test_each_variant_is_shown_at_its_own_best_rate(tmp_path: Path) -> None:
    lrs = [1e-5, 1e-2, 5.0]  # the last ruins the model
    train_here(tmp_path, ["dense"], [1], lrs=lrs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense-lr0.01-s1", "dense-lr1e-05-s1", "dense-lr5.0-s1"]
    found = compared(tmp_path, methods=["dense"], lrs=lrs)
    (best,) = found.variants
    assert (best.lr, best.lr_at_edge) == (1e-2, False)
    assert [row.lr for row in found.rates] == lrs
    assert "(edge)" not in (tmp_path / "compare.md").read_text()
    (edge,) = compared(tmp_path, methods=["dense"], lrs=lrs[:2]).variants
    assert (edge.lr, edge.lr_at_edge) == (1e-2, True)
    text = (tmp_path / "compare.md").read_text()
    assert "| dense | 0.01 (edge) |" in text
    assert "| dense | 1e-05 |" in text
    assert "a better one may lie beyond" in text


@pytest.mark.parametrize("place", ["recipe", "override", "variant", ""])
def test_adapters_learn_at_each_rate_unless_they_have_their_own(place: str, tmp_path: Path) -> None:
    recipe, own = tmp_path / "recipe.yaml", "adapters.lr=0.03"
    recipe.write_text("adapters: {lr: 0.03}\n" if place == "recipe" else "optim: {lr: 0.03}\n")
    text = f"wide: model.overrides.n_embd=64 {own if place == 'variant' else ''}"
    overrides = [own] if place == "override" else []
    found = variants.variants(str(recipe), overrides, ["slope", "same-active"], [text])
    planned = {run.name: run.config for run in variants.planned_runs(found, [1], [1e-3, 0.02])}
    for name in ("slope", "wide"):
        for lr in (1e-3, 0.02):
            config = planned[f"{name}-lr{lr}-s1"]
            fixed = bool(place) and (place != "variant" or name == "wide")
            assert (config.optim.lr, config.adapters.lr) == (lr, 0.03 if fixed else lr)
            (adapters,) = [p.rates["adapters"] for p in phases_of(config) if p.adapters]
            assert adapters.peak == config.adapters.lr
    assert planned["same-active-lr0.02-s1"].model == found[1].config.model  # which the rate leaves as it is
    assert planned["wide-lr0.02-s1"].model.overrides == {"n_embd": 64}
    without = {run.name: run.config for run in variants.planned_runs(found, [1])}
    assert without["slope-s1"].adapters.lr == (0.03 if place != "variant" else without["slope-s1"].optim.lr)


# --------------------------------------------------------------------------------------------------- variants


def found_for(*methods: str, model: str = "gpt2-nano", extra: Sequence[str] = ()) -> list[variants.Variant]:
    return variants.variants(str(RECIPE), small(model), methods, extra)


def test_ready_made_names() -> None:
    half, none = found_for("half-depth", "slope-r0")
    assert half.config.model.overrides == {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64}
    assert (half.config.method, none.config.method, none.config.adapters.rank) == ("dense", "slope", 0)
    (bert,) = found_for("half-depth", model="bert-base")
    assert bert.config.model.overrides["num_hidden_layers"] == 1
    (llama,) = variants.variants("llama3-8b", ["model.overrides.num_hidden_layers=7"], ["half-depth"], [])
    assert llama.config.model.overrides == {"num_hidden_layers": 3}
    with pytest.raises(UsageError, match="half-depth: gpt2-nano has only one layer"):
        variants.variants(str(RECIPE), ["model.overrides.n_layer=1"], ["half-depth"], [])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2-nano", "gpt2-small", "opt-350m", "llama3-8b", "bert-base"])
def test_same_active_has_the_sparse_models_linear_weights(model: str) -> None:
    """Counted here from the layers of the shape, half of the weights of those that are pruned."""
    from slope_cli.train.dry_run import describe

    base = [f"model.name={model}"]
    (found,) = variants.variants(str(RECIPE), base, ["same-active"], [])
    record = describe(configs.load(str(RECIPE), base))[0]
    heads = ("lm_head", "cls.predictions.decoder")
    sizes = [(x["out_features"] * x["in_features"], x["reason"]) for x in record["layers"] if x["name"] not in heads]
    kept = sum(size if reason else size // 2 for size, reason in sizes)
    settings = run_model_config(found.config)
    assert variants.linear_weights(settings) / kept == pytest.approx(1, abs=0.02)
    assert f"{variants.linear_weights(settings) / kept:.4f} of the {kept:,}" in found.note
    assert settings.hidden_size % settings.num_attention_heads == 0
    assert settings.hidden_size < run_model_config(configs.load(str(RECIPE), base)).hidden_size
    assert found.config.method == "dense"


@pytest.mark.parametrize("model", ["gpt2-nano", *(slow(m) for m in ("opt-350m", "llama3-8b"))])
@pytest.mark.parametrize("share", [0.5, 0.87])
def test_a_share_of_the_dense_models_linear_weights(share: float, model: str) -> None:
    base = [f"model.name={model}"]
    (found,) = variants.variants(str(RECIPE), base, [f"dense-{share}"], [])
    whole = variants.linear_weights(run_model_config(configs.load(str(RECIPE), base)))
    reached = variants.linear_weights(run_model_config(found.config))
    assert reached / whole == pytest.approx(share, rel=0.02)
    assert (
        f"{reached:,} linear weights, {reached / round(share * whole):.4f} of the {round(share * whole):,}"
        in found.note
    )
    assert (found.name, found.config.method) == (f"dense-{share}", "dense")


@pytest.mark.parametrize("model", ["gpt2-nano", *(slow(m) for m in ("opt-350m", "llama3-8b"))])
def test_same_bytes_takes_what_the_packed_model_takes(model: str) -> None:
    """Of the sparse model counted here, adapters included, after it has been packed; sides are multiples of 64."""
    base = [f"model.name={model}", *(["model.overrides.vocab_size=512"] if model == "gpt2-nano" else [])]
    (found,) = variants.variants(str(RECIPE), base, ["same-bytes"], [])
    dense = build_model(run_model_config(found.config), device="meta")
    ours = sum(2 * parameter.numel() for parameter in dense.parameters())
    config = configs.load(str(RECIPE), [*base, "method=slope"])
    (kept,) = [int(number.replace(",", "")) for number in re.findall(r" of the ([\d,]+) that the sparse", found.note)]
    if model == "gpt2-nano":
        sparse = build_model(run_model_config(config), device="cpu")
        apply(sparse, config, phases_of(config).end)
        pack_layers(sparse, torch.bfloat16)
        tensors = {id(t): t for t in (*sparse.parameters(), *sparse.buffers())}.values()
        assert kept == sum(t.numel() * (1 if t.dtype == torch.uint8 else 2) for t in tensors)
    assert ours / kept == pytest.approx(1, abs=0.02)
    assert f"{ours:,} bytes in 16 bits, {ours / kept:.4f} of the" in found.note
    assert found.config.method == "dense"


def test_names_overrides_and_their_order() -> None:
    found = found_for("slope", extra=["wide: model.overrides.n_embd=64 log.sample_prompt='a b'", "low: optim.lr=1e-4"])
    assert [variant.name for variant in found] == ["slope", "wide", "low"]
    assert found[1].config.log.sample_prompt == "a b"
    planned = variants.planned_runs(found, [3, 1], [1e-3])
    assert [run.name for run in planned][:3] == ["slope-lr0.001-s3", "slope-lr0.001-s1", "wide-lr0.001-s3"]
    assert (planned[0].config.train.seed, planned[0].config.optim.lr) == (3, 1e-3)
    assert configs.load(str(_written(planned[0]))) == planned[0].config
    assert OVERRIDES["gpt2-nano"]  # the recipe's own, which a variant only adds to
    assert found[2].config.model == found[0].config.model


def _written(planned: variants.PlannedRun) -> Path:
    path = scratch() / "planned.yaml"
    path.write_text(configs.dump(planned.config))
    return path


@pytest.mark.parametrize(
    ("methods", "extra", "said"),
    [
        (
            [],
            ["x: method=linearize linearize.window=8"],
            "x: slope linearize needs a trained model; compare finished runs with --runs",
        ),
        (
            ["dense-1.5"],
            [],
            r"method=dense-1.5: choose one of .*; or half-depth, .*, dense-SHARE \(such as dense-0.87\)",
        ),
        (["dense-0.0"], [], r"dense-0.0: must be a share above 0"),
        (["sloppy"], [], r"method=sloppy: choose one of .*; or half-depth, same-active, same-bytes, dense-SHARE"),
        ([], [], "nothing to compare"),
        (["dense", "dense"], [], "dense: duplicate variant"),
        ([], ["no colon"], "--variant 'no colon': write 'NAME: KEY=VALUE"),
        ([], ["../x: optim.lr=1"], "--variant '../x: optim.lr=1': write"),
        ([], ["x: optim.weight_decai=1"], "did you mean optim.weight_decay"),
        ([], ["x: optim.lr='1"], "No closing quotation"),
    ],
)
def test_wrong_variants(methods: list[str], extra: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        found_for(*methods, extra=extra)


def test_wrong_numbers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--seeds: give at least one number"):
        compared(tmp_path, methods=["dense"], seeds=[])
    with pytest.raises(UsageError, match="dense-s1: duplicate run"):
        compared(tmp_path, methods=["dense"], seeds=[1, 1])
    with pytest.raises(UsageError, match=r"train.seed=-1: must be 0 or more"):
        compared(tmp_path, methods=["dense"], seeds=[-1])
    with pytest.raises(UsageError, match=r"optim.lr=0.0: must be positive"):
        compared(tmp_path, methods=["dense"], lrs=[0.0])
    with pytest.raises(UsageError, match="--jobs 0: must be 1 or more"):
        compared(tmp_path, methods=["dense"], jobs=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_comparison_leaves_no_process_and_the_same_command_works(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "slope_cli", "compare", str(RECIPE), *words("log.val_every=0")]
    command += ["--methods", "dense", "--seeds", "1,2", "--jobs", "2", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "train.steps=100000"], stderr=subprocess.DEVNULL, env=environment)
    logs = [out / name / metrics.JSONL for name in ("dense-s1", "dense-s2")]
    wait_until(lambda: all(map(has_content, logs)))
    process.kill()
    process.wait()
    for log in logs:
        wait_until(lambda log=log: _is_free(log.parent))
    process = subprocess.Popen([*command, "train.steps=100000"], stderr=subprocess.PIPE, text=True, env=environment)
    lengths = [log.stat().st_size for log in logs]
    wait_until(lambda: all(log.stat().st_size != length for log, length in zip(logs, lengths, strict=True)))
    assert "failed" not in stopped(process)


def _is_free(run: Path) -> bool:
    with (run / ".lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


# --------------------------------------------------------------------------------------------------- warnings


def warned_of(found: Comparison) -> dict[str, dict[str, list[int]]]:
    return {each.text: each.seeds for each in found.warnings}


def test_what_runs_warned_of_is_shown_once_with_those_that_gave_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One warning that the configuration tells, and one that comes up when a run begins."""
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    extra = [
        "slow: method=dense optim.warmup=100",
        f"copied: method=dense optim.warmup=100 optim.lr=0.02 data.local_copy={tmp_path}/file",
    ]
    train_here(out, ["slope"], [1, 2], extra)
    capsys.readouterr()
    found = compared(out, methods=["slope"], seeds=[1, 2], extra=extra)
    told, came = found.warnings
    assert told.text.startswith("optim.warmup=100: the warm-up is not over before the 6 steps")
    assert told.seeds == {"slow": [1, 2], "copied": [1, 2]}
    assert came.text.startswith("data.local_copy=file: file: ")
    assert came.seeds == {"copied": [1, 2]}
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("warning: ")] == [
        f"warning: {told.text} (slow, seeds 1, 2; copied, seeds 1, 2)"
    ]
    text = (out / "compare.md").read_text()
    assert text.count(told.text) == text.count(came.text) == 1
    assert f"* warning: {came.text} (copied, seeds 1, 2)\n" in text
    assert from_json(Comparison, in_json(found)) == found
    # The runs have kept it, and so has the result.
    folders = [out / f"{name}-s{seed}" for name in ("slow", "copied") for seed in (1, 2)]
    alone = results.compare_runs(folders, out=tmp_path / "alone")
    assert warned_of(alone) == warned_of(found)
    assert warned_of(results.compare_runs([out / "compare.json"], out=tmp_path / "again")) == warned_of(found)
    assert result().warnings == []


def test_a_run_that_fails_shows_its_warnings_too(tmp_path: Path) -> None:
    extra = ["wide: model.overrides.n_head=3 optim.warmup=100"]
    found = compared(tmp_path, methods=[], extra=extra)
    assert [failed.run for failed in found.failures] == ["wide-s1"]
    ((text, seeds),) = warned_of(found).items()
    assert text.startswith("optim.warmup=100: ")
    assert seeds == {"wide": [1]}


def test_the_advice_of_a_run_is_that_of_its_recipe_and_words() -> None:
    """Its process sees a resolved configuration, which does not say what is usual, or what the user has written."""

    def told(*methods: str, more: Sequence[str] = (), extra: Sequence[str] = (), lrs: Sequence[float] = ()) -> Any:
        found = variants.variants(str(RECIPE), [*sized("gpt2-nano"), *more], methods, extra)
        return {run.name: [*run.advice] for run in variants.planned_runs(found, [1], lrs)}

    far = "optim.lr=1e-07: is 1/50,000 of the recipe's 0.005; is it meant?"
    assert told("dense", more=["optim.lr=1e-7"]) == {"dense-s1": [far]}
    assert told("dense", lrs=[1e-7]) == {"dense-lr1e-07-s1": []}
    seed, rate = "train.seed=7: has no effect with --seeds", "optim.lr=0.01: has no effect with --lrs"
    assert told("dense", more=["train.seed=7", "optim.lr=1e-2"]) == {"dense-s1": [seed]}
    assert told(extra=["x: train.seed=7 optim.lr=1e-2"], lrs=[0.1]) == {"x-lr0.1-s1": [seed, rate]}
    # What all variants share has to be of use to one of them; what one has alone, to that one.
    rank = "adapters.rank=8"
    idle = "adapters.rank=8.0: has no effect with method=dense"
    assert told("dense", "slope", more=[rank]) == {"dense-s1": [], "slope-s1": []}
    assert told("dense", "half-depth", more=[rank]) == {"dense-s1": [idle], "half-depth-s1": [idle]}
    assert told("slope", extra=[f"other: method=dense {rank}"]) == {"slope-s1": [], "other-s1": [idle]}


def test_warnings_name_the_rates_of_the_runs_that_gave_them() -> None:
    given = [("a", 0.01, 1, ["x"]), ("a", 0.01, 2, ["x", "x"]), ("a", 0.1, 1, ["y", "x"]), ("b", None, 3, ["y"])]
    found = summary.warnings_of(given)
    lines = ["x (a at 0.01, seeds 1, 2; a at 0.1, seed 1)", "y (a at 0.1, seed 1; b, seed 3)"]
    assert table.warning_lines(found, 4) == [f"warning: {line}" for line in lines]
    assert table.warning_lines(found[:1], 3) == ["warning: x (all runs)"]
    assert table.warning_lines(summary.warnings_of(given[-1:]), 1) == ["warning: y (b, seed 3)"]
