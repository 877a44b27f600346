"""The log of a run for TensorBoard: --tensorboard."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from utils.results.log import read_log
from utils.runtime import distributed
from utils.runtime.errors import UserError

if TYPE_CHECKING:  # imported where it is used: it costs a process's start seconds
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
PLOTS = "plots"  # where the mask galleries lie
POLICY = ("mask_", "policy_", "advantage_", "prior_", "concentrations_")  # how the log's names of policies begin


def check_installed() -> None:
    """Raise UserError, before a run begins, where the package of --tensorboard cannot be imported; rank 0 writes."""
    if not distributed.is_main_process():
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except Exception as error:  # a package that is broken raises anything
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            f"--tensorboard: the package tensorboard cannot be imported ({reason}). Install it with pip install "
            "tensorboard, or leave it out with --no-tensorboard."
        ) from None


class Events:
    """OUTPUT/tensorboard: each number of log.jsonl as a scalar, its step the epoch.

    The log is what counts: a resumed run replaces the events of its last epoch, which a kill may have cut off, and of
    all later ones. Where there are no events yet, all epochs of the log are written.
    """

    def __init__(self, output_dir: Path, first_epoch: int) -> None:
        """first_epoch: the one to come."""
        self.output_dir, self.folder = output_dir, output_dir / FOLDER
        there = any(self.folder.glob("*tfevents*"))
        self.next_epoch = max(first_epoch - 1, 0) if there else 0  # the first that is not written, or not for sure
        self.writer: SummaryWriter | None = None

    def write(self, epoch: int) -> None:
        """Write the lines of the log up to this epoch's that are not yet there, with the mask galleries that are.

        Raises what the file system or TensorBoard raise; what was not written is written by the next call.
        """
        try:
            if self.writer is None:  # only now, since its thread should not be there when loaders fork their workers
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.folder), purge_step=self.next_epoch)
            for line in read_log(self.output_dir)[self.next_epoch :]:
                for name, value in line.items():
                    if name != "epoch" and value is not None:
                        self.writer.add_scalar(tag(name), value, line["epoch"])
                self._add_masks(line["epoch"])
            self.writer.flush()
        except Exception:
            self.writer = None  # it goes on failing; a new one writes a new file
            raise
        self.next_epoch = epoch + 1

    def write_masks(self, epoch: int) -> None:
        """Write the gallery of an epoch whose line is written; nothing where there is none."""
        if self.writer is not None:
            self._add_masks(epoch)
            self.writer.flush()

    def _add_masks(self, epoch: int) -> None:
        masks = self.output_dir / PLOTS / f"masks_{epoch}.png"
        if masks.exists():
            pixels = np.asarray(Image.open(masks).convert("RGB"))
            self.writer.add_image("masks", pixels, epoch, dataformats="HWC")

    def close(self) -> None:
        """At the end of the run."""
        if self.writer is not None:
            self.writer.close()


def tag(name: str) -> str:
    """Where TensorBoard shows a quantity of the log: such as train/loss, val/f1, policy/mask_std, run/skipped_steps."""
    group, _, rest = name.partition("_")
    if group in ("train", "val", "lr", "policy"):
        return f"{group}/{rest}"
    return f"policy/{name}" if name.startswith(POLICY) else f"run/{name}"
