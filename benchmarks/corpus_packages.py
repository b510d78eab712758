"""Debian's packages: fetched and verified through apt, and read file by file, archives in them too."""

import contextlib
import io
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from slope_cli.errors import SlopeError, UsageError, first_line
from slope_cli.utils.files import file_sha256

from .corpus_text import BROKEN, written_by_program

ARCHIVE = re.compile(r"\.(tar(\.(gz|xz|bz2))?|tgz|zip)$")


class Package(NamedTuple):
    """A Debian package, fetched. source: that of the corpus; sha256: what apt's signed lists say of the file."""

    name: str
    source: str
    version: str
    sha256: str
    path: Path


def fetch(sources: Mapping[str, Sequence[str]], folder: Path, versions: Mapping[str, str]) -> list[Package]:
    """Download what the folder lacks, through apt, and check every file against the sums of apt's lists.

    Args:
        sources: the names of the packages of each source.
        versions: of those packages that are not to be apt's candidates.

    Raises:
        UsageError: apt is missing, fails, or knows no such package or version.
        SlopeError: a file is not the one that apt's lists name.
    """
    source_of = {name: source for source, names in sources.items() for name in names}
    if len(source_of) < sum(map(len, sources.values())):
        raise UsageError("a package is listed twice; give it one source")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}={versions[name]}" if name in versions else name for name in source_of]
    listed = {
        entry["Package"]: entry for entry in _entries(output_of(["apt-cache", "show", "--no-all-versions", *wanted]))
    }
    if unknown := [name for name in source_of if name not in listed]:
        raise UsageError(f"{unknown[0]}: apt knows no such package; run apt-get update, or leave it out of the list")
    packages = []
    for name, source in source_of.items():
        entry = listed[name]
        file = f"{name}_{entry['Version'].replace(':', '%3a')}_{entry['Architecture']}.deb"
        packages.append(Package(name, source, entry["Version"], entry["SHA256"], folder / file))
    if absent := [f"{package.name}={package.version}" for package in packages if not package.path.exists()]:
        output_of(["apt-get", "download", "-qq", *absent], folder)
    for package in packages:
        if file_sha256(package.path) != package.sha256:
            raise SlopeError(f"{package.path}: not the file of apt's lists; delete it, and run the same command again")
    return packages


def output_of(words: Sequence[str], folder: Path | None = None) -> str:
    """What a program prints; UsageError if it is missing or fails."""
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise UsageError(f"{words[0]} is missing; run this on Debian, with apt, dpkg and groff-base") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        raise UsageError(f"{words[0]} failed: {'; '.join(errors) or done.stderr.strip()}; run apt-get update first")
    return done.stdout


def _entries(shown: str) -> Iterator[dict[str, str]]:
    for stanza in shown.split("\n\n"):
        if stanza.strip():
            yield dict(re.findall(r"^([\w-]+): (.*)$", stanza, re.MULTILINE))


class Member(NamedTuple):
    """A file of a package. link: where it leads, of a symbolic link, whose content is empty."""

    path: str
    content: bytes
    link: str = ""


def members(package: Path) -> Iterator[Member]:
    """The files and links of a package in its own order; in an archive's place the files in it, by their paths there.

    Nothing is written to the disk. SlopeError if the package is damaged; an archive in it ends where it is.
    """
    again = "delete it, and run the same command again"
    try:
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as dpkg,
            tarfile.open(fileobj=dpkg.stdout, mode="r|") as tar,
        ):
            for member in _of_tar(tar):
                yield from _of_archive(member)
    except tarfile.TarError as error:
        raise SlopeError(f"{package}: damaged ({first_line(error)}); {again}") from None
    if dpkg.returncode:
        raise SlopeError(f"{package}: dpkg-deb could not unpack it; {again}")


def _of_archive(member: Member) -> Iterator[Member]:
    """The files of an archive and of those in it; another file as it is."""
    if member.link or not ARCHIVE.search(member.path) or written_by_program(member.path):
        yield member
        return
    with contextlib.suppress(*BROKEN):  # what a test of a program that unpacks is given, say
        if member.path.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(member.content)) as archive:
                for name in archive.namelist():
                    yield from _of_archive(Member(name, archive.read(name)))
        else:
            with tarfile.open(fileobj=io.BytesIO(member.content)) as inner:
                for each in _of_tar(inner):
                    yield from _of_archive(each)


def _of_tar(tar: tarfile.TarFile) -> Iterator[Member]:
    for entry in tar:
        path = entry.name.removeprefix("./").encode(errors="replace").decode()  # a name may be in another encoding
        if entry.issym():
            yield Member(path, b"", entry.linkname)
        elif entry.isreg() and (file := tar.extractfile(entry)):
            yield Member(path, file.read())


def licences(copyright_file: str) -> list[str]:
    """The names of the licences in a debian/copyright, sorted; of a free text those that Debian keeps a copy of."""
    pattern = r"^License:[ \t]*(\S.*?)\s*$" if copyright_file.startswith("Format:") else r"/common-licenses/([\w.-]*\w)"
    return sorted(set(re.findall(pattern, copyright_file, re.MULTILINE)))
