"""Writes golden.json: row losses and gradients of small batches for every preset, from the equation
in 50 digits. Run as ``python -m tests.golden.make_golden``; knows nothing of the package. Symbols
and derivation: conr_kernels/MATHEMATICS.md.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mpmath import exp, fdot, fsum, log, mpf, sqrt, workdps

PATH = Path(__file__).with_name("golden.json")
DIGITS = 50

#: log, pushing, negatives, unit_terms, count_self, weighted_rows.
PRESETS = {
    "paper": ("outside", "linear", "confused", False, False, False),
    "released-age": ("inside", "exponential", "confused", True, False, True),
    "released-depth": ("inside", "linear", "confused", True, True, False),
    "no-pushing": ("outside", "none", "confused", False, False, False),
    "no-weight": ("outside", "distance", "confused", False, False, False),
    "no-similarity": ("outside", "weight", "confused", False, False, False),
    "contrastive": ("outside", "none", "all", False, False, False),
}

#: N, D, L, temperature, window, push_scale, distance, places of the labels' grid, what is special.
BATCHES = (
    (7, 2, 1, 1.0, 0.5, 0.01, "mae", 4, ""),
    (8, 3, 1, 0.2, 0.5, 0.2, "mae", 4, "zero rows"),
    (7, 2, 1, 0.07, 0.5, 1.0, "mae", 5, "zero weights"),
    (8, 4, 1, 0.02, 0.0, 0.01, "mae", 3, ""),
    (9, 5, 1, 0.005, 1.0, 0.01, "mae", 6, "alone"),
    (12, 3, 1, 0.2, 2.0, 0.05, "mae", 12, "alone"),
    (10, 2, 2, 0.2, 0.5, 0.01, "mae", 4, "zero rows"),
    (11, 5, 2, 0.07, 0.75, 0.2, "mae", 4, "zero weights"),
    (12, 4, 2, 0.5, 1.0, 0.5, "rmse", 5, "alone"),
    (11, 3, 2, 0.01, 0.5, 0.01, "rmse", 3, "zero weights"),
    (5, 2, 1, 0.1, 9.0, 0.01, "mae", 4, ""),
    (12, 5, 2, 0.005, 0.5, 1.0, "rmse", 3, "zero rows"),
)


class Row(NamedTuple):
    """What the gradient needs of a row: ``E_i``, ``Z_i``, ``r_i``, ``n_i``, ``c_i``, its sets."""

    E: mpf
    Z: mpf
    r: mpf
    n: int
    c: int
    positives: list[int]
    negatives: list[int]


def make_batch(seed: int) -> dict:
    """The inputs as hexadecimal floats, all of them numbers that float32 holds."""
    N, D, L, temperature, window, push_scale, distance, places, special = BATCHES[seed]
    r = random.Random(seed)
    x = [[_float32(r.gauss(0, 2)) for _ in range(D)] for _ in range(N)]
    y = [[r.randrange(places) / 2 for _ in range(L)] for _ in range(N)]
    p = [[c + r.randrange(-2, 3) / 2 for c in row] for row in y]
    w = [_float32(r.uniform(0.1, 2)) for _ in range(N)]
    g = [_float32(r.gauss(0, 1)) for _ in range(N)]
    if special == "zero rows":
        x[0] = x[N // 2] = [0.0] * D
    if special == "zero weights":
        w[::2] = [0.0] * len(w[::2])
    if special == "alone":  # a row without positives, and one without negatives
        y[-1] = p[-1] = [100.0] * L
        p[0] = [-100.0] * L
    numbers = dict(x=x, y=y, p=p, w=w, g=g)
    scalars = dict(temperature=temperature, window=window, push_scale=push_scale)
    return to_hex(numbers | scalars) | {"distance": distance}


def golden(batch: dict, preset: str) -> dict:
    """Row losses [N] and the gradient [N, D] for the upstream gradient g, as hexadecimal floats.

    Raises:
        ArithmeticError: the gradient is not the derivative of the row losses.
    """
    with workdps(DIGITS + 10):
        b = from_hex(batch)
        rows, states = row_losses(b, preset)
        gradient = row_gradient(b, preset, states)
        _check_derivative(b, preset, gradient)
        result = {"rows": rows, "gradient": gradient}
    return to_hex(result)


def unit_rows(x: list[list[mpf]]) -> list[list[mpf]]:
    norms = [sqrt(fdot(row, row)) for row in x]
    return [[c / norm if norm else mpf(0) for c in row] for row, norm in zip(x, norms, strict=True)]


def distance_of(u: list[mpf], v: list[mpf], distance: str) -> mpf:
    gaps = [abs(a - b) for a, b in zip(u, v, strict=True)]
    if distance == "mae":
        return fsum(gaps) / len(gaps)
    return sqrt(fdot(gaps, gaps) / len(gaps))


def phi(d: mpf, push_scale: mpf, pushing: str) -> mpf:
    """The pair's part of ``S_ij = r_i φ(d_ij)``."""
    if pushing == "exponential":
        return exp(push_scale * d)
    return d if pushing in ("linear", "distance") else mpf(1)


def rate(w_i: mpf, push_scale: mpf, pushing: str) -> mpf:
    """The anchor's part ``r_i`` of ``S_ij = r_i φ(d_ij)``."""
    return {
        "linear": push_scale * w_i,
        "exponential": w_i,
        "weight": push_scale * w_i,
        "distance": push_scale,
        "none": mpf(1),
    }[pushing]


def similarity(q: list[list[mpf]], b: dict) -> Callable[[int, int], mpf]:
    return lambda i, j: fdot(q[i], q[j]) / b["temperature"]


def row_losses(b: dict, preset: str) -> tuple[list[mpf], list[Row | None]]:
    """``ℓ_i``, and the rows that are anchors, None for the others."""
    where, pushing, negatives_are, unit_terms, count_self, weighted_rows = PRESETS[preset]
    N, h, e = len(b["x"]), b["window"], b["push_scale"]
    s = similarity(unit_rows(b["x"]), b)
    losses, states = [], []
    for i in range(N):
        d = [distance_of(b["y"][i], b["y"][j], b["distance"]) for j in range(N)]
        delta = [distance_of(b["p"][i], b["p"][j], b["distance"]) for j in range(N)]
        P = [j for j in range(N) if j != i and d[j] <= h]
        M = [j for j in range(N) if d[j] > h and (negatives_are == "all" or delta[j] <= h)]
        if not P or not M:
            losses.append(mpf(0))
            states.append(None)
            continue
        n_i, r_i = len(P), rate(b["w"][i], e, pushing)
        E_i = fsum(exp(s(i, j)) for j in P)
        Z_i = E_i + fsum(r_i * phi(d[j], e, pushing) * exp(s(i, j)) for j in M)
        Z_i += N - n_i if unit_terms else 0
        c_i = n_i + count_self
        if where == "outside":
            loss = -log(E_i / n_i / Z_i)
        else:
            loss = fsum(log(Z_i) - s(i, j) for j in P) / c_i
        losses.append(loss * b["w"][i] if weighted_rows else loss)
        states.append(Row(E_i, Z_i, r_i, n_i, c_i, P, M))
    return losses, states


def row_gradient(b: dict, preset: str, states: list[Row | None]) -> list[list[mpf]]:
    """``∂(Σ_i g_i ℓ_i)/∂x``."""
    where, pushing, *_, weighted_rows = PRESETS[preset]
    N, D, e, tau = len(b["x"]), len(b["x"][0]), b["push_scale"], b["temperature"]
    q = unit_rows(b["x"])
    s = similarity(q, b)
    H = [[mpf(0)] * N for _ in range(N)]
    for i, row in enumerate(states):
        if row is None:
            continue
        g_i = b["g"][i] * (b["w"][i] if weighted_rows else 1)
        if where == "outside":
            alpha, beta = -g_i * (row.Z - row.E) / (row.Z * row.E), mpf(0)
            gamma = g_i * row.r / row.Z
        else:
            alpha, beta = g_i * row.n / row.c / row.Z, g_i / row.c
            gamma = alpha * row.r
        for j in row.positives:
            H[i][j] += exp(s(i, j)) * alpha - beta
        for j in row.negatives:
            d_ij = distance_of(b["y"][i], b["y"][j], b["distance"])
            H[i][j] += phi(d_ij, e, pushing) * exp(s(i, j)) * gamma
    gradient = []
    for i in range(N):
        of_q = [fsum((H[i][j] + H[j][i]) * q[j][c] for j in range(N)) / tau for c in range(D)]
        radial = fdot(q[i], of_q)
        norm = sqrt(fdot(b["x"][i], b["x"][i]))
        gradient.append([(of_q[c] - q[i][c] * radial) / norm if norm else mpf(0) for c in range(D)])
    return gradient


def _check_derivative(b: dict, preset: str, gradient: list[list[mpf]]) -> None:
    """Central differences in one direction that has a part in every number of x but zero rows."""
    step, r = mpf(10) ** -18, random.Random(0)
    direction = [[mpf(r.gauss(0, 1)) if any(row) else mpf(0) for _ in row] for row in b["x"]]

    def loss_at(t: mpf) -> mpf:
        moved = [
            [c + t * v for c, v in zip(*rows, strict=True)]
            for rows in zip(b["x"], direction, strict=True)
        ]
        return fdot(b["g"], row_losses(b | {"x": moved}, preset)[0])

    expected = (loss_at(step) - loss_at(-step)) / (2 * step)
    actual = fsum(map(fdot, gradient, direction))
    if abs(actual - expected) > mpf(10) ** -24:
        raise ArithmeticError(f"{preset}: gradient along a direction {actual}, not {expected}")


def to_hex(value):
    """Every number in a structure of lists and dictionaries as the nearest hexadecimal float."""
    if isinstance(value, dict):
        return {key: to_hex(part) for key, part in value.items()}
    if isinstance(value, list):
        return [to_hex(part) for part in value]
    return float(value).hex()


def from_hex(value, key: str = "", number: Callable = mpf):
    """The reverse, in numbers of a kind; the distance is a name."""
    if isinstance(value, dict):
        return {key: from_hex(part, key, number) for key, part in value.items()}
    if isinstance(value, list):
        return [from_hex(part, key, number) for part in value]
    return value if key == "distance" else number(float.fromhex(value))


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def main() -> None:
    cases = []
    for seed in range(len(BATCHES)):
        batch = make_batch(seed)
        case = {"batch": batch} | {preset: golden(batch, preset) for preset in PRESETS}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in case.items()]
        cases.append("{" + ",\n".join(lines) + "}")
    PATH.write_text("[" + ",\n".join(cases) + "]\n")


if __name__ == "__main__":
    main()
