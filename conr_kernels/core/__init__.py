"""Mathematics that several backends share: orders and exact bands, and from sums of a row to its
loss and coefficients.

Called by the backends, operators and large_batch. Imports variants and torch only.
"""
