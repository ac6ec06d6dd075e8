"""Age regression with two views of each image and the published function's name.

    python -m benchmarks.examples.two_views

Replacing the published import by ``from conr_kernels import ConR`` is the whole change.
"""

import torch
from torch import Tensor, nn

from conr_kernels import ConR, density_weights


def augment(images: Tensor) -> Tensor:
    return images + 0.1 * torch.randn_like(images)


def main(steps: int = 30) -> list[float]:
    torch.manual_seed(0)
    ages = (70 * torch.rand(512, 1) ** 2).round()
    images = torch.sin(ages / 12 + torch.arange(64) / 9).view(-1, 1, 8, 8)
    weights = density_weights(ages, "sqrt_inverse", smoothing="gaussian")[:, None]

    body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32))
    head = nn.Linear(32, 1)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for _ in range(steps):
        rows = torch.randint(0, len(ages), (64,))
        views = torch.cat([augment(images[rows]), augment(images[rows])])
        y, w = ages[rows].repeat(2, 1), weights[rows].repeat(2, 1)
        features = body(views)
        predictions = head(features)
        regression = (w * (predictions - y).abs()).mean()
        loss = regression + 4.0 * ConR(features, y, predictions, w=1, weights=w, t=0.07, e=0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"two views: loss {losses[0]:.2f} to {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    main()
