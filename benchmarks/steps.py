"""Rows 1 to 4 and 10: masks and training steps, each against the published or the minimum work."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from _policy_gradient.mask import SmoothMask
from _policy_gradient.policy import ConcentrationNetwork
from benchmarks.ours import FixedLoader, Loop, build, network_input
from benchmarks.own_process import OwnProcess
from benchmarks.published import PublishedStep, published_mask
from benchmarks.report import Measurement, Target, measured
from benchmarks.setting import Setting
from benchmarks.timing import Work, compare, milliseconds, rates, synchronizer
from utils.runtime import distributed
from utils.runtime.joining import keep_freed_memory
from utils.training.models import create_classifier


def smooth_mask(setting: Setting) -> list[Measurement]:
    """Row 1: masks from cells, our two matrix products against interpolate + gaussian_blur at full size."""
    size, batch_size, policy = setting.size, setting.batch_size, setting.policy
    ours = SmoothMask(size, **policy).to(setting.device)
    theirs = partial(published_mask, size=size, **policy)
    cells = torch.rand(batch_size, policy["grid"] ** 2, device=setting.device)  # (B, G*G)
    difference = (ours(cells) - theirs(cells)).abs().max().item()
    assert difference < 1e-5, f"the masks differ by {difference}"

    calls = setting.steps(on_cpu=5, on_gpu=200)
    sides = {"ours": lambda: repeat(calls, ours, cells), "theirs": lambda: repeat(calls, theirs, cells)}
    seconds = setting.time(sides)
    comparison = compare(rates(seconds["ours"], calls * batch_size), rates(seconds["theirs"], calls * batch_size))
    what = f"mask from cells, B={batch_size}, S={size}, " + ", ".join(f"{name} {policy[name]:g}" for name in policy)
    target = Target(True, 5 if setting.on_gpu else 20)
    note = f"greatest difference {difference:.1e}; theirs: interpolate + torchvision's gaussian_blur"
    return [measured(1, what, "masks/s", comparison, target, note)]


@torch.no_grad()
def repeat(times: int, function: nn.Module, *inputs: Tensor) -> None:
    for _ in range(times):
        function(*inputs)


def bare_steps(
    steps: int, network: nn.Module, optimizer: Optimizer, images: Tensor, targets: Tensor, loop: Loop
) -> None:
    """The minimum work of training a network on one batch: forward, cross-entropy, backward, optimiser step."""
    optimizer.grad_scale = optimizer.found_inf = None  # set by our guarded update
    network.train()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        with loop.training.settings.autocast():
            logits = network(images)  # (B, C)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()


def bare_policy(steps: int, policy: nn.Module, images: Tensor, loop: Loop) -> None:
    """The policy network's arithmetic: forward through both heads, and backward from a trivial scalar."""
    for _ in range(steps):
        policy.zero_grad(set_to_none=True)
        with loop.training.settings.autocast():
            head_alpha, head_beta = policy(images)  # (B, G*G) each
        (head_alpha.mean() + head_beta.mean()).backward()


def optimizer_steps(steps: int, optimizer: Optimizer) -> None:
    """Updates from the current gradients."""
    optimizer.grad_scale = optimizer.found_inf = None
    for _ in range(steps):
        optimizer.step()


def policy_price(setting: Setting) -> list[Measurement]:
    """Row 2: our joint step over its parts, each timed alone.

    The parts are the classifier's whole training step and the policy network's forward and backward pass. The policy's
    optimiser step is only in ours; it is timed separately, and the note gives the ratio with it as a third part. Both
    sides run the same networks in the same memory format, precision and compilation.
    """
    cases = [("resnet10t", [])]
    if setting.on_gpu:
        cases += [
            (model, flags) for model in ("resnet10t", "resnet50") for flags in (["--amp"], ["--amp", "--compile"])
        ]
    return (_policy_price(setting, *case) for case in cases)


def _policy_price(setting: Setting, model: str, flags: list[str]) -> Measurement:
    command = [*setting.flags(model), *setting.policy_flags(), *flags]
    loop = build(policy_gradient, setting.generated(), setting.new_folder("run"), *command)
    steps = setting.steps(on_cpu=1, on_gpu=30)
    loader = FixedLoader(loop, steps)
    images, targets = network_input(loop, loader)
    policy, optimizers = distributed.unwrap(loop.masking.policy), loop.training.update.optimizers
    sides = {
        "ours": lambda: loop.train_epoch(loader),
        "classifier": lambda: bare_steps(steps, loop.classifier, optimizers["classifier"], images, targets, loop),
        "policy": lambda: bare_policy(steps, policy, images, loop),
        "optimizer": lambda: optimizer_steps(steps, optimizers["policy"]),
    }
    seconds = {name: milliseconds(spent, steps) for name, spent in setting.time(sides).items()}
    parts = [sum(pair) for pair in zip(seconds["classifier"], seconds["policy"], strict=True)]
    with_optimizer = [sum(pair) for pair in zip(parts, seconds["optimizer"], strict=True)]
    what = f"policy step over its parts, {setting.model(model)} {describe(flags)}, B={setting.batch_size}"
    ratio = compare(seconds["ours"], with_optimizer).ratio
    note = f"ratio with the policy's optimiser step among the parts: {ratio:.3f}"
    return measured(
        2, what, "ms/step", compare(seconds["ours"], parts), Target(False, 1.05 if setting.on_gpu else 1.02), note
    )


def against_published(setting: Setting) -> list[Measurement]:
    """Row 3: our joint step against the published one, with the same networks and initial weights.

    Each side has a process of its own: ours keeps freed memory there (`keep_freed_memory`), the published one does not.
    """
    target = Target(True, 3.0 if setting.on_gpu else 1.2)
    faster = ["--amp"] if setting.on_gpu else ["--channels-last"]
    variants = [[]]
    if not setting.quick:
        variants += [faster, [*faster, "--compile"]]
        if not setting.on_gpu:
            variants.append([*faster, "--amp"])  # bf16, which pays where the processor has instructions for it
    return (_against_published(setting, flags, target) for flags in variants)


def _against_published(setting: Setting, flags: list[str], target: Target) -> Measurement:
    setting.generated()  # before both processes look for them
    images = setting.steps(on_cpu=3, on_gpu=30) * setting.batch_size
    with OwnProcess(_our_steps, setting, flags) as ours, OwnProcess(_published_steps, setting, flags) as theirs:
        seconds = setting.time({"ours": ours, "theirs": theirs})
    comparison = compare(*(rates(seconds[name], images) for name in ("ours", "theirs")))
    what = f"_policy_gradient step against the published one, {setting.model('resnet10t')} {describe(flags)}"
    note = "theirs: float32, NCHW, nothing compiled, glibc's default allocator settings"
    return measured(3, f"{what}, B={setting.batch_size}", "images/s", comparison, target, note)


def _our_steps(setting: Setting, flags: list[str]) -> Work:
    loop, loader = _joint_loop(setting, flags, "ours")
    wait = synchronizer(setting.device)
    return lambda: (loop.train_epoch(loader), wait())


def _published_steps(setting: Setting, flags: list[str]) -> Work:
    loop, loader = _joint_loop(setting, flags, "theirs")
    step, wait = published_step_of(setting, loop), synchronizer(setting.device)
    images, targets = (tensor.contiguous() for tensor in network_input(loop, loader))
    keep_freed_memory(False)
    return lambda: ([step(images, targets) for _ in range(loader.steps)], wait())


def _joint_loop(setting: Setting, flags: list[str], name: str) -> tuple[Loop, FixedLoader]:
    command = [*setting.flags("resnet10t"), *setting.policy_flags(), *flags]
    loop = build(policy_gradient, setting.generated(), setting.new_folder(name), *command)
    return loop, FixedLoader(loop, setting.steps(on_cpu=3, on_gpu=30))


def published_step_of(setting: Setting, loop: Loop) -> PublishedStep:
    """The published step on NCHW copies of a loop's networks."""
    policy = distributed.unwrap(loop.masking.policy)
    classes = loop.classifier.get_classifier().out_features
    classifier = create_classifier(setting.model("resnet10t"), classes, setting.size)
    heads = ConcentrationNetwork(setting.model("resnet10t"), setting.policy["grid"], setting.size)
    classifier.load_state_dict(loop.classifier.state_dict())
    heads.load_state_dict(policy.heads.state_dict())
    for network in (classifier, heads):
        network.to(setting.device, memory_format=torch.contiguous_format)
    lr = loop.training.update.optimizers["classifier"].param_groups[0]["lr"]
    return PublishedStep(classifier, heads, policy.prior, lr=lr, **setting.policy)


def plain_step(setting: Setting) -> list[Measurement]:
    """Row 4: our `_normal` step against a bare loop with the same network, optimiser and precision."""
    if setting.on_gpu:
        compiled = ["--amp", "--compile"]
        cases = [("resnet50", 64, ["--amp"]), ("resnet18", 64, compiled)]
        cases += [("resnet50", size, compiled) for size in (256, 400)]
        if setting.quick:
            cases = cases[:1]
    else:
        cases = [("resnet10t", None, [])]
    return (_plain_step(setting, *case) for case in cases)


def _plain_step(setting: Setting, model: str, batch_size: int | None, flags: list[str]) -> Measurement:
    batch_size = setting.batch_size if setting.quick or batch_size is None else batch_size
    command = [*setting.flags(model, batch_size), *flags]
    loop = build(normal, setting.generated(), setting.new_folder("run"), *command)
    steps = setting.steps(on_cpu=1, on_gpu=30)
    loader = FixedLoader(loop, steps)
    images, targets = network_input(loop, loader)
    optimizer = loop.training.update.optimizers["classifier"]
    sides = {
        "ours": lambda: loop.train_epoch(loader),
        "theirs": lambda: bare_steps(steps, loop.classifier, optimizer, images, targets, loop),
    }
    seconds = setting.time(sides)
    comparison = compare(*(rates(seconds[name], loader.images) for name in ("ours", "theirs")))
    what = f"_normal step over a bare loop, {setting.model(model)} {describe(flags)}, B={batch_size}"
    return measured(4, what, "images/s", comparison, Target(True, 0.97), "theirs starts from normalised float images")


def pathwise_price(setting: Setting) -> list[Measurement]:
    """Row 10: our joint step with `pathwise` over the same with `reinforce`: the classifier's gradient at its input."""
    faster = ["--amp"] if setting.on_gpu else ["--channels-last"]
    return (_pathwise_price(setting, flags) for flags in ([[]] if setting.quick else [[], faster]))


def _pathwise_price(setting: Setting, flags: list[str]) -> Measurement:
    steps = setting.steps(on_cpu=1, on_gpu=30)
    sides = {}
    for objective in ("pathwise", "reinforce"):
        command = [*setting.flags("resnet10t"), *setting.policy_flags(), *flags, "--objective", objective]
        loop = build(policy_gradient, setting.generated(), setting.new_folder(objective), *command)
        sides[objective] = partial(loop.train_epoch, FixedLoader(loop, steps))
    seconds = {name: milliseconds(spent, steps) for name, spent in setting.time(sides).items()}
    what = f"pathwise step over a reinforce one, {setting.model('resnet10t')} {describe(flags)}, B={setting.batch_size}"
    return measured(10, what, "ms/step", compare(seconds["pathwise"], seconds["reinforce"]), None, "")


def describe(flags: list[object]) -> str:
    """The name of a variant: its flags, or float32."""
    return " ".join(map(str, flags)) or "float32"
