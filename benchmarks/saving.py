"""Row 11: how long training stands still for a checkpoint, against writing it before the next step."""

import time
from pathlib import Path

from _policy_gradient import train as policy_gradient
from benchmarks.ours import FixedLoader, build
from benchmarks.report import Measurement, Target, measured
from benchmarks.setting import Setting
from benchmarks.timing import compare, milliseconds, synchronizer
from utils.checkpoints import checkpoint
from utils.runtime.files import write_atomically
from utils.runtime.progress import Position
from utils.training.run import build_saver
from utils.training.update import StepGuard


def checkpoint_pause(setting: Setting) -> list[Measurement]:
    """Row 11: the pause for a checkpoint of resnet50 and policy with both optimisers, over a write that is waited for.

    Theirs is how this project saved at first: serialised in memory, written and synchronised before the next step.
    """
    flags = [*setting.flags("resnet50", 8), *setting.policy_flags(), "--checkpoint-steps", 1]
    loop = build(policy_gradient, setting.generated(), setting.new_folder("run"), *flags)
    loop.train_epoch(FixedLoader(loop, 1))  # which gives the optimisers their momenta
    saver, state = build_saver(loop.run, loop.training), loop.training.state
    guard, wait = StepGuard(loop.device, Path, saver.stop), synchronizer(setting.device)
    folder = setting.new_folder("waited")
    folder.mkdir()

    def pause() -> float:
        start = time.perf_counter()
        saver.after_step(Position(0, 1), guard)
        wait()
        paused = time.perf_counter() - start
        saver.writing.wait()
        return paused

    def waited() -> None:
        write_atomically(folder / checkpoint.CHECKPOINT, checkpoint.serialize(state.take()))

    sides = {"ours": pause, "theirs": waited}
    seconds = {name: milliseconds(spent, 1) for name, spent in setting.time(sides).items()}
    size = (folder / checkpoint.CHECKPOINT).stat().st_size / 1e6
    models = " and ".join(map(setting.model, ("resnet50", "resnet10t")))
    note = f"{size:.0f} MB, on the disk of the temporary folder; theirs: written before the next step"
    what = f"pause of training for a checkpoint, {models} with momenta"
    return [measured(11, what, "ms", compare(seconds["ours"], seconds["theirs"]), Target(False, 0.1), note)]
