"""What the tuning stage tries: tiles and launch options by kind; at which sizes they are timed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from conr_kernels.triton_backend import call, configs
from conr_kernels.triton_backend.configs import Config

from .providers import BF16, F32, Size

Tile = tuple[int, int, int, int, int]
#: BLOCK_I, BLOCK_J, BLOCK_D (0: the bucket), num_warps, num_stages; by kind, and by whether
#: features have 16 bits, "chunks" where D is read in chunks.
CANDIDATES: dict[tuple[str, bool], list[Tile]] = {
    ("forward", True): [
        (128, 128, 0, 8, 2), (128, 128, 0, 8, 3), (128, 64, 0, 8, 2), (128, 64, 0, 8, 3),
        (128, 64, 0, 4, 3), (64, 128, 0, 4, 3), (64, 64, 0, 4, 3), (64, 64, 0, 4, 4),
    ],
    ("forward chunks", True): [
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (128, 128, 128, 8, 2),
        (64, 128, 64, 4, 4), (128, 64, 128, 8, 3),
    ],
    ("backward", True): [
        (128, 64, 0, 8, 2), (128, 64, 0, 8, 3), (128, 128, 0, 8, 2), (64, 64, 0, 4, 2),
        (64, 64, 0, 4, 3), (64, 128, 0, 4, 2), (64, 128, 0, 8, 2), (128, 32, 0, 8, 3),
    ],
    ("wide", True): [
        (64, 64, 64, 4, 2), (64, 64, 64, 4, 3), (128, 64, 64, 8, 2), (128, 64, 64, 8, 3),
        (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 128, 4, 2),
    ],
    ("forward", False): [
        (64, 64, 0, 4, 2), (64, 64, 0, 4, 3), (128, 64, 0, 8, 2), (128, 32, 0, 4, 2),
        (64, 32, 0, 4, 3), (128, 128, 0, 8, 2),
    ],
    ("forward chunks", False): [
        (64, 64, 32, 4, 2), (64, 64, 32, 4, 3), (128, 64, 32, 8, 3), (128, 128, 32, 8, 2),
        (128, 64, 32, 4, 3),
    ],
    ("backward", False): [
        (64, 64, 0, 4, 2), (64, 32, 0, 4, 2), (64, 64, 0, 8, 2), (128, 32, 0, 8, 2),
        (64, 32, 0, 4, 3),
    ],
    ("wide", False): [
        (64, 32, 32, 4, 2), (64, 64, 32, 4, 2), (64, 64, 32, 8, 3), (128, 64, 32, 8, 2),
        (64, 32, 64, 4, 2),
    ],
}  # fmt: skip
#: Kind, size and precision of float32 products, the most wanted first.
ITEMS = [
    ("forward", Size(32_768), "highest"),
    ("backward", Size(32_768), "highest"),
    ("wide", Size(16_384, 512), "highest"),
    ("forward", Size(16_384, 512), "highest"),
    ("wide", Size(16_384, 2048), "highest"),
    ("backward", Size(32_768, 256), "highest"),
    ("forward", Size(32_768, 256), "highest"),
    ("forward", Size(32_768, 64), "highest"),
    ("backward", Size(32_768, 64), "highest"),
    ("forward", Size(16_384, 128, F32), "highest"),
    ("backward", Size(16_384, 128, F32), "highest"),
    ("wide", Size(16_384, 512, F32), "highest"),
    ("forward", Size(16_384, 128, F32), "high"),
    ("backward", Size(16_384, 128, F32), "high"),
    ("forward", Size(16_384, 64, F32), "highest"),
    ("backward", Size(16_384, 64, F32), "highest"),
]


@contextlib.contextmanager
def precision(how: str) -> Iterator[None]:
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(how)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(saved)


@contextlib.contextmanager
def tried(kind: str, tile: Tile, bucket: int) -> Iterator[None]:
    """The backend takes this tile for kernels of the kind."""
    plain = call.config
    block_i, block_j, block_d, num_warps, num_stages = tile
    config = Config(block_i, block_j, block_d or bucket, num_warps, num_stages)

    def lookup(name: str, *key: object) -> Config:
        return config if name == kind else plain(name, *key)

    with mock.patch.object(call, "config", lookup):
        yield


def item_candidates(kind: str, size: Size, how: str) -> tuple[list[Tile], int]:
    with precision(how):
        arithmetic = call.arithmetic(size.dtype)
    bucket = configs.bucket(size.D, arithmetic)
    name = "forward chunks" if kind == "forward" and bucket == 0 else kind
    return CANDIDATES[name, size.dtype == BF16], bucket


def warm_call(kind: str, size: Size, how: str, tile: Tile, bucket: int) -> tuple:
    """The call as warm takes it."""
    call = dict(N=size.N, D=size.D, dtype=size.dtype, precision=how, tried=(kind, tile, bucket))
    return tuple(call.items())
