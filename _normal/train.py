"""Conventional training of a timm classifier: from scratch, from a heated model (--finetune), or only --test-only."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _normal.flags import SCRIPT, build_parser
from utils.arguments import check_command_line
from utils.runtime.lifetimes import end_with_launcher
from utils.runtime.processes import run_script

end_with_launcher()
if __name__ == "__main__":
    check_command_line(build_parser())  # --help and misspelt flags need none of the imports below

from torch import nn

from utils.data.batches import TrainingBatches
from utils.runtime import distributed
from utils.runtime.distributed import agreed
from utils.runtime.progress import Progress
from utils.training import build, models, run_lock
from utils.training.accumulation import classify
from utils.training.evaluation import validate
from utils.training.loop_settings import LoopSettings
from utils.training.meters import batch_accuracy
from utils.training.run import (
    Run,
    Training,
    begin,
    build_classifier,
    build_evaluation,
    build_monitor,
    build_saver,
    build_training,
    rehearse_run,
    test,
    use_cache_and_compile,
)
from utils.training.saver import Saver
from utils.training.start_summary import print_network, print_plan
from utils.training.update import GuardedUpdate, StepGuard


def train_one_epoch(
    model: nn.Module, update: GuardedUpdate, data: TrainingBatches, saver: Saver, settings: LoopSettings
) -> dict[str, float]:
    """One pass over the training split, from the run's position on; returns the epoch's means for the log."""
    position, epoch, meters = saver.position, saver.position.epoch, saver.meters
    data.set_position(position)
    progress = Progress.over_epoch(data.sampler, settings.label, settings.print_freq, position, settings.epochs)
    guard = StepGuard(data.device, data.path, saver.stop)
    models.set_training_mode(distributed.unwrap(model), settings.backbone_frozen)
    for step, batch in progress.track(data.batches(partial(saver.wait_for_batch, guard=guard))):
        update.begin_step()
        logits, _, losses = classify(model, batch.images, batch.targets, update, settings)  # (B, C), (B,)
        loss = losses.mean()
        non_finite, _ = guard.exchange(loss, step, batch.indices)
        update(loss, non_finite, epoch, step)
        meters.update(train_loss=loss, train_top1=batch_accuracy(logits, batch.targets))
        if progress.is_due(step):
            guard.raise_if_non_finite(epoch)
            update.raise_if_collapsed()
            data.bad_images.share()
            progress.show(step, meters.read())
        saver.after_step(progress.position(step), guard)
    return {**meters.read(), **update.read_skipped(), "images_per_second": progress.images_per_second()}


def prepare(run: Run, model: nn.Module) -> Training:
    """Everything that is trained, in the state that the run starts from; can be called without `main`."""
    args = run.args
    with agreed():
        if args.freeze_backbone:
            models.freeze_backbone(model)
        else:
            models.check_batch_norm(model, args.batch_size, "--model")
        optimizer = build.optimizer(args, model, args.lr)
        scheduler = build.scheduler(args, optimizer, run.start.epoch)
        training = build_training(run, {"model": model}, {"classifier": optimizer}, [scheduler], [model])
    print_network(run, "classifier", args.model, model, args.weights)
    print_plan(run, training)
    use_cache_and_compile(run, [model])
    training = training._replace(network=distributed.wrap(model, run.device))
    run.restore_generators()  # last: building has drawn random numbers
    return training


@run_lock.released_at_end()
def main(argv: Sequence[str] | None = None) -> None:
    run = begin(build_parser(), argv, SCRIPT)
    with agreed():
        model = build_classifier(run)
    evaluate = build_evaluation(run)
    if run.args.test_only:
        test(run, evaluate, model)
        return

    training = prepare(run, model)
    train = partial(train_one_epoch, training.network, training.update)
    with build_saver(run, training) as saver:
        rehearse_run(run, training, train, evaluate, saver)
        monitor = build_monitor(run, saver)
        evaluate = partial(evaluate, stop_if_asked=saver.stop_if_asked, wait=saver.wait_for_batch)
        for epoch in range(run.start.epoch, run.args.epochs):
            line = {"epoch": epoch, **training.learning_rates()}
            line |= train(training.data, saver, training.settings)
            training.step_schedules()
            predictions, metrics = None, {}
            if run.validates(epoch):
                predictions, metrics = validate(evaluate, training.validated, auroc=epoch == run.args.epochs - 1)
            saver.finish_epoch(metrics, line, partial(monitor.show, predictions))
    run.finish(saver)


if __name__ == "__main__":
    run_script(main)
