"""Depth maps with the published depth function: one row an image, its mean depth the label.

python -m benchmarks.examples.depth_maps
"""

import torch
from torch import nn

from conr_kernels import ConR_depth


def main(steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    depth = 0.5 + 9 * torch.rand(96, 1, 1, 1) ** 2 + torch.rand(96, 1, 8, 8)  # metres
    images = torch.cat([1 / depth, depth.sin(), torch.rand_like(depth)], dim=1)
    weights = depth / depth.mean()  # far pixels are rare

    encoder = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4))
    decoder = nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(16, 1, 3, padding=1))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    losses = []
    for _ in range(steps):
        rows = torch.randint(0, len(depth), (32,))
        features = encoder(images[rows])
        output = decoder(features)
        regression = (weights[rows] * (output - depth[rows]).abs()).mean()
        loss = regression + 0.2 * ConR_depth(features, depth[rows], output, weights[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"depth maps: loss {losses[0]:.2f} to {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    main()
