"""What the tests of training share: a small text, tiny runs, and runs in processes of their own that can be killed.

`python -m tests.helpers`, from the root of the repository, writes tests/golden/nano.json anew.
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from slope_cli.checkpoint import store
from slope_cli.config import load as configs
from slope_cli.config.schema import Config
from slope_cli.data.prepare import prepare
from slope_cli.errors import SlopeError
from slope_cli.report import metrics
from slope_cli.train import loop

GOLDEN = Path(__file__).parent / "golden" / "nano.json"
_TEXT = "the a cat dog saw took small green house river and then but never morning light with under walked slowly"
WORDS = _TEXT.split()

# A server that has imported everything but computed nothing: what it forks starts in a moment, and with no threads.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        "slope_cli.train.loop",
        "sparse_kernels",
        "transformers.models.gpt2.modeling_gpt2",
        "torch.distributed.checkpoint",
        "torch._dynamo",
        "matplotlib.pyplot",
        "rich.console",
    ]
)


def write_text(path: Path, seed: int = 0) -> Path:
    """About 12 KB of sentences in 60 documents."""
    rng = random.Random(seed)
    texts = (" ".join(rng.choices(WORDS, k=40)) + "." for _ in range(60))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_data(folder: Path, seed: int = 0) -> Path:
    """The text as bytes, with a tenth of it for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    text = write_text(folder / "text.jsonl", seed)
    prepare([f"text={text}"], folder / "data", val_fraction=0.1, workers=1, progress=False)
    return folder / "data"


def write_bert_data(folder: Path) -> Path:
    """The text in a WordPiece vocabulary of its own words."""
    (folder / "wordpiece").mkdir(parents=True)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
    (folder / "wordpiece" / "vocab.txt").write_text("\n".join(vocab) + "\n")
    text, tokenizer = write_text(folder / "text.jsonl"), str(folder / "wordpiece")
    prepare([f"text={text}"], folder / "data", tokenizer=tokenizer, val_fraction=0.1, workers=1, progress=False)
    return folder / "data"


def tiny(data: Path | str, *words: str) -> Config:
    """tests/tiny.yaml with a two-layer GPT-2."""
    return _tiny("gpt2-nano", "n_layer=2 n_embd=32 n_head=2", data, words)


def tiny_bert(data: Path | str, *words: str) -> Config:
    """tests/tiny.yaml with a one-layer BERT, and so with the masked objective."""
    sizes = "num_hidden_layers=1 hidden_size=32 num_attention_heads=2 intermediate_size=64 vocab_size=32"
    return _tiny("bert-base", sizes, data, words)


def _tiny(name: str, sizes: str, data: Path | str, words: Sequence[str]) -> Config:
    model = [f"model.name={name}", *(f"model.overrides.{size}" for size in sizes.split())]
    return configs.load(str(Path(__file__).parent / "tiny.yaml"), [f"data.path={data}", *model, *words])


def records(run: Path) -> list[dict[str, Any]]:
    """The run's log without what depends on the clock."""
    return [{k: v for k, v in record.items() if k != "tokens_per_s"} for record in metrics.read(run)]


def final_state(config: Config, run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, weights and optimizer, through the program's own loading."""
    trainer = loop.Trainer(config, run, torch.device("cpu"))
    trainer.batches.close()
    return {name: t.detach().clone() for name, t in store.state_tensors(trainer.model, trainer.optimizer).items()}


def assert_same_run(config: Config, run: Path, reference: Path) -> None:
    """Log, weights and optimizer state of two runs are equal bit for bit."""
    assert records(run) == records(reference)
    ours, theirs = final_state(config, run), final_state(config, reference)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optim.") for name in ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# ------------------------------------------------------------------------------------- processes of their own


def start(config: Config, run: Path, prepare_child: Callable[..., None] | None = None, *args: Any) -> BaseProcess:
    """Train in a new process, after `prepare_child(*args)` in it; what it prints is appended to RUN.log."""
    child = _processes.Process(target=_child, args=(config, run, prepare_child, args))
    child.start()
    return child


def finish(child: BaseProcess) -> int:
    """Wait for the end of a process; its exit code, minus the signal's number if one killed it."""
    child.join(60)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def printed(run: Path) -> str:
    """What the processes of a run printed."""
    return run.with_suffix(".log").read_text()


def _child(config: Config, run: Path, prepare_child: Callable[..., None] | None, args: tuple[Any, ...]) -> None:
    log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if prepare_child is not None:
        prepare_child(*args)
    try:
        loop.pretrain(config, run)
    except SlopeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(error.exit_code)
    os._exit(0)


def die_in_save(step: int, operation: int) -> None:
    """Let this process kill itself before the n-th (from 1) operation on the disk while it saves the step."""
    save = store.save

    def armed(run: Path, at: int, *args: Any, **kwargs: Any) -> Path:
        if at == step:
            _die_at(operation)
        return save(run, at, *args, **kwargs)

    store.save = armed


def die_in_save_base(operation: int) -> None:
    """Let this process kill itself before the n-th operation on the disk while it writes a run's base, or end after."""
    save_base = store.save_base

    def armed(*args: Any) -> None:
        _die_at(operation)
        save_base(*args)
        os._exit(0)

    store.save_base = armed


def _die_at(operation: int) -> None:
    done = 0

    def dying(operate: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return operate(*args, **kwargs)

        return wrapped

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (os, "rmdir")):
        setattr(module, name, dying(getattr(module, name)))


# ------------------------------------------------------------------------------------------------- golden losses


def golden_losses(folder: Path) -> list[float]:
    """The losses of 20 steps of the tiny run, with mask updates and adapters.

    Without dropout, which not every CPU draws alike.
    """
    config = tiny(write_data(folder), "train.steps=20", "model.dropout=0", "log.save_every=0")
    loop.pretrain(config, folder / "run")
    return [record["loss"] for record in metrics.read(folder / "run") if record["kind"] == "train"]


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Within it no file can grow beyond `size` bytes: what a full disk is like, without one.

    Keep it around as little as can be: pytest's own report may go to a file, too.
    """
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        GOLDEN.write_text(json.dumps(golden_losses(Path(temporary)), indent=1) + "\n")
