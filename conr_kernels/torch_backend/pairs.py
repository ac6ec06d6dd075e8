"""The pairs of a tile in PyTorch operations: their masks and weights, and what they add to the sums
and to the gradient. small.py and sweeps.py choose the tiles.

Masks are 0 and 1 in the features' dtype and are multiplied in: several times faster on a CPU than
boolean ones. The tensors of one tile end with these functions, so that the next tile finds their
memory in the caches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import pair_distance
from ..variants import Settings
from .source import Rows
from .tiles import Tile

LN_2 = math.log(2)


class How(NamedTuple):
    """How the pairs of a call are summed.

    Attributes:
        is_shifted: sums of exponentials are kept as logarithms, because an exponent may be large.
        is_inside: ``log="inside"`` needs ``Σ_P s_ij``.
        counts_negatives: ``m_i`` is counted. Otherwise no ``φ exp(s_ij)`` can underflow, so that
            ``B`` > 0 shows that there are negatives.
    """

    settings: Settings
    is_shifted: bool
    is_inside: bool
    counts_negatives: bool

    @classmethod
    def of(cls, settings: Settings, *labels: Tensor) -> How:
        """For a call whose keys have these labels."""
        is_shifted = not settings.exponent_is_small
        if is_shifted and settings.pushing.phi == "exponential" and labels[0].is_cpu:
            y = torch.cat(labels)
            largest_d = (y.amax(0) - y.amin(0)).max().item() if len(y) > 0 else torch.inf
            largest_exponent = 2 / settings.temperature + abs(settings.push_scale) * largest_d
            is_shifted = not largest_exponent <= settings.SAFE_EXPONENT
        counts_negatives = is_shifted or settings.window < settings.SMALLEST_WINDOW
        return cls(settings, is_shifted, settings.variant.log == "inside", counts_negatives)

    @property
    def sums(self) -> tuple[str, ...]:
        counts = ("n", "m") if self.counts_negatives else ("n",)
        return (*counts, "E", "B", "s_sum") if self.is_inside else (*counts, "E", "B")

    def is_log(self, name: str) -> bool:
        return self.is_shifted and name in ("E", "B")


class Sums(dict[str, Tensor]):
    """Sums over the pairs of each anchor, by name: ``n``; ``m``, if negatives are counted; ``E`` =
    Σ_P exp s and ``B`` = Σ_M φ exp s (or their logarithms); ``s_sum`` (/ ln 2 if unshifted) where
    ``log="inside"``.
    """

    def __init__(self, n_anchors: int, how: How) -> None:
        self.n_anchors, self.how = n_anchors, how

    def start(self, name: str, device: torch.device) -> None:
        """Adds the sum over no pairs."""
        nothing = -torch.inf if self.how.is_log(name) else 0.0
        dtype = wide_dtype(device)
        self[name] = torch.full((self.n_anchors,), nothing, dtype=dtype, device=device)

    def add(self, name: str, rows: slice | Tensor, part: Tensor) -> None:
        """Adds ``part``, the sums of some of the anchors."""
        if name not in self:
            self.start(name, part.device)
        total = self[name][rows]
        if self.how.is_log(name):
            torch.logaddexp(total, part, out=total)
        else:
            total.add_(part)
        if isinstance(rows, Tensor):
            self[name].index_copy_(0, rows, total)

    def add_pairs(self, name: str, tile: Tile, t_ij: Tensor) -> None:
        """Adds ``Σ_j t_ij`` of a tile, or ``log Σ_j exp(t_ij)``."""
        # Counts up to 2²⁴ are exact in float32; a sum that converts its terms is several times
        # slower.
        reduce = torch.logsumexp if self.how.is_log(name) else torch.sum
        part = reduce(t_ij, -1)
        if tile.rows == self.n_anchors and name not in self:
            self[name] = part
            return
        self.add(name, tile.anchors, part.view(-1))
        if tile.mirror < tile.width:
            of_keys = reduce(t_ij[..., tile.mirror :], dim=-2).view(tile.count, -1)
            for keys, part in zip(tile.mirrored, of_keys.unbind(), strict=True):
                self.add(name, keys, part)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which rows are finished: weights up to 1e30 meet sums up to 1e30 there."""
    return torch.float64 if device.type != "mps" else torch.float32


#: ``exp(s_ij)`` of the positives and ``φ(d_ij) exp(s_ij)`` of the negatives, 0 for other pairs; or
#: the logarithms of these. None for a set that the tile does not serve.
Weighted = tuple[Tensor | None, Tensor | None]
#: Columns of a tile, None for all, and a mask of their pairs inside the window: 0 or 1.
Masks = list[tuple[slice | None, Tensor]]


def weigh(
    tile: Tile, i: Rows, j: Rows, how: How, sums: Sums | None = None, linear: Tensor | None = None
) -> Weighted:
    """The pairs of a tile, weighted.

    Args:
        sums: to which the numbers of pairs and ``Σ_P s_ij`` are added.
        linear: a number for each pair, set to 0 for all but the positives.
    """
    s_ij = _similarities(tile.of_anchors(i.q), tile.of_keys(j.q), how)
    masks, negative, log_phi = _masks(tile, i, j, how.settings, s_ij.dtype)
    if sums is not None and masks is not None:
        if not tile.is_exact:  # then one mask has all columns
            sums.add_pairs("n", tile, masks[0][1])
        if how.is_inside:
            sums.add_pairs("s_sum", tile, _keep_positives(s_ij.clone(), tile, masks))
    if sums is not None and negative is not None and how.counts_negatives:
        sums.add_pairs("m", tile, negative.sign())
    if linear is not None:
        _keep_positives(linear, tile, masks)
    t_ij = s_ij if how.is_shifted else s_ij.exp2_()
    if negative is None:
        return _keep_positives(t_ij, tile, masks, how.is_shifted), None
    positive = None if masks is None else _times(masks[0][1], t_ij, how.is_shifted)
    if log_phi is not None:
        t_ij = t_ij.add_(log_phi) if how.is_shifted else t_ij.mul_(log_phi.exp_())
    return positive, _times(negative, t_ij, how.is_shifted)


def _times(mask: Tensor, t_ij: Tensor, is_log: bool) -> Tensor:
    """``mask·t_ij``, or its logarithm where ``t_ij`` are exponents; in the mask's memory."""
    return mask.log_().add_(t_ij) if is_log else mask.mul_(t_ij)


def _similarities(q_i: Tensor, q_j: Tensor, how: How) -> Tensor:
    """``s_ij``, or ``s_ij / ln 2`` if unshifted: on CPUs ``exp2`` takes half as long as ``exp``."""
    product = torch.addmm if q_i.dim() == 2 else torch.baddbmm
    scale = (1.0 if how.is_shifted else 1 / LN_2) / how.settings.temperature
    return product(q_i.new_empty((1,) * q_i.dim()), q_i, q_j.mT, beta=0, alpha=scale)


def _masks(
    tile: Tile, i: Rows, j: Rows, settings: Settings, dtype: torch.dtype
) -> tuple[Masks | None, Tensor | None, Tensor | None]:
    """Masks of the positives; the mask of the negatives, times ``d_ij`` where ``φ(d) = d``; and
    ``log φ = e·d_ij`` where pushing is exponential.
    """
    if tile.serves == "positives":
        masks = list(_near_at_edges(tile, i.y, j.y, settings, dtype))
        if not tile.is_exact:  # one mask has all columns
            _drop_self(masks[0][1], tile)
        return masks, None, None
    d_ij = pair_distance(tile.of_anchors(i.y), tile.of_keys(j.y), settings.distance)
    h, phi, masks, log_phi = settings.window, settings.pushing.phi, None, None
    if tile.serves == "both":
        is_near = torch.empty_like(d_ij, dtype=dtype)
        masks = [(None, _drop_self(torch.le(d_ij, h, out=is_near), tile))]
    if phi == "exponential":
        log_phi = d_ij.to(dtype) * settings.push_scale
    elif phi not in ("one", "distance"):
        raise NotImplementedError(f"torch backend: φ = {phi!r}")
    negative = torch.threshold_(d_ij, h, 0.0) if phi == "distance" else d_ij.gt_(h)
    negative = negative.to(dtype)
    if settings.variant.negatives == "confused":
        for columns, is_near in _near_at_edges(tile, i.p, j.p, settings, dtype):
            at = negative if columns is None else negative[..., columns]
            at.mul_(is_near)
    return masks, negative, log_phi


def _near_at_edges(
    tile: Tile, y: Tensor, y_j: Tensor, settings: Settings, dtype: torch.dtype
) -> Iterator[tuple[slice | None, Tensor]]:
    """``[d_ij ≤ h]`` of the columns that may hold pairs outside the window."""
    for columns in tile.edges:
        y_i, of_keys = tile.of_anchors(y), tile.of_keys(y_j)
        if columns is not None:
            of_keys = of_keys[..., columns, :]
        d_ij = pair_distance(y_i, of_keys, settings.distance)
        yield columns, d_ij.le_(settings.window).to(dtype)


def _keep_positives(t_ij: Tensor, tile: Tile, masks: Masks, is_log: bool = False) -> Tensor:
    """Sets ``t_ij`` to 0, or −∞, for all pairs but the positives; in place."""
    for columns, is_near in masks:
        at = t_ij if columns is None else t_ij[..., columns]
        at.add_(is_near.log()) if is_log else at.mul_(is_near)
    return _drop_self(t_ij, tile, -torch.inf if is_log else 0.0) if tile.is_exact else t_ij


def _drop_self(t_ij: Tensor, tile: Tile, fill: float = 0.0) -> Tensor:
    """Sets the pair of each anchor with itself; in place."""
    if tile.has_diagonal:
        t_ij.diagonal(0, -2, -1).fill_(fill)
    return t_ij


def add_sums(sums: Sums, tile: Tile, i: Rows, j: Rows, how: How) -> Weighted:
    """Adds the pairs of a tile to the sums of their anchors."""
    positive, negative = weigh(tile, i, j, how, sums)
    if positive is not None:
        sums.add_pairs("E", tile, positive)
    if negative is not None:
        sums.add_pairs("B", tile, negative)
    return positive, negative


def is_present(weighted: Tensor, how: How) -> Tensor:
    """1 for the pairs of the mask, 0 for others."""
    return (weighted > -torch.inf).to(weighted.dtype) if how.is_shifted else weighted.sign()


def gradient_weights(
    tile: Tile, i: Rows, j: Rows, how: How, weighted: Weighted | None = None
) -> Tensor:
    """``H_ij`` of a tile; ``weighted``: what ``add_sums`` returned, if that was kept."""
    linear, H_ij = None, None
    if how.is_inside and tile.serves != "negatives":
        linear = tile.of_anchors(i.beta) + tile.of_keys(j.beta).mT
    if weighted is None:
        weighted = weigh(tile, i, j, how, linear=linear)
    elif linear is not None:
        linear.mul_(is_present(weighted[0], how))
    for t_ij, c_i, c_j in zip(weighted, (i.alpha, i.gamma), (j.alpha, j.gamma), strict=True):
        if t_ij is not None:
            term = _times_coefficients(t_ij, tile.of_anchors(c_i), tile.of_keys(c_j))
            H_ij = term if H_ij is None else H_ij.add_(term)
    return H_ij if linear is None else H_ij.sub_(linear)


def _times_coefficients(t_ij: Tensor, c_i: Tensor, c_j: Tensor) -> Tensor:
    """``t_ij (c_i + c_j)``; or, of c [..., N, 2] as signs and logarithms,
    ``exp(t_ij) (c_i + c_j)``.
    """
    if c_i.shape[-1] == 1:
        return (c_i + c_j.mT).mul_(t_ij)
    of_i = (t_ij + c_i[..., 1:]).exp_().mul_(c_i[..., :1])
    of_j = (t_ij + c_j[..., 1:].mT).exp_().mul_(c_j[..., :1].mT)
    return of_i.add_(of_j)


def add_products(G: Tensor, tile: Tile, H_ij: Tensor, i: Rows, j: Rows) -> None:
    """Adds ``Σ_j H_ij q_j`` of a tile, and of its mirror image, to ``τ ∂L/∂q_i`` [N, D]."""
    q_i, q_j = tile.of_anchors(i.q), tile.of_keys(j.q)
    if tile.count == 1:
        G[tile.anchors].addmm_(H_ij, q_j)
    else:
        G[tile.anchors].view(q_i.shape).baddbmm_(H_ij, q_j)
    if tile.mirror < tile.width:
        H_ji = H_ij[..., tile.mirror :].mT
        of_blocks = ((H_ji,), (q_i,)) if tile.count == 1 else (H_ji.unbind(), q_i.unbind())
        for keys, H_jk, q_k in zip(tile.mirrored, *of_blocks, strict=True):
            G[keys].addmm_(H_jk, q_k)
