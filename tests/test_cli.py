"""The command line: help, exit codes, what goes to which stream, and one clear line for each bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.data import prepared, texts
from support.runs import RECIPE, STEPS, slope, small, trained

import slope_cli
import slope_cli.errors
from slope_cli import cli

COMMANDS = [
    [],
    ["pretrain"],
    ["linearize"],
    ["data"],
    ["data", "prepare"],
    ["data", "info"],
    ["generate"],
    ["serve"],
    ["export"],
    ["recipes"],
    ["config"],
    ["plot"],
    ["check"],
    ["bench"],
    ["convert-llama2c"],
    ["compare"],
    ["eval"],
    ["finetune"],
    ["doctor"],
]


def error(*words: str | Path, code: int = 2) -> str:
    """Run a command that must fail with one line on standard error and nothing on standard output."""
    result = slope(*words)
    lines = result.err.splitlines()
    assert (result.code, result.out, len(lines)) == (code, "", 1), result
    assert lines[0].startswith("error: ")
    assert "Traceback" not in lines[0]
    return lines[0].removeprefix("error: ")


def train_error(*words: str | Path, out: Path, code: int = 2) -> str:
    """The same for a training run; the table of layers may come before the error."""
    result = slope("pretrain", RECIPE, *small("gpt2-nano"), *words, "--out", out)
    last = result.err.splitlines()[-1]
    assert (result.code, result.out, result.err.count("error: ")) == (code, "", 1), result
    assert "Traceback" not in result.err
    return last.removeprefix("error: ")


# ------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_of_every_command(words: list[str]) -> None:
    result = slope(*words, "--help")
    assert (result.code, result.err) == (0, "")
    assert "Usage: slope" in result.out


def test_every_command_is_in_that_list() -> None:
    names = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    names |= {group.name for group in cli.app.registered_groups}
    assert names == {words[0] for words in COMMANDS if words}


@pytest.mark.parametrize("words", [[], ["data"]], ids=" ".join)
def test_no_line_of_a_list_of_commands_is_cut(words: list[str]) -> None:
    assert "..." not in slope(*words, "--help").out.partition("Commands:")[2]


@pytest.mark.parametrize(("columns", "used"), [("80", 80), ("200", 100)])
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_fits_the_terminal_and_names_no_python_type(
    words: list[str], columns: str, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = slope(*words, "--help").out
    assert max(map(len, text.splitlines())) <= used
    assert not re.search(r"<[^>]* range>", text)
    assert not re.search(r"^  [A-Z|=]+ <", text, flags=re.MULTILINE)
    if words == ["pretrain"]:
        assert "Show what would be done, without GPU, data or weights.\n" in text


def test_help_is_quick() -> None:
    program = shutil.which("slope", path=Path(sys.executable).parent) or shutil.which("slope")
    command = [program] if program else [sys.executable, "-P", "-c", "from slope_cli.cli import main; main()"]
    seconds = []
    for _ in range(3):
        start = sum(os.times()[2:4])  # of children, on the processor: other work may share it
        subprocess.run([*command, "--help"], check=True, capture_output=True)
        seconds.append(sum(os.times()[2:4]) - start)
    assert 0 < min(seconds) < 0.5


@pytest.mark.parametrize("words", [["--help"], ["pretrain", "--help"], ["recipes"], ["--version"]])
def test_light_commands_import_nothing_heavy(words: list[str]) -> None:
    script = (
        f"import sys; sys.argv = ['slope', *{words!r}]\n"
        "from slope_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script], check=True, capture_output=True)


def test_the_shell_completes_what_install_completion_installs(tmp_path: Path) -> None:
    """In a real bash, from its own start-up file: commands, options, recipes and keys."""
    program = tmp_path / "slope"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m slope_cli "$@"\n')
    program.chmod(0o755)
    script = """
    set -e
    slope --install-completion >&2; . "$HOME/.bashrc"
    complete() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _slope_completion slope; echo "${COMPREPLY[@]}"; }
    complete slope pretr
    complete slope pretrain --dry
    complete slope pretrain gpt2-sm
    complete slope linearize runs/small --recipe linearize-l
    complete slope config optim.l
    """
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / ".bashrc").touch()
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [
            "pretrain",
            "--dry-run",
            "gpt2-small gpt2-small-short",
            "linearize-llama3-70b linearize-llama3-8b",
            "optim.lr",
        ],
    ), done.stderr


def test_version() -> None:
    assert slope("--version") == (0, f"{slope_cli.__version__}\n", "")


# ------------------------------------------------------------------------------------------------ wrong words


@pytest.mark.parametrize(
    "words",
    [
        ["pretrian"],
        ["pretrain", "--nonsense"],
        ["pretrain", "--out"],
        ["generate"],
        ["generate", "run", "text", "--tokens", "0"],
        ["generate", "run", "text", "--temperature", "-1"],
        ["generate", "run", "text", "--tokens", "many"],
        ["generate", "run", "text", "--seed", "99999999999999999999"],
        ["export"],
        ["plot"],
        ["check"],
        ["data", "prepare", "text"],
        ["data", "nonsense"],
    ],
)
def test_wrong_usage_is_exit_2(words: list[str]) -> None:
    result = slope(*words)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[-1].startswith("Error: ")
    assert result.err.isascii()  # no box


def test_a_misspelt_command_is_met_with_the_right_one() -> None:
    assert "Did you mean 'pretrain'?" in slope("pretrian").err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lrr=3"], "optim.lrr: unknown key; did you mean optim.lr?"),
        (["gpt2-small", "optim.lrr=3"], "optim.lrr: unknown key; did you mean optim.lr?"),
        (["gpt2-smal"], "gpt2-smal: no recipe of this name; did you mean gpt2-small"),
        (["gpt2-nano", "train.steps"], "train.steps: is not KEY=VALUE"),
        (["sparsity.n=2:4"], "sparsity.n: 2:4 would be read as a base-60 number; say sparsity.n=2 sparsity.m=4"),
        (["train.steps=1e5"], "train.steps=100000.0: must be a whole number, such as train.steps=10000"),
        (["train.steps=0"], "train.steps=0: must be positive"),
        (["train.seed=99999999999999999999"], "train.seed=99999999999999999999: must be below 2^63"),
        (["train.device=meta"], "train.device=meta: choose auto, cpu, cuda or cuda:N"),
        (["optim.betas=[0.9]"], "optim.betas=[0.9]: must be two numbers, such as optim.betas=[0.9, 0.999]"),
        (["model.name=gpt2-smal"], "unknown model 'gpt2-smal'; did you mean gpt2-small"),
        (["model.overrides.n_layr=2"], "model gpt2-nano has no setting 'n_layr'; did you mean n_layer"),
        (["model.overrides.n_head=3"], "model gpt2-nano: 3 attention heads do not divide the width 128"),
        (["sparsity.exclude_modules=[nonsense]"], "sparsity: exclude_modules: 'nonsense' matches no linear layer"),
        (["sparsity.exclude_modules=[.]"], "sparsity: no linear layer of GPT2LMHeadModel can be made sparse"),
        (["adapters.rank=129"], "adapters.rank=129: must be at most 128: transformer.h.0.attn.c_proj has a side of"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("mode", ["--dry-run", "--out"])
def test_a_wrong_config_is_one_line(words: list[str], message: str, mode: str, tmp_path: Path) -> None:
    tail: list[str | Path] = [mode] if mode == "--dry-run" else [mode, tmp_path / "run"]
    assert error("pretrain", *words, *tail).startswith(message)


def test_a_word_without_effect_is_warned_of() -> None:
    result = slope("pretrain", "method=dense", "adapters.rank=8", "--dry-run")
    assert (result.code, result.err) == (0, "warning: adapters.rank=8.0: has no effect with method=dense\n")


def test_positions_that_end_before_the_sequence() -> None:
    words = ["train.micro_batch=1", "train.seq_len=16384", "--dry-run"]
    assert error("pretrain", "llama3-8b", *words).startswith("model llama3-8b: seq_len 16384 is longer than")


def test_a_wrong_recipe_file_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    for text, message in [
        ("sparsity:\n  n: 2:4\n", "sparsity.n: 2:4 would be read as a base-60 number"),
        ("optim:\n  lrr: 1\n", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("optim: [\n", "line 2 is not YAML"),
    ]:
        recipe.write_text(text)
        assert error("pretrain", recipe, "--dry-run").startswith(f"{recipe}: {message}")


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    assert train_error("train.device=nonsense", out=tmp_path / "run").startswith("train.device=nonsense: ")


# ------------------------------------------------------------------------------------------- data and folders


def test_ids_above_the_vocabulary(tmp_path: Path) -> None:
    words = [f"data.path={prepared()}", "model.overrides.vocab_size=256"]
    message = train_error(*words, out=tmp_path / "run")
    assert "token id 256 is above the model's vocabulary of 256" in message
    assert "set the model's vocabulary to 257" in message
    assert error("pretrain", "gpt2-nano", *words, "--dry-run") == message


def test_a_sequence_longer_than_the_data(tmp_path: Path) -> None:
    words = ["train.seq_len=16384", "train.tokens_per_step=32768", "model.overrides.n_positions=16384"]
    message = train_error(f"data.path={prepared()}", *words, out=tmp_path / "run")
    assert "fewer than one sequence needs" in message


def test_a_missing_an_unfinished_and_a_foreign_data_folder(tmp_path: Path) -> None:
    missing, foreign, unfinished = tmp_path / "none", tmp_path / "foreign", tmp_path / "unfinished"
    foreign.mkdir()
    (unfinished / ".parts").mkdir(parents=True)
    assert train_error(f"data.path={missing}", out=tmp_path / "a").startswith(f"{missing}: no such data folder")
    assert train_error(f"data.path={foreign}", out=tmp_path / "b").startswith(f"{foreign}: not a prepared data set")
    assert "unfinished preparation" in train_error(f"data.path={unfinished}", out=tmp_path / "c", code=1)
    assert error("data", "info", missing).startswith(f"{missing}: no such data folder")
    message = error("pretrain", "gpt2-mini", f"data.path={missing}", "--out", tmp_path / "d")
    command = "slope data prepare text=FOLDER --tokenizer gpt2 --out data/text"
    assert message.endswith(f"; the data of gpt2-mini: any text, {command}")


def test_a_misspelt_data_folder_is_answered_with_the_nearest_one_that_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data/corpus", "other"):
        shutil.copytree(prepared(), name)
    (tmp_path / "corpus").mkdir()  # the text, not the tokens
    (tmp_path / "data/corpsu").mkdir()
    own = "data/corpus? If not, make it with `slope data prepare`"
    for wrong, what in (("data/corps", "no such data folder"), ("elsewhere/corpus", "no such data folder")):
        message = error("pretrain", "gpt2-small", f"data.path={wrong}", "--out", "run")
        assert message.startswith(
            f"{wrong}: {what}; did you mean {own}; the data of gpt2-small: slope data prepare Sky"
        )
    for wrong in ("corpus", "data/corpsu"):
        found = error("data", "info", wrong)
        assert found.startswith(
            f"{wrong}: not a prepared data set (no dataset.json); did you mean data/corpus? If not, "
        )
    assert error("data", "info", "nothing") == "nothing: no such data folder; make it with `slope data prepare`"


def test_folders_that_a_run_cannot_have(tmp_path: Path) -> None:
    data = f"data.path={prepared()}"
    other = train_error(data, "optim.lr=0.5", out=trained())
    assert "optim.lr: 0.01 -> 0.5" in other
    assert "choose another --out" in other
    (tmp_path / "letter.txt").write_text("dear reader")
    assert "letter.txt" in train_error(data, out=tmp_path)
    assert "letter.txt" in train_error(data, out=tmp_path / "letter.txt")
    result = slope("pretrain", RECIPE, *small("gpt2-nano"), data, "--out", trained(), "--new")
    assert (result.code, result.out) == (2, "")
    assert "--new" in result.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert str(tmp_path) in train_error(f"data.path={prepared()}", out=tmp_path / "run")
    assert str(tmp_path) in error("export", trained(), tmp_path / "export", code=1)


@pytest.mark.parametrize(
    "command", [["generate", "{}", "text"], ["export", "{}", "x"], ["plot", "{}"], ["check", "{}"]]
)
def test_what_is_no_run_is_named(command: list[str], tmp_path: Path) -> None:
    fault = "neither a run" if command[0] == "generate" else "not the folder of a run"
    assert fault in error(*(word.format(tmp_path) for word in command))
    assert str(tmp_path / "none") in error(*(word.format(tmp_path / "none") for word in command))


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert error("recipes", "gpt2-small", "--copy", tmp_path / "none" / "x.yaml", code=1).startswith(str(tmp_path))
    assert error("plot", trained(), "--out", tmp_path / "file" / "loss", code=1).startswith(str(tmp_path / "file"))


# ---------------------------------------------------------------------------------------- results and streams


def test_a_run_prints_its_results_and_the_same_command_prints_them_again() -> None:
    words = ["pretrain", str(RECIPE), *small("gpt2-nano"), f"data.path={prepared()}", "--out", str(trained())]
    words.append("log.plot=true")
    result = slope(*words)
    assert result.code == 0
    assert result.out.startswith(f"step {STEPS}: validation loss ")
    assert "a bigram model of the same text: " in result.out
    assert "sample:\n  The " in result.out
    assert f"plot: {trained()}/loss.png" in result.out
    record = json.loads(slope(*words, "--json").out)
    assert record["step"] == STEPS
    assert f"{record['loss']:.4f}" in result.out


def test_a_bert_is_not_recommended_for_text() -> None:
    words = ["pretrain", str(RECIPE), *small("bert-base"), f"data.path={prepared('wordpiece')}"]
    result = slope(*words, "log.plot=true", "--out", trained("bert-base"))
    assert result.code == 0
    assert result.out.splitlines()[-1] == f"plot: {trained('bert-base')}/loss.png"
    assert (
        f"slope generate {trained()}"
        in slope("pretrain", RECIPE, *small("gpt2-nano"), f"data.path={prepared()}", "--out", trained()).out
    )


def test_the_first_start_logs_to_standard_error(tmp_path: Path) -> None:
    words = [*small("gpt2-nano"), f"data.path={prepared()}", "train.steps=2", "log.every=1"]
    result = slope("pretrain", RECIPE, *words, "--json", "--out", tmp_path / "run")
    assert result.code == 0
    assert json.loads(result.out)["run"] == str(tmp_path / "run")
    assert "step 1/2  loss" in result.err
    assert not any(f"step 2: {said}" in result.err for said in ("validation loss", "'The"))  # the result says it
    assert "layers are 2:4 sparse" in result.err


def test_the_name_of_a_recipe_is_that_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for recipe, name in [("opt-1.3b", "opt-1.3b"), ("./deep/my.v2.yaml", "my.v2")]:
        if recipe.endswith(".yaml"):
            (tmp_path / "deep").mkdir()
            (tmp_path / recipe).write_text("")
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "letter.txt").write_text("dear reader")
        assert f"runs/{name}" in error("pretrain", recipe)


def test_a_recipe_file_may_have_an_equals_sign_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1.yaml").write_text("optim: {lr: 0.123}\n")
    assert "  lr: 0.123" in slope("pretrain", "lr=1.yaml", "--dry-run").out.splitlines()


def test_check_of_a_sound_run_as_text_and_json() -> None:
    result = slope("check", trained())
    assert (result.code, result.err) == (0, "")
    assert all(line.endswith(": sound") for line in result.out.splitlines())
    assert json.loads(slope("check", trained(), "--json").out)["faults"] == []


def test_info_of_a_data_folder() -> None:
    counted = json.loads(slope("data", "info", prepared(), "--json").out)
    assert counted["tokenizer"] == "bytes"
    assert counted["sources"][-1]["training_tokens"] == sum(s["training_tokens"] for s in counted["sources"][:-1]) > 0
    result = slope("data", "info", prepared())
    assert (result.code, result.err) == (0, "")
    assert "tokenizer bytes, 257 ids" in result.out
    assert "validation text is held out of training" in result.out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.out.splitlines()[6:]]
    heads, source, whole = rows[0], rows[2], rows[3]
    assert dict(zip(heads, source, strict=True)) == {
        "source": "text",
        "training documents": "96",
        "training tokens": "7,264",
        "training bytes": "7,168",
        "validation tokens": "1,816",
        "validation bytes": "1,792",
        "held out": "20.0%",
    }
    assert whole == ["all", *source[1:]]


def test_prepare_prints_the_table(tmp_path: Path) -> None:
    result = slope("data", "prepare", texts(), "--out", tmp_path / "data", "--workers", "1")
    assert result.code == 0
    assert result.out == slope("data", "info", tmp_path / "data").out
    missing = slope("data", "prepare", tmp_path / "none.txt", "--out", tmp_path / "other")
    assert (missing.code, missing.out, missing.err.count("\n")) == (2, "", 1)


# ------------------------------------------------------------------------------------------------------- debug


def test_debug_shows_the_traceback() -> None:
    result = slope("--debug", "pretrain", "optim.lrr=3", "--dry-run")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Traceback")
    assert "slope_cli.errors.UsageError" in result.err
    assert "SLOPE_DEBUG" not in os.environ


def test_no_error_prints_local_variables(tmp_path: Path) -> None:
    """Neither a known fault, nor one with --debug, nor a defect: a variable may hold a secret."""
    script = (
        "import sys\n"
        "from slope_cli import cli, errors\n"
        "@cli.app.command()\n"
        "def broken(known: bool = False) -> None:\n"
        "    token = '-'.join(['hush', 'hush'])\n"
        "    raise errors.UsageError('a fault') if known else ValueError('a defect')\n"
        "sys.argv = ['slope', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    path = tmp_path / "broken.py"
    path.write_text(script)
    for words, code, traceback in [
        (["broken", "--known"], 2, False),
        (["--debug", "broken", "--known"], 2, True),
        (["broken"], 1, True),
    ]:
        done = subprocess.run([sys.executable, str(path), *words], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, "")
        assert ("Traceback" in done.stderr) == traceback
        assert "hush-hush" not in done.stderr


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "out of memory (CUDA out of memory);"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory ("),
        (MemoryError(), "out of memory ("),
        (
            FileNotFoundError(2, "No such file or directory", "a/b"),
            "a/b: No such file or directory; put it back or correct the path",
        ),
        (OSError("something"), "something"),
    ],
)
def test_faults_of_the_machine_are_one_line(
    fault: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(prog_name: str) -> None:
        raise fault

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {line}")
    assert shown.count("\n") == 1


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(prog_name: str) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "RuntimeError: a defect"


# ------------------------------------------------------------------------------------- compare, eval, finetune


@pytest.mark.slow
def test_compare_trains_and_shows_a_table(tmp_path: Path) -> None:
    words = ["compare", RECIPE, *small("gpt2-nano"), f"data.path={prepared()}", "--methods", "dense,slope-r0"]
    result = slope(*words, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "slope-r0" in result.out
    assert {f"compare.{ending}" for ending in ("json", "md", "png", "svg")} <= set(os.listdir(tmp_path / "out"))
    again = slope("compare", "--runs", *sorted((tmp_path / "out").glob("*-s1")), "--out", tmp_path / "again", "--json")
    assert json.loads(again.out)["failures"] == []


def test_wrong_words_of_compare_eval_and_finetune_are_one_line(tmp_path: Path) -> None:
    assert "--seeds x: give comma-separated numbers" in error(
        "compare", "gpt2-nano", "--methods", "dense", "--seeds", "x"
    )
    assert "nothing to compare" in error("compare", "gpt2-nano", "--out", tmp_path)
    assert "is neither a run" in error("eval", tmp_path)
    assert "unknown task 'SST3'" in error("finetune", tmp_path, "SST3")


def test_eval_and_finetune_print_what_they_found(tmp_path: Path) -> None:
    result = slope("eval", trained(), "--tokens", 64, "--out", tmp_path / "eval.json")
    assert result.code == 0, result.err
    assert "perplexity" in result.out
    assert json.loads((tmp_path / "eval.json").read_text())["perplexity"]["tokens"] > 0
    (tmp_path / "SST-2").mkdir()
    rows = "".join(f"{text}\t{label}\n" for text, label in (("the hills", 1), ("a cold wind", 0)) * 4)
    for name in ("train", "dev"):
        (tmp_path / "SST-2" / f"{name}.tsv").write_text("sentence\tlabel\n" + rows)
    words = ("--data", tmp_path, "--epochs", 1, "--seq-len", 16, "--out", tmp_path / "tuned", "--json")
    tuned = slope("finetune", trained("bert-base"), "SST-2", *words)
    assert tuned.code == 0, tuned.err
    assert json.loads(tuned.out)["settings"]["task"] == "SST-2"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--train.steps", "10"), "--train.steps: is no option; a key is written without dashes: train.steps=10"),
        (("--train.steps=10",), "--train.steps: is no option; a key is written without dashes: train.steps=10"),
        (
            ("--train.seq-len", "4"),
            "--train.seq-len: is no option; a key is written without dashes: ",
        ),
        (("--lr", "1e-3"), "--lr: is no option; a key is written without dashes: optim.lr=1e-3"),
        (("--steps", "--dry-run"), "--steps: is no option; a key is written without dashes: train.steps=VALUE"),
    ],
)
@pytest.mark.parametrize("command", [("pretrain", "gpt2-nano"), ("linearize", "runs/x"), ("compare", "gpt2-nano")])
def test_a_key_written_as_an_option_is_answered_with_the_word(
    command: tuple[str, ...], words: tuple[str, ...], hint: str
) -> None:
    code, out, err = slope(*command, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {hint}")


def test_a_wrong_option_is_still_one() -> None:
    assert "No such option: --dry" in slope("pretrain", "gpt2-nano", "--dry").err
