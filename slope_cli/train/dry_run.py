"""`--dry-run`: describe a run without GPU, data, or memory for its weights; nothing is written."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from slope_cli.checkpoint import base_model, run_folder
from slope_cli.config import configs
from slope_cli.config.schema import Config
from slope_cli.distributed.layouts import GIB, Choice, Cluster, Memory, choices, choose
from slope_cli.methods import phases_of
from slope_cli.methods.accounting import (
    TEACHER,
    Account,
    AttentionMemory,
    RangeMemory,
    account,
    attention_memory,
    phase_sizes,
    range_memory,
    sizes_of,
)
from slope_cli.methods.apply import apply
from slope_cli.methods.phases import DENSE, Layers, Phases
from slope_cli.methods.sparse import report_layers
from slope_cli.models.build import build_model
from slope_cli.report.tables import bytes_text, counted
from slope_cli.train import init
from sparse_kernels import LayerReport, ModelReport

Row = tuple[str, str]
ADDED = {"additive": "maps and mix factors", "gated": "maps, mix factors, gates", "delta": "maps, shares, gates"}
"""What linearizing adds to a layer, by linearize.state."""
PARTS = [part.name.replace("_", " ") for part in fields(Memory)]


def describe(config: Config, gpus: tuple[int, float] | None = None) -> tuple[dict[str, Any], list[str]]:
    """Describe a run: a record for JSON, and lines of YAML that can be loaded back, with the rest as comments.

    Args:
        gpus: how many GPUs, and the GiB of each: also describe every layout of the run on them.

    Raises:
        UsageError: the config's parts do not fit together.
    """
    phases, model = phases_of(config), untrained_model(config)
    report = report_layers(config, phases, model)
    ranges = range_memory(model, config) if config.linearizes else None
    begins = _begins_with(config, model) if not config.linearizes else []
    counts = account(model, config)
    memory = attention_memory(model) if config.linearizes else None
    rows = [*begins, *_teacher(config), *_steps(config), *_phases(phases), *_products(phases)]
    rows += _linearized(config, counts, memory) if memory else _trained(config, counts)
    rows += _by_ranges(config, ranges) if ranges else []
    comments = [*([] if memory else ["", *_layers(report)]), "", *(f"{name:28}{value}" for name, value in rows)]
    clustered = None
    if gpus is not None:
        clustered, lines = _on_gpus(config, Cluster(gpus[0], min(8, gpus[0]), int(gpus[1] * GIB)))
        comments += ["", *lines]
    record = {
        "config": configs.container(config),
        "layers": [asdict(layer) for layer in report.layers] if report is not None else [],
        "account": asdict(counts),
        "attention": None if memory is None else asdict(memory) | {"break_even": memory.break_even},
        "ranges": None if ranges is None else asdict(ranges),
        "cluster": clustered,
    }
    return record, [*configs.dump(config).splitlines(), *(f"# {line}".rstrip() for line in comments)]


def _on_gpus(config: Config, cluster: Cluster) -> tuple[dict[str, Any], list[str]]:
    """Every layout of a run on GPUs, for the run's model and for the dense one, and what would be chosen."""
    micro_batches, mode = config.train.accumulation(cluster.world), config.train.activation_checkpointing
    model = untrained_model(config)
    dense = sizes_of(model, config)
    models = {"": phase_sizes(model, config)}
    if models[""] != [dense] and not config.linearizes:
        models["dense, "] = [dense]
    how: dict[str, Any] = {"layout": config.distributed.layout, "gather": config.distributed.gather}
    chosen = choose(models[""], cluster, micro_batches=micro_batches, activation_checkpointing=mode, **how)
    rows = {
        f"{which}{choice.layout}": choice
        for which, phases in models.items()
        for choice in choices(phases, cluster, activation_checkpointing=mode)
    }
    where = f"{cluster.world} GPUs of {cluster.memory / GIB:g} GiB, {cluster.gpus_per_node} in a node"
    lines = [
        f"on {where}, {_micro_batches(micro_batches)} each; GiB:",
        f"{'memory of a GPU':32}" + "".join(f"{name:>12}" for name in (*PARTS, "all")),
        *(f"{name:32}" + "".join(f"{size / GIB:12.2f}" for size in _parts(choice)) for name, choice in rows.items()),
        f"{'a GPU sends':32}{'micro-batch':>12}{'once a step':>12}{'a step':>12}{'fits':>12}",
        *(f"{name:32}" + _sent(choice, micro_batches) for name, choice in rows.items()),
    ]
    sizes = models[""][-1].activation_bytes
    each = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items()) or "not counted"
    lines.append(f"activations by train.activation_checkpointing: {each}")
    advice = "" if chosen.fits else f", which does not fit: it may use {cluster.usable / GIB:.1f}; try more GPUs, "
    advice += "" if chosen.fits else "a smaller train.micro_batch, or train.activation_checkpointing=block"
    lines.append(f"chosen: {chosen.layout}{advice}")
    record = asdict(cluster) | {"micro_batches": micro_batches, "chosen": str(chosen.layout), "fits": chosen.fits}
    return record | {"layouts": {name: asdict(choice) for name, choice in rows.items()}}, lines


def _parts(choice: Choice) -> list[int]:
    return [*asdict(choice.memory).values(), choice.memory.total]


def _sent(choice: Choice, micro_batches: int) -> str:
    traffic = choice.traffic
    sizes = (traffic.micro_batch, traffic.step, traffic.of_step(micro_batches))
    return "".join(f"{size / GIB:12.2f}" for size in sizes) + f"{'yes' if choice.fits else 'no':>12}"


def untrained_model(config: Config, run: Path | None = None) -> PreTrainedModel:
    """The model of a run on the meta device, as it is before its first phase.

    If model.init is to be linearized, a run's config tells which layers are sparse and have adapters; of a transformers
    folder only the shapes are known.

    Args:
        run: its folder, if it has begun.
    """
    if config.linearizes and run is not None and (run / base_model.BASE).is_file():
        return base_model.build(run, "meta")
    model = build_model(init.run_shape(config), device="meta")
    if config.linearizes and (base := _base_run(config)) is not None:
        step = run_folder.place(str(config.model.init))[1]
        end = phases_of(base).end if step is None else phases_of(base).at(step - 1)
        # As in linearizing: masked layers become sparse, unmasked ones dense.
        layers = {"masked": Layers("sparse"), "unmasked": DENSE}.get(end.layers.kind, end.layers)
        apply(model, base, replace(end, layers=layers))
    return model


def _base_run(config: Config) -> Config | None:
    """The config of the run that is linearized; None for a transformers folder, or without model.init."""
    folder = None if config.model.init is None else run_folder.place(config.model.init)[0]
    return run_folder.open_config(folder) if folder is not None and run_folder.is_run(folder) else None


def _layers(report: ModelReport | None) -> list[str]:
    """The layer table in the model's order: consecutive blocks with equal layers share a line."""
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
    for name, layers in by_name.items():
        for blocks, layer in _equal_blocks(layers):
            became = f"dense: {layer.reason}" if layer.reason else f"sparse {layer.n}:{layer.m}"
            lines.append(f"{name:52}{blocks:>9}{layer.out_features:>8}{layer.in_features:>8}  {became}")
    return lines


def _equal_blocks(layers: Sequence[tuple[int, LayerReport]]) -> Iterator[tuple[str, LayerReport]]:
    """Runs of consecutive blocks with equal layers, as "0-63", "0", or "" outside the blocks."""

    def kind(index: int) -> tuple[object, ...]:
        block, layer = layers[index]
        return block - index, layer.out_features, layer.in_features, layer.reason, layer.n, layer.m

    for _, group in groupby(range(len(layers)), key=kind):
        indices = list(group)
        (first, layer), (last, _) = layers[indices[0]], layers[indices[-1]]
        yield "" if first < 0 else str(first) if first == last else f"{first}-{last}", layer


def _teacher(config: Config) -> list[Row]:
    """The line about the teacher, if there is one."""
    if not config.learns_from_teacher:
        return []
    return [
        ("learns from", f"{config.teacher}, {config.distill.share:.0%} of the loss; its copy takes room on every GPU")
    ]


def _begins_with(config: Config, model: PreTrainedModel) -> list[Row]:
    """The line about model.init, if there is one."""
    if config.model.init is None:
        return []
    lacks = init.begins_with(config.model.init, model)
    return [("begins with", config.model.init + (f", which {lacks}: training needs it" if lacks else ""))]


def _steps(config: Config) -> list[Row]:
    train = config.train
    return [
        ("steps", f"{train.steps:,} of {train.tokens_per_step:,} tokens ({_micro_batches(train.accumulation())})"),
        ("tokens in all", f"{train.steps * train.tokens_per_step:,}"),
    ]


def _micro_batches(count: int) -> str:
    return counted(count, "micro-batch", "es")


def _phases(phases: Phases) -> list[Row]:
    """The phases of a run, if there are several."""
    names = [f"from step {phase.first + 1:,}: {phase.name}" for phase in phases.distinct]
    return [("phases", "; ".join(names))] if len(names) > 1 else []


def _products(phases: Phases) -> list[Row]:
    """Which products are sparse, in the last phase that has pruned layers."""
    pruned = [phase.layers for phase in phases.distinct if phase.layers.sparse_products]
    if not pruned:
        return []
    simulated = "; computed as dense ones, with zeros" * (pruned[-1].kind == "masked")
    return [("sparse products", f"{', '.join(pruned[-1].sparse_products)}{simulated}")]


def _trained(config: Config, a: Account) -> list[Row]:
    train, phases = config.train, phases_of(config)
    state, dense = sum(a.state_bytes.values()), sum(a.dense_state_bytes.values())
    adapters = "none"
    if phases.adapter_step is not None:
        adapters = f"{a.adapter_parameters:,} parameters after step {phases.adapter_step:,}"
    rows: list[Row] = [
        ("parameters, dense model", f"{a.dense_parameters:,}"),
        ("parameters trained", f"{a.trained_parameters:,}"),
        ("adapters", adapters),
        ("training state", f"{bytes_text(state)}, {state / dense:.3f} of the dense run's {bytes_text(dense)}"),
        *((f"  {name}", bytes_text(size)) for name, size in a.state_bytes.items() if size),
        *((f"beside it {name}", bytes_text(size)) for name, size in a.derived_bytes.items() if size),
    ]
    if a.activation_bytes is not None:
        size = f"{train.micro_batch} x {train.seq_len} tokens in 16 bits"
        size += f", checkpointing={train.activation_checkpointing}" * (train.activation_checkpointing != "none")
        rows.append(("activations, estimate", f"{bytes_text(a.activation_bytes)} for {size}"))
        flops = f"{a.dense_flops_per_token:.3e} dense-equivalent, {a.real_flops_per_token:.3e} real"
        rows.append(("FLOP a token", flops))
    if a.adapter_flops_per_token:
        rows.append(("  adapters, once joined", f"{a.adapter_flops_per_token:.3e}"))
    return rows


def _linearized(config: Config, a: Account, memory: AttentionMemory) -> list[Row]:
    phases = phases_of(config)
    begins = "never" if phases.adapter_step is None else f"after step {phases.adapter_step:,}"
    old = f", {a.pretrained_adapter_parameters:,} of them pretrained" * bool(a.pretrained_adapter_parameters)
    state = sum(a.state_bytes.values())
    teacher = a.state_bytes.get(TEACHER, 0)
    frozen_bytes = a.state_bytes.get("frozen (float32)", 0) + a.state_bytes["masks"]
    weights = ("frozen", f"{a.frozen_parameters:,} parameters, {frozen_bytes:,} bytes")
    if a.trained_parameters:
        weights = ("weights", f"{a.trained_parameters:,} parameters, trained after step {phases.end.first:,}")
    return [
        ("linear attention", f"in {memory.linear_layers} of {counted(memory.layers, 'layer')}"),
        (weights[0] if _base_run(config) else f"{weights[0]}, as if dense", weights[1]),
        *([("teacher", f"its own copy, {teacher:,} bytes")] if teacher else []),
        (ADDED[config.linearize.state], f"{a.map_parameters:,} parameters"),
        ("adapters", f"{a.adapter_parameters:,} parameters, joining {begins}{old}"),
        ("training state", f"{state:,} bytes, {state - frozen_bytes - teacher:,} of them of what is trained"),
        ("memory of a sequence", f"{memory.state_bytes:,} bytes; softmax's {memory.cache_bytes_per_token:,} a token"),
        *([("  where softmax stays", f"{kept:,} bytes a token")] if (kept := memory.kept_bytes_per_token) else []),
        ("break-even", f"{memory.break_even:,} tokens"),
    ]


def _by_ranges(config: Config, memory: RangeMemory) -> list[Row]:
    bits = 32 if config.train.precision == "fp32" else 16
    at_once = counted(config.linearize.layers_at_once, "layer")
    return [
        ("transfer", f"in {counted(memory.ranges, 'range')} of up to {at_once}"),
        ("  weights on the device", f"{bytes_text(memory.device_bytes)}, in float32"),
        ("  hidden states on disk", f"{bytes_text(memory.disk_bytes)} ({memory.disk_bytes:,} bytes), in {bits} bits"),
    ]
