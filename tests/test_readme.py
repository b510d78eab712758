"""The examples in README and docs/ work, their keys and links exist, their figures are those of the result files."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from slope_cli.benchmarks import render
from slope_cli.cli import app
from slope_cli.config import configs

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
WRITTEN = [path for path in render.DOCUMENTS if path.name != "config.md"]  # a test of its own keeps config.md fresh


def blocks(language: str, *documents: Path) -> list[str]:
    text = "\n".join(document.read_text() for document in documents)
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash", *WRITTEN)).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("slope ")]


def test_the_library_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = blocks("python", README)
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
    text = "\n".join(document.read_text() for document in (*WRITTEN, ROOT / "DESIGN.md"))
    quoted = re.findall(rf"`((?:{sections})\.(?!py\b)[a-z_]+)\b(?!\(|\.py|\.sbatch)", text)
    words = [word.partition("=")[0] for command in commands() for word in command if re.match(rf"({sections})\.", word)]
    known = {*configs.defaults(), "sparsity.pattern_overrides", "model.overrides"}
    assert len({*quoted, *words}) > 10
    assert {".".join(key.split(".")[:2]) for key in (*quoted, *words)} - known == set()


@pytest.mark.parametrize("document", render.DOCUMENTS, ids=lambda path: path.name)
def test_figures_are_those_of_the_result_files(document: Path) -> None:
    assert render.render(document.read_text()) == document.read_text(), "run `make render`"


@pytest.mark.parametrize("document", [*render.DOCUMENTS, ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md"], ids=str)
def test_links_to_files_resolve(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_makefile_has_the_targets_named() -> None:
    makefile = (README.parent / "Makefile").read_text()
    named = set(re.findall(r"make ([a-z-]+)", README.read_text() + (README.parent / "CONTRIBUTING.md").read_text()))
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE)) | {"TORCH"}
