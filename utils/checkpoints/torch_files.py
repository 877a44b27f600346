"""Files of torch.save, in its zip format and the older one: checked, and copied for torch.load."""

import io
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import BinaryIO

from utils.checkpoints.pickle_scan import Node, Refused, Scan
from utils.runtime.reading import open_regular

ZIP_START = b"PK\x03\x04"  # torch.load, too, recognises its zip format by it
RECORD = re.compile(
    r"[^/]+/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]{1,20})"
)
MOST_RECORDS = 20_000  # one per storage, and six others
OLD_START = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)


def checked_copy(path: Path) -> BinaryIO:
    """A checked copy in memory of a file of torch.save: complete, and holding only what torch.save writes.

    A copy, because a file can change after the check, and two readers can see different records in one zip. Raises
    OSError, Refused, and nearly any other exception for a damaged file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(OLD_START))
        file.seek(0)
        if start.startswith(ZIP_START):
            return _checked_zip(file, size)
        if start != OLD_START:
            raise ValueError("it is not a file of torch.save; the name of a safetensors file ends in .safetensors")
        copy = io.BytesIO(file.read())
    _check_old(copy, size)
    copy.seek(0)
    return copy


def _checked_zip(file: BinaryIO, size: int) -> BinaryIO:
    """A zip with the same records, checksums verified. The directory is checked before anything is unpacked."""
    copy = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(copy, "w") as verified:
        records = {record.filename: record for record in archive.infolist()}
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("its records are compressed, which torch.save never does")
        if sum(record.file_size for record in archive.infolist()) > size:
            raise ValueError("its records claim more bytes than the file has")
        if len(records) < len(archive.infolist()) or len(records) > MOST_RECORDS:
            raise ValueError("it has two records of the same name, or too many records")
        unknown = [name for name in records if not RECORD.fullmatch(name)]
        folders = {name.split("/")[0] for name in records}
        if unknown or len(folders) != 1:
            raise ValueError(f"torch.save writes no record {(unknown or list(records))[0]}")
        [folder] = folders
        scan = Scan(io.BytesIO(archive.read(f"{folder}/data.pkl")), size)
        for key, (count, element_bytes) in scan.storages.items():
            record = records.get(f"{folder}/data/{key}")
            if record is None or record.file_size != count * element_bytes:
                raise Refused(f"its tensors claim {count * element_bytes} bytes of data/{key}, which it does not hold")
        for record in records.values():
            verified.writestr(record.filename, archive.read(record))
    copy.seek(0)
    return copy


def _check_old(file: BinaryIO, size: int) -> None:
    """Check the old format: five pickles (the fourth is the state, the fifth a list of storages), then the elements."""
    *_, scan, listed = [Scan(file, size) for _ in range(5)]
    keys = listed.value.items if isinstance(listed.value, Node) else []
    if sorted(keys) != sorted(scan.storages):
        raise Refused("the storages it lists are not the ones that its tensors need")
    place = file.tell()
    for key in keys:
        count, element_bytes = scan.storages[key]
        file.seek(place)
        if int.from_bytes(file.read(8), "little") != count:
            raise Refused("a storage has another size than its tensors claim")
        place += 8 + count * element_bytes
    if place != size:
        raise Refused("it holds fewer or more values than its tensors claim")
