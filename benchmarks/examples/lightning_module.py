"""A LightningModule whose ConR loss spans all processes of the trainer.

    python -m benchmarks.examples.lightning_module

``group="world"`` is looked up at each call: ``__init__`` runs before the processes are joined.
With automatic optimisation Lightning's DDP averages the gradients; ``gradient_cache`` would need
the wrapped module, which a LightningModule does not hold.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conr_kernels import ConRLoss


def module_class(lightning) -> type:
    """The class, for ``lightning.pytorch`` or whatever stands in for it."""

    class ConRRegression(lightning.LightningModule):
        def __init__(self, beta: float = 0.5) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
            self.head = nn.Linear(16, 1)
            self.conr = ConRLoss(window=1.5)
            self.beta = beta

        def setup(self, stage: str | None = None) -> None:
            is_one_of_several = dist.is_available() and dist.is_initialized()
            self.conr.group = "world" if is_one_of_several else None

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            inputs, y = batch
            features = self.body(inputs)
            predictions = self.head(features)[:, 0]
            contrast = self.conr(features, y, predictions)
            self.log("conr", contrast)
            return (predictions - y).abs().mean() + self.beta * contrast

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    return ConRRegression


def main() -> None:
    try:
        import lightning.pytorch as lightning
    except ImportError:
        print("skipped: lightning is not installed (pip install lightning)")
        return
    y = torch.randint(20, 60, (512,)).float()
    inputs = torch.sin(y[:, None] / 6 + torch.arange(8))
    data = torch.utils.data.TensorDataset(inputs, y)
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)
    trainer = lightning.Trainer(max_epochs=2, logger=False, enable_checkpointing=False)
    trainer.fit(module_class(lightning)(), loader)


if __name__ == "__main__":
    main()
