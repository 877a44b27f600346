"""From cells to a smooth mask: nearest-neighbour upsampling and Gaussian blur as two small matrix products."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from utils.runtime.errors import UserError


def check_mask_size(size: int, grid: int, kernel: int, sigma: float) -> None:
    """Raise UserError unless a (grid, grid) mask can be upsampled to (size, size) and blurred with reflect padding."""
    if not 1 <= grid <= size:
        raise UserError(f"--grid {grid}: expected 1 to {size}, since the image is {size} x {size} pixels.")
    if kernel < 1 or kernel % 2 == 0:
        raise UserError(f"--kernel {kernel}: a Gaussian blur needs an odd kernel size of at least 1.")
    if kernel // 2 >= size:
        raise UserError(f"--kernel {kernel}: too large for images of {size} pixels; give at most {2 * size - 1}.")
    if not sigma > 0:
        raise UserError(f"--sigma {sigma}: the standard deviation of the blur, in pixels, must be above 0.")


def smoothing_matrix(size: int, grid: int, kernel: int, sigma: float) -> Tensor:
    """The matrix A, (size, grid) float32, such that A @ cells @ A.T upsamples and blurs a (grid, grid) array.

    Both steps are linear and separable, so A is their effect on the `grid` unit vectors. It is read off torch's own
    `interpolate` (nearest) and torchvision's own `gaussian_blur` (reflect padding), including their rounding. Each row
    sums to 1. Raises UserError for sizes that do not fit.
    """
    check_mask_size(size, grid, kernel, sigma)
    unit_vectors = torch.eye(grid)[None]  # (1, G, G)
    upsampled = F.interpolate(unit_vectors, size=size, mode="nearest")  # (1, G, S)
    rows = upsampled.view(grid, 1, 1, size)  # G images of 1 x S pixels
    blurred = gaussian_blur(rows, kernel_size=[kernel, 1], sigma=[sigma, sigma])  # (G, 1, 1, S)
    return blurred.view(grid, size).T.contiguous()  # (S, G)


def check_mask_range(low: float, high: float) -> None:
    """Raise UserError unless 0 <= low < high."""
    if not 0 <= low < high:
        raise UserError(f"--mask-range {low:g} {high:g}: expected two numbers of at least 0, the lower one first.")


def fading_weight(epoch: int, epochs: int, fade_epochs: int) -> float:
    """The weight w of the masks in an epoch, counted from 0: a mask m is applied as 1 + w (m - 1).

    w is 1 before the last `fade_epochs` of all `epochs`, and 1 - k / (fade_epochs + 1) in the k-th of these, k = 1, 2,
    ...: the masks become weaker but never vanish.
    """
    into_fading = max(0, epoch + 1 - (epochs - fade_epochs))
    return 1 - into_fading / (fade_epochs + 1)


KEPT_MEAN = 0.5  # mean of an image's cells with --keep-mean, as of uniform cells


class SmoothMask(nn.Module):
    """Cells in (0, 1) to a mask of the image's size: A M A^T (nearest upsampling, then Gaussian blur).

    Equal to the published code, which calls `interpolate` and `gaussian_blur` on (B, 1, size, size). A mask in (low,
    high) is low + (high - low) times the published mask in (0, 1). With keep_mean the cells of each image are first
    multiplied by a number that makes their mean .5; some are then above 1, and some values of the mask above high.
    """

    smoothing: Tensor

    def __init__(
        self,
        size: int,
        grid: int,
        kernel: int,
        sigma: float,
        low: float = 0.0,
        high: float = 1.0,
        keep_mean: bool = False,
    ) -> None:
        """Raises UserError for sizes that do not fit, and unless 0 <= low < high."""
        super().__init__()
        check_mask_range(low, high)
        self.grid = grid
        self.low, self.high, self.keep_mean = low, high, keep_mean
        # Not part of the state, because it follows from the arguments.
        self.register_buffer("smoothing", smoothing_matrix(size, grid, kernel, sigma), persistent=False)

    def forward(self, cells: Tensor) -> Tensor:
        """Cells (B, G*G) float32 to masks (B, 1, S, S) float32 in (low, high); float32 even under autocast.

        With keep_mean, masks are above low, and their mean is (low + high) / 2 up to the blur at the borders.
        """
        if torch.is_autocast_enabled(cells.device.type):  # leaving autocast costs the host as much as both products
            with torch.autocast(cells.device.type, enabled=False):
                return self(cells)
        if self.keep_mean:
            cells = cells * (KEPT_MEAN / cells.mean(dim=1, keepdim=True))  # cells are at least 1e-6
        if (self.low, self.high) != (0, 1):  # scale cells instead of the many pixels: rows of A sum to 1
            cells = self.low + (self.high - self.low) * cells
        rows = cells.view(-1, self.grid) @ self.smoothing.T  # (B*G, S)
        rows = rows.view(-1, self.grid, len(self.smoothing))  # (B, G, S)
        return torch.bmm(self.smoothing.expand(len(rows), -1, -1), rows).unsqueeze(1)  # (B, 1, S, S)
