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


class WrittenData(ReplacedBuffer):
    """``.data``, whose writes no version counts."""

    def seen(self, x: Tensor) -> Tensor:
        self.mean.data.mul_(0.5).add_(0.5 * x.mean(0))
        return x - self.mean.clone()


class NumpyMask(Encoder):
    def seen(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(np.random.rand(*x.shape) < 0.5)


class OwnGenerator(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def seen(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape, generator=self.generator)


class NumpyNoise(Encoder):
    """A little of it: 4 %."""

    def __init__(self) -> None:
        super().__init__()
        self.random = np.random.default_rng(0)

    def seen(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(1 + 0.04 * self.random.standard_normal(x.shape)).float()


class OneRow(Encoder):
    """Another one of the rows each time."""

    calls = 0

    def seen(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.3 * (torch.arange(len(x)) == self.calls % len(x)))[:, None]


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


@pytest.mark.parametrize("encoder", [ReplacedBuffer, WrittenData])
def test_buffers_that_are_replaced_or_written_unseen_are_restored_and_count_rows_once(encoder):
    torch.manual_seed(1)
    plain, cached = encoder(), encoder()
    cached.load_state_dict(plain.state_dict())
    expected = in_chunks(plain)
    gradient_cache(cached, X, loss, chunk_size=4)
    for t, grad in zip(cached.parameters(), expected, strict=True):
        torch.testing.assert_close(t.grad, grad)
    torch.testing.assert_close(cached.mean, plain.mean)


@pytest.mark.parametrize("encoder", [NumpyMask, NumpyNoise, OwnGenerator, OneRow, Counter])
@pytest.mark.parametrize("is_cast", [False, True])
def test_what_cannot_be_repeated_is_refused_with_the_reason(encoder, is_cast):
    model = encoder()
    cast = torch.autocast("cpu", torch.bfloat16, enabled=is_cast)
    with cast, pytest.raises(RuntimeError, match="second encoding .*numpy.*buffer"):
        gradient_cache(model, X, loss, chunk_size=4)
    assert all(t.grad is None for t in model.parameters())


def test_an_encoder_that_notes_its_buffers_gets_them_back_after_an_error():
    class Noting(Encoder):
        is_ready = False

        def seen(self, x: Tensor) -> Tensor:
            if not self.is_ready:
                self.register_buffer("place", torch.ones(5))
                self.is_ready = True
            return x + self.place

    model = Noting()
    with pytest.raises(AttributeError, match="place"):
        gradient_cache(model, X, loss, chunk_size=4)
    expected = in_chunks(model)
    model.zero_grad()
    gradient_cache(model, X, loss, chunk_size=4)
    for t, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(t.grad, grad)


def test_buffers_of_nan_and_sparse_ones_are_left_alone():
    class Scaled(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gaps", torch.tensor([1.0, torch.nan]))
            self.register_buffer("links", torch.eye(5).to_sparse())

        def seen(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.links, x.T).T * self.gaps[0]

    model = Scaled()
    features, _ = model(X.clone().requires_grad_())
    earlier = (features * model.gaps[:1]).sum()
    gradient_cache(model, X, loss, chunk_size=4)
    earlier.backward()  # neither was written since


def test_coarse_parameters_may_round_what_is_given_in_float32():
    """Features of another kernel without a graph, as in 16 bits on a GPU."""

    class Coarse(Encoder):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features, predictions = super().forward(x.to(torch.bfloat16))
            return features.float() * (1 + 2**-7 * torch.is_grad_enabled()), predictions.float()

    gradient_cache(Coarse().to(torch.bfloat16), X, loss, chunk_size=4)


def test_one_row_that_does_not_repeat_is_noticed_among_many():
    cast = torch.autocast("cpu", torch.bfloat16)
    with cast, pytest.raises(RuntimeError, match="second encoding"):
        gradient_cache(OneRow(), X.repeat(100, 1) / 10, loss, chunk_size=400)


def test_what_all_rows_do_not_repeat_is_noticed_sooner_than_what_one_does_not():
    class Drift(Encoder):
        calls = 0

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.calls += 1
            features, predictions = super().forward(x)
            return features * (1 + 1.5 * 2**-12 * (self.calls % 2)), predictions

    with pytest.raises(RuntimeError, match="second encoding"):
        gradient_cache(Drift(), X, loss, chunk_size=4)


def layers(count: int, *make) -> list[nn.Module]:
    return [each() for _ in range(count) for each in make]


class Sequence(nn.Module):
    """Of each row's numbers; PyTorch has other kernels for both modules without a graph."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of = of
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.body = (
            nn.LSTM(8, 8, 2, batch_first=True) if of == "lstm" else nn.TransformerEncoder(layer, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.body(x[:, :, None] * torch.ones(8, dtype=x.dtype))
        return (outputs[0] if self.of == "lstm" else outputs).mean(1)


HONEST = {
    "dropout": lambda: layers(6, lambda: nn.Linear(5, 5), nn.ReLU, lambda: nn.Dropout(0.3)),
    "normalised": lambda: layers(10, lambda: nn.Linear(5, 5), lambda: nn.BatchNorm1d(5), nn.ReLU),
    "image": lambda: [
        nn.Unflatten(1, (1, 5, 1)),
        *layers(3, lambda: nn.Conv2d(1, 1, 3, padding=1), lambda: nn.BatchNorm2d(1), nn.ReLU),
        nn.Flatten(),
    ],
    "transformer": lambda: [Sequence("transformer")],
    "lstm": lambda: [Sequence("lstm")],
}


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("kind", HONEST)
def test_rounding_is_no_reason(kind, is_training, cast):
    if kind == "lstm" and cast is not None:
        pytest.skip("PyTorch's LSTM takes no autocast on the CPU")
    torch.manual_seed(0)
    encoder = Encoder()
    encoder.body = nn.Sequential(*HONEST[kind](), nn.LazyLinear(4))
    encoder.train(is_training)
    with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
        gradient_cache(encoder, X, loss, chunk_size=4)
    assert all(t.grad is not None for t in encoder.parameters())


def test_a_row_that_cancels_is_no_reason():
    """Rounding is that of the other rows' magnitude, also where one row is nearly 0."""
    encoder, calls = Encoder(), []

    def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(x)
        features, predictions = encoder(x)
        return features, (predictions - predictions[0]) + 1e-7 * len(calls)

    gradient_cache(rounded, X, loss, chunk_size=4)
    assert len(calls) == 6


class KnownFromTheFirst(Encoder):
    """Buffers that are not there, or None, before the first rows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)

    def seen(self, x: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = x.mean(0)
        if not hasattr(self, "scale"):
            self.register_buffer("scale", x.std(0))
        self.scale = 0.5 * self.scale + 0.5 * x.std(0)
        return (x - self.mean) / self.scale


def test_buffers_that_the_first_rows_make_are_made_again():
    torch.manual_seed(1)
    plain, cached = KnownFromTheFirst(), KnownFromTheFirst()
    cached.load_state_dict(plain.state_dict())
    expected = in_chunks(plain)
    gradient_cache(cached, X, loss, chunk_size=4)
    for t, grad in zip(cached.parameters(), expected, strict=True):
        torch.testing.assert_close(t.grad, grad)
    assert torch.equal(cached.mean, plain.mean) and torch.equal(cached.scale, plain.scale)


def inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


@pytest.mark.parametrize(
    "buffer",
    [torch.ones(1).expand(8), inference(torch.ones(8)), torch.eye(3).to_sparse(),
     torch.full((3,), torch.nan), torch.ones(3, device="meta")],
    ids=["expanded", "inference", "sparse", "nan", "meta"],
)  # fmt: skip
def test_buffers_that_the_encoder_does_not_write_may_be_of_any_kind(buffer):
    encoder = Encoder()
    encoder.register_buffer("constant", buffer)
    gradient_cache(encoder, X, loss, chunk_size=4)
    assert encoder.constant is buffer


class InferenceBuffer(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", inference(torch.zeros(1)))

    def seen(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            self.count += len(x)
        return x


def test_a_buffer_of_inference_mode_counts_rows_once():
    encoder = InferenceBuffer()
    gradient_cache(encoder, X, loss, chunk_size=4)
    assert encoder.count == len(X)


def test_a_buffer_that_has_no_shape_yet_is_named():
    encoder = Encoder()
    encoder.body = nn.Sequential(encoder.body, nn.LazyBatchNorm1d())
    with pytest.raises(RuntimeError, match=r"buffer body.1.running_mean has no shape yet"):
        gradient_cache(encoder, X, loss, chunk_size=4)
    encoder(X)
    gradient_cache(encoder, X, loss, chunk_size=4)


def test_an_earlier_graph_of_an_encoder_in_eval_mode_stays_whole():
    encoder = Encoder()
    encoder.body = nn.Sequential(encoder.body, nn.BatchNorm1d(4)).eval()
    earlier = encoder(X)[0].square().sum()
    gradient_cache(encoder, X, loss, chunk_size=4)
    earlier.backward()


@pytest.mark.parametrize("call", [2, 5])
def test_an_encoder_that_raises_is_left_with_its_buffers(call):
    """In the first or the second pass; as a step that is tried again in smaller chunks."""
    encoder, calls = Encoder(), []
    encoder.body = nn.Sequential(encoder.body, nn.BatchNorm1d(4))

    def interrupt(*_) -> None:
        calls.append(None)
        if len(calls) == call:
            raise MemoryError

    held = {name: t.clone() for name, t in encoder.named_buffers()}
    encoder.head.register_forward_hook(interrupt)
    with pytest.raises(MemoryError):
        gradient_cache(encoder, X, loss, chunk_size=4)
    for name, t in encoder.named_buffers():
        assert torch.equal(t, held[name]), name
    gradient_cache(encoder, X, loss, chunk_size=2)
    assert encoder.body[1].num_batches_tracked == 6


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
