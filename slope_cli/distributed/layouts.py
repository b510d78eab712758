"""How a run's memory and communication follow from its layout, by arithmetic alone: what `distributed.layout=auto`
chooses by, and what `slope pretrain --dry-run --gpus N` prints. Nothing here needs torch or a GPU.

    ddp    every GPU has the whole state; gradients are summed once a step
    fsdp   weights, gradients and moments are split by rows over all GPUs
    hsdp   they are split over groups of GPUs, and the groups do the same work on other data

Weights are gathered in 16 bits, and gradients are reduced in float32 for each micro-batch. gather=block gathers the
weights of a block before its forward and again before its backward pass, gather=step all of them once a step. A sparse
layer gathers its kept entries, half of a dense layer's bytes, and packs them then: for a step into memory of its own,
for a block into that of all layers of the same sides. Masks are whole on every GPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

LAYOUTS = ("ddp", "fsdp", "hsdp")
GATHERS = ("step", "block")
ROWS = 16
"""A sparse layer's rows are split in whole groups of this many, which the kernels need."""
GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run, by default those of nodes with eight H100s of 80 GB.

    memory: bytes of a GPU. reserve: the share of it that is left to fragmentation, NCCL and libraries. nvlink, network:
    bytes per second that a collective achieves between the GPUs of a node, for each GPU, and between nodes, for each
    node.
    """

    world: int
    gpus_per_node: int = 8
    memory: int = 80 * GIB
    reserve: float = 0.1
    nvlink: float = 360e9
    network: float = 340e9

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a run may plan with."""
        return self.memory * (1 - self.reserve)


@dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers at once: a transformer block, or all that is outside the blocks.

    parameters, trained: numbers that are stored, and those of them that are trained.
    dense: those of them that products take from a 16-bit copy in DDP, under autocast.
    packed_bytes: of both packed copies of its sparse weights.
    mask_bytes, updated_mask_bytes: of its masks, and of those that change in a step.
    by_muon: those of the trained that Muon updates: it keeps one moment, not two, and GPUs divide its work.
    """

    parameters: int
    trained: int
    dense: int
    packed_bytes: int = 0
    mask_bytes: int = 0
    updated_mask_bytes: int = 0
    by_muon: int = 0

    def __add__(self, other: "Unit") -> "Unit":
        return Unit(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Sizes:
    """A model in one phase of a run.

    rest: all outside the blocks. rows: output features of every sparse or masked layer. shared_packed_bytes: of both
    packed copies of one sparse layer of each kind. activation_bytes: of one micro-batch, by
    train.activation_checkpointing; empty where there is no estimate. teacher: a frozen model that runs before it, the
    one that the run begins with or one of its size; split, it is gathered block by block. shares_teacher: whether it
    has the model's own frozen weights, unless it is split.
    """

    blocks: tuple[Unit, ...]
    rest: Unit
    rows: tuple[int, ...] = ()
    shared_packed_bytes: int = 0
    activation_bytes: Mapping[str, int] = field(default_factory=dict)
    teacher: "Sizes | None" = None
    shares_teacher: bool = False

    @property
    def whole(self) -> Unit:
        """All units together."""
        return sum(self.blocks, self.rest)

    @property
    def gathered_by_block(self) -> int:
        """Numbers that a GPU has at once where weights are gathered block by block."""
        two_blocks = len(self.blocks[:2])  # the one at work, and the next one on its way
        return self.rest.parameters + two_blocks * self.largest.parameters

    @property
    def largest(self) -> Unit:
        """The largest block, or the rest of a model without blocks."""
        return max(self.blocks, key=lambda block: block.parameters, default=self.rest)


@dataclass(frozen=True)
class Layout:
    """A layout of a run: its name, on how many GPUs the state is split, and how long weights stay gathered ("" in ddp).

    keeps_weights: with gather=step, whether the gathered weights stay in memory between micro-batches.
    """

    name: str
    shard: int = 1
    gather: str = ""
    keeps_weights: bool = True

    def __str__(self) -> str:
        how = f", gather={self.gather}" if self.gather else ""
        return f"{self.name}{f' of {self.shard}' * (self.name == 'hsdp')}{how}"


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU. gathered: 16-bit weights; in_flight: a block's gradient on its way into the reduction."""

    weights: int
    gradients: int
    moments: int
    masks: int
    packed: int
    gathered: int
    in_flight: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Traffic:
    """What collectives move, in bytes.

    micro_batch, step: that one GPU sends for each micro-batch, and once a step besides.
    micro_batch_network, step_network: that one node sends to others.
    """

    micro_batch: float = 0.0
    step: float = 0.0
    micro_batch_network: float = 0.0
    step_network: float = 0.0

    def of_step(self, micro_batches: int) -> float:
        """Bytes that one GPU sends in a step."""
        return micro_batches * self.micro_batch + self.step

    def seconds(self, cluster: Cluster, micro_batches: int) -> float:
        """How long a step's collectives take if nothing else is done meanwhile."""
        network = micro_batches * self.micro_batch_network + self.step_network
        return max(self.of_step(micro_batches) / cluster.nvlink, network / cluster.network)


@dataclass(frozen=True)
class Choice:
    """A layout with its consequences; fits: its memory is within what a GPU has."""

    layout: Layout
    memory: Memory
    traffic: Traffic
    fits: bool


def shard_degree(rows: Sequence[int], world: int, gpus_per_node: int, *, group: int = ROWS) -> int:
    """The largest number of GPUs on which the rows of every layer can be split in whole groups, at most `world`.

    It divides `world`, and it is a part of a node or a number of whole nodes. FSDP2 gives every GPU the same number of
    rows, rounded up, and the last ones fewer.
    """
    for degree in range(world, 1, -1):
        apart = gpus_per_node % degree and degree % gpus_per_node and degree != world
        if world % degree == 0 and not apart and all(-(-count // degree) % group == 0 for count in rows):
            return degree
    return 1


def layouts(rows: Sequence[int], cluster: Cluster, *, group: int = ROWS) -> list[Layout]:
    """The layouts that a model with sparse layers of so many rows can have, the simplest first."""
    world, per_node, found = cluster.world, cluster.gpus_per_node, [Layout("ddp")]
    in_node = next(n for n in range(per_node, 0, -1) if world % n == 0 and shard_degree(rows, n, n, group=group) == n)
    for shard in dict.fromkeys((shard_degree(rows, world, per_node, group=group), in_node)):
        if shard > 1:
            name = "fsdp" if shard == world else "hsdp"
            found += [Layout(name, shard, gather) for gather in GATHERS]
    return found


def memory_of(sizes: Sizes, layout: Layout, activation_checkpointing: str = "none") -> Memory:
    """The memory of a GPU."""
    whole, shard, teacher, by_block = sizes.whole, layout.shard, sizes.teacher, layout.gather == "block"
    weights, masks, gathered, in_flight = 4 * whole.parameters, whole.mask_bytes, 2 * whole.dense, 0
    packed = sizes.shared_packed_bytes if by_block else whole.packed_bytes
    if layout.gather:
        kept = layout.gather == "step" and layout.keeps_weights
        gathered = 2 * (whole.parameters if kept else sizes.gathered_by_block)
        in_flight = 6 * sizes.largest.trained  # in 16 bits from the backward pass, in float32 for the reduction
    if teacher and (layout.gather or not sizes.shares_teacher):
        weights, masks = weights + 4 * teacher.whole.parameters, masks + teacher.whole.mask_bytes
        both_packed = teacher.shared_packed_bytes if layout.gather else teacher.whole.packed_bytes
        packed += both_packed // 2  # it has no backward pass
        gathered += 2 * teacher.gathered_by_block if layout.gather else 0
    return Memory(
        weights=_split(weights, shard),
        gradients=_split(4 * whole.trained, shard),
        moments=_split(8 * whole.trained - 4 * whole.by_muon, shard),
        masks=masks,
        packed=packed,
        gathered=gathered,
        in_flight=in_flight,
        activations=sizes.activation_bytes.get(activation_checkpointing, 0),
    )


def _split(count: int, shard: int) -> int:
    return -(-count // shard)


def traffic_of(sizes: Sizes, layout: Layout, cluster: Cluster) -> Traffic:
    """What a GPU sends, by rings: the (n-1)/n-th part of what n GPUs gather or reduce, twice that for an all-reduce.

    Muon's updates go from the GPU that computes them to the others as `methods.muon_ranks` says.
    """
    whole, world, shard, node = sizes.whole, cluster.world, layout.shard, cluster.gpus_per_node
    weights, gradient, updates = 2.0 * whole.parameters, 4.0 * whole.trained, 2.0 * whole.by_muon

    def ring(payload: float, ranks: int) -> float:
        return payload * (ranks - 1) / ranks

    if not layout.gather:
        step = 2 * ring(gradient, world) + ring(updates, world)
        return Traffic(step=step, step_network=step if world > node else 0.0)
    reduced, masks = ring(gradient, shard), ring(whole.updated_mask_bytes, shard)
    times = 2 if layout.gather == "block" else 0
    of_teacher = 2.0 * sizes.teacher.whole.parameters if sizes.teacher else 0.0
    micro_batch = times * ring(weights, shard) + ring(of_teacher, shard) + reduced
    step = masks + (0 if times else ring(weights, shard))
    across, share = shard > node, 2 * updates / shard  # rows to the matrix's GPU, and back
    others = node * share * (shard - node) / shard  # what the GPUs of a node send to those of others
    network = (micro_batch, step + others) if across else (0.0, 0.0)
    found = Traffic(micro_batch, step + ring(share, shard), *network)
    if (replicas := world // shard) > 1:  # each shard of the gradient is summed over the groups once a step
        summed = 2 * ring(gradient / shard, replicas)
        together = min(shard, node) if world > node else 0
        found = replace(found, step=found.step + summed, step_network=found.step_network + together * summed)
    return found


def choices(
    phases: Sequence[Sizes], cluster: Cluster, *, activation_checkpointing: str = "none", group: int = ROWS
) -> Iterator[Choice]:
    """Every layout that a run can have, with its consequences.

    Args:
        phases: the model in each phase of the run. The memory is that of the largest, the traffic that of the last.
    """
    rows = [count for sizes in phases for count in sizes.rows]
    for layout in layouts(rows, cluster, group=group):
        each = (memory_of(sizes, layout, activation_checkpointing) for sizes in phases)
        memory = max(each, key=lambda memory: memory.total)
        yield Choice(layout, memory, traffic_of(phases[-1], layout, cluster), memory.total <= cluster.usable)


def choose(
    phases: Sequence[Sizes],
    cluster: Cluster,
    *,
    micro_batches: int = 1,
    activation_checkpointing: str = "none",
    layout: str = "auto",
    gather: str = "auto",
    group: int = ROWS,
) -> Choice:
    """The fastest layout that fits in a GPU's memory; if none does, the one that needs least.

    DDP is the fastest: it has the fewest collectives, and a step can be replayed from CUDA graphs. Of the others it is
    the one whose collectives of a step take least time.

    Args:
        phases: as in `choices`.
        micro_batches: of one GPU in a step.
        layout, gather: "auto", or the name of what is to be chosen. fsdp and hsdp stand for one another where the rows
            of sparse layers, or the number of GPUs, leave only the other.
        group: rows of a sparse layer that stay together.
    """
    every = list(choices(phases, cluster, activation_checkpointing=activation_checkpointing, group=group))
    found = [x for x in every if gather in ("auto", x.layout.gather or gather)]
    if layout != "auto":
        named = [x for x in found if x.layout.name == layout]
        found = named or [x for x in found if x.layout.gather] or found
    fitting = [x for x in found if x.fits]
    if not fitting:
        return min(found, key=lambda x: x.memory.total)
    return min(fitting, key=lambda x: (x.layout.name != "ddp", x.traffic.seconds(cluster, micro_batches)))
