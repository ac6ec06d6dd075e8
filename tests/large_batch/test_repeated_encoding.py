"""``gradient_cache`` of encoders with state: the one-shot gradients, or an error that says why."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from conr_kernels import gradient_cache, notices


class Encoder(nn.Module):
    """Features and predictions; subclasses add state to what they see."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 1)

    def seen(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(self.seen(x)).tanh()
        return features, self.head(features)


class ReplacedBuffer(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def seen(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
        return x - self.mean


class NumpyMask(Encoder):
    def seen(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(np.random.rand(*x.shape) < 0.5)


class OwnGenerator(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def seen(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape, generator=self.generator)


class Counter(Encoder):
    calls = 0

    def seen(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


def loss(features: Tensor, predictions: Tensor) -> Tensor:
    return features.square().mean() + predictions.mean()


X = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) + 2


def in_chunks(encoder: Encoder) -> list[Tensor]:
    """The gradients of encoding in chunks with one graph."""
    torch.manual_seed(0)
    parts = [encoder(x) for x in X.tensor_split(3)]
    loss(*(torch.cat(t) for t in zip(*parts, strict=True))).backward()
    return [t.grad for t in encoder.parameters()]


def test_buffers_that_are_replaced_are_restored_and_count_rows_once():
    torch.manual_seed(1)
    plain, cached = ReplacedBuffer(), ReplacedBuffer()
    cached.load_state_dict(plain.state_dict())
    expected = in_chunks(plain)
    gradient_cache(cached, X, loss, chunk_size=4)
    for t, grad in zip(cached.parameters(), expected, strict=True):
        torch.testing.assert_close(t.grad, grad)
    torch.testing.assert_close(cached.mean, plain.mean)


@pytest.mark.parametrize("encoder", [NumpyMask, OwnGenerator, Counter])
@pytest.mark.parametrize("is_cast", [False, True])
def test_what_cannot_be_repeated_is_refused_with_the_reason(encoder, is_cast):
    model = encoder()
    cast = torch.autocast("cpu", torch.bfloat16, enabled=is_cast)
    with cast, pytest.raises(RuntimeError, match="second encoding .*numpy.*buffer"):
        gradient_cache(model, X, loss, chunk_size=4)
    assert all(t.grad is None for t in model.parameters())


def test_features_that_are_not_finite_are_no_reason():
    value = gradient_cache(Encoder(), X * torch.inf, loss, chunk_size=4)
    assert not value.isfinite()


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_raises(without):
    with without(), pytest.raises(RuntimeError, match="outside of torch.no_grad"):
        gradient_cache(Encoder(), X, loss, chunk_size=4)


def test_an_encoder_that_no_rank_synchronises_is_told_once(monkeypatch, recwarn):
    monkeypatch.setattr(notices, "_told", set())
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for _ in range(2):
        gradient_cache(Encoder(), X, loss, chunk_size=4)
    (told,) = recwarn
    assert "Encoder without DistributedDataParallel" in str(told.message)
    assert told.filename == __file__
