"""What `slope linearize` starts from, and what it would do: nothing is loaded, allocated or written here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from slope_cli.checkpoint import load, run_folder
from slope_cli.config import load as configs
from slope_cli.config.schema import INIT, Config
from slope_cli.errors import UsageError
from slope_cli.linearize.swap import linear_windows
from slope_cli.methods import phases
from slope_cli.models import shapes
from slope_cli.models.accounting import position_bytes
from slope_cli.models.build import build_model, run_model_config
from slope_cli.train.init import ALREADY
from sparse_kernels import LayerReport, adapters_of, extend_adapters

LONGEST = 1024
"""Tokens of a sequence for a model whose training length is not known."""
SEQUENCES = 8
SIZES = ("seq_len", "micro_batch", "tokens_per_step")


def words(init: Path, recipe: str = "linearize", run: Path | None = None) -> list[str]:
    """KEY=VALUE words for linearizing a run or a folder: its shape, its data, and sequences as long and as many as it
    had, unless the recipe says how many or how long.

    Args:
        run: what is to be trained. If it is there and began with `init`, the words are those it began with, though
            `init` may be gone, or spelled otherwise.

    Raises:
        UsageError: neither a run nor a model folder.
        SlopeError: a config.json that cannot be read.
    """
    if run is not None and run_folder.is_run(run) and _began_with(begun := run_folder.open_config(run), init):
        return _words(str(begun.model.init), begun.data.path, {name: getattr(begun.train, name) for name in SIZES})
    if run_folder.is_run(init):
        base = run_folder.open_config(init)
        path, length, sequences = base.data.path, base.train.seq_len, base.train.micro_batch
    else:
        path, length, sequences = None, min(_positions(init), LONGEST), SEQUENCES
    said = (yaml.safe_load(configs.recipe_text(recipe)) or {}).get("train") or {}
    length, sequences = said.get("seq_len", length), said.get("micro_batch", sequences)
    sizes = {"seq_len": length, "micro_batch": sequences, "tokens_per_step": length * sequences} | said
    return _words(str(init), path, sizes)


def _began_with(begun: Config, init: Path) -> bool:
    if begun.method != "linearize" or begun.model.init is None:
        return False
    return Path(begun.model.init).expanduser().resolve() == init.expanduser().resolve()


def _words(init: str, path: str | None, sizes: Mapping[str, int]) -> list[str]:
    found = [f"model.name={INIT}", f"model.init={json.dumps(init)}"]
    found += [f"data.path={json.dumps(path)}"] * (path is not None)
    return found + [f"train.{name}={sizes[name]}" for name in SIZES]


def _positions(folder: Path) -> int:
    found = load.settings(folder)
    return shapes.max_seq_len(found) if found.model_type in shapes.FAMILIES else LONGEST


@dataclass(frozen=True)
class Counts:
    """Of a run that linearizes, in numbers of parameters, bytes, and tokens."""

    frozen_parameters: int
    """Of the model that it starts from without what is pruned, and without the adapters that are trained on."""
    frozen_bytes: int
    """With the positions of what is kept."""
    map_parameters: int
    adapter_parameters: int
    """All that are trained, those of the model that it starts from among them."""
    pretrained_adapter_parameters: int
    """Those among them."""
    layers: int
    linear_layers: int
    state_bytes: int
    """As `remembered`, which says both."""
    cache_bytes_per_token: int

    @property
    def break_even(self) -> int:
        """Tokens from which on the linear layers remember less."""
        return -(-self.state_bytes // self.cache_bytes_per_token)


def describe(config: Config) -> tuple[dict[str, Any], list[str]]:
    """As `dryrun.describe`, of a run that linearizes.

    Raises:
        UsageError: the config's parts do not fit together or the model.
    """
    counts = count(config)
    trained = 16 * (counts.map_parameters + counts.adapter_parameters)
    begins = "never" if config.adapter_step is None else f"after step {config.adapter_step:,}"
    old = f", {counts.pretrained_adapter_parameters:,} of them pretrained" * bool(counts.pretrained_adapter_parameters)
    train, frozen = config.train, "frozen" if _run(config) else "frozen, as if dense"
    rows = [
        ("steps", f"{train.steps:,} of {train.tokens_per_step:,} tokens ({train.accumulation} micro-batches)"),
        ("tokens in all", f"{train.steps * train.tokens_per_step:,}"),
        ("linear layers", f"{counts.linear_layers} of {counts.layers} attention layers"),
        (frozen, f"{counts.frozen_parameters:,} parameters, {counts.frozen_bytes:,} bytes"),
        ("maps and mix factors", f"{counts.map_parameters:,} parameters"),
        ("adapters", f"{counts.adapter_parameters:,} parameters, joining {begins}{old}"),
        ("training state", f"{counts.frozen_bytes + trained:,} bytes, {trained:,} of them of what is trained"),
        ("memory of a sequence", f"{counts.state_bytes:,} bytes; softmax's {counts.cache_bytes_per_token:,} a token"),
        ("break-even", f"{counts.break_even:,} tokens"),
    ]  # fmt: skip
    comments = ["", *(f"{name:28}{value}" for name, value in rows)]
    record = {"config": OmegaConf.to_container(OmegaConf.structured(config)), "layers": []}
    record["account"] = asdict(counts) | {"break_even": counts.break_even}
    return record, [*configs.dump(config).splitlines(), *(f"# {line}".rstrip() for line in comments)]


def count(config: Config) -> Counts:
    """Count a run without memory for it; errors as for `describe`."""
    model = build_model(_shape(config), device="meta")
    dense = sum(p.numel() for p in model.parameters())
    sparse = _sparse_layers(config, model)
    places = sum(layer.out_features * layer.in_features for layer in sparse)
    kept = sum(layer.out_features * layer.in_features * layer.n // layer.m for layer in sparse)
    old = {name: _size(adapter) for name, adapter in adapters_of(model).items()}
    phases.enter(model, config, phases.DENSE, phases.TRANSFER)
    windows = linear_windows(model).values()
    if config.adapter_step is not None:
        phases.enter(model, config, phases.TRANSFER, phases.ADJUST)
    trained = {name: adapter for name, adapter in adapters_of(model).items() if adapter.A.requires_grad}
    taken = sum(old.get(name, 0) for name in trained)
    frozen = dense - places + kept + sum(old.values()) - taken
    state, cache = remembered(model)
    return Counts(
        frozen_parameters=frozen,
        frozen_bytes=4 * frozen + sum(map(position_bytes, sparse)),
        map_parameters=sum(map(_size, windows)),
        adapter_parameters=sum(map(_size, trained.values())),
        pretrained_adapter_parameters=taken,
        layers=model.config.num_hidden_layers,
        linear_layers=len(windows),
        state_bytes=state,
        cache_bytes_per_token=cache,
    )


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _run(config: Config) -> Path | None:
    """The run that is linearized; None if it is a folder of transformers, or not said."""
    init = None if config.model.init is None else Path(config.model.init).expanduser()
    return init if init is not None and run_folder.is_run(init) else None


def _sparse_layers(config: Config, model: PreTrainedModel) -> Sequence[LayerReport]:
    """The layers that are sparse at the end of the run that is linearized, whose adapters `model`, dense, gets.

    A folder of transformers says of its weights no more than their shapes: none.
    """
    if (run := _run(config)) is None:
        return ()
    base = run_folder.open_config(run)
    report, last = phases.plan(base, model), phases.stage(base, base.train.steps - 1)
    if report is None or last.layers not in ("sparse", "masked"):
        return ()
    if last.adapters:
        extend_adapters(model, [layer.name for layer in report.swapped], base.adapters.rank)
    return report.swapped


def remembered(model: PreTrainedModel) -> tuple[int, int]:
    """What decoding one sequence in 16 bits takes, over the linearized layers: nothing is allocated.

    Returns:
        The bytes of their caches, windows and float32 states, at any length; the bytes that the same layers as softmax
        attention remember of each token.
    """
    linear = softmax = 0
    for window in linear_windows(model).values():
        groups, dim = window.map_k.weight.shape[:2]
        cache = window.new_cache()
        nothing_BGTD = torch.empty(1, groups, 0, dim, dtype=torch.bfloat16, device="meta")
        cache.lazy_initialization(nothing_BGTD, nothing_BGTD)
        linear += cache.nbytes()
        softmax += 2 * 2 * groups * dim
    return linear, softmax


def _shape(config: Config) -> PreTrainedConfig:
    """The config of the model to linearize, without its weights."""
    if config.model.name != INIT:
        return run_model_config(config)
    if config.model.init is None:
        raise UsageError("model.init=null: say which model to linearize, a run or a folder of transformers")
    init = Path(config.model.init).expanduser()
    if load.linearized(init):
        raise UsageError(f"{init}: {ALREADY}")
    found = load.settings(init)
    shapes.objective(found)
    found._attn_implementation = "sdpa"
    return found
