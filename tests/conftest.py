"""Fixtures of all tests."""

import gc
from pathlib import Path

import pytest
import torch
from support.data import prepared
from support.runs import tiny

from slope_cli.train.loop import pretrain

LONGEST = (
    *("ranks", "linearize_run", "resume", "evaluate", "compare", "sharded_checkpoint", "docs", "kills", "runs"),
    *("layer_ranges", "trainer", "train", "bench_linearize", "bench_generate", "bench", "sources", "engine"),
    *("prepare", "plots", "phases"),
    *("config", "keep_softmax", "equal_time", "packed_folder", "cli", "install", "sft", "wandb", "serve"),
)
"""The files that take longest, with their slow tests."""


def pytest_configure(config: pytest.Config) -> None:
    """Keep xdist from an order of its own, in which the files of most tests are first."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no process works on when the others have ended."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Leave out of every later search for garbage what the imports made, which is most of all objects and stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """For small matrices one thread is the fastest; and runs in two processes are compared bit for bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data() -> Path:
    """The tests' text as bytes."""
    return prepared()


@pytest.fixture(scope="session")
def bert_data() -> Path:
    """The tests' text as WordPiece."""
    return prepared("wordpiece")


@pytest.fixture(scope="session")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of `tiny(data)`: copy it before changing it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    pretrain(tiny(data), run)
    return run
