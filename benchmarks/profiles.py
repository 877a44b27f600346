"""Where the time of a step goes: `python -m benchmarks.profiles`, a short reading of torch.profiler for both loops."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent, FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from benchmarks.ours import FixedLoader, Loop, build
from benchmarks.report import describe, environment
from benchmarks.setting import Setting
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.processes import run_script

OPERATORS = 12  # that are named


def profile_loop(loop: Loop, loader: FixedLoader) -> profile:
    """One pass of the real loop under the profiler, after one without it."""
    loop.run(loader)
    activities = [ProfilerActivity.CPU]
    if loop.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        loop.run(loader)
        if loop.device.type == "cuda":
            torch.cuda.synchronize()
    return profiler


def is_kernel(event: FunctionEvent | FunctionEventAvg) -> bool:
    """True for what the GPU ran, and not for the named spans that the profiler draws round several kernels."""
    return event.device_type != DeviceType.CPU and not event.is_user_annotation


def top_operators(profiler: profile, on_gpu: bool) -> list[str]:
    """The operators, or on a GPU the kernels, that take most time themselves, with their share of all such time."""
    rows = []
    for event in profiler.key_averages():
        if on_gpu and is_kernel(event):
            rows.append((event.self_device_time_total, event.count, event.key))
        elif not on_gpu:
            rows.append((event.self_cpu_time_total, event.count, event.key))
    total = sum(microseconds for microseconds, _, _ in rows) or 1
    rows.sort(reverse=True)
    return [
        f"{100 * microseconds / total:5.1f} %  {microseconds / 1000:10.2f} ms  {count:6d} x  {name[:80]}"
        for microseconds, count, name in rows[:OPERATORS]
    ]


def idle_share(profiler: profile) -> float:
    """The share of the time between the first kernel's start and the last one's end in which none runs."""
    kernels = filter(is_kernel, profiler.events())
    spans = sorted((kernel.time_range.start, kernel.time_range.end) for kernel in kernels)
    if not spans:
        return float("nan")
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:  # kernels of several streams overlap
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / (end - spans[0][0])


def read(script: ModuleType, setting: Setting, steps: int, flags: Sequence[object]) -> list[str]:
    """The reading of one script's loop with these flags, as lines."""
    loop = build(script, setting.generated(), setting.new_folder("run"), *flags)
    loader = FixedLoader(loop, steps)
    profiler = profile_loop(loop, loader)
    name = Path(script.__file__).parent.name
    lines = [f"{name}, {' '.join(map(str, flags))}", f"{steps} steps, {len(loader.batch.images)} images each"]
    if setting.on_gpu:
        lines.append(f"the GPU idles {100 * idle_share(profiler):.1f} % of the time, under the profiler")
    return [*lines, *top_operators(profiler, setting.on_gpu)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m benchmarks.profiles")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="None: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which only show that everything runs")
    parser.add_argument("--steps", type=int, help="None: 10, and 2 with --quick")
    parser.add_argument("--output", type=expanded_path, default=Path("benchmarks/results"), help="folder of the text")
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    steps = options.steps or (2 if options.quick else 10)
    blocks = [describe(environment(device, argv, "benchmarks.profiles")).splitlines()]
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        setting = Setting(device, options.quick, None, Path(folder), repeats=1)
        variants = [["--amp"], ["--amp", "--compile"]] if setting.on_gpu and not setting.quick else [[]]
        for variant in variants:
            blocks.append(read(normal, setting, steps, [*setting.flags("resnet18"), *variant]))
            flags = [*setting.flags("resnet10t"), *setting.policy_flags(), *variant]
            blocks.append(read(policy_gradient, setting, steps, flags))
    text = "\n\n".join("\n".join(block) for block in blocks) + "\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"profile_{device.type}.txt").write_text(text)
    print(text)


if __name__ == "__main__":
    run_script(main)
