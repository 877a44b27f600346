"""Tar archives read in one pass, plain or gzipped: nothing is unpacked here, and no member is trusted."""

import gzip
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from utils.data.listing import is_hidden
from utils.runtime.errors import UserError
from utils.runtime.reading import open_regular

GZIP_MAGIC = b"\x1f\x8b"
MAX_BYTES = 2**26  # of a member that is read, of which some 33 are held at once
MAX_LIST_BYTES = 2**30  # the same of a .csv, of which one is: RadImageNet's longest takes 80 million
MAX_HEADER_BYTES = 2**20  # of what stands before a member: a long name, or POSIX's extended headers
HEADERS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
LATEST = 2**32  # seconds since 1970 that a file system surely knows


class Member(NamedTuple):
    name: str  # without "./"
    data: bytes
    changed: float  # time of last change, seconds since 1970


class BoundedTarInfo(tarfile.TarInfo):
    """Raises ReadError for what tarfile would read whole, however long it is, before anybody sees the member."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:  # tarfile says that it may be overridden
        held = sum(map(len, (*tar.pax_headers, *tar.pax_headers.values()))) if self.type == tarfile.XGLTYPE else 0
        if self.type in HEADERS and self.size + held > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header has {self.size} bytes")
        return super()._proc_member(tar)

    def _refuse_sparse(self, *_: object) -> None:
        raise tarfile.ReadError("a file in it is sparse")

    _proc_sparse = _proc_gnusparse_10 = _refuse_sparse  # whose maps have no limit either


def read_archive(archive: Path, endings: tuple[str, ...], label: str) -> Iterator[Member]:
    """The regular files of an archive whose names end so (in small letters), in its order, under a bar of its bytes.

    Hidden ones are skipped, and their number is printed at the end.
    Raises UserError for a member that would leave the folder it is unpacked in, or is a link or a device, wherever it
    stands; for a file too long; and for an archive that is damaged or cut short, which may be only after its last
    whole member was given.
    """
    try:
        with (
            open_regular(archive) as raw,
            tqdm(total=os.path.getsize(archive), desc=label, unit="B", unit_scale=True, disable=None) as bar,
            _decompressed(raw) as stream,
            tarfile.open(fileobj=stream, mode="r|", tarinfo=BoundedTarInfo) as tar,
        ):
            hidden = 0
            while (member := tar.next()) is not None:
                tar.members.clear()  # which would grow to gigabytes
                _check(archive, member)
                if _is_hidden(member.name):
                    hidden += 1
                elif member.isreg() and member.name.lower().endswith(endings):
                    if member.size > (MAX_LIST_BYTES if member.name.lower().endswith(".csv") else MAX_BYTES):
                        raise UserError(f"{archive}: its member {member.name!r} has {member.size} bytes; remove it.")
                    data = tar.extractfile(member).read()
                    changed = member.mtime if 0 <= member.mtime <= LATEST else 0  # a NaN is neither
                    yield Member(os.path.normpath(member.name), data, changed)
                bar.update(raw.tell() - bar.n)
            _check_end(archive, tar)
            if hidden:
                tqdm.write(f"{archive}: skipped {hidden} hidden members", file=sys.stdout)
            bar.update(raw.tell() - bar.n)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, RecursionError) as error:  # header after header
        raise UserError(f"{archive}: is no tar archive, damaged or cut short ({error}); get it again.") from None
    except OSError as error:
        raise UserError(f"{archive}: cannot be read ({error.strerror or error}).") from None


def is_archive(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def _is_hidden(name: str) -> bool:
    """Whether the member is hidden or in a folder such as __MACOSX. Folders with a dot may hold the whole archive."""
    *folders, last = name.removeprefix("./").split("/")
    return is_hidden(last) or any(is_hidden(folder) for folder in folders if not folder.startswith("."))


def _decompressed(raw) -> gzip.GzipFile:
    magic = raw.read(2)
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if magic == GZIP_MAGIC else raw


def _check(archive: Path, member: tarfile.TarInfo) -> None:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise UserError(
            f"{archive}: its member {member.name!r} would leave the folder it is unpacked in; get it again."
        )
    if not member.isreg() and not member.isdir():
        raise UserError(f"{archive}: its member {member.name!r} is a link or a device; expected folders and files.")


def _check_end(archive: Path, tar: tarfile.TarFile) -> None:
    """Two blocks of zeros end an archive, of which tarfile reads the first, and takes any other end for one too."""
    rest = tar.fileobj.read(tarfile.RECORDSIZE)
    if not rest or rest.strip(b"\0"):
        raise UserError(f"{archive}: is damaged or cut short; get it again.")
    while tar.fileobj.read(2**20):  # for gzip's checksum
        pass
