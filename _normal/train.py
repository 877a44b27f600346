"""Conventional training of a timm classifier: from scratch, from a heated model (--finetune), or only --test-only."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from utils import arguments, checkpoint, distributed, models, optim, run, wiring
from utils.data import TrainingSampler, batches
from utils.errors import agreed, join_processes, run_script
from utils.evaluation import measure, predict, report_test
from utils.metrics import RunningMean, batch_accuracy
from utils.progress import Progress, say
from utils.transforms import BatchMixing, Normalize

SCRIPT = "_normal"


def build_parser() -> arguments.Parser:
    parser = arguments.shared_parser(__doc__)
    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--finetune", metavar="FILE", help="start from these weights; other classes get a new head")
    group.add_argument("--freeze-backbone", action="store_true", help="train the head only")
    return parser


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    normalize: Normalize,
    mixing: BatchMixing,
    update: optim.GuardedUpdate,
    ema: optim.MovingAverage | None,
    *,
    epoch: int,
    device: torch.device,
    label_smoothing: float,
    autocast_dtype: torch.dtype | None,
    print_freq: int,
) -> dict[str, float]:
    """One pass over the training split; returns the epoch's means for the log."""
    guard, meters = optim.FiniteGuard(device), RunningMean(device)
    sampler: TrainingSampler = loader.batch_sampler
    sampler.set_position(epoch)
    progress = Progress(f"epoch {epoch}", sampler.steps_per_epoch, print_freq, sampler.global_batch)
    for step, batch in progress.track(batches(loader, device)):
        images, targets = mixing(normalize(batch.images), batch.targets, epoch, step)  # (B, 3, S, S), (B,) or (B, C)
        with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            logits = model(images)  # (B, C)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
        update(loss, guard.check(loss, step))
        if ema is not None:
            ema.update(epoch, step)
        meters.update(train_loss=loss, train_top1=batch_accuracy(logits, targets))
        if progress.is_due(step):
            guard.raise_if_found(epoch)
            update.raise_if_collapsed()
            progress.show(step, meters.read())
    return {**meters.read(), **update.read_skipped(), "images_per_second": progress.images_per_second(step)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    given = arguments.parse_given(parser, argv)
    device = join_processes(given.get("device"))
    with agreed():
        args, state, weights = run.choose_start(parser, given, SCRIPT)
        first_epoch = state["epoch"] if state else 0
        output_dir = Path(args.output_dir)
        wiring.seed_everything(args)
        splits = wiring.open_splits(args)
        model = wiring.classifier(args, splits.classes, state, weights, device)
        if args.test_only:
            run.make_output_dir(output_dir)
    normalize = Normalize(args.mean, args.std).to(device)
    evaluate = partial(
        predict,
        loader=wiring.evaluation_loader(args, splits.evaluation, device),
        prepare=normalize,
        device=device,
        autocast_dtype=wiring.autocast_dtype(args),
        print_freq=args.print_freq,
    )
    if args.test_only:
        report_test(output_dir, {"clean": evaluate(model)}, splits.classes, split=args.split, weights=weights.path)
        return

    with agreed():
        loader = wiring.training_loader(args, splits.training, device)
        mixing = wiring.batch_mixing(args, len(splits.classes))
        if args.freeze_backbone:
            models.freeze_backbone(model)
        else:
            models.check_batch_norm(model, args.batch_size, "--model")
        ema = wiring.moving_average(args, model)
        optimizer = wiring.optimizer(args, model, args.lr)
        scheduler = wiring.scheduler(args, optimizer, first_epoch)
        update = optim.GuardedUpdate({"classifier": optimizer}, device, wiring.uses_fp16(args), args.clip_grad_norm)
        if state:
            run.load_training_state(state, update, ema, args.resume)
        run.begin_run(output_dir, args.resume, first_epoch, args.epochs)
    if args.compile:
        model.compile()
    parallel_model = distributed.wrap(model, device)
    run.restore_generators(state, args.seed)
    best_f1 = state["best_f1"] if state else -1.0

    for epoch in range(first_epoch, args.epochs):
        models.set_training_mode(model, args.freeze_backbone)
        line = {"epoch": epoch, "lr_classifier": optimizer.param_groups[0]["lr"]}
        line |= train_one_epoch(
            parallel_model,
            loader,
            normalize,
            mixing,
            update,
            ema,
            epoch=epoch,
            device=device,
            label_smoothing=args.label_smoothing,
            autocast_dtype=wiring.autocast_dtype(args),
            print_freq=args.print_freq,
        )
        scheduler.step()
        evaluated = ema.model if ema else model
        metrics = measure(evaluate(evaluated), auroc=epoch == args.epochs - 1)
        is_best, best_f1 = metrics["f1"] > best_f1, max(metrics["f1"], best_f1)
        next_state = checkpoint.full_state(
            SCRIPT,
            next_epoch=epoch + 1,
            best_f1=best_f1,
            classes=splits.classes,
            args=vars(args),
            model=model,
            update=update,
            ema=ema,
        )
        run.finish_epoch(output_dir, next_state, evaluated, metrics, line, is_best)
    say(f"{args.epochs} epochs are done; best macro F1 on val {best_f1:.4f}; the files are in {output_dir.resolve()}")


if __name__ == "__main__":
    run_script(main)
