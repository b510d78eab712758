"""Weights of which a process has only some rows, as DTensors."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process has, sharing its memory; of a plain tensor all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor, gathered from the processes that have some; of a plain tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def of_whole(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """What `change` makes of a whole tensor; of a split one, split in the same way."""
    changed = change(whole(tensor))
    if not isinstance(tensor, DTensor):
        return changed
    return distribute_tensor(changed, tensor.device_mesh, tensor.placements, src_data_rank=None)


def whole_of(rows_RC: Tensor, like: Tensor) -> Tensor:
    """All rows of a matrix, of which each process has those that it has of `like`: (R, C) -> (O, C)."""
    if not isinstance(like, DTensor):
        return rows_RC
    shape, stride = torch.Size((like.shape[0], rows_RC.shape[1])), (rows_RC.shape[1], 1)
    return DTensor.from_local(rows_RC, like.device_mesh, like.placements, shape=shape, stride=stride).full_tensor()


def local_rows(tensor: Tensor) -> slice:
    """Which rows of a tensor this process has; of a plain tensor all."""
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for number, placement in enumerate(tensor.placements):
            if placement.is_shard(0):
                return rows_of(tensor.shape[0], mesh.get_local_rank(number), mesh.size(number))
    return slice(0, tensor.shape[0])


def rows_of(count: int, rank: int, ranks: int) -> slice:
    """Which of `count` rows a process has: torch splits them so that each has as many, and the last ones fewer."""
    each = -(-count // ranks)
    return slice(min(rank * each, count), min((rank + 1) * each, count))
