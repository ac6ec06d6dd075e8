"""Promises of the interface that hold for every size and way of calling, named one by one."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from conr_kernels import ConR, ConR_depth, available_backends, conr_loss, density_weights
from conr_kernels import __main__ as command
from tests.helpers.regimes import REGIMES, force, make_batch

SIZES = (33, 257, 700)


def rows(n: int, seed: int = 0):
    batch = make_batch(n, seed=seed)
    return batch["features"], batch["targets"], batch["predictions"]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("with_keys", [False, True])
def test_labels_may_change_between_loss_and_backward(monkeypatch, regime, reduction, with_keys):
    backend = force(monkeypatch, regime)
    x, y, p = rows(65)
    x.requires_grad_()
    keys = rows(40, 1) if with_keys else None
    options = dict(keys=keys, backend=backend, reduction=reduction)
    loss = conr_loss(x, y, p, **options).sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    for t in (y, p, *(keys[1:] if with_keys else ())):
        t.mul_(3).add_(1)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize("how", ["changed", "of_inference_mode"])
@pytest.mark.parametrize("name", ["targets", "predictions", "weights", "mask", "keys"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("n", [33, 700])
def test_all_but_features_are_kept_as_copies(n, reduction, backend, name, how):
    x, y, p = rows(n)
    x.requires_grad_()
    g = torch.Generator().manual_seed(0)
    call = dict(targets=y, predictions=p, weights=torch.rand(n, generator=g))
    if name in ("mask", "keys"):
        call |= dict(mask=torch.rand(n, generator=g) < 0.8)
        call |= dict(keys=(*rows(40, 1), torch.rand(40, generator=g) < 0.8))
    if how == "of_inference_mode":
        with torch.inference_mode():
            call[name] = (
                tuple(t.clone() for t in call[name]) if name == "keys" else call[name].clone()
            )
    options = dict(variant="released-age", reduction=reduction, backend=backend)
    loss = conr_loss(x, **call, **options).sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    if how == "changed":
        for t in call["keys"][1:] if name == "keys" else [call[name]]:
            t.fill_(1)
    assert expected.any() and torch.equal(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("variant", ["paper", "released-age", "released-depth"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_over_the_backward_pass_names_the_reference(n, with_keys, variant, reduction):
    x, y, p = rows(n)
    x.requires_grad_()
    keys = rows(40, 1) if with_keys else None
    loss = conr_loss(x, y, p, variant=variant, keys=keys, reduction=reduction)
    G = torch.randn(3, *loss.shape)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.autograd.grad(loss, x, G, is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.vmap(lambda g: torch.autograd.grad(loss, x, g, retain_graph=True))(G)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_meta_tensors_give_a_meta_loss_and_gradient(backend, reduction):
    assert available_backends("meta")["torch"] is None
    x, y = torch.empty(33, 7, device="meta", requires_grad=True), torch.empty(33, device="meta")
    loss = conr_loss(x, y, y, backend=backend, reduction=reduction)
    loss.sum().backward()
    assert loss.is_meta and x.grad.is_meta and loss.shape == (() if reduction == "mean" else (33,))


@pytest.mark.parametrize("device", ["cuda:77", "xpu", "nonsense", "meta", "cpu", ""])
def test_available_backends_answers_for_any_device(device):
    status = available_backends(device)
    assert list(status) == ["triton", "cuda", "torch", "reference"]
    assert all(reason is None or len(reason) > 20 for reason in status.values())
    if device not in ("cpu", "meta"):
        assert None not in status.values()


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_numpy_scalars_are_numbers(kind):
    x, y, p = rows(33)
    found = conr_loss(x, y, p, kind(2), window=kind(1), temperature=kind(1), push_scale=kind(3))
    assert torch.equal(found, conr_loss(x, y, p, 2, window=1, temperature=1, push_scale=3))
    assert torch.equal(
        density_weights(y, bin_width=kind(2), smoothing="laplace", sigma=kind(1)),
        density_weights(y, bin_width=2, smoothing="laplace", sigma=1),
    )


def test_a_tensor_is_no_number():
    x, y, p = rows(9)
    with pytest.raises(TypeError, match="temperature must be a Python number, got Tensor"):
        conr_loss(x, y, p, temperature=torch.tensor(0.1))


def test_negative_weights_and_push_scales_are_refused_with_the_value():
    x, y, p = rows(9)
    with pytest.raises(ValueError, match=r"weights must be ≥ 0, got -0\.5"):
        conr_loss(x, y, p, -0.5)
    with pytest.raises(ValueError, match=r"push_scale must be ≥ 0 .*got -0\.5 with"):
        conr_loss(x, y, p, push_scale=-0.5)
    assert conr_loss(x, y, p, push_scale=-0.5, variant="released-age").isfinite()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(preds=torch.ones(7)), "preds must have shape"),
        (dict(preds=torch.ones(8, 2)), "targets and preds must have"),
        (dict(w=-1), "w must be ≥ 0, got -1"),
        (dict(t=0), "t must be finite and > 0, got 0"),
        (dict(e=float("inf")), "e must be finite, got inf"),
    ],
)
def test_the_age_drop_in_speaks_of_its_own_arguments(change, text):
    good = dict(features=torch.ones(8, 2), targets=torch.ones(8), preds=torch.ones(8))
    with pytest.raises(ValueError, match=text):
        ConR(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "text"),
    [(dict(w=-1), "w must be ≥ 0"), (dict(e=-1), "e must be ≥ 0"), (dict(weights=-2), "weights")],
)
def test_the_depth_drop_in_speaks_of_its_own_arguments(change, text):
    good = dict(feature=torch.ones(8, 2), depth=torch.ones(8), output=torch.ones(8), weights=1)
    with pytest.raises(ValueError, match=text):
        ConR_depth(**{**good, **change})


def test_the_command_prints_on_a_console_without_its_letters(capsys):
    done = subprocess.run(
        [sys.executable, "-m", "conr_kernels"],
        env={"PYTHONIOENCODING": "ascii", "PATH": "", "PYTHONPATH": "."},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for option, text in (("--help", "self-test"), ("--version", "conr_kernels ")):
        with pytest.raises(SystemExit) as stopped:
            command.main([option])
        assert stopped.value.code == 0 and text in capsys.readouterr().out
