"""The examples in README work, its keys exist, and its figures are those of the result files."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from slope_cli.benchmarks import render
from slope_cli.cli import app
from slope_cli.config import load as configs

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("slope ")]


def test_the_library_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = blocks("python")
    assert len(source.splitlines()) <= 25
    names: dict[str, object] = {}
    exec(compile(source, str(README), "exec"), names)
    assert "1 of 3 linear layers are 2:4 sparse" in capsys.readouterr().out
    assert names["loss"].item() < 0.2  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_parses(words: list[str]) -> None:
    """Typer resolves the command and takes its words and options, without running it."""
    command = typer.main.get_command(app)
    arguments = words[1:]
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    command.make_context(words[1], list(arguments))


def test_every_key_named_is_one_of_today() -> None:
    sections = "|".join({key.partition(".")[0] for key in configs.defaults() if "." in key})
    quoted = re.findall(rf"`((?:{sections})\.[a-z_]+)\b(?!\(|\.py|\.sbatch)", README.read_text())
    words = [word.partition("=")[0] for command in commands() for word in command if re.match(rf"({sections})\.", word)]
    known = {*configs.defaults(), "sparsity.pattern_overrides", "model.overrides"}
    assert len({*quoted, *words}) > 10
    assert {".".join(key.split(".")[:2]) for key in (*quoted, *words)} - known == set()


def test_figures_are_those_of_the_result_files() -> None:
    assert render.render(README.read_text()) == README.read_text(), "run `make render`"


def test_makefile_has_the_targets_named() -> None:
    makefile = (README.parent / "Makefile").read_text()
    named = set(re.findall(r"make ([a-z-]+)", README.read_text() + (README.parent / "CONTRIBUTING.md").read_text()))
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE)) | {"TORCH"}
