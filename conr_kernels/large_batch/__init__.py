"""Room of the batches that one call, one process or one encoder does not hold: the union of all
ranks' rows, a bank of earlier rows, and gradients in chunks.

Called by users and, with a ``group``, by ``conr_loss``. Imports batch, operators, the torch backend
(whose pairs ranks share) and what lies below, never api.py or compat.py.
"""

from .gradient_cache import gradient_cache
from .memory_bank import MemoryBank

__all__ = ["MemoryBank", "gradient_cache"]
