"""What is likely to be a mistake is said before the first step, and what to do after the last one that failed."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from support.data import prepared
from support.models import tiny_model
from support.runs import RECIPE, sized, slope, tiny

from slope_cli.checkpoint.verify import check
from slope_cli.config import configs
from slope_cli.data.dataset import largely_held_out, open_dataset
from slope_cli.data.prepare import prepare
from slope_cli.errors import SlopeError
from slope_cli.methods import phases_of
from slope_cli.report import warned
from slope_cli.train.advice import after_failure, warnings_of
from slope_cli.train.step import NonFinite, Step
from sparse_kernels import kernel_choice

LINEARIZE = "method=linearize linearize.window=32"


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ("optim.warmup=1000", "optim.warmup=1000: the warm-up is not over before the 1,000 steps that"),
        ("adapters.warmup=200", "adapters.warmup=200: the warm-up is not over before the 100 steps that"),
        (f"{LINEARIZE} optim.warmup=700", "optim.warmup=700: the warm-up is not over before the 500 steps"),
        (
            "optim.schedule=wsd optim.warmup=100 optim.decay=901",
            "optim.decay=901: is longer than the 900 steps after the warm-up",
        ),
        ("optim.name=muon optim.muon_lr=5", "optim.muon_lr=5: is 833 times the recipe's 0.006; is it meant?"),
        ("adapters.start=1", "adapters.start=1: adapters would join after the end of the 1,000 steps"),
        (f"{LINEARIZE} linearize.transfer=0.9999", "linearize.transfer=0.9999: adapters would join after the end"),
        ("optim.lr=5", "optim.lr=5: is 833 times the recipe's 0.006; is it meant?"),
        ("optim.lr=6e-6", "optim.lr=6e-06: is 1/1,000 of the recipe's 0.006; is it meant?"),
        ("adapters.lr=5", "adapters.lr=5: is 833 times the recipe's 0.006; is it meant?"),
        (
            f"{LINEARIZE} linearize.transfer_lr=5",
            "linearize.transfer_lr=5: is 500 times the recipe's 0.01; is it meant?",
        ),
    ],
)
def test_what_is_likely_a_mistake_is_said_once(words: str, warning: str) -> None:
    config, usual = configs.load("gpt2-nano", words.split()), configs.load_with_usual_rates("gpt2-nano", words.split())
    (line,) = warnings_of(config, usual=usual)
    assert line.startswith(warning)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "optim.warmup=900",
        "adapters.start=0.99",
        "adapters.start=1 adapters.rank=0",
        "adapters.start=1 method=dense",
        "adapters.start=1 train.steps=2000 train.extended=[[1000,1000]]",  # they joined at step 999
        "adapters.lr=5 method=dense",
        "optim.lr=0.02",
        "adapters.schedule=run adapters.warmup=500",
        "optim.schedule=wsd optim.warmup=0 optim.decay=1000",
        "optim.name=muon optim.lr=0.02",
        f"{LINEARIZE} linearize.transfer=1",
    ],
)
def test_what_is_sound_gets_no_warning(words: str) -> None:
    config, usual = configs.load("gpt2-nano", words.split()), configs.load_with_usual_rates("gpt2-nano", words.split())
    assert warnings_of(config, usual=usual) == []


@pytest.mark.parametrize("name", configs.recipe_names())
def test_no_recipe_gets_a_warning(name: str) -> None:
    assert warnings_of(configs.load(name), usual=configs.load(name)) == []


def test_fewer_tokens_than_the_steps_ask_for_are_counted_in_epochs() -> None:
    data = open_dataset(prepared("bytes"))
    config = tiny(data.folder)
    config.train.steps = 3 * data.train_tokens // (2 * config.train.tokens_per_step)
    (line,) = warnings_of(config, data)
    assert "the run goes through them 1.5 times (epochs)" in line
    config.train.steps //= 2
    assert warnings_of(config, data) == []


def test_sources_of_which_nearly_half_is_held_out_are_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What to do about it is said where it can be done, when the data are prepared, and then no more."""
    rows = '{"text": "one of two documents"}\n{"text": "the other of the two"}\n'
    for name in ("first", "second"):
        (tmp_path / f"{name}.jsonl").write_text(rows)
    inputs = [str(tmp_path / f"{name}.jsonl") for name in ("first", "second")]
    data = prepare(inputs, tmp_path / "data", workers=1)
    (line,) = largely_held_out(data)
    assert line == (
        f"{data.folder}: far more than --val-fraction 0.01 is held out for validation of first (50%), second (50%)"
    )
    said = capsys.readouterr().err
    assert f"warning: {line}; what is held out are whole documents, or parts of up to 16,384 characters" in said
    assert "make short files one source (NAME=FOLDER), or prepare more text" in said
    assert warnings_of(tiny(data.folder, "train.steps=12"), data)[-1] == line
    prepare(inputs, tmp_path / "data", workers=1)
    assert "held out" not in capsys.readouterr().err
    half = prepare(inputs, tmp_path / "half", val_fraction=0.5, workers=1, progress=False)
    assert largely_held_out(half) == []


def test_a_run_and_a_dry_run_say_the_same_before_the_first_step(tmp_path: Path) -> None:
    words = ["tests/tiny.yaml", *sized("gpt2-nano"), f"data.path={prepared('bytes')}", "train.steps=2", "optim.lr=1e-7"]
    words[0] = str(Path(__file__).parent / "tiny.yaml")
    begun = slope("pretrain", *words, "--out", tmp_path / "run")
    dry = slope("pretrain", *words, "--dry-run")
    assert (begun.code, dry.code) == (0, 0)

    def warnings(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("warning: ")]

    assert warnings(begun.err) == warnings(dry.err)
    assert "warning: optim.lr=1e-07: is 1/50,000 of the recipe's 0.005; is it meant?" in warnings(dry.err)
    assert begun.err.index("warning: optim.lr") < begun.err.index("step ")


def test_after_divergence_the_learning_rates_to_lower_are_named() -> None:
    def said(*words: str, step: int, what: str = "loss") -> str:
        phase = phases_of(configs.load("gpt2-nano", words)).at(step)
        return after_failure(NonFinite(what, "why"), phase, step)

    assert said("optim.lr=50", step=8) == "the loss became non-finite at step 9: lower optim.lr, now 50 (why)"
    assert said("optim.lr=50", step=950).endswith("at step 951: lower optim.lr, now 50 (why)")
    both = "lower optim.lr, now 50 or adapters.lr, now 2 (why)"
    assert said("optim.lr=50", "adapters.lr=2", step=950, what="gradient").endswith(both)
    assert said("optim.name=muon", "optim.muon_lr=2", step=8).endswith("0.006 or optim.muon_lr, now 2 (why)")
    assert "lower linearize.transfer_lr, now 0.01" in said(*LINEARIZE.split(), step=8)
    assert "lower adapters.lr, now 0.006" in said(*LINEARIZE.split(), step=800)
    first = "the loss was non-finite at step 1, before any update: check the weights that it begins with (model.init)"
    assert said(step=0).startswith(first)
    phase = phases_of(configs.load("gpt2-nano")).at(0)
    assert after_failure(SlopeError("a damaged file"), phase, 3) == "step 4: a damaged file"


def test_a_norm_too_large_for_float32_is_said_in_words() -> None:
    model = tiny_model("gpt2-nano")
    step = Step(model, torch.optim.AdamW(model.parameters()), dtype=None, clip=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e38)
    assert math.isinf(step.norm())
    said = "^every gradient is finite, but so large that their norm is not; nothing was updated$"
    with pytest.raises(NonFinite, match=said):
        step.check(torch.zeros(2), step.norm(), [])


# ------------------------------------------------------------------------------------------------- what a run keeps


def test_a_run_keeps_what_it_has_warned_of_once(tmp_path: Path) -> None:
    """Over all starts, and with paths as seen from its folder; `slope check` looks at the file."""
    run = tmp_path / "run"
    words = [RECIPE, *sized("gpt2-nano"), f"data.path={prepared('bytes')}", "train.steps=12", "log.save_every=4"]
    assert slope("pretrain", *words, "optim.warmup=100", "--out", run).code == 0
    kept = warned.recorded(run)
    assert [line.partition(":")[0] for line in kept] == ["optim.warmup=100"]
    (run / "checkpoints" / "step-00000012" / "__0_0.distcp").write_bytes(b"")
    again = slope("pretrain", *words, "optim.warmup=100", "--out", run)
    assert again.code == 0
    (more,) = warned.recorded(run)[1:]
    assert more.startswith("checkpoints/step-00000012")
    assert more.endswith("resuming from step-00000008")
    assert "checkpoints/step-00000012" in again.err
    assert f"{warned.WARNINGS}: sound" in check(run)["lines"]
    (run / warned.WARNINGS).write_bytes((run / warned.WARNINGS).read_bytes().replace(b"100", b"200"))
    assert any(fault.startswith(warned.WARNINGS) for fault in check(run)["faults"])
    assert warned.recorded(run) == [more]


def test_a_sound_run_and_one_that_does_not_begin_keep_nothing(tmp_path: Path) -> None:
    words = [RECIPE, *sized("gpt2-nano"), f"data.path={prepared('bytes')}", "train.steps=2", "optim.warmup=1"]
    assert slope("pretrain", *words, "adapters.warmup=1", "--out", tmp_path / "sound").code == 0
    assert not (tmp_path / "sound" / warned.WARNINGS).exists()
    refused = slope("pretrain", *words, "optim.warmup=100", "data.path=/no/such", "--out", tmp_path / "refused")
    assert refused.code != 0
    assert not (tmp_path / "refused").exists()


def test_python_warnings_of_the_kernels_are_a_runs_and_those_of_others_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOPE_CACHE_DIR", str(tmp_path))
    kernel_choice.cache_file().write_text("damaged")
    with warnings.catch_warnings(record=True) as others, warned.kept(tmp_path):
        warnings.simplefilter("always")
        assert kernel_choice.saved_choices() == {}
        warnings.warn("of another library", UserWarning, stacklevel=1)
    (line,) = warned.recorded(tmp_path)
    assert line.startswith("plans.json is not a readable file of plans (")
    assert capsys.readouterr().err == f"warning: {tmp_path}/{line}\n"
    assert [str(each.message) for each in others] == ["of another library"]


def test_a_warning_that_cannot_be_kept_is_said_and_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / warned.WARNINGS).symlink_to(tmp_path / "elsewhere")
    with warned.kept(tmp_path):
        warned.warn(f"{tmp_path}/data is slow")
    assert capsys.readouterr().err == f"warning: {tmp_path}/data is slow\n"
    assert not (tmp_path / "elsewhere").exists()
