"""The classifier's loss: cross-entropy with label smoothing, class weights and mixed targets."""

import torch
import torch.nn.functional as F
from torch import Tensor


def class_weights(kind: str, counts: list[int]) -> Tensor | None:
    """The weight of each class, (C,) float32, from the numbers of its training images, all at least 1; None for none.

    balanced: in inverse proportion to the counts, as in scikit-learn; sqrt: to their square roots. The mean weight over
    the training images is 1, so that --lr keeps its meaning.
    """
    if kind == "none":
        return None
    images = torch.tensor(counts, dtype=torch.float64)
    weights = 1 / (images if kind == "balanced" else images.sqrt())
    return (weights * images.sum() / (weights * images).sum()).float()


def cross_entropies(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """The cross-entropy of each image, (B,) float32, from logits (B, C) and classes (B,) or mixed targets (B, C).

    weights: (C,), of each class's term in the sum over classes, as in torch; with smoothed or mixed targets an image
    has terms of several classes. Nothing is divided by the batch's weights, so an image counts alike in any batch.
    """
    return F.cross_entropy(logits.float(), targets, weight=weights, reduction="none", label_smoothing=label_smoothing)
