"""``group=`` on 1, 2 and 4 ranks: one spawn of four processes serves all checks.

A check takes the group and returns a text to print.
"""

from . import agreement, mask, training, union
from .runner import WORLD, Outcomes, run_ranks, what_happened

CHECKS = [
    value
    for module in (union, mask, agreement, training)
    for name, value in vars(module).items()
    if name.startswith("check_")
]
__all__ = ["CHECKS", "WORLD", "Outcomes", "run_ranks", "what_happened"]
