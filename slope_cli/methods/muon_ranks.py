"""Muon's work, divided among processes: each orthogonalizes some of the matrices, and sends the updates to the others.

Where the weights are split by rows (FSDP2), a process collects the rows of its matrices' momenta, and returns to every
other one its rows of the updates; with hsdp within each group that has all rows. Where each process has all of them
(DDP), it hands its updates to all. Of E entries, as they are stored, one of n GPUs sends in 16 bits

    split    2 · 2E/n · (n-1)/n bytes
    whole        2E   · (n-1)/n bytes

A matrix of R rows takes some 20 R operations for each of its entries, a sparse one twice as many. For R = 768 that is
40 ps at 400 TFLOP/s, and to send its two bytes through NVLink, at 360 GB/s, takes 6 ps; with larger matrices only the
former grows. On two processes of a CPU, at 50 GFLOP/s and 1 GB/s, it is 0.3 µs and 2 ns. So DDP divides as well. Over
several nodes the updates cross the network once, a quarter of what the sum of the gradients does, which pays from
50 GB/s a node on if R = 768, and from 5 GB/s if R = 8192. A step with collectives in it is no part of a CUDA graph.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from slope_cli.distributed.collectives import Group, exchange, hand_out, place_in
from slope_cli.methods.muon import Matrix, batches, updates
from sparse_kernels.sharded import rows_of

Weights = list[nn.Parameter]
Updates = Iterator[tuple[nn.Parameter, Tensor]]


def divided_updates(
    matrices: Mapping[nn.Parameter, Matrix], momenta: Callable[[Weights], list[Tensor]], group: Group
) -> Updates:
    """The updates of weights, before the learning rate: of the rows that this process has.

    Args:
        matrices: the weights, all of them split by rows or none; in the same order on all ranks.
        momenta: gives those of some weights, of the rows that this process has.
        group: the processes that take the step together.
    """
    first = next(iter(matrices))
    dtype = torch.bfloat16 if first.is_cuda else first.dtype  # fast there, and half as much to send
    like = torch.empty(0, dtype=dtype, device=first.device)
    among = first.device_mesh.get_group("shard") if isinstance(first, DTensor) else None
    rank, ranks = (group.ranks.rank, group.ranks.world) if among is None else place_in(among)
    for shares in rounds(matrices, ranks):
        own = shares[rank]
        if among is None:
            whole = [momentum.to(dtype) for momentum in momenta(own)]
        else:
            rows = [[part.to(dtype) for part in momenta(share)] for share in shares]
            whole = _collected(shares, rank, rows, like, among)
        found = updates([matrices[p] for p in own], whole) if own else []
        if among is not None:
            yield from _returned(shares, rank, found, like, among)
        elif ranks == 1:
            yield from zip(own, found, strict=True)
        else:
            for owner, share in enumerate(shares):
                if share:
                    every = hand_out(found if owner == rank else [], [p.shape for p in share], like, owner)
                    yield from zip(share, every, strict=True)


def rounds(matrices: Mapping[nn.Parameter, Matrix], ranks: int) -> Iterator[list[Weights]]:
    """What each of some processes orthogonalizes at a time, one of its `batches` or nothing: by round, by rank.

    The costliest weights are dealt first, each to the process that has least until then; by shapes and order alone, so
    that all processes deal alike.
    """
    shares: list[dict[nn.Parameter, Matrix]] = [{} for _ in range(ranks)]
    loads = [0] * ranks
    for weight, matrix in sorted(matrices.items(), key=lambda item: -item[1].cost):
        least = loads.index(min(loads))
        shares[least][weight] = matrix
        loads[least] += matrix.cost
    return map(list, zip_longest(*map(batches, shares), fillvalue=[]))


def _collected(
    shares: list[Weights], rank: int, rows: list[list[Tensor]], like: Tensor, among: ProcessGroup
) -> list[Tensor]:
    """The whole momenta of a process's share, from the rows that each process has; rows: of all shares, its own."""
    shapes = [[_shape(p, sender, len(shares)) for p in shares[rank]] for sender in range(len(shares))]
    by_sender = exchange(rows, shapes, like, among)
    return [torch.cat(parts) for parts in zip(*by_sender, strict=True)]


def _returned(shares: list[Weights], rank: int, found: list[Tensor], like: Tensor, among: ProcessGroup) -> Updates:
    """The updates of a process's rows of all shares; found: those of its share, whole."""
    ranks = len(shares)
    rows = [[update[rows_of(len(update), to, ranks)] for update in found] for to in range(ranks)]
    by_owner = exchange(rows, [[_shape(p, rank, ranks) for p in share] for share in shares], like, among)
    for share, own in zip(shares, by_owner, strict=True):
        yield from zip(share, own, strict=True)


def _shape(weight: nn.Parameter, rank: int, ranks: int) -> tuple[int, int]:
    """Of the rows of a weight that a process has."""
    rows = rows_of(weight.shape[0], rank, ranks)
    return rows.stop - rows.start, weight.shape[1]
