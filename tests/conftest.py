"""Fixtures of all tests."""

from pathlib import Path

import pytest
import torch
from support.data import prepared
from support.runs import tiny

from slope_cli.train.loop import pretrain


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
