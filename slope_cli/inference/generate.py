"""`slope generate`: prompts of the command line, a file, standard input or a terminal, continued by the engine.

In a chat each prompt is what the user says, and its continuation is the answer.
"""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from slope_cli.checkpoint.load import load_model
from slope_cli.errors import UsageError, is_utf8
from slope_cli.inference.engine import Engine, Generation
from slope_cli.inference.sampling import Sampling
from slope_cli.inference.text import chat_ids, prompt_ids
from slope_cli.linearize.swap import linear_windows

LARGEST_BATCH = 16
"""Texts that are continued at once."""


class Text(NamedTuple):
    """A prompt as it was given, and the generation that continues it."""

    prompt: str
    generation: Generation


class Conversation:
    """What was said in a chat so far, by the user and the model, after the system's message if there is one.

    Raises:
        UsageError: a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, system: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise UsageError("--chat: the tokenizer of this model has no chat template; leave out --chat")
        self._tokenizer = tokenizer
        self._first = [] if system is None else [_message("system", system)]
        self.begin()

    def begin(self) -> None:
        """Forget all but the system's message."""
        self._messages = [*self._first]

    def ids(self, text: str) -> list[int]:
        """The ids up to the answer to what the user says next; UsageError for what the template refuses."""
        messages = [*self._messages, _message("user", text)]
        if not all(is_utf8(message["content"]) for message in messages):
            raise UsageError("prompt: is not text in UTF-8")
        return chat_ids(self._tokenizer, messages)

    def add(self, text: str, answer: str) -> None:
        """Go on after what the user said, and its answer."""
        self._messages += [_message("user", text), _message("assistant", answer)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def generate(
    folder: Path,
    prompt: str | None,
    file: Path | None,
    sampling: Sampling,
    device: torch.device,
    *,
    samples: int = 1,
    chat: bool = False,
    system: str | None = None,
    compiled: bool = False,
    as_json: bool = False,
) -> None:
    """Print each prompt and its continuation, in order; of a single one on a terminal as it comes.

    Args:
        folder: a run, a fine-tuning, or a folder that transformers reads.
        prompt: the only one.
        file: of prompts, see `prompts_of`. Without it and `prompt` they are the lines of standard input; on a terminal
            each is asked for, and answered, until the input ends.
        samples: the texts for each prompt, with consecutive seeds.
        chat: each prompt is what the user says in a conversation of its own, on a terminal in one that goes on until an
            empty line; by the tokenizer's chat template. The answers alone are printed.
        system: what the system says first in a chat.
        compiled: compile linearized attention's decoding step.
        as_json: print an object for each text, in a line.

    Raises:
        UsageError: a model or a prompt that cannot be continued, no prompt, or a chat without a chat template.
        SlopeError: files that cannot be read.
    """
    if prompt is not None and file is not None:
        raise UsageError("give either a prompt or --batch FILE with prompts")
    if samples > 1 and sampling.temperature == 0:
        raise UsageError(f"--samples {samples}: with --temperature 0 all texts are the same")
    asks = prompt is None and file is None and sys.stdin.isatty()
    if system is not None and not chat:
        raise UsageError("--system: is for --chat")
    if chat and asks and samples > 1:
        raise UsageError(f"--samples {samples}: a conversation goes on after one answer; leave it out")
    prompts = [] if asks else _given(prompt, file)
    loaded = load_model(folder, device)
    conversation = Conversation(loaded.tokenizer, system) if chat else None
    if loaded.tokenizer.chat_template and not chat:
        print("note: this model has a chat template; --chat applies it", file=sys.stderr)
    ids = conversation.ids if conversation else partial(prompt_ids, loaded.tokenizer)
    if compiled and not linear_windows(loaded.model):
        raise UsageError(f"{folder}: is not linearized, so there is nothing to compile; leave out --compile")
    longest = max((len(_encoded(ids, *given)) for given in prompts), default=1)
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        max_batch=max(1, min(samples * max(1, len(prompts)), LARGEST_BATCH)),
        max_length=None if asks else longest + sampling.tokens,
        compiled=compiled,
    )
    del loaded
    submit = partial(_submitted, engine, ids, sampling, samples)
    for wanted in _asked_for(submit, conversation) if asks else [submit(prompts)]:
        _print(engine, wanted, as_json, with_prompts=not chat)


def _given(prompt: str | None, file: Path | None) -> list[tuple[str, str]]:
    """Where each prompt stands, and the prompt."""
    if prompt is not None:
        return [("prompt", prompt)]
    if file is not None:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UsageError(f"--batch {file}: {error.strerror}") from None
        return list(prompts_of(content, str(file), jsonl=file.suffix == ".jsonl"))
    prompts = list(prompts_of(sys.stdin.buffer.read(), "standard input"))
    if not prompts:
        raise UsageError("standard input: has no prompt; give one there, as an argument, or --batch FILE with prompts")
    return prompts


def _asked_for(
    submit: Callable[[list[tuple[str, str]]], deque[Text]], conversation: Conversation | None
) -> Iterator[deque[Text]]:
    """The texts for each line that is entered on the terminal; they are finished when the next one is asked for."""
    if conversation:
        print("An empty line begins a new conversation; Ctrl-D ends.", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        if not line.strip():
            if conversation:
                conversation.begin()
                print("(a new conversation)", file=sys.stderr)
            continue
        try:
            texts = submit([("prompt", line.rstrip("\r\n"))])
        except UsageError as error:
            print(f"error: {error}" + "; an empty line begins anew" * (conversation is not None), file=sys.stderr)
            continue
        text = texts[0]
        yield texts
        if conversation:
            conversation.add(text.prompt, text.generation.text)


def _print(engine: Engine, texts: deque[Text], as_json: bool, *, with_prompts: bool) -> None:
    """Print texts when they are finished, in order; a single one on a terminal as it comes."""
    if len(texts) == 1 and not as_json and sys.stdout.isatty():
        print(texts[0].prompt * with_prompts, end="", flush=True)
        for _, piece in engine.stream():
            print(piece, end="", flush=True)
        print()
        return
    while texts:
        while not texts[0].generation.finish_reason:
            engine.step()
        prompt, done = texts.popleft()
        print(_json(prompt, done) if as_json else f"{prompt * with_prompts}{done.text}", flush=True)


def prompts_of(content: bytes, name: str, *, jsonl: bool = False) -> Iterator[tuple[str, str]]:
    """Where it stands, and the prompt, of each line that is not empty: the line itself, or "prompt" of a JSON object.

    Raises:
        UsageError: what is not text, or a line without a prompt; the message begins with `name`.
    """
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError:
        raise UsageError(f"{name}: is not text in UTF-8") from None
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
            raise UsageError(f'{place}: is not a JSON object with "prompt", a text')
        yield place, entry["prompt"]


def _encoded(ids: Callable[[str], list[int]], place: str, prompt: str) -> list[int]:
    """The ids of a prompt; the error of one that has none begins with its place."""
    try:
        return ids(prompt)
    except UsageError as error:
        raise UsageError(f"{place}: {str(error).removeprefix('prompt: ')}") from None


def _submitted(
    engine: Engine,
    ids: Callable[[str], list[int]],
    sampling: Sampling,
    samples: int,
    prompts: Iterable[tuple[str, str]],
) -> deque[Text]:
    """Texts that wait, `samples` of each prompt."""
    submitted = deque[Text]()
    for place, prompt in prompts:
        encoded = _encoded(ids, place, prompt)
        for number in range(samples):
            try:
                generation = engine.submit(encoded, replace(sampling, seed=sampling.seed + number))
            except UsageError as error:
                raise UsageError(f"{place}: {str(error).removeprefix('prompt: ')}") from None
            submitted.append(Text(prompt, generation))
    return submitted


def _json(prompt: str, done: Generation) -> str:
    speed = round(len(done.ids) / done.seconds, 2) if done.seconds else 0.0
    result = {"prompt": prompt, "text": done.text, "tokens": len(done.ids)}
    return json.dumps(result | {"finish_reason": done.finish_reason, "tokens_per_second": speed})
