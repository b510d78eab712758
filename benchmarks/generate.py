"""The measurements of `slope bench generate`: what users get of the engine, variants of one model side by side.

    python -m slope_cli.benchmarks.measure generate opt-6.7b '{"batches": [1, 16]}'

All variants are timed in alternating rounds, each by the step of the engine itself: on a GPU its CUDA graph, and the
copy of the new tokens to the host. Weights are random; every text has the same number of tokens at every step.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from slope_cli.errors import UsageError
from slope_cli.inference.cache import AttentionCache, SoftmaxCache
from slope_cli.inference.decoder import Block, Decoder, Spec
from slope_cli.inference.sampling import Sampling, mode_of
from slope_cli.inference.slots import Slots
from slope_cli.linearize.linear_window import LinearWindow

from . import variants
from .records import GenerateRow, GeneratingModel, Plan
from .timing import Peak, Timing, copy_bandwidth, free, one_line
from .transformers_generate import transformers_rows
from .variants import TRANSFORMERS, Variants

DEFAULT = ("gpt2-small", "opt-1.3b", "opt-6.7b", "llama3-8b", "mistral-7b")
TIMING = Timing(warm_up=2, rounds=5, round_seconds=0.1, most_calls=100, heat_seconds=1.0)
GREEDY = Sampling(temperature=0)
MODE = mode_of([GREEDY], 0)
Attention = tuple[LinearWindow | None, ...]
"""Of each block its linearized attention, None where it has softmax."""


def model_entry(name: str, plan: Plan) -> GeneratingModel:
    """The entry of a model before it is measured.

    Raises:
        UsageError: a model or a plan that cannot be measured.
        SlopeError: files that cannot be read.
    """
    config, blocks, folder = variants.shape(name, plan.depth)
    variants.names(plan.variants, plan.against, trained=folder is not None)
    positions = Spec.of(config).positions
    if not 2 <= plan.context <= positions:
        raise UsageError(f"--context {plan.context}: must be from 2 to the {positions} positions of {name}")
    label = name if folder is None else folder.resolve().name
    return GeneratingModel(model=label, blocks=config.num_hidden_layers, all_blocks=blocks)


def rows(name: str, plan: Plan, device: torch.device, timing: Timing = TIMING) -> Iterator[GenerateRow]:
    """All rows of a model: its variants' first tokens, then steps by batch, then those of transformers if asked for."""
    config, _, folder = variants.shape(name, plan.depth)
    chosen = variants.names(plan.variants, plan.against, trained=folder is not None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    prompt = min(plan.prompt, Spec.of(config).positions)
    dense_ms: dict[int, float | None] = {}
    source = Variants(config, folder, device, dtype, max(plan.context, prompt))
    for row in engine_rows(chosen, replace(plan, prompt=prompt), source, timing):
        if (row.part, row.variant) == ("decode", "dense"):
            dense_ms[row.batch] = row.step_ms
        yield row
    del source
    free()
    for row in transformers_rows(config, plan, device, dtype) if TRANSFORMERS in plan.against else ():
        dense = dense_ms.get(row.batch)
        yield replace(row, dense_ms=dense, ratio=dense / row.step_ms if dense and row.step_ms else None)


def engine_rows(chosen: list[str], plan: Plan, source: Variants, timing: Timing) -> Iterator[GenerateRow]:
    """The rows of the engine's variants, "dense" among them; one that fails is not tried again."""
    decoders: dict[str, Decoder] = {}
    for name in chosen:
        try:
            decoders[name] = source.make(name)
        except Exception as error:  # the other variants are still measured
            yield GenerateRow(part="prefill", variant=name, tokens=plan.prompt, error=one_line(error))
        free()
    bandwidth = copy_bandwidth(source.dense.tokens.device)
    parts = [("prefill", 1, plan.prompt), *(("decode", batch, plan.context) for batch in plan.batches)]
    for part, batch, tokens in parts:
        for row in _compared(decoders, part, batch, tokens, timing, bandwidth):
            if row.error:  # it would fail for more texts, too, and a CUDA graph that fails may harm those after it
                del decoders[row.variant]
            yield row
        free()


@dataclass
class _Measured:
    """One variant's work, and its row without times."""

    row: GenerateRow
    work: Callable[[], object]


def _compared(
    decoders: dict[str, Decoder], part: str, batch: int, tokens: int, timing: Timing, bandwidth: float
) -> Iterator[GenerateRow]:
    """The rows of all variants, timed in alternating rounds; those that fail come first."""
    memories: dict[Attention, list[AttentionCache]] = {}  # variants of the same attention share them
    ready: list[_Measured] = []
    for name, decoder in [*decoders.items()]:
        row = GenerateRow(part=part, variant=name, tokens=tokens, batch=batch, weight_bytes=weight_bytes(decoder))
        fault = ""
        try:
            ready.append(_prepared(decoder, row, memories, timing))
        except Exception as error:  # the other variants are still measured
            fault = one_line(error)
        if fault:  # out here, where the error no longer holds what was allocated
            free()
            yield replace(row, error=fault)
    times = timing.medians(*(each.work for each in ready)) if ready else []
    dense_s = next((s for s, each in zip(times, ready, strict=True) if each.row.variant == "dense"), None)
    for seconds, each in zip(times, ready, strict=True):
        size = each.row.read_bytes
        yield replace(
            each.row,
            step_ms=seconds * 1e3,
            dense_ms=None if dense_s is None else dense_s * 1e3,
            ratio=None if dense_s is None else dense_s / seconds,
            tokens_per_s=batch / seconds if part == "decode" else None,
            bound_ms=None if size is None else size / bandwidth * 1e3,
        )


def _prepared(
    decoder: Decoder, row: GenerateRow, memories: dict[Attention, list[AttentionCache]], timing: Timing
) -> _Measured:
    """The work of a row, done a few times, so that graphs are captured and kernels chosen."""
    kind = tuple(cast(Block, block).linear for block in decoder.blocks)
    caches = memories.get(kind) or decoder.caches(row.batch, row.tokens)
    remembered = sum(tensor.nbytes for cache in caches for tensor in cache.tensors())
    slots = Slots(decoder, row.batch, row.tokens, caches)
    ids = torch.randint(decoder.spec.vocabulary, (row.tokens,)).tolist()
    if row.part == "prefill":
        work: Callable[[], object] = functools.partial(first_token, slots, ids)
    else:
        if kind not in memories:
            fill(slots, ids[1:])
        slots.lengths.fill_(row.tokens - 1)  # and so they stay: there is room for one token more
        work = functools.partial(slots.step, row.batch, MODE)
        row = replace(row, read_bytes=read_bytes(decoder) + sum(map(_read, caches)))
    memories[kind] = caches
    peak = Peak(decoder.tokens.device)
    for _ in range(timing.warm_up):
        work()
    above = peak.above_start()
    total = None if above is None or row.weight_bytes is None else row.weight_bytes + remembered + above
    return _Measured(replace(row, remembered_bytes=remembered, peak_bytes=total), work)


def first_token(slots: Slots, ids: list[int]) -> int:
    """Read a prompt into the first slot: the token after it, on the host."""
    (token,) = slots.fill(0, [ids], [GREEDY], MODE).read()
    return token


def fill(slots: Slots, ids: list[int]) -> None:
    """Let every slot remember the same text."""
    first_token(slots, ids)
    for cache in slots.caches:
        for slot in range(1, slots.count):
            cache.move(0, slot, len(ids))


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of all that a decoder holds on its device."""
    return sum(_nbytes(tensor) for tensor in (*decoder.buffers(), *decoder.parameters()))


def read_bytes(decoder: Decoder) -> int:
    """Bytes of the weights that a step reads: all but the tables of which it takes a few rows."""
    tied = not isinstance(decoder.head, torch.nn.Module)  # the output head reads the whole table of tokens
    return weight_bytes(decoder) - decoder.positions.nbytes - (0 if tied else decoder.tokens.nbytes)


def _nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor, or of the parts of PyTorch's semi-structured one."""
    if isinstance(tensor, torch.sparse.SparseSemiStructuredTensor):
        return sum(part.nbytes for part in (tensor.packed, tensor.meta) if part is not None)
    return tensor.nbytes


def _read(cache: AttentionCache) -> int:
    """Bytes of it that a step of all its slots reads."""
    size = sum(tensor.nbytes for tensor in cache.tensors())
    if isinstance(cache, SoftmaxCache) and cache.window:
        places = cache.keys.shape[2]
        return size * min(cache.window, places) // places
    return size
