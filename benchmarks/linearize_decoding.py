"""The measurements of `slope bench linearize`: decoding with linearized against softmax attention of one model.

    python -m slope_cli.benchmarks.measure linearize llama-small

Both sides are one model with random weights, in its two modes, and decode greedily in one loop over
model(ids, past_key_values=…), replayed from a CUDA graph; speed does not depend on the weights. The softmax side is the
fastest that torch's fused attention knows: keys and values lie in a full buffer of their final length, without a mask
and without copies as it grows. Caches are filled with random numbers; the cost of a prompt is not part of a step.

Shape suffixes: B sequences, G KV heads, T tokens, D head dimension, V vocabulary.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from slope_cli.checkpoint import base_model, load, run_folder
from slope_cli.config.methods import LinearizeConfig
from slope_cli.config.schema import Config
from slope_cli.errors import UsageError
from slope_cli.linearize import saved
from slope_cli.linearize.cache import LinearWindowCache
from slope_cli.linearize.swap import linear_windows, linearize_attention, using
from slope_cli.methods import phases_of
from slope_cli.methods.accounting import attention_memory
from slope_cli.models import shapes
from slope_cli.models.build import build_model, model_config
from slope_cli.train.linearize_steps import TransferStep
from sparse_kernels import peft

from .records import DecodeMemory, DecodeRow
from .timing import Peak, Timing, free, one_line, random_model, synchronize

SMALL = "llama-small"
_SMALL = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048, "vocab_size": 32000}
_SMALL |= {"num_attention_heads": 12, "num_key_value_heads": 12}
DEFAULT = (SMALL, "llama3-8b")
"""GPT-2 small's size with rotary positions, and a large model with few KV heads."""
SIDES = ("softmax", "linear", "linear compiled")
LONGEST = 16384
"""Tokens up to which every model has positions here."""
CLOSE = 0.03
"""The relative precision of the largest batch."""
TIMING = Timing(warm_up=2, rounds=5, round_seconds=0.05, most_calls=50)


@dataclass(frozen=True)
class Sweep:
    """Lengths in tokens, up to LONGEST, and batches in sequences, at which a model is measured."""

    lengths: Sequence[int] = (512, 2048, 4096, 8192, 16384)
    batches: Sequence[int] = (1, 16)
    largest_lengths: Sequence[int] = (4096, 16384)
    transfer_lengths: Sequence[int] = (1024, 2048, 4096, 8192)


SWEEP = Sweep()


@dataclass(frozen=True)
class Subject:
    """A model to decode with: its shape, the form of its linearized layers, and its parts that are not timed."""

    name: str
    config: PreTrainedConfig
    settings: LinearizeConfig
    note: str = ""


def subject(name: str) -> Subject:
    """The model of this name: a shape, a run, or a folder of transformers.

    Raises:
        UsageError: none of these, or a model that does not predict the next token.
        SlopeError: files that cannot be read.
    """
    folder, settings, note = Path(name), LinearizeConfig(), ""
    if name == SMALL:
        config = model_config("llama3-8b", overrides=_SMALL, dropout=0.0)
    elif name in shapes.SHAPES:
        config = model_config(name, dropout=0.0)
    elif run_folder.is_run(folder):
        config, settings, note = _of_run(folder)
    elif (folder / "config.json").is_file():
        config, maps = load.shape_of(folder), folder / saved.FOLDER
        settings = saved.settings(maps) if maps.is_dir() else settings
        note = _left_out(False, (folder / peft.FOLDER).is_dir())  # only the weights show whether they are sparse
    else:
        raise UsageError(f"{name}: neither a run nor a model folder; shapes are {SMALL}, {', '.join(shapes.SHAPES)}")
    if shapes.family_of(config).objective != "causal":
        raise UsageError(f"{name}: predicts masked tokens and cannot decode; choose a causal model")
    config._attn_implementation = "sdpa"
    # The weights are random, so the model may have positions for all lengths here.
    positions = shapes.FAMILIES[config.model_type].positions
    setattr(config, positions, max(config.max_position_embeddings, LONGEST))
    return Subject(folder.resolve().name if folder.is_dir() else name, config, settings, note)


def _of_run(folder: Path) -> tuple[PreTrainedConfig, LinearizeConfig, str]:
    config = run_folder.open_config(folder)
    phases = phases_of(config)
    adapted, sparse = phases.end.adapters, phases.end.layers.kind in ("sparse", "masked")
    if phases.end.linearized:
        base = base_model.description(folder)
        adapted, sparse = adapted or bool(base["adapters"]), bool(base["sparse"])
    settings = config.linearize
    shape = load.shape_of(folder)
    if settings.chosen:  # which layers, or heads, keep softmax makes no difference in bytes, and little in time
        heads = shapes.kv_heads(shape)
        kept = [f"{n // heads}/{n % heads}" if settings.by_heads else n for n in range(settings.chosen)]
        settings = replace(settings, keep_softmax=kept)
    return shape, settings, _left_out(sparse, adapted)


def _left_out(sparse: bool, adapted: bool) -> str:
    parts = ["sparse layers"] * sparse + ["adapters"] * adapted
    return f"timed as a dense model, without its {' and '.join(parts)}" if parts else ""


def memory_row(chosen: Subject) -> DecodeMemory:
    """The bytes of the cache of one sequence; nothing is allocated."""
    model = build_model(chosen.config, device="meta")
    linearize_attention(model, chosen.settings)
    memory = attention_memory(model)
    softmax = memory.cache_bytes_per_token
    return DecodeMemory(
        model=chosen.name,
        note=chosen.note,
        layers=memory.layers,
        linear_layers=memory.linear_layers,
        window=chosen.settings.window,
        kind=chosen.settings.kind,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear_bytes=memory.state_bytes,
        softmax_bytes=softmax,
        kept_bytes=memory.kept_bytes_per_token,
        break_even=memory.break_even,
    )


class FullLayer(DynamicLayer):  # type: ignore[misc]
    """A softmax layer's full cache of one length: a new token replaces the oldest, and all are attended to."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values
        self.place_1 = torch.zeros(1, dtype=torch.long, device=keys.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one token in place, and return all keys and values."""
        self.keys.index_copy_(2, self.place_1, key_states)
        self.values.index_copy_(2, self.place_1, value_states)
        self.place_1.add_(1).remainder_(self.keys.shape[2])
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys that a query sees, and the place of the first."""
        return int(self.keys.shape[2]), 0


def build(chosen: Subject, device: torch.device) -> Any:
    """The linearized model with random weights; 16-bit on a GPU, but for maps and mix factors."""
    model = random_model(chosen.config, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    linearize_attention(model, chosen.settings)
    return model.eval().requires_grad_(False)


def filled_cache(model: Any, side: str, batch: int, length: int) -> Cache:
    """A cache of random numbers, as large as after `length` tokens."""
    dtype, device = model.get_input_embeddings().weight.dtype, model.device
    windows = {model.get_submodule(name).layer_idx: window for name, window in linear_windows(model).items()}
    config = model.config
    heads = shapes.kv_heads(config)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers: list[Any] = []
    for index in range(config.num_hidden_layers):
        if side == "softmax" or index not in windows:
            shape = (batch, heads, length, dim)
            layers.append(FullLayer(*(torch.empty(shape, dtype=dtype, device=device).normal_() for _ in range(2))))
            continue
        cache: LinearWindowCache = windows[index].new_cache()
        nothing_BGTD = torch.empty(batch, heads, 0, dim, dtype=dtype, device=device)
        cache.lazy_initialization(nothing_BGTD, nothing_BGTD)
        for tensor in (cache.keys, cache.values):
            tensor.normal_()
        for name in ("softmax_keys", "softmax_values") if cache.softmax_heads else ():
            kept = torch.randn(batch, len(cache.softmax_heads), length, dim, dtype=dtype, device=device)
            setattr(cache, name, kept)
        cache.state_BGFE.uniform_()
        cache.keep_BW.fill_(True)
        cache.tokens_B.fill_(length)
        cache.seen = length
        layers.append(cache)
    return Cache(layers=layers)


class Decoder:
    """Greedy decoding of `batch` sequences of `length` tokens, a step at a time.

    Attributes:
        graphed: whether a step is replayed from a CUDA graph; that of a terrace, an exact cache and heads with softmax
            is not, since their memory makes new tensors.
        remembered: bytes of the cache.
    """

    def __init__(
        self, model: Any, side: str, batch: int, length: int, *, graphed: bool, timing: Timing = TIMING
    ) -> None:
        self._model, self._side = model, side
        self._limit = model.config.max_position_embeddings
        self._ids_B1 = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self._positions_11 = torch.full((1, 1), min(length, self._limit - 1), device=model.device)
        self._cache = filled_cache(model, side, batch, length)
        self.remembered = sum(_nbytes(layer) for layer in self._cache.layers)
        self.graphed = False
        for _ in range(timing.warm_up):
            self.run()
        if graphed and not any(x.pattern.blockwise or x.softmax_heads for x in linear_windows(model).values()):
            self._capture()

    def run(self) -> None:
        """Take a step: each sequence's likeliest next token becomes its input."""
        softmax, compiled = self._side == "softmax", self._side.endswith("compiled")
        with torch.no_grad(), using(self._model, mode="softmax" if softmax else "linear", compiled=compiled):
            inputs = {"position_ids": self._positions_11.expand_as(self._ids_B1), "past_key_values": self._cache}
            logits_B1V = self._model(input_ids=self._ids_B1, use_cache=True, **inputs).logits
            self._ids_B1.copy_(logits_B1V.argmax(-1))
            self._positions_11.add_(1).remainder_(self._limit)

    def _capture(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has memory of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.run()
        self.run, self.graphed = graph.replay, True  # type: ignore[method-assign]
        self.run()


def _nbytes(layer: Any) -> int:
    return int(layer.nbytes() if isinstance(layer, LinearWindowCache) else layer.keys.nbytes + layer.values.nbytes)


def rows(name: str, device: torch.device, sweep: Sweep = SWEEP, timing: Timing = TIMING) -> Iterator[DecodeRow]:
    """All rows of one subject: the largest batches first, then speed by length, then the memory of transfer."""
    chosen = subject(name)
    try:
        model = build(chosen, device)
    except Exception as error:
        yield DecodeRow(model=chosen.name, part="largest", error=one_line(error))
        return
    compiled = device.type == "cuda"  # as in `slope linearize`
    points = itertools.product(sweep.batches, sweep.lengths)
    measured = itertools.chain(
        *(largest_rows(model, chosen, length, timing) for length in sweep.largest_lengths),
        *(speed_rows(model, batch, length, timing=timing) for batch, length in points),
        (transfer_row(model, length, compiled=compiled, timing=timing) for length in sweep.transfer_lengths),
    )
    yield from (replace(row, model=chosen.name) for row in measured)


def speed_rows(
    model: Any, batch: int, length: int, part: str = "speed", sides: Sequence[str] = SIDES, timing: Timing = TIMING
) -> Iterator[DecodeRow]:
    """The speed of each side."""
    for side in sides:
        row = DecodeRow(part=part, side=side, batch=batch, length=length)
        try:
            yield _timed(model, row, timing)
        except Exception as error:  # the other sides are still measured
            yield replace(row, error=one_line(error))
        free()


def _timed(model: Any, row: DecodeRow, timing: Timing) -> DecodeRow:
    assert row.batch is not None
    assert row.length is not None
    peak, decoder, note = Peak(model.device), None, ""
    make = functools.partial(Decoder, model, row.side, row.batch, row.length, timing=timing)
    if model.device.type == "cuda":
        try:
            decoder = make(graphed=True)
        except Exception as error:
            note = f"without a CUDA graph: {one_line(error)}"
    if decoder is None:  # out here, where the error no longer holds what the first attempt allocated
        free()
        decoder = make(graphed=False)
    (seconds,) = timing.medians(decoder.run)
    row = replace(row, step_ms=seconds * 1e3, tokens_per_s=row.batch / seconds, graphed=decoder.graphed, note=note)
    return replace(row, remembered_bytes=decoder.remembered, peak_bytes=peak.total())


def largest_rows(model: Any, chosen: Subject, length: int, timing: Timing = TIMING) -> Iterator[DecodeRow]:
    """The largest batch of each side, then the speeds at the largest that both hold, and at linear's own."""
    largest: dict[str, int] = {}
    for side, size in zip(("softmax", "linear"), memory_row(chosen).remembered(length), strict=True):
        free()
        runs = functools.partial(_refusal, model, side, length=length, timing=timing)
        largest[side], limit = largest_batch(runs, torch.cuda.mem_get_info()[0] // size)
        row = DecodeRow(part="largest", side=side, length=length, batch=largest[side], limit=limit)
        yield replace(row, bytes_per_sequence=size)
    if min(largest.values()):
        yield from speed_rows(model, min(largest.values()), length, "both", timing=timing)
        if largest["linear"] > largest["softmax"]:
            yield from speed_rows(model, largest["linear"], length, "own", SIDES[1:], timing)


def largest_batch(refusal: Callable[[int], str], most: int) -> tuple[int, str]:
    """The largest batch that runs, to within CLOSE, or 0, and why the next one does not.

    Args:
        refusal: why a batch does not run, or nothing.
        most: an upper bound.
    """
    fits, fails, limit = 0, most + 1, ""
    while fails - fits > max(1, CLOSE * fits):
        batch = (fits + fails) // 2 if fits or fails < 3 else round(0.8 * fails)
        if reason := refusal(batch):
            fails, limit = batch, reason
        else:
            fits = batch
    return fits, limit


def _refusal(model: Any, side: str, batch: int, length: int, timing: Timing) -> str:
    """Why steps of this batch do not run, or nothing."""
    reason = ""
    try:
        Decoder(model, side, batch, length, graphed=False, timing=timing)
        synchronize()
    except (RuntimeError, MemoryError) as error:
        reason = one_line(error)
    free()
    return reason


def transfer_row(model: Any, length: int, *, compiled: bool, timing: Timing = TIMING) -> DecodeRow:
    """The peak of one step of attention transfer of one sequence, above weights and moments."""
    row = DecodeRow(part="transfer", length=length, compiled=compiled)
    maps = [parameter for window in linear_windows(model).values() for parameter in window.parameters()]
    try:
        for parameter in maps:
            parameter.requires_grad_(True)
        torch.compiler.reset()  # a run has one length: code compiled for another is not its own
        settings = Config()
        step = TransferStep(
            model,
            torch.optim.AdamW(maps),
            dtype=torch.bfloat16 if model.device.type == "cuda" else None,
            clip=settings.optim.clip,
            mse_weight=settings.linearize.mse_weight,
            entropy_weight=settings.linearize.entropy_weight,
            compiled=compiled,
        )
        batch = {"input_ids": torch.zeros(1, length, dtype=torch.long, device=model.device)}
        for _ in range(timing.warm_up):
            step([batch])
        peak = Peak(model.device)
        step([batch])
        return replace(row, peak_bytes=peak.above_start())
    except Exception as error:
        return replace(row, error=one_line(error))
    finally:
        for parameter in maps:
            parameter.grad = None
            parameter.requires_grad_(False)
        free()
