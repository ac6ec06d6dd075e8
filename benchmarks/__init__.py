"""Eager ConR against the package: time, memory and differences on batches of real label counts.

The rooms beside this suite may call its batches, providers and rows. It must not import any room.
"""
