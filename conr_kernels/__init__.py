"""ConR, the contrastive regularizer for deep imbalanced regression, exact and fast."""

from ._version import __version__
from .api import ConRLoss, conr_loss
from .backends import available_backends
from .compat import ConR, ConR_depth
from .density import density_weights
from .large_batch import MemoryBank, gradient_cache
from .statistics import ConRStatistics, conr_statistics
from .variants import Variant
from .window import WindowSuggestion, suggest_window

__all__ = [
    "ConR",
    "ConRLoss",
    "ConRStatistics",
    "ConR_depth",
    "MemoryBank",
    "Variant",
    "WindowSuggestion",
    "__version__",
    "available_backends",
    "conr_loss",
    "conr_statistics",
    "density_weights",
    "gradient_cache",
    "suggest_window",
]
