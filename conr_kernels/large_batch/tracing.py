"""What ``torch.compile`` has to be told of ``group=``. Imported only while it traces."""

import torch

from . import union

REASON = "group= exchanges sizes between processes before it computes"
union_loss = torch.compiler.disable(union.union_loss, reason=REASON)
union_statistics = torch.compiler.disable(union.union_statistics, reason=REASON)
