"""The methods by name: what replaces the regression loss, and what is added to it.

The weight of an ``ADDED`` method is chosen on validation sets; the others are as in their papers.
"""

from __future__ import annotations

from .balanced_mse import BalancedMSE
from .base import Method, Step, Task
from .conr import ConR
from .fds import FDS
from .focal_r import FocalR
from .infonce import InfoNCE
from .lds import LDS
from .rank_n_contrast import RankNContrast
from .ranksim import RankSim
from .reweighting import Inverse, RootInverse
from .rrt import RRT
from .vanilla import Vanilla

REPLACING: dict[str, type[Method]] = {
    "vanilla": Vanilla,
    "inverse": Inverse,
    "root inverse": RootInverse,
    "LDS": LDS,
    "FDS": FDS,
    "Balanced MSE": BalancedMSE,
    "Focal-R": FocalR,
    "RRT": RRT,
}
ADDED: dict[str, type[Method]] = {
    "RankSim": RankSim,
    "InfoNCE": InfoNCE,
    "Rank-N-Contrast": RankNContrast,
}
NAMES = (*REPLACING, *ADDED)

__all__ = ["ADDED", "NAMES", "REPLACING", "ConR", "Method", "Step", "Task"]
