"""How likely a claim "A is more accurate than B" is false: `python experiments/false_claims.py A B --images N`.

A and B are the accuracies of two models on the same N test images. The estimate is that of Christodoulou et al. 2025,
False Promises in Medical Imaging AI? (arXiv 2505.04720): the posterior probability, under a uniform prior, that the
true accuracy of A is not above that of B, given how many images only A and only B recognised. These numbers follow from
the accuracies and the congruence, the share of images that both models recognised. Without --congruence, the table
covers all that are possible.

It covers the choice of test images only. It says nothing about what another training of the same two methods, with
other seeds or tuning, would give; this spread is often the larger one. For a mean over classes, such as macro F1 or
balanced accuracy, it is a rough guide, and too optimistic where rare classes carry much of the mean.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy.special import betainc

from experiments.markdown import markdown
from utils.arguments import check_limits
from utils.runtime.command_line import Parser
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.runtime.text import print_line

STEPS = 5  # congruences in the table


def probability_of_false_claim(only_a: float, only_b: float) -> float:
    """Probability that A's true accuracy is at most B's. only_a, only_b: images that only A, only B recognised.

    The shares of images that only A recognises, only B, and both or neither, have a Dirichlet posterior with
    parameters only_a + 1, only_b + 1 and so on. Whatever the third, the first divided by the first two has a Beta
    distribution, and the claim is false where it is at most one half.
    """
    return float(betainc(max(only_a, 0) + 1, max(only_b, 0) + 1, 0.5))  # differences may round to below 0


def possible_congruences(a: float, b: float) -> tuple[float, float]:
    """The least and the largest share of images that models with these accuracies can both recognise."""
    return max(0.0, a + b - 1), min(a, b)


def claim_table(a: float, b: float, images: Sequence[int], congruences: Sequence[float]) -> str:
    """Probability of a false claim that A is better, by congruence (rows) and number of test images (columns)."""
    rows = []
    for congruence in congruences:
        values = [probability_of_false_claim(n * (a - congruence), n * (b - congruence)) for n in images]
        rows.append([f"{congruence:.3f}", *map(_probability, values)])
    return markdown(["congruence", *(f"{n:,} images" for n in images)], rows, texts=0)


def _probability(value: float) -> str:
    if value < 1e-10:
        return "< 1e-10"
    return f"{value:.4f}" if value >= 0.001 else f"{value:.0e}"


def single_run_claims(targets: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[int, float, float]:
    """What one run of each of two arms would claim, from predictions a and b (N,) on the same images.

    Returns the winner in accuracy (1 for a, -1 for b, 0 for neither), the probability that this claim is false
    (one half for neither), and the congruence.
    """
    right_a, right_b = a == targets, b == targets
    only_a, only_b = int(np.sum(right_a & ~right_b)), int(np.sum(right_b & ~right_a))
    winner = int(np.sign(only_a - only_b))
    return (
        winner,
        probability_of_false_claim(max(only_a, only_b), min(only_a, only_b)),
        float((right_a & right_b).mean()),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python experiments/false_claims.py")
    add = parser.add_argument
    add("a", type=float, metavar="A", help="accuracy of the model that is claimed to be better, between 0 and 1")
    add("b", type=float, metavar="B", help="accuracy of the other")
    add("--images", type=int, nargs="+", required=True, metavar="N", help="number of test images; several for columns")
    add("--congruence", type=float, help="share of images that both recognise; default: the possible ones")
    options = parser.parse_args(argv)
    check_limits(vars(options))
    for name, value in (("A", options.a), ("B", options.b)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} {value:g}: expected an accuracy between 0 and 1.")
    if options.a < options.b:
        raise UserError(
            f"A {options.a:g} is below B {options.b:g}. Give the accuracy that is claimed to be better first."
        )
    if min(options.images) < 1:
        raise UserError(f"--images {min(options.images)}: expected 1 or more.")
    lower, upper = possible_congruences(options.a, options.b)
    congruences = np.unique(np.linspace(lower, upper, STEPS)).tolist()  # a single one where only that is possible
    if options.congruence is not None:
        if not lower <= options.congruence <= upper:
            raise UserError(
                f"--congruence {options.congruence:g}: with these accuracies it is between {lower:g} and {upper:g}."
            )
        congruences = [options.congruence]
    print_line(
        f"Probability that the claim {options.a:g} > {options.b:g} is false, as far as the choice of test images goes:"
    )
    print_line("")
    for line in claim_table(options.a, options.b, options.images, congruences).split("\n"):
        print_line(line)


if __name__ == "__main__":
    run_script(main)
