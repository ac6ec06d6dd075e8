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
from ..core.sweep import sort_reach
from ..reference import poison
from ..variants import Settings

LIBRARY = "_conr_cuda.dll" if os.name == "nt" else "_conr_cuda.so"
#: Up to this many pairs one sweep over all of them is faster than two sorts.
DENSE_PAIRS = 1024 * 1024
#: Where the bands hold more than this share of all pairs, one sweep serves both masks.
DENSE_SHARE = 0.7
#: Columns of the kernels' copy of the features are a multiple of this: loads of 16 bytes.
COLUMNS = 8

_FLAGS = dict(
    inside=1,
    all_negatives=2,
    unit_terms=4,
    count_self=8,
    weighted_rows=16,
    rmse=32,
    shifted=64,
    phi_is_distance=128,
    phi_is_exponential=256,
    rate_is_weighted=512,
    rate_is_scaled=1024,
)
_PUSHING = {
    "linear": ("phi_is_distance", "rate_is_weighted", "rate_is_scaled"),
    "exponential": ("phi_is_exponential", "rate_is_weighted"),
    "weight": ("rate_is_weighted", "rate_is_scaled"),
    "distance": ("phi_is_distance", "rate_is_scaled"),
    "none": (),
}


@functools.cache
def _load() -> str | None:
    """Loads the extension; None, or why it could not be."""
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


def layout_size(n_anchors: int, n_keys: int, dtype: torch.dtype, settings: Settings) -> int:
    """What each sweep serves; then for each the keys' order, the anchors' key ids, the bands."""
    if settings.variant.negatives == "all" or n_anchors * n_keys <= DENSE_PAIRS:
        return 0
    return 2 + 2 * (n_keys + 3 * n_anchors)


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses [N], row statistics (rows.py) and the layout of the sweeps."""
    x, y, p, w, keys, self_offset, settings, n_absent = inputs
    N = len(x)
    x_j, y_j, p_j = inputs.all_keys
    q, scale, norm = _prepare(x_j)
    y, p, y_j, p_j = (t.float().contiguous() for t in (y, p, y_j, p_j))
    dtype = scale.dtype
    layout = _layout(y, p, y_j, p_j, keys is None, self_offset, settings)
    loss, stats = scale.new_empty(N), scale.new_empty(N, inputs.columns)
    sums, counts = scale.new_empty(N, 5), layout.new_empty(N, 2)
    absent = scale.new_zeros(()) if n_absent is None else n_absent.to(dtype)
    finite = torch.stack([poison(norm, y_j, p_j, w).to(dtype), absent])
    _operators().forward(
        q, scale, y_j, p_j, None if w is None else w.to(dtype).contiguous(), finite, layout,
        self_offset, *_scalars(settings), sums, counts, loss, stats, _stream(x.device),
    )  # fmt: skip
    return loss, stats, layout


def backward(inputs: Inputs, coef_i: Tensor, coef_j: Tensor | None, layout: Tensor) -> Tensor:
    """Gradient of the features [N, D] from the scaled statistics of anchors and keys."""
    x, self_offset, settings = inputs.x, inputs.self_offset, inputs.settings
    x_j, y_j, p_j = inputs.all_keys
    q, scale, norm = _prepare(x_j)
    y_j, p_j = y_j.float().contiguous(), p_j.float().contiguous()
    coef_i = coef_i.contiguous()
    coef_j = coef_i if coef_j is None else coef_j.contiguous()
    G = scale.new_zeros(len(x), q.shape[1])
    stream = _stream(x.device)
    _operators().backward(
        q, scale, y_j, p_j, coef_j, layout, self_offset, *_scalars(settings), G, stream
    )
    x = x.contiguous()
    gradient = torch.empty_like(x)
    norm_i = norm[self_offset : self_offset + len(x)]
    _operators().finish_gradient(x, norm_i, G, coef_i, settings.temperature, gradient, stream)
    return gradient


def reduces(
    x: Tensor, y: Tensor, further: Keys | None, settings: Settings, wants_gradient: bool
) -> bool:
    """Whether one call gives the reduced loss: its kernels leave row losses."""
    return False


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _scalars(settings: Settings) -> tuple[float, float, float, int]:
    variant = settings.variant
    names = [*_PUSHING[variant.pushing]]
    names += ["inside"] if variant.log == "inside" else []
    names += ["all_negatives"] if variant.negatives == "all" else []
    names += ["rmse"] if settings.distance == "rmse" else []
    names += [] if settings.exponent_is_small else ["shifted"]
    names += [n for n in ("unit_terms", "count_self", "weighted_rows") if getattr(variant, n)]
    flags = sum(_FLAGS[name] for name in names)
    return settings.window, settings.temperature, settings.push_scale, flags


def _computes_in_float32(x: Tensor) -> bool:
    """bfloat16 has no matrix instruction before sm_80."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cuda"
        and torch.cuda.get_device_capability(x.device) < (8, 0)
    )


def _prepare(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' rows ``q`` [K, D rounded up]; ``scale`` and ``‖x‖`` [K]: ``q·scale = x/‖x‖``."""
    K, D = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    q_dtype = torch.float32 if _computes_in_float32(x) else x.dtype
    q = x.new_empty(K, -(-D // COLUMNS) * COLUMNS, dtype=q_dtype)
    scale, norm = x.new_empty(K, dtype=dtype), x.new_empty(K, dtype=dtype)
    _operators().prepare(x.contiguous(), q, scale, norm, _stream(x.device))
    return q, scale, norm


def _layout(
    y_i: Tensor,
    p_i: Tensor,
    y_j: Tensor,
    p_j: Tensor,
    is_symmetric: bool,
    self_offset: int,
    settings: Settings,
) -> Tensor:
    N, K = len(y_i), len(y_j)
    layout = y_i.new_empty(layout_size(N, K, y_i.dtype, settings), dtype=torch.int32)
    if len(layout) == 0:
        return layout
    n_pairs: Tensor | int = 0
    sections = layout[2:].view(2, K + 3 * N)
    for section, t_i, t_j in ((sections[0], y_i, y_j), (sections[1], p_i, p_j)):
        key_ids, anchor_ids, lo, hi = section.split([K, N, N, N])
        component, reach = sort_reach(t_j, settings.window, settings.distance)
        sorted_j, order = t_j.index_select(1, component)[:, 0].sort(stable=True)
        key_ids.copy_(order)
        if is_symmetric:
            sorted_i = sorted_j
        else:
            sorted_i, order = t_i.index_select(1, component)[:, 0].sort(stable=True)
        anchor_ids.copy_(order + self_offset)
        _operators().bands(sorted_i, sorted_j, reach, lo, hi, _stream(y_i.device))
        n_pairs = n_pairs + (hi - lo).sum()
    # What the two sweeps serve (csrc: 1 positives, 2 negatives): 1 and 2, or 3 and nothing.
    is_dense = (n_pairs > DENSE_SHARE * N * K).to(torch.int32)
    layout[:2] = torch.stack([1 + 2 * is_dense, 2 - 2 * is_dense])
    return layout
