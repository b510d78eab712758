"""A run is extended, begun anew in its folder, and branched from another one."""

import shutil
from pathlib import Path

import pytest
from support.data import prepared
from support.ranks import Ranks
from support.runs import RECIPE, assert_same_run, records, sized, tiny

from slope_cli.checkpoint import run_folder, store
from slope_cli.checkpoint.load import load_model
from slope_cli.checkpoint.verify import check
from slope_cli.errors import UsageError
from slope_cli.methods import optim, phases_of
from slope_cli.train.loop import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert "finished: all of its 12 steps are done; a larger train.steps extends it" in capsys.readouterr().err
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
    with pytest.raises(UsageError, match=r"another config \(train.steps: 12 -> 8\)"):
        pretrain(tiny(data, "train.steps=8"), run)
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
