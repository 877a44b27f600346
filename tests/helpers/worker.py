"""Jobs of several processes, for test_distributed.py: `torchrun tests/helpers/worker.py JOB OUTPUT ...`."""

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributions import Beta

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from _policy_gradient.objective import Objective
from _policy_gradient.policy import create_policy, mean_heads
from tests.conftest import SMALL, SMALL_POLICY
from utils.checkpoints import checkpoint
from utils.data.dataset import ImageFolder, build_loader
from utils.data.samplers import EvaluationSampler
from utils.data.transforms import Normalize, evaluation_transform
from utils.runtime import distributed
from utils.runtime.distributed import agreed
from utils.runtime.errors import UserError
from utils.runtime.joining import join_processes
from utils.runtime.processes import run_script
from utils.runtime.signals import StopRequest
from utils.training import models
from utils.training.evaluation import measure, predict
from utils.training.meters import RunningMean
from utils.training.optim import build_optimizer
from utils.training.saver import Saver
from utils.training.update import GuardedUpdate, NonFiniteLoss, StepGuard

CPU = torch.device("cpu")
SETTINGS = [("reinforce", "learned"), ("reinforce", "prior"), ("reinforce", "none"), ("pathwise", "learned")]
SETTINGS.append(("published", "learned"))  # whose gradients depend on the number of ranks


def all_gradients(output: Path) -> None:
    """The result of `gradients` for each of SETTINGS, by its number."""
    results = {str(number): gradients(*setting) for number, setting in enumerate(SETTINGS)}
    if distributed.is_main_process():
        torch.save(results, output)


def gradients(objective_name: str, mask_policy: str) -> dict[str, torch.Tensor]:
    """Gradients of both networks on a fixed global batch of 8 images with given cells, and the updated prior.

    BatchNorm is frozen. Each rank computes on its part of the batch.
    """
    torch.manual_seed(0)
    classifier, policy = (
        models.create_classifier("test_resnet", 3, 32).eval(),
        create_policy(mask_policy, "test_resnet", 4, 32),
    )
    images, cells = torch.rand(8, 3, 32, 32), torch.rand(8, 16).clamp(0.05, 0.95)
    targets = torch.arange(8) % 3
    own = slice(distributed.rank(), None, distributed.world_size())
    objective = Objective(objective_name)
    parallel = distributed.wrap(classifier, CPU)
    if policy is None:
        loss = F.cross_entropy(parallel(images[own]), targets[own])
    else:
        policy.eval()
        parallel_policy = distributed.wrap(policy, CPU)
        heads = parallel_policy(images[own])
        log_alpha, log_beta = policy.log_concentrations(*heads)
        distribution = Beta(log_alpha.exp(), log_beta.exp())
        moved = cells[own] * (1 + objective.pathwise_sign * (log_alpha - log_alpha.detach()))  # with a known slope
        masks = F.interpolate(moved.view(-1, 1, 4, 4), size=32)
        cross_entropy = F.cross_entropy(parallel(images[own] * masks), targets[own], reduction="none")
        own_means = [mean_heads(*heads), *objective.batch_means(cross_entropy.detach())]
        batch_mean, *means = distributed.combine(own_means)
        losses = cross_entropy, distribution.log_prob(cells[own]), distribution.entropy()
        loss, _ = objective(*losses, means=means)
    loss.backward()
    results = {f"classifier.{name}": value.grad for name, value in classifier.named_parameters()}
    if policy is not None:
        results |= {f"policy.{name}": value.grad for name, value in policy.named_parameters()}
        policy.update_prior(batch_mean, skipped=torch.tensor(False))
        results["prior"] = policy.prior
    priors = distributed.all_gather_object(results.get("prior"))
    assert all(prior is None or torch.equal(prior, priors[0]) for prior in priors)  # equal bits on every rank
    return results


def evaluation(output: Path, data: str) -> None:
    """Predictions and metrics of a fixed classifier; its BatchNorm statistics differ between the ranks at first."""
    torch.manual_seed(0)
    classifier = models.create_classifier("test_resnet", 3, 32)
    for buffer in classifier.buffers():
        if buffer.is_floating_point():
            buffer.add_(distributed.rank())
    dataset = ImageFolder(Path(data) / "val", evaluation_transform(36, 32))
    sampler = EvaluationSampler(len(dataset), 4, distributed.rank(), distributed.world_size())
    loader = build_loader(dataset, sampler, workers=0, pin_memory=False)
    predictions = predict(classifier, loader, Normalize([0.3], [0.3]), CPU)
    metrics = measure(predictions, auroc=True)
    assert distributed.all_gather_object(metrics) == [metrics] * distributed.world_size()
    if distributed.is_main_process():
        torch.save({"predictions": tuple(predictions), "metrics": metrics}, output)


def guard(output: Path) -> None:
    """Three steps, and means over ranks. Only the last rank has a non-finite loss at step 1 and a signal at step 2."""
    torch.manual_seed(0)
    last = distributed.rank() == distributed.world_size() - 1
    model = torch.nn.Linear(2, 1, bias=False)
    parallel = distributed.wrap(model, CPU)
    update = GuardedUpdate({"classifier": build_optimizer("sgd", [{"params": model.parameters()}], 0.1, 0.9)}, CPU)
    stop, meters = StopRequest(), RunningMean(CPU)
    finite = StepGuard(CPU, lambda index: Path(f"{distributed.rank()}_{index}.png"), stop)
    weights, stops = [], []
    stop.__enter__()
    for step in range(3):
        loss = parallel(torch.ones(1, 2)).sum() * (float("nan") if last and step == 1 else 1.0)
        if last and step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        non_finite, _ = finite.exchange(loss, step, torch.tensor([step]))
        update(loss, non_finite)
        stops.append(finite.stop_agreed())
        weights.append(model.weight.detach().clone())
        meters.update(rank=torch.tensor(float(distributed.rank())))
    try:
        finite.raise_if_non_finite(epoch=4)
        report = None
    except NonFiniteLoss as error:
        report = str(error), error.batch
    gathered = distributed.all_gather_object((report, stops))
    means, state = meters.read(), meters.state()
    if distributed.is_main_process():
        torch.save({"weights": weights, "gathered": gathered, "means": means, "state": state}, output)


def collectives(output: Path, data: str) -> None:
    """The collectives within each step of a run, without DDP's own; then `combine` of several tensors."""
    calls, begin_step, after_step = [], GuardedUpdate.begin_step, Saver.after_step

    def watched(name: str, call: Callable) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return call(*args, **kwargs)

        return counted

    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier"):
        setattr(dist, name, watched(name, getattr(dist, name)))
    GuardedUpdate.begin_step = lambda update: (calls.append("begin"), begin_step(update))
    Saver.after_step = lambda *args: (after_step(*args), calls.append("end"))
    flags = ["--objective", "reinforce", "--epochs", "1", "--batch-size", "2", "--clip-grad-norm", "1"]
    folders = ["--data-path", data, "--output-dir", f"{output}_run"]
    policy_gradient.main([*SMALL_POLICY, *flags, *folders, "--print-freq", "100"])
    starts = [number for number, name in enumerate(calls) if name == "begin"]
    steps = [calls[start + 1 : calls.index("end", start)] for start in starts]

    rank = distributed.rank()
    values = [
        torch.tensor(rank + 1.0),
        torch.tensor([[1.0, 6.0 * (rank == 1)]]),
        torch.tensor(rank == 2),
        torch.tensor(False),
    ]
    values.append(torch.tensor(1e-9 * (rank == 0) + 4e-9 * (rank == 2), dtype=torch.float64))
    combined = distributed.combine(values)
    if distributed.is_main_process():
        dtypes = [str(value.dtype) for value in combined]
        torch.save({"steps": steps, "combined": [value.tolist() for value in combined], "dtypes": dtypes}, output)


def full_disk(output: Path, data: str) -> None:
    """A run whose second checkpoint cannot be written."""
    saves, save = itertools.count(1), checkpoint.save_checkpoint

    def save_once(output_dir: Path, state: dict) -> None:
        if next(saves) == 2:
            raise UserError("the disk is full")
        save(output_dir, state)

    checkpoint.save_checkpoint = save_once
    normal.main([*SMALL, "--data-path", data, "--output-dir", str(output), "--epochs", "9", "--checkpoint-steps", "1"])


def failure(output: Path, kind: str) -> None:
    """An error on the last rank only: in a check that all ranks agree on (`agreed`), or anywhere else (`alone`)."""
    last = distributed.rank() == distributed.world_size() - 1
    if kind == "agreed":
        with agreed():
            if last:
                raise UserError("only the last rank saw this")
    if last:
        raise UserError("only the last rank saw this")
    distributed.barrier()
    distributed.all_reduce_mean(torch.ones(1))  # waits for the rank that has ended


def main() -> None:
    job, output, *rest = sys.argv[1:]
    if job not in ("collectives", "full_disk"):  # where the script joins
        join_processes("cpu")
    jobs = {
        "gradients": all_gradients,
        "evaluation": evaluation,
        "guard": guard,
        "collectives": collectives,
        "full_disk": full_disk,
        "failure": failure,
    }
    jobs[job](Path(output), *rest)


if __name__ == "__main__":
    run_script(main)
