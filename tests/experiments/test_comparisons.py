"""Statistics of paired differences: against scikit-learn, SciPy, simulation and numbers by hand."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, recall_score

from experiments.comparisons import (
    SCORES,
    bootstrap_scores,
    effect_size,
    hierarchical_interval,
    holm,
    power_of_t_test,
    probability_of_better,
    scores,
    seeds_needed,
    sign_flip_p,
)
from utils.results.intervals import t_interval

HARD = np.array([True, False, True, False, True])


def outcomes(images: int = 80, runs: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets (N,), predictions (R, N), about half of them correct, and losses (R, N)."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(len(HARD), size=images)
    guesses = generator.integers(len(HARD), size=(runs, images))
    predictions = np.where(generator.random((runs, images)) < 0.4, targets, guesses)
    return targets, predictions, generator.exponential(size=(runs, images))


def test_scores_equal_scikit_learn():
    targets, predictions, losses = outcomes()
    hard = np.flatnonzero(HARD)
    is_hard = HARD[targets]
    for row, guesses, values in zip(scores(targets, predictions, losses, HARD), predictions, losses, strict=True):
        assert dict(zip(SCORES, row, strict=True)) == pytest.approx(
            {
                "top1": accuracy_score(targets, guesses),
                "balanced_accuracy": recall_score(targets, guesses, average="macro"),
                "f1": f1_score(targets, guesses, average="macro"),
                "hard_top1": accuracy_score(targets[is_hard], guesses[is_hard]),
                "hard_balanced_accuracy": recall_score(targets, guesses, labels=hard, average="macro"),
                "hard_f1": f1_score(targets, guesses, labels=hard, average="macro"),
                "balanced_loss": np.mean([values[targets == number].mean() for number in range(len(HARD))]),
            }
        )


def test_weights_repeat_images_and_absent_classes_do_not_count():
    targets, predictions, losses = outcomes(images=12, seed=3)
    weights = np.random.default_rng(1).integers(3, size=12)
    images = (values.repeat(weights, axis=1) for values in (predictions, losses))
    assert scores(targets, predictions, losses, HARD, weights) == pytest.approx(
        scores(targets.repeat(weights), *images, HARD)
    )
    # Classes 2 and 4 have no image; class 2 is predicted once.
    row = scores(np.array([0, 0, 1, 3]), np.array([[0, 2, 1, 3]]), np.array([[1.0, 3, 6, 8]]), HARD)[0]
    assert row == pytest.approx([3 / 4, (0.5 + 1 + 1) / 3, (2 / 3 + 1 + 1) / 3, 0.5, 0.5, 2 / 3, (2 + 6 + 8) / 3])
    row = scores(np.array([1, 3]), np.array([[1, 3]]), np.zeros((1, 2)), HARD)[0]
    assert np.isnan(row[3:6]).all()  # no hard class occurs


def test_the_bootstrap_with_one_seed_is_over_images_only():
    targets, predictions, losses = outcomes(images=50, runs=2)
    drawn = bootstrap_scores(targets, predictions, losses, HARD, resamples=300)[:, :, SCORES.index("top1")]
    generator = np.random.default_rng(0)
    by_hand = []
    for _ in range(300):
        picked = generator.integers(50, size=50)
        right = predictions[:, picked] == targets[picked]
        by_hand.append(right[1].mean() - right[0].mean())
    assert drawn[:, 1] - drawn[:, 0] == pytest.approx(by_hand, abs=1e-12)
    interval = hierarchical_interval((drawn[:, 1] - drawn[:, 0])[:, None])
    assert interval == pytest.approx(np.quantile(by_hand, [0.025, 0.975]))


def test_the_bootstrap_resamples_seeds_too():
    differences = np.array([1.0, 2.0, 6.0])
    interval = hierarchical_interval(np.tile(differences, (4000, 1)))
    assert interval == (1, 6)  # three equal picks: 1 of 27, more than 2.5 %
    many = np.random.default_rng(0).normal(3, 2, 200)
    expected = tuple(stats.bootstrap((many,), np.mean, method="percentile").confidence_interval)
    assert hierarchical_interval(np.tile(many, (2000, 1))) == pytest.approx(expected, abs=0.05)


def test_the_interval_over_images_and_seeds_is_wider_than_either():
    generator = np.random.default_rng(2)
    images, seeds = generator.normal(0, 1, (4000, 1)), generator.normal(0, 1, 100)
    widths = [np.diff(hierarchical_interval(a * images + b * seeds))[0] for a, b in ((1, 0), (0, 10), (1, 10))]
    assert widths == pytest.approx([3.92, 3.92 * seeds.std(), 3.92 * np.hypot(1, seeds.std())], rel=0.06)


def test_sign_flips_equal_counts_by_hand():
    assert sign_flip_p(np.full(8, 0.1)) == 2 / 256
    assert sign_flip_p(np.zeros(8)) == 1
    # 0.5 or more are .3 + .1 + .2 + .1, the two without one .1, and the mirrors of these three.
    assert sign_flip_p(np.array([0.3, 0.1, 0.2, -0.1])) == 6 / 16


def test_random_sign_flips_agree_with_the_exact_count():
    """20 differences of one size: the number of positive ones is binomial."""
    p = sign_flip_p(np.where(np.arange(20) < 14, 0.1, -0.1))
    assert p == pytest.approx(stats.binomtest(14, 20).pvalue, abs=0.004)
    assert sign_flip_p(np.linspace(1, 2, 40)) == 2 / 100_000


def test_probability_of_better_equals_counts_and_scipy():
    differences = np.array([-0.3, -0.2, 0.0, 0.1, -0.1])
    assert probability_of_better(differences)[0] == 1.5 / 5
    assert probability_of_better(-differences)[0] == 3.5 / 5
    wins = np.where(np.arange(40) < 31, 0.1, -0.1)
    interval = stats.binomtest(31, 40).proportion_ci(method="wilson")
    assert probability_of_better(wins) == pytest.approx((31 / 40, interval.low, interval.high))
    assert probability_of_better(-np.ones(2))[:2] == (0, 0)
    assert probability_of_better(np.ones(8))[1:] == pytest.approx((8 / (8 + 1.959964**2), 1))


def test_holm_adjusts_for_the_number_of_tests():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def test_seeds_needed_equal_the_textbook():
    spread = np.array([-1.0, 0, 1])  # standard deviation 1
    # Small, medium and large effects: power 80 %, two-sided 5 %.
    assert [seeds_needed(spread / d, 1.0) for d in (0.2, 0.5, 0.8)] == [199, 34, 15]
    assert seeds_needed(1e-4 * spread, 1.0) == 2
    assert seeds_needed(np.array([1.0, 2.0]), 1.0) is None
    assert seeds_needed(np.full(5, 0.1), 1.0) is None


def test_power_equals_simulated_studies():
    studies = np.random.default_rng(0).normal(0.8, 1, (20_000, 12))
    significant = stats.ttest_1samp(studies, 0, axis=1).pvalue < 0.05
    assert power_of_t_test(0.8, 12) == pytest.approx(significant.mean(), abs=0.01)


def test_t_interval_and_effect_size_equal_numbers_by_hand():
    differences = np.array([1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5
    assert t_interval(differences) == pytest.approx((2 - half, 2 + half))
    assert effect_size(differences) == pytest.approx(2)
    for constant in (np.array([0.3]), np.array([0.1 + 0.2, 0.3, 0.3])):
        assert t_interval(constant) is None and effect_size(constant) is None
    assert effect_size(np.array([1.0, 2.0])) is None
