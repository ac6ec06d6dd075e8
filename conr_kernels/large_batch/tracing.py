"""What ``torch.compile`` has to be told of ``group=``. Imported only while it traces."""

import torch

from .. import statistics
from . import union

union_loss = torch.compiler.disable(
    union.union_loss, reason="group= exchanges sizes between processes before it computes"
)
union_statistics = torch.compiler.disable(
    statistics.union_statistics, reason="group= exchanges sizes between processes first"
)
