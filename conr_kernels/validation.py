"""Every check on user input. They run before any computation and read no tensor's values."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
FLOAT32_MAX = torch.finfo(torch.float32).max


def check_choice(name: str, value: object, legal: Iterable[str]) -> None:
    legal = list(legal)
    if not isinstance(value, str) or value not in legal:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, legal))}, got {value!r}")


def check_variant_combination(log: str, count_self: bool) -> None:
    if count_self and log == "outside":
        raise ValueError("count_self=True needs log='inside', got log='outside'")


def is_number(value: object) -> bool:
    """Real numbers of any type, those of numpy included; no tensors."""
    return isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool)


def check_number(name: str, value: Any) -> float:
    if not is_number(value):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        kind = type(value).__name__
        raise ValueError(f"{name} must be in a float's range, got {kind} beyond it") from None


def check_scalars(window: Any, temperature: Any, push_scale: Any) -> tuple[float, ...]:
    """The three as floats; a window beyond float32's range becomes infinite, which is the same."""
    window = check_number("window", window)
    temperature = check_number("temperature", temperature)
    push_scale = check_number("push_scale", push_scale)
    if math.isnan(window) or window < 0:
        raise ValueError(f"window must be ≥ 0, got {window}")
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    if temperature * FLOAT32_MAX < 1:
        raise ValueError(f"temperature must have an inverse in float32, got {temperature}")
    if not math.isfinite(push_scale):
        raise ValueError(f"push_scale must be finite, got {push_scale}")
    return math.inf if window > FLOAT32_MAX else window, temperature, push_scale


def check_push_scale(push_scale: float, pushing: str, phi: str) -> None:
    """A negative one would subtract from ``Z_i``, except in an exponent."""
    if push_scale < 0 and phi != "exponential":
        raise ValueError(
            "push_scale must be ≥ 0 unless pushing is 'exponential', "
            f"got {push_scale} with pushing={pushing!r}"
        )


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def kind_of(value: object) -> str:
    """The type of an argument that is no Tensor, and how to convert it."""
    if hasattr(value, "to_numpy"):  # a column or frame, whose rows PyTorch looks up by label
        return type(value).__name__ + " (use torch.tensor of its .to_numpy())"
    is_array = isinstance(value, (list, tuple)) or hasattr(value, "__array__")
    return type(value).__name__ + (" (use torch.as_tensor)" if is_array else "")


def check_dense(name: str, t: Tensor) -> None:
    if t.is_nested or t.layout != torch.strided:
        kind = "nested" if t.is_nested else str(t.layout)
        raise TypeError(f"{name} must be a dense (strided) Tensor, got a {kind} one")


def check_real(name: str, t: Any, expected: str = "a Tensor") -> None:
    """A dense Tensor of numbers that have an order."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be {expected}, got {kind_of(t)}")
    if t.dtype == torch.bool or t.dtype.is_complex:
        raise TypeError(f"{name} must have a floating or integer dtype, got {t.dtype}")
    check_dense(name, t)


def check_features(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor of floating dtype, got {kind_of(x)}")
    check_dense(name, x)
    if not x.dtype.is_floating_point or x.dtype.itemsize < 2:
        raise TypeError(
            f"{name} must have dtype float16, bfloat16, float32 or float64, got {x.dtype}"
        )
    if x.dim() != 2 or x.shape[1] == 0:
        of_map = " (of a map use .movedim(1, -1).flatten(0, -2): a row a pixel)"
        hint = of_map if x.dim() > 3 else ""
        raise ValueError(f"{name} must have shape (N, D) with D ≥ 1, got {tuple(x.shape)}{hint}")


def check_labels(name: str, y: Any, n_rows: int, rows_of: str) -> None:
    """Labels or predictions: a real Tensor [N], [N, 1] or [N, L]."""
    check_real(name, y, "a Tensor of real dtype")
    if y.dim() not in (1, 2) or y.shape[0] != n_rows or (y.dim() == 2 and y.shape[1] == 0):
        raise ValueError(
            f"{name} must have shape (N,), (N, 1) or (N, L) with N = {n_rows} as in {rows_of}, "
            f"got {tuple(y.shape)}"
        )


def n_components(y: Tensor) -> int:
    return 1 if y.dim() == 1 else y.shape[1]


def check_same_components(name_y: str, y: Tensor, name_p: str, p: Tensor) -> None:
    if n_components(y) != n_components(p):
        raise ValueError(
            f"{name_y} and {name_p} must have the same number of components, "
            f"got shapes {tuple(y.shape)} and {tuple(p.shape)}"
        )


def _is_column(t: Tensor, n_rows: int) -> bool:
    """[N] or [N, 1]; compared number by number, as torch.compile cannot compare symbolic shapes."""
    return t.dim() in (1, 2) and t.shape[0] == n_rows and t.shape[1:].numel() == 1


def check_weights(w: Any, n_rows: int, rows_of: str) -> None:
    if w is None:
        return
    if is_number(w):
        if -math.inf < check_number("weights", w) < 0:  # one that is not finite shows in the loss
            raise ValueError(f"weights must be ≥ 0, got {w}")
        return
    check_real("weights", w, "a Tensor, a number or None")
    if w.dim() != 0 and not _is_column(w, n_rows):
        raise ValueError(
            f"weights must have shape (N,), (N, 1) or () with N = {n_rows} as in {rows_of}, "
            f"got {tuple(w.shape)}"
        )


def check_devices(tensors: dict[str, Any]) -> None:
    devices = {name: t.device for name, t in tensors.items() if isinstance(t, Tensor)}
    # A 0-d weight on the CPU is a scalar, as everywhere in PyTorch.
    weight = tensors.get("weights")
    if isinstance(weight, Tensor) and weight.dim() == 0 and weight.device.type == "cpu":
        del devices["weights"]
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {listing}")


def check_key_features(key_x: Tensor, x: Tensor) -> None:
    if key_x.shape[1] != x.shape[1]:
        raise ValueError(
            f"keys[0] (features) must have D = {x.shape[1]} as features {tuple(x.shape)}, "
            f"got {tuple(key_x.shape)}"
        )
    if key_x.dtype != x.dtype:
        raise TypeError(
            f"keys[0] (features) must have features' dtype {x.dtype}, got {key_x.dtype}"
        )


def check_keys(keys: Any, y: Tensor) -> None:
    """``(features, targets, predictions[, mask])`` with as many label components as ``y``."""
    if not isinstance(keys, (tuple, list)) or len(keys) not in (3, 4):
        got = f"{len(keys)} items" if isinstance(keys, (tuple, list)) else type(keys).__name__
        expected = "a tuple (features, targets, predictions[, mask]) or a MemoryBank"
        raise TypeError(f"keys must be {expected}, got {got}")
    key_x, key_y, key_p, *masks = keys
    check_features("keys[0] (features)", key_x)
    check_labels("keys[1] (targets)", key_y, key_x.shape[0], "keys[0]")
    check_labels("keys[2] (predictions)", key_p, key_x.shape[0], "keys[0]")
    check_same_components("targets", y, "keys[1] (targets)", key_y)
    check_same_components("targets", y, "keys[2] (predictions)", key_p)
    for mask in masks:
        check_mask(mask, key_x.shape[0], "keys[0]", "keys[3] (mask)")


def check_bool(mask: Any, name: str = "mask") -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else kind_of(mask)
        raise TypeError(f"{name} must be a Tensor of dtype torch.bool, got {got}")
    check_dense(name, mask)


def check_mask(mask: Any, n_rows: int, rows_of: str, name: str = "mask") -> None:
    check_bool(mask, name)
    if not _is_column(mask, n_rows):
        raise ValueError(
            f"{name} must have shape (N,) or (N, 1) with N = {n_rows} as in {rows_of}, "
            f"got {tuple(mask.shape)}"
        )


def check_pixel_mask(mask: Any, **maps: Tensor) -> None:
    check_bool(mask)
    for name, t in maps.items():
        if mask.shape != t.shape:
            raise ValueError(
                f"mask must have the shape of {name} {tuple(t.shape)}, got {tuple(mask.shape)}"
            )


def check_tensors(
    features: Any, targets: Any, predictions: Any, weights: Any, keys: Any, mask: Any = None
) -> None:
    check_features("features", features)
    _check_batch("features", features, targets, predictions, weights, keys, mask)
    if keys is not None:
        check_key_features(keys[0], features)


def check_statistics(targets: Any, predictions: Any, weights: Any, keys: Any, mask: Any) -> None:
    check_rows("targets", dict(targets=targets))
    _check_batch("targets", targets, targets, predictions, weights, keys, mask)


def _check_batch(
    name: str, x: Tensor, targets: Any, predictions: Any, weights: Any, keys: Any, mask: Any
) -> None:
    """The arguments that loss and statistics share; ``name`` is that of ``x``, which is checked and
    has their rows.
    """
    n_rows, rows_of = x.shape[0], f"{name} {tuple(x.shape)}"
    check_labels("targets", targets, n_rows, rows_of)
    check_labels("predictions", predictions, n_rows, rows_of)
    check_same_components("targets", targets, "predictions", predictions)
    check_weights(weights, n_rows, rows_of)
    named = {name: x, "targets": targets, "predictions": predictions, "weights": weights}
    if keys is not None:
        check_keys(keys, targets)
        named |= {f"keys[{c}]": t for c, t in enumerate(keys)}
    if mask is not None:
        check_mask(mask, n_rows, rows_of)
        named["mask"] = mask
    check_devices(named)


def check_density(bin_width: Any, kernel_size: Any, sigma: Any) -> None:
    for name, value in (("bin_width", bin_width), ("sigma", sigma)):
        check_number(name, value)
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be finite and > 0, got {value}")
    check_counts(kernel_size=kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and ≥ 1, got {kernel_size}")


def check_rows(n_rows_of: str, named: dict[str, Any]) -> None:
    """Tensors of any rank ≥ 1 with one row per sample, as many as the one named ``n_rows_of``."""
    for name, t in named.items():
        check_real(name, t)
        if t.dim() == 0 or 0 in t.shape[1:]:
            raise ValueError(
                f"{name} must have shape (N, …) without an empty axis, got {tuple(t.shape)}"
            )
    n_rows = named[n_rows_of].shape[0]
    for name, t in named.items():
        if t.shape[0] != n_rows:
            raise ValueError(
                f"{name} must have N = {n_rows} rows as {n_rows_of} has, got shapes "
                f"{tuple(t.shape)} and {tuple(named[n_rows_of].shape)}"
            )


def check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, (int, numbers.Integral)):
            raise TypeError(f"{name} must be an int, got {type(count).__name__}")
        if count < 1:
            raise ValueError(f"{name} must be ≥ 1, got {count}")


def check_inputs(named: dict[str, Any]) -> int:
    """The number of rows of an encoder's inputs, which must all have the same."""
    for name, t in named.items():
        if not isinstance(t, Tensor) or t.dim() == 0:
            got = "a 0-d Tensor" if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name} must be a Tensor with rows, got {got}")
    sizes = {name: len(t) for name, t in named.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"the inputs must all have the same number of rows, got {sizes}")
    return next(iter(sizes.values()))


def check_encoded(features: Tensor, predictions: Tensor, n_rows: int) -> None:
    if len(features) != n_rows or len(predictions) != n_rows:
        raise ValueError(
            "the encoder must return features and predictions with one row for each of the "
            f"{n_rows} inputs, got {tuple(features.shape)} and {tuple(predictions.shape)}"
        )


def check_outputs(outputs: Any) -> None:
    """An encoder's outputs for one chunk."""
    if isinstance(outputs, (tuple, list)):
        got = f"{len(outputs)} of " + ", ".join(
            f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            for t in outputs
        )
        are_rows = len(outputs) == 2 and all(isinstance(t, Tensor) and t.dim() for t in outputs)
    else:
        got, are_rows = type(outputs).__name__, False
    if not are_rows:
        raise TypeError(
            "the encoder must return (features, predictions), two Tensors with rows, got " + got
        )


def check_value(value: Any) -> None:
    """The value that the loss of all rows returned."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"the loss must return a scalar Tensor, got {got}")
