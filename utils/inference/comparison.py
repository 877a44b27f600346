"""All probes of several backbones on the same images, and their paired differences."""

import sys
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from utils.inference import probes
from utils.inference.features import Features
from utils.inference.probes import PROBES, SCORES
from utils.results.intervals import percentile_interval, t_interval

Intervals = dict[tuple[str, str], dict[str, list[float]]]  # 95 % bounds of SCORES by weights and probe


class Result(NamedTuple):
    """A probe of one backbone, fitted to all training images, or to a few-shot draw of them.

    metrics: of the test images; auroc is left out for draws, since it takes long with many classes.
    """

    weights: str
    probe: str
    shots: int | None
    draw: int | None
    parameter: float  # the chosen k or C
    val_f1: float
    converged: bool
    metrics: dict[str, float | None]


class Difference(NamedTuple):
    """A metric of one backbone minus that of the first, with a 95 % interval (None if it is undefined)."""

    weights: str
    probe: str
    shots: int | None
    metric: str
    mean: float
    interval: list[float] | None


def probe_all(
    features: dict[str, dict[str, Features]], classes: int, shots: list[int], draws: int, seed: int
) -> tuple[list[Result], dict[tuple[str, str], np.ndarray]]:
    """The results of all probes, and the predictions (N,) of those fitted to all images, by weights and probe.

    The draws are the same images for all weights.
    """
    results, predictions = [], {}
    subsets = [*((number, draw) for number in shots for draw in range(draws)), (None, None)]
    seconds = 1 if sys.stderr.isatty() else 30  # between two updates of the bar; in a log each takes a line
    total = len(features) * len(PROBES) * len(subsets)
    with tqdm(total=total, desc="probes", leave=False, mininterval=seconds, delay=seconds) as bar:
        for weights, splits in features.items():
            test = splits["test"]
            for probe, fit in PROBES.items():
                for number, draw in subsets:
                    train, val = (_drawn(splits, name, classes, number, draw, seed) for name in ("train", "val"))
                    fitted = fit(train, val, test, classes)
                    predicted = fitted.logits.argmax(1).numpy()
                    if number is None:
                        predictions[weights, probe] = predicted
                        metrics = probes.full_metrics(fitted.logits, test.targets)
                    else:
                        scores = probes.scores_of(test.targets, predicted, classes).tolist()
                        metrics = dict(zip(SCORES, scores, strict=True))
                    chosen = (fitted.parameter, fitted.val, fitted.converged)
                    results.append(Result(weights, probe, number, draw, *chosen, metrics))
                    bar.update()
    return results, predictions


def _drawn(
    splits: dict[str, Features], name: str, classes: int, shots: int | None, draw: int | None, seed: int
) -> Features:
    """A split's features: all, or those of a few-shot draw."""
    if shots is None:
        return splits[name]
    return splits[name].subset(probes.few_shots(splits[name].targets, classes, shots, draw, seed, name))


def compare(
    results: list[Result], predictions: dict[tuple[str, str], np.ndarray], targets: np.ndarray, classes: int, seed: int
) -> tuple[Intervals, list[Difference]]:
    """Intervals of SCORES by weights and probe, and the differences to the first weights.

    With all training images both are bootstrap intervals over the test images; with few shots, those of the differences
    are t intervals over the draws.
    """
    names = list(dict.fromkeys(result.weights for result in results))
    shots = list(dict.fromkeys(result.shots for result in results))
    intervals: Intervals = {}
    differences = []
    for probe in PROBES:
        resampled = probes.bootstrap(targets, np.stack([predictions[name, probe] for name in names]), classes, seed)
        for row, name in enumerate(names):
            bounds = [percentile_interval(resampled[:, row, place]) for place in range(len(SCORES))]
            intervals[name, probe] = dict(zip(SCORES, bounds, strict=True))
        for row, name in enumerate(names[1:], 1):
            for number in shots:
                for place, metric in enumerate(SCORES):
                    values = score_differences(results, name, names[0], probe, number, metric)
                    if number is None:
                        interval = percentile_interval(resampled[:, row, place] - resampled[:, 0, place])
                    else:
                        interval = t_interval(values)
                    differences.append(Difference(name, probe, number, metric, float(np.mean(values)), interval))
    return intervals, differences


def scores_over_draws(results: list[Result], weights: str, probe: str, shots: int | None, metric: str) -> list[float]:
    """The metric of each draw, in order; of all training images, a single value."""
    wanted = (weights, probe, shots)
    return [result.metrics[metric] for result in results if (result.weights, result.probe, result.shots) == wanted]


def score_differences(
    results: list[Result], weights: str, first: str, probe: str, shots: int | None, metric: str
) -> list[float]:
    """The metric of each draw minus that of the first weights for the same draw."""
    own, others = (scores_over_draws(results, name, probe, shots, metric) for name in (weights, first))
    return [value - other for value, other in zip(own, others, strict=True)]
