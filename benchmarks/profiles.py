"""Where the time of a step goes: `python -m benchmarks.profiles`, shares of torch.profiler for both training loops."""

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from benchmarks.ours import FixedLoader, build
from benchmarks.report import describe, environment
from benchmarks.setting import Setting
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.processes import run_script

# Parts of the names of operators and kernels, in the order in which they are looked for.
KINDS = {
    "convolution": ("conv", "gemm", "cutlass", "xmma"),
    "BatchNorm": ("batch_norm", "batchnorm", "bn_"),
    "pooling": ("pool",),
    "copies and conversion": ("copy", "memcpy", "to_copy"),
}
SHOWN = 8  # further operators by name


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m benchmarks.profiles")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to check that everything runs")
    parser.add_argument("--output", type=expanded_path, default=Path("benchmarks/results"), help="folder for the text")
    return parser


def seconds_by_operator(loop_flags: Sequence[object], script: ModuleType, setting: Setting) -> tuple[Counter, float]:
    """Seconds that each operator (on a GPU: each kernel) took itself in a few steps, and the share of idle time."""
    loop = build(script, setting.generated(), setting.new_folder("run"), *loop_flags)
    loader = FixedLoader(loop, setting.steps(on_cpu=4, on_gpu=10))
    loop.train_epoch(loader)
    activities = [ProfilerActivity.CUDA if setting.on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        loop.train_epoch(loader)
        if setting.on_gpu:
            torch.cuda.synchronize()
    if setting.on_gpu:
        # Without the named spans that the profiler draws around several kernels.
        events = [e for e in profiler.events() if e.device_type != DeviceType.CPU and not e.is_user_annotation]
        spans = sorted((event.time_range.start, event.time_range.end) for event in events)
        by_name = Counter()
        for event in events:
            by_name[event.name] += event.time_range.elapsed_us() / 1e6
        return by_name, idle_share(spans)
    return Counter({event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}), 0.0


def idle_share(spans: Sequence[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that no span covers; spans: sorted by start."""
    busy, covered = 0.0, spans[0][0]
    for start, end in spans:  # those of several streams overlap
        busy += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return 1 - busy / (covered - spans[0][0])


def shares(seconds: Counter, idle: float) -> str:
    """Lines of text: the share of each kind, and of the longest operators of no kind."""
    kinds, others, total = Counter(), Counter(), seconds.total()
    for name, spent in seconds.items():
        kind = next((kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts)), None)
        (others if kind is None else kinds)[kind or name[:80]] += spent
    lines = [f"{total:.3g} s" + (f", no kernel runs for {idle:.0%} of the time" if idle else "")]
    return "\n".join(
        lines + [f"{spent / total:6.1%}  {name}" for name, spent in [*kinds.most_common(), *others.most_common(SHOWN)]]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Profile, print and write the shares."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = build_parser().parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    blocks = [describe(environment(device, argv, "benchmarks.profiles"))]
    variants = [["--amp"], ["--amp", "--compile"]] if device.type == "cuda" else [[], ["--channels-last", "--amp"]]
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        setting = Setting(device, options.quick, None, Path(folder), repeats=1)
        policy_flags = [*setting.flags("resnet10t"), *setting.policy_flags()]
        for script, flags in ((normal, setting.flags("resnet18")), (policy_gradient, policy_flags)):
            for variant in variants[: 1 if options.quick else None]:
                command = [*flags, *variant]
                title = f"{Path(script.__file__).parent.name} {' '.join(map(str, command))}"
                blocks.append(f"{title}\n{shares(*seconds_by_operator(command, script, setting))}")
    text = "\n\n".join(blocks) + "\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"profile_{device.type}.txt").write_text(text)
    print(text)


if __name__ == "__main__":
    run_script(main)
