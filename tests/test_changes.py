"""Norms by layer and the share of masks that changed, against what weights, gradients and masks say."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data import prepared
from support.ranks import Ranks
from support.runs import RECIPE, records, sized, slope, tiny
from torch import nn

from slope_cli.train.changes import Changes
from slope_cli.train.loop import Trainer, pretrain
from sparse_kernels import masked_layers, sparse_layers


def by_layer(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """The norm of each layer's tensors together."""
    squares: dict[str, float] = {}
    for name, tensor in tensors.items():
        layer = name.rpartition(".")[0]
        squares[layer] = squares.get(layer, 0.0) + tensor.double().square().sum().item()
    return {layer: math.sqrt(square) for layer, square in squares.items()}


def test_norms_are_those_of_accumulated_gradients_before_clipping_and_of_what_weights_changed(
    data: Path, tmp_path: Path
) -> None:
    t = Trainer(tiny(data, "optim.clip=0.01", "log.norms_every=1"), tmp_path / "run", torch.device("cpu"))
    assert t.config.train.accumulation() == 2
    t.model.train()
    named = dict(t.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    output, _ = t.train_step()
    changes = t.changes
    update, weight = by_layer({name: named[name].detach() - before[name] for name in named}), by_layer(before)
    assert min(update.values()) > 0
    assert changes.norms["update"] == pytest.approx(update, rel=1e-5)
    relative = {layer: norm / weight[layer] for layer, norm in update.items()}
    assert changes.norms["relative_update"] == pytest.approx(relative, rel=1e-5)
    # After one step the first moment is a tenth of the gradient, as it was clipped.
    used = by_layer({name: t.optimizer.state[p]["exp_avg"] / (1 - 0.9) for name, p in named.items()})
    gradient = {layer: norm * output.norm / 0.01 for layer, norm in used.items()}
    assert changes.norms["gradient"] == pytest.approx(gradient, rel=1e-3)
    assert math.hypot(*changes.norms["gradient"].values()) == pytest.approx(output.norm, rel=1e-5)
    t.batches.close()


def test_the_norms_of_attention_transfer_are_those_of_its_maps(finished: Path, tmp_path: Path) -> None:
    words = ("log.norms_every=1", "train.steps=4", "linearize.transfer=0.5", "linearize.window=8", "train.device=cpu")
    result = slope("linearize", finished, *words, "log.tensorboard=false", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    found = records(tmp_path / "run")
    norms = {r["step"]: r for r in found if r["kind"] == "norms"}
    total = {r["step"]: r["grad_norm"] for r in found if r["kind"] in ("train", "transfer")}
    assert norms.keys() == total.keys() == {1, 2, 3, 4}
    for step, record in norms.items():
        assert math.hypot(*record["gradient"].values()) == pytest.approx(total[step], rel=1e-4)
        assert max(record["update"].values()) > 0
    assert norms[1]["gradient"].keys().isdisjoint(norms[4]["gradient"])  # maps, then adapters


def test_a_failed_update_and_one_without_a_request_measure_nothing() -> None:
    layer = nn.Linear(4, 4)
    layer(torch.ones(1, 4)).sum().backward()
    off = Changes(layer, None)
    with off:
        pass
    assert (off.norms, off.masks_changed) == ({}, None)
    failed = Changes(layer, None, norms=True, masks=True)
    with pytest.raises(ZeroDivisionError), failed:
        raise ZeroDivisionError
    assert (failed.norms, failed.masks_changed) == ({}, None)
    assert not [kept for kept in vars(failed).values() if isinstance(kept, nn.Module)]  # an old model can be freed
    with (nothing := Changes(layer, None, masks=True)):
        pass
    assert nothing.masks_changed is None  # it has no masks


METHODS = {
    "slope": ("slope.mask_update_interval=2", "adapters.rank=0"),
    "slope, random": ("slope.mask_update_interval=2", "slope.backward_mask=random", "adapters.rank=0"),
    "sr_ste": ("method=sr_ste", "sr_ste.mask_update_interval=2"),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_share_of_changed_entries_is_that_of_the_masks(method: str, data: Path, tmp_path: Path) -> None:
    def masks(t: Trainer) -> torch.Tensor:
        own = [layer.backward_mask() for _, layer in sparse_layers(t.model)]
        own += [layer.mask for _, layer in masked_layers(t.model)]
        return torch.cat([mask.flatten() for mask in own]).clone()

    words = ("log.every=1", "train.steps=6", "optim.lr=0.05", "optim.warmup=1")
    t = Trainer(tiny(data, *words, *METHODS[method]), tmp_path / "run", torch.device("cpu"))
    t.model.train()
    shares: list[Any] = []
    for _ in range(6):
        before = masks(t)
        t.train_step()
        shares.append(t.changes.masks_changed)
        if t.changes.masks_changed is not None:
            assert t.changes.masks_changed == pytest.approx((before != masks(t)).double().mean().item(), rel=1e-12)
    assert [share is None for share in shares] == [True, False] * 3
    assert max(share for share in shares if share is not None) > 0.001
    t.batches.close()


def test_masks_are_measured_at_the_first_update_in_every_so_many_steps(data: Path, tmp_path: Path) -> None:
    words = (
        "log.every=5",
        "train.steps=12",
        "slope.mask_update_interval=2",
        "log.norms_every=4",
        "log.tensorboard=true",
    )
    pretrain(tiny(data, *words), tmp_path / "run")
    found = records(tmp_path / "run")
    assert [r["step"] for r in found if "masks_changed" in r] == [6, 10]
    norms = [r for r in found if r["kind"] == "norms"]
    assert [r["step"] for r in norms] == [4, 8, 12]
    assert "transformer.h.1.mlp.c_fc" in norms[0]["gradient"]
    assert "transformer.h.1.mlp.c_fc.adapter" in norms[1]["gradient"].keys() - norms[0]["gradient"].keys()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    own = events.Scalars("norms/relative_update/transformer.h.1.mlp.c_fc")
    assert [e.step for e in own] == [4, 8, 12]
    assert [e.value for e in own] == pytest.approx([r["relative_update"]["transformer.h.1.mlp.c_fc"] for r in norms])
    assert [e.step for e in events.Scalars("train/masks_changed")] == [6, 10]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layout"), [(2, "fsdp"), (2, "ddp"), (4, "hsdp")])
def test_split_weights_have_the_norms_and_the_masks_of_whole_ones(world: int, layout: str, tmp_path: Path) -> None:
    own = ("train.tokens_per_step=256", "model.dropout=0", "train.steps=4", "train.micro_batch=1", "log.every=1")
    own += ("log.norms_every=1", "log.val_every=0", "log.save_every=0", "adapters.start=0.5", "optim.lr=0.01")
    own += ("slope.mask_update_interval=1", "log.sample_every=0")
    pretrain(tiny(prepared(), *own), tmp_path / "one")
    words = [*own, f"distributed.layout={layout}", f"data.path={prepared()}", "--out", str(tmp_path / "split")]
    ranks = Ranks(world, ["pretrain", str(RECIPE), *sized("gpt2-nano"), *words], tmp_path / "logs")
    assert ranks.finish() == [0] * world, ranks.printed()
    pairs = zip(records(tmp_path / "one"), records(tmp_path / "split"), strict=True)
    compared = [(a, b) for a, b in pairs if a["kind"] in ("train", "norms")]
    assert len(compared) == 8
    for a, b in compared:
        if a["kind"] == "train":
            assert a["masks_changed"] > 0
            assert b["masks_changed"] == pytest.approx(a["masks_changed"], rel=0.02)
        else:
            for name in ("gradient", "update", "relative_update"):
                assert b[name] == pytest.approx(a[name], rel=5e-3)
