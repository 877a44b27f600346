"""Joint training of a policy network, which masks each image with noise, and a classifier: the heated model."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _policy_gradient.flags import SCRIPT, build_parser
from utils.arguments import check_command_line
from utils.runtime.lifetimes import end_with_launcher
from utils.runtime.processes import run_script

end_with_launcher()
if __name__ == "__main__":
    check_command_line(build_parser())  # --help and misspelt flags need none of the imports below

from torch import nn

from _policy_gradient.checks import check_flags
from _policy_gradient.gallery import gallery_of
from _policy_gradient.masking import Masking, build_masking, build_objective, build_policy, mean_masks, warn_of_bounds
from _policy_gradient.policy import Policy
from utils.data.batches import TrainingBatches
from utils.runtime import distributed
from utils.runtime.distributed import agreed
from utils.runtime.progress import Progress
from utils.training import build, models, optim, run_lock
from utils.training.accumulation import InMicroBatches, classify
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
    classifier: nn.Module,
    masking: Masking | None,
    update: GuardedUpdate,
    data: TrainingBatches,
    saver: Saver,
    settings: LoopSettings,
) -> dict[str, float]:
    """One pass over the training split, from the run's position on; returns the epoch's means for the log.

    masking: policy, masks and objective; None with --mask-policy none.
    """
    position, epoch, meters = saver.position, saver.position.epoch, saver.meters
    data.set_position(position)
    progress = Progress.over_epoch(data.sampler, settings.label, settings.print_freq, position, settings.epochs)
    guard = StepGuard(data.device, data.path, saver.stop)
    classifier.train()
    if masking is not None:
        masking.policy.train()
    for step, batch in progress.track(data.batches(partial(saver.wait_for_batch, guard=guard))):
        update.begin_step()
        images, targets, scale = batch.images, batch.targets, None  # (B, 3, S, S), (B,) or (B, C)
        if masking is not None:
            with settings.autocast():
                heads = masking.policy(images)  # h_a and h_b, (B, G*G) each
            masked = masking.draw(*heads, images)
            images, targets = masked.images, masking.repeat(targets)  # (B*K, 3, S, S), (B*K,) or (B*K, C)
            log_prob = masked.action.log_prob  # (B*K, G*G)
            scale = masking.objective.classifier_scale(log_prob) if settings.micro_batches > 1 else None
        logits, cross_entropy, losses = classify(classifier, images, targets, update, settings, scale)  # (B*K, ...)
        loss = checked = losses.mean()
        means, health = [], {}
        if masking is not None:
            checked, means = checked + log_prob.mean(), masking.batch_means(heads, cross_entropy)
        non_finite, means = guard.exchange(checked, step, batch.indices, means)  # with all ranks
        if masking is not None:
            loss, advantage = masking.loss(masked.action, losses, cross_entropy, means)
            health = masking.health(masked, advantage)
        skipped = update(loss, non_finite, epoch, step)
        if masking is not None:
            masking.update(means, skipped)  # the running prior and the baseline
        top1 = batch_accuracy(logits, targets)
        meters.update(train_loss=loss, train_cross_entropy=cross_entropy.mean(), train_top1=top1, **health)
        if progress.is_due(step):
            guard.raise_if_non_finite(epoch)
            update.raise_if_collapsed()
            data.bad_images.share()
            progress.show(step, meters.read())
        saver.after_step(progress.position(step), guard)
    return {**meters.read(), **update.read_skipped(), "images_per_second": progress.images_per_second()}


def prepare(run: Run, classifier: nn.Module, policy: Policy | None) -> tuple[Training, Masking | None]:
    """Everything that is trained, in the state that the run starts from; can be called without `main`."""
    args, first_epoch = run.args, run.start.epoch
    with agreed():
        models.check_batch_norm(classifier, args.batch_size * args.masks_per_image, "--model")
        objective = build_objective(args).to(run.device)
        modules = {"model": classifier, "objective": objective}
        optimizers = {"classifier": build.optimizer(args, classifier, args.lr)}
        schedulers = [build.scheduler(args, optimizers["classifier"], first_epoch)]
        networks = [classifier]
        if policy is not None:
            modules["policy_net"] = policy
            networks.append(policy.heads)  # sampling and densities stay outside of the compiled graph
        if policy is not None and list(policy.parameters()):
            models.check_batch_norm(policy, args.batch_size, "--policy-model")
            optimizers["policy"] = build.optimizer(args, policy, args.policy_lr or args.lr / 10)
            cosine = optim.build_scheduler(
                optimizers["policy"], "cosineannealinglr", args.epochs, first_epoch=first_epoch
            )
            schedulers.append(cosine)
        training = build_training(run, modules, optimizers, schedulers, networks)
    print_network(run, "classifier", args.model, classifier, args.weights)
    if policy is not None:
        name = args.policy_model if args.mask_policy == "learned" else f"the same for all images ({args.mask_policy})"
        print_network(run, "policy", name, policy)
        objective.print_fact(args.grid)
    print_plan(run, training)
    use_cache_and_compile(run, networks)
    if objective.pathwise_sign and "policy" in optimizers and args.grad_accum_steps > 1:
        # One backward pass goes through all micro-batches to the masks.
        network = InMicroBatches(classifier, args.grad_accum_steps)
        training = training._replace(network=network, settings=training.settings._replace(micro_batches=1))
    training = training._replace(network=distributed.wrap(training.network, run.device))
    masking = None if policy is None else build_masking(args, policy, objective, run.device)
    run.restore_generators()  # last: building has drawn random numbers
    return training, masking


@run_lock.released_at_end()
def main(argv: Sequence[str] | None = None) -> None:
    run = begin(build_parser(), argv, SCRIPT, check_flags)
    with agreed():
        classifier = build_classifier(run)
        policy = build_policy(run.args, run.state, run.weights, run.device)
    evaluate = build_evaluation(run)
    if run.args.test_only:
        test(run, evaluate, classifier, mean_masks(run, policy))
        return

    training, masking = prepare(run, classifier, policy)
    train = partial(train_one_epoch, training.network, masking, training.update)
    with build_saver(run, training, keep_best=masking is None) as saver:
        rehearse_run(run, training, train, evaluate, saver)
        monitor = build_monitor(run, saver, gallery_of(run, policy))
        evaluate = partial(evaluate, stop_if_asked=saver.stop_if_asked, wait=saver.wait_for_batch)
        for epoch in range(run.start.epoch, run.args.epochs):
            line = {"epoch": epoch, **training.learning_rates()}
            if masking is not None:
                line |= masking.fade(epoch)
            line |= train(training.data, saver, training.settings)
            warn_of_bounds(epoch, line.get("concentrations_at_bounds", 0.0))
            training.step_schedules()
            predictions, metrics = None, {}
            if run.validates(epoch):
                predictions, metrics = validate(evaluate, training.validated, auroc=epoch == run.args.epochs - 1)
            saver.finish_epoch(metrics, line, partial(monitor.show, predictions))
    run.finish(saver)


if __name__ == "__main__":
    run_script(main)
