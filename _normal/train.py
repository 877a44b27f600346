"""Conventional training of a timm classifier: from scratch, from a heated model (--finetune), or only --test-only."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.flags import shared_parser
from utils.runtime.lifetimes import end_with_launcher
from utils.training.update import GuardedUpdate

end_with_launcher()

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from utils import arguments
from utils.data import splits as wiring_data
from utils.data.dataset import BadImages, batches
from utils.data.transforms import BatchMixing, Normalize
from utils.results import provenance
from utils.runtime import distributed
from utils.runtime.command_line import expanded
from utils.runtime.errors import agreed
from utils.runtime.processes import join_processes, run_script
from utils.runtime.progress import Position, Progress
from utils.training import build as wiring
from utils.training import models, optim, run_lock
from utils.training import start as run
from utils.training.compiling import check_compiler
from utils.training.evaluation import predict, report_test, validate
from utils.training.meters import RunningMean, batch_accuracy
from utils.training.saver import Saver
from utils.training.state import TrainingState
from utils.training.update import StepGuard

SCRIPT = "_normal"


def build_parser() -> arguments.Parser:
    parser = shared_parser(__doc__)
    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--finetune", type=expanded, metavar="FILE", help="start from these weights; other classes get "
        "a new head")  # fmt: skip
    group.add_argument("--freeze-backbone", action="store_true", help="train the head only")
    return parser


def train_one_epoch(
    model: nn.Module,
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
    backbone_frozen: bool,
    label_smoothing: float,
    autocast_dtype: torch.dtype | None,
    print_freq: int,
    label: str = "epoch",
) -> dict[str, float]:
    """One pass over the training split, from where the run stands; returns the epoch's means for the log."""
    start, meters, sampler = saver.position, saver.meters, loader.batch_sampler
    epoch = start.epoch
    sampler.set_position(epoch, start.step, start.images)
    progress = Progress.over_epoch(sampler, label, print_freq, start, epochs)
    guard = StepGuard(device, loader.dataset.path, saver.stop)
    wait = partial(saver.wait_for_batch, guard=guard)
    models.set_training_mode(distributed.unwrap(model), backbone_frozen)
    for step, batch in progress.track(batches(loader, device, bad_images, wait)):
        update.begin_step()
        images, targets = mixing(normalize(batch.images), batch.targets, epoch, step)  # (B, 3, S, S), (B,) or (B, C)
        with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            logits = model(images)  # (B, C)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
        skipped = update(loss, guard.check(loss, step, batch.indices))
        if ema is not None:
            ema.update(epoch, step, skipped)
        meters.update(train_loss=loss, train_top1=batch_accuracy(logits, targets))
        if progress.is_due(step):
            guard.raise_if_found(epoch)
            update.raise_if_collapsed()
            bad_images.share()
            progress.show(step, meters.read())
        saver.after_step(progress.position(step), guard)
    return {**meters.read(), **update.read_skipped(), "images_per_second": progress.images_per_second()}


@run_lock.released_at_end()
def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    given = arguments.parse_given(parser, argv)
    device = join_processes(given.get("device"), given.get("timeout", parser.get_default("timeout")))
    run.lock_output_dir(given)
    given = run.find_checkpoint(given, SCRIPT)
    with agreed():
        args, state, weights = run.choose_start(parser, given, SCRIPT)
        start = Position.of(state)
        output_dir = Path(args.output_dir)
        wiring.seed_everything(args)
        trained_on = (weights.classes, weights.path) if args.test_only else ()
        splits = wiring_data.open_splits(args, *trained_on)
        wiring_data.check_same_data(splits, state, args.resume)
        model = wiring.classifier(args, splits.classes, state, weights, device)
        if args.test_only:
            run.make_output_dir(output_dir)
    normalize = wiring.normalize(args, device)
    bad_images = wiring.bad_images(args)
    evaluate = partial(
        predict,
        prepare=normalize,
        device=device,
        autocast_dtype=wiring.autocast_dtype(args),
        print_freq=args.print_freq,
        bad_images=bad_images,
        wait=wiring.wait(args),
    )
    evaluation_loader = wiring_data.evaluation_loader(args, splits.evaluation, device)
    if args.test_only:
        origin = provenance.describe(SCRIPT, argv, device)
        wiring.print_network(args, "classifier", args.model, model, state, weights)
        wiring_data.use_cache(args, splits, device)
        results = {"clean": evaluate(model, evaluation_loader)}
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
        if args.freeze_backbone:
            models.freeze_backbone(model)
        else:
            models.check_batch_norm(model, args.batch_size, "--model")
        ema = wiring.moving_average(args, model)
        optimizer = wiring.optimizer(args, model, args.lr)
        scheduler = wiring.scheduler(args, optimizer, start.epoch)
        optimizers = {"classifier": optimizer}
        update = GuardedUpdate(optimizers, device, wiring.uses_fp16(args), args.clip_grad_norm, [model])
        training = TrainingState({"model": model}, update, ema, RunningMean(device))
        if state:
            training.put_back(state, args.resume)
        if args.compile:
            check_compiler(device)
        run.begin_run(output_dir, SCRIPT, args.resume, start, args.epochs)
        wiring.write_provenance(args, SCRIPT, argv, splits, start, device)
    wiring.print_network(args, "classifier", args.model, model, state, weights, args.weights)
    wiring.print_plan(args, loader.batch_sampler, optimizers, start, ema)
    wiring_data.use_cache(args, splits, device)
    if args.compile:
        models.compile_in_place(model, device)
    parallel_model = distributed.wrap(model, device)
    run.restore_generators(state, args.seed)
    train = partial(
        train_one_epoch,
        parallel_model,
        normalize=normalize,
        mixing=mixing,
        update=update,
        ema=ema,
        bad_images=bad_images,
        epochs=args.epochs,
        device=device,
        backbone_frozen=args.freeze_backbone,
        label_smoothing=args.label_smoothing,
        autocast_dtype=wiring.autocast_dtype(args),
        print_freq=args.print_freq,
    )
    validated = {"val": model} | ({"val_ema": ema.model} if ema else {})
    with wiring.saver(args, SCRIPT, splits, training, state) as saver:
        del state, weights  # as large as a checkpoint
        if start.epoch < args.epochs:
            wiring.rehearse(args, train, partial(evaluate, model), training, splits, saver, device)
        pictures = wiring.pictures(args, splits, start)
        for epoch in range(start.epoch, args.epochs):
            line = {"epoch": epoch, "lr_classifier": optimizer.param_groups[0]["lr"]}
            line |= train(loader, saver=saver)
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
