"""Eager ConR against the package: time, memory and differences on batches of real label counts."""
