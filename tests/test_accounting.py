"""What a dry run counts is what a run holds: against the tensors of real models, and against counts by hand."""

import pytest
import torch
from trained import defaults, small

from slope_cli.checkpoint import run_model, store
from slope_cli.config import load as configs
from slope_cli.config.schema import Config
from slope_cli.methods import optim, phases
from slope_cli.models.accounting import Account, account
from slope_cli.models.build import build_model, run_model_config
from sparse_kernels import add_adapters

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["gpt2-nano", "opt-125m", "llama3-8b", "bert-base"]


def counted(config: Config) -> Account:
    model = build_model(run_model_config(config), device="meta")
    return account(config, phases.plan(config, model), model)


def stepped(config: Config) -> dict[str, torch.Tensor]:
    """All that a run keeps after a step with adapters, by the names of checkpoints."""
    model, report = run_model.build(config, "cpu")
    optimizer = optim.build_optimizer(model, config)
    if report is not None and config.adapter_step is not None:
        adapters = add_adapters(model, config.adapters.rank)
        optim.add_adapter_group(optimizer, [p for a in adapters.values() for p in a.parameters()], config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return store.state_tensors(model, optimizer)


def size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("method=dense",),
        ("adapters.rank=0",),
        ("adapters.rank=0.2", "sparsity.n=1", "sparsity.m=2"),
        # Sides that are no multiples of 8: their positions are padded to whole bytes.
        ("sparsity.n=1", "sparsity.m=3", "model.overrides.{ffn}=60"),
    ],
)
def test_parameters_and_bytes_are_those_of_the_tensors(family: str, more: tuple[str, ...]) -> None:
    ffn = {"gpt2-nano": "n_inner", "opt-125m": "ffn_dim"}.get(family, "intermediate_size")
    words = [word.format(ffn=ffn) for word in more]
    if "sparsity.m=3" in words:
        words.append(f"model.overrides.{'n_embd' if family == 'gpt2-nano' else 'hidden_size'}=36")
    config = configs.load(str(defaults()), [*small(family), *words])
    counts, tensors = counted(config), stepped(config)
    adapters = {name: t for name, t in tensors.items() if ".adapter." in name}
    positions = {name: t for name, t in tensors.items() if ".positions" in name}
    weights = {name: t for name, t in tensors.items() if name.startswith("model.")}
    weights = {name: t for name, t in weights.items() if name not in adapters and name not in positions}
    moments = {name: t for name, t in tensors.items() if name.endswith((".exp_avg", ".exp_avg_sq"))}
    moments = {name: t for name, t in moments.items() if name not in adapters}
    assert sum(t.numel() for t in weights.values()) == counts.trained_parameters
    assert counts.state_bytes == {
        "weights (float32)": size(weights),
        "gradients (float32)": size(weights),
        "AdamW moments": size(moments),
        "positions": size(positions),
        # In a checkpoint each has its two moments; in memory also its gradient.
        "adapters with their state": size(adapters) * 4 // 3,
    }
    assert size(tensors) == size(weights) + size(moments) + size(positions) + size(adapters) + size(
        {"step": tensors["optim.step"]}
    )
    assert sum(t.numel() for name, t in adapters.items() if name.startswith("model.")) == counts.adapter_parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_run_is_counted_as_one(family: str) -> None:
    sparse = counted(configs.load(str(defaults()), small(family)))
    dense = counted(configs.load(str(defaults()), [*small(family), "method=dense"]))
    assert dense.dense_parameters == dense.trained_parameters == sparse.dense_parameters > sparse.trained_parameters
    assert sum(dense.state_bytes.values()) == sum(dense.dense_state_bytes.values())
    assert dense.real_flops_per_token == dense.dense_flops_per_token == sparse.dense_flops_per_token


def test_flops_of_gpt2_against_a_count_by_hand() -> None:
    # Width 32, 2 blocks, 272 ids, 32 positions in use; 2 FLOP a multiply-add; forward, input gradient, weight gradient.
    counts = counted(configs.load(str(defaults()), small("gpt2-nano")))
    block = 32 * 96 + 32 * 32 + 32 * 128 + 128 * 32
    attention = 2 * 32 * 32 * 2  # of one token with 32 others: scores and weighted sum, over a width of 32
    assert counts.dense_flops_per_token == 3 * (2 * (2 * block + 32 * 272) + 2 * attention // 2)
    sparse = 2 * block - 32 * 96  # the first block's c_attn and the head stay dense
    assert counts.real_flops_per_token == counts.dense_flops_per_token - 2 * 2 * sparse // 2
    assert counts.adapter_flops_per_token == 6 * counts.adapter_parameters


def test_flops_of_llama_leave_out_the_lookup_and_those_of_bert_see_both_sides() -> None:
    llama = counted(configs.load(str(defaults()), small("llama3-8b")))
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    assert llama.dense_flops_per_token == 6 * (2 * block + 32 * 272) + 6 * 2 * 32 * 32
    bert = counted(configs.load(str(defaults()), small("bert-base")))
    heads = 32 * 32 + 32 * 32 + 32 * 272 + 2 * 32  # pooler, transform, decoder, next sentence
    assert bert.dense_flops_per_token == 6 * (2 * (4 * 32 * 32 + 2 * 32 * 64) + heads) + 12 * 2 * 32 * 32


def test_the_counts_do_not_depend_on_the_device() -> None:
    config = configs.load(str(defaults()), small("opt-125m"))
    model = build_model(run_model_config(config))
    assert account(config, phases.plan(config, model), model) == counted(config)


def test_a_published_model_has_its_published_size() -> None:
    published = configs.load("gpt2-small", ["model.overrides.vocab_size=50257"])
    assert counted(published).dense_parameters == 124_439_808
