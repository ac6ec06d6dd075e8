"""ConR, the contrastive regularizer for deep imbalanced regression, exact and fast on large batches."""

from ._version import __version__
from .api import ConRLoss, conr_loss
from .large_batch import MemoryBank, gradient_cache
from .variants import Variant

__all__ = ["ConRLoss", "MemoryBank", "Variant", "__version__", "conr_loss", "gradient_cache"]
