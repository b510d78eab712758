"""Everything that a run's processes say to one another: the one module with collectives.

Each method of Group is called by every rank, in the same order. In a run of one process they do nothing.
"""

import math
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]

from slope_cli.distributed import checks, peers
from slope_cli.distributed.launch import TORCHRUN, Ranks
from slope_cli.distributed.signals import STOP_SIGNALS, StopFlag, Stopped
from slope_cli.errors import SlopeError

CONNECT = 20.0
"""Seconds in which ranks that have all come must connect to rank 0."""
FIRST_SUM = 60.0
"""Seconds that the first all-reduce may take."""
DEVICE_TIMEOUT, HOST_TIMEOUT = timedelta(minutes=10), timedelta(hours=4)
"""Of collectives between devices, and between hosts, where one rank may write a checkpoint while the others wait."""
BUCKET = 64 << 20
"""Bytes of gradients that are summed at once."""

T = TypeVar("T")


class Group:
    """The processes of a run, as one of them sees it.

    Attributes:
        ranks: which one this is.
        members: what each of them runs on, by rank; see `checks.describe`.
    """

    def __init__(
        self,
        ranks: Ranks | None = None,
        hosts: dist.ProcessGroup | None = None,
        apart: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            hosts: a gloo group of all ranks for everything that is not between devices; None for a single process.
            apart: another one.
        """
        self.ranks, self._hosts, self._apart = ranks or Ranks(), hosts, apart
        self.members: list[dict[str, Any]] = []

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self._hosts is not None

    @property
    def apart(self) -> "Group":
        """The same processes with connections of their own, for one other thread in each."""
        return Group(self.ranks, self._apart)

    # ----------------------------------------------------------------------------------------------- objects and errors

    def broadcast(self, value: T) -> T:
        """Rank 0's value, which must be picklable."""
        if not self.several:
            return value
        box = [value if self.ranks.first else None]
        dist.broadcast_object_list(box, src=0, group=self._hosts)
        return box[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(values, value, group=self._hosts)
        return values

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises on rank 0, on every rank; the others only wait."""
        if not self.several:
            return work()
        own, error = _attempt(work) if self.ranks.first else (None, None)
        value, told = self.broadcast((own, _portable(error)))
        if told is not None:
            raise told from error
        return value  # type: ignore[return-value]

    def agreed(self, work: Callable[[], T]) -> T:
        """Do `work`, which contains no collective, on every rank.

        Raises:
            Exception: on every rank that of the lowest rank where `work` raised one; unless all raised the same, it
                begins with that rank's name.
        """
        if not self.several:
            return work()
        value, error = _attempt(work)
        told = self.gather((self.ranks.name, _portable(error)))
        raised_by = [(name, other) for name, other in told if other is not None]
        if raised_by:
            name, other = raised_by[0]
            if len({str(each) for _, each in raised_by}) > 1 or len(raised_by) < len(told):
                other = _with_text(other, f"{name}: {other}")
            raise other from error
        return value  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.several:
            dist.barrier(group=self._hosts)

    def stopped_by(self, stop: StopFlag | None) -> str:
        """The signal that any rank has caught, on every rank alike, with that rank's name; "" if none has."""
        name = "" if stop is None else stop.name
        if not self.several:
            return name
        signals = [number.name for number in STOP_SIGNALS]
        own = self.ranks.world * (1 + signals.index(name)) + self.ranks.rank if name else -1
        number = torch.tensor([own])
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._hosts)
        if int(number) < 0:
            return ""
        which, rank = divmod(int(number), self.ranks.world)
        return f"{signals[which - 1]} on rank {rank}"

    # ------------------------------------------------------------------------------------------- tensors on the device

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.several:
            dist.all_reduce(tensor)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """Average a tensor over the ranks, in place."""
        return self.sum_(tensor).div_(self.ranks.world) if self.several else tensor

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Average tensors over the ranks, in place, in buckets of some of them at a time."""
        if not self.several:
            return
        for bucket in _buckets(list(tensors)):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            self.mean_(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What `work` returns, or raises."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def begin_alone(device: torch.device) -> None:
    """Let torch's engine work in a run of one process, which needs no group otherwise."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def send_from_first(tensor: Tensor) -> None:
    """Overwrite a contiguous tensor on a device with that of rank 0, bit for bit, whatever its dtype."""
    dist.broadcast(tensor.view(-1).view(torch.uint8), src=0)


def sum_among(tensor: Tensor, among: dist.ProcessGroup) -> Tensor:
    """Sum a tensor over some processes, in place."""
    dist.all_reduce(tensor, group=among)
    return tensor


def gather_equal(own: Tensor, among: dist.ProcessGroup) -> Tensor:
    """The flat tensors of some processes, all of one size, as rows in their order."""
    gathered = own.new_empty(dist.get_world_size(among), len(own))
    dist.all_gather(list(gathered), own, group=among)
    return gathered


def place_in(among: dist.ProcessGroup) -> tuple[int, int]:
    """Which of some processes this is, and how many they are."""
    return dist.get_rank(among), dist.get_world_size(among)


def exchange(
    to_each: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    like: Tensor,
    among: dist.ProcessGroup,
) -> list[list[Tensor]]:
    """Send each of some processes tensors of its own; what each of them sends to this one.

    Args:
        to_each, shapes: by process, this one too: the tensors for it, and the shapes of those from it.
        like: has the dtype and device of all of them.
    """
    sent = [_flat(tensors, like) for tensors in to_each]
    sizes = [sum(map(math.prod, each)) for each in shapes]
    received = like.new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(sent), sizes, [len(flat) for flat in sent], group=among)
    return [_shaped(flat, each) for flat, each in zip(received.split(sizes), shapes, strict=True)]


def hand_out(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], like: Tensor, sender: int) -> list[Tensor]:
    """The tensors of one rank, on every rank.

    Args:
        tensors: of the sender; the others may have none.
        shapes, like: of them, as in `exchange`.
    """
    flat = _flat(tensors, like) if tensors else like.new_empty(sum(map(math.prod, shapes)))
    dist.broadcast(flat, src=sender)
    return _shaped(flat, shapes)


def _flat(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([like.new_empty(0), *(tensor.flatten() for tensor in tensors)])


def _shaped(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The inverse of `_flat`."""
    return [part.view(shape) for part, shape in zip(flat.split(list(map(math.prod, shapes))), shapes, strict=True)]


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors in groups of one dtype and about BUCKET bytes, the same on every rank."""
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not buckets or buckets[-1][0].dtype != tensor.dtype or size + tensor.nbytes > BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.nbytes
    return buckets


def _portable(error: Exception | None) -> Exception | None:
    """An error that another process can raise."""
    if error is None:
        return None
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # errors of other libraries need not be picklable
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _with_text(error: Exception, text: str) -> Exception:
    """An error of the same kind with another text."""
    kind = type(error) if isinstance(error, SlopeError) else RuntimeError
    return kind(text)


# ----------------------------------------------------------------------------------------------------- coming together


def join(ranks: Ranks, device: torch.device, stop: StopFlag | None = None, *, seconds: float = 300) -> Group:
    """Meet the other processes, and check that each can take part.

    Args:
        device: of this process.
        stop: a signal to any rank ends the meeting on all.
        seconds: in which all must have come.

    Raises:
        UsageError: the ranks differ in GPU model or versions, or an interface variable names none.
        SlopeError: ranks that do not come, by host; a rank whose device does not work.
        Stopped: a rank was stopped meanwhile.
    """
    if ranks.world == 1:
        return Group(ranks)
    checks.require_interfaces()
    if ranks.local_world == ranks.world:  # the host's own name need not lead anywhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = _open_store(ranks, seconds)
    _await_all(ranks, store, stop, seconds)
    _connect_peers(ranks, store)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=PrefixStore("ranks", store),
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=DEVICE_TIMEOUT,
        device_id=device if gpu else None,
    )
    hosts, apart = (dist.new_group(backend="gloo", timeout=HOST_TIMEOUT) for _ in range(2))
    group = Group(ranks, hosts, apart)
    group.members = group.gather(checks.describe(ranks, device))
    checks.require_alike(group.members)
    _first_sum(group, device)
    return group


def _open_store(ranks: Ranks, seconds: float) -> TCPStore:
    """The store through which the ranks meet, on rank 0's host; torchrun has opened it already."""
    host, _, port = ranks.address.rpartition(":")
    serves = ranks.first and not (ranks.launcher == TORCHRUN and os.environ.get("TORCHELASTIC_USE_AGENT_STORE"))
    try:
        if not serves:
            _await_server(host, int(port), seconds)
        how: Any = {"timeout": timedelta(seconds=seconds), "wait_for_workers": False}
        return TCPStore(host, int(port), is_master=serves, **how)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        if serves:
            text = f"{ranks.name}: cannot listen on port {port}, set MASTER_PORT to a free one ({reason})"
        else:
            text = (
                f"{ranks.name}: rank 0 did not answer at {ranks.address} within {seconds:.0f} s; if the name does not "
                f"lead to its host, set MASTER_ADDR ({reason})"
            )
        raise SlopeError(text) from None


def _await_server(host: str, port: int, seconds: float) -> None:
    """Wait until something listens there: TCPStore would wait for three times as long, and print its stack."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
        except OSError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


def _await_all(ranks: Ranks, store: TCPStore, stop: StopFlag | None, seconds: float) -> None:
    """Wait until all ranks are there; on rank 0, which tells the others, for `seconds`, on these a little longer."""
    deadline = time.monotonic() + seconds + (0 if ranks.first else 30)
    store.set(f"here/{ranks.rank}", ranks.host)
    verdict, missing = "", list(range(ranks.world))
    while not verdict:
        if stop is not None and stop.name:
            store.set("stop", f"stopped by {stop.name} on {ranks.name}")
        if ranks.first:
            missing = [number for number in missing if not store.check([f"here/{number}"])]
            if store.check(["stop"]):
                verdict = store.get("stop").decode()
            elif not missing:
                verdict = "go"
            elif time.monotonic() >= deadline:
                verdict = f"{peers.names(ranks, missing)} did not come within {seconds:.0f} s"
            if verdict:
                store.set("verdict", verdict)
        elif store.check(["verdict"]):
            verdict = store.get("verdict").decode()
        elif time.monotonic() >= deadline:
            verdict = f"{ranks.name}: rank 0 did not say that all are there"
        if not verdict:
            time.sleep(0.05)
    if verdict.startswith("stopped by"):
        raise Stopped(f"{verdict} before the run began; run the same command again to resume")
    if verdict != "go":
        raise SlopeError(verdict)


def _connect_peers(ranks: Ranks, store: TCPStore) -> None:
    if ranks.first:
        server, invitation = peers.listen()
        store.set("peers", invitation)
        peers.accept(ranks, server, invitation, CONNECT)
    else:
        peers.connect(ranks, ranks.address.rpartition(":")[0], store.get("peers").decode(), CONNECT)


def _first_sum(group: Group, device: torch.device) -> None:
    """Sum once over the devices of all ranks, with a time limit; SlopeError if that does not work."""
    number = torch.ones(1, device=device)
    work: Any = dist.all_reduce(number, async_op=True)
    deadline = time.monotonic() + FIRST_SUM
    while not work.is_completed():
        if time.monotonic() >= deadline:
            names = ", ".join(sorted({member["host"] for member in group.members}))
            how = "set NCCL_SOCKET_IFNAME (NCCL_DEBUG=INFO says more)"
            how = how if device.type == "cuda" else "set GLOO_SOCKET_IFNAME"
            raise SlopeError(f"no sum over the ranks on {names} within {FIRST_SUM:.0f} s; {how}")
        time.sleep(0.001)
    work.wait()
    if float(number) != group.ranks.world:
        raise SlopeError(f"{group.ranks.name}: a sum of ones over {group.ranks.world} ranks gave {float(number):g}")
