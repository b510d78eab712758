"""README and docs/: their commands and Python run, their keys, links and messages exist, their figures are measured."""

import ast
import re
from pathlib import Path

import pytest
import typer
from support import docs
from support.docs import PAGES, ROOT, blocks, commands, slope_words, why_not_run

from slope_cli.benchmarks import render
from slope_cli.cli import app
from slope_cli.config import configs
from slope_cli.errors import UsageError

README = ROOT / "README.md"
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(*blocks(page))))
QUICK = ("README.md", "data.md", "library.md")
"""The pages that the fast tests run."""


def marked(page: Path) -> object:
    return pytest.param(page, id=page.name, marks=[] if page.name in QUICK else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # of a Trainer without GPU
@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
def test_a_page_works_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    docs.run(page, tmp_path)


@pytest.mark.parametrize("module", docs.OPTIONAL)
def test_python_of_what_no_extra_installs(module: str) -> None:
    """It is Python everywhere, and a page's test runs it where its module is installed; here this says why not."""
    found = [block for page in PAGES for block in blocks(page) if block.language == "python"]
    using = [block for block in found if module in docs.imported(block)]
    assert using
    if why := next(filter(None, map(docs.why_not_executed, using)), ""):
        pytest.skip(why)


def test_the_library_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    source = next(block.text for block in blocks(ROOT / "docs" / "library.md") if block.language == "python")
    assert len(source.splitlines()) <= 25
    names: dict[str, object] = {}
    exec(compile(source, "library.md", "exec"), names)
    assert "1 of 3 linear layers are 2:4 sparse" in capsys.readouterr().out
    assert names["loss"].item() < 0.2  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command: str) -> None:
    """Typer resolves the command and takes its words and options; the keys have possible values."""
    words = slope_words(command)
    if not words:
        assert why_not_run(command) or command.startswith("curl "), f"{command}: say in NOT_RUN why it is not run"
        return
    found = typer.main.get_command(app)
    while hasattr(found, "commands") and words[0] in found.commands:
        found = found.commands[words.pop(0)]
    if not hasattr(found, "commands"):
        given = found.make_context("slope", list(words)).params
        named = [given.get("recipe"), *(given.get("overrides") or given.get("arguments") or [])]
        recipe = next((name for name in named if name in configs.recipe_names()), "gpt2-small")
        configs.load(recipe, [word for word in named if word and "=" in word])


def test_no_reason_is_left_over() -> None:
    assert [why for pattern, why in docs.NOT_RUN.items() if not any(re.match(pattern, each) for each in COMMANDS)] == []
    with pytest.raises(UsageError):
        configs.load("gpt2-small", ["optim.lrr=1"])


def test_commands_and_python_are_in_blocks_that_are_run() -> None:
    other = [block.text for page in PAGES for block in blocks(page) if block.language not in ("bash", "python")]
    assert [text for text in other if re.match(r"(\$ )?(slope|pip|make|curl|python|from|import) ", text)] == []


def test_every_key_named_is_one_of_today() -> None:
    sections = "|".join({key.partition(".")[0] for key in configs.defaults() if "." in key})
    text = "\n".join(document.read_text() for document in (*PAGES, ROOT / "DESIGN.md"))
    quoted = re.findall(rf"`((?:{sections})\.(?!py\b)[a-z_]+)\b(?!\(|\.py|\.sbatch)", text)
    words = [
        word.partition("=")[0] for each in COMMANDS for word in each.split() if re.match(rf"({sections})\.\S+=", word)
    ]
    known = {*configs.defaults(), "sparsity.pattern_overrides", "model.overrides"}
    assert len({*quoted, *words}) > 10
    assert {".".join(key.split(".")[:2]) for key in (*quoted, *words)} - known == set()


def templates() -> str:
    """Every text in the source, one a line, with what is filled in as a blank."""
    lines = []
    for path in (*ROOT.glob("slope_cli/**/*.py"), *ROOT.glob("sparse_kernels/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                lines.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


def test_no_text_installs_from_an_index_that_does_not_have_the_program() -> None:
    texts = [templates(), *(page.read_text() for page in (*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"))]
    bare = r"pip3? install [^\n`]*slope-cli(?![^\n`]* @ |[^\n`]*\.whl)"
    assert [found for text in texts for found in re.findall(bare, text)] == []
    assert re.search(bare, "pip install slope-cli[serve]")


def test_messages_quoted_are_those_of_the_program() -> None:
    """In the first column of tables of errors; … stands for what is filled in."""
    known, messages = templates(), []
    for page in (ROOT / "docs" / "troubleshooting.md", ROOT / "docs" / "cluster.md"):
        tables = page.read_text().split("| what you see | what to do |")[1:]
        rows = [line for table in tables for line in table.partition("\n\n")[0].splitlines() if line.startswith("| `")]
        messages += [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(messages) > 20
    parts = [part.strip() for message in messages for part in re.split(r"…|[A-Z]+:[A-Z]+", message)]
    assert [part for part in parts if part and part not in known] == []


@pytest.mark.parametrize("document", render.DOCUMENTS, ids=lambda path: path.name)
def test_figures_are_those_of_the_result_files(document: Path) -> None:
    assert render.render(document.read_text()) == document.read_text(), "run `make render`"


@pytest.mark.parametrize("document", [*render.DOCUMENTS, ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md"], ids=str)
def test_links_resolve(document: Path) -> None:
    """To files, and to sections of pages by GitHub's rule for their names."""
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", document.read_text()):
        path, _, section = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if section:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert section in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], link


def test_readme_is_one_page_that_links_to_every_other() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 100
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", text))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_makefile_has_the_targets_named() -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join(path.read_text() for path in (*PAGES, ROOT / "CONTRIBUTING.md"))
    named = set(re.findall(r"[`^]make ([a-z-]+)", text))
    assert {"test", "demo"} <= named <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
