"""Counts of a dry run are those of a run: against the tensors of real models, and against counts by hand."""

from collections.abc import Iterable

import pytest
import torch
from support.runs import RECIPE, small
from transformers import PreTrainedModel

from slope_cli.checkpoint import store
from slope_cli.config import configs
from slope_cli.config.schema import Config
from slope_cli.linearize.swap import linear_windows
from slope_cli.methods import optim, phases_of
from slope_cli.methods.accounting import Account, Flops, account, attention_memory, count, flops
from slope_cli.methods.apply import UNTOUCHED, apply
from slope_cli.models.build import build_model, run_model_config
from slope_cli.report import metrics
from slope_cli.utils.gpus import dense_peak
from sparse_kernels import adapters_of, mask_layers, sparsify

FAMILIES = ["gpt2-nano", "opt-125m", "llama3-8b", "bert-base"]


def counted(config: Config) -> Account:
    return account(build_model(run_model_config(config), device="meta"), config)


def trained(config: Config) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model after a step in each of its phases, and all that a run keeps of it, by the names of checkpoints."""
    phases, model = phases_of(config), build_model(run_model_config(config))
    was, *later = phases.distinct
    apply(model, config, was)
    optimizer = optim.build_optimizer(model, config, phases)
    for phase in (None, *later):
        if phase is not None:
            apply(model, config, phase, was=was, optimizer=optimizer)
            was = phase
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    return model, store.state_tensors(model, optimizer)


def size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def by_part(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """The tensors of a checkpoint by what they belong to; the moments of adapters and maps belong to these."""
    maps = {id(p) for window in linear_windows(model).values() for p in window.parameters()}
    in_maps = [name for name, p in model.named_parameters() if id(p) in maps]
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in ("weights", "moments", "masks", "adapters", "maps")}
    for name, tensor in tensors.items():
        if name == "optim.step":
            continue
        kind, _, rest = name.partition(".")
        if rest.endswith((".row_mask_bits", ".backward_mask_bits", ".mask")):
            part = "masks"
        elif ".adapter." in rest:
            part = "adapters"
        elif rest.startswith(tuple(in_maps)):
            part = "maps"
        else:
            part = "weights" if kind == "model" else "moments"
        parts[part].append(tensor)
    return parts


SPARSE = [
    (),
    ("method=dense",),
    ("adapters.rank=0",),
    ("adapters.rank=0.2", "sparsity.n=1", "sparsity.m=2"),
    # Sides that are no multiples of 8: their masks are padded to whole bytes.
    ("sparsity.n=1", "sparsity.m=3", "model.overrides.{ffn}=60"),
    ("method=sr_ste",),
    ("method=fst", "fst.dense_finish=0.4"),
    ("method=wanda", "sparsity.start=0.5"),
    ("optim.name=muon",),
]
LINEAR = [
    ("method=linearize", "linearize.window=8"),
    ("method=linearize", "linearize.window=8", "linearize.transfer=1"),
    ("method=linearize", "linearize.window=8", "linearize.keep_softmax=[0]", "linearize.targets=[q, v]"),
]


CASES = [(family, more) for family in FAMILIES for more in (*SPARSE, *LINEAR)]
CASES = [case for case in CASES if case[0] != "bert-base" or case[1] not in LINEAR]  # which sees both sides


@pytest.mark.parametrize(("family", "more"), CASES)
def test_parameters_and_bytes_are_those_of_the_tensors(family: str, more: tuple[str, ...]) -> None:
    ffn = {"gpt2-nano": "n_inner", "opt-125m": "ffn_dim"}.get(family, "intermediate_size")
    words = [word.format(ffn=ffn) for word in more]
    if "sparsity.m=3" in words:
        words.append(f"model.overrides.{'n_embd' if family == 'gpt2-nano' else 'hidden_size'}=36")
    config = configs.load(str(RECIPE), [*small(family), *words])
    counts, (model, tensors) = counted(config), trained(config)
    parts = by_part(model, tensors)
    bytes_of = {part: size(found) for part, found in parts.items()}
    linear = config.method == "linearize"
    lone = size(t for name, t in tensors.items() if name.endswith("exp_avg") and f"{name}_sq" not in tensors)
    assert (lone > 0) == (config.optim.name == "muon")
    # Weights, adapters and maps have two moments in a checkpoint, and in memory a gradient.
    expected = {
        "weights (float32)": 0 if linear else bytes_of["weights"],
        "gradients (float32)": 0 if linear else bytes_of["weights"],
        "AdamW moments": bytes_of["moments"] - lone,
        **({"Muon momentum": lone} if lone else {}),
        "masks": bytes_of["masks"],
        "adapters with their state": bytes_of["adapters"] * 4 // 3,
        "maps with their state": bytes_of["maps"] * 4 // 3,
    }
    assert counts.state_bytes == expected | ({"frozen (float32)": bytes_of["weights"]} if linear else {})
    assert sum(bytes_of.values()) + size([tensors["optim.step"]]) == size(tensors.values())
    numbers = {part: sum(t.numel() for t in found) for part, found in parts.items()}
    assert numbers["weights"] == (counts.frozen_parameters if linear else counts.trained_parameters)
    assert numbers["adapters"] // 3 == counts.adapter_parameters == counts.all_adapter_parameters
    assert numbers["maps"] // 3 == counts.map_parameters
    assert counts.trained_parameters == (0 if linear else numbers["weights"])
    assert counts.pretrained_adapter_parameters == 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_run_is_counted_as_one(family: str, name: str) -> None:
    words = [*small(family), f"optim.name={name}"]
    sparse = counted(configs.load(str(RECIPE), words))
    dense = counted(configs.load(str(RECIPE), [*words, "method=dense"]))
    assert dense.dense_parameters == dense.trained_parameters == sparse.dense_parameters > sparse.trained_parameters
    assert sum(dense.state_bytes.values()) == sum(dense.dense_state_bytes.values())
    assert dense.dense_state_bytes == sparse.dense_state_bytes
    assert dense.real_flops_per_token == dense.dense_flops_per_token == sparse.dense_flops_per_token


def test_flops_of_gpt2_against_a_count_by_hand() -> None:
    # Width 32, 2 blocks, 272 ids, 32 positions in use; 2 FLOP a multiply-add; forward, input gradient, weight gradient.
    counts = counted(configs.load(str(RECIPE), small("gpt2-nano")))
    block = 32 * 96 + 32 * 32 + 32 * 128 + 128 * 32
    attention = 2 * 32 * 32 * 2  # of one token with 32 others: scores and weighted sum, over a width of 32
    assert counts.dense_flops_per_token == 3 * (2 * (2 * block + 32 * 272) + 2 * attention // 2)
    sparse = 2 * block - 32 * 96  # the first block's c_attn and the head stay dense
    assert counts.real_flops_per_token == counts.dense_flops_per_token - 2 * 2 * sparse // 2
    assert counts.adapter_flops_per_token == 6 * counts.adapter_parameters


def test_flops_of_llama_leave_out_the_lookup_and_those_of_bert_see_both_sides() -> None:
    llama = counted(configs.load(str(RECIPE), small("llama3-8b")))
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    assert llama.dense_flops_per_token == 6 * (2 * block + 32 * 272) + 6 * 2 * 32 * 32
    bert = counted(configs.load(str(RECIPE), small("bert-base")))
    heads = 32 * 32 + 32 * 32 + 32 * 272 + 2 * 32  # pooler, transform, decoder, next sentence
    assert bert.dense_flops_per_token == 6 * (2 * (4 * 32 * 32 + 2 * 32 * 64) + heads) + 12 * 2 * 32 * 32


def test_the_counts_do_not_depend_on_the_device() -> None:
    config = configs.load(str(RECIPE), small("opt-125m"))
    assert account(build_model(run_model_config(config)), config) == counted(config)


def test_a_published_model_has_its_published_size() -> None:
    published = configs.load("gpt2-small", ["model.overrides.vocab_size=50257"])
    assert counted(published).dense_parameters == 124_439_808


def test_the_weights_of_sparse_and_masked_layers_are_counted_with_and_without_what_is_pruned() -> None:
    words = small("gpt2-nano")
    whole = 2 * (32 * 96 + 32 * 32 + 32 * 128 + 128 * 32) - 32 * 96  # the first block's c_attn stays dense
    sparse = counted(configs.load(str(RECIPE), words))
    masked = counted(configs.load(str(RECIPE), [*words, "method=sr_ste"]))
    dense = counted(configs.load(str(RECIPE), [*words, "method=dense"]))
    assert sparse.pruned_layer_weights == masked.pruned_layer_weights == whole
    assert (dense.pruned_layer_weights, dense.derived_bytes, masked.derived_bytes) == (0, {}, {})
    assert sparse.active_parameters == masked.active_parameters == dense.active_parameters - whole // 2
    assert masked.trained_parameters == dense.trained_parameters
    assert sparse.linear_weights == masked.linear_weights == dense.linear_weights
    # 16 bits for each kept value and 2 for its place among four, for both products.
    assert sparse.derived_bytes["on a GPU, packed"] == 2 * (whole // 2 * 18 // 8)
    assert sparse.inference_bytes == 2 * (sparse.active_parameters + sparse.adapter_parameters) + whole // 8
    assert dense.inference_bytes == 2 * dense.dense_parameters
    unmasked = counted(configs.load(str(RECIPE), [*words, "method=fst", "fst.dense_finish=0.4"]))
    assert (unmasked.pruned_layer_weights, unmasked.active_parameters) == (0, dense.dense_parameters)


def test_a_model_is_counted_as_it_is() -> None:
    config = run_model_config(configs.load(str(RECIPE), small("opt-125m")))
    dense, sparse, masked = (build_model(config, device="meta") for _ in range(3))
    sparsify(sparse)
    mask_layers(masked)
    counts = [count(model) for model in (dense, sparse, masked)]
    assert [x.linear for x in counts] == [counts[0].linear] * 3
    assert counts[1].weights == counts[2].active == counts[0].weights - counts[1].sparse // 2
    assert counts[1].stored_sparse == counts[1].sparse // 2
    assert (counts[0].mask_bytes, counts[1].mask_bytes, counts[2].mask_bytes) == (
        0,
        counts[1].sparse // 4,  # two bits a weight
        counts[2].pruned_layers,  # a byte
    )
    sparse.requires_grad_(False)
    assert count(sparse).trained == 0


def test_a_run_that_linearizes_counts_the_adapters_that_it_begins_with() -> None:
    words = small("llama3-8b")
    base = configs.load(str(RECIPE), words)
    config = configs.load(str(RECIPE), [*words, "method=linearize", "linearize.window=8"])
    model = build_model(run_model_config(config), device="meta")
    apply(model, base, phases_of(base).end)
    own = sum(p.numel() for adapter in adapters_of(model).values() for p in adapter.parameters())
    attention = [a for name, a in adapters_of(model).items() if "self_attn" in name]
    counts = account(model, config)
    new = counted(config).adapter_parameters
    assert counts.pretrained_adapter_parameters == sum(p.numel() for a in attention for p in a.parameters())
    assert counts.adapter_parameters == new + counts.pretrained_adapter_parameters
    assert counts.all_adapter_parameters == new + own
    assert counts.frozen_parameters - (own - counts.pretrained_adapter_parameters) == (
        counts.dense_parameters - counts.pruned_layer_weights // 2
    )
    assert counts.dense_flops_per_token is counts.real_flops_per_token is counts.activation_bytes is None


@pytest.mark.parametrize(("state", "numbers"), [("additive", 32 * 17), ("delta", 16 * 16)])
def test_attention_memory_against_a_count_by_hand(state: str, numbers: int) -> None:
    words = [*small("llama3-8b"), "method=linearize", "linearize.window=8", f"linearize.state={state}"]
    config = configs.load(str(RECIPE), words)
    model = build_model(run_model_config(config), device="meta")
    apply(model, config, phases_of(config).end)
    memory = attention_memory(model)
    assert (memory.layers, memory.linear_layers) == (2, 2)
    # A group of keys and values of 16 dimensions in each of two layers, in 16 bits.
    assert memory.cache_bytes_per_token == 2 * 2 * 2 * 16
    window = 7 * (2 * 16 * 2 + 1) + 8 + 8  # keys, values and whether they are real; two places
    assert memory.state_bytes == 2 * (window + 4 * numbers)
    first = memory.break_even
    assert (first - 1) * memory.cache_bytes_per_token < memory.state_bytes <= first * memory.cache_bytes_per_token


@pytest.mark.parametrize("kept", ["[1]", "auto:1"])
def test_memory_of_layers_that_keep_softmax(kept: str) -> None:
    words = [*small("llama3-8b"), "method=linearize", "linearize.window=8", f"linearize.keep_softmax={kept}"]
    config = configs.load(str(RECIPE), words)
    model = build_model(run_model_config(config), device="meta")
    apply(model, config, phases_of(config).end)
    memory = attention_memory(model)
    assert (memory.layers, memory.linear_layers) == (2, 1)
    assert memory.kept_bytes_per_token == memory.cache_bytes_per_token == 2 * 2 * 16


def test_operations_of_a_phase_against_a_count_by_hand() -> None:
    """Blocks of 32 features with products of 96, 32, 128 and 128 outputs or inputs, two of them, and a tied head."""
    config = configs.load(str(RECIPE), [*small("gpt2-nano"), "adapters.rank=4"])
    model, phases = build_model(run_model_config(config), device="meta"), phases_of(config)
    linear = 2 * (32 * 96 + 32 * 32 + 32 * 128 + 128 * 32) + 272 * 32
    attention = 2 * 6 * config.train.seq_len * 32  # causal: half of the scores
    assert flops(model, config) == (6 * linear + attention, 6 * linear + attention)
    was = UNTOUCHED
    saved = 2 * 2 * (linear - 272 * 32 - 32 * 96) // 2  # half of two of the three products; the first c_attn is dense
    adapters = 0
    for phase in phases.distinct:
        apply(model, config, phase, was=was)
        was, adapters = phase, sum(p.numel() for x in adapters_of(model).values() for p in x.parameters())
        assert flops(model, config) == (6 * linear + attention, 6 * linear + attention - saved + 6 * adapters)
    assert adapters > 0
    masked = configs.load(str(RECIPE), [*small("gpt2-nano"), "method=sr_ste"])
    computed_dense = build_model(run_model_config(masked), device="meta")
    apply(computed_dense, masked, phases_of(masked).end)
    assert flops(computed_dense, masked) == (6 * linear + attention, 6 * linear + attention)


def test_utilization_is_operations_by_time_over_the_peak() -> None:
    found = Flops(6_000_000, 4_000_000).utilization(1_000_000, peak=24e12)
    assert found == pytest.approx({"mfu_dense_equivalent": 0.25, "mfu_real": 1 / 6})
    assert found.keys() < {*metrics.CLOCK}


def test_a_run_that_linearizes_has_no_count_of_operations() -> None:
    config = configs.load(str(RECIPE), [*small("llama3-8b"), "method=linearize", "linearize.window=8"])
    model = build_model(run_model_config(config), device="meta")
    apply(model, config, phases_of(config).end)
    assert flops(model, config) is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),  # fewer cores
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a part of one
        ("NVIDIA H800", None),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_the_peak_is_that_of_a_known_gpu_or_none(name: str, tera: float | None) -> None:
    assert dense_peak(name, "bf16") == (tera and pytest.approx(tera * 1e12))
    assert dense_peak(name, "fp32") is None
