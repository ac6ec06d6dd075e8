"""Label distribution smoothing (Yang et al., ICML 2021)."""

from .reweighting import Reweighted


class LDS(Reweighted):
    """Weights from the density of the labels smoothed by a Gaussian of 5 bins, σ = 2, and its root,
    as the authors use it on ages."""

    method = "sqrt_inverse"
    smoothing = "gaussian"
