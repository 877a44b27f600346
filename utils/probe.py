"""Judge frozen backbones by k nearest neighbours and a logistic regression of their features.

`python -m utils.probe WEIGHTS [WEIGHTS ...] --data-path DATA`. The classes are those of DATA; the weights may have been
trained on others. Both probes are fitted on train; k and C are chosen by macro F1 on val, and the results are those on
test. Several WEIGHTS are compared on the same images, as differences to the first. With --shots the probes are also
fitted to a few images of each class, for a label-efficiency curve.
"""

import hashlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.arguments import check_command_line
from utils.inference.flags import CSV, JSON, PICTURE, probe_parser
from utils.runtime.processes import run_script

if __name__ == "__main__":
    check_command_line(probe_parser(__doc__))  # --help and misspelt flags need none of the imports below

import numpy as np
import torch

from utils import arguments
from utils.choices import SPLITS
from utils.data.folders import LAYOUT, ImageFiles, read_excluded
from utils.data.splits import print_excluded, print_split
from utils.inference import probes
from utils.inference.comparison import Difference, Intervals, Result, compare, probe_all, scores_over_draws
from utils.inference.features import Features, Source, load_features, open_sources
from utils.inference.probes import PROBE_TITLES, SCORES
from utils.results import provenance
from utils.results.intervals import LEVEL, RESAMPLES
from utils.results.metrics import METRIC_TITLES
from utils.runtime.distributed import resolve_device
from utils.runtime.errors import UserError
from utils.runtime.files import check_absent, make_folder, write_atomically, write_json
from utils.runtime.progress import say
from utils.runtime.reading import open_regular
from utils.runtime.text import count, csv_table, list_names, print_line, printable
from utils.training import build

READING = ("batch_size", "workers", "bad_images", "max_bad_images")  # flags of the loaders


def open_splits(root: Path, exclude: str | None) -> dict[str, ImageFiles]:
    """The images of train, val and test; the latter two may lack classes.

    Raises UserError for missing folders, a single class, other classes than in train, and an unfit --exclude.
    """
    if not root.is_dir():
        raise UserError(f"--data-path {root}: no such folder; expected {LAYOUT}.")
    excluded = read_excluded(Path(exclude)) if exclude else dict.fromkeys(SPLITS, frozenset())
    splits: dict[str, ImageFiles] = {}
    for name in SPLITS:
        classes = splits["train"].classes if splits else None
        splits[name] = ImageFiles.find(root / name, excluded[name], classes)
    if len(splits["train"].classes) == 1:
        raise UserError(f"{root / 'train'}: holds a single class; expected two or more, as {LAYOUT}.")
    for files in splits.values():
        print_split(files)
    if exclude:
        print_excluded(exclude, excluded, list(splits.values()))
    return splits


def check_shots(shots: list[int], targets: np.ndarray, classes: list[str]) -> None:
    """Print which classes have too few training images for a number of shots; raises UserError if all have."""
    images = np.bincount(targets, minlength=len(classes))
    for number in shots:
        small = [name for name, has in zip(classes, images, strict=True) if has < number]
        if images.max() <= number:
            raise UserError(
                f"--shots {number}: the largest class has {count(int(images.max()), 'training image')}; give a smaller "
                "number (all training images are used in any case)."
            )
        if small:
            say(f"--shots {number}: fewer images in {list_names(small)} ({count(len(small), 'class')}); all are used.")


def prepare_output(folder: Path, root: Path, overwrite: bool) -> None:
    """Create the output folder. Raises UserError for existing results, and for a folder among the images."""
    if any(folder.resolve().is_relative_to((root / split).resolve()) for split in SPLITS):
        raise UserError(f"--output-dir {folder}: lies among the images of --data-path; give another folder.")
    for name in (JSON, CSV, PICTURE):
        check_absent(folder / name, overwrite and not (folder / name).is_dir(), "--output-dir")
    make_folder(folder, "--output-dir")
    make_folder(folder / "features", "--output-dir")


def extract_all(
    sources: list[Source], splits: dict[str, ImageFiles], folder: Path, device: torch.device
) -> dict[str, dict[str, Features]]:
    """The features by weights and split. Raises UserError if not the same images are readable for all weights."""
    bad_images = build.bad_images(sources[0].args)
    features: dict[str, dict[str, Features]] = {}
    for source in sources:
        features[source.name] = {
            name: load_features(source, files, folder, bad_images, device) for name, files in splits.items()
        }
        source.backbone.cpu()
    bad_images.say_count()
    first = features[sources[0].name]
    for source in sources[1:]:
        for name, split in features[source.name].items():
            if not np.array_equal(split.indices, first[name].indices):
                raise UserError(
                    f"{source.name}: not the same images of {name} can be read as for {sources[0].name}; give the same "
                    "--upper-8-bits for all weights, or replace the unreadable images."
                )
    if len(np.unique(first["train"].targets)) < 2:
        raise UserError(f"{splits['train'].root}: only one class has readable images; a probe needs two.")
    return features


# Outputs


def describe_start(argv: Sequence[str] | None, device: torch.device) -> dict[str, Any]:
    """The command, time, versions and hardware, as in run.json. argv: of `main`."""
    import sklearn

    start = provenance.describe("", argv, device)
    start["command"] = shlex.join(["python", "-m", "utils.probe", *(sys.argv[1:] if argv is None else argv)])
    start["versions"]["scikit-learn"] = sklearn.__version__
    return start


def describe_settings(shots: list[int], draws: int, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "shots": shots,
        "draws": draws if shots else 0,
        "k": probes.NEIGHBOURS,
        "temperature": probes.TEMPERATURE,
        "C": probes.STRENGTHS,
        "iterations": probes.ITERATIONS,
        "level": LEVEL,
        "resamples": RESAMPLES,
    }


def describe_result(result: Result, intervals: Intervals) -> dict[str, Any]:
    """The fields of the result; with all training images also the intervals of its metrics."""
    if result.shots is not None:
        return result._asdict()
    return {**result._asdict(), "intervals": intervals[result.weights, result.probe]}


def describe_source(source: Source, width: int) -> dict[str, Any]:
    """What probe.json records of WEIGHTS; width: the number of features."""
    recorded = {"name": source.name, "sha256": None, "model": source.args.model, "features": width}
    if source.weights is not None:
        with open_regular(source.weights.path) as file:
            recorded["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        recorded |= {"averaged": source.weights.averaged, "heated": source.weights.is_heated}
    return recorded | {"preparation": source.preparation}


def long_table(results: list[Result]) -> str:
    """probe.csv: one line per weights, probe, shots, draw and metric; for all training images shots is `all`."""
    rows = [["weights", "probe", "shots", "draw", "metric", "value"]]
    for result in results:
        place = ["all", ""] if result.shots is None else [result.shots, result.draw]
        for metric, value in result.metrics.items():
            shown = "" if value is None else f"{value:.6f}"
            rows.append([result.weights, result.probe, *place, metric, shown])
    return csv_table(rows)


def short_table(results: list[Result], intervals: Intervals, differences: list[Difference]) -> Iterator[str]:
    """The lines to print: SCORES of each backbone and probe, then the differences of SCORES[0]."""
    rows = [["weights", "probe", "images per class", *(METRIC_TITLES[name] for name in (*SCORES, "auroc")), "chosen"]]
    for weights, probe, shots in dict.fromkeys((result.weights, result.probe, result.shots) for result in results):
        cells = []
        for metric in SCORES:
            values = scores_over_draws(results, weights, probe, shots, metric)
            if shots is None:
                low, high = intervals[weights, probe][metric]
                cells.append(f"{values[0]:.3f} ({low:.3f} to {high:.3f})")
            else:
                cells.append(f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""))
        full = next(r for r in results if (r.weights, r.probe, r.shots) == (weights, probe, None))
        auroc = full.metrics["auroc"]
        last = ["", ""]
        if shots is None:
            chosen = f"{'k' if probe == 'knn' else 'C'} = {full.parameter:g}"
            last = ["undefined" if auroc is None else f"{auroc:.3f}", chosen]
        rows.append([printable(weights), PROBE_TITLES[probe], str(shots or "all"), *cells, *last])
    yield from _aligned(rows)
    if differences:
        yield ""
        rows = [["minus the first weights", "probe", "images per class", f"difference of {METRIC_TITLES[SCORES[0]]}"]]
        for weights, probe, shots, metric, mean, interval in differences:
            if metric == SCORES[0]:
                shown = f"{mean:+.3f}" + (f" ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else "")
                rows.append([printable(weights), PROBE_TITLES[probe], str(shots or "all"), shown])
        yield from _aligned(rows)


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def write_picture(path: Path, results: list[Result], shots: list[int], mean_images: float) -> None:
    from utils.results.figures import write_figure
    from utils.results.label_efficiency import Curve, label_efficiency

    metric, names = SCORES[0], list(dict.fromkeys(result.weights for result in results))
    panels = {}
    for probe, title in PROBE_TITLES.items():
        panels[title] = [
            Curve(
                name,
                np.array([scores_over_draws(results, name, probe, number, metric) for number in shots]),
                scores_over_draws(results, name, probe, None, metric)[0],
            )
            for name in names
        ]
    write_figure(path, label_efficiency(panels, shots, mean_images, f"{METRIC_TITLES[metric]} on test"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = probe_parser(__doc__)
    given = arguments.parse_given(parser, argv)
    options = arguments.defaults(parser) | given
    names, root, folder = options["weights"], Path(options["data_path"]), Path(options["output_dir"])
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"{name}: is given twice; give each file once.")
    shots, draws, seed = sorted(set(options["shots"] or [])), options["draws"], options["seed"]
    if "draws" in given and not shots:
        raise UserError("--draws: has no effect without --shots.")
    device = resolve_device(options["device"])
    splits = open_splits(root, options["exclude"])
    classes = splits["train"].classes
    check_shots(shots, splits["train"].targets, classes)
    prepare_output(folder, root, options["overwrite"])
    sources = open_sources(names, given, seed, device)
    for source in sources:
        vars(source.args).update({name: options[name] for name in READING})
    features = extract_all(sources, splits, folder / "features", device)
    results, predictions = probe_all(features, len(classes), shots, draws, seed)
    targets = features[names[0]]["test"].targets
    intervals, differences = compare(results, predictions, targets, len(classes), seed)

    read = {name: len(split.targets) for name, split in features[names[0]].items()}
    widths = {name: split["train"].values.shape[1] for name, split in features.items()}
    content = {
        "origin": describe_start(argv, device),
        "data": {
            name: {"root": str(files.root), "images": len(files), "read": read[name]} for name, files in splits.items()
        },
        "classes": classes,
        "settings": describe_settings(shots, draws, seed),
        "weights": [describe_source(source, widths[source.name]) for source in sources],
        "results": [describe_result(result, intervals) for result in results],
        "differences": [difference._asdict() for difference in differences],
    }
    write_json(folder / JSON, content)
    write_atomically(folder / CSV, long_table(results).encode(errors="backslashreplace"))
    if shots:
        write_picture(folder / PICTURE, results, shots, read["train"] / len(classes))
    else:
        (folder / PICTURE).unlink(missing_ok=True)  # of the results that --overwrite replaced
    for line in short_table(results, intervals, differences):
        print_line(line)
    if stopped := sum(not result.converged for result in results):
        print_line(
            f"warning: {stopped} of {len(results) // 2} logistic regressions stopped after {probes.ITERATIONS} "
            f"iterations before convergence ('converged' in {JSON})."
        )
    print_line(f"{folder}: {', '.join(filter(None, (JSON, CSV, PICTURE if shots else '')))}")


if __name__ == "__main__":
    run_script(main)
