"""Reads tar archives in one pass, plain or gzipped, without unpacking them or trusting a member."""

import gzip
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from utils.data.listing import is_hidden
from utils.runtime.errors import UserError
from utils.runtime.reading import open_regular

GZIP_MAGIC = b"\x1f\x8b"
MAX_BYTES = 2**26  # of a member; about 33 members are held at once
MAX_LIST_BYTES = 2**30  # of a .csv; one is held at a time, and RadImageNet's longest has 80 million
MAX_HEADER_BYTES = 2**20  # of a long name or POSIX extended headers before a member
EXTENDED_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
LATEST = 2**32  # seconds since 1970 that every file system can store


class Member(NamedTuple):
    name: str  # without "./"
    data: bytes
    changed: float  # modification time, seconds since 1970


class BoundedTarInfo(tarfile.TarInfo):
    """Raises ReadError for headers that tarfile would read completely, however long, before it returns a member."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:  # tarfile documents that it may be overridden
        kept = sum(map(len, (*tar.pax_headers, *tar.pax_headers.values()))) if self.type == tarfile.XGLTYPE else 0
        if self.type in EXTENDED_HEADERS and self.size + kept > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header has {self.size} bytes")
        return super()._proc_member(tar)

    def _refuse_sparse(self, *_: object) -> None:
        raise tarfile.ReadError("it contains a sparse file")

    _proc_sparse = _proc_gnusparse_10 = _refuse_sparse  # maps of sparse files have no limit either


def read_archive(archive: Path, endings: tuple[str, ...], label: str) -> Iterator[Member]:
    """The regular files of an archive with these (lower-case) endings, in its order, with a progress bar of its bytes.

    Skips hidden files and prints their number at the end. Raises UserError for a member that would leave its folder or
    is a link or device, for a member that is too long, and for a damaged or truncated archive, possibly only after its
    last complete member.
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
                tar.members.clear()  # would grow to gigabytes
                _check(archive, member)
                name = member.name.lower()
                if _is_hidden(member.name):
                    hidden += 1
                elif member.isreg() and name.endswith(endings):
                    if member.size > (MAX_LIST_BYTES if name.endswith(".csv") else MAX_BYTES):
                        raise UserError(f"{archive}: its member {member.name!r} has {member.size} bytes; remove it.")
                    data = tar.extractfile(member).read()
                    changed = member.mtime if 0 <= member.mtime <= LATEST else 0  # 0 for NaN as well
                    yield Member(os.path.normpath(member.name), data, changed)
                bar.update(raw.tell() - bar.n)
            _check_end(archive, tar)
            if hidden:
                tqdm.write(f"{archive}: skipped {hidden} hidden members", file=sys.stdout)
            bar.update(raw.tell() - bar.n)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, RecursionError) as error:  # header after header
        raise UserError(
            f"{archive}: not a tar archive, or damaged or truncated ({error}); download it again."
        ) from None
    except OSError as error:
        raise UserError(f"{archive}: unreadable ({error.strerror or error}).") from None


def is_archive(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def _is_hidden(name: str) -> bool:
    """Whether a member is hidden or in a folder such as __MACOSX; a dotted folder may hold the whole archive."""
    *folders, last = name.removeprefix("./").split("/")
    return is_hidden(last) or any(is_hidden(folder) for folder in folders if not folder.startswith("."))


def _decompressed(raw: BinaryIO) -> BinaryIO:
    magic = raw.read(2)
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if magic == GZIP_MAGIC else raw


def _check(archive: Path, member: tarfile.TarInfo) -> None:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise UserError(f"{archive}: its member {member.name!r} would leave its folder; download the archive again.")
    if not member.isreg() and not member.isdir():
        raise UserError(f"{archive}: its member {member.name!r} is a link or a device; expected folders and files.")


def _check_end(archive: Path, tar: tarfile.TarFile) -> None:
    """Check for the two blocks of zeros that end an archive; tarfile reads one, and accepts any other end as well."""
    rest = tar.fileobj.read(tarfile.RECORDSIZE)
    if not rest or rest.strip(b"\0"):
        raise UserError(f"{archive}: damaged or truncated; download it again.")
    while tar.fileobj.read(2**20):  # up to the checksum of gzip
        pass
