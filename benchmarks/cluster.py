"""Training on many GPUs, simulated on paper: what was measured on one GPU, and the arithmetic of layouts.

    python -m slope_cli.benchmarks.cluster

Needs no GPU. Writes benchmarks/results/cluster.json: for each model, number of GPUs and network the fastest layout and
activation checkpointing that fit, of the dense and of the sparse model, with memory, communication and the time of a
step; and for each model and GPU the fewest GPUs on which it fits. `ASSUMED` names what is not measured.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from slope_cli.config import configs
from slope_cli.config.schema import Config
from slope_cli.distributed.layouts import GIB, Choice, Cluster, Sizes, choices
from slope_cli.methods.accounting import account, phase_sizes, sizes_of
from slope_cli.models.build import build_model, run_model_config
from slope_cli.utils.environment import environment
from slope_cli.utils.files import write_json
from slope_cli.utils.typed_json import from_json

from . import RESULTS
from .records import StepResults

GPUS = (8, 64, 512)
TOKENS, TOKENS_PER_STEP, LENGTH = 8192, 4_194_304, 2048
MODELS = {"opt-13b": "opt-13b", "opt-30b": "opt-30b", "opt-66b": "opt-66b", "llama3-8b": "llama3-8b"}
MODELS |= {"llama3-70b": "llama3-8b"}
"""Each model with its recipe."""
MEASURED = {"opt-66b": "step-h200"}
"""Where the time of a block was not measured on an H100."""
LIKE = {"llama3-70b": "opt-66b"}
"""A model that was not measured computes as many FLOP a second as one of similar width."""
NETWORKS = {"8 x 400 Gb/s": 340e9, "1 x 400 Gb/s": 42e9}
"""Between nodes, and the bytes per second and node that collectives achieve over it."""
ASSUMED: dict[str, float] = {
    "bytes per second of NVLink in a collective, each GPU": 360e9,
    "bytes per second of a GPU's memory": 2.7e12,
    "bytes that an optimizer step moves for each parameter": 32,
    "share of the shorter of computing and communicating that the longer does not hide": 0.1,
    "share of computing that checkpointing=selective adds": 0.05,
    "share of a GPU's memory that is left free": 0.1,
}
NVLINK, HBM, OPTIMIZER, EXPOSED, SELECTIVE, RESERVE = ASSUMED.values()
FITTING = ("gpt2-xl", "opt-2.7b", "opt-6.7b", "llama3-8b", "opt-13b", "opt-30b", "opt-66b", "llama3-70b")
MEMORIES = (40, 80, 141)


@dataclass(frozen=True)
class Compute:
    """Seconds of one GPU for a micro-batch of TOKENS tokens without checkpointing and without an optimizer step.

    forward: the share of it that is the forward pass.
    """

    seconds: float
    forward: float

    def checkpointed(self, mode: str) -> float:
        """With train.activation_checkpointing."""
        more = {"none": 0.0, "selective": SELECTIVE, "block": self.forward}[mode]
        return self.seconds * (1 + more)


def config_of(model: str, method: str = "slope", micro_batch: int = TOKENS // LENGTH) -> Config:
    """The run that is simulated: a recipe without adapters, which join for the last per cent."""
    batch = [f"train.seq_len={LENGTH}", f"train.micro_batch={micro_batch}", f"train.tokens_per_step={TOKENS_PER_STEP}"]
    words = [f"model.name={model}", f"method={method}", "adapters.rank=0", *batch]
    return configs.load(MODELS.get(model, model), words)


@cache
def sizes(model: str, *, sparse: bool, micro_batch: int = TOKENS // LENGTH) -> Sizes:
    """Of the sparse or of the dense model."""
    config = config_of(model, "slope" if sparse else "dense", micro_batch)
    built = build_model(run_model_config(config), device="meta")
    return phase_sizes(built, config)[-1] if sparse else sizes_of(built, config)


@cache
def flops(model: str) -> int:
    """Dense-equivalent operations of a token, forward and backward."""
    config = config_of(model)
    found = account(build_model(run_model_config(config), device="meta"), config).dense_flops_per_token
    assert found is not None
    return found


@cache
def compute(model: str, *, sparse: bool) -> Compute:
    """From the measured time of a whole model on one GPU, less what its optimizer step takes there."""
    if model in LIKE:
        like = compute(LIKE[model], sparse=sparse)
        return Compute(like.seconds * flops(model) / flops(LIKE[model]), like.forward)
    file = RESULTS / f"{MEASURED.get(model, 'step-h100')}.json"
    case = next(x for x in from_json(StepResults, json.loads(file.read_text())).cases if x.name == model)
    assert case.summary is not None
    assert case.summary.whole is not None
    assert case.summary.block is not None
    milliseconds = case.summary.whole.sparse_ms if sparse else case.summary.whole.dense_ms
    update = OPTIMIZER * sizes(model, sparse=sparse).whole.trained / HBM
    # Of three equal products two become faster: with a block's speed-up r, a forward product takes (3/r - 1) / 2.
    ratio = case.summary.block.ratio if sparse else 1.0
    return Compute(milliseconds / 1e3 - update, (1 - ratio / 3) / 2)


def seconds(model: Sizes, computing: Compute, choice: Choice, mode: str, cluster: Cluster) -> float:
    """A step: micro-batches, each with its communication beside it, the last also with that of the step; the update."""
    micro_batches = TOKENS_PER_STEP // (TOKENS * cluster.world)
    whole, layout, traffic = model.whole, choice.layout, choice.traffic
    # Both copies from one reading of the values; or one for each pass over a block that was gathered for it.
    passes = micro_batches * (3 if mode == "block" else 2) if layout.gather == "block" else 1
    written = whole.packed_bytes / (2 if layout.gather == "block" else 1)
    packing = passes * (2 * whole.parameters + written) / HBM if whole.packed_bytes else 0.0
    update = OPTIMIZER * whole.trained / layout.shard / HBM + packing

    def beside(communicating: float) -> float:
        both = computing.checkpointed(mode), communicating
        return max(both) + EXPOSED * min(both)

    alone = traffic.seconds(cluster, 1) - traffic.seconds(cluster, 0)
    return (micro_batches - 1) * beside(alone) + beside(traffic.seconds(cluster, 1)) + update


def fastest(model: str, cluster: Cluster, *, sparse: bool) -> dict[str, Any] | None:
    """The fastest layout and checkpointing that fit, or None."""
    of, computing, found = sizes(model, sparse=sparse), compute(model, sparse=sparse), []
    for mode in of.activation_bytes:
        for choice in choices([of], cluster, activation_checkpointing=mode):
            if choice.fits:
                found.append((seconds(of, computing, choice, mode, cluster), mode, choice))
    if not found:
        return None
    step, mode, choice = min(found, key=lambda each: each[0])
    micro_batches = TOKENS_PER_STEP // (TOKENS * cluster.world)
    return {
        "layout": str(choice.layout),
        "checkpointing": mode,
        "memory": asdict(choice.memory) | {"total": choice.memory.total},
        "sent": asdict(choice.traffic) | {"of_step": choice.traffic.of_step(micro_batches)},
        "communication_s": choice.traffic.seconds(cluster, micro_batches),
        "step_s": step,
    }


def simulated() -> Iterator[dict[str, Any]]:
    """A row for each model, number of GPUs and network."""
    for model in MODELS:
        for world in GPUS:
            for network, bandwidth in NETWORKS.items():
                cluster = Cluster(world, reserve=RESERVE, nvlink=NVLINK, network=bandwidth)
                dense, sparse = (fastest(model, cluster, sparse=which) for which in (False, True))
                ratio = dense["step_s"] / sparse["step_s"] if dense and sparse else None
                yield {
                    "model": model,
                    "gpus": world,
                    "network": network,
                    "dense": dense,
                    "sparse": sparse,
                    "speedup": ratio,
                }


def fewest(model: str, memory: int, *, sparse: bool) -> int | None:
    """The smallest power of two of GPUs on which a model fits, one sequence at a time, all blocks checkpointed."""
    of = sizes(model, sparse=sparse, micro_batch=1)
    for power in range(int(math.log2(max(GPUS))) + 1):
        cluster = Cluster(2**power, memory=memory * GIB, reserve=RESERVE)
        if any(choice.fits for choice in choices([of], cluster, activation_checkpointing="block")):
            return int(cluster.world)
    return None


def main() -> None:
    """Compute all rows and write benchmarks/results/cluster.json."""
    rows = list(simulated())
    fits = [
        {
            "model": model,
            **{f"{memory} GB": [fewest(model, memory, sparse=x) for x in (False, True)] for memory in MEMORIES},
        }
        for model in FITTING
    ]
    one = {
        model: {name: compute(model, sparse=name == "sparse").seconds for name in ("dense", "sparse")}
        for model in MODELS
    }
    where = {"date": environment()["date"], "tokens": TOKENS, "tokens_per_step": TOKENS_PER_STEP, "length": LENGTH}
    measured = {model: "from " + LIKE[model] if model in LIKE else MEASURED.get(model, "step-h100") for model in MODELS}
    known = {"assumed": ASSUMED, "networks": NETWORKS, "measured": measured, "micro_batch_s": one}
    write_json(RESULTS / "cluster.json", where | known | {"rows": rows, "fits": fits})


if __name__ == "__main__":
    main()
