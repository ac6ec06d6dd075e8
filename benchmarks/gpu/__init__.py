"""``make gpu``: every check and measurement that needs a GPU, and their rehearsal without one.

Tests of GPUs call ``device``; nothing in ``conr_kernels`` or in another room calls it. It may use
the main suite and ``benchmarks.static``, never ``training`` or ``examples``.
"""
