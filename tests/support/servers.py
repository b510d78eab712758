"""`slope serve` in a process of its own, a model folder for it, its engine alone, and requests by plain HTTP."""

import contextlib
import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import torch

from slope_cli.checkpoint.load import load_model
from slope_cli.data.tokenizer import load_tokenizer
from slope_cli.inference.engine import Engine, Generation
from slope_cli.inference.sampling import Sampling
from support.data import scratch
from support.models import tiny_model
from support.processes import forkserver, run_command

TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no ' ~ message.role ~ ' here') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
POSITIONS = 20_000
LONG = {"prompt": "The ", "max_tokens": POSITIONS, "temperature": 0}
"""Of a text that takes longer than any test."""


@cache
def served_model(*, chat: bool = False) -> Path:
    """A model folder whose greedy texts are long, of printable characters, and as different as their prompts."""
    folder = scratch() / ("tiny-chat" if chat else "tiny-llama")
    model = tiny_model("llama3-8b", vocab_size=257, max_position_embeddings=POSITIONS)
    with torch.no_grad():
        for ids in (slice(0, 32), slice(127, 257)):
            model.lm_head.weight[ids] = 0.0
    model.save_pretrained(folder)
    tokenizer = load_tokenizer("bytes")
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@cache
def loaded_model() -> Any:
    """The model with a chat template, and its tokenizer, in this process."""
    return load_model(served_model(chat=True))


def alone(prompt: str | list[int], sampling: Sampling) -> Generation:
    """The text of the engine by itself."""
    _, net, tokenizer, *_ = loaded_model()
    return Engine(net, tokenizer, max_length=256).generate([prompt], sampling)[0]


def greedy(prompt: str | list[int], tokens: int = 20) -> str:
    """The likeliest text."""
    return alone(prompt, Sampling(tokens, temperature=0)).text


class Server:
    """A server on a free port of the loopback; what it prints is in FOLDER/server.log."""

    def __init__(self, folder: Path, *words: str, model: Path | None = None, **variables: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "server.log"
        arguments = ["serve", str(model or served_model()), "--port", "0", *words]
        self._process = forkserver.Process(target=run_command, args=(arguments, self.log, variables))
        self._process.start()
        self.wait_for(r"serving .*\n")
        self.port = int(re.findall(r"at http://127.0.0.1:(\d+)/v1\n", self.printed())[0])

    @property
    def address(self) -> str:
        """Where the paths begin."""
        return f"http://127.0.0.1:{self.port}"

    def printed(self) -> str:
        """Its log."""
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, pattern: str, seconds: float = 60) -> None:
        """Wait until a regular expression is in the log."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.printed()):
            assert time.monotonic() < deadline, f"{pattern!r} is not in {self.printed()}"
            assert self._process.is_alive(), self.printed()
            time.sleep(0.01)

    def ask(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer; a body is posted, as JSON unless it is bytes."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(f"{self.address}{path}", data, given)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def begin(self, path: str = "/v1/completions", **body: Any) -> HTTPConnection:
        """Post a request and read nothing of the answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def wait_for_texts(self, running: int, waiting: int = 0) -> None:
        """Wait until so many texts are continued, and wait."""
        expected, deadline = {"status": "ok", "running": running, "waiting": waiting}, time.monotonic() + 30
        while (health := self.ask("/health")[1]) != expected:
            assert time.monotonic() < deadline, health
            time.sleep(0.02)

    def send(self, number: int) -> None:
        """Send a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def finish(self, seconds: float = 60) -> int:
        """Wait for the end; the exit code."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"hangs: {self.printed()}"
        return self._process.exitcode

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def serving(folder: Path, *words: str, model: Path | None = None, **variables: str) -> Iterator[Server]:
    """A server that has ended well by a signal, with no error in its log, unless it has ended before."""
    server = Server(folder, *words, model=model, **variables)
    try:
        yield server
        server.send(signal.SIGTERM)
        assert server.finish() == 0, server.printed()
        assert "Traceback" not in server.printed(), server.printed()
    finally:
        server.kill()


def events(connection: HTTPConnection) -> list[Any]:
    """The objects of a stream up to its end, the last of them the text "[DONE]" if there is one."""
    begin, *texts = connection.getresponse().read().decode().split("data: ")
    assert begin == ""
    assert all(text.endswith("\n\n") for text in texts)
    return [text.strip() if text == "[DONE]\n\n" else json.loads(text) for text in texts]
