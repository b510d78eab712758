"""Checkpoints in the background, copied from a GPU into pinned memory."""

from pathlib import Path
from typing import Any

import torch

from slope_cli.checkpoint import background, store
from slope_cli.distributed.collectives import Group

METADATA: dict[str, Any] = {"data": "", "config": {}, "tokenizer": {}}


def test_a_copy_is_of_its_moment_and_written_while_graphs_are_captured(tmp_path: Path) -> None:
    """With the bytes that a save which is waited for writes; the memory is pinned, and used again."""
    live = {f"model.{n}": torch.randn(1024, 1000 + n, device="cuda") for n in range(20)}
    live["model.t"] = live["model.0"].t()
    saver, addresses = background.Saver(tmp_path / "run", Group()), list[int]()
    for step in (1, 2):
        reference = store.save(tmp_path / "waited", step, live, METADATA, keep=2)
        assert saver.save(step, store.planned(tmp_path, live), METADATA, wait=False, keep=2) is None
        x, captured = torch.ones(64, device="cuda"), 0
        while (done := saver.finished(wait=False)) is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                x += 1
            graph.replay()
            for tensor in live.values():
                tensor.add_(1)
            captured += 1
        assert captured
        assert (done[1] / "__0_0.distcp").read_bytes() == (reference / "__0_0.distcp").read_bytes()
        assert all(tensor.is_pinned() for tensor in saver._memory.values())
        addresses.append(saver._memory["model.3"].data_ptr())
    assert addresses[0] == addresses[1]
