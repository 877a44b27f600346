"""Probes of frozen features: k nearest neighbours and logistic regression, chosen on val; few-shot draws."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.data.samplers import derive_seed
from utils.inference.features import Features
from utils.results.intervals import RESAMPLES, bootstrap_weights
from utils.results.metrics import classification_metrics, count_classes, macro_metrics

NEIGHBOURS = (1, 5, 10, 20, 50)
TEMPERATURE = 0.07  # of the neighbours' votes
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)  # C: the inverse of the L2 penalty
ITERATIONS = 1000  # of lbfgs, at most
SCORES = ("f1", "top1", "balanced_accuracy")  # with intervals; the first one chooses k and C


class Probed(NamedTuple):
    """A probe's predictions for the test images.

    parameter: the chosen k or C; val: SCORES[0] on val; logits: (N, classes) float64; converged: whether the solver
    ended before its last iteration.
    """

    parameter: float
    val: float
    logits: Tensor
    converged: bool = True


def nearest_neighbours(train: Features, val: Features, test: Features, classes: int) -> Probed:
    """Votes of the k most similar training images, each weighted by exp(cosine similarity / 0.07), as DINO does.

    The smallest k of the best on val. Logits are the logarithms of the votes: -inf for classes without a vote.
    """
    from sklearn.neighbors import NearestNeighbors

    candidates = [k for k in NEIGHBOURS if k <= len(train.targets)]
    search = NearestNeighbors(n_neighbors=candidates[-1], algorithm="brute", metric="cosine").fit(train.values)

    def logits_by_k(queries: Features) -> dict[int, Tensor]:
        distances, neighbours = search.kneighbors(queries.values)  # (N, k), nearest first
        votes = np.exp((1 - distances.astype(np.float64)) / TEMPERATURE)
        labels, rows = train.targets[neighbours], np.arange(len(votes))[:, None]
        logits = {}
        for k in candidates:
            totals = np.zeros((len(votes), classes))
            np.add.at(totals, (rows, labels[:, :k]), votes[:, :k])
            with np.errstate(divide="ignore"):
                logits[k] = torch.from_numpy(np.log(totals))
        return logits

    by_k = {k: _score(logits, val) for k, logits in logits_by_k(val).items()}
    best = max(candidates, key=by_k.get)
    return Probed(best, by_k[best], logits_by_k(test)[best])


def logistic_regression(train: Features, val: Features, test: Features, classes: int) -> Probed:
    """scikit-learn's multinomial logistic regression (lbfgs, L2) on features standardised by the training images.

    The smallest C of the best on val; trained on train only. Logits are -inf for classes without a training image.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    scaler = StandardScaler().fit(train.values)
    train_values, val_values = scaler.transform(train.values), scaler.transform(val.values)

    def logits_of(model: LogisticRegression, values: np.ndarray) -> Tensor:
        decisions = model.decision_function(values)
        if decisions.ndim == 1:  # of two classes, it is the difference of their logits
            decisions = np.stack([np.zeros_like(decisions), decisions], axis=1)
        logits = np.full((len(values), classes), -np.inf)
        logits[:, model.classes_] = decisions
        return torch.from_numpy(logits)

    best = None
    for strength in STRENGTHS:
        # One thread: the result then does not depend on their number, and several are slower for products of this size.
        with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
            warnings.simplefilter("ignore", ConvergenceWarning)  # see `converged`
            model = LogisticRegression(C=strength, max_iter=ITERATIONS).fit(train_values, train.targets)
        score = _score(logits_of(model, val_values), val)
        if best is None or score > best[0]:
            best = score, strength, model
    score, strength, model = best
    converged = int(model.n_iter_.max()) < ITERATIONS
    return Probed(strength, score, logits_of(model, scaler.transform(test.values)), converged)


PROBES = {"knn": nearest_neighbours, "logistic": logistic_regression}
PROBE_TITLES = {"knn": "kNN", "logistic": "logistic regression"}


def _score(logits: Tensor, truth: Features) -> float:
    return scores_of(truth.targets, logits.argmax(1).numpy(), logits.shape[1])[0].item()


def scores_of(
    targets: np.ndarray, predictions: np.ndarray, classes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """SCORES of predictions (..., N), as an array (..., 3); weights: (N,) integers, how often each image counts."""
    metrics = macro_metrics(*count_classes(targets, predictions, weights, classes))
    return np.stack([metrics[name] for name in SCORES], axis=-1)


def full_metrics(logits: Tensor, targets: np.ndarray) -> dict[str, float | None]:
    """SCORES and AUROC (macro, one-vs-one)."""
    metrics = classification_metrics(logits, torch.from_numpy(targets), auroc=True)
    return {name: metrics[name] for name in (*SCORES, "auroc")}


def few_shots(targets: np.ndarray, classes: int, shots: int, draw: int, seed: int, purpose: str) -> np.ndarray:
    """The places of `shots` images of each class, drawn without replacement, sorted; all of a smaller class.

    They depend on the arguments only, and are among those of the same draw with more shots. purpose: of the random
    numbers.
    """
    chosen = []
    for number in range(classes):
        members = np.flatnonzero(targets == number)
        generator = np.random.default_rng(derive_seed(f"few shots: {purpose}", seed, draw, number))
        chosen.append(members[generator.permutation(len(members))[:shots]])
    return np.sort(np.concatenate(chosen))


def bootstrap(
    targets: np.ndarray, predictions: np.ndarray, classes: int, seed: int, resamples: int = RESAMPLES
) -> np.ndarray:
    """SCORES of R predictors (R, N) on the same draws of N test images with replacement: (resamples, R, 3)."""
    draws = bootstrap_weights(len(targets), resamples, seed)
    return np.stack([scores_of(targets, predictions, classes, weights) for weights in draws])
