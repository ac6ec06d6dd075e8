"""Room of batches beyond one call, one process or one encoder's memory: the union of all ranks'
rows, a bank of earlier rows, and gradients in chunks.

Called by users and, with a ``group``, by ``conr_loss``. Imports batch.py, ops.py, the torch backend
(for pairs that ranks share) and what these import, never api.py or compat.py.
"""

from .gradient_cache import gradient_cache
from .memory_bank import MemoryBank

__all__ = ["MemoryBank", "gradient_cache"]
