"""`slope pretrain RECIPE --dry-run`: what would be trained, without a GPU, without data, without memory for it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedModel

from slope_cli.config import load as configs
from slope_cli.config.schema import Config
from slope_cli.methods import phases
from slope_cli.models.accounting import Account, account
from slope_cli.models.build import build_model, run_model_config
from slope_cli.report.tables import bytes_text
from slope_cli.train import dry_run_linearize, init
from sparse_kernels import LayerReport, Report


def describe(config: Config) -> tuple[dict[str, Any], list[str]]:
    """What a run would be: as a record for JSON, and as lines of YAML that can be loaded back, all else comments.

    Raises:
        UsageError: the config's parts do not fit together.
    """
    if config.method == "linearize":
        return dry_run_linearize.describe(config)
    model = build_model(run_model_config(config), device="meta")
    report = phases.plan(config, model)
    counts = account(config, report, model)
    comments = ["", *_layers(report), "", *_begins_with(config, model), *_numbers(config, counts)]
    record = {
        "config": OmegaConf.to_container(OmegaConf.structured(config)),
        "layers": [asdict(layer) for layer in report.layers] if report is not None else [],
        "account": asdict(counts),
    }
    return record, [*configs.dump(config).splitlines(), *(f"# {line}".rstrip() for line in comments)]


def _layers(report: Report | None) -> list[str]:
    """The layer table in the model's order: neighbouring blocks whose layer is alike share a line."""
    if report is None:
        return ["linear layers: all dense"]
    by_name: dict[str, list[tuple[int, LayerReport]]] = {}
    for layer in report.layers:
        parts = layer.name.split(".")
        block = next((int(part) for part in parts if part.isdigit()), -1)
        by_name.setdefault(".".join("*" if part.isdigit() else part for part in parts), []).append((block, layer))
    lines = [
        f"{len(report.swapped)} of {len(report.layers)} linear layers are {report.pattern} sparse",
        f"{'layer':52}{'blocks':>9}{'out':>8}{'in':>8}  becomes",
    ]
    for name, found in by_name.items():
        for blocks, layer in _alike(found):
            became = f"dense: {layer.reason}" if layer.reason else f"sparse {layer.n}:{layer.m}"
            lines.append(f"{name:52}{blocks:>9}{layer.out_features:>8}{layer.in_features:>8}  {became}")
    return lines


def _begins_with(config: Config, model: PreTrainedModel) -> list[str]:
    """The line about model.init, if there is one."""
    if config.model.init is None:
        return []
    lacks = init.state(config.model.init, model)
    return [f"{'begins with':28}{config.model.init}" + (f", which {lacks}: training needs it" if lacks else "")]


def _alike(found: Sequence[tuple[int, LayerReport]]) -> Iterator[tuple[str, LayerReport]]:
    """Runs of consecutive blocks with equal layers, as "0-63", "0", or "" outside the blocks."""

    def kind(place: int) -> tuple[object, ...]:
        block, layer = found[place]
        return block - place, layer.out_features, layer.in_features, layer.reason, layer.n, layer.m

    for _, group in groupby(range(len(found)), key=kind):
        places = list(group)
        first, last = found[places[0]][0], found[places[-1]][0]
        yield "" if first < 0 else str(first) if first == last else f"{first}-{last}", found[places[0]][1]


def _numbers(config: Config, a: Account) -> list[str]:
    train = config.train
    state, dense = sum(a.state_bytes.values()), sum(a.dense_state_bytes.values())
    adapters = "none"
    if config.adapter_step is not None:
        adapters = f"{a.adapter_parameters:,} parameters after step {config.adapter_step:,}"
    rows: list[tuple[str, Any]] = [
        ("steps", f"{train.steps:,} of {train.tokens_per_step:,} tokens ({train.accumulation} micro-batches)"),
        ("tokens in all", f"{train.steps * train.tokens_per_step:,}"),
        ("parameters, dense model", f"{a.dense_parameters:,}"),
        ("parameters trained", f"{a.trained_parameters:,}"),
        ("adapters", adapters),
        ("training state", f"{bytes_text(state)}, {state / dense:.3f} of the dense run's {bytes_text(dense)}"),
        *((f"  {name}", bytes_text(size)) for name, size in a.state_bytes.items() if size),
        *(
            [(f"  before step {config.sparse_step:,}", f"{bytes_text(dense)}, dense")]
            if config.method == "slope" and config.sparse_step
            else []
        ),
        *((f"beside it {name}", bytes_text(size)) for name, size in a.derived_bytes.items() if size),
        (
            "activations, estimate",
            f"{bytes_text(a.activation_bytes)} for {train.micro_batch} x {train.seq_len} tokens in 16 bits",
        ),
        ("FLOP a token", f"{a.dense_flops_per_token:.3e} dense-equivalent, {a.real_flops_per_token:.3e} real"),
        *([("  adapters, once joined", f"{a.adapter_flops_per_token:.3e}")] if a.adapter_flops_per_token else []),
    ]
    return [f"{name:28}{value}" for name, value in rows]
