"""Muon's work among several processes: who has what, the updates of one process, and what is sent."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.marks import slow
from support.ranks import together
from support.runs import tiny
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from slope_cli.config.schema import Config
from slope_cli.distributed.collectives import Group
from slope_cli.distributed.layouts import Cluster, Layout, traffic_of
from slope_cli.distributed.sharding import Sharding
from slope_cli.methods import muon, optim, phases_of
from slope_cli.methods.accounting import sizes_of
from slope_cli.methods.apply import apply
from slope_cli.methods.muon_ranks import rounds
from slope_cli.models.build import build_model, run_model_config
from sparse_kernels.sharded import local_rows, whole

CPU = torch.device("cpu")
METHODS = {
    "slope": ["adapters.start=0"],
    "sr_ste": ["method=sr_ste"],
    "dense": ["method=dense"],
    "row masks of one in four": ["sparsity.n=1", "adapters.rank=0"],
}


# ------------------------------------------------------------------------------------------------------- who has what


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3])), min_size=1, max_size=20),
    st.integers(1, 9),
)
def test_every_weight_is_one_processs_and_none_has_much_more_than_another(
    sides: list[tuple[int, int, int]], ranks: int
) -> None:
    matrices = {}
    for out, inner, parts in sides:
        layer = nn.Linear(inner, parts * out, bias=False)
        matrices[layer.weight] = muon.Matrix(layer, parts)
    found = list(rounds(matrices, ranks))
    assert [[id(p) for share in each for p in share] for each in found] == [
        [id(p) for share in each for p in share] for each in rounds(matrices, ranks)
    ]
    assert all(len(each) == ranks for each in found)
    assert sorted(id(p) for each in found for share in each for p in share) == sorted(map(id, matrices))
    for share in (share for each in found for share in each if share):
        assert len({tuple(sorted(matrices[p].shape)) for p in share}) == 1
    loads = [sum(matrices[p].cost for each in found for p in each[rank]) for rank in range(ranks)]
    assert max(loads) - min(loads) <= max(matrix.cost for matrix in matrices.values())


@pytest.mark.parametrize("method", METHODS)
def test_the_cost_of_an_update_is_what_torch_counts(method: str) -> None:
    model, optimizer = _made(tiny("unused", "optim.name=muon", *METHODS[method]))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counted:
        optimizer.step()
    assert counted.get_total_flops() == 2 * sum(matrix.cost for matrix in muon.hidden_matrices(model).values())


# ---------------------------------------------------------------------------------------------------- several processes


class Sent(TorchDispatchMode):
    """Counts the bytes that one of some processes sends, by rings, in what is done within."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.bytes = ranks, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        share = (self.ranks - 1) / self.ranks
        if "alltoall" in (name := func.name()):
            self.bytes += share * args[1].nbytes
        elif name.startswith("c10d"):
            assert "broadcast" in name
            self.bytes += share * sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


def _made(config: Config, group: Group | None = None, layout: Layout | None = None) -> Any:
    """A model in the last phase of a run, and its optimizer."""
    model = build_model(run_model_config(config))
    apply(model, config, phases_of(config).end)
    if group is not None and layout is not None and layout.gather:
        Sharding(layout, group.ranks.world, CPU, None).split(model)
    return model, optim.build_optimizer(model, config, phases_of(config), group)


def _gradient(parameter: nn.Parameter, like: nn.Parameter) -> Tensor:
    """The rows of a gradient that a parameter has; like: a whole one, with its gradient."""
    assert like.grad is not None
    own = like.grad[local_rows(parameter)].clone()
    if not isinstance(parameter, DTensor):
        return own
    how: Any = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(own, parameter.device_mesh, parameter.placements, **how)


def _updates_as_one(group: Group, family: str, layout: Layout) -> list[tuple[int, int]]:
    """Take steps alone and together; returns, by method, the operations of both."""
    counts = []
    for more in METHODS.values():
        config = tiny("unused", "optim.name=muon", *more, model=family)
        (model, optimizer), (own, shared) = _made(config), _made(config, group, layout)
        named = list(zip(model.named_parameters(), own.parameters(), strict=True))
        for seed in range(3):
            torch.manual_seed(seed)
            for (_, alone), p in named:
                alone.grad = torch.randn_like(alone)
                p.grad = _gradient(p, alone)
            with FlopCounterMode(display=False) as of_one:
                optimizer.step()
            with (
                FlopCounterMode(display=False) as of_each,
                Sent(layout.shard if layout.gather else group.ranks.world) as sent,
            ):
                shared.step()
        for (name, alone), p in named:
            assert torch.allclose(whole(p), alone, rtol=1e-5, atol=1e-7), name
        counts.append((of_one.get_total_flops(), of_each.get_total_flops()))
        every = group.gather(sent.bytes)
        sizes, cluster = sizes_of(model, config), Cluster(group.ranks.world, group.ranks.world)
        by_adamw = sizes_of(model, tiny("unused", *more, model=family))
        said = traffic_of(sizes, layout, cluster).step - traffic_of(by_adamw, layout, cluster).step
        assert sum(every) / len(every) == pytest.approx(2 * said)  # in float32 here
    return counts


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, Layout("ddp")),
        slow(2, Layout("fsdp", 2, "block")),
        (4, Layout("hsdp", 2, "step")),
        slow(4, Layout("ddp")),
        slow(4, Layout("fsdp", 4, "block")),
        slow(3, Layout("fsdp", 3, "block")),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("family", ["gpt2-nano", slow("llama3-8b")])
def test_several_processes_divide_the_work_and_update_as_one(world: int, layout: Layout, family: str) -> None:
    sharers = layout.shard if layout.gather else world
    for counts in zip(*together(world, _updates_as_one, family, layout), strict=True):
        alone = counts[0][0]
        each = [own for _, own in counts]
        assert sum(each) == alone * world // sharers
        assert max(each) <= 4 / 3 * alone / sharers  # four processes share eight matrices
