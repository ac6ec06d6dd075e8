"""Bad input, row by row of the contract: one type and one message on every backend, before any
work.
"""

import inspect
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from conr_kernels import ConRLoss, Variant, available_backends, conr_loss
from conr_kernels import batch as batches
from conr_kernels.variants import PRESETS

BACKENDS = ("torch", "reference", "auto")
N, D = 5, 3
nan, inf = math.nan, math.inf
ones = torch.ones


def rows(n: int = N) -> torch.Tensor:
    return torch.arange(1.0, n + 1)


def arguments(**changed) -> dict:
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    return dict(features=x, targets=rows(), predictions=rows(), weights=rows()) | changed


def keys(x=None, y=None, p=None) -> dict:
    given = (x, y, p)
    legal = (ones(2, D), rows(2), rows(2))
    return dict(keys=tuple(t if u is None else u for t, u in zip(legal, given, strict=True)))


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([ones(D), ones(D)], layout=layout)


class Column:  # as of pandas
    def to_numpy(self) -> np.ndarray:
        return np.ones(N)

    __array__ = to_numpy


TENSORS = tuple(arguments())
LABELS = ("targets", "predictions")
LABEL_SHAPES = ((N + 1,), (1,), (1, N), (N, 0), (N, 1, 1), ())
UNREAL = (torch.bool, torch.complex64)
LEGAL_VARIANTS = ", ".join(map(repr, PRESETS))

TYPE_ERRORS = [
    (dict(features=[[1.0]]), "features must be a Tensor of floating dtype, got list"),
    *(
        ({name: np.ones(N)}, f"{name} must be …, got ndarray (use torch.as_tensor)")
        for name in (*TENSORS, "mask")
    ),
    (dict(targets=[1.0] * N), "got list (use torch.as_tensor)"),
    *(
        ({name: Column()}, f"{name} must be …, got Column (use torch.tensor of its .to_numpy())")
        for name in (*TENSORS, "mask")
    ),
    (dict(features=None), "features must be a Tensor of floating dtype, got NoneType"),
    (dict(targets=[1.0] * N), "targets must be a Tensor of real dtype, got list"),
    (dict(predictions=3.0), "predictions must be a Tensor of real dtype, got float"),
    (dict(weights=[1.0] * N), "weights must be a Tensor, a number or None, got list"),
    (dict(weights=True), "weights must be a Tensor, a number or None, got bool"),
    (dict(mask=[True] * N), "mask must be a Tensor of dtype torch.bool, got list"),
    (dict(mask=ones(N)), "mask must be a Tensor of dtype torch.bool, got torch.float32"),
    (
        dict(keys=3),
        "keys must be a tuple (features, targets, predictions[, mask]) or a MemoryBank, got int",
    ),
    (
        dict(keys=()),
        "keys must be a tuple (features, targets, predictions[, mask]) or a MemoryBank, got 0",
    ),
    *(
        (dict(keys=module), f"keys must be a tuple … or a MemoryBank, got {kind}")
        for module, kind in ((nn.Linear(2, 2), "Linear"), (nn.ModuleDict(), "ModuleDict"))
    ),
    *(
        (dict(group=group), f"group must be 'world', a ProcessGroup or None, got {kind}")
        for group, kind in ((3, "int"), (True, "bool"), (object(), "object"))
    ),
    *(
        (dict(features=ones(N, D, dtype=dtype)), f"features must have dtype float16, … got {dtype}")
        for dtype in (torch.int64, *UNREAL, torch.float8_e4m3fn)
    ),
    *(
        ({name: ones(N, dtype=dtype)}, f"{name} must have a floating or integer dtype, got {dtype}")
        for name in ("targets", "predictions", "weights")
        for dtype in UNREAL
    ),
    (keys(x=ones(2, D, dtype=torch.float64)), "keys[0] … torch.float32, got torch.float64"),
    (
        dict(keys=(*keys()["keys"], ones(2))),
        "keys[3] (mask) must be … torch.bool, got torch.float32",
    ),
    (keys(y=ones(2, dtype=torch.bool)), "keys[1] (targets) must have … dtype, got torch.bool"),
    *(
        ({name: t.to_sparse()}, f"{name} must be a dense (strided) Tensor, got a torch.sparse_coo")
        for name, t in arguments().items()
    ),
    *(
        ({name: nested(layout)}, f"{name} must be a dense (strided) Tensor, got a nes")
        for name in TENSORS
        for layout in (torch.jagged, torch.strided)
    ),
    *(
        ({name: value}, f"{name} must be a Python number, got {kind}")
        for name in ("temperature", "window", "push_scale")
        for value, kind in [("1", "str"), (None, "NoneType"), (True, "bool"), (ones(()), "Tensor")]
    ),
]
VALUE_ERRORS = [
    *(
        (dict(features=ones(shape)), f"features must have shape (N, D) with D ≥ 1, got {shape}")
        for shape in ((N,), (N, D, 1), (N, 0), (0, 0), ())
    ),
    (
        dict(features=ones(N, D, 2, 2)),
        "got (5, 3, 2, 2) (of a map use .movedim(1, -1).flatten(0, -2): a row a pixel)",
    ),
    *(
        ({name: ones(shape)}, f"{name} must have shape (N,), … features (5, 3), got {shape}")
        for name in LABELS
        for shape in LABEL_SHAPES
    ),
    *(
        (dict(weights=ones(shape)), f"weights must have shape (N,), … (5, 3), got {shape}")
        for shape in ((N - 1,), (1,), (N, 2), (1, N))
    ),
    (
        dict(targets=ones(N, 2), predictions=ones(N, 3)),
        "targets and predictions must have the same … got shapes (5, 2) and (5, 3)",
    ),
    (dict(targets=ones(N, 2)), "targets and predictions … got shapes (5, 2) and (5,)"),
    *(
        (dict(mask=ones(shape).bool()), f"mask must have shape (N,) or (N, 1) … 5 … got {shape}")
        for shape in ((N - 1,), (1,), (N, 2), (1, N))
    ),
    (dict(mask=ones(N, device="meta").bool()), "one device, got features on cpu, … mask on meta"),
    (keys(x=ones(2, D + 1)), "keys[0] … must have D = 3 as features (5, 3), got (2, 4)"),
    (keys(y=rows(3)), "keys[1] (targets) must have … N = 2 as in keys[0], got (3,)"),
    (
        dict(keys=(*keys()["keys"], ones(3) > 0)),
        "keys[3] (mask) must … N = 2 as in keys[0], got (3,)",
    ),
    (keys(p=ones(2, 2)), "targets and keys[2] (predictions) … got shapes (5,) and (2, 2)"),
    *(
        ({name: t.to("meta")}, f"all tensors must be on one device, got …{name} on meta")
        for name, t in arguments().items()
    ),
    (dict(weights=ones((), device="meta")), "one device, got features on cpu, … weights on meta"),
    (keys(p=rows(2).to("meta")), "one device, got features on cpu, … keys[2] on meta"),
    *(
        (dict(temperature=value), f"temperature must be finite and > 0, got {value}")
        for value in (0.0, -0.1, nan, inf, -inf)
    ),
    *(
        (dict(temperature=value), f"temperature must have an inverse in float32, got {value}")
        for value in (1e-40, 2.9e-39, 5e-324)
    ),
    *(
        ({name: value}, f"{name} must be in a float's range, got {kind} beyond it")
        for name in ("window", "temperature", "push_scale", "weights")
        for value, kind in ((10**400, "int"), (Fraction(-(10**400)), "Fraction"))
    ),
    *((dict(window=value), f"window must be ≥ 0, got {value}") for value in (-1.0, nan, -inf)),
    *(
        (dict(push_scale=value), f"push_scale must be finite, got {value}")
        for value in (nan, inf, -inf)
    ),
    *(
        (
            dict(push_scale=-0.5, variant=variant),
            f"push_scale must be ≥ 0 unless … 'exponential', got -0.5 with pushing={pushing!r}",
        )
        for variant, pushing in (
            ("paper", "linear"),
            ("no-weight", "distance"),
            ("no-similarity", "weight"),
            ("no-pushing", "none"),
            (Variant("inside", unit_terms=True), "linear"),
        )
    ),
    (dict(reduction="avg"), "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    (dict(reduction=None), "reduction must be one of 'mean', 'sum', 'none', got None"),
    (dict(distance="l2"), "distance must be one of 'mae', 'rmse', got 'l2'"),
    (dict(variant="Paper"), f"variant must be one of {LEGAL_VARIANTS}, got 'Paper'"),
    (dict(variant=3), f"variant must be one of {LEGAL_VARIANTS}, got 3"),
]


@pytest.mark.parametrize(
    ("error", "changed", "message"),
    [(TypeError, *case) for case in TYPE_ERRORS] + [(ValueError, *case) for case in VALUE_ERRORS],
)
def test_bad_input_is_refused_alike_on_every_backend_before_any_computation(
    monkeypatch, error, changed, message
):
    def computes(*_):
        raise AssertionError("computed before it refused")

    for backend in BACKENDS:  # what has passed is remembered, and is not this
        conr_loss(**arguments(), backend=backend)
    for work in ("row_losses", "as_labels", "as_weights"):
        monkeypatch.setattr(batches, work, computes)
    messages = set()
    for backend in BACKENDS:
        with pytest.raises(error, match=gist(message)) as caught:
            conr_loss(**arguments(**changed), backend=backend)
        assert type(caught.value) is error
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_a_bool_is_refused_behind_the_number_that_it_equals():
    """Checked settings are remembered, and True is 1 to a dictionary."""
    for name in ("temperature", "window", "push_scale"):
        conr_loss(**arguments(**{name: 1}))
        with pytest.raises(TypeError, match=f"{name} must be a Python number, got bool"):
            conr_loss(**arguments(**{name: True}))


@pytest.mark.parametrize("weight", [-1.0, np.float64(-1)], ids=repr)
def test_a_negative_weight_is_refused_behind_a_positive_one(weight):
    """Input of the same form has passed before."""
    for legal in (1, -inf):
        conr_loss(**arguments(weights=type(weight)(legal)))
        with pytest.raises(ValueError, match="weights must be ≥ 0, got -1"):
            conr_loss(**arguments(weights=weight))


def test_a_weight_too_large_is_refused_behind_a_small_one():
    conr_loss(**arguments(weights=1))
    with pytest.raises(ValueError, match="weights must be in a float's range, got int"):
        conr_loss(**arguments(weights=10**400))


def gist(message: str) -> str:
    """A pattern for the message, in which ``…`` stands for any text."""
    return ".*".join(map(re.escape, message.split("…")))


def test_a_negative_push_scale_is_for_exponential_pushing():
    for backend in BACKENDS:
        loss = conr_loss(
            **arguments(predictions=torch.zeros(N)), window=1, push_scale=-0.5,
            variant="released-age", backend=backend,
        )  # fmt: skip
        assert loss.isfinite() and loss > 0
    with pytest.raises(ValueError, match="push_scale must be ≥ 0 unless .* got -1"):
        ConRLoss(push_scale=-1)
    assert ConRLoss(push_scale=-1, variant="released-age").push_scale == -1


def test_an_unknown_backend_lists_the_legal_ones():
    legal = "backend must be one of 'auto', 'triton', 'cuda', 'torch', 'reference', got 'numpy'"
    with pytest.raises(ValueError, match=legal):
        conr_loss(**arguments(), backend="numpy")
    with pytest.raises(ValueError, match=legal):
        ConRLoss(backend="numpy")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_an_explicit_backend_that_cannot_run_says_why_and_what_to_do(backend):
    reason = available_backends("cpu")[backend]
    if reason is None:
        pytest.skip(f"the {backend} backend runs on the CPU here")
    with pytest.raises(RuntimeError) as caught:
        conr_loss(**arguments(), backend=backend)
    message = str(caught.value)
    assert f'backend="{backend}" cannot run here' in message and reason in message
    assert '"torch"' in message or '"auto"' in message


def test_auto_runs_where_explicit_backends_cannot():
    status = available_backends("cpu")
    assert list(status) == ["triton", "cuda", "torch", "reference"]
    assert status["torch"] is None and status["reference"] is None
    x = arguments()
    assert torch.equal(conr_loss(**x, backend="auto"), conr_loss(**x, backend="torch"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_without_a_process_group_names_init_process_group(backend):
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        pytest.skip("a process group is initialised in this process")
    with pytest.raises(RuntimeError, match="init_process_group"):
        conr_loss(**arguments(), group=torch.distributed.ProcessGroup(0, 1), backend=backend)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(count_self=True), "count_self=True needs log='inside', got log='outside'"),
        (dict(log="both"), "log must be one of 'outside', 'inside', got 'both'"),
        (
            dict(pushing="x"),
            "one of 'linear', 'exponential', 'weight', 'distance', 'none', got 'x'",
        ),
        (dict(negatives="some"), "negatives must be one of 'confused', 'all', got 'some'"),
    ],
)
def test_an_unsupported_variant_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Variant(**fields)


@pytest.mark.parametrize("name", ["unit_terms", "count_self", "weighted_rows"])
@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_flag_of_a_variant_is_a_bool(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a bool, got {type(value).__name__}"):
        Variant(log="inside", **{name: value})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(temperature=0.0), ValueError, "temperature must be finite and > 0, got 0.0"),
        (dict(window=-1), ValueError, "window must be ≥ 0, got -1"),
        (dict(push_scale=nan), ValueError, "push_scale must be finite, got nan"),
        (dict(window="1"), TypeError, "window must be a Python number, got str"),
        (dict(variant="new"), ValueError, "variant must be one of 'paper'"),
        (dict(distance="max"), ValueError, "distance must be one of"),
        (dict(reduction="median"), ValueError, "reduction must be one of"),
    ],
)
def test_the_module_refuses_bad_settings_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        ConRLoss(**options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["paper", "released-age", "released-depth", "contrastive"])
@pytest.mark.parametrize("window", [inf, 1e39, 10**40])
def test_an_infinite_window_has_no_negatives_and_loses_nothing(backend, variant, window):
    for n in (N, 40):
        x = torch.randn(n, D).requires_grad_()
        p = rows(n).flip(0)
        loss = conr_loss(x, rows(n), p, window=window, variant=variant, backend=backend)
        loss.backward()
        assert loss.item() == 0 and not x.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_as_weights_is_what_a_tensor_of_it_is(backend):
    """Beyond the features' dtype it is infinite, and shows."""
    for dtype in (torch.float32, torch.float64):
        given = arguments(predictions=torch.zeros(N), variant="released-age", backend=backend)
        given["features"] = given["features"].to(dtype)
        as_number = conr_loss(**given | dict(weights=1e39))
        as_tensor = conr_loss(**given | dict(weights=torch.tensor(1e39, dtype=torch.float64)))
        assert torch.equal(as_number, as_tensor) or as_number.isnan() and as_tensor.isnan()
        assert as_number.isfinite() == (dtype == torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_unchanged_after_an_error(backend):
    given = arguments(predictions=rows(N + 1))
    copies = {name: (t, t.clone(), t._version) for name, t in given.items()}
    with pytest.raises(ValueError, match="predictions"):
        conr_loss(**given, backend=backend)
    for t, copy, version in copies.values():
        assert torch.equal(t, copy) and t._version == version


def test_defaults_and_order_of_the_arguments():
    expected = dict(
        window=1.0, temperature=0.2, push_scale=0.01, variant="paper", distance="mae",
        reduction="mean", backend="auto",
    )  # fmt: skip
    parameters = inspect.signature(conr_loss).parameters
    assert list(parameters)[:4] == ["features", "targets", "predictions", "weights"]
    assert parameters["weights"].default is None
    assert parameters["keys"].default is None and parameters["group"].default is None
    for function in (conr_loss, ConRLoss):
        parameters = inspect.signature(function).parameters
        for name, default in expected.items():
            assert parameters[name].default == default
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "a", "b", "window", "are_similar"),
    [
        (torch.float64, 0.1 + 0.2, 0.0, 0.3, False),
        (torch.float32, 0.1 + 0.2, 0.0, 0.3, True),
        (torch.float16, 1000.5, 0.1, 1000.3, False),  # of float16 both are 1000.5
    ],
)
def test_labels_are_compared_in_float32_or_in_their_float64(
    dtype, a, b, window, are_similar, backend
):
    y = torch.tensor([a, b, 9999.0], dtype=dtype)
    loss = conr_loss(torch.eye(3), y, 0 * y, window=window, backend=backend)
    assert (loss > 0) == are_similar


def test_labels_of_float64_are_accepted_beside_features_of_float32():
    given = arguments()
    wide = given | {name: given[name].double() for name in ("targets", "predictions", "weights")}
    for backend in BACKENDS:
        loss = conr_loss(**wide, backend=backend)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, conr_loss(**given, backend=backend))
