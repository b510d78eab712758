"""OpenAI's objects: what a request may say, and what an answer does."""

import secrets
import time
from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerFast

from slope_cli.errors import UsageError
from slope_cli.inference.sampling import Sampling
from slope_cli.inference.text import chat_ids

Json = dict[str, Any]
Prompt = str | list[int]

_WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_NEUTRAL: Json = {
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
}
"""The value of a parameter without support that asks for nothing; null does so for any."""
_TOOL_ROLES, _CALLS = ("tool", "function"), ("tool_calls", "function_call")
_SEEDS = 2**63
_ALL = 2**31
"""More tokens than there is room for: the engine ends a text where the positions do."""
_MOST_PROMPTS, _MOST_CHOICES, _MOST_STOPS = 2048, 128, 16

_Positive = Annotated[int, Field(ge=1)]
_Ids = Annotated[list[int], Field(min_length=1)]
_Prompts = Field(min_length=1, max_length=_MOST_PROMPTS)


class StreamOptions(BaseModel):
    """include_usage: the last object of a stream counts tokens."""

    include_usage: bool = False


class TextRequest(BaseModel):
    """What requests for completions and for chat have in common, and how their texts are told.

    kind, kind_of_parts: "object" of an answer, and of a streamed part of it.
    """

    model_config = ConfigDict(extra="allow")
    kind: ClassVar[str]
    kind_of_parts: ClassVar[str]

    model: str | None = None
    max_tokens: _Positive | None = None
    temperature: float | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=_MOST_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    @abstractmethod
    def most_tokens(self) -> int:
        """New ones of each text."""

    @property
    @abstractmethod
    def different_prompts(self) -> int:
        """How many there are."""

    @abstractmethod
    def prompts(self, tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
        """They, each n times. UsageError for one that cannot be made into tokens."""

    @abstractmethod
    def choice(self, text: str) -> Json:
        """A whole text, as a choice of an answer has it."""

    @abstractmethod
    def part(self, text: str) -> Json:
        """New text, as a choice of a streamed part has it."""

    @abstractmethod
    def beginning(self) -> Json | None:
        """What a stream says of each choice before its text."""

    def require_supported(self) -> None:
        """UsageError for a parameter that would not have the effect that it asks for."""
        for name, value in (self.model_extra or {}).items():
            neutral = _NEUTRAL.get(name)
            asks = value != neutral or isinstance(value, bool) != isinstance(neutral, bool)  # logprobs=0 asks for some
            if asks and value is not None and name not in _WITHOUT_EFFECT:
                raise UsageError(f"{name!a}: is not supported by this server; leave it out")

    def samplings(self) -> list[Sampling]:
        """Those of n texts for each prompt; without a seed, of random ones. UsageError for a value out of range."""
        seed = secrets.randbelow(_SEEDS) if self.seed is None else self.seed
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        temperature, top_p = (1.0 if value is None else value for value in (self.temperature, self.top_p))
        own = (self.most_tokens, temperature, self.top_k or 0, top_p)
        of_a_prompt = [Sampling(*own, (seed + place) % _SEEDS, stop) for place in range(self.n or 1)]
        return of_a_prompt * self.different_prompts


class CompletionRequest(TextRequest):
    """Of /v1/completions."""

    kind = kind_of_parts = "text_completion"
    prompt: str | Annotated[list[str], _Prompts] | _Ids | Annotated[list[_Ids], _Prompts]

    @property
    def most_tokens(self) -> int:
        """See TextRequest."""
        return self.max_tokens or 16

    @property
    def different_prompts(self) -> int:
        """See TextRequest."""
        return len(self._listed())

    def prompts(self, tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
        """See TextRequest."""
        return [prompt for prompt in self._listed() for _ in range(self.n or 1)]

    def _listed(self) -> list[Any]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)

    def choice(self, text: str) -> Json:
        """See TextRequest."""
        return {"text": text}

    def part(self, text: str) -> Json:
        """See TextRequest."""
        return self.choice(text)

    def beginning(self) -> None:
        """See TextRequest."""


class ContentPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """Of a chat."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[ContentPart]

    def plain(self) -> dict[str, str]:
        """As templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(TextRequest):
    """Of /v1/chat/completions."""

    kind, kind_of_parts = "chat.completion", "chat.completion.chunk"
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: _Positive | None = None

    def require_supported(self) -> None:
        """See TextRequest; also for messages of tools, whatever the template makes of them."""
        super().require_supported()
        for message in self.messages:
            if message.role in _TOOL_ROLES:
                raise UsageError(f"messages: the role {message.role!a} is not supported by this server; leave it out")
            for name in filter((message.model_extra or {}).get, _CALLS):
                raise UsageError(f"messages: {name!a} is not supported by this server; leave it out")

    @property
    def most_tokens(self) -> int:
        """See TextRequest."""
        return self.max_completion_tokens or self.max_tokens or _ALL

    @property
    def different_prompts(self) -> int:
        """See TextRequest."""
        return 1

    def prompts(self, tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
        """See TextRequest."""
        return [chat_ids(tokenizer, [message.plain() for message in self.messages])] * (self.n or 1)

    def choice(self, text: str) -> Json:
        """See TextRequest."""
        return {"message": {"role": "assistant", "content": text}}

    def part(self, text: str) -> Json:
        """See TextRequest."""
        return {"delta": {"content": text}}

    def beginning(self) -> Json:
        """See TextRequest."""
        return {"delta": {"role": "assistant", "content": ""}}


class Answer:
    """The objects that answer a request."""

    def __init__(self, request: TextRequest, model: str) -> None:
        prefix = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
        self._request, self._model = request, model
        self._id, self._created = f"{prefix}-{secrets.token_hex(12)}", int(time.time())

    def whole(self, texts: Iterable[tuple[str, str]], usage: Json) -> Json:
        """All of it, of each text and its finish_reason."""
        told = enumerate(texts)
        choices = [self._choice(index, self._request.choice(text), reason) for index, (text, reason) in told]
        return self._object(self._request.kind, choices) | {"usage": usage}

    def beginnings(self, texts: int) -> list[Json]:
        """What is streamed before the text of so many choices."""
        beginning = self._request.beginning()
        return [] if beginning is None else [self._part(index, beginning, "") for index in range(texts)]

    def part(self, index: int, text: str, reason: str) -> Json:
        """New text of a choice, and its finish_reason or ""."""
        return self._part(index, self._request.part(text), reason)

    def usage(self, usage: Json) -> Json:
        """What ends a stream that counts tokens."""
        return self._object(self._request.kind_of_parts, []) | {"usage": usage}

    def _part(self, index: int, content: Json, reason: str) -> Json:
        return self._object(self._request.kind_of_parts, [self._choice(index, content, reason)])

    def _choice(self, index: int, content: Json, reason: str) -> Json:
        return {"index": index, **content, "logprobs": None, "finish_reason": reason or None}

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


def usage(prompt_tokens: list[int], tokens: list[int], choices: int) -> Json:
    """The counts of an answer: those of a prompt once for all its choices."""
    read, written = sum(prompt_tokens[::choices]), sum(tokens)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def error_body(status: int, message: str, parameter: str | None = None, code: str | None = None) -> Json:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}
