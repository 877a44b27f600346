"""Test a plan's classifiers on changed images: `python experiments/shifts.py PLAN RESULTS --data-path DATA -o FILE.csv`

For each finished run, model_best.pth of the stages that are tested and keep it is tested on the run's own test images,
as they are ("clean") and changed in seven ways at two strengths (image_changes.py). FILE.csv gets a row for each run
and change. Run again, the command adds what is missing. FILE.md and FILE.png, written next to it, hold the paired
differences of each arm to its control; without RESULTS they are made from FILE.csv alone. One core takes about 10
seconds for each run of Plan S (2,600 images of 48 pixels, test_resnet).

"clean, scaled" shows whether a lower cross-entropy is more than calibration: logits of the unchanged images, divided
by the temperature with the lowest class-balanced cross-entropy on the run's `val` (Guo et al. 2017, arXiv 1706.04599).
This leaves the predicted classes as they are.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from experiments import paired_tables
from experiments.comparisons import balanced_loss
from experiments.image_changes import CLEAN, image_noise, shifted, unchanged
from experiments.paired_tables import Row
from experiments.plan import FINISHED, Plan, Subset, folder_of_run, matches, read_plan, read_record
from experiments.run import SUBSETS
from experiments.subsets import link_subset
from utils.data.dataset import ImageFolder, batches, build_loader
from utils.data.folders import ImageFiles
from utils.data.samplers import EvaluationSampler
from utils.data.splits import transform_for_evaluation
from utils.inference.classifier import Classifier, open_classifier
from utils.inference.features import PREPARATION
from utils.results.intervals import t_interval
from utils.results.metrics import outcome_metrics, outcome_of
from utils.results.run_folder import read_table
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.distributed import resolve_device
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.processes import run_script
from utils.runtime.text import count, print_line, printable
from utils.training import build

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("task", "shift")
REPORTED = ("balanced_loss", "balanced_accuracy", "f1", "ece")
SCALED = "clean, scaled"
WEIGHTS = "model_best.pth"
BATCH_SIZE = 64


class Tested(NamedTuple):
    """A tested stage of a finished run. folder: of the stage; subset: of the data, None for all."""

    arm: str
    seed: int
    task: str
    folder: Path
    subset: Subset | None


# Tests


def find_tested(plan: Plan, results: Path, patterns: str) -> list[Tested]:
    """The tested stages of finished runs that keep their weights, by seed, arms in the plan's order.

    patterns: of the arms. Raises UserError if there is none.
    """
    arms = [arm for arm in plan.arms if matches(arm.name, patterns)]
    if not arms:
        raise UserError(f"--arms {patterns}: matches none of {', '.join(arm.name for arm in plan.arms)}.")
    found, has_weights = [], False
    for arm in arms:
        stages = [stage for stage in arm.stages if stage.test is not None and WEIGHTS in stage.keep]
        has_weights = has_weights or bool(stages)
        for seed in arm.all_seeds:
            run = folder_of_run(results, arm.name, seed)
            if stages and read_record(run / FINISHED, arm):
                for stage in stages:
                    subset = stage.subset and stage.subset.of_seed(seed)
                    found.append(Tested(arm.name, seed, stage.test, run / stage.name, subset))
    if not has_weights:
        raise UserError(f'the plan {plan.name!r}: no tested stage keeps its weights. Give stages keep=("{WEIGHTS}",).')
    if not found:
        raise UserError(f"{results}: no run of these arms has finished yet (no {FINISHED}).")
    return sorted(found, key=lambda tested: tested.seed)


def test_all(tested: Sequence[Tested], data: Path, device: torch.device) -> list[Row]:
    """The rows of stages that were tested on the same images: read once, and changed once for all classifiers.

    data: holds `val` and `test`. Raises UserError for weights and images that are missing, unreadable, or not those of
    the run's own test.
    """
    classifiers = [open_classifier({"file": str(stage.folder / WEIGHTS)}, device) for stage in tested]
    alike: dict[str, list[tuple[Tested, Classifier]]] = {}  # with equal classes and preparation of images
    for stage, classifier in zip(tested, classifiers, strict=True):
        args = classifier.args
        args.channels_last = classifier.weights.args.get("channels_last")
        classifier.model.to(memory_format=build.memory_format(args, device))
        preparation = {name: getattr(args, name) for name in (*PREPARATION, "channels_last")}
        alike.setdefault(f"{classifier.classes} {preparation}", []).append((stage, classifier))
    rows = []
    for group in alike.values():
        val, test = (ImageFiles.find(data / split, classes=group[0][1].classes) for split in ("val", "test"))
        for stage, _ in group:
            check_same_images(stage, test)
        classifiers = [classifier for _, classifier in group]
        on_test = predict(classifiers, test, device, shifted)
        on_val = predict(classifiers, val, device, unchanged)
        for (stage, _), logits, fitted in zip(group, on_test, on_val, strict=True):
            temperature = best_temperature(fitted[CLEAN], torch.from_numpy(val.targets).long())
            logits = {CLEAN: logits[CLEAN], SCALED: logits[CLEAN] / temperature, **logits}
            for shift, values in logits.items():
                outcomes = outcomes_of(values, torch.from_numpy(test.targets).long())
                rows.append(Row(stage.arm, stage.seed, (stage.task, shift), outcomes))
    return rows


def check_same_images(stage: Tested, files: ImageFiles) -> None:
    """Raise UserError if the stage was tested on other images, or on images of other classes."""
    table = read_table(stage.folder / "predictions.csv", ("image", "target"))
    names = (files.path_as_text(index).encode(errors="backslashreplace").decode() for index in range(len(files)))
    classes = (files.classes[target].encode(errors="backslashreplace").decode() for target in files.targets)
    if [(row["image"], row["target"]) for row in table] != list(zip(names, classes, strict=True)):
        raise UserError(
            f"{files.root}: not the images that {stage.folder} was tested on. Give the --data-path and --exclude of "
            "the runs."
        )


@torch.inference_mode()
def predict(
    classifiers: Sequence[Classifier],
    files: ImageFiles,
    device: torch.device,
    change: Callable[[Tensor, Tensor], Iterable[tuple[str, Tensor]]],
) -> list[dict[str, Tensor]]:
    """For each classifier, its logits (N, C) float32 on the CPU, by change. All prepare images in the same way."""
    args = classifiers[0].args
    transform = transform_for_evaluation(args)
    dataset = ImageFolder(files.root, transform, gray=args.gray, upper_8_bits=args.upper_8_bits, files=files)
    loader = build_loader(dataset, EvaluationSampler(len(files), BATCH_SIZE), workers=0, pin_memory=False)
    normalize = build.normalize(args, device)
    logits: list[dict[str, list[Tensor]]] = [{} for _ in classifiers]
    for batch in batches(loader, torch.device("cpu")):
        noise = image_noise(batch.indices.tolist(), batch.images.shape[1:])
        for shift, images in change(batch.images, noise):
            prepared = normalize(images.to(device))
            for by_shift, classifier in zip(logits, classifiers, strict=True):
                by_shift.setdefault(shift, []).append(classifier.model(prepared).float().cpu())
    return [{shift: torch.cat(parts) for shift, parts in by_shift.items()} for by_shift in logits]


def best_temperature(logits: Tensor, targets: Tensor) -> float:
    """The divisor of the logits with the lowest class-balanced cross-entropy, from .05 to 20.

    logits: (N, C), targets: (N,) int64.
    """
    weights = 1 / torch.bincount(targets, minlength=logits.shape[1])[targets]  # (N,)

    def loss(log_temperature: float) -> float:
        losses = nn.functional.cross_entropy(logits.double() / np.exp(log_temperature), targets, reduction="none")
        return float((weights * losses).sum())

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def outcomes_of(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """The values of REPORTED. logits: (N, C), targets: (N,) int64, on the CPU."""
    outcome = outcome_of(logits, targets, calibration=True)
    images = np.bincount(outcome.targets, minlength=outcome.num_classes)
    loss = float(balanced_loss(outcome.targets, outcome.losses[None], images)[0])
    values = {**outcome_metrics(outcome), "balanced_loss": loss}
    return {name: values[name] for name in REPORTED}


# Outputs


def page(plan: Plan, rows: Sequence[Row]) -> str:
    """The content of FILE.md."""
    runs = {(row.arm, row.seed) for row in rows}
    parts = [
        f"# {plan.name}: changed test images",
        f"{count(len(runs), 'run')}. The changes are listed in experiments/image_changes.py.",
        f"## Mean over the seeds that all arms have: {paired_tables.title('balanced_loss')}",
        paired_tables.levels_table(plan, rows, PARTS, "balanced_loss"),
        f"## Mean over the seeds that all arms have: {paired_tables.title('balanced_accuracy')}",
        paired_tables.levels_table(plan, rows, PARTS, "balanced_accuracy"),
        "## Improvement over the control",
        paired_tables.LEGEND,
        paired_tables.differences_table(plan, rows, PARTS, REPORTED),
    ]
    return "\n\n".join(parts) + "\n"


def picture(plan: Plan, rows: Sequence[Row]) -> "Figure | None":
    """The primary contrasts in the balanced cross-entropy, one panel each, one row per change; None without values."""
    from matplotlib.figure import Figure

    from utils.results.figures import COLOURS, FAINT, INK, as_text

    conditions = paired_tables.conditions(rows)
    by_contrast = {
        contrast: [
            paired_tables.differences(rows, condition, contrast.arm, contrast.control, "balanced_loss")
            for condition in conditions
        ]
        for contrast in plan.primary
    }
    drawn = {contrast: values for contrast, values in by_contrast.items() if any(map(len, values))}
    if not drawn:
        return None
    figure = Figure(figsize=(2.2 + 3.4 * len(drawn), 1.3 + 0.27 * len(conditions)), layout="constrained")
    panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, (contrast, values) in zip(panels, drawn.items(), strict=True):
        for place, differences in enumerate(values):
            if len(differences) and np.isfinite(differences).all():
                if interval := t_interval(differences):
                    axes.plot(interval, [place] * 2, color=COLOURS[0], linewidth=2.2, solid_capstyle="butt")
                axes.plot(differences.mean(), place, "o", color=COLOURS[0], markersize=5, markeredgecolor="white")
        axes.axvline(0, color=INK, linewidth=1)
        seeds = max(map(len, values))
        axes.set_title(
            f"{as_text(contrast.arm)}\nagainst {as_text(contrast.control)}, {count(seeds, 'seed')}", fontsize=10
        )
        axes.set_xlabel("improvement, nats")
        axes.grid(color=FAINT, axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    tasks = {task for task, _ in conditions}
    labels = [shift if len(tasks) == 1 else f"{task}: {shift}" for task, shift in conditions]
    panels[0].set_yticks(range(len(conditions)), list(map(as_text, labels)))
    panels[0].invert_yaxis()
    figure.suptitle(
        "Balanced cross-entropy on changed test images:\nmean improvement over seeds, 95 % t-interval", fontsize=11
    )
    return figure


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python experiments/shifts.py")
    add = parser.add_argument
    add("plan", type=expanded_path, metavar="PLAN", help="such as experiments/plans/small.py")
    add("results", type=expanded_path, metavar="RESULTS", nargs="?", help="the output folder of its runs")
    add("-o", "--output", type=expanded_path, metavar="FILE.csv", required=True, help="earlier results in it are kept")
    add("--data-path", type=expanded_path, metavar="DATA", help="that of the runs")
    add("--exclude", type=expanded_path, metavar="FILE", help="that of the runs, if the links in RESULTS are lost")
    add("--arms", metavar="PATTERNS", help="only these arms: shell patterns, separated by commas; default: those of "
        "the plan's primary contrasts, or all if it has none")  # fmt: skip
    add("--against", metavar="ARM", help="print the differences to this arm, from FILE.csv alone; writes nothing")
    add("--device", help="cuda or cpu; default: cuda if available")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    plan = read_plan(options.plan)
    table, text, figure = paired_tables.output_paths(options.output, ".md", ".png")
    rows = paired_tables.read_rows(table, plan, PARTS, REPORTED)
    if options.results is not None and options.against is None:
        rows = add_rows(plan, options, rows)
    if not rows:
        raise UserError(f"-o {table}: no such file. Give RESULTS, the output folder of experiments/run.py.")
    content = page(plan if options.against is None else plan.against(options.against), rows)
    if options.against is not None:
        print("\n".join(map(printable, content.split("\n"))))
        return
    write_atomically(text, content.encode(errors="backslashreplace"))
    drawn = picture(plan, rows)
    if drawn is None:
        figure.unlink(missing_ok=True)
    else:
        from utils.results.figures import write_figure

        write_figure(figure, drawn)
    print("\n".join(map(printable, content.split("\n"))))


def add_rows(plan: Plan, options: argparse.Namespace, rows: list[Row]) -> list[Row]:
    """The rows with those of the stages that have none yet; written to the file after each seed."""
    if options.data_path is None:
        raise UserError("--data-path: is missing. Give that of the runs.")
    device = resolve_device(options.device)
    of_contrasts = {name for contrast in plan.primary for name in (contrast.arm, contrast.control)}
    patterns = options.arms or ",".join(arm.name for arm in plan.arms if arm.name in of_contrasts) or "*"
    # Runs of an older file, which lacks this condition, are tested again.
    done = {(row.arm, row.seed, row.condition[0]) for row in rows if row.condition[1] == SCALED}
    rows = [row for row in rows if (row.arm, row.seed, row.condition[0]) in done]
    missing = [
        stage
        for stage in find_tested(plan, options.results, patterns)
        if (stage.arm, stage.seed, stage.task) not in done
    ]
    groups: dict[tuple[int, Subset | None], list[Tested]] = {}  # tested on the same images
    for stage in missing:
        groups.setdefault((stage.seed, stage.subset), []).append(stage)
    for (seed, subset), stages in groups.items():
        start, folder = time.monotonic(), options.data_path
        if subset is not None:
            folder = options.results / SUBSETS / subset.name
            if not folder.is_dir():
                link_subset(options.data_path, subset, folder, options.exclude)
        new = test_all(stages, folder, device)
        rows = [*rows, *new]
        paired_tables.write_rows(options.output, plan, PARTS, rows)
        print_line(f"seed {seed}: {count(len(stages), 'model')}, {time.monotonic() - start:.0f} s")
    return rows


if __name__ == "__main__":
    run_script(main)
