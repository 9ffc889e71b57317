"""Random augmentation of a whole batch at once, on whatever device the batch is.

Libraries draw one set of parameters a call: a loop over single pictures costs more than the training step of a
small model. Here every picture of the batch has its own parameters, and all are applied by one sampling.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass
class BatchAugmentation:
    """Affine map, colour, greyscale, inversion and erasure for pictures (batch, 3, height, width) in [0, 1].

    Every amount is what `strength=1` reaches; a training starts with small strength and lets it grow.

    Args:
        size: side of the square that comes out, in pixels.
        scale: largest relative change of size, both ways.
        aspect: largest relative change of the aspect ratio, both ways.
        rotation: largest angle in degrees, both ways.
        shift: largest shift as a part of the side, both ways.
        shear: largest shear, both ways.
        color: largest change of brightness, contrast and saturation, both ways.
        hue: largest turn of the hue in degrees, both ways.
        grayscale, invert, erase: probabilities.
    """

    size: int
    scale: float = 0.25
    aspect: float = 0.15
    rotation: float = 15.0
    shift: float = 0.1
    shear: float = 0.15
    color: float = 0.4
    hue: float = 20.0
    grayscale: float = 0.1
    invert: float = 0.05
    erase: float = 0.25

    def __call__(self, pixels: torch.Tensor, generator: torch.Generator, strength: float = 1.0) -> torch.Tensor:
        """pixels: (batch, 3, height, width), float in [0, 1] -> (batch, 3, size, size), float in [0, 1].

        Args:
            pixels: the pictures; they are not changed.
            generator: a generator of the CPU; its state decides everything that is random.
            strength: 0 (resampling only) to 1.

        Raises:
            ValueError: pixels of another rank, channel count or dtype, or a strength out of range.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(
                f"expected floating-point pixels (batch, 3, height, width), got {pixels.dtype} {tuple(pixels.shape)}"
            )
        if not 0 <= strength <= 1:
            raise ValueError(f"expected a strength from 0 to 1, got {strength}")
        pixels = self._warp(pixels, generator, strength)
        pixels = self._recolor(pixels, generator, strength)
        return self._erase(pixels, generator, strength)

    def _uniform(self, batch: int, generator: torch.Generator, limit: float) -> torch.Tensor:
        return (torch.rand(batch, generator=generator) * 2 - 1) * limit

    def _warp(self, pixels: torch.Tensor, generator: torch.Generator, strength: float) -> torch.Tensor:
        batch = pixels.shape[0]
        angle = self._uniform(batch, generator, math.radians(self.rotation) * strength)
        zoom = torch.exp(self._uniform(batch, generator, math.log1p(self.scale) * strength))
        stretch = torch.exp(self._uniform(batch, generator, math.log1p(self.aspect) * strength / 2))
        shear = self._uniform(batch, generator, self.shear * strength)
        shift_x = self._uniform(batch, generator, 2 * self.shift * strength)  # the sampling grid is 2 wide
        shift_y = self._uniform(batch, generator, 2 * self.shift * strength)
        cos, sin = torch.cos(angle), torch.sin(angle)
        width, height = zoom * stretch, zoom / stretch
        theta = torch.stack(
            [
                torch.stack([cos * width, (shear * cos - sin) * height, shift_x], dim=1),
                torch.stack([sin * width, (shear * sin + cos) * height, shift_y], dim=1),
            ],
            dim=1,
        )  # (batch, 2, 3)
        # Sampling 80 px at 64 skips pixels where it shrinks: a little aliasing, far below the colour changes.
        grid = F.affine_grid(theta.to(pixels), [batch, 3, self.size, self.size], align_corners=False)
        return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)

    def _recolor(self, pixels: torch.Tensor, generator: torch.Generator, strength: float) -> torch.Tensor:
        batch = pixels.shape[0]
        brightness = 1 + self._uniform(batch, generator, self.color * strength)
        contrast = 1 + self._uniform(batch, generator, self.color * strength)
        saturation = 1 + self._uniform(batch, generator, self.color * strength)
        gray = torch.rand(batch, generator=generator) < self.grayscale * strength
        saturation = torch.where(gray, 0.0, saturation)
        # Brightness, saturation and hue are one 3 x 3 matrix a picture: turn about the grey axis, then mix with grey.
        turn = _rotation_about_grey(self._uniform(batch, generator, math.radians(self.hue) * strength))
        luma = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
        mix = saturation[:, None, None] * torch.eye(3) + (1 - saturation)[:, None, None] * luma
        matrix = (brightness[:, None, None] * (mix @ turn)).to(pixels)
        flat = matrix @ pixels.flatten(2)  # (batch, 3, pixels)
        mean = flat.mean(dim=(1, 2), keepdim=True)
        flat = ((flat - mean) * contrast[:, None, None].to(pixels) + mean).clamp(0, 1)
        inverted = torch.rand(batch, generator=generator) < self.invert * strength
        flat = torch.where(inverted[:, None, None].to(pixels.device), 1 - flat, flat)
        return flat.view_as(pixels)

    def _erase(self, pixels: torch.Tensor, generator: torch.Generator, strength: float) -> torch.Tensor:
        batch, channels, height, width = pixels.shape
        hit = torch.rand(batch, generator=generator) < self.erase * strength
        box = torch.rand(batch, 4, generator=generator)
        rows, columns = torch.arange(height) / height, torch.arange(width) / width
        sides = 0.1 + 0.3 * box[:, 2:]
        in_rows = (rows >= box[:, :1]) & (rows < box[:, :1] + sides[:, :1])
        in_columns = (columns >= box[:, 1:2]) & (columns < box[:, 1:2] + sides[:, 1:])
        hole = (hit[:, None, None] & in_rows[:, :, None] & in_columns[:, None, :])[:, None].to(pixels.device)
        color = torch.rand(batch, channels, 1, 1, generator=generator).to(pixels)
        return torch.where(hole, color, pixels)


def _rotation_about_grey(angle: torch.Tensor) -> torch.Tensor:
    """Rotation matrices of RGB space about its grey axis (Rodrigues' formula): (batch,) radians -> (batch, 3, 3)."""
    axis = 1 / math.sqrt(3)
    cross = torch.tensor([[0.0, -axis, axis], [axis, 0.0, -axis], [-axis, axis, 0.0]])
    outer = torch.full((3, 3), 1 / 3)
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    return cos * torch.eye(3) + sin * cross + (1 - cos) * outer


__all__ = ["BatchAugmentation"]
