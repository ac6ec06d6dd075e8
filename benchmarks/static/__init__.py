"""What the compiler makes of every shipped Triton kernel, and a stated model of its time; no GPU.

Its command is ``python -m benchmarks.static``; ``benchmarks.gpu`` and the tests call ``compiled``
to record and compile launches. It must not import ``benchmarks.gpu``, nor anything that measures.
"""
