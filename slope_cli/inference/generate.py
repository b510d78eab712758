"""`slope generate`: prompts of the command line or of a file, continued by the engine."""

import json
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch

from slope_cli.checkpoint.load import load_model
from slope_cli.errors import SlopeError, UsageError
from slope_cli.inference.engine import Engine, Generation
from slope_cli.inference.sampling import Sampling
from slope_cli.inference.text import prompt_ids
from slope_cli.linearize.swap import linear_windows

LARGEST_BATCH = 16
"""Texts that are continued at once."""


def generate(
    folder: Path,
    prompt: str | None,
    file: Path | None,
    sampling: Sampling,
    device: torch.device,
    *,
    compiled: bool = False,
    as_json: bool = False,
) -> None:
    """Print the continuation of a prompt, on a terminal as it comes, or of each prompt of a file, in order.

    Args:
        folder: a run, or a folder that transformers reads.
        file: see `read_prompts`; either it or `prompt` is None.
        compiled: compile linearized attention's decoding step.
        as_json: print an object for each prompt, in a line.

    Raises:
        UsageError: a model or a prompt that cannot be continued.
        SlopeError: files that cannot be read.
    """
    if (prompt is None) == (file is None):
        raise UsageError("give either a prompt or --batch FILE with prompts")
    prompts = [("prompt", prompt)] if prompt is not None else list(read_prompts(file or Path()))
    loaded = load_model(folder, device)
    if compiled and not linear_windows(loaded.model):
        raise UsageError(f"{folder}: is not linearized, so there is nothing to compile; leave out --compile")
    longest = max((len(prompt_ids(loaded.tokenizer, text)) for _, text in prompts), default=1)
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        max_batch=max(1, min(len(prompts), LARGEST_BATCH)),
        max_length=longest + sampling.tokens,
        compiled=compiled,
    )
    del loaded
    generations = deque(_submitted(engine, name, text, sampling) for name, text in prompts)
    if prompt is not None and not as_json and sys.stdout.isatty():
        print(prompt, end="", flush=True)
        for _, piece in engine.stream():
            print(piece, end="", flush=True)
        print()
        return
    while generations:
        while not generations[0].finish_reason:
            engine.step()
        done = generations.popleft()
        print(_json(done) if as_json else f"{done.prompt}{done.text}", flush=True)


def read_prompts(file: Path) -> Iterator[tuple[str, str]]:
    """Where it stands, and the prompt, of each line that is not empty: the line itself, or "prompt" of a .jsonl file.

    Raises:
        SlopeError: a file that is not text, or a line without a prompt.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise SlopeError(f"{file}: is not text in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        if file.suffix != ".jsonl":
            yield place, line.removesuffix("\r")
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise SlopeError(f'{place}: is not a JSON object with "prompt", a text')
        yield place, entry["prompt"]


def _submitted(engine: Engine, place: str, prompt: str, sampling: Sampling) -> Generation:
    try:
        return engine.submit(prompt, sampling)
    except UsageError as error:
        raise UsageError(f"{place}: {str(error).removeprefix('prompt: ')}") from None


def _json(done: Generation) -> str:
    speed = round(len(done.ids) / done.seconds, 2) if done.seconds else 0.0
    result = {"prompt": done.prompt, "text": done.text, "tokens": len(done.ids)}
    return json.dumps(result | {"finish_reason": done.finish_reason, "tokens_per_second": speed})
