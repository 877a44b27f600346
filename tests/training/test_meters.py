"""Running means and accuracies during training."""

import torch

from utils.training.meters import RunningMean, batch_accuracy


def test_a_running_mean_goes_by_name_not_by_position():
    mean = RunningMean(torch.device("cpu"))
    assert mean.read() == {}
    mean.update(loss=torch.tensor(1.0), top1=torch.tensor(0.25))
    assert mean.read() == {"loss": 1.0, "top1": 0.25}
    mean.update(top1=torch.tensor(0.75), loss=torch.tensor(4.0))
    mean.update(loss=torch.tensor(-2.0), top1=torch.tensor(0.5))
    assert mean.read() == {"loss": 1.0, "top1": 0.5}


def test_a_running_mean_sums_in_float64_and_keeps_no_graph():
    mean = RunningMean(torch.device("cpu"))
    loss = torch.tensor(2.0**24, requires_grad=True)
    mean.update(loss=loss * 1)
    for _ in range(3):
        mean.update(loss=torch.tensor(1.0))  # float32 would lose each of them
    assert mean.read() == {"loss": (2**24 + 3) / 4}
    assert not mean.total.requires_grad


def test_accuracy_of_hard_and_of_mixed_targets():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 5.0, 2.0], [1.0, 0.0, 0.0]])  # 0, 2, 1, 0
    assert batch_accuracy(logits, torch.tensor([0, 2, 0, 1])).item() == 0.5
    mixed = torch.tensor([[0.4, 0.6, 0.0], [0.3, 0.0, 0.7], [0.0, 0.9, 0.1], [0.8, 0.2, 0.0]])  # 1, 2, 1, 0
    assert batch_accuracy(logits, mixed).item() == 0.75
    assert batch_accuracy(logits, mixed).shape == ()
