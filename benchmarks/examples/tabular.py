"""Tabular regression of skewed real prices, with a window chosen from the training labels.

python -m benchmarks.examples.tabular
"""

import torch
from torch import nn

from conr_kernels import ConRLoss, density_weights, suggest_window


def main(steps: int = 30) -> list[float]:
    torch.manual_seed(0)
    inputs = torch.randn(2000, 6)
    prices = (inputs @ torch.tensor([1.0, 0.5, -0.5, 0.3, 0, 0]) + 2).exp().round(decimals=1)
    y = prices.log()  # errors in per cent matter, not in coins
    found = suggest_window(y, batch_size=128)
    print(found)
    # The differences that should be pushed hard give the scale: 1 / (a large label difference).
    spread = (y.quantile(0.95) - y.quantile(0.05)).item()
    conr = ConRLoss(window=found.window, push_scale=1 / spread)
    weights = density_weights(y, "sqrt_inverse", bin_width=spread / 50, smoothing="gaussian")

    body = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    head = nn.Linear(32, 1)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for _ in range(steps):
        rows = torch.randint(0, len(y), (128,))
        features = body(inputs[rows])
        predictions = head(features)[:, 0]
        regression = (predictions - y[rows]).abs().mean()
        loss = regression + 0.5 * conr(features, y[rows], predictions, weights[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"tabular: loss {losses[0]:.2f} to {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    main()
