"""Regression on images: by what angle, or by how many pixels, was a handwritten digit moved?"""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

SIDE = 8
#: Largest angle in degrees and shift in pixels, and how often an image is used.
LARGEST_ANGLE, LARGEST_SHIFT, COPIES = 90.0, 6.0, 2
#: Labels are the largest one times u^SKEW, u uniform in [0, 1]: small ones are the many.
SKEW = 3.0


def read_digits(file: Path) -> Tensor:
    """Images [N, 1, 8, 8] in [0, 1] of scikit-learn's ``digits.csv.gz``."""
    with gzip.open(file, "rt") as stream:
        values = np.loadtxt(stream, delimiter=",", dtype=np.float32)
    return torch.from_numpy(values[:, :-1]).reshape(-1, 1, SIDE, SIDE) / 16


def turned_digits(file: Path) -> tuple[Tensor, Tensor]:
    """Digits turned by a skewed angle: inputs [N, 64], labels [N, 1] in degrees."""
    images, generator = _copies(file)
    angles = LARGEST_ANGLE * torch.rand(len(images), 1, generator=generator) ** SKEW
    turn = angles[:, 0] * math.pi / 180
    rows = torch.stack([turn.cos(), -turn.sin(), 0 * turn, turn.sin(), turn.cos(), 0 * turn], dim=1)
    return _moved(images, rows.reshape(-1, 2, 3)), angles


def shifted_digits(file: Path) -> tuple[Tensor, Tensor]:
    """Digits on a 14 × 14 field, moved right and down: inputs [N, 196], labels [N, 2] in pixels."""
    images, generator = _copies(file)
    shifts = LARGEST_SHIFT * torch.rand(len(images), 2, generator=generator) ** SKEW
    side = SIDE + int(LARGEST_SHIFT)
    images = functional.pad(images, (0, side - SIDE, 0, side - SIDE))
    rows = torch.zeros(len(images), 2, 3)
    rows[:, 0, 0] = rows[:, 1, 1] = 1
    rows[:, :, 2] = -2 * shifts / side
    return _moved(images, rows), shifts


def _copies(file: Path) -> tuple[Tensor, torch.Generator]:
    return read_digits(file).repeat(COPIES, 1, 1, 1), torch.Generator().manual_seed(0)


def _moved(images: Tensor, rows: Tensor) -> Tensor:
    grid = functional.affine_grid(rows, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False).flatten(1)
