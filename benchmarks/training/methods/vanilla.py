"""The L1 loss of all rows alike."""

from .base import Method


class Vanilla(Method):
    """``mean |p_i − y_i|``."""
