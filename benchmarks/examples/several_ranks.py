"""One batch over several processes: GPUs with NCCL, otherwise CPUs with gloo.

    torchrun --nproc-per-node 2 -m benchmarks.examples.several_ranks

Every row meets every other row of all processes. DDP's averaging yields the gradient of the whole.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conr_kernels import ConRLoss, conr_statistics


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 1)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(inputs)
        return features, self.head(features)[:, 0]


def main() -> None:
    if "RANK" not in os.environ:
        command = "torchrun --nproc-per-node 2 -m benchmarks.examples.several_ranks"
        raise SystemExit(f"this is an example of several processes, start it by\n    {command}")
    on_gpu = torch.cuda.is_available()
    conr = ConRLoss(window=1.5, group="world")  # may be built before the processes are joined
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    train(conr, device)
    gc.collect()  # nothing must hold the group any more (pytorch/pytorch#190489)
    dist.destroy_process_group()


def train(conr: ConRLoss, device: torch.device, steps: int = 20) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(Model().to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.manual_seed(dist.get_rank())  # other rows on each
    for step in range(steps):
        y = torch.randint(20, 60, (32,), device=device).float()
        inputs = torch.sin(y[:, None] / 6 + torch.arange(8, device=device))
        features, predictions = model(inputs)
        contrast = conr(features, y, predictions)
        loss = (predictions - y).abs().mean() + 0.5 * contrast
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            seen = conr_statistics(y, predictions, window=1.5, group="world").summary()
            if dist.get_rank() == 0:
                print(f"step {step}: ConR {contrast.item():.3f}, floor {seen['floor']:.3f}")


if __name__ == "__main__":
    main()
