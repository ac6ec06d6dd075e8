"""Programs to copy from: a training with ConR in one file each, started by ``python -m``.

Nobody imports them but their tests. They import ``conr_kernels`` as a user does, no other room.
"""
