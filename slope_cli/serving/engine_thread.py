"""The thread that owns the engine, and the event loop's view of the texts that it continues.

What a request wants is called in the thread, in order; what comes of it is put into the request's own asyncio queue.
"""

import asyncio
import queue
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

import torch

from slope_cli.errors import SlopeError, UsageError, first_line
from slope_cli.inference.engine import Engine, Generation
from slope_cli.inference.sampling import Sampling

Prompts = Callable[[], Sequence[str | Sequence[int]]]


class BusyError(SlopeError):
    """As many texts wait as may."""


class StoppedError(SlopeError):
    """The server stops, or has no engine any more."""


class EngineError(SlopeError):
    """The engine failed while it continued this text."""


class Piece(NamedTuple):
    """New text of a choice; tokens: that the choice has by now. finish_reason: "" while it goes on."""

    choice: int
    text: str
    tokens: int
    finish_reason: str


class Job:
    """The texts of one request.

    Attributes:
        texts: how many. unfinished: of these.
        prompt_tokens: of each text's prompt, once it is `admitted`. tokens: new ones of each text so far.
    """

    def __init__(self, texts: int) -> None:
        self.texts = self.unfinished = texts
        self.prompt_tokens: list[int] = []
        self.tokens = [0] * texts
        self._admitted: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._events: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    async def admitted(self) -> None:
        """Wait until the engine has taken all prompts; UsageError for one that it cannot continue."""
        self.prompt_tokens = await self._admitted

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces as they come, until all texts are finished; raises what ends them before.

        Those that have come meanwhile are one: a request that is slow to send takes less of the loop.
        """
        await self.admitted()
        unfinished = self.texts
        while unfinished:
            events, joined = [await self._events.get()], dict[int, Piece]()
            while not self._events.empty():
                events.append(self._events.get_nowait())
            for event in events:
                if isinstance(event, Exception):
                    raise event
                before = joined.get(event.choice)
                joined[event.choice] = event if before is None else event._replace(text=before.text + event.text)
            for piece in joined.values():
                self.tokens[piece.choice] = piece.tokens
                unfinished -= bool(piece.finish_reason)
                yield piece

    def take(self, event: list[int] | Piece | Exception) -> None:
        """The lengths of the prompts; then new text, or the end of all."""
        if isinstance(event, list):
            self._admitted.set_result(event)
        elif isinstance(event, Exception) and not self._admitted.done():
            self._admitted.set_exception(event)
        else:
            self._events.put_nowait(event)


class EngineThread:
    """A thread that takes an engine's steps while there are texts; all methods are the event loop's.

    Attributes:
        engine: of which only constants are read outside of the thread.
        capacity: texts that may be continued or wait.
        texts: that are.
        fault: why the engine cannot go on; "" while it can.
    """

    def __init__(self, engine: Engine, max_queue: int, ended: Callable[[], None]) -> None:
        """Start; ended: called in the event loop when there is a `fault`."""
        self.engine, self.capacity, self.texts, self.fault = engine, engine.max_batch + max_queue, 0, ""
        self._ended, self._loop = ended, asyncio.get_running_loop()
        self._jobs: set[Job] = set()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._places: dict[Generation, tuple[Job, int]] = {}  # the thread's own
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompts: Prompts, samplings: Sequence[Sampling]) -> Job:
        """Let texts be continued.

        Args:
            prompts: called in the thread, which the tokenizer belongs to as well.
            samplings: of each text.

        Raises:
            UsageError: more texts than the server ever takes.
            BusyError: too many wait. StoppedError: a fault.
        """
        if self.fault:
            raise StoppedError(self.fault)
        if len(samplings) > self.capacity:
            raise UsageError(f"asks for {len(samplings)} texts; the server takes at most {self.capacity} at once")
        if self.texts + len(samplings) > self.capacity:
            raise BusyError(f"{self.texts} texts are continued or wait, and at most {self.capacity} may; try again")
        job = Job(len(samplings))
        self._jobs.add(job)
        self.texts += job.texts
        self._calls.put(lambda: self._admit(job, prompts, samplings))
        return job

    @property
    def requests(self) -> int:
        """Those that have unfinished texts."""
        return len(self._jobs)

    def cancel(self, job: Job) -> None:
        """End the texts of a request that nobody waits for; nothing, if they are finished."""
        if job.unfinished:
            self._forget(job)
            self._calls.put(lambda: self._drop(job))

    def cut(self, reason: str) -> None:
        """End all texts, with StoppedError."""
        for job in list(self._jobs):
            self.cancel(job)
            job.take(StoppedError(reason))

    def close(self) -> None:
        """End the thread after the step that it is in."""
        self._calls.put(None)
        self._thread.join(timeout=10)

    def _forget(self, job: Job) -> None:
        self.texts -= job.unfinished
        job.unfinished = 0
        self._jobs.discard(job)

    def _deliver(self, events: list[tuple[Job, list[int] | Piece | Exception]]) -> None:
        for job, event in events:
            if not job.unfinished:  # cancelled
                continue
            if isinstance(event, Exception):
                self._forget(job)
            elif isinstance(event, Piece) and event.finish_reason:
                job.unfinished, self.texts = job.unfinished - 1, self.texts - 1
                if not job.unfinished:
                    self._forget(job)
            job.take(event)

    def _end(self, fault: str) -> None:
        self.fault = fault
        self.cut(fault)
        self._ended()

    # -------------------------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        while True:
            try:
                while not self._calls.empty() or not self.engine.busy:
                    call = self._calls.get()
                    if call is None:
                        return
                    call()
                events = [(self._places[text], text, piece) for text, piece in self.engine.step()]
            except Exception as error:  # whatever it is, somebody waits for an answer
                if fault := self._recover(error):
                    self._loop.call_soon_threadsafe(self._end, fault)
                    return
                continue
            for _, text, _ in events:
                if text.finish_reason:
                    self._places.pop(text, None)
            self._post([(job, Piece(i, piece, len(t.ids), t.finish_reason)) for (job, i), t, piece in events])

    def _admit(self, job: Job, prompts: Prompts, samplings: Sequence[Sampling]) -> None:
        generations: list[Generation] = []
        try:
            for prompt, sampling in zip(prompts(), samplings, strict=True):
                generations.append(self.engine.submit(prompt, sampling))
        except Exception as error:  # the fault of one request, or of the tokenizer
            for generation in generations:
                self.engine.cancel(generation)
            known = isinstance(error, SlopeError)
            self._post([(job, error if known else EngineError(_described(error)))])
        else:
            self._places |= {generation: (job, index) for index, generation in enumerate(generations)}
            self._post([(job, [len(generation.prompt_ids) for generation in generations])])

    def _drop(self, job: Job) -> None:
        for generation in [text for text, (own, _) in self._places.items() if own is job]:
            del self._places[generation]
            self.engine.cancel(generation)

    def _recover(self, error: Exception) -> str:
        """End all texts, of which some may lack a token now; the fault, if the device works no more."""
        reason, fault = _described(error), ""
        jobs, texts, self._places = {job for job, _ in self._places.values()}, list(self._places), {}
        device = self.engine.decoder.tokens.device
        try:
            for text in texts:
                self.engine.cancel(text)
            torch.zeros(1, device=device).item()  # a GPU that has failed fails from then on
        except Exception as again:
            fault = f"{device} works no more: {first_line(again)}; start the server again"
        self._post([(job, EngineError(reason)) for job in jobs])
        return fault

    def _post(self, events: list[tuple[Job, list[int] | Piece | Exception]]) -> None:
        if events:
            self._loop.call_soon_threadsafe(self._deliver, events)


def _described(error: Exception) -> str:
    """An error of the engine for who asked; the log has all of it."""
    traceback.print_exception(error, file=sys.stderr)
    return f"the engine failed: {type(error).__name__}: {first_line(error)}"
