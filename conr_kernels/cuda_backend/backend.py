"""ConR on the kernels of ``csrc/``: two sweeps over exact bands, or one over all pairs.

``setup.py`` builds the extension where nvcc and a CUDA build of PyTorch are there; nothing is
compiled here.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.inputs import Inputs, Keys
from ..variants import Settings

LIBRARY = "_conr_cuda.dll" if os.name == "nt" else "_conr_cuda.so"
#: Up to this many pairs one sweep over all of them is faster than two sorts.
DENSE_PAIRS = 1024 * 1024
#: Where the bands hold more than this share of all pairs, one sweep serves both masks.
DENSE_SHARE = 0.7

#: Bits of ``Flags`` in csrc/conr_math.cuh; ``_find_scalars`` has the others.
_PHI_FLAGS = {"one": 0, "distance": 128, "exponential": 256}


@functools.cache
def _load() -> str | None:
    """Loads the extension; returns None, or why it cannot be loaded."""
    path = Path(__file__).with_name(LIBRARY)
    if not path.exists():
        return "the package was installed without its CUDA extension"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the CUDA extension does not load ({error})"
    return None


def _operators() -> Any:
    return torch.ops.conr_kernels_cuda


def build_record() -> dict[str, Any]:
    """What ``setup.py`` noted: ``built``, ``why``, and ``abi`` and ``architectures`` of a build."""
    path = Path(__file__).with_name("_conr_cuda.json")
    if not path.exists():
        return {"built": False, "why": "not installed by setup.py"}
    return json.loads(path.read_text())


def describe() -> str:
    """The extension in one line: built or not and why, ABI target, architectures."""
    record = build_record()
    if not record["built"]:
        return f"extension not built ({record['why']})"
    problem = _load()
    state = "loaded" if problem is None else problem
    architectures = ", ".join(record["architectures"])
    return f"extension built for {architectures}, PyTorch stable ABI {record['abi']}; {state}"


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run there, and what to do; None where it can."""
    if device.type != "cuda":
        return (
            f'its kernels need CUDA tensors, these are on {device}; use backend="auto" or "torch"'
        )
    if torch.version.cuda is None:
        return 'this PyTorch is built without CUDA; install a CUDA build or use backend="torch"'
    problem = _load()
    if problem is None:
        return None
    why = build_record()["why"]
    return (
        f"{problem}{f' ({why})' if why else ''}; reinstall from source with nvcc on PATH by "
        '`pip install --no-build-isolation .`, or use backend="triton" or "torch"'
    )


def layout_size(inputs: Inputs) -> int:
    """The layout: what each sweep serves; then, for each, the keys' order, the anchors' numbers
    among the keys, and the bands.
    """
    N, K = inputs.x.shape[0], inputs.n_keys
    if inputs.settings.variant.negatives == "all" or N * K <= DENSE_PAIRS:
        return 0
    return 2 + 2 * (K + 3 * N)


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses [N], row statistics (rows.py) and the layout of the sweeps."""
    loss = inputs.x.new_empty(inputs.x.shape[0], dtype=inputs.dtype)
    return loss, *_forward(inputs, None, loss, None, 1.0)


def backward(inputs: Inputs, coef_i: Tensor, coef_j: Tensor | None, layout: Tensor) -> Tensor:
    """Gradient of the features [N, D] from the scaled statistics of anchors and keys."""
    coef = (coef_i if coef_j is None else coef_j).contiguous()
    return _backward(inputs, layout, coef, None, 1.0)


def reduces(
    x: Tensor, y: Tensor, further: Keys | None, settings: Settings, wants_gradient: bool
) -> bool:
    """Whether ``reduced`` serves these rows."""
    return further is None and x.shape[0] > 0


def reduced(
    inputs: Inputs, further: None, reduction: str, wants_gradient: bool
) -> tuple[Tensor, tuple[Tensor, ...], Any]:
    """The mean or sum of the row losses, and tensors and a plan for ``reduced_gradient``; the
    tensors include copies of labels and predictions, which the caller may overwrite.
    """
    x, y = inputs.x, inputs.y
    factor = 1 / x.shape[0] if reduction == "mean" else 1.0
    loss = x.new_empty((), dtype=inputs.dtype)
    labels = x.new_empty((2, *y.shape), dtype=torch.float32)
    stats, layout = _forward(inputs, labels, None, loss, factor)
    return loss, (labels, stats, layout), (inputs.settings, factor)


def reduced_gradient(x: Tensor, saved: tuple[Tensor, ...], plan: Any, upstream: Tensor) -> Tensor:
    """The gradient of the features for an upstream gradient of the reduced loss."""
    (labels, stats, layout), (settings, factor) = saved, plan
    inputs = Inputs(x, *labels.unbind(), None, None, 0, settings)
    return _backward(inputs, layout, stats, upstream, factor)


def _forward(
    inputs: Inputs, labels: Tensor | None, loss: Tensor | None, total: Tensor | None, factor: float
) -> tuple[Tensor, Tensor]:
    """Statistics and layout. Copies of labels and predictions, row losses, and the factor times
    their sum are written to the tensors that are given for them.
    """
    x, _, _, w, _, self_offset, settings, n_absent = inputs
    N, dtype = x.shape[0], inputs.dtype
    stats = x.new_empty((N, inputs.settings.n_statistics), dtype=dtype)
    layout = x.new_empty(layout_size(inputs), dtype=torch.int32)
    w = None if w is None else w.to(dtype).contiguous()
    n_absent = None if n_absent is None else n_absent.long()
    _operators().forward(
        *_keys(inputs), w, n_absent, self_offset, *_scalars(settings, _widens(x)), DENSE_SHARE,
        factor, layout, stats, labels, loss, total, _stream(x),
    )  # fmt: skip
    return stats, layout


def _backward(
    inputs: Inputs, layout: Tensor, coef: Tensor, upstream: Tensor | None, factor: float
) -> Tensor:
    """The gradient, from coefficients that lack the upstream gradient and the factor."""
    x = inputs.x
    gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
    _operators().backward(
        *_keys(inputs), inputs.self_offset, *_scalars(inputs.settings, _widens(x)), factor,
        layout, coef, upstream, gradient, _stream(x),
    )  # fmt: skip
    return gradient


def _keys(inputs: Inputs) -> Keys:
    """Features, labels and predictions of all keys, as kernels read them."""
    x, y, p = inputs.all_keys
    return x.contiguous(), y.float().contiguous(), p.float().contiguous()


def _stream(x: Tensor) -> int:
    """The address of the current stream of the tensor's device."""
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0


#: The kernels' scalars, by the identity of settings (an entry keeps them alive) and the widening.
_known: dict[tuple[int, bool], tuple[Settings, tuple[float, float, float, int]]] = {}
KNOWN = 64


def _scalars(settings: Settings, is_widened: bool) -> tuple[float, float, float, int]:
    found = _known.get((id(settings), is_widened))
    if found is None:
        if len(_known) >= KNOWN:
            _known.clear()
        found = _known[id(settings), is_widened] = (settings, _find_scalars(settings, is_widened))
    return found[1]


def _find_scalars(settings: Settings, is_widened: bool) -> tuple[float, float, float, int]:
    """Window, temperature, push scale and flags."""
    variant, pushing = settings.variant, settings.pushing
    flags = _PHI_FLAGS[pushing.phi]
    flags += 1 * (variant.log == "inside")
    flags += 2 * (variant.negatives == "all")
    flags += 4 * variant.unit_terms
    flags += 8 * variant.count_self
    flags += 16 * variant.weighted_rows
    flags += 32 * (settings.distance == "rmse")
    flags += 64 * (not settings.exponent_is_small)
    flags += 512 * pushing.is_weighted
    flags += 1024 * pushing.is_scaled
    flags += 2048 * is_widened
    return settings.window, settings.temperature, settings.push_scale, flags


def _widens(x: Tensor) -> bool:
    """Whether rows are converted to float32: before sm_80 there are no instructions for bfloat16
    matrix products.
    """
    return x.dtype == torch.bfloat16 and x.is_cuda and _capability(x.get_device()) < (8, 0)


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
