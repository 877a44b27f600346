"""The mask as two matrix products equals upsampling and blurring the image."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from _policy_gradient.mask import SmoothMask, fading_weight, smoothing_matrix
from utils.runtime.errors import UserError


@pytest.mark.parametrize(
    ("size", "grid", "kernel", "sigma"),
    [
        (224, 64, 13, 6.0),  # the published setting; 64 does not divide 224
        (224, 62, 13, 6.0),  # where i * grid // size is not what interpolate does
        (224, 224, 13, 6.0),
        (64, 16, 5, 2.0),
        (33, 7, 9, 0.5),
        (32, 1, 3, 1.0),
        (20, 20, 1, 3.0),
        (15, 4, 29, 10.0),  # the widest kernel that reflect padding allows
    ],
)
def test_equals_interpolate_and_gaussian_blur(size, grid, kernel, sigma):
    cells = torch.rand(3, grid * grid, generator=torch.Generator().manual_seed(0))
    upsampled = F.interpolate(cells.view(3, 1, grid, grid), size=(size, size))
    expected = gaussian_blur(upsampled, kernel_size=kernel, sigma=sigma)
    mask = SmoothMask(size, grid, kernel, sigma)(cells)
    assert mask.shape == (3, 1, size, size)
    assert mask.dtype == torch.float32
    torch.testing.assert_close(mask, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(0.0, 2.0), (0.5, 1.5), (0.5, 1.0), (0.0, 0.25)])
def test_a_mask_in_another_range_is_the_affine_map_of_the_published_one(low, high):
    cells = torch.rand(3, 62 * 62, generator=torch.Generator().manual_seed(0))
    upsampled = F.interpolate(cells.view(3, 1, 62, 62), size=(224, 224))
    expected = low + (high - low) * gaussian_blur(upsampled, kernel_size=13, sigma=6.0)
    mask = SmoothMask(224, 62, 13, 6.0, low, high)
    torch.testing.assert_close(mask(cells), expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mask(cells), mask(cells.clone()))
    ends = torch.tensor([[0.0], [1.0]]).expand(2, 62 * 62)
    torch.testing.assert_close(mask(ends), torch.tensor([low, high]).view(2, 1, 1, 1).expand(2, 1, 224, 224))


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (0.5, 0.5), (-0.5, 1.0), (0.0, float("nan"))])
def test_ranges_that_are_none(low, high):
    with pytest.raises(UserError, match=rf"--mask-range {low:g} {high:g}: expected two numbers of at least 0"):
        SmoothMask(32, 8, 5, 2.0, low, high)


def test_the_published_range_is_the_two_products_alone_bit_for_bit():
    mask, cells = SmoothMask(32, 8, 5, 2.0, 0.0, 1.0), torch.rand(2, 64)
    rows = (cells.view(-1, 8) @ mask.smoothing.T).view(2, 8, 32)
    assert torch.equal(mask(cells), torch.bmm(mask.smoothing.expand(2, -1, -1), rows).unsqueeze(1))


def test_fading_weights_by_hand():
    assert [fading_weight(epoch, 5, 2) for epoch in range(5)] == pytest.approx([1, 1, 1, 2 / 3, 1 / 3])
    assert [fading_weight(epoch, 3, 3) for epoch in range(3)] == [0.75, 0.5, 0.25]
    assert [fading_weight(epoch, 3, 0) for epoch in range(3)] == [1, 1, 1]


def test_every_size_and_grid_up_to_24():
    for size in range(2, 25):
        for grid in range(1, size + 1):
            cells = torch.rand(1, grid * grid, generator=torch.Generator().manual_seed(size * 100 + grid))
            expected = gaussian_blur(F.interpolate(cells.view(1, 1, grid, grid), size=(size, size)), 3, 1.0)
            torch.testing.assert_close(SmoothMask(size, grid, 3, 1.0)(cells), expected, rtol=0, atol=1e-6)


def test_rows_sum_to_one_so_that_a_constant_stays():
    matrix = smoothing_matrix(224, 64, 13, 6.0)
    assert matrix.shape == (224, 64)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(224))


def test_float32_inside_autocast():
    mask = SmoothMask(32, 8, 5, 2.0)
    cells = torch.rand(2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mask(cells)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, mask(cells))


def test_matrix_is_not_part_of_the_state():
    assert SmoothMask(32, 8, 5, 2.0).state_dict() == {}


@pytest.mark.parametrize(
    ("size", "grid", "kernel", "sigma", "expected"),
    [
        (32, 33, 5, 2.0, "--grid 33: expected 1 to 32"),
        (32, 0, 5, 2.0, "--grid 0"),
        (32, 8, 4, 2.0, "--kernel 4: a Gaussian blur needs an odd"),
        (32, 8, 65, 2.0, "--kernel 65: too large for images of 32 pixels; give at most 63"),
        (32, 8, 5, 0.0, "--sigma 0.0"),
        (32, 8, 5, float("nan"), "--sigma nan"),
    ],
)
def test_sizes_that_do_not_fit(size, grid, kernel, sigma, expected):
    with pytest.raises(UserError, match=expected):
        SmoothMask(size, grid, kernel, sigma)
