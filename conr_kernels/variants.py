"""What is computed: the variants of the ConR loss, their presets, and the settings of one call."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from .validation import check_choice, check_flag, check_variant_combination


class Pushing(NamedTuple):
    """A pushing weight ``S_ij = r_i·φ(d_ij)``: whether ``e``, and whether ``w_i``, is a factor of
    ``r_i``; and ``φ(d)``: ``"one"``, ``"distance"`` ``d``, ``"exponential"`` ``exp(e·d)``.
    DESIGN.md says how to add one.
    """

    is_scaled: bool
    is_weighted: bool
    phi: str


LOGS = ("outside", "inside")
PUSHINGS = {
    "linear": Pushing(True, True, "distance"),
    "exponential": Pushing(False, True, "exponential"),
    "weight": Pushing(True, True, "one"),
    "distance": Pushing(True, False, "distance"),
    "none": Pushing(False, False, "one"),
}
NEGATIVES = ("confused", "all")
DISTANCES = ("mae", "rmse")


@dataclass(frozen=True)
class Variant:
    r"""One member of the ConR family of losses.

    With positives ``P_i`` (label distance ≤ window, self excluded, ``n_i`` of them), negatives
    ``M_i``, similarities ``s_ij`` and ``Z_i = Σ_P exp(s_ij) + Σ_M S_ij exp(s_ij)``:

    Args:
        log: ``"outside"``: ``ℓ_i = −log( (1/n_i) Σ_P exp(s_ij) / Z_i )`` (Eq. 1 of the paper);
            ``"inside"``: ``ℓ_i = (n_i log Z_i − Σ_P s_ij) / n_i``.
        pushing: the pushing weight ``S_ij``: ``"linear"`` ``e·w_i·d_ij``, ``"exponential"``
            ``w_i·exp(e·d_ij)``, ``"weight"`` ``e·w_i``, ``"distance"`` ``e·d_ij``, ``"none"`` 1.
        negatives: ``"confused"``: different labels and similar predictions; ``"all"``:
            every row with a different label.
        unit_terms: add ``N − n_i`` to ``Z_i`` (one ``exp(0)`` for each non-positive, self
            included).
        count_self: divide by ``n_i + 1`` instead of ``n_i`` (only with ``log="inside"``).
        weighted_rows: multiply ``ℓ_i`` by ``w_i``.

    Raises:
        TypeError, ValueError: an illegal value of a field, or ``count_self`` with
            ``log="outside"``.
    """

    log: str = "outside"
    pushing: str = "linear"
    negatives: str = "confused"
    unit_terms: bool = False
    count_self: bool = False
    weighted_rows: bool = False

    def __post_init__(self) -> None:
        check_choice("log", self.log, LOGS)
        check_choice("pushing", self.pushing, PUSHINGS)
        check_choice("negatives", self.negatives, NEGATIVES)
        for name in ("unit_terms", "count_self", "weighted_rows"):
            check_flag(name, getattr(self, name))
        check_variant_combination(self.log, self.count_self)

    @property
    def code(self) -> str:
        """The variant as one string, as operators take it."""
        flags = f"{self.unit_terms:d}{self.count_self:d}{self.weighted_rows:d}"
        return f"{self.log},{self.pushing},{self.negatives},{flags}"

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def from_code(code: str) -> Variant:
        log, pushing, negatives, flags = code.split(",")
        return Variant(log, pushing, negatives, *(flag == "1" for flag in flags))


PRESETS = {
    "paper": Variant(),
    "released-age": Variant("inside", "exponential", unit_terms=True, weighted_rows=True),
    "released-depth": Variant("inside", "linear", unit_terms=True, count_self=True),
    "no-pushing": Variant(pushing="none"),
    "no-weight": Variant(pushing="distance"),
    "no-similarity": Variant(pushing="weight"),
    "contrastive": Variant(pushing="none", negatives="all"),
}


def resolve_variant(variant: str | Variant) -> Variant:
    """The Variant itself, or the preset of that name."""
    if isinstance(variant, Variant):
        return variant
    check_choice("variant", variant, PRESETS)
    return PRESETS[variant]


@dataclass(frozen=True)
class Settings:
    """Window ``h``, temperature ``τ``, push scale ``e``, variant and distance of one call."""

    window: float
    temperature: float
    push_scale: float
    variant: Variant
    distance: str = "mae"

    #: The largest exponent of sums without a shift: ``exp(±64)`` leaves float32 room for sums over
    #: 10⁹ rows and for a gradient scaler's 2¹⁶.
    SAFE_EXPONENT = 64.0
    #: From this window on, a negative's ``d_ij exp(−1/τ)`` does not underflow in float32 where
    #: exponents are safe (its ``d_ij`` exceeds the window): a sum of 0 means that a row has none.
    SMALLEST_WINDOW = 1e-20

    @property
    def scalars(self) -> tuple[float, float, float, str, str]:
        """The settings as operators take them."""
        return (
            self.window, self.temperature, self.push_scale, self.variant.code, self.distance
        )  # fmt: skip

    @property
    def pushing(self) -> Pushing:
        return PUSHINGS[self.variant.pushing]

    @property
    def exponent_is_small(self) -> bool:
        """True where ``exp(s_ij)`` needs no shift: ``|s_ij| ≤ 1/τ`` and no exponential pushing."""
        return 2 / self.temperature <= self.SAFE_EXPONENT and self.pushing.phi != "exponential"

    @property
    def n_statistics(self) -> int:
        """How many columns a row's statistics have (core/rows.py)."""
        return 3 if self.exponent_is_small else 5
