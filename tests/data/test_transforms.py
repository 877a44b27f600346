"""Transforms against torchvision's steps composed by hand; MixUp and CutMix against their definitions."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from utils.choices import AUTO_AUGMENTS, BACKENDS, INTERPOLATIONS
from utils.data.transforms import (
    BatchMixing,
    Normalize,
    ToTensor,
    evaluation_transform,
    training_transform,
)
from utils.runtime.errors import UserError

BILINEAR = v2.InterpolationMode.BILINEAR
BICUBIC = v2.InterpolationMode.BICUBIC
NEAREST = v2.InterpolationMode.NEAREST
MEAN = (0.2, 0.5, 0.75)
FILL = [51, 128, 191]  # 255 * MEAN = 51, 127.5, 191.25; Python rounds 127.5 to the even 128
CROP = 16
SEEDS = range(20)  # enough for the rarer operations of the automatic augmentations


def colour_image(height: int = 40, width: int = 36) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(4, axis=0).repeat(4, axis=1))


def transformed(transform, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return transform(colour_image())


def crop_and_flip(mode=BILINEAR) -> list:
    return [v2.RandomResizedCrop(CROP, interpolation=mode, antialias=True), v2.RandomHorizontalFlip()]


def augmented(step) -> list:
    return [*crop_and_flip(), step, v2.PILToTensor()]


POLICIES = {name: v2.AutoAugment(v2.AutoAugmentPolicy(name), BILINEAR) for name in ("imagenet", "cifar10", "svhn")}
ERASE = v2.RandomErasing(p=0.5, value=FILL)
# The options of training_transform, and torchvision's steps.
COMPOSED = {
    "plain": ({}, [*crop_and_flip(), v2.PILToTensor()]),
    "tensor": ({"backend": "tensor"}, [v2.PILToTensor(), *crop_and_flip()]),
    "bicubic, ra": (
        {"interpolation": "bicubic", "auto_augment": "ra"},
        [*crop_and_flip(BICUBIC), v2.RandAugment(interpolation=BICUBIC), v2.PILToTensor()],
    ),
    "nearest": ({"interpolation": "nearest"}, [*crop_and_flip(NEAREST), v2.PILToTensor()]),
    "ra, magnitude 25": (
        {"auto_augment": "ra", "ra_magnitude": 25},
        augmented(v2.RandAugment(magnitude=25, interpolation=BILINEAR)),
    ),
    "ta_wide": ({"auto_augment": "ta_wide"}, augmented(v2.TrivialAugmentWide(interpolation=BILINEAR))),
    "augmix, severity 9": (
        {"auto_augment": "augmix", "augmix_severity": 9},
        augmented(v2.AugMix(severity=9, interpolation=BILINEAR)),
    ),
    **{name: ({"auto_augment": name}, augmented(policy)) for name, policy in POLICIES.items()},
    "erase": ({"random_erase": 0.5}, [*crop_and_flip(), v2.PILToTensor(), ERASE]),
    "tensor, nearest, ta_wide, erase": (
        {"backend": "tensor", "interpolation": "nearest", "auto_augment": "ta_wide", "random_erase": 0.5},
        [v2.PILToTensor(), *crop_and_flip(NEAREST), v2.TrivialAugmentWide(interpolation=NEAREST), ERASE],
    ),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_the_training_transform_is_torchvisions_composed_by_hand(name):
    options, steps = COMPOSED[name]
    transform, by_hand = training_transform(CROP, MEAN, **options), v2.Compose(steps)
    for seed in SEEDS:
        image = transformed(transform, seed)
        assert image.dtype == torch.uint8
        assert image.shape == (3, CROP, CROP)
        assert torch.equal(image, transformed(by_hand, seed))


def test_bicubic_automatic_augmentation_of_tensors_is_refused():
    """torchvision would raise only at the first sheared image."""
    for name in AUTO_AUGMENTS:
        for backend in BACKENDS if name == "augmix" else ("tensor",):  # augmix always mixes tensors
            with pytest.raises(UserError, match=rf"bicubic: .* --auto-augment {name} with --backend {backend};"):
                training_transform(CROP, MEAN, auto_augment=name, interpolation="bicubic", backend=backend)


@pytest.mark.parametrize(("mean", "fill"), [(MEAN, FILL), ((0.3162,), [81, 81, 81])], ids=["three values", "one value"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_erasing_fills_with_the_rounded_mean(mean, fill, backend):
    white = Image.new("RGB", (36, 40), (255, 255, 255))
    torch.manual_seed(0)
    image = training_transform(CROP, mean, random_erase=1.0, backend=backend)(white)
    for channel, value in zip(image, fill, strict=True):
        assert channel.unique().tolist() == [value, 255]
    erased = image[0] == fill[0]
    assert torch.equal(erased, image[2] == fill[2])
    rows, columns = erased.any(1).sum(), erased.any(0).sum()
    assert erased.sum() == rows * columns  # one rectangle


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_the_evaluation_transform_is_pillows_resize_and_crop(name):
    image = evaluation_transform(24, CROP, interpolation=name)(colour_image())
    resized = colour_image().resize((24, 26), Image.Resampling[name.upper()])  # from 36 x 40; 24 * 40 / 36 = 26.7
    by_hand = resized.crop((4, 5, 20, 21))  # the central 16 x 16
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(np.asarray(by_hand).copy()).permute(2, 0, 1))


@pytest.mark.parametrize("mode", [BILINEAR, BICUBIC, NEAREST])
def test_the_evaluation_transform_of_tensors_is_torchvisions(mode):
    resize_and_crop = v2.Compose([v2.Resize(24, interpolation=mode, antialias=True), v2.CenterCrop(CROP)])
    by_hand = resize_and_crop(v2.functional.pil_to_tensor(colour_image()))
    image = evaluation_transform(24, CROP, interpolation=mode.value, backend="tensor")(colour_image())
    assert image.dtype == torch.uint8
    assert torch.equal(image, by_hand)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_to_tensor_is_torchvisions(mode):
    image = colour_image().convert(mode)
    assert torch.equal(ToTensor()(image), v2.PILToTensor()(image))
    tensor = torch.zeros(1, 2, 3, dtype=torch.uint8)
    assert ToTensor()(tensor) is tensor


def test_normalize_with_one_value_and_with_three():
    images = torch.tensor([[[[0, 51]], [[102, 153]], [[204, 255]]]], dtype=torch.uint8)  # (1, 3, 1, 2): 0, 0.2, ... 1
    one = Normalize((0.3162,), (0.3213,))(images)
    assert one.dtype == torch.float32
    by_hand = [[[(level - 0.3162) / 0.3213 for level in row]] for row in ((0, 0.2), (0.4, 0.6), (0.8, 1))]
    torch.testing.assert_close(one, torch.tensor([by_hand]), rtol=0, atol=1e-6)
    three = Normalize((0.1, 0.4, 0.5), (0.1, 0.5, 0.25))(images)
    by_hand = [[[-1.0, 1.0]], [[0.0, 0.4]], [[1.2, 2.0]]]
    torch.testing.assert_close(three, torch.tensor([by_hand]), rtol=0, atol=1e-6)


# Mixing

BATCH = 8
TARGETS = torch.tensor([3, 0, 1, 2, 0, 3, 2, 1])  # neighbours differ, also the last and the first
IMAGES = torch.rand(BATCH, 3, 12, 10, generator=torch.Generator().manual_seed(0))


def mix(
    mixup: float = 0.0, cutmix: float = 0.0, *, seed: int = 0, epoch: int = 0, step: int = 0, rank: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    return BatchMixing(mixup, cutmix, 4, seed, rank)(IMAGES, TARGETS, epoch, step)


def own_share(mixed_targets: torch.Tensor) -> float:
    """lambda: the weight of each image's class; its neighbour's class has the rest."""
    assert (mixed_targets.shape, mixed_targets.dtype) == ((BATCH, 4), torch.float32)
    own, neighbour = mixed_targets[range(BATCH), TARGETS], mixed_targets[range(BATCH), TARGETS.roll(1)]
    assert own.unique().numel() == 1
    torch.testing.assert_close(own + neighbour, torch.ones(BATCH))
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(BATCH))
    return own[0].item()


def test_without_mixing_nothing_changes():
    images, targets = mix()
    assert images is IMAGES
    assert targets is TARGETS


def test_mixup_is_a_weighted_sum_of_neighbours():
    for step in range(5):
        images, targets = mix(mixup=1.0, step=step)
        share = own_share(targets)
        assert 0 < share < 1
        torch.testing.assert_close(images, share * IMAGES + (1 - share) * IMAGES.roll(1, 0))


def test_the_alpha_of_mixup_shapes_the_weights():
    near_half = [own_share(mix(mixup=1000.0, step=step)[1]) for step in range(20)]
    assert all(0.4 < share < 0.6 for share in near_half)  # Beta(1000, 1000): 0.5 +- 0.011
    near_ends = [own_share(mix(mixup=0.01, step=step)[1]) for step in range(20)]
    assert sum(min(share, 1 - share) < 0.1 for share in near_ends) >= 15  # Beta(0.01, 0.01): 98 % of its mass


def test_cutmix_takes_a_rectangle_from_the_neighbour():
    for step in range(5):
        images, targets = mix(cutmix=1.0, step=step)
        is_neighbours = (images != IMAGES).all(1)  # (B, H, W)
        assert torch.equal(images, torch.where(is_neighbours[:, None], IMAGES.roll(1, 0), IMAGES))
        assert (is_neighbours == is_neighbours[0]).all()
        rows, columns = is_neighbours[0].any(1).sum(), is_neighbours[0].any(0).sum()
        assert is_neighbours[0].sum() == rows * columns
        assert own_share(targets) == pytest.approx(1 - (rows * columns).item() / 120, abs=1e-6)


def test_with_both_each_step_uses_one():
    kinds = set()
    for step in range(12):
        images, targets = mix(mixup=1.0, cutmix=1.0, step=step)
        assert 0 <= own_share(targets) <= 1
        kept_or_taken = (images == IMAGES) | (images == IMAGES.roll(1, 0))
        kinds.add("cutmix" if kept_or_taken.all() else "mixup")
    assert kinds == {"mixup", "cutmix"}


def test_mixing_depends_on_seed_epoch_step_and_rank_only():
    places = [{}, {"seed": 1}, {"epoch": 1}, {"step": 1}, {"rank": 1}]
    torch.manual_seed(1)
    first = [mix(mixup=1.0, **place) for place in places]
    torch.manual_seed(2)
    second = [mix(mixup=1.0, **place) for place in reversed(places)][::-1]
    for (images, targets), (images_again, targets_again) in zip(first, second, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(targets, targets_again)
    assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(2)))  # undisturbed
    assert len({own_share(targets) for _, targets in first}) == len(places)


def test_mixing_needs_two_classes():
    for mixup, cutmix in ((0.2, 0.0), (0.0, 0.2)):
        with pytest.raises(UserError, match="at least two classes"):
            BatchMixing(mixup, cutmix, 1, 0, 0)
    assert BatchMixing(0.0, 0.0, 1, 0, 0)(IMAGES, TARGETS, 0, 0)[0] is IMAGES
