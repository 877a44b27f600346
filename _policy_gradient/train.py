"""Joint training of a policy network, which masks each image with noise, and a classifier: the heated model."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from _policy_gradient.flags import SCRIPT
from _policy_gradient.masking import build_mask, build_policy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.runtime.lifetimes import end_with_launcher
from utils.training.update import GuardedUpdate

end_with_launcher()

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from _policy_gradient.examples import draw_policy
from _policy_gradient.flags import build_parser, check_flags
from _policy_gradient.mask import SmoothMask, fading_weight
from _policy_gradient.masking import MaskedImages, draw_masks, policy_health, warn_of_bounds
from _policy_gradient.objective import Objective
from _policy_gradient.policy import Policy
from utils import arguments
from utils.data import splits as wiring_data
from utils.data.dataset import BadImages, ImageFolder, batches
from utils.data.transforms import BatchMixing, Normalize
from utils.results import provenance
from utils.runtime import distributed
from utils.runtime.errors import agreed
from utils.runtime.processes import join_processes, run_script
from utils.runtime.progress import Position, Progress, say
from utils.training import build as wiring
from utils.training import models, optim, run_lock
from utils.training import start as run
from utils.training.compiling import check_compiler
from utils.training.evaluation import Predictions, predict, report_test, validate
from utils.training.meters import RunningMean, batch_accuracy
from utils.training.saver import Saver
from utils.training.state import TrainingState
from utils.training.update import StepGuard


def train_one_epoch(
    classifier: nn.Module,
    policy: nn.Module | None,
    draw: Callable[..., MaskedImages] | None,
    objective: Objective,
    loader: DataLoader,
    normalize: Normalize,
    mixing: BatchMixing,
    update: GuardedUpdate,
    ema: optim.MovingAverage | None,
    saver: Saver,
    bad_images: BadImages,
    *,
    epochs: int,
    device: torch.device,
    label_smoothing: float,
    autocast_dtype: torch.dtype | None,
    print_freq: int,
    label: str = "epoch",
) -> dict[str, float]:
    """One pass over the training split, from where the run stands; gives the log's means. No `policy`, no masks.

    draw: the policy's masks and the masked images, from its heads' output and the images (`draw_masks`).
    """
    start, meters, sampler = saver.position, saver.meters, loader.batch_sampler
    epoch = start.epoch
    sampler.set_position(epoch, start.step, start.images)
    progress = Progress.over_epoch(sampler, label, print_freq, start, epochs)
    guard = StepGuard(device, loader.dataset.path, saver.stop)
    wait = partial(saver.wait_for_batch, guard=guard)
    classifier.train()
    if policy is not None:
        policy.train()
    autocast = partial(torch.autocast, device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)
    masks_per_image = objective.masks_per_image
    policy_state: Policy | None = distributed.unwrap(policy)
    for step, batch in progress.track(batches(loader, device, bad_images, wait)):
        update.begin_step()
        images, targets = mixing(normalize(batch.images), batch.targets, epoch, step)  # (B, 3, S, S), (B,) or (B, C)
        if policy is not None:
            with autocast():
                heads = policy(images)  # h_a and h_b, (B, G*G) each
            masked = draw(*heads, images)
            images = masked.images  # (B*K, 3, S, S)
            if masks_per_image > 1:
                targets = targets.repeat_interleave(masks_per_image, dim=0)
        with autocast():
            logits = classifier(images)  # (B*K, C)
        cross_entropy = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)
        loss, health = cross_entropy.mean(), {}
        if policy is not None:
            loss, advantage = objective(cross_entropy, masked.action.log_prob, masked.action.entropy)
            health = policy_health(policy_state, masked, advantage)
        skipped = update(loss, guard.check(loss, step, batch.indices))
        if policy is not None:
            policy_state.update_prior(*heads, skipped)
            objective.update_baseline(skipped)
        if ema is not None:
            ema.update(epoch, step, skipped)
        top1 = batch_accuracy(logits, targets)
        meters.update(train_loss=loss, train_cross_entropy=cross_entropy.mean(), train_top1=top1, **health)
        if progress.is_due(step):
            guard.raise_if_found(epoch)
            update.raise_if_collapsed()
            bad_images.share()
            progress.show(step, meters.read())
        saver.after_step(progress.position(step), guard)
    return {**meters.read(), **update.read_skipped(), "images_per_second": progress.images_per_second()}


def build_gallery(args: argparse.Namespace, policy: Policy | None, split: ImageFolder) -> Callable[..., Any] | None:
    """What draws the masks of the policy as it is then, by `epochs_done`, on the CPU; None without a policy."""
    if policy is None:
        return None
    mask = build_mask(args, args.val_crop_size, torch.device("cpu"))
    return partial(draw_policy, policy, split, mask, Normalize(args.mean, args.std), args.seed)


def test(
    evaluate: Callable[..., Predictions],
    classifier: nn.Module,
    policy: Policy | None,
    mask: SmoothMask | None,
    normalize: Normalize,
) -> dict[str, Any]:
    """Predictions without masks, and with each image's own mean mask where there is a policy."""
    results = {"clean": evaluate(classifier, prepare=normalize)}
    if policy is None:
        say("The file holds no policy: evaluated without masks only.")
        return results
    distributed.broadcast_buffers(policy)
    policy.eval()

    def masked(images: Tensor) -> Tensor:
        images = normalize(images)  # (B, 3, S, S)
        return images * mask(policy.mean_cells(images))

    results["masked"] = evaluate(classifier, prepare=masked)
    return results


@run_lock.released_at_end()
def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    given = arguments.parse_given(parser, argv)
    device = join_processes(given.get("device"), given.get("timeout", parser.get_default("timeout")))
    run.lock_output_dir(given)
    given = run.find_checkpoint(given, SCRIPT)
    with agreed():
        args, state, weights = run.choose_start(parser, given, SCRIPT)
        masks = args.mask_policy != "none" and (weights is None or weights.policy_net is not None)
        check_flags(args, given, masks)
        start = Position.of(state)
        output_dir = Path(args.output_dir)
        wiring.seed_everything(args)
        trained_on = (weights.classes, weights.path) if args.test_only else ()
        splits = wiring_data.open_splits(args, *trained_on)
        wiring_data.check_same_data(splits, state, args.resume)
        classifier = wiring.classifier(args, splits.classes, state, weights, device)
        policy = build_policy(args, state, weights, device)
        if args.test_only:
            run.make_output_dir(output_dir)
    normalize = wiring.normalize(args, device)
    bad_images = wiring.bad_images(args)
    evaluate = partial(
        predict,
        device=device,
        autocast_dtype=wiring.autocast_dtype(args),
        print_freq=args.print_freq,
        bad_images=bad_images,
        wait=wiring.wait(args),
    )
    evaluation_loader = wiring_data.evaluation_loader(args, splits.evaluation, device)
    if args.test_only:
        origin = provenance.describe(SCRIPT, argv, device)
        wiring.print_network(args, "classifier", args.model, classifier, state, weights)
        wiring_data.use_cache(args, splits, device)
        mask = build_mask(args, args.val_crop_size, device) if masks else None
        results = test(partial(evaluate, loader=evaluation_loader), classifier, policy, mask, normalize)
        report_test(
            output_dir,
            results,
            splits.evaluation.files,
            split=args.split,
            weights=weights.path,
            averaged=weights.averaged,
            origin=origin,
        )
        bad_images.say_count()
        return

    with agreed():
        loader = wiring_data.training_loader(args, splits.training, device)
        mixing = wiring.batch_mixing(args, len(splits.classes))
        models.check_batch_norm(classifier, args.batch_size * args.masks_per_image, "--model")
        mask = build_mask(args, args.train_crop_size, device) if masks else None
        objective = Objective(
            args.objective, args.baseline, args.masks_per_image, args.entropy_weight, args.policy_sign
        ).to(device)
        ema = wiring.moving_average(args, classifier)
        optimizers = {"classifier": wiring.optimizer(args, classifier, args.lr)}
        schedulers: list[LRScheduler] = [wiring.scheduler(args, optimizers["classifier"], start.epoch)]
        if policy is not None and any(True for _ in policy.parameters()):
            models.check_batch_norm(policy, args.batch_size, "--policy-model")
            optimizers["policy"] = wiring.optimizer(args, policy, args.policy_lr or args.lr / 10)
            schedulers.append(
                optim.build_scheduler(optimizers["policy"], "cosineannealinglr", args.epochs, first_epoch=start.epoch)
            )
        networks = [classifier] if policy is None else [classifier, policy.heads]
        update = GuardedUpdate(optimizers, device, wiring.uses_fp16(args), args.clip_grad_norm, networks)
        modules = {"model": classifier, "objective": objective} | ({} if policy is None else {"policy_net": policy})
        training = TrainingState(modules, update, ema, RunningMean(device))
        if state:
            training.put_back(state, args.resume)
        if args.compile:
            check_compiler(device)
        run.begin_run(output_dir, SCRIPT, args.resume, start, args.epochs)
        wiring.write_provenance(args, SCRIPT, argv, splits, start, device)
    wiring.print_network(args, "classifier", args.model, classifier, state, weights, args.weights)
    if policy is not None:
        name = args.policy_model if args.mask_policy == "learned" else f"the same for all images ({args.mask_policy})"
        wiring.print_network(args, "policy", name, policy, state, None)
        objective.print_fact(args.grid)
    wiring.print_plan(args, loader.batch_sampler, optimizers, start, ema)
    wiring_data.use_cache(args, splits, device)
    if args.compile:
        models.compile_in_place(classifier, device)
        if policy is not None:
            models.compile_in_place(policy.heads, device)  # sampling and densities stay outside of the graph
    parallel_classifier = distributed.wrap(classifier, device)
    parallel_policy = None if policy is None else distributed.wrap(policy, device)
    draw, mask_weight = None, None
    if policy is not None:
        mask_weight = torch.ones((), device=device) if args.mask_fade_epochs else None
        draw = partial(
            draw_masks,
            policy,
            mask,
            masks_per_image=args.masks_per_image,
            clamped_density=objective.clamped_density,
            mask_weight=mask_weight,
        )
    if draw is not None and args.compile and device.type == "cuda":
        draw = torch.compile(draw, backend="cudagraphs")  # torch's own kernels, none generated: the same bit for bit
    run.restore_generators(state, args.seed)
    train = partial(
        train_one_epoch,
        parallel_classifier,
        parallel_policy,
        draw,
        objective,
        normalize=normalize,
        mixing=mixing,
        update=update,
        ema=ema,
        bad_images=bad_images,
        epochs=args.epochs,
        device=device,
        label_smoothing=args.label_smoothing,
        autocast_dtype=wiring.autocast_dtype(args),
        print_freq=args.print_freq,
    )
    evaluate = partial(evaluate, prepare=normalize)
    validated = {"val": classifier} | ({"val_ema": ema.model} if ema else {})
    with wiring.saver(args, SCRIPT, splits, training, state) as saver:
        del state, weights  # as large as a checkpoint
        if start.epoch < args.epochs:
            wiring.rehearse(args, train, partial(evaluate, classifier), training, splits, saver, device)
        pictures = wiring.pictures(args, splits, start, build_gallery(args, policy, splits.evaluation))
        for epoch in range(start.epoch, args.epochs):
            line = {"epoch": epoch} | {f"lr_{name}": of.param_groups[0]["lr"] for name, of in optimizers.items()}
            if mask_weight is not None:
                line["mask_weight"] = fading_weight(epoch, args.epochs, args.mask_fade_epochs)
                mask_weight.fill_(line["mask_weight"])  # in place: a CUDA graph may read it
            line |= train(loader, saver=saver)
            warn_of_bounds(epoch, line.get("concentrations_at_bounds", 0.0))
            for scheduler in schedulers:
                scheduler.step()
            predictions, metrics = validate(
                partial(
                    evaluate,
                    loader=evaluation_loader,
                    stop_if_asked=saver.stop_if_asked,
                    wait=saver.wait_for_batch,
                ),
                validated,
                auroc=epoch == args.epochs - 1,
            )
            saver.finish_epoch(metrics, line, partial(pictures.show, predictions))
    bad_images.say_count()
    wiring.say_done(args, saver)


if __name__ == "__main__":
    run_script(main)
