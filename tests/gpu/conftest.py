"""Everything in this folder needs a CUDA GPU of compute capability 8.0 or newer, CuPy, and torch's own CUDA build."""

from pathlib import Path

import pytest
import torch

from sparse_kernels import cuda, kernel_choice

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = cuda.missing(0) if torch.cuda.is_available() else "no CUDA GPU"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """These matrices are large: here the processor's part takes all threads."""


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No warnings given yet, and a cache folder that all GPU tests of this run share."""
    monkeypatch.setenv("SLOPE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
    kernel_choice.warn_once.cache_clear()
