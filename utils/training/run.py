"""One run of a script: what it was asked for, what it trains, and its test."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from utils import arguments
from utils.checkpoints.checkpoint import BEST, HEATED, Weights
from utils.data import splits as data_splits
from utils.data.batches import TrainingBatches
from utils.data.dataset import BadImages
from utils.data.splits import Splits
from utils.data.transforms import Normalize
from utils.results import provenance
from utils.results.run_folder import METRICS_FILE, write_test_results
from utils.runtime import distributed, progress
from utils.runtime.distributed import agreed
from utils.runtime.joining import join_processes
from utils.runtime.progress import Position
from utils.training import build, output_dir
from utils.training.compiling import check_compiler, compile_in_place
from utils.training.evaluation import Predictions, measure, predict
from utils.training.loop_settings import LoopSettings
from utils.training.meters import RunningMean
from utils.training.monitor import Monitor
from utils.training.rehearsal import rehearse
from utils.training.saver import Saver
from utils.training.start import choose_start, find_checkpoint
from utils.training.start_summary import print_network
from utils.training.state import TrainingState, restore_generators
from utils.training.update import GuardedUpdate


@dataclass
class Run:
    """One start of a script: its final arguments, its data, and what it starts from."""

    script: str
    argv: Sequence[str] | None
    args: argparse.Namespace
    device: torch.device
    splits: Splits
    start: Position
    state: dict[str, Any] | None  # the checkpoint of --resume
    weights: Weights | None  # of --finetune and --test-only
    best_f1: float
    normalize: Normalize
    bad_images: BadImages

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    def validates(self, epoch: int) -> bool:
        """Whether the run validates after this epoch: every --val-every epochs, and after the last one."""
        return (epoch + 1) % self.args.val_every == 0 or epoch + 1 == self.args.epochs

    def restore_generators(self) -> None:
        """Give each rank its own random numbers, and release the checkpoint, which is as large as all networks."""
        restore_generators(self.state, self.args.seed)
        self.state = self.weights = None

    def finish(self, saver: Saver) -> None:
        """Print what the run came to."""
        self.bad_images.say_count()
        folder = self.output_dir.resolve()
        progress.say(f"Training has finished; its files are in {folder}")
        if saver.keep_best and saver.best_f1 < 0:  # --epochs was lowered on resume to an epoch without validation
            progress.say(f"No epoch was validated, so there is no {BEST}.")
        elif saver.keep_best:
            averaged = " (of the moving average)" if self.args.model_ema else ""
            progress.say(f"Best macro F1 on val: {saver.best_f1:.4f}{averaged}, in {folder / BEST}")
        else:
            progress.say(
                "The classifier was trained on masked images. Average the weights of the last epochs (python -m "
                "utils.weight_averaging) and fine-tune the result (_normal/train.py --finetune)."
            )


class Training(NamedTuple):
    """What is trained, with the checkpoint's state. network: the classifier, wrapped if there are several processes."""

    network: nn.Module
    data: TrainingBatches
    update: GuardedUpdate
    state: TrainingState
    schedulers: list[LRScheduler]
    settings: LoopSettings

    @property
    def validated(self) -> dict[str, nn.Module]:
        """What is validated, by its name in the log."""
        average = self.state.ema
        return {"val": self.state.modules["model"]} | ({"val_ema": average.model} if average else {})

    def learning_rates(self) -> dict[str, float]:
        return {f"lr_{name}": optimizer.param_groups[0]["lr"] for name, optimizer in self.update.optimizers.items()}

    def step_schedules(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()


CheckFlags = Callable[[argparse.Namespace, dict[str, Any], Weights | None], None]


def begin(
    parser: arguments.Parser, argv: Sequence[str] | None, script: str, check_flags: CheckFlags | None = None
) -> Run:
    """Join the processes, settle the arguments, find the starting point and open the data.

    check_flags: the script's own check of its final arguments, the given ones, and the weights it starts from. Raises
    UserError, on all ranks, for bad input of any kind.
    """
    given = arguments.parse_given(parser, argv)
    device = join_processes(given.get("device"), given.get("timeout", parser.get_default("timeout")))
    output_dir.lock_output_dir(given)
    given = find_checkpoint(given, script)
    with agreed():
        args, state, weights = choose_start(parser, given, script)
        if check_flags is not None:
            check_flags(args, given, weights)
        build.seed_everything(args)
        trained_on = (weights.classes, weights.path) if args.test_only else ()
        splits = data_splits.open_splits(args, *trained_on)
        data_splits.check_same_data(splits, state, args.resume)
    return Run(
        script,
        argv,
        args,
        device,
        splits,
        start=Position.of(state),
        state=state,
        weights=weights,
        best_f1=state["best_f1"] if state else -1.0,
        normalize=build.normalize(args, device),
        bad_images=build.bad_images(args),
    )


def build_classifier(run: Run) -> nn.Module:
    """The classifier on its device, with the weights that the run starts from."""
    return build.classifier(run.args, run.splits.classes, run.state, run.weights, run.device)


def build_evaluation(run: Run) -> Callable[..., Predictions]:
    """`predict` for this run's evaluation split: takes the classifier, and further keywords of `predict`."""
    return partial(
        predict,
        loader=data_splits.evaluation_loader(run.args, run.splits.evaluation, run.device),
        prepare=run.normalize,
        device=run.device,
        autocast_dtype=build.autocast_dtype(run.args),
        print_freq=run.args.print_freq,
        bad_images=run.bad_images,
        wait=build.wait(run.args),
    )


def test(
    run: Run,
    evaluate: Callable[..., Predictions],
    classifier: nn.Module,
    inputs: dict[str, Callable[[Tensor], Tensor]] | None = None,
) -> None:
    """--test-only: evaluate on --split; print and write the results.

    inputs: further results by name, each with its way from uint8 images on the device to the classifier's input.
    """
    with agreed():
        output_dir.make_output_dir(run.output_dir)
    origin = provenance.describe(run.script, run.argv, run.device)
    print_network(run, "classifier", run.args.model, classifier)
    data_splits.use_cache(run.args, run.splits, run.device)
    results = {}
    for name, prepare in {"clean": run.normalize, **(inputs or {})}.items():
        predictions = evaluate(classifier, prepare=prepare)
        results[name] = (predictions, measure(predictions, auroc=True, calibration=True))
    if distributed.is_main_process():
        write_test_results(
            run.output_dir,
            results,
            run.splits.evaluation.files,
            split=run.args.split,
            weights=run.weights.path,
            averaged=run.weights.averaged,
            heated=run.weights.is_heated,
            origin=origin,
        )
    run.bad_images.say_count()
    progress.say(f"{METRICS_FILE}, with intervals, and the tables are in {run.output_dir.resolve()}")
    if run.weights.is_heated:
        progress.say(HEATED)


def build_training(
    run: Run,
    modules: dict[str, nn.Module],
    optimizers: dict[str, Optimizer],
    schedulers: list[LRScheduler],
    networks: Sequence[nn.Module],
) -> Training:
    """Everything that is trained, with the state of the checkpoint; the output folder is taken over last.

    modules: by their names in the checkpoint, "model" being the classifier; networks: those whose BatchNorm statistics
    are restored after a skipped step. To be called inside `agreed`. Raises UserError for bad input of any kind.
    """
    args, device, model = run.args, run.device, modules["model"]
    loader = data_splits.training_loader(args, run.splits.training, device)
    mixing = build.batch_mixing(args, len(run.splits.classes))
    data = TrainingBatches(loader, run.normalize, mixing, device, run.bad_images)
    ema = build.moving_average(args, model)
    update = GuardedUpdate(optimizers, device, build.uses_fp16(args), args.clip_grad_norm, networks, ema)
    state = TrainingState(modules, update, RunningMean(device))
    if run.state:
        state.put_back(run.state, args.resume)
    if args.compile:
        check_compiler(device)
    output_dir.begin_run(run.output_dir, run.script, args.resume, run.start, args.epochs)
    if distributed.is_main_process():
        description = provenance.describe(run.script, run.argv, device)
        files = {"train": run.splits.training.files, "val": run.splits.evaluation.files}
        provenance.write_run(run.output_dir, description, run.start, args.resume, files)
    settings = LoopSettings(
        device,
        build.autocast_dtype(args),
        args.label_smoothing,
        args.epochs,
        args.print_freq,
        backbone_frozen=getattr(args, "freeze_backbone", False),
        micro_batches=args.grad_accum_steps,
        class_weights=build.class_weights(args, run.splits, device),
    )
    return Training(model, data, update, state, schedulers, settings)


def use_cache_and_compile(run: Run, networks: Sequence[nn.Module]) -> None:
    """Read images from the caches of --cache-dataset, and compile the networks in place with --compile."""
    data_splits.use_cache(run.args, run.splits, run.device)
    if run.args.compile:
        for network in networks:
            # CUDA graphs keep the outputs of one forward pass, and accumulation has several before a backward pass.
            compile_in_place(network, run.device, cuda_graphs=run.args.grad_accum_steps == 1)


def build_saver(run: Run, training: Training, keep_best: bool = True) -> Saver:
    """keep_best: write model_best.pth; see `Saver`."""
    best_f1 = run.best_f1
    if keep_best and best_f1 >= 0 and not (best := Path(run.args.resume).parent / BEST).exists():
        progress.say(f"{best}: is missing, so the best epoch is chosen among those to come.")
        best_f1 = -1.0
    origin = {
        "script": run.script,
        "classes": run.splits.classes,
        "train_images": len(run.splits.training),
        "image_files": data_splits.digests(run.splits),
        "args": vars(run.args),
    }
    return Saver(
        run.output_dir,
        training.state,
        origin=origin,
        start=run.start,
        best_f1=best_f1,
        checkpoint_steps=run.args.checkpoint_steps,
        timeout=run.args.timeout,
        keep_best=keep_best,
    )


def build_monitor(run: Run, saver: Saver, draw_gallery: Callable[..., Any] | None = None) -> Monitor:
    """Plots and trackers of the run, which end with the saver. draw_gallery: draws masks, given `epochs_done`."""
    monitor = Monitor(
        run.output_dir,
        run.splits.classes,
        first_epoch=run.start.epoch,
        epochs=run.args.epochs,
        plot_every=run.args.plot_every,
        trackers=arguments.trackers(run.args),
        draw_gallery=draw_gallery,
    )
    if distributed.is_main_process():
        monitor.begin(fresh=run.start == Position())
        saver.last_call = monitor.close
    return monitor


def rehearse_run(
    run: Run, training: Training, train: Callable[..., Any], evaluate: Callable[..., Any], saver: Saver
) -> None:
    """Dry run before the first epoch of this start: see `rehearsal.rehearse`."""
    if run.start.epoch == run.args.epochs:  # only the last epoch's files were missing
        return
    training_loader, evaluation_loader = data_splits.one_batch_loaders(run.args, run.splits)
    settings = training.settings._replace(label="rehearsal, epoch")
    model = training.state.modules["model"]
    rehearse(
        partial(train, training.data.with_loader(training_loader), saver.idle(), settings),
        partial(evaluate, model, loader=evaluation_loader, label="rehearsal, evaluate"),
        training.state,
        batch_size=run.args.batch_size,
        output_dir=run.output_dir,
        epochs_left=run.args.epochs - run.start.epoch,
        device=run.device,
    )
