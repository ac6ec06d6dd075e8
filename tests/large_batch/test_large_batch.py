"""Memory bank and gradient cache: more keys than a batch, batches beyond the encoder's memory."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conr_kernels import ConRLoss, MemoryBank, conr_loss, gradient_cache

ROOT = Path(__file__).parents[2]


def make_rows(n_rows: int, seed: int, n_labels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 15, (n_rows, n_labels), generator=g).float()
    return (
        torch.randn(n_rows, 4, generator=g),
        y,
        y + torch.randn(n_rows, n_labels, generator=g),
    )


@pytest.mark.parametrize("size", [1, 5, 8])
def test_bank_holds_the_last_rows_through_every_wrap(size: int) -> None:
    bank = MemoryBank(size, 4, n_labels=2)
    history = [torch.empty(0, 4), torch.empty(0, 2), torch.empty(0, 2)]
    for step, n_rows in enumerate((0, 3, 1, 4, 8, 0, 11, 17, 2, 5)):
        rows = make_rows(n_rows, step, 2)
        bank.push(*rows)
        history = [torch.cat(pair)[-size:] for pair in zip(history, rows, strict=True)]
        assert len(bank) == len(history[0])
        joined = torch.cat(bank.keys(), dim=1)
        expected = torch.cat(history, dim=1)
        assert sorted(joined.tolist()) == sorted(expected.tolist()), step


@pytest.mark.parametrize("n_rows", [4, 8])
def test_bank_is_in_the_state_dict_and_goes_on_where_it_was(n_rows: int) -> None:
    bank = MemoryBank(6, 4)
    bank.push(*make_rows(n_rows, 0))
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    loaded = MemoryBank(6, 4)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for one in (bank, loaded):
        one.push(*make_rows(4, 1))
    assert len(loaded) == 6
    held, held_too = bank.keys(), loaded.keys()
    assert all(torch.equal(a, b) for a, b in zip(held, held_too, strict=True))


def test_bank_changes_the_features_dtype_and_not_the_labels() -> None:
    bank = MemoryBank(6, 4, label_dtype=torch.float64)
    x, y, p = make_rows(3, 0)
    y = y.double() + 1e-9
    bank.push(x, y, p)
    bank.to(torch.bfloat16)
    held = bank.keys()
    assert [t.dtype for t in held] == [torch.bfloat16, torch.float64, torch.float64]
    assert torch.equal(held[1], y)
    assert bank.keys(torch.float32)[0].dtype == torch.float32
    bank.push(x.half().requires_grad_(), y, p)
    assert not bank.features.requires_grad


def test_bank_takes_labels_as_vectors_and_refuses_other_shapes() -> None:
    bank = MemoryBank(6, 4)
    x, y, p = make_rows(3, 0)
    bank.push(x, y[:, 0], p[:, 0].long())
    assert bank.keys()[1].shape == (3, 1)
    for rows in ((x[:, :2], y, p), (x, torch.cat([y, y], 1), torch.cat([p, p], 1))):
        with pytest.raises(ValueError, match="the bank holds D = 4 features and L = 1"):
            bank.push(*rows)
    with pytest.raises(ValueError, match="targets must have shape"):
        bank.push(x, y[:2], p)
    with pytest.raises(ValueError, match="size must be ≥ 1, got 0"):
        MemoryBank(0, 4)
    with pytest.raises(TypeError, match="n_features must be an int"):
        MemoryBank(3, 4.0)
    with pytest.raises(TypeError, match=r"features \(dtype\) must have .*, got torch.int64"):
        MemoryBank(3, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"labels \(label_dtype\) must have .*, got torch.bool"):
        MemoryBank(3, 4, label_dtype=torch.bool)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_loss_with_a_bank_is_the_loss_against_batch_and_bank(backend: str) -> None:
    """Rows of the batch are rows of one larger batch; the bank's have no loss and no gradient."""
    bank = MemoryBank(30, 4)
    x, y, p = make_rows(20, 5)
    for step in range(4):  # at first an empty bank
        key_x, key_y, key_p = bank.keys()
        x.requires_grad_()
        rows = conr_loss(x, y, p, keys=bank.keys(), backend=backend, reduction="none")
        (gradient,) = torch.autograd.grad(rows.sum(), x)
        union = [torch.cat(pair) for pair in ((x, key_x), (y, key_y), (p, key_p))]
        expected = conr_loss(*union, backend="reference", reduction="none")[:20]
        (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
        bank.push(*make_rows(11, step))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_of_a_bank_are_compared_in_the_dtype_of_the_batchs(dtype: torch.dtype) -> None:
    """Ties at the window on a decimal grid tell float32 and float64 apart."""
    (x, y, p), (key_x, key_y, key_p) = make_rows(40, 0), make_rows(60, 1)
    y, p, key_y, key_p = ((t * 10).round() / 100 for t in (y, p, key_y, key_p))
    losses = [
        conr_loss(x, y.to(dtype), p.to(dtype), window=0.2, keys=(key_x, key_y.to(of), key_p.to(of)))
        for of in (torch.float32, torch.float64)
    ]
    assert losses[0] > 0 and torch.equal(*losses)


def test_pushing_before_backward_changes_no_gradient() -> None:
    bank = MemoryBank(8, 4)
    bank.push(*make_rows(8, 0))
    x, y, p = make_rows(6, 1)
    x.requires_grad_()
    loss = conr_loss(x, y, p, keys=bank.keys())
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    bank.push(x, y, p)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


class Encoder(nn.Module):
    def __init__(self, dropout: float = 0.0, is_normalised: bool = False) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(16) if is_normalised else nn.Identity()
        self.body = nn.Sequential(
            nn.Linear(5, 16), norm, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 6)
        )
        self.head = nn.Linear(6, 1)

    def forward(self, a: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features = self.body(a if b is None else a + b)
        return features, self.head(features)[:, 0]


def objective(y: Tensor, has_regression: bool = True):
    def loss(features: Tensor, predictions: Tensor) -> Tensor:
        value = ConRLoss(temperature=0.1)(features, y, predictions)
        if has_regression:
            value = value + nn.functional.mse_loss(predictions.float(), y)
        return value

    return loss


def train(step, encoder: nn.Module, cast: torch.dtype | None) -> tuple[Tensor, list[Tensor | None]]:
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=cast, enabled=cast is not None):
        value = step(encoder)
    if value.requires_grad:
        value.backward()
    return value.detach(), [parameter.grad for parameter in encoder.parameters()]


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 40, 99])
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "dropout, is_normalised, has_regression",
    [(0.0, False, True), (0.4, False, False), (0.4, True, True)],
)
def test_gradient_cache_equals_one_shot(
    chunk_size: int,
    cast: torch.dtype | None,
    dropout: float,
    is_normalised: bool,
    has_regression: bool,
) -> None:
    if is_normalised and chunk_size == 1:
        pytest.skip("batch normalisation takes no single row: 40 rows in chunks of 1")
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 5), torch.randint(0, 8, (40,)).float()
    encoders = [Encoder(dropout, is_normalised) for _ in range(2)]
    encoders[1].load_state_dict(encoders[0].state_dict())
    loss = objective(targets, has_regression)

    def in_one_graph(encoder: nn.Module) -> Tensor:
        # Chunks as well: random numbers and batch statistics are those of chunks.
        parts = [encoder(chunk) for chunk in inputs.tensor_split(-(-len(inputs) // chunk_size))]
        return loss(*(torch.cat(part) for part in zip(*parts, strict=True)))

    expected, gradients = train(in_one_graph, encoders[0], cast)
    random_state = torch.get_rng_state()
    value, cached = train(
        lambda encoder: gradient_cache(encoder, inputs, loss, chunk_size=chunk_size),
        encoders[1],
        cast,
    )
    assert torch.equal(random_state, torch.get_rng_state())
    torch.testing.assert_close(value, expected)
    # Under autocast each chunk's weight gradient is rounded to bfloat16 before it is added.
    tolerance = 2e-5 if cast is None else 2e-2
    for a, b in zip(cached, gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= tolerance * (b.abs().max() + 1e-3)
    for a, b in zip(encoders[1].buffers(), encoders[0].buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["tuple", "mapping"])
def test_gradient_cache_takes_several_inputs_and_any_callable(kind: str) -> None:
    a, b, y = torch.randn(9, 5), torch.randn(9, 5), torch.arange(9.0) // 2
    encoder = Encoder()
    inputs = (a, b) if kind == "tuple" else dict(b=b, a=a)
    gradient_cache(lambda *s, **k: encoder(*s, **k), inputs, objective(y), chunk_size=4)
    cached = [parameter.grad.clone() for parameter in encoder.parameters()]
    encoder.zero_grad()
    objective(y)(*encoder(a, b)).backward()
    for got, parameter in zip(cached, encoder.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6)


def test_gradient_cache_scales_and_accumulates_gradients() -> None:
    inputs, y = torch.randn(9, 5), torch.arange(9.0) // 2
    encoder = Encoder()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    values = [
        gradient_cache(encoder, inputs, objective(y), chunk_size=4, scaler=s)
        for s in (None, scaler)
    ]
    assert torch.equal(*values)
    accumulated = [parameter.grad.clone() for parameter in encoder.parameters()]
    encoder.zero_grad()
    objective(y)(*encoder(inputs)).backward()
    for got, parameter in zip(accumulated, encoder.parameters(), strict=True):
        torch.testing.assert_close(got, 9 * parameter.grad, rtol=1e-4, atol=1e-6)


def test_gradient_cache_of_no_rows() -> None:
    encoder = Encoder()
    empty = torch.empty(0, 5)
    value = gradient_cache(encoder, empty, objective(torch.empty(0), False), chunk_size=4)
    assert value == 0
    assert all(float(p.grad.abs().max()) == 0 for p in encoder.body.parameters())


def test_gradient_cache_refuses_bad_input() -> None:
    encoder, loss = Encoder(), objective(torch.zeros(3))
    with pytest.raises(ValueError, match="chunk_size must be ≥ 1, got 0"):
        gradient_cache(encoder, torch.randn(3, 5), loss, chunk_size=0)
    with pytest.raises(ValueError, match="same number of rows"):
        gradient_cache(encoder, (torch.randn(3, 5), torch.randn(2, 5)), loss, chunk_size=2)
    with pytest.raises(TypeError, match=r"inputs\[1\] must be a Tensor"):
        gradient_cache(encoder, (torch.randn(3, 5), [1, 2, 3]), loss, chunk_size=2)
    with pytest.raises(ValueError, match="one row for each of the 3 inputs"):
        gradient_cache(lambda x: encoder(x[:1]), torch.randn(3, 5), loss, chunk_size=2)


@pytest.mark.parametrize(
    "outputs, got",
    [
        (lambda f, p: f, "got Tensor"),
        (lambda f, p: dict(f=f, p=p), "got dict"),
        (lambda f, p: (f, p.sum()), r"got 2 of shape \(2, 6\), shape \(\)"),
        (lambda f, p: (f, p, f), "got 3 of"),
    ],
)
def test_gradient_cache_names_what_an_encoder_returned(outputs, got: str) -> None:
    encoder, loss = Encoder(), objective(torch.zeros(3))
    with pytest.raises(TypeError, match=rf"must return \(features, predictions\).*{got}"):
        gradient_cache(lambda x: outputs(*encoder(x)), torch.randn(3, 5), loss, chunk_size=2)


@pytest.mark.parametrize(
    "value, got",
    [(lambda f: None, "NoneType"), (lambda f: 1.0, "float"), (lambda f: f[:, 0], r"shape \(3,\)")],
)
def test_gradient_cache_names_what_a_loss_returned(value, got: str) -> None:
    with pytest.raises(TypeError, match=f"must return a scalar Tensor, got {got}"):
        gradient_cache(Encoder(), torch.randn(3, 5), lambda f, p: value(f), chunk_size=2)


def test_gradient_cache_leaves_no_short_chunk() -> None:
    lengths: list[int] = []
    encoder = Encoder(is_normalised=True)  # refuses a single row
    encoder.register_forward_pre_hook(lambda _, inputs: lengths.append(len(inputs[0])))
    gradient_cache(encoder, torch.randn(33, 5), objective(torch.zeros(33)), chunk_size=8)
    assert lengths == 2 * [7, 7, 7, 6, 6]


def test_gradient_cache_takes_predictions_that_are_classes() -> None:
    inputs, y, encoder = torch.randn(9, 5), torch.arange(9.0) // 2, Encoder()
    loss = objective(y, has_regression=False)

    def classify(x: Tensor) -> tuple[Tensor, Tensor]:
        features, predictions = encoder(x)
        return features, predictions.round().long()

    gradient_cache(classify, inputs, loss, chunk_size=4)
    cached = encoder.body[0].weight.grad.clone()
    encoder.zero_grad()
    loss(*classify(inputs)).backward()
    torch.testing.assert_close(cached, encoder.body[0].weight.grad, rtol=1e-4, atol=1e-6)


def run_script(*arguments: str, launcher: tuple[str, ...] = ()) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "benchmarks.examples.train_large_batch", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_script_trains_in_an_eighth_of_the_one_shot_memory() -> None:
    """Peak memory of one step at N = 16,384, each in its own process."""
    peaks = {}
    for chunk_size in (16384, 512):
        output = run_script("--rows", "16384", "--chunk", str(chunk_size), "--steps", "1")
        peaks[chunk_size] = float(re.search(r"peak memory ([\d.]+) MiB", output)[1])
    print(f"peak memory of a step in MiB by chunk size: {peaks}")
    assert peaks[512] <= peaks[16384] / 8


def test_script_trains_with_torchrun() -> None:
    output = run_script(
        "--rows", "256", "--chunk", "64", "--steps", "6", "--width", "32",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    )  # fmt: skip
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert "2 processes" in output
