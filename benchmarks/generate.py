"""What `slope bench generate` measures: decoding with linearized attention against softmax attention of one model.

    python -m slope_cli.benchmarks.measure generate llama-small

Both are one model with random weights, in its two modes, and decode greedily in one loop over
model(ids, past_key_values=…), replayed from a CUDA graph; speed does not depend on the weights. The softmax side is the
fastest that torch's fused attention knows: keys and values lie in a buffer of their final length, full, with no mask
and no copies as it grows. Caches are filled with random numbers; a prompt's cost is not part of a step.

Shape suffixes: B sequences, G KV heads, T tokens, D head dimension, V vocabulary.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from slope_cli.benchmarks.machine import one_line
from slope_cli.checkpoint import base_model, load, run_folder
from slope_cli.checkpoint.hf_folder import ADAPTER
from slope_cli.config.schema import Config
from slope_cli.errors import UsageError
from slope_cli.linearize import saved
from slope_cli.linearize.cache import LinearWindowCache
from slope_cli.linearize.settings import LinearizeSettings
from slope_cli.linearize.swap import linear_windows, linearize_attention, using
from slope_cli.models import shapes
from slope_cli.models.build import build_model, model_config, run_model_config
from slope_cli.train import dry_run_linearize
from slope_cli.train.linearize_steps import TransferStep
from slope_cli.utils.files import read_sealed

Row = dict[str, Any]

SMALL = "llama-small"
_SMALL: Row = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048, "vocab_size": 32000}
_SMALL |= {"num_attention_heads": 12, "num_key_value_heads": 12}
DEFAULT = (SMALL, "llama3-8b")
"""GPT-2 small's size with rotary positions, and a large model with few KV heads."""
LENGTHS, BATCHES = (512, 2048, 4096, 8192, 16384), (1, 16)
LARGEST_LENGTHS = (4096, 16384)
TRANSFER_LENGTHS = (1024, 2048, 4096, 8192)
SIDES = ("softmax", "linear", "linear compiled")
CLOSE = 0.03
"""The largest batch is found to within this share."""
WARM_UP, ROUNDS, ROUND_SECONDS = 2, 5, 0.05


@dataclass(frozen=True)
class Subject:
    """A model to decode with: its shape, the form of its linearized layers, and what of it is not timed."""

    name: str
    config: PreTrainedConfig
    settings: LinearizeSettings
    note: str = ""


def subject(word: str) -> Subject:
    """A shape's name, a run or a folder of transformers: its shape, and its settings if it is linearized.

    Raises:
        UsageError: none of these, or a model that predicts no next token.
        SlopeError: files that cannot be read.
    """
    folder, settings, note = Path(word), LinearizeSettings(), ""
    if word == SMALL:
        config = model_config("llama3-8b", overrides=_SMALL, dropout=0.0)
    elif word in shapes.SHAPES:
        config = model_config(word, dropout=0.0)
    elif run_folder.is_run(folder):
        config, settings, note = _of_run(folder)
    elif (folder / "config.json").is_file():
        config, settings, note = _of_folder(folder)
    else:
        raise UsageError(f"{word}: is no run and no model folder; shapes are {SMALL}, {', '.join(shapes.SHAPES)}")
    if shapes.objective(config) != "causal":
        raise UsageError(f"{word}: predicts masked tokens and cannot decode; choose a causal model")
    config._attn_implementation = "sdpa"
    # Its weights are random anyway, so its positions may reach as far as the lengths here.
    positions = shapes.FAMILIES[config.model_type].positions
    setattr(config, positions, max(shapes.max_seq_len(config), *LENGTHS, *TRANSFER_LENGTHS))
    return Subject(folder.resolve().name if folder.is_dir() else word, config, settings, note)


def _of_run(folder: Path) -> tuple[PreTrainedConfig, LinearizeSettings, str]:
    config = run_folder.open_config(folder)
    adapted = config.adapter_step is not None
    if config.method != "linearize":
        return run_model_config(config), LinearizeSettings(), _left_out(config.method != "dense", adapted)
    description = read_sealed(folder / base_model.BASE)
    shape = base_model.rebuild(description | {"sparse": {}, "adapters": {}}, "meta").config
    note = _left_out(bool(description["sparse"]), adapted or bool(description["adapters"]))
    return shape, config.linear_attention, note


def _of_folder(folder: Path) -> tuple[PreTrainedConfig, LinearizeSettings, str]:
    config, maps = load.settings(folder), folder / saved.FOLDER
    note = _left_out(False, (folder / ADAPTER).is_dir())  # whether its weights are sparse, only they would say
    return config, saved.settings(maps) if maps.is_dir() else LinearizeSettings(), note


def _left_out(sparse: bool, adapted: bool) -> str:
    parts = ["sparse layers"] * sparse + ["adapters"] * adapted
    return f"timed as a dense model: its {' and '.join(parts)} are left out" if parts else ""


# ---------------------------------------------------------------------------------------------------------------------
# What is remembered, reckoned


def memory_row(chosen: Subject) -> Row:
    """Bytes that decoding remembers of one sequence in 16 bits; nothing is allocated.

    linear_bytes: of the linearized layers, at any length. softmax_bytes: of the same layers as softmax attention, of
    each token. kept_bytes: of the layers that stay softmax attention, of each token. break_even: the length from which
    on the linearized layers remember less.
    """
    model = build_model(chosen.config, device="meta")
    linearize_attention(model, chosen.settings)
    linear, softmax = dry_run_linearize.remembered(model)
    layers = chosen.config.num_hidden_layers
    each = softmax // len(linear_windows(model))
    row = {"model": chosen.name, "error": "", "note": chosen.note, "layers": layers}
    row |= {"linear_layers": len(linear_windows(model))}
    row |= {"window": chosen.settings.window, "kind": "terrace" if chosen.settings.terrace else "standard"}
    row |= {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    row |= {"linear_bytes": linear, "softmax_bytes": softmax, "kept_bytes": each * (layers - row["linear_layers"])}
    return row | {"break_even": -(-linear // softmax)}


# ---------------------------------------------------------------------------------------------------------------------
# A step


class FullLayer(DynamicLayer):  # type: ignore[misc]
    """A softmax layer's cache of one length, full: a new token takes the oldest place, and all are attended to."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values
        self.place_1 = torch.zeros(1, dtype=torch.long, device=keys.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Put one token in, in place; all keys and values."""
        self.keys.index_copy_(2, self.place_1, key_states)
        self.values.index_copy_(2, self.place_1, value_states)
        self.place_1.add_(1).remainder_(self.keys.shape[2])
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a query sees, and the first one's place."""
        return int(self.keys.shape[2]), 0


def build(chosen: Subject, device: torch.device) -> Any:
    """The model, linearized, with random weights drawn on the device; 16-bit on a GPU, but for maps and mixes."""
    model_class = getattr(transformers, shapes.FAMILIES[chosen.config.model_type].model_class)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
        with torch.device(device):
            model = model_class(chosen.config)
    finally:
        torch.set_default_dtype(before)
    linearize_attention(model, chosen.settings)
    return model.eval().requires_grad_(False)


def filled_cache(model: Any, side: str, batch: int, length: int) -> Cache:
    """A cache that remembers `length` tokens, or what linearized layers remember of them: random numbers."""
    dtype, device = model.get_input_embeddings().weight.dtype, model.device
    windows = {model.get_submodule(name).layer_idx: window for name, window in linear_windows(model).items()}
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
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
        cache.state_BGFE.uniform_()
        cache.keep_BW.fill_(True)
        cache.tokens_B.fill_(length)
        cache.seen = length
        layers.append(cache)
    return Cache(layers=layers)


class Decoder:
    """Greedy decoding of `batch` sequences of `length` tokens, a step at a time.

    Attributes:
        graphed: whether a step is replayed from a CUDA graph; a terrace's is not, since its cache makes new tensors.
        remembered: bytes of the cache.
    """

    def __init__(self, model: Any, side: str, batch: int, length: int, *, graphed: bool) -> None:
        self._model, self._side = model, side
        self._limit = shapes.max_seq_len(model.config)
        self._ids_B1 = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self._positions_11 = torch.full((1, 1), min(length, self._limit - 1), device=model.device)
        self._cache = filled_cache(model, side, batch, length)
        self.remembered = sum(_nbytes(layer) for layer in self._cache.layers)
        self.graphed = False
        for _ in range(WARM_UP):
            self.run()
        if graphed and not any(window.pattern.terrace for window in linear_windows(model).values()):
            self._capture()

    def run(self) -> None:
        """A step: each sequence's likeliest next token becomes its input."""
        mode = "softmax" if self._side == "softmax" else "linear"
        with torch.no_grad(), using(self._model, mode=mode, compiled=self._side.endswith("compiled")):
            words = {"position_ids": self._positions_11.expand_as(self._ids_B1), "past_key_values": self._cache}
            logits_B1V = self._model(input_ids=self._ids_B1, use_cache=True, **words).logits
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

    def seconds(self) -> float:
        """Median seconds of a step."""
        calls = max(1, min(50, round(ROUND_SECONDS / self._timed(1))))
        return statistics.median(self._timed(calls) for _ in range(ROUNDS))

    def _timed(self, calls: int) -> float:
        _synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            self.run()
        _synchronize()
        return (time.perf_counter() - started) / calls


def _nbytes(layer: Any) -> int:
    return int(layer.nbytes() if isinstance(layer, LinearWindowCache) else layer.keys.nbytes + layer.values.nbytes)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def rows(word: str, device: torch.device) -> Iterator[Row]:
    """All rows of one subject: the largest batches first, then speed by length, then the memory of transfer."""
    chosen = subject(word)
    try:
        model = build(chosen, device)
    except Exception as error:
        yield {"model": chosen.name, "part": "largest", "error": one_line(error)}
        return
    facts = {"model": chosen.name, "error": ""}
    for length in LARGEST_LENGTHS:
        yield from ({**facts, **row} for row in largest_rows(model, chosen, length))
    for batch in BATCHES:
        for length in LENGTHS:
            yield from ({**facts, **row} for row in speed_rows(model, batch, length))
    for length in TRANSFER_LENGTHS:
        # Compiled on a GPU, as in `slope linearize`.
        yield {**facts, **transfer_row(model, length, compiled=device.type == "cuda")}


def speed_rows(model: Any, batch: int, length: int, part: str = "speed", sides: Sequence[str] = SIDES) -> Iterator[Row]:
    """A row of each side: milliseconds of a step, tokens a second, bytes remembered and the allocator's peak."""
    for side in sides:
        row: Row = {"part": part, "side": side, "batch": batch, "length": length}
        try:
            yield row | _timed(model, side, batch, length)
        except Exception as error:  # whatever it is, the other sides go on
            yield row | {"error": one_line(error)}
        _free()


def _timed(model: Any, side: str, batch: int, length: int) -> Row:
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    decoder, note = None, ""
    if on_gpu:
        try:
            decoder = Decoder(model, side, batch, length, graphed=True)
        except Exception as error:
            note = f"without a CUDA graph: {one_line(error)}"
    if decoder is None:  # out here, where the error no longer holds what the first attempt allocated
        _free()
        decoder = Decoder(model, side, batch, length, graphed=False)
    seconds = decoder.seconds()
    row: Row = {"step_ms": seconds * 1e3, "tokens_per_s": batch / seconds, "graphed": decoder.graphed, "note": note}
    row |= {"remembered_bytes": decoder.remembered}
    return row | {"peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None}


def largest_rows(model: Any, chosen: Subject, length: int) -> Iterator[Row]:
    """The largest batch of each mode, then their speed at the largest that both hold, and at each one's own."""
    counts = memory_row(chosen)
    token_bytes = counts["softmax_bytes"] + counts["kept_bytes"]
    each = {"softmax": length * token_bytes, "linear": counts["linear_bytes"] + length * counts["kept_bytes"]}
    found: dict[str, int] = {}
    for side, size in each.items():
        _free()
        runs = functools.partial(_stopped, model, side, length=length)
        found[side], limit = largest_batch(runs, torch.cuda.mem_get_info()[0] // size)
        row: Row = {"part": "largest", "side": side, "length": length, "batch": found[side], "limit": limit}
        yield row | {"bytes_per_sequence": size}
    if min(found.values()):
        yield from speed_rows(model, min(found.values()), length, "both")
        if found["linear"] > found["softmax"]:
            yield from speed_rows(model, found["linear"], length, "own", SIDES[1:])


def largest_batch(runs: Callable[[int], str], most: int) -> tuple[int, str]:
    """The largest batch that runs, to within CLOSE, and what stopped the next one; 0 if not even one does.

    Args:
        runs: why a batch does not run, or nothing.
        most: no more than this can run.
    """
    fits, fails, limit = 0, most + 1, ""
    while fails - fits > max(1, CLOSE * fits):
        batch = (fits + fails) // 2 if fits or fails < 3 else round(0.8 * fails)
        if reason := runs(batch):
            fails, limit = batch, reason
        else:
            fits = batch
    return fits, limit


def _stopped(model: Any, side: str, batch: int, length: int) -> str:
    """Why steps of this batch do not run, or nothing."""
    reason = ""
    try:
        Decoder(model, side, batch, length, graphed=False)
        torch.cuda.synchronize()
    except (RuntimeError, MemoryError) as error:
        reason = one_line(error)
    _free()
    return reason


def transfer_row(model: Any, length: int, *, compiled: bool) -> Row:
    """The peak of one step of attention transfer of one sequence, above weights and moments: what its work needs."""
    row: Row = {"part": "transfer", "length": length, "compiled": compiled}
    on_gpu = model.device.type == "cuda"
    maps = [parameter for window in linear_windows(model).values() for parameter in window.parameters()]
    try:
        for parameter in maps:
            parameter.requires_grad_(True)
        torch.compiler.reset()  # a run has one length: what was compiled for another is not its own
        settings = Config()
        step = TransferStep(
            model,
            torch.optim.AdamW(maps),
            dtype=torch.bfloat16 if on_gpu else None,
            clip=settings.optim.clip,
            mse_weight=settings.linearize.mse_weight,
            entropy_weight=settings.linearize.entropy_weight,
            compiled=compiled,
        )
        batch = {"input_ids": torch.zeros(1, length, dtype=torch.long, device=model.device)}
        for _ in range(WARM_UP):
            step([batch])
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if on_gpu else 0
        step([batch])
        return row | {"peak_bytes": torch.cuda.max_memory_allocated() - held if on_gpu else None}
    except Exception as error:
        return row | {"error": one_line(error)}
    finally:
        for parameter in maps:
            parameter.grad = None
            parameter.requires_grad_(False)
        _free()
