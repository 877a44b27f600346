"""Writes images of an archive, and images plus their correction masks."""

import io
import os
from pathlib import Path

from utils.data import placing
from utils.data.images import read_image
from utils.radimagenet.archive import Member
from utils.radimagenet.masks import MAX_BYTES, correct, read_mask
from utils.runtime.errors import UserError
from utils.runtime.files import temporary_path
from utils.runtime.reading import open_regular


def copy_corrected(source: str, target: str, exists: bool, mask: str | Member) -> bool:
    """Write the image plus its mask, with the later modification time of the two.

    mask: path of a `.npy` file, or a member with its content. Raises UserError if either is unreadable.
    """
    changed = max(os.stat(source).st_mtime, os.stat(mask).st_mtime if isinstance(mask, str) else mask.changed)
    if exists:
        return placing.is_written(target, changed)
    if isinstance(mask, str):
        with open_regular(mask) as file:
            mask = Member(mask, file.read(MAX_BYTES), changed)  # no mask is longer
    corrected = io.BytesIO()
    correct(read_image(Path(source)), read_mask(mask.data, mask.name)).save(corrected, "PNG")
    placing.write(target, corrected.getvalue(), changed)
    return True


def copy_member(source: str, target: str, exists: bool, member: Member, mask: str | None) -> bool:
    """Write an image of an archive, corrected if there is a mask; source: its name in messages."""
    if mask is None:
        if exists:
            return placing.is_written(target, member.changed, len(member.data))
        placing.write(target, member.data, member.changed)
        return True
    if exists:
        return placing.is_written(target, max(member.changed, os.stat(mask).st_mtime))
    original = str(temporary_path(Path(f"{target}.original")))
    try:
        placing.write(original, member.data, member.changed)
        return copy_corrected(original, target, False, mask)
    except UserError as error:
        raise UserError(str(error).replace(original, source)) from None
    finally:
        Path(original).unlink(missing_ok=True)
