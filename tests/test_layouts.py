"""The arithmetic of layouts: against counts by hand, against the tensors of a split model, and what is chosen by it."""

import copy
import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from support.marks import slow
from support.runs import RECIPE, slope, small

from slope_cli.benchmarks import RESULTS
from slope_cli.benchmarks import cluster as simulated
from slope_cli.config import configs
from slope_cli.distributed.layouts import (
    GIB,
    Cluster,
    Layout,
    Sizes,
    Unit,
    choices,
    choose,
    layouts,
    memory_of,
    shard_degree,
    traffic_of,
)
from slope_cli.distributed.sharding import Sharding
from slope_cli.methods.accounting import account, phase_sizes, sizes_of
from slope_cli.models.build import build_model, run_model_config
from sparse_kernels import sparse_layers
from sparse_kernels.formats import BF16
from sparse_kernels.packed import packed_layer

GB = 1e9


@cache
def sizes(recipe: str) -> tuple[Sizes, Sizes]:
    """The dense model of a recipe, and the sparse one without adapters."""
    config = configs.load(recipe, ["adapters.rank=0"])
    model = build_model(run_model_config(config), device="meta")
    return sizes_of(model, config), phase_sizes(model, config)[-1]


def state(model: Sizes, layout: Layout) -> float:
    """Gigabytes of a GPU without activations and a gradient on its way."""
    memory = memory_of(model, layout)
    return (memory.total - memory.activations - memory.in_flight) / GB


def whole_packed(shard: int) -> Layout:
    """Packed copies stay; the weights that they were made of go."""
    return Layout("fsdp", shard, "step", keeps_weights=False)


def test_the_state_of_opt_13b_against_a_count_by_hand() -> None:
    # 12.58e9 weights in linear layers and 0.27e9 beside them; 16 bytes for each that is trained, 2 bits of masks and
    # 2 x 1.125 bytes of packed weights for each entry of a sparse layer; gathered for a block, of one of the four
    # attention layers and of two of the MLP.
    dense, sparse = sizes("opt-13b")
    assert state(sparse, Layout("ddp")) == pytest.approx(137, rel=0.01)
    expected = {
        1: {"dense": 207, "packed": 137, "block": 110},
        8: {"dense": 27.5, "packed": 45, "block": 18.3},
        64: {"dense": 5.0, "packed": 34, "block": 6.5},
    }
    for shard, of in expected.items():
        assert state(dense, Layout("fsdp", shard, "block")) == pytest.approx(of["dense"], rel=0.01)
        assert state(sparse, whole_packed(shard)) == pytest.approx(of["packed"], rel=0.03)
        assert state(sparse, Layout("fsdp", shard, "block")) == pytest.approx(of["block"], rel=0.04)
        assert memory_of(sparse, Layout("fsdp", shard, "block")).packed == 2.25 * 9 * 5120**2
        assert memory_of(sparse, Layout("fsdp", shard, "step")).packed == 2.25 * (40 * 12 - 3) * 5120**2


@pytest.mark.parametrize(
    ("recipe", "at_8", "at_64"),
    [
        ("opt-30b", (63, 105, 41), (10.7, 78, 14)),
        slow("opt-66b", (137, 230, 87), (21, 172, 29)),
    ],
)
def test_the_state_of_larger_models_against_a_count_by_hand(
    recipe: str, at_8: tuple[float, ...], at_64: tuple[float, ...]
) -> None:
    dense, sparse = sizes(recipe)
    for shard, expected in ((8, at_8), (64, at_64)):
        block = Layout("fsdp", shard, "block")
        found = state(dense, block), state(sparse, whole_packed(shard)), state(sparse, block)
        assert found == pytest.approx(expected, rel=0.05)


def test_what_opt_13b_moves_against_a_count_by_hand() -> None:
    dense, sparse = sizes("opt-13b")
    for world in (8, 64):
        place, share = Cluster(world), (world - 1) / world
        block, step = Layout("fsdp", world, "block"), Layout("fsdp", world, "step")
        assert traffic_of(dense, block, place).micro_batch / share / GB == pytest.approx(103, rel=0.01)
        assert traffic_of(sparse, block, place).micro_batch / share / GB == pytest.approx(53, rel=0.02)
        once = traffic_of(sparse, step, place)
        assert once.micro_batch / share / GB == pytest.approx(26, rel=0.02)
        assert once.step / share / GB == pytest.approx(13 + 1.6, rel=0.02)
        ddp = traffic_of(sparse, Layout("ddp"), place)
        assert (ddp.micro_batch, ddp.step / share / GB) == (0, pytest.approx(2 * 26, rel=0.02))
        assert (once.micro_batch_network > 0) == (ddp.step_network > 0) == (world > 8)


def test_groups_that_do_the_same_work_add_their_gradients_once_a_step() -> None:
    model = Sizes((Unit(100, 100, 100),) * 2, Unit(50, 50, 50))
    found = traffic_of(model, Layout("hsdp", 8, "block"), Cluster(32))
    gathered, reduced = 2 * 250 * 7 / 8, 4 * 250 * 7 / 8
    assert found.micro_batch == 2 * gathered + reduced
    assert (found.micro_batch_network, found.step) == (0, 2 * (4 * 250 / 8) * 3 / 4)
    assert found.step_network == 8 * found.step  # eight such sums leave a node at a time
    assert found.of_step(3) == 3 * found.micro_batch + found.step
    slow = found.seconds(Cluster(32, network=1.0), 3)
    assert (slow, found.seconds(Cluster(32, nvlink=1.0), 3)) == (found.step_network, found.of_step(3))


def test_muon_sends_rows_to_a_matrix_s_gpu_and_back_or_the_updates_to_all() -> None:
    adamw = Sizes((Unit(100, 100, 100),) * 2, Unit(50, 50, 50))
    by_muon = replace(adamw, blocks=(Unit(100, 100, 100, by_muon=80),) * 2)

    def added(layout: Layout, world: int) -> tuple[float, float]:
        with_muon, without = (traffic_of(sizes, layout, Cluster(world)) for sizes in (by_muon, adamw))
        assert with_muon.micro_batch == without.micro_batch
        return with_muon.step - without.step, with_muon.step_network - without.step_network

    assert added(Layout("fsdp", 8, "block"), 8) == (2 * 2 * 160 / 8 * 7 / 8, 0)
    assert added(Layout("hsdp", 8, "step"), 16) == added(Layout("fsdp", 8, "step"), 8)
    # Of 16 GPUs half are in the other node, and what 8 GPUs send to these leaves theirs.
    assert added(Layout("fsdp", 16, "step"), 16) == (2 * 2 * 160 / 16 * 15 / 16, 8 * 2 * 2 * 160 / 16 / 2)
    assert added(Layout("ddp"), 8) == (2 * 160 * 7 / 8, 0)
    assert added(Layout("ddp"), 16) == (2 * 160 * 15 / 16,) * 2


def test_the_shard_degree_keeps_groups_of_rows_whole() -> None:
    opt, llama = (5120, 15360, 20480), (1024, 4096, 14336)
    assert [shard_degree(opt, world, 8) for world in (1, 2, 8, 64, 512)] == [1, 2, 8, 64, 64]
    assert [shard_degree(llama, world, 8) for world in (8, 64, 128)] == [8, 64, 64]
    assert shard_degree((768,), 512, 8) == 16
    assert shard_degree((48,), 8, 8) == 1  # 24 rows each would split a group
    assert shard_degree((48,), 3, 3) == 3
    assert shard_degree((48,), 12, 8, group=4) == 12
    assert shard_degree((), 512, 8) == 512
    assert shard_degree((80,), 24, 8) == 1  # never four and a half nodes
    for rows, world in ((opt, 512), (llama, 128), ((768, 80, 4112), 64)):
        degree = shard_degree(rows, world, 8)
        for count in rows:
            each = -(-count // degree)
            assert all(start % 16 == 0 for start in range(0, count, each))


def test_the_layouts_that_a_model_can_have() -> None:
    def names(rows: tuple[int, ...], *cluster: int) -> list[str]:
        return [str(layout) for layout in layouts(rows, Cluster(*cluster))]

    assert names((5120,), 1) == ["ddp"]
    assert names((5120,), 8) == ["ddp", "fsdp, gather=step", "fsdp, gather=block"]
    assert [x for x in names((5120,), 64) if "step" in x] == ["fsdp, gather=step", "hsdp of 8, gather=step"]
    assert [x for x in names((5120,), 512) if "step" in x] == ["hsdp of 64, gather=step", "hsdp of 8, gather=step"]
    assert names((48,), 8) == ["ddp"]
    assert [x for x in names((5120,), 12, 4) if "step" in x] == ["hsdp of 4, gather=step"]


def test_the_fastest_layout_that_fits_is_chosen() -> None:
    dense, sparse = sizes("opt-13b")
    how: dict[str, Any] = {"micro_batches": 64, "activation_checkpointing": "block"}

    def chosen(model: Sizes, world: int, memory: float, **more: Any) -> str:
        found = choose([model], Cluster(world, memory=int(memory * GIB)), **(how | more))
        assert found.fits
        return str(found.layout)

    assert chosen(sparse, 8, 200) == chosen(sparse, 1, 200) == "ddp"
    assert chosen(sparse, 8, 80) == "fsdp, gather=step"
    assert chosen(sparse, 8, 60) == chosen(dense, 8, 50) == "fsdp, gather=block"
    assert chosen(sparse, 8, 80, gather="block") == "fsdp, gather=block"
    assert chosen(sparse, 8, 200, layout="fsdp") == "fsdp, gather=step"
    assert chosen(sparse, 8, 200, layout="hsdp") == "fsdp, gather=step"  # there is no other node
    assert chosen(sparse, 512, 80, layout="fsdp", gather="block") == "hsdp of 8, gather=block"
    # With the network slow, weights are split over a node; where that does not fit, over more.
    slow = Cluster(64, network=20e9)
    assert str(choose([sparse], slow, **how).layout) == "hsdp of 8, gather=step"
    least = choose([sparse], Cluster(8, memory=10 * GIB), **how)
    assert (least.fits, str(least.layout)) == (False, "fsdp, gather=block")


def test_every_phase_of_a_run_must_fit() -> None:
    dense, sparse = sizes("opt-13b")
    cluster = Cluster(8, memory=200 * GIB)
    alone = {str(x.layout): x for x in choices([sparse], cluster, activation_checkpointing="block")}
    both = {str(x.layout): x for x in choices([dense, sparse], cluster, activation_checkpointing="block")}
    assert alone["ddp"].fits
    assert not both["ddp"].fits
    assert both["fsdp, gather=block"].traffic == alone["fsdp, gather=block"].traffic
    assert both["ddp"].memory.total == memory_of(dense, Layout("ddp"), "block").total


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gather", ["block", "step"])
def test_the_packed_weights_of_a_split_model_are_those_that_are_counted(gather: str, frozen: bool) -> None:
    config = configs.load(str(RECIPE), [*small("gpt2-nano"), "model.overrides.n_layer=3", "adapters.rank=0"])
    model = build_model(run_model_config(config))
    counted, layout = phase_sizes(model, config)[-1], Layout("fsdp", 1, gather)
    try:
        sharding = Sharding(layout, 1, torch.device("cpu"), None)
        (sharding.split_frozen if frozen else sharding.split)(model)
        sizes_of_packed = {
            packed_layer(x.row_mask_bits, torch.bfloat16, "auto"): x.out_features * x.in_features
            for _, x in sparse_layers(model)
        }
    finally:
        torch.distributed.destroy_process_group()
    found = sum(2 * BF16.packed_bytes(1, entries) for entries in sizes_of_packed.values())
    expected = memory_of(counted, layout).packed
    if frozen:  # as a teacher beside the model
        expected = 2 * (memory_of(replace(counted, teacher=counted), layout).packed - expected)
    assert expected == found


def test_a_split_teacher_has_rows_of_its_own() -> None:
    config = configs.load(
        str(RECIPE), [*small("llama3-8b"), "method=linearize", "linearize.window=8", "distill.share=1"]
    )
    transfer, distill = phase_sizes(build_model(run_model_config(config), device="meta"), config)
    assert transfer.teacher is None
    assert distill.teacher is not None
    assert distill.shares_teacher
    alone, block, place = replace(distill, teacher=None), Layout("fsdp", 2, "block"), Cluster(2)
    assert memory_of(distill, Layout("ddp")) == memory_of(alone, Layout("ddp"))
    weights = distill.teacher.whole.parameters
    added = memory_of(distill, block).total - memory_of(alone, block).total
    assert added == 4 * weights // 2 + 2 * weights  # its rows in float32, and both blocks in 16 bits
    masked = replace(distill.teacher, rest=replace(distill.teacher.rest, mask_bytes=8))
    assert memory_of(replace(distill, teacher=masked), block).masks == 8
    assert memory_of(replace(distill, teacher=masked, shares_teacher=False), Layout("ddp")).masks == 8
    sent = traffic_of(distill, block, place).micro_batch - traffic_of(alone, block, place).micro_batch
    assert sent == 2 * weights / 2


@pytest.mark.parametrize("method", ["slope", "dense", "sr_ste", "fst", "linearize", "linearize all"])
@pytest.mark.parametrize("family", ["gpt2-nano", "opt-125m", "llama3-8b"])
def test_the_units_of_a_model_add_up_to_the_account_of_a_run(family: str, method: str) -> None:
    more = {
        "linearize": ["linearize.window=8"],
        "linearize all": ["linearize.window=8", "linearize.train=all", "distill.share=0.5"],
        "slope": ["sparsity.start=0.4"],
        "sr_ste": ["optim.name=muon"],
    }.get(method, [])
    config = configs.load(str(RECIPE), [*small(family), f"method={method.split()[0]}", *more])
    model = build_model(run_model_config(config), device="meta")
    counts, phases = account(copy.deepcopy(model), config), phase_sizes(model, config)
    alone = memory_of(phases[-1], Layout("ddp"))
    trained = {name: size for name, size in counts.state_bytes.items() if name != "masks"}
    assert alone.weights + alone.gradients + alone.moments == sum(trained.values())
    assert alone.masks == counts.state_bytes["masks"]
    assert alone.packed == counts.derived_bytes.get("on a GPU, packed", 0)
    assert alone.activations == (counts.activation_bytes or 0)
    assert len(phases[-1].blocks) == 2
    assert phases[-1].rest.packed_bytes == phases[-1].rest.mask_bytes == 0
    if method == "slope":
        assert phases[0].whole.parameters == counts.dense_parameters
        assert phases[0].rows == ()
        assert phases[-1].rows
        assert phases[-1].whole.updated_mask_bytes == phases[-1].whole.mask_bytes // 2


def test_checkpointing_takes_most_of_the_activations_away() -> None:
    dense, sparse = sizes("opt-13b")
    tokens, width, layers = 4 * 2048, 5120, 40
    logits = tokens * 2 * 50272  # in 16 bits, and replaced by their gradient
    assert sparse.activation_bytes == dense.activation_bytes
    assert dense.activation_bytes["none"] - logits == 26 * tokens * width * layers  # ReLU: its result alone
    assert dense.activation_bytes["block"] - logits == 2 * tokens * width * layers + 26 * tokens * width
    # The input, q, k, v, attention's result, and what its projection, the MLP's two products give.
    assert dense.activation_bytes["selective"] - logits == (2 * 11 * layers + 26) * tokens * width


def test_a_dry_run_prints_every_layout_on_gpus_that_are_not_here() -> None:
    words = ["pretrain", RECIPE, *small("gpt2-nano"), "train.micro_batch=1", "--dry-run", "--gpus", "2"]
    result = slope(*words)
    assert result.code == 0, result.err
    assert "on 2 GPUs of 80 GiB" in result.out
    assert "chosen: ddp" in result.out
    assert "dense, ddp" in result.out
    record = json.loads(slope(*words, "--gpu-memory", "1.5", "--json").out)["cluster"]
    assert (record["memory"], record["chosen"], record["fits"]) == (int(1.5 * GIB), "ddp", True)
    assert "cluster" not in slope(*words[:-2]).out
    plain = [line.removeprefix("# ") for line in slope(*words[:-2]).out.splitlines()]
    assert [line for line in plain if "gather=" in line] == []


def test_a_dry_run_says_what_does_not_fit() -> None:
    result = slope("pretrain", "opt-13b", "--dry-run", "--gpus", "8", "--gpu-memory", "24")
    assert result.code == 0, result.err
    assert "does not fit" in result.out
    assert "train.activation_checkpointing=block" in result.out
    result = slope("pretrain", RECIPE, *small("gpt2-nano"), "--gpus", "8")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "--dry-run" in result.err
    result = slope("pretrain", RECIPE, *small("gpt2-nano"), "--dry-run", "--gpus", "7")
    assert result.code == 2
    assert "train.tokens_per_step" in result.err


@pytest.mark.slow
def test_the_simulated_cluster_is_that_of_the_arithmetic_of_today() -> None:
    """The results file is out of date if this fails: run benchmarks/cluster.py and `make render`."""
    result = json.loads((RESULTS / "cluster.json").read_text())
    rows = [row for row in result["rows"] if row["model"] == "opt-13b" and row["gpus"] == 64]
    assert [row["network"] for row in rows] == list(simulated.NETWORKS)
    for row in rows:
        where = Cluster(64, nvlink=simulated.NVLINK, network=simulated.NETWORKS[row["network"]])
        for name in ("dense", "sparse"):
            assert simulated.fastest("opt-13b", where, sparse=name == "sparse") == row[name]
    for row in result["rows"]:
        for side in (row["dense"], row["sparse"]):
            assert side is None or side["memory"]["total"] <= Cluster(row["gpus"]).usable
    fits = next(row for row in result["fits"] if row["model"] == "opt-13b")
    assert fits["80 GB"] == [simulated.fewest("opt-13b", 80, sparse=which) for which in (False, True)]
