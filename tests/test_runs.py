"""A run is extended, begun anew in its folder, and branched from another one."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from support.data import prepared
from support.marks import slow
from support.ranks import Ranks
from support.runs import RECIPE, assert_same_run, final_state, records, sized, slope, tiny

from slope_cli.checkpoint import replaced, run_folder, store
from slope_cli.checkpoint.load import load_model
from slope_cli.checkpoint.verify import check
from slope_cli.config import configs
from slope_cli.config.schema import Config
from slope_cli.distributed.signals import StopFlag, Stopped
from slope_cli.errors import SlopeError, UsageError
from slope_cli.methods import optim, phases_of
from slope_cli.train import starts
from slope_cli.train.branch import branch
from slope_cli.train.loop import Trainer, pretrain


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def words(run: Path, *more: str, world: int = 1) -> list[str]:
    """The command line of the tiny run, for so many processes."""
    sizes = (f"data.path={prepared()}", f"train.tokens_per_step={128 * world}", "model.dropout=0")
    return ["pretrain", str(RECIPE), *sized("gpt2-nano"), *sizes, *more, "--out", str(run)]


def learning_rates(run: Path) -> list[float]:
    return [record["lr"] for record in records(run) if record["kind"] == "train"]


# ------------------------------------------------------------------------------------------------------------ extended


def test_a_finished_run_says_so_and_is_extended_by_more_steps(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(tiny(data), run)
    more = "a larger train.steps extends it, --overwrite starts it anew"
    assert capsys.readouterr().err == f"finished: all of its 12 steps are done; {more}\n"
    before = records(run)
    assert pretrain(tiny(data, "train.steps=20"), run)["step"] == 20
    config = run_folder.open_config(run)
    assert (config.train.steps, config.train.extended) == (20, [[12, 12]])
    rate = phases_of(config).at(12).rates["weights"]
    assert learning_rates(run)[12:] == [optim.learning_rate(rate, step, config.optim) for step in range(12, 20)]
    said = capsys.readouterr().err
    assert "extended from 12 to 20 steps; the learning rate of adapters is " in said
    now = learning_rates(run)[12]
    assert now > 4 * 5e-4
    assert f"the learning rate of weights is 5.00e-04 in step 12 and {now:.2e} in step 13" in said
    assert records(run)[: len(before)] == before
    assert [record["step"] for record in records(run) if record["kind"] == "phase"] == [7]
    assert load_model(run).step == 20
    assert check(run)["faults"] == []


def test_an_extended_run_resumes_by_the_same_command_bit_for_bit(data: Path, run: Path, tmp_path: Path) -> None:
    config = tiny(data, "train.steps=20")
    pretrain(config, run)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    shutil.rmtree(store.folders(other)[0])
    assert store.newest_step(other) == 16
    pretrain(config, other)
    assert_same_run(run_folder.open_config(run), other, run)
    pretrain(tiny(data, "train.steps=22"), other)
    assert run_folder.open_config(other).train.extended == [[12, 12], [20, 20]]


def test_a_run_goes_back_before_its_extension_if_the_newest_checkpoint_is_damaged(data: Path, run: Path) -> None:
    (store.folders(run)[0] / "manifest.json").write_text("")
    assert pretrain(tiny(data, "train.steps=14"), run)["step"] == 14
    assert [record["step"] for record in records(run) if record["kind"] == "train"] == [*range(1, 15)]


def test_phases_that_have_begun_stay_and_the_others_follow_the_new_length() -> None:
    def steps(*more: str) -> list[int]:
        config = tiny("nowhere", "sparsity.start=0.25", "adapters.start=0.75", *more)
        return [phase.first for phase in phases_of(config)]

    assert steps("train.steps=40") == [0, 10, 30]
    assert steps("train.steps=80", "train.extended=[[30,40]]") == [0, 10, 60]
    assert steps("train.steps=80", "train.extended=[[31,40]]") == [0, 10, 30]
    assert steps("train.steps=80", "train.extended=[[10,40]]") == [0, 20, 60]
    assert steps("train.steps=160", "train.extended=[[12,40],[61,80]]") == [0, 10, 60]
    fst = ("method=fst", "fst.dense_finish=0.25")
    assert steps(*fst, "train.steps=80", "train.extended=[[20,40]]")[2:] == [60]
    assert steps(*fst, "train.steps=80", "train.extended=[[40,40]]")[2:] == [30]
    assert steps(*fst[:1], "fst.dense_finish=0", "train.steps=80", "train.extended=[[40,40]]") == [0, 10]


@pytest.mark.parametrize("value", ["[[12]]", "[[13,12]]", "[[12,20]]", "[[1,9],[2,9]]"])
def test_lengths_that_no_run_has_had_are_refused(value: str) -> None:
    with pytest.raises(UsageError, match=r"train.extended=.* needs"):
        tiny("nowhere", f"train.extended={value}")


def test_a_run_does_not_become_shorter_nor_longer_and_another_one(data: Path, run: Path) -> None:
    with pytest.raises(
        UsageError, match=r"train.steps=12, which does not become shorter: give train.steps=12, or another --out$"
    ):
        pretrain(tiny(data, "train.steps=8"), run)
    with pytest.raises(UsageError, match=r"shorter.*another config, too \(optim.lr: 0.005 -> 0.1\)$"):
        pretrain(tiny(data, "train.steps=8", "optim.lr=0.1"), run)
    with pytest.raises(UsageError, match=r"another config \(optim.lr: 0.005 -> 0.1\)"):
        pretrain(tiny(data, "train.steps=20", "optim.lr=0.1"), run)
    assert run_folder.open_config(run) == tiny(data)


def test_an_extension_that_does_not_start_changes_nothing(data: Path, run: Path) -> None:
    with pytest.raises(UsageError, match="sample_prompt: must have"):
        pretrain(tiny(data, "train.steps=20", f"log.sample_prompt={'long ' * 60}"), run)
    assert run_folder.open_config(run) == tiny(data)
    pretrain(tiny(data), run)


def test_two_processes_extend_a_run_together(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for steps in (6, 10):
        ranks = Ranks(2, words(run, f"train.steps={steps}", world=2), tmp_path / f"{steps}")
        assert ranks.finish() == [0, 0], ranks.printed()
    assert "extended from 6 to 10 steps" in ranks.printed(0)
    assert len(learning_rates(run)) == 10
    assert [record["step"] for record in records(run) if record["kind"] == "phase"] == [4]


# ------------------------------------------------------------------------------------------- anew in the same folder


def start_of_job(monkeypatch: pytest.MonkeyPatch, restarts: int, job: str = "77") -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))


def stopped_at_once(*words: str, data: Path, run: Path, existing: run_folder.Existing = "replace") -> None:
    """A start that a signal stops before its first step."""
    with StopFlag() as stop:
        stop.name = "SIGUSR2"
        with pytest.raises(Stopped):
            pretrain(tiny(data, *words), run, existing=existing, stop=stop)


def test_a_replaced_run_stays_until_the_new_one_has_a_checkpoint(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "slurm-1.out").write_text("the log of the job")
    before = records(run)
    stopped_at_once("optim.lr=0.1", data=data, run=run)
    assert f"{run / 'replaced'}: the run that was in {run}, until" in capsys.readouterr().err
    assert records(run / "replaced") == before
    assert load_model(run / "replaced").step == 12
    assert not store.folders(run)
    assert (run / "slurm-1.out").read_text() == "the log of the job"
    stopped_at_once("optim.lr=0.2", data=data, run=run)  # replaces the one that achieved nothing
    assert records(run / "replaced") == before
    assert pretrain(tiny(data, "optim.lr=0.2", "train.steps=2"), run)["step"] == 2
    assert not (run / "replaced").exists()
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_a_start_that_fails_leaves_a_run_that_has_achieved_nothing_and_what_that_has_replaced(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = records(run)
    stopped_at_once("optim.lr=0.1", data=data, run=run)
    stopped_at_once("optim.lr=0.2", data=data, run=run)

    def present() -> dict[str, bytes]:
        return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}

    before = present()
    capsys.readouterr()
    with pytest.raises(UsageError, match="sample_prompt: must have"):
        pretrain(tiny(data, "optim.lr=0.3", f"log.sample_prompt={'long ' * 60}"), run, existing="replace")
    assert f"{run}: holds the run again that was there before" in capsys.readouterr().err
    assert present() == before
    assert run_folder.open_config(run).optim.lr == 0.2
    assert records(run / "replaced") == finished
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    pretrain(tiny(data, "optim.lr=0.2"), run)
    assert store.newest_step(run) == 12


def test_where_there_is_no_run_none_is_replaced(data: Path, tmp_path: Path) -> None:
    assert pretrain(tiny(data, "train.steps=1"), tmp_path / "run", existing="replace")["step"] == 1
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").touch()
    with pytest.raises(UsageError, match="holds no run"):
        pretrain(tiny(data), tmp_path / "letters", existing="replace")


@pytest.mark.parametrize("moment", ["renamed", "made", "taken in"])
def test_a_kill_while_a_run_is_moved_loses_nothing(moment: str, data: Path, run: Path) -> None:
    before, moved = records(run), run.with_name(".replacing-run")
    run.rename(moved)
    if moment != "renamed":
        run.mkdir()
    if moment == "taken in":
        replaced.finish(run)
    stopped_at_once(data=data, run=run, existing="resume")
    assert records(run / "replaced") == before
    assert not moved.exists()


def test_a_link_to_a_run_leads_to_the_new_one(data: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    stopped_at_once(data=data, run=tmp_path / "link")
    assert (tmp_path / "link").resolve() == run
    assert load_model(run / "replaced").step == 12


def test_a_process_that_sees_the_old_folder_waits_for_the_new_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = threading.Timer(0.3, (run / "replaced").mkdir)
    late.start()
    replaced.require_seen(run)
    late.join()
    (run / "replaced").rmdir()
    monkeypatch.setattr(replaced, "SEEN", 0.2)
    with pytest.raises(SlopeError, match="is not the new folder that rank 0 has made"):
        replaced.require_seen(run)


def test_what_the_new_run_needs_is_not_replaced(data: Path, run: Path) -> None:
    teacher = ["distill.share=0.5", f"distill.teacher={run}@12"]
    for words in ([f"model.init={run}"], [f"data.path={run / 'data'}"], teacher):
        with pytest.raises(UsageError, match="is in the run that --overwrite replaces"):
            pretrain(tiny(data, *words), run, existing="replace")
    assert store.newest_step(run) == 12


def test_a_job_replaces_a_run_once_and_goes_on_when_it_is_requeued(
    data: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_of_job(monkeypatch, 0)
    stopped_at_once(data=data, run=run)
    start_of_job(monkeypatch, 1)
    assert pretrain(tiny(data, "train.steps=2"), run, existing="replace")["step"] == 2
    start_of_job(monkeypatch, 2)
    assert starts.goes_on(run, "replace")
    assert pretrain(tiny(data, "train.steps=2"), run, existing="refuse")["step"] == 2
    start_of_job(monkeypatch, 0, "78")
    assert not starts.goes_on(run, "replace")
    with pytest.raises(UsageError, match="holds a run already"):
        pretrain(tiny(data, "train.steps=2"), run, existing="refuse")
    stopped_at_once(data=data, run=run)
    stopped_at_once(data=data, run=run)  # in an interactive job each command is a start of its own
    assert store.newest_step(run / "replaced") == 2


def test_the_words_new_overwrite_and_fresh(run: Path) -> None:
    refused = slope(*words(run, "--fresh"))
    assert refused.code == 2
    assert "warning: --fresh is now --new" in refused.err
    assert "leave out --new to resume it" in refused.err
    assert "--new and --overwrite: choose one" in slope(*words(run, "--new", "--overwrite")).err
    assert "choose another --out, or --overwrite it" in slope(*words(run, "optim.lr=0.1")).err
    assert slope(*words(run, "optim.lr=0.1", "train.steps=2", "--overwrite")).code == 0
    assert store.newest_step(run) == 2
    help_text = slope("pretrain", "--help").out
    assert "--overwrite" in help_text
    assert "--fresh" not in help_text


@pytest.mark.slow
def test_two_processes_replace_a_run_once_in_a_job(run: Path, tmp_path: Path) -> None:
    for restarts in range(2):
        variables = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(restarts)}
        command = words(run, "train.steps=2", "--overwrite", world=2)
        ranks = Ranks(2, command, tmp_path / f"{restarts}", variables=variables)
        assert ranks.finish() == [0, 0], ranks.printed()
        assert ("the run that was in" in ranks.printed()) == (not restarts)
    assert "finished: all of its 2 steps are done" in ranks.printed(0)
    assert len(learning_rates(run)) == 2
    assert not (run / "replaced").exists()


# ------------------------------------------------------------------------------------------------- the model of a step


def test_commands_read_the_model_of_the_step_that_is_named(finished: Path, tmp_path: Path) -> None:
    older = f"{finished}@8"
    loaded = load_model(older)
    assert (loaded.folder, loaded.step, loaded.name) == (finished, 8, "run")
    assert load_model(finished).step == 12
    measured = [slope("eval", each, "--tokens", "64", "--json").out for each in (older, f"{finished}@12", finished)]
    steps, losses = zip(*((r["step"], r["perplexity"]["loss"]) for r in map(json.loads, measured)), strict=True)
    assert steps == (8, 12, 12)
    assert losses[0] > losses[1] == losses[2]
    assert slope("generate", older, "The ", "--tokens", "4").out.startswith("The ")
    for more in ((), ("--format", "packed")):
        out = tmp_path / f"export{len(more)}"
        assert json.loads(slope("export", older, out, *more, "--json").out)["step"] == 8
    sizes = ("linearize.window=8", "train.steps=2", "log.val_tokens=64")
    done = slope("linearize", older, *sizes, "--out", tmp_path / "linear")
    assert done.code == 0, done.err
    whole = load_model(tmp_path / "linear").model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        if name.endswith("mlp.c_fc.values"):
            assert torch.equal(whole[name], tensor)


def test_a_step_that_is_not_kept_is_refused_with_those_that_are(finished: Path, tmp_path: Path) -> None:
    for command in (("generate", f"{finished}@7", "The "), ("eval", f"{finished}@7")):
        assert slope(*command) == (2, "", f"error: {finished}: has no checkpoint of step 7, but of 8, 12\n")
    refused = slope("export", f"{finished}@7", tmp_path / "out")
    assert (refused.code, "but of 8, 12" in refused.err, (tmp_path / "out").exists()) == (2, True, False)
    exported = tmp_path / "exported"
    assert slope("export", finished, exported).code == 0
    says = f"error: {exported}: is not the folder of a run (no config.yaml)\n"
    assert slope("generate", f"{exported}@7", "The ") == (2, "", says)


# ---------------------------------------------------------------------------------------------------- from another run


def branched(run: Path, source: Path | str, *more: str | Path) -> str:
    """What a run prints that begins with another one."""
    result = slope("pretrain", "--from", str(source), *more, "--out", run)
    assert result.code == 0, result.err
    return result.err


def begun(config: Config, run: Path) -> dict[str, torch.Tensor]:
    """Model and optimizer of a run before its first step."""
    run.mkdir()
    trainer = Trainer(config, run, torch.device("cpu"))
    trainer.batches.close()
    return store.state_tensors(trainer.model, trainer.optimizer)


PHASES = {
    "dense": ("method=dense",),
    "sparse": ("adapters.start=0.99",),
    "adapters": ("adapters.start=0.5",),
    "masked": ("sparsity.start=0.99", "slope.before=sr_ste"),
    "sr_ste": ("method=sr_ste", "sparsity.start=0.5"),
    "s_ste": ("method=s_ste", "sparsity.start=0.5"),
    "row masks": ("slope.row_mask_until=0.9", "slope.row_mask_update_interval=2"),
    "wanda": ("method=wanda", "sparsity.start=0.5"),
    "fst": ("method=fst", "fst.dense_finish=0.01"),
    "fst, dense again": ("method=fst", "fst.dense_finish=0.5"),
}


@pytest.mark.parametrize("phase", [x if x in ("adapters", "sr_ste", "fst") else slow(x) for x in PHASES])
def test_a_branch_has_weights_masks_and_adapters_in_every_phase(phase: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(tiny(data, *PHASES[phase], "train.steps=4", "log.save_every=3"), run)
    config = configs.load(*branch(f"{run}@3", None, with_optimizer=True))
    assert run_folder.open_config(run).optim == config.optim
    ours = begun(config, tmp_path / "branch")
    model = load_model(run, checkpoint=store.at(run, 3)).model
    theirs = {name: ours[name] for name in store.state_tensors(model, None)}
    assert theirs.keys() == {name for name in ours if name.startswith("model.")}
    for name, tensor in store.state_tensors(model, None).items():
        assert torch.equal(ours[name], tensor), name
    assert ours["optim.step"].max() == 3


def test_a_branch_says_and_records_what_it_begins_with(run: Path, tmp_path: Path) -> None:
    sizes = ("train.steps=2", "log.save_every=1")
    plain, with_state, second = (tmp_path / name for name in ("plain", "with", "second"))
    begins = f"begins with {run} at step 8, without its optimizer's state"
    assert branched(plain, f"{run}@8", *sizes).splitlines()[0] == begins
    said = branched(with_state, run, "--with-optimizer", *sizes)
    assert said.splitlines()[0] == f"begins with {run} at step 12, with its optimizer's state"
    branched(second, f"{plain}@1", *sizes)
    recorded = [
        (plain, run, 8, 8 * 128, False),
        (with_state, run, 12, 12 * 128, True),
        (second, plain, 1, 9 * 128, False),
    ]
    for branch_of_it, source, step, tokens, state in recorded:
        record = {"kind": "init", "step": 1, "source": str(source), "source_step": step, "source_tokens": tokens}
        assert records(branch_of_it)[0] == record | {"optimizer": state}
    run.rename(tmp_path / "gone")
    shutil.rmtree(store.folders(plain)[0])
    again = branched(plain, f"{run}@8", *sizes)
    assert "begins with" not in again
    assert again.splitlines()[0] == f"resuming from {store.folders(plain)[1]}"
    assert [record["kind"] for record in records(plain)].count("init") == 1


def test_a_dry_run_of_a_branch_needs_no_folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = slope("pretrain", "--from", f"{finished}@8", "train.steps=5", "--dry-run")
    assert shown.code == 0, shown.err
    assert f"{finished}@8\n" in shown.out
    assert list(tmp_path.iterdir()) == []


def test_a_branch_is_described_by_its_config_and_resumed_without_the_other_run(
    data: Path, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "branch"
    pretrain(tiny(data, "train.steps=14"), run)
    branched(out, run, "train.steps=2", "optim.lr=1e-3")
    config = run_folder.open_config(out)
    assert (config.model.init, config.adapters.start, config.adapters.rank) == (f"{run}@14", 0, 4)
    assert (config.train.extended, config.optim.lr, config.model.init_optimizer) == ([], 1e-3, False)
    run.rename(tmp_path / "gone")
    assert "finished" in branched(out, run, "train.steps=2", "optim.lr=1e-3")
    assert "extended from 2 to 3 steps" in branched(out, f"{run}@14", "train.steps=3", "optim.lr=1e-3")
    for source, reason in (
        (f"{run}@12", "is not the folder of a run"),
        (run, "another config (optim.lr: 0.001 -> 0.1)"),
    ):
        failed = slope("pretrain", "--from", source, "train.steps=3", "optim.lr=0.1", "--out", out)
        assert failed.code == 2
        assert reason in failed.err


@pytest.mark.parametrize(("given", "expected"), [("null", 1e-3), ("0.002", 0.002)])
def test_adapters_follow_the_learning_rate_of_a_branch_as_they_did(
    given: str, expected: float, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pretrain(tiny(data, f"adapters.lr={given}", "train.steps=2", "log.save_every=2"), run)
    recipe, words = branch(str(run), None, with_optimizer=False)
    assert configs.load(recipe, [*words, "optim.lr=1e-3"]).adapters.lr == expected


def test_the_optimizers_state_comes_along_if_it_is_asked_for(data: Path, finished: Path, tmp_path: Path) -> None:
    theirs = final_state(tiny(data), finished)
    ours = begun(configs.load(*branch(str(finished), None, with_optimizer=True)), tmp_path / "with")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    without = begun(configs.load(*branch(str(finished), None, with_optimizer=False)), tmp_path / "without")
    assert not [name for name in without if name.startswith("optim.")]


def test_what_cannot_be_branched_is_one_line(data: Path, finished: Path, tmp_path: Path) -> None:
    def refused(*words: str | Path) -> str:
        result = slope("pretrain", *words)
        assert result.code, result
        assert result.err.count("\n") == 1, result.err
        return result.err

    out = ("--out", tmp_path / "out")
    assert f"{finished}: has no checkpoint of step 7, but of 8, 12\n" in refused("--from", f"{finished}@7", *out)
    shown = slope("pretrain", "--from", f"{finished}@8", "--dry-run", *out)
    assert f"{finished}@8\n" in shown.out
    assert "adapters.start" not in shown.err
    assert not (tmp_path / "out").exists()
    assert "give no recipe" in refused("gpt2-nano", "--from", finished, *out)
    assert "--out" in refused("--from", finished)
    assert "is for --from" in refused("--with-optimizer", *out)
    assert "is not the folder of a run" in refused("--from", tmp_path, *out)
    assert "is in the run that --overwrite replaces" in refused("--from", finished, "--out", finished, "--overwrite")
    with pytest.raises(UsageError, match=r"model.init_optimizer=True: needs model.init"):
        tiny(data, "model.init_optimizer=true")
    lamb = tiny(data, f"model.init={finished}@8", "model.init_optimizer=true", "optim.name=lamb", "adapters.start=0")
    with pytest.raises(
        UsageError, match=r"^model.init_optimizer=true: model.init=.*@8 has the state of adamw, not of lamb$"
    ):
        pretrain(lamb, tmp_path / "lamb")


@pytest.mark.slow
def test_a_job_branches_once_and_two_processes_do_it_together(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "branch"
    shutil.copytree(run, out)
    settings = ("train.steps=3", "train.tokens_per_step=128", "model.dropout=0")
    command = ["pretrain", "--from", str(run), "--with-optimizer", *settings, "--overwrite", "--out", str(out)]
    for restarts, layout in enumerate(("fsdp", "ddp")):
        variables = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(restarts)}
        ranks = Ranks(2, [*command, f"distributed.layout={layout}"], tmp_path / f"{restarts}", variables=variables)
        assert ranks.finish() == [0, 0], ranks.printed()
        if not restarts:
            run.rename(tmp_path / "gone")
    assert "finished: all of its 3 steps are done" in ranks.printed(0)
    alone = tmp_path / "alone"
    branched(alone, tmp_path / "gone", "--with-optimizer", *settings)
    losses = [[r["loss"] for r in records(each) if r["kind"] == "train"] for each in (out, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
