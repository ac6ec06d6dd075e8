"""A temperature schedule, and what to log: the loss's excess over the floor of its batch.

    python -m benchmarks.examples.schedule_and_statistics

The loss of a batch cannot fall below ``floor``, the mean of ``log n_i`` over its anchors, which
changes from batch to batch: only the excess says whether something is learnt.
"""

import torch
from torch import nn

from conr_kernels import ConRLoss, conr_statistics


def main(epochs: int = 4, steps: int = 10) -> list[dict[str, float]]:
    torch.manual_seed(0)
    y = torch.randint(20, 60, (1024,)).float()
    inputs = torch.sin(y[:, None] / 6 + torch.arange(8)) + 0.1 * torch.randn(1024, 8)
    body, head = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16)), nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-2)
    conr = ConRLoss(window=1.5)
    log = []
    for epoch in range(epochs):
        conr.temperature = 0.5 * 0.6**epoch
        for _ in range(steps):
            rows = torch.randint(0, len(y), (128,))
            features = body(inputs[rows])
            predictions = head(features)[:, 0]
            contrast = conr(features, y[rows], predictions)
            loss = (predictions - y[rows]).abs().mean() + contrast
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seen = conr_statistics(y[rows], predictions, window=conr.window).summary()
        seen |= dict(temperature=conr.temperature, excess=contrast.item() - seen["floor"])
        print(f"epoch {epoch}: " + ", ".join(f"{name} {value:.3g}" for name, value in seen.items()))
        log.append(seen)
    return log


if __name__ == "__main__":
    main()
