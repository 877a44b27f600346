"""Metrics against confusion matrices worked out by hand, and AUROC against a count of ordered pairs."""

import csv
import io
import itertools
import math

import numpy as np
import pytest
import torch

from utils.results.metrics import classification_metrics, per_class_table, prediction_table, table_as_csv
from utils.training.meters import RunningMean, batch_accuracy

CPU = torch.device("cpu")


def logits_that_predict(predictions: list[int], num_classes: int) -> torch.Tensor:
    return 3.0 * torch.nn.functional.one_hot(torch.tensor(predictions), num_classes)


def metrics_of(truth: list[int], predictions: list[int], num_classes: int) -> dict:
    return classification_metrics(logits_that_predict(predictions, num_classes), torch.tensor(truth))


# Confusion matrices


def test_three_classes_by_hand():
    found = metrics_of(truth=[0, 0, 0, 1, 1, 2], predictions=[0, 0, 1, 1, 2, 2], num_classes=3)
    # class 0: 2 right of 2 predicted and 3 true; class 1: 1 of 2 and 2; class 2: 1 of 2 and 1
    assert found["top1"] == pytest.approx(4 / 6)
    assert found["precision"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert found["recall"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert found["f1"] == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert found["top5"] == 1.0
    assert "auroc" not in found


def test_classes_without_images_do_not_count_in_the_macro_means():
    found = metrics_of(truth=[0, 0, 1], predictions=[0, 2, 1], num_classes=4)  # class 2 is only predicted
    assert found["precision"] == pytest.approx((1 + 1) / 2)
    assert found["recall"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)


def test_a_class_that_is_never_predicted_has_precision_0():
    found = metrics_of(truth=[0, 0, 1, 1], predictions=[0, 0, 0, 0], num_classes=2)
    assert found["precision"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["recall"] == pytest.approx((1 + 0) / 2)
    assert found["f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["top1"] == 0.5


def test_all_right_and_all_wrong():
    right = metrics_of([0, 1, 2], [0, 1, 2], 3)
    wrong = metrics_of([0, 1, 2], [1, 2, 0], 3)
    for name in ("top1", "precision", "recall", "f1", "balanced_accuracy"):
        assert (right[name], wrong[name]) == (1.0, 0.0)


def test_loss_is_the_mean_cross_entropy_in_nats():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [math.log(3), 0.0]])
    found = classification_metrics(logits, torch.tensor([1, 1, 1]))
    assert found["loss"] == pytest.approx((math.log(2) - math.log(3 / 4) - math.log(1 / 4)) / 3, rel=1e-6)
    huge = classification_metrics(torch.tensor([[0.0, 1000.0]]), torch.tensor([0]))
    assert huge["loss"] == pytest.approx(1000)


def test_top5_counts_the_five_largest():
    logits = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6, 7]])
    by_target = {
        target: classification_metrics(logits, torch.tensor([target, target]))["top5"] for target in (0, 1, 2, 4, 6)
    }
    assert by_target == {0: 0.5, 1: 0.5, 2: 1.0, 4: 1.0, 6: 0.5}  # 7 classes: the two smallest do not count


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_top5_of_five_classes_or_fewer_is_always_1(num_classes):
    targets = torch.arange(num_classes)
    assert classification_metrics(torch.randn(num_classes, num_classes), targets)["top5"] == 1.0


# AUROC


def auroc_by_counting(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Hand and Till's M: for each pair of present classes, how often the right one of two images has more of it."""

    def ordered(positive: int, negative: int) -> float:
        ours, theirs = (probabilities[truth == label, positive] for label in (positive, negative))
        wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in ours for b in theirs]
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
    found = classification_metrics(logits, torch.tensor(truth), auroc=True)["auroc"]
    expected = auroc_by_counting(truth, logits.softmax(1).numpy())
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0.1 < expected < 0.99


def test_auroc_of_two_classes_by_hand():
    logits = torch.tensor([0.1, 0.4, 0.35, 0.8]).logit()
    logits = torch.stack([torch.zeros(4), logits], dim=1)
    found = classification_metrics(logits, torch.tensor([0, 0, 1, 1]), auroc=True)
    assert found["auroc"] == pytest.approx(3 / 4)  # of the four pairs only (0.4, 0.35) stands the wrong way round


def test_auroc_is_undefined_for_a_single_class_and_for_logits_that_are_not_finite():
    assert classification_metrics(torch.randn(4, 3), torch.tensor([1] * 4), auroc=True)["auroc"] is None
    for bad in (math.nan, math.inf):
        logits = torch.randn(4, 3)
        logits[2, 1] = bad
        assert classification_metrics(logits, torch.tensor([0, 1, 2, 0]), auroc=True)["auroc"] is None


def test_auroc_keeps_confident_predictions_apart():
    """Beyond a logit of 17 a float32 probability is 1."""
    logits = torch.tensor([[0.0, 20.0], [0.0, 22.0], [0.0, 24.0], [0.0, 26.0]])
    assert classification_metrics(logits, torch.tensor([0, 0, 1, 1]), auroc=True)["auroc"] == 1.0


# Tables


def test_per_class_table_by_hand():
    logits = logits_that_predict([0, 0, 1, 1, 2, 2], 4)
    rows = per_class_table(logits, torch.tensor([0, 0, 0, 1, 1, 1]), ["a", "b", "c", "d"])
    expected = [("a", 3, 1, 2 / 3, 4 / 5), ("b", 3, 1 / 2, 1 / 3, 2 / 5), ("c", 0), ("d", 0)]
    assert [tuple(row) for row in rows] == [("class", "images", "precision", "recall", "f1", "auroc")] * 4
    for row, values in zip(rows, expected, strict=True):
        assert row["class"] == values[0]
        assert list(row.values())[1:5] == pytest.approx([*values[1:], None, None, None][:4])


def test_auroc_of_each_class_by_hand():
    """Of the pairs of an image of the class and another one, the share that the class's probability puts in order."""
    logits = torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.0, 0.5], [2.0, 2.5, 0.0], [2.0, 1.0, 0.0]])
    rows = per_class_table(logits, torch.tensor([0, 0, 1, 1]), ["a", "b", "c"])
    assert [row["auroc"] for row in rows] == [pytest.approx(3 / 4), 1, None]
    assert per_class_table(logits * math.nan, torch.tensor([0, 0, 1, 1]), ["a", "b", "c"])[0]["auroc"] is None


def test_prediction_table_by_hand():
    logits = torch.tensor([[math.log(3), 0.0, 0.0], [0.0, math.log(6), math.log(3)], [0.0, 0.0, 0.0]])
    rows = prediction_table(logits, torch.tensor([0, 2, 2]), ["a", "b", "c"], ["a/1.png", "c/1.png", "c/2.png"])
    assert [row["image"] for row in rows] == ["a/1.png", "c/1.png", "c/2.png"]
    assert [row["target"] for row in rows] == ["a", "c", "c"]
    assert [row["prediction"] for row in rows] == ["a", "b", "a"]  # the first of equal ones, as argmax
    assert [row["probability"] for row in rows] == pytest.approx([3 / 5, 6 / 10, 1 / 3])
    assert [row["true_rank"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == pytest.approx([-math.log(3 / 5), -math.log(3 / 10), math.log(3)])


def test_table_as_csv():
    rows = [
        {"class": "plain", "images": 3, "precision": 2 / 3, "f1": 1.0},
        {"class": 'a "comma", and quotes', "images": 12, "precision": 0.0, "f1": 0.12345678},
    ]
    text = table_as_csv(rows).decode()
    assert text.splitlines()[:2] == ["class,images,precision,f1", "plain,3,0.666667,1.000000"]
    assert text.endswith("0.123457\n")
    assert "\r" not in text
    read = list(csv.DictReader(io.StringIO(text)))
    assert [row["class"] for row in read] == ["plain", 'a "comma", and quotes']
    assert [row["images"] for row in read] == ["3", "12"]


# During training


def test_running_mean():
    mean = RunningMean(CPU)
    assert mean.read() == {}
    mean.update(loss=torch.tensor(1.0), top1=torch.tensor(0.25))
    assert mean.read() == {"loss": 1.0, "top1": 0.25}
    mean.update(top1=torch.tensor(0.75), loss=torch.tensor(4.0))  # by name, not by place
    mean.update(loss=torch.tensor(-2.0), top1=torch.tensor(0.5))
    assert mean.read() == {"loss": 1.0, "top1": 0.5}


def test_running_mean_sums_in_float64_and_keeps_no_graph():
    mean = RunningMean(CPU)
    loss = torch.tensor(2.0**24, requires_grad=True)
    mean.update(loss=loss * 1)
    for _ in range(3):
        mean.update(loss=torch.tensor(1.0))  # float32 would lose each of them
    assert mean.read() == {"loss": (2**24 + 3) / 4}
    assert not mean.total.requires_grad


def test_batch_accuracy_of_hard_and_of_mixed_targets():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 5.0, 2.0], [1.0, 0.0, 0.0]])  # 0, 2, 1, 0
    assert batch_accuracy(logits, torch.tensor([0, 2, 0, 1])).item() == 0.5
    mixed = torch.tensor([[0.4, 0.6, 0.0], [0.3, 0.0, 0.7], [0.0, 0.9, 0.1], [0.8, 0.2, 0.0]])  # 1, 2, 1, 0
    assert batch_accuracy(logits, mixed).item() == 0.75
    assert batch_accuracy(logits, mixed).shape == ()
