"""The shell and Python blocks of README.md and docs/: each page is run from top to bottom, in a folder of its own.

A run of a page's recipe is made tiny by more words; everything else runs as it is printed.
"""

import ast
import contextlib
import importlib.util
import io
import json
import random
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from slope_cli.benchmarks import render
from slope_cli.config import configs
from slope_cli.data.tokenizer import load_tokenizer
from support.data import SENTENCES, prepared, texts
from support.runs import OVERRIDES, slope, trained
from support.servers import Server, serving

ROOT = render.ROOT
PAGES = [path for path in render.DOCUMENTS if path.name != "config.md"]
"""All but the one that is generated."""
SHELL = "bash"

NOT_RUN = {
    r"make ": "CI runs make's targets, on a clean checkout",
    r"(pip|python3 -m venv|source|conda|docker|apptainer) ": "installs from a network",
    r"(sbatch|srun|export) ": "needs a cluster; `make test-slurm` runs the scripts on one",
    r"slope data prepare \S*=/": "names folders of a cluster",
    r"slope .*(openwebtext|--tasks (?!own/|recall|mqar|.*--task-data))": "needs the Hugging Face Hub",
    r"slope .*log\.wandb=true": "needs an account at wandb",
    r"slope export .*--push": "needs an account at the Hugging Face Hub; tests of pushing have one on this machine",
    r"slope bench( generate| step|$)": "needs a GPU",
    r"(lm-eval|python -m slope_cli\.evaluate\.harness) ": "needs the Hugging Face Hub",
    r"python -m slope_cli\.benchmarks\.corpus ": "downloads packages from Debian's mirrors",
    r"python -m slope_cli\.benchmarks\.(recall|quality) ": "needs a GPU; a test of its own runs it on a tiny scale",
    r"slope --(install|show)-completion": "changes start-up files; a test of the command line does it in another home",
}
"""Commands that no test runs, as regular expressions for their beginnings, and why; their words are checked."""

OPTIONAL = {"lightning": "Lightning is in none of the extras"}
"""Modules whose Python blocks are run where they are installed and compiled elsewhere, and why they may be missing."""

SCRIPTS = {"pretrain": ["pretrain"], "linearize": ["linearize"], "compare": ["compare"], "prepare": ["data", "prepare"]}
"""What a script of recipes/slurm gives its words to."""

DIVISOR = 5000
"""A step in a document is so many times one of its run here."""
TINY = (
    *("train.micro_batch=2", "train.seq_len=32", "train.tokens_per_step=64", "train.precision=fp32"),
    *(
        "optim.warmup=1",
        "log.val_tokens=128",
        "log.val_every=0",
        "log.sample_tokens=4",
        "log.save_every=1",
        "log.keep=9",
    ),
)


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    text: str


def blocks(document: Path) -> list[Block]:
    """All blocks of a document, in order."""
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.DOTALL | re.M)]


def commands(*parts: Block) -> list[str]:
    """The commands of shell blocks, without comments."""
    lines = "".join(block.text for block in parts if block.language == SHELL).replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def why_not_run(command: str) -> str:
    """Why no test runs a command; empty if one does."""
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, command)), "")


def imported(block: Block) -> set[str]:
    """The packages that a Python block imports, without their submodules; SyntaxError if it is not Python."""
    names = []
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return {name.partition(".")[0] for name in names}


def why_not_executed(block: Block) -> str:
    """Why this machine cannot run a Python block; empty if it can."""
    absent = [name for name in sorted(imported(block) & OPTIONAL.keys()) if not importlib.util.find_spec(name)]
    return OPTIONAL[absent[0]] if absent else ""


def slope_words(command: str) -> list[str]:
    """The words of `slope` in a command, also in one that srun or a script of recipes/slurm starts; [] without any."""
    words = shlex.split(command)
    starts = words[0] in ("slope", "srun", "sbatch")
    for place, word in enumerate(words if starts else []):
        if word.endswith(".sbatch"):
            return [*SCRIPTS[Path(word).stem], *words[place + 1 :]]
        if word == "slope":
            return words[place + 1 :]
    return []


def run(document: Path, folder: Path) -> None:
    """Run the blocks of a document in an empty folder, after what they take for granted was put there."""
    furnish(document, folder)
    names: dict[str, object] = {}
    with contextlib.chdir(folder), ExitStack() as stack:
        servers: dict[str, Server] = {}
        for block in blocks(document):
            if block.language == "python":
                code = compile(_at(servers, block.text), f"{document.name}, a Python block", "exec")
                with warnings.catch_warnings():
                    if imported(block) & OPTIONAL.keys():  # of no version that the tests know
                        warnings.simplefilter("ignore")
                    if not why_not_executed(block):
                        exec(code, names)
            for command in commands(block):
                if not why_not_run(command):
                    _run_command(command, folder, stack, servers)


def _run_command(command: str, folder: Path, stack: ExitStack, servers: dict[str, Server]) -> None:
    program, *words = shlex.split(command)
    if program == "slope" and words[0] == "serve":
        options, port = tiny(words)[2:], "8000"
        if "--port" in options:  # it may be taken here
            place = options.index("--port")
            port = options[place + 1]
            del options[place : place + 2]
        assert port not in servers, f"{command}\nanother server of the page has this port"
        server = stack.enter_context(serving(folder / f"server-{port}", *options, model=Path(words[1]).resolve()))
        assert server.ask("/health")[0] == 200
        servers[port] = server
    elif program == "slope":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Once\n")))
            result = slope(*tiny(words))
        assert result.code == 0, f"{command}\n{result.err}"
    else:
        done = subprocess.run(_at(servers, command), shell=True, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if program == "curl":
            *parts, end = done.stdout.removeprefix("data: ").strip().split("\n\ndata: ")
            assert (end == "[DONE]") is bool(parts), done.stdout  # a stream, or one object
            assert not any("error" in json.loads(part) for part in parts or [end]), done.stdout


def _at(servers: dict[str, Server], text: str) -> str:
    """A text in which the addresses of the page are those of its servers here, by the ports of the page."""
    for port, server in servers.items():
        text = text.replace(f"http://127.0.0.1:{port}/", f"{server.address}/")
    return text


def tiny(words: list[str]) -> list[str]:
    """The words of `slope` with those that make a run tiny."""
    words = [re.sub(r"(?<=train\.steps=)\d+|(?<=@)\d+", _fewer, word) for word in words]
    words = [re.sub(r"(?<=linearize\.cache=)\d+", "8", word) for word in words]  # sequences are short here
    for option in ("--seq-len", "--max-length"):
        if option in words:
            words[words.index(option) + 1] = "64"
    command, *rest = words
    if command == "finetune":
        return [*words, "--epochs", "1", "--seq-len", "64"]
    shown = command == "pretrain" and "--dry-run" in words
    existing = "--runs" in words or "--from" in words  # of tiny runs
    if command not in ("pretrain", "linearize", "compare") or shown or existing:
        return words
    more = [] if any(word.startswith("train.steps=") for word in words) else ["train.steps=4"]
    if command == "linearize":
        return [*words, *more, "linearize.window=8", "log.val_tokens=128", "log.sample_tokens=4"]
    recipe = rest[0] if rest and not rest[0].startswith("-") and "=" not in rest[0] else "gpt2-nano"
    family = re.match(r"[a-z]+", configs.load(recipe).model.name)
    assert family
    sizes = next(sizes for name, sizes in OVERRIDES.items() if name.startswith(family[0]))
    return [*words, *more, *TINY, *(f"model.overrides.{size}" for size in sizes)]


def _fewer(steps: re.Match[str]) -> str:
    return str(max(1, int(steps[0]) // DIVISOR))


# ------------------------------------------------------------------------------- what a page takes for granted


def furnish(document: Path, folder: Path) -> None:
    """Make everything in FURNITURE that a page names, but for what one of its own commands makes."""
    run_here = [command for command in commands(*blocks(document)) if not why_not_run(command)]
    made = {output for command in run_here if (output := _output(slope_words(command)))}
    text = "\n".join(block.text for block in blocks(document) if block.language)
    for name, make in FURNITURE.items():
        if name not in made and re.search(rf"(?<![\w/.-]){re.escape(name)}(?![\w-])", text):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            make(folder / name)


def _output(words: list[str]) -> str:
    """The folder that a command writes; empty if it writes none."""
    if "--out" in words:
        return words[words.index("--out") + 1].rstrip("/")
    if words[:1] == ["export"]:
        return next(word for word in reversed(words) if word.endswith("/")).rstrip("/")
    if words[:1] == ["linearize"] and "--dry-run" not in words:
        return f"runs/{Path(words[1]).name}-linear"
    if words[:1] == ["pretrain"] and "--dry-run" not in words:
        return f"runs/{words[1] if len(words) > 1 and '=' not in words[1] else 'gpt2-nano'}"
    return ""


def _copy(run: Callable[[], Path]) -> Callable[[Path], None]:
    def copy(path: Path) -> None:
        shutil.copytree(run(), path)

    return copy


def _corpus(path: Path) -> None:
    path.mkdir()
    shutil.copy(texts(), path / "text.jsonl")


def _table(path: Path) -> None:
    path.write_text("number,body\n" + "".join(f"{n},Caf\u00e9 number {n}.\n" for n in range(40)), encoding="latin-1")


def _exported(*options: str) -> Callable[[Path], None]:
    def export(path: Path) -> None:
        result = slope("export", *options, trained(), path)
        assert result.code == 0, result.err

    return export


def _linearized(path: Path) -> None:
    result = slope(*tiny(["linearize", str(trained()), "--out", str(path)]))
    assert result.code == 0, result.err


def _chatting(path: Path) -> None:
    rows = path.with_name(f"rows-of-{path.name}")
    _conversations(rows)
    result = slope(*tiny(["finetune", str(trained()), "SFT", "--data", str(rows), "--out", str(path)]))
    assert result.code == 0, result.err


def _sentences(path: Path) -> None:
    path.write_text("\n".join(SENTENCES * 8) + "\n")


def _conversations(path: Path) -> None:
    """Rows of both kinds, whose answers are within the 64 tokens of `tiny`."""
    questions = [(f"{n}+1?", f"{n + 1}") for n in range(8)]
    rows: list[dict[str, object]] = [{"prompt": asked, "completion": answer} for asked, answer in questions]
    for pair in questions:
        messages = zip(("user", "assistant"), pair, strict=True)
        rows.append({"messages": [{"role": role, "content": content} for role, content in messages]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _squad(path: Path) -> None:
    answer = {"text": "cold", "answer_start": SENTENCES[1].index("cold")}
    asked = [{"id": str(n), "question": "how was the wind?", "answers": [answer]} for n in range(4)]
    article = {"title": "weather", "paragraphs": [{"context": SENTENCES[1], "qas": asked}]}
    path.mkdir()
    for split in ("train", "dev"):
        (path / f"{split}-v1.1.json").write_text(json.dumps({"version": "1.1", "data": [article]}))


def _glue(path: Path) -> None:
    rng, rows = random.Random(1), []
    for _ in range(16):
        sentence = rng.choice(SENTENCES).replace('"', "")
        rows.append(f"{sentence}\t{rng.randrange(2)}\n")
    path.mkdir()
    for split in ("train", "dev"):
        (path / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(rows))


def _piqa_rows(path: Path) -> None:
    (path / "piqa").mkdir(parents=True)
    rows = [{"goal": f"to see {n}", "sol1": "look", "sol2": "do not look", "label": n % 2} for n in range(4)]
    (path / "piqa" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _own_task(language: str) -> Callable[[Path], None]:
    """The file of a task of one's own, as the page on evaluation prints it."""

    def write(path: Path) -> None:
        (text,) = [block.text for block in blocks(ROOT / "docs" / "evaluation.md") if block.language == language]
        path.write_text(text)

    return write


def _prompts(path: Path) -> None:
    path.write_text("The weights\nShe said\n")


def _tokenizer(path: Path) -> None:
    """A folder in the place of the Hub's tokenizer of this name."""
    load_tokenizer("bytes").save_pretrained(path)


FURNITURE: dict[str, Callable[[Path], None]] = {
    "corpus": _corpus,
    "more": _corpus,
    "heldout": _corpus,
    "debian/train": _corpus,
    "debian/val": _corpus,
    "table.csv": _table,
    "gpt2": _tokenizer,
    "data/corpus": _copy(prepared),
    "runs/small": _copy(trained),
    "runs/other": _copy(trained),
    "runs/gpt2-nano": _copy(trained),
    "runs/bert": _copy(lambda: trained("bert-base")),
    "runs/small-linear": _linearized,
    "runs/small-chat": _chatting,
    "exported": _exported(),
    "pruned": _exported(),
    "packed": _exported("--format", "packed"),
    "glue": _glue,
    "squad": _squad,
    "chats.jsonl": _conversations,
    "others.jsonl": _conversations,
    "text.txt": _sentences,
    "rows": _piqa_rows,
    "prompts.txt": _prompts,
    "own/capitals.yaml": _own_task("yaml"),
    "own/capitals.jsonl": _own_task("json"),
}
"""What pages have from other pages, or from their reader."""
