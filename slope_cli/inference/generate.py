"""`slope generate`: prompts of the command line, a file, standard input or a terminal, continued by the engine."""

import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
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
    samples: int = 1,
    compiled: bool = False,
    as_json: bool = False,
) -> None:
    """Print the continuation of each prompt, in order; of a single one on a terminal as it comes.

    Args:
        folder: a run, or a folder that transformers reads.
        prompt: the only one.
        file: of prompts, see `prompts_of`. Without it and `prompt` they are the lines of standard input; on a terminal
            each is asked for, and answered, until the input ends.
        samples: the texts for each prompt, with consecutive seeds.
        compiled: compile linearized attention's decoding step.
        as_json: print an object for each text, in a line.

    Raises:
        UsageError: a model or a prompt that cannot be continued, or no prompt.
        SlopeError: files that cannot be read.
    """
    if prompt is not None and file is not None:
        raise UsageError("give either a prompt or --batch FILE with prompts")
    if samples > 1 and sampling.temperature == 0:
        raise UsageError(f"--samples {samples}: with --temperature 0 all texts are the same")
    asks = prompt is None and file is None and sys.stdin.isatty()
    prompts = [] if asks else _given(prompt, file)
    loaded = load_model(folder, device)
    if compiled and not linear_windows(loaded.model):
        raise UsageError(f"{folder}: is not linearized, so there is nothing to compile; leave out --compile")
    longest = max((len(prompt_ids(loaded.tokenizer, text)) for _, text in prompts), default=1)
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        max_batch=max(1, min(samples * max(1, len(prompts)), LARGEST_BATCH)),
        max_length=None if asks else longest + sampling.tokens,
        compiled=compiled,
    )
    del loaded
    for wanted in _asked_for(engine, sampling, samples) if asks else [_submitted(engine, prompts, sampling, samples)]:
        _print(engine, wanted, as_json)


def _given(prompt: str | None, file: Path | None) -> list[tuple[str, str]]:
    """Where each prompt stands, and the prompt."""
    if prompt is not None:
        return [("prompt", prompt)]
    if file is not None:
        return list(prompts_of(file.read_bytes(), str(file), jsonl=file.suffix == ".jsonl"))
    prompts = list(prompts_of(sys.stdin.buffer.read(), "standard input"))
    if not prompts:
        raise UsageError("standard input: has no prompt; give one there, as an argument, or --batch FILE with prompts")
    return prompts


def _asked_for(engine: Engine, sampling: Sampling, samples: int) -> Iterator[deque[Generation]]:
    """The texts for each line that is entered on the terminal."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        if line.strip():
            try:
                yield _submitted(engine, [("prompt", line.rstrip("\r\n"))], sampling, samples)
            except UsageError as error:
                print(f"error: {error}", file=sys.stderr)


def _print(engine: Engine, generations: deque[Generation], as_json: bool) -> None:
    """Print texts when they are finished, in order; a single one on a terminal as it comes."""
    if len(generations) == 1 and not as_json and sys.stdout.isatty():
        print(generations[0].prompt, end="", flush=True)
        for _, piece in engine.stream():
            print(piece, end="", flush=True)
        print()
        return
    while generations:
        while not generations[0].finish_reason:
            engine.step()
        done = generations.popleft()
        print(_json(done) if as_json else f"{done.prompt}{done.text}", flush=True)


def prompts_of(content: bytes, name: str, *, jsonl: bool = False) -> Iterator[tuple[str, str]]:
    """Where it stands, and the prompt, of each line that is not empty: the line itself, or "prompt" of a JSON object.

    Raises:
        SlopeError: what is not text, or a line without a prompt; the message begins with `name`.
    """
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError:
        raise SlopeError(f"{name}: is not text in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        if not jsonl:
            yield place, line.removesuffix("\r")
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise SlopeError(f'{place}: is not a JSON object with "prompt", a text')
        yield place, entry["prompt"]


def _submitted(
    engine: Engine, prompts: Iterable[tuple[str, str]], sampling: Sampling, samples: int
) -> deque[Generation]:
    """Texts that wait, `samples` of each prompt."""
    submitted = deque[Generation]()
    for place, prompt in prompts:
        for number in range(samples):
            try:
                submitted.append(engine.submit(prompt, replace(sampling, seed=sampling.seed + number)))
            except UsageError as error:
                raise UsageError(f"{place}: {str(error).removeprefix('prompt: ')}") from None
    return submitted


def _json(done: Generation) -> str:
    speed = round(len(done.ids) / done.seconds, 2) if done.seconds else 0.0
    result = {"prompt": done.prompt, "text": done.text, "tokens": len(done.ids)}
    return json.dumps(result | {"finish_reason": done.finish_reason, "tokens_per_second": speed})
