"""`slope serve`: a trained model over HTTP until a signal ends it."""

import asyncio
import contextlib
import math
import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import uvicorn
from transformers import PreTrainedTokenizerFast

from slope_cli.checkpoint.load import load_model
from slope_cli.errors import SlopeError, UsageError, did_you_mean, one_line
from slope_cli.inference.engine import Engine
from slope_cli.inference.sampling import Sampling
from slope_cli.serving.app import make_app
from slope_cli.serving.engine_thread import EngineThread

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
API_KEY = "SLOPE_API_KEY"
"""The variable of the environment with the key that requests must have, if they must have one."""

STOPS = "the server stops"


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    max_batch: texts that are continued at once. max_queue: that wait besides. max_length: tokens of each, with its
    prompt; None for all positions of the model. grace: seconds that texts have left when a signal comes.
    """

    max_batch: int
    max_queue: int
    max_length: int | None
    grace: float


def serve(folder: Path, host: str, port: int, dtype: str, device: torch.device, limits: Limits) -> None:
    """Answer requests until SIGINT or SIGTERM; the log goes to standard error.

    Args:
        folder: a run, or a fine-tuning, or a folder that transformers reads.
        port: 0 for a free one, which the log names.
        dtype: a key of DTYPES; auto for bf16 on a GPU and float32 elsewhere.

    Raises:
        UsageError: a model that cannot continue texts, or one of the arguments.
        SlopeError: an address that cannot be had, too little memory, or a device that failed.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: {did_you_mean(dtype, DTYPES)}")
    with _bound(host, port) as listener:  # before minutes of loading
        engine, tokenizer, name = _loaded(folder, DTYPES[dtype], device, limits)
        if (limits.max_length or 0) > engine.positions:
            raise UsageError(f"--max-length {limits.max_length}: the model has {engine.positions} positions")
        fault = asyncio.run(_serve(engine, tokenizer, name, listener, limits))
    if fault:
        raise SlopeError(fault)


class _Server(uvicorn.Server):
    """uvicorn's server; when it is to stop, running texts have a grace period.

    thread: set before it starts.
    """

    thread: EngineThread

    def __init__(self, config: uvicorn.Config, address: str, grace: float) -> None:
        super().__init__(config)
        self._address, self._grace, self._loop = address, grace, asyncio.get_running_loop()

    def stop(self) -> None:
        """Stop as if a signal had come."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops the server; another one ends its texts at once."""
        if self.should_exit:
            self._loop.call_soon_threadsafe(self.thread.cut, STOPS)
        else:
            super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        print(f"serving {self._address}", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no further requests, and wait for the answers of those that are here."""
        count = self.thread.requests
        requests = "1 request in flight has" if count == 1 else f"{count} requests in flight have"
        print(f"shutting down; {requests} {self._grace:g} s", file=sys.stderr, flush=True)
        cut = self._loop.call_later(self._grace, self.thread.cut, STOPS)
        await super().shutdown(sockets)
        cut.cancel()


async def _serve(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, name: str, listener: socket.socket, limits: Limits
) -> str:
    """Serve until the end; the fault of the engine that brought it, or ""."""
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    config = uvicorn.Config(
        "",  # the app needs the thread, and the thread the server
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.grace + 5),  # of clients that do not read their answers
    )
    server = _Server(config, f"{name} at {address}", limits.grace)
    server.thread = EngineThread(engine, limits.max_queue, server.stop)
    config.app = make_app(server.thread, tokenizer, name, os.environ.get(API_KEY, ""))
    # uvicorn raises the signals that it heard once more at its end, for handlers of before: it is that again.
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        await server.serve(sockets=[listener])
    finally:
        server.thread.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return server.thread.fault


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet."""
    with contextlib.ExitStack() as closed:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = closed.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise SlopeError(f"{host}, port {port}: {error.strerror}; choose another --host or --port") from None
        closed.pop_all()
    return listener


def _loaded(
    folder: Path, dtype: torch.dtype | None, device: torch.device, limits: Limits
) -> tuple[Engine, PreTrainedTokenizerFast, str]:
    """An engine that has done what the first requests would wait for, its tokenizer, and the model's name."""
    loaded = load_model(folder, device)
    try:
        engine = Engine(
            loaded.model, loaded.tokenizer, dtype=dtype, max_batch=limits.max_batch, max_length=limits.max_length
        )
        if device.type == "cuda":
            most = engine.max_length - 1
            # The most tokens of prompts, thrice: the second time is recorded, and the third must fit beside its memory.
            for length in (most, most, max(1, most - 32)):
                engine.generate([[0] * length] * engine.together(length), Sampling(tokens=1))
            for length in (1, min(most, 33)):  # few tokens, for which kernels are chosen
                engine.generate([[0] * length], Sampling(tokens=1))
            # A graph for each number of texts, greedy and sampled.
            for temperature in (0.0, 1.0):
                for tokens in range(min(engine.max_batch, most)):
                    engine.submit([0], Sampling(tokens + 1, temperature))
                for _ in engine.stream():
                    pass
    except (MemoryError, RuntimeError) as error:
        if not one_line(error):
            raise
        texts = f"--max-batch {limits.max_batch} texts of --max-length {limits.max_length or 'all its positions'}"
        raise SlopeError(f"{folder}: out of memory for {texts}; take a smaller one of these") from error
    return engine, loaded.tokenizer, loaded.name
