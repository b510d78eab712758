"""From the files of packages to documents: what is taken, what programs have written, HTML and manual pages as text."""

import bz2
import gzip
import lzma
import re
import subprocess
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser

from slope_cli.errors import UsageError

PIECE = 1 << 20
"""Characters at which a longer document is cut: at the next empty line, or before as many more at the last line."""
MAX_CODE = 1 << 20
"""Bytes of a source file; a larger one was nearly always written by a program."""
MIN_TEXT = 256
"""Characters of a document; a shorter one says little."""
BROKEN = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError, RuntimeError)
"""What the standard library raises for compressed data that it cannot read."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SUFFIXES = {
    "code": _words(
        "ada adb ads agda awk bas c cc clj cmake cpp cs cxx d dpr dts dtsi el erl ex f f90 fs go groovy h hh hpp hrl "
        "hs hxx idl inc inl java jl js jsx kt l lean lhs lisp lpr lsp lua m m4 ml mli mm mll mly pas php pl pm pp py "
        "pyx r rb rkt rs s sc scala scm scrbl sh sml sql ss swift tcl td ts tsx v vala vim y yy"
    ),
    "prose": _words("adoc asciidoc dict dtx md org pod rst tex texi texinfo text txt"),
    "html": _words("htm html xhtml"),
}
"""Of the names of the files of each kind."""
MANUAL = re.compile(r"usr/share/man/man\d[a-z]*/[^/]+\.\d\w*")
UNPACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.decompress,
    "dz": gzip.decompress,
    "bz2": bz2.decompress,
    "xz": lzma.decompress,
}
WRITTEN_BY_PROGRAMS = re.compile(
    r"(^|/)(asic_reg|testsuite|test-?data|locales?|po|i18n|l10n|languages|nls|unicode|_sources|_static|class-use|src-html"
    r"|implementors|node_modules)/"
    r"|_(sh_mask|offset|d)\.h$"
    r"|(^|/)(changelog|copying|copyright|licen[cs]es?|authors|thanks|configure|aclocal|libtool|ltmain)([-._][^/]*)?$"
    r"|\.min\.\w+$|/src/.*\.html$"
    r"|/(ar|bg|ca|cs|da|de|el|es|fa|fi|fr|he|hr|hu|id|it|ja|ko|lt|nb|nl|nn|pl|pt|ro|ru|sk|sl|sv|tr|uk|vi|zh)([-_]\w+)?/.*\.html$"
    r"|(^|/)((gen-?|(py-|np-)?mod|doc-)index(-\w+)?|search|all(classes|packages)?(-\w+)?|index-(all|\d+)|print|annotated"
    r"|(overview|package)-(tree|use)|constant-values|hierarchy|classes|(functions|globals|namespacemembers)(_\w+)?)\.html$"
    r"|(-members|_source)\.html$",
    re.IGNORECASE,
)
"""Paths of registers, indexes, translations, configure scripts; and of lists of names, licences and broken tests."""
SAYS_SO = re.compile(
    r"do not (edit|modify|change)|(auto-?|automatically |machine[- ])generated"
    r"|generated (by|from|automatically|file|using)|(file|code) (is|was|has been) (automatically )?generated",
    re.IGNORECASE,
)
SPACES, DIGITS = b" \t\n", b"0123456789"
LETTERS = bytes({*b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", *range(128, 256)})
NO_WORDS = bytes(byte for byte in range(128) if not chr(byte).isalnum())
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COMMON = _words("the of and to a in is it that for you as with be on this")
"""Words of English: of its text they are a third, of other languages' and of tables nearly nothing."""


class Rejected(Exception):
    """Why a file is not a document, for the counts."""


def written_by_program(path: str) -> bool:
    """Whether a path is one of WRITTEN_BY_PROGRAMS."""
    return bool(WRITTEN_BY_PROGRAMS.search(path))


def kind_of(path: str) -> str:
    """code, prose, html or manual, by the name of an unpacked file; empty for a file that is not taken."""
    if written_by_program(path):
        return ""
    name = path.rpartition("/")[2]
    if MANUAL.fullmatch(path):
        return "manual"
    stem, dot, suffix = name.rpartition(".")
    if not dot or not stem:
        return "prose" if name[:1].isalpha() else ""
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix.lower() in suffixes), "")


def unpacked(packing: str, content: bytes) -> bytes:
    """The content of a file with this suffix, decompressed if it is one of UNPACK; Rejected if it is damaged."""
    try:
        return UNPACK[packing](content) if packing in UNPACK else content
    except BROKEN:
        raise Rejected("not text") from None


def document(kind: str, content: bytes) -> str:
    """The text of a file as a document: in NFC, with line feeds, no control characters, no spaces at a line's end.

    Raises:
        Rejected: it is no text, no English, a table, too short, or was written by a program.
    """
    if kind == "code" and len(content) > MAX_CODE:
        raise Rejected("too large for code")
    if len(content) < MIN_TEXT:
        raise Rejected("too short")
    text = _decoded(content)
    if kind in ("code", "manual") and SAYS_SO.search(text[:3000]):  # a page from pod, say, which comes as prose
        raise Rejected("says that it is generated")
    text = normalized({"html": html_text, "manual": manual_text}.get(kind, str)(text))
    if len(text) < MIN_TEXT:
        raise Rejected("too short")
    if kind == "code" and len(text) > 160 * text.count("\n"):
        raise Rejected("long lines of code")
    if _is_table(text[:PIECE].encode()):
        raise Rejected("a table of numbers or signs")
    if kind != "code" and not _is_english(text[:20_000]):
        raise Rejected("no English text")
    return text


def _decoded(content: bytes) -> str:
    """UTF-8, else Windows' Latin; Rejected if it is neither."""
    if b"\0" in content:
        raise Rejected("not text")
    for encoding in ("utf-8", "cp1252"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            pass
    raise Rejected("not text")


def normalized(text: str) -> str:
    """Text in NFC with line feeds, at most one empty line in a row, and a line feed at its end only."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n").replace("\ufeff", "")
    text = CONTROL.sub("", unicodedata.normalize("NFC", text))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def _is_table(data: bytes) -> bool:
    """Whether more than a quarter is digits, or less than 45 % letters, spaces not counted."""
    signs = data.translate(None, SPACES)
    numbers, letters = (len(signs) - len(signs.translate(None, some)) for some in (DIGITS, LETTERS))
    return numbers > 0.25 * len(signs) or letters < 0.45 * len(signs)


def _is_english(text: str) -> bool:
    words = text.lower().split()
    return sum(word in COMMON for word in words) > 0.08 * len(words)


def manual_text(page: str) -> str:
    """A manual page as groff renders it, with plain hyphens, in lines of 80 characters.

    Rejected if it is another name of a page. UsageError if groff is missing.
    """
    if page.startswith(".so "):
        raise Rejected("too short")
    words = ["groff", "-k", "-t", "-mandoc", "-Tutf8", "-rcR=1", "-rHY=0", "-rLL=80n", "-P-cbou"]
    try:
        done = subprocess.run(words, input=page.encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        raise UsageError("groff is missing; install groff-base") from None
    return done.stdout.decode(errors="replace").translate({0x2010: "-", 0x2212: "-"})


BLOCKS = _words(
    "address article blockquote body dd details div dl dt fieldset figcaption figure h1 h2 h3 h4 h5 h6 hr main ol p "
    "pre section summary table tbody td th thead tr ul"
)
LINES = _words("br dd dt li td th tr")
SKIPPED = _words("aside button footer form head nav noscript script select style svg template textarea")
SKIPPED_CLASSES = _words(
    "breadcrumb breadcrumbs footer headerlink leftnav menu mobile-topbar nav navbar navfooter navheader navigation "
    "navsetbottom navsettop nosearch related search sidebar sphinxsidebar srclink src-link toc tocset topnav"
)
SKIPPED_BY_CLASS = _words("a div dl ol section span table ul")
"""The elements whose end is always written."""


class _Text(HTMLParser):
    """Collects the text of a page, with an empty line between blocks; pre keeps its spaces and lines."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.pre = 0
        self.skipped: tuple[str, int] | None = None
        """The element that is being left out, and how many of its name are open."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped:
            if tag == self.skipped[0]:
                self.skipped = tag, self.skipped[1] + 1
            return
        given = dict(attrs)
        classes = (given.get("class") or "").lower().split()
        navigates = given.get("role") == "navigation" or not SKIPPED_CLASSES.isdisjoint(classes)
        if tag in SKIPPED or (navigates and tag in SKIPPED_BY_CLASS):
            self.skipped = tag, 1
            return
        self._break(tag)
        self.pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self.skipped:
            if tag == self.skipped[0]:
                self.skipped = (tag, self.skipped[1] - 1) if self.skipped[1] > 1 else None
            return
        self.pre = max(0, self.pre - (tag == "pre"))
        self._break(tag)

    def _break(self, tag: str) -> None:
        if tag in LINES:
            self.parts.append("\n")
        elif tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """The text of a page of HTML, without its navigation: an empty line between blocks, a line for each cell or item.

    Rejected if it cannot be parsed.
    """
    parser = _Text()
    try:
        parser.feed(page)
        parser.close()
    except AssertionError:  # the parser's own, for a declaration that it does not know
        raise Rejected("broken HTML") from None
    lines = "".join(parser.parts).split("\n")
    return "\n".join(line[1:] if line[:1] == " " and line[1:2] != " " else line for line in lines)


def pieces(text: str) -> Iterator[str]:
    """A document in pieces of at most twice PIECE characters, which together are the document."""
    start = 0
    while len(text) - start > 2 * PIECE:
        first, last = start + PIECE, start + 2 * PIECE
        end = text.find("\n\n", first, last) + 2
        if end < first:
            end = text.rfind("\n", first, last) + 1 or last
        yield text[start:end]
        start = end
    yield text[start:]
