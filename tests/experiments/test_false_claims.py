"""The probability of a false claim: by hand, by simulation of the posterior and of studies, and the command."""

import numpy as np
import pytest

from experiments import false_claims
from experiments.false_claims import probability_of_false_claim, single_run_claims
from utils.runtime.errors import UserError


def test_the_probability_equals_sums_by_hand():
    assert probability_of_false_claim(0, 0) == 0.5
    assert probability_of_false_claim(3, 0) == pytest.approx(1 / 16)  # Beta(4, 1) below one half: (1 / 2)^4
    assert probability_of_false_claim(2, 1) == pytest.approx(5 / 16)  # at least 3 of 4 fair coins
    assert probability_of_false_claim(1, 2) == pytest.approx(1 - 5 / 16)


def test_the_probability_equals_draws_of_the_dirichlet_posterior():
    """Of 1,000 images both models recognise 700, only A 60, only B 45."""
    shares = np.random.default_rng(0).dirichlet([60 + 1, 45 + 1, 895 + 2], 200_000)
    assert probability_of_false_claim(60, 45) == pytest.approx((shares[:, 0] <= shares[:, 1]).mean(), abs=0.003)


def test_claims_are_false_as_often_as_predicted():
    """Studies of models whose true shares are uniform, as the prior has them: the one ahead is not better."""
    generator = np.random.default_rng(1)
    shares = generator.dirichlet([1, 1, 2], 40_000)
    counts = generator.multinomial(50, shares)
    ahead = counts[:, 0] > counts[:, 1]
    predicted = [probability_of_false_claim(a, b) for a, b, _ in counts[ahead][:10_000]]
    is_false = (shares[ahead, 0] <= shares[ahead, 1])[:10_000]
    assert np.mean(predicted) == pytest.approx(is_false.mean(), abs=0.006)
    doubtful = np.array(predicted) > 0.2
    assert np.mean(np.array(predicted)[doubtful]) == pytest.approx(is_false[doubtful].mean(), abs=0.04)


def test_claims_of_single_runs():
    targets = np.array([0, 0, 1, 1, 2, 2])
    a, b = np.array([0, 0, 1, 0, 2, 1]), np.array([0, 1, 0, 0, 2, 2])
    assert single_run_claims(targets, a, b) == (1, probability_of_false_claim(2, 1), 2 / 6)
    assert single_run_claims(targets, b, a) == (-1, probability_of_false_claim(2, 1), 2 / 6)
    assert single_run_claims(targets, a, a) == (0, 0.5, 4 / 6)


def test_the_command_prints_a_table(capsys):
    false_claims.main(["0.8", "0.7", "--images", "10", "100000", "--congruence", "0.6"])
    # Only A: 2 of 10 images, only B: 1.
    assert capsys.readouterr().out.splitlines()[-1] == "| 0.600 | 0.3125 | < 1e-10 |"
    false_claims.main(["0.8", "0.7", "--images", "10"])
    rows = capsys.readouterr().out.splitlines()[-5:]
    assert rows[0].startswith("| 0.500 |") and rows[-1] == "| 0.700 | 0.2500 |"  # 1 and 0 images


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["1.2", "0.5", "--images", "10"], "A 1.2: expected an accuracy between 0 and 1"),
        (["0.5", "nan", "--images", "10"], "B nan: expected an accuracy between 0 and 1"),
        (
            ["0.5", "0.6", "--images", "10"],
            "A 0.5 is below B 0.6. Give the accuracy that is claimed",
        ),
        (["0.6", "0.5", "--images", "10", "0"], "--images 0: expected 1 or more"),
        (["0.6", "0.5", "--images", "10", "--congruence", "0.7"], "with these accuracies it is between 0.1 and 0.5"),
    ],
)
def test_impossible_values_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        false_claims.main(words)
