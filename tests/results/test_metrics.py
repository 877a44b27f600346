"""Metrics against confusion matrices worked out by hand, and AUROC against a count of ordered pairs."""

import csv
import io
import itertools
import math

import numpy as np
import pytest
import torch

from utils.results.metrics import classification_metrics, per_class_table, prediction_table, table_as_csv


def logits_that_predict(predictions: list[int], num_classes: int) -> torch.Tensor:
    return 3.0 * torch.nn.functional.one_hot(torch.tensor(predictions), num_classes)


@pytest.mark.parametrize(
    ("truth", "predictions", "num_classes", "top1", "precision", "recall", "f1"),
    [
        ([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], 3, 4 / 6, (1 + 1 / 2 + 1 / 2) / 3, (2 / 3 + 1 / 2 + 1) / 3,
         (4 / 5 + 1 / 2 + 2 / 3) / 3),
        ([0, 0, 1], [0, 2, 1], 4, 2 / 3, 1, (1 / 2 + 1) / 2, (2 / 3 + 1) / 2),  # class 2 is only predicted
        ([0, 0, 1, 1], [0, 0, 0, 0], 2, 1 / 2, (1 / 2 + 0) / 2, (1 + 0) / 2, (2 / 3 + 0) / 2),
        ([0, 1, 2], [0, 1, 2], 3, 1, 1, 1, 1),
        ([0, 1, 2], [1, 2, 0], 3, 0, 0, 0, 0),
    ],
    ids=["three classes", "classes without images", "a class never predicted", "all right", "all wrong"],
)  # fmt: skip
def test_macro_metrics_by_hand(truth, predictions, num_classes, top1, precision, recall, f1):
    metrics = classification_metrics(logits_that_predict(predictions, num_classes), torch.tensor(truth))
    expected = {"top1": top1, "precision": precision, "recall": recall, "f1": f1, "balanced_accuracy": recall}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert "auroc" not in metrics


def test_loss_is_the_mean_cross_entropy_in_nats():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [math.log(3), 0.0]])
    metrics = classification_metrics(logits, torch.tensor([1, 1, 1]))
    assert metrics["loss"] == pytest.approx((math.log(2) - math.log(3 / 4) - math.log(1 / 4)) / 3, rel=1e-6)
    huge = classification_metrics(torch.tensor([[0.0, 1000.0]]), torch.tensor([0]))
    assert huge["loss"] == pytest.approx(1000)


@pytest.mark.parametrize(("num_classes", "target", "top5"), [(7, 1, 0.5), (7, 2, 1.0), (7, 4, 1.0), (5, 0, 1.0)])
def test_top5_counts_the_five_largest(num_classes, target, top5):
    increasing = torch.arange(num_classes).float()
    logits = torch.stack([-increasing, increasing])  # with 7 classes the two smallest do not count
    assert classification_metrics(logits, torch.tensor([target, target]))["top5"] == top5


# AUROC


def auroc_by_counting(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Hand and Till's M: in each pair of present classes, the share of image pairs in the right order."""

    def ordered(positive: int, negative: int) -> float:
        positives, negatives = (probabilities[truth == label, positive] for label in (positive, negative))
        wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in positives for b in negatives]
        return sum(wins) / len(wins)

    pairs = list(itertools.combinations(np.unique(truth), 2))
    return sum((ordered(a, b) + ordered(b, a)) / 2 for a, b in pairs) / len(pairs)


@pytest.mark.parametrize(
    "classes_present", [[0, 1], [0, 1, 2, 3, 4], [1, 3, 4], [0, 4]], ids=["2 of 2", "5 of 5", "3 of 5", "2 of 5"]
)
@pytest.mark.parametrize("with_ties", [False, True])
def test_auroc_against_a_count_of_pairs(classes_present, with_ties):
    random = np.random.default_rng(len(classes_present))
    num_classes = 2 if classes_present == [0, 1] else 5
    truth = np.array(classes_present * 6)
    logits = random.normal(size=(len(truth), num_classes))
    logits[np.arange(len(truth)), truth] += 0.7
    if with_ties:
        logits = logits[np.arange(len(truth)) // 2]  # neighbours, which are of different classes, have equal rows
    logits = torch.tensor(logits)
    auroc = classification_metrics(logits, torch.tensor(truth), auroc=True)["auroc"]
    expected = auroc_by_counting(truth, logits.softmax(1).numpy())
    assert auroc == pytest.approx(expected, abs=1e-9)
    assert 0.1 < expected < 0.99


def test_auroc_is_undefined_for_a_single_class_and_for_nonfinite_logits():
    assert classification_metrics(torch.randn(4, 3), torch.tensor([1] * 4), auroc=True)["auroc"] is None
    for bad in (math.nan, math.inf):
        logits = torch.randn(4, 3)
        logits[2, 1] = bad
        assert classification_metrics(logits, torch.tensor([0, 1, 2, 0]), auroc=True)["auroc"] is None


def test_auroc_distinguishes_predictions_beyond_float32_softmax():
    logits = torch.tensor([[0.0, 20.0], [0.0, 22.0], [0.0, 24.0], [0.0, 26.0]])  # float32 probabilities are all 1
    assert classification_metrics(logits, torch.tensor([0, 0, 1, 1]), auroc=True)["auroc"] == 1.0


# Tables


def test_per_class_table_by_hand():
    logits = logits_that_predict([0, 0, 1, 1, 2, 2], 4)
    rows = per_class_table(logits, torch.tensor([0, 0, 0, 1, 1, 1]), ["a", "b", "c", "d"])
    assert [tuple(row) for row in rows] == [("class", "images", "precision", "recall", "f1", "auroc")] * 4
    assert [tuple(row.values())[:5] for row in rows] == [
        ("a", 3, 1, pytest.approx(2 / 3), pytest.approx(4 / 5)),
        ("b", 3, pytest.approx(1 / 2), pytest.approx(1 / 3), pytest.approx(2 / 5)),
        ("c", 0, None, None, None),
        ("d", 0, None, None, None),
    ]


def test_auroc_of_each_class_by_hand():
    """The share of pairs of an image of the class and another image that the class's probability orders rightly."""
    logits = torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.0, 0.5], [2.0, 2.5, 0.0], [2.0, 1.0, 0.0]])
    rows = per_class_table(logits, torch.tensor([0, 0, 1, 1]), ["a", "b", "c"])
    assert [row["auroc"] for row in rows] == [pytest.approx(3 / 4), 1, None]
    assert per_class_table(logits * math.nan, torch.tensor([0, 0, 1, 1]), ["a", "b", "c"])[0]["auroc"] is None


def test_prediction_table_by_hand():
    logits = torch.tensor([[math.log(3), 0.0, 0.0], [0.0, math.log(6), math.log(3)], [0.0, 0.0, 0.0]])
    rows = prediction_table(logits, torch.tensor([0, 2, 2]), ["a", "b", "c"], ["a/1.png", "c/1.png", "c/2.png"])
    assert [tuple(row.values()) for row in rows] == [
        (
            "a/1.png",
            "a",
            "a",
            pytest.approx(3 / 5),
            1,
            pytest.approx(-math.log(3 / 5)),
            pytest.approx(0.4**2 + 2 * 0.2**2),
        ),
        (
            "c/1.png",
            "c",
            "b",
            pytest.approx(6 / 10),
            2,
            pytest.approx(-math.log(3 / 10)),
            pytest.approx(0.1**2 + 0.6**2 + 0.7**2),
        ),
        (
            "c/2.png",
            "c",
            "a",
            pytest.approx(1 / 3),
            3,
            pytest.approx(math.log(3)),
            pytest.approx(2 / 3),
        ),  # equal logits: the first class
    ]
    assert tuple(rows[0]) == ("image", "target", "prediction", "probability", "true_rank", "loss", "brier")


def test_csv_tables_quote_names_and_round_fractions():
    rows = [
        {"class": "plain", "images": 3, "precision": 2 / 3, "f1": 1.0},
        {"class": 'a "comma", and quotes', "images": 12, "precision": 0.0, "f1": 0.12345678},
    ]
    text = table_as_csv(rows).decode()
    assert text.splitlines()[:2] == ["class,images,precision,f1", "plain,3,0.666667,1.000000"]
    assert text.endswith("0.123457\n") and "\r" not in text
    read = list(csv.DictReader(io.StringIO(text)))
    assert [(row["class"], row["images"]) for row in read] == [("plain", "3"), ('a "comma", and quotes', "12")]
