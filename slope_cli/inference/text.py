"""Between text and tokens: a prompt's ids, and the text of tokens as they come."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from slope_cli.data.tokenizer import begin_id
from slope_cli.errors import UsageError, first_line, is_utf8

CONTEXT = 8
"""Tokens before a piece of text that it is decoded with: some tokenizers treat the first token of a text specially."""
UNFINISHED = "\ufffd"
"""What bytes are decoded to that are no character, or not yet one."""


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The ids of a prompt as text begins in training: after the beginning of text, if the tokenizer puts one there.

    No end of text follows, even if the tokenizer adds one: the text is to be continued. UsageError for no text.
    """
    if not is_utf8(prompt):
        raise UsageError("prompt: is not text in UTF-8")
    ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
    begin = begin_id(tokenizer)
    return ids if begin is None else [begin, *ids]


def chat_ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a chat's messages, by the tokenizer's template, up to where the next answer begins.

    Args:
        messages: each with role and content.

    Raises:
        UsageError: what the template refuses.
    """
    try:
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # templates refuse what they do not know by errors of their own
        raise UsageError(f"messages: the model's chat template refuses them: {first_line(error)}") from error
    return ids


class TextStream:
    """The text of a continuation, in pieces of whole characters, up to a stop string.

    Attributes:
        text: what `push` and `end` have returned so far.
        stopped: whether a stop string has come; nothing follows it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        # transformers' own decode takes several times as long, and a step waits for it once for each of its texts.
        self._tokenizer, self._stop = tokenizer.backend_tokenizer, tuple(stop)
        self._ids = list(prompt[-CONTEXT:])
        self._known = self._decoded()  # the part of their text that is certain
        self._held = ""  # text that may be the beginning of a stop string
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """Add a token; the new text that is certain by now."""
        self._ids.append(token)
        decoded = self._decoded()
        new = decoded[len(self._known) :]
        if new.endswith(UNFINISHED):
            return ""
        self._known = decoded
        if len(self._ids) > 2 * CONTEXT:
            self._ids = self._ids[-CONTEXT:]
            self._known = self._decoded()
        return self._add(new, last=False)

    def end(self) -> str:
        """The rest of the text, when no token follows."""
        return "" if self.stopped else self._add(self._decoded()[len(self._known) :], last=True)

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _add(self, new: str, *, last: bool) -> str:
        found = self._held + new
        places = [place for stop in self._stop if (place := found.find(stop)) >= 0]
        if places:
            self.stopped, piece, self._held = True, found[: min(places)], ""
        else:
            held = 0 if last else _beginning(found, self._stop)
            piece, self._held = found[: len(found) - held], found[len(found) - held :]
        self.text += piece
        return piece


def _beginning(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    return next(
        (size for size in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-size:]) for s in stops)), 0
    )
