"""The stage that tunes: neighbours of the static table's entries, in whole steps as CUDA graphs.

Compiles the candidates in many processes and prints the entries that were faster. Another run with
these entries goes on from there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from conr_kernels.triton_backend import call
from conr_kernels.triton_backend.configs import Config

from ...providers import Provider, package_losses
from ...static import compiled, rank
from .. import device
from ..rows import TABLE, Stage
from . import warm
from .providers import F32, Size

#: Kind, size and precision of float32 products, the most wanted first.
ITEMS = [
    ("mirrored", Size(32_768), "highest"),
    ("backward", Size(32_768), "highest"),
    ("wide", Size(16_384, 512), "highest"),
    ("mirrored", Size(16_384, 512), "highest"),
    ("wide", Size(16_384, 2048), "highest"),
    ("backward", Size(32_768, 256), "highest"),
    ("mirrored", Size(32_768, 256), "highest"),
    ("mirrored", Size(32_768, 64), "highest"),
    ("backward", Size(32_768, 64), "highest"),
    ("forward", Size(16_384, 128, F32), "highest"),
    ("backward", Size(16_384, 128, F32), "highest"),
    ("wide", Size(16_384, 512, F32), "highest"),
    ("forward", Size(16_384, 128, F32), "high"),
    ("backward", Size(16_384, 128, F32), "high"),
    ("forward", Size(16_384, 64, F32), "highest"),
    ("backward", Size(16_384, 64, F32), "highest"),
]
#: A new entry must take at most this share of the shipped step.
GAIN = 0.99


def place(size: Size, how: str) -> tuple[int, int, str]:
    """Where the table is read: architecture, bucket of D and arithmetic."""
    with compiled.matmul_precision(how):
        arithmetic = call.arithmetic(size.dtype)
    architecture = call.architecture(call.capability(torch.device(device.DEVICE)))
    return architecture, call.bucket(size.D, arithmetic), arithmetic


def neighbours(kind: str, size: Size, how: str) -> list[Config]:
    """One step from the shipped entry: a side of the tile halved or doubled, the chunk of columns
    where D is read in chunks, the other number of warps, one stage more or less; registers free.
    """
    architecture, bucket, arithmetic = place(size, how)
    shipped = call.config(kind, architecture, bucket, arithmetic)
    sides = ["BLOCK_I", "BLOCK_J", *["BLOCK_D"] * (bucket != shipped.BLOCK_D)]
    steps = [(side, getattr(shipped, side) * 2) for side in sides]
    steps += [(side, getattr(shipped, side) // 2) for side in sides]
    steps = [(side, length) for side, length in steps if 32 <= length <= 128]
    steps.append(("num_warps", 4 if shipped.num_warps == 8 else 8))
    steps += [("num_stages", shipped.num_stages + more) for more in (1, -1)]
    # What bounds the shipped tile's registers is no bound for another.
    free = replace(shipped, max_registers=None, in_registers=False)
    found = [free] * (free != shipped)
    found += [replace(free, **{name: value}) for name, value in steps]
    if kind == "mirrored":
        found = [config for config in found if config.BLOCK_J % config.BLOCK_I == 0]
    return [config for config in found if rank.fits_registers(kind, config)]


def precompile(stage: Stage) -> None:
    """All candidates of all items, in many processes, for at most half of the time."""
    if device.REHEARSAL:  # the interpreter compiles nothing
        return
    calls = [
        warm.call_of(N=size.N, D=size.D, dtype=size.dtype, precision=how, tried=(kind, config))
        for kind, size, how in ITEMS
        for config in neighbours(kind, size, how)
    ]
    warm.compile_all(stage, calls, stage.left() / 2)


def entry(kind: str, size: Size, how: str, config: Config) -> str:
    """The line to put first in ``configs.py``; one of a chunked kind serves every width that is
    read in chunks.
    """
    architecture, bucket, arithmetic = place(size, how)
    width = bucket or (0 if kind in ("forward", "mirrored") else None)
    block_d = None if bucket == config.BLOCK_D else config.BLOCK_D
    of = (config.BLOCK_I, config.BLOCK_J, block_d, config.num_warps, config.num_stages)
    if config.max_registers or config.in_registers:
        of += (config.max_registers, *[True] * config.in_registers)
    return f"{arithmetic}, {kind}: ({architecture}, {width}, {of}),"


def graph_seconds(run: Callable[[], object]) -> float:
    """Of a whole step on the device alone, however the host launches its kernels."""
    return device.seconds({"step": device.graph(run)[0]}, 7, 20)["step"]


def one_item(stage: Stage, kind: str, size: Size, how: str) -> None:
    configs = neighbours(kind, size, how)
    # Triton's own kernels in a rehearsal too: in the interpreter.
    run = functools.partial(Provider("triton", package_losses("triton")).step, size.batch())
    row = dict(provider="triton", mode=f"{kind}, {place(size, how)[2]}", **size.row())
    with compiled.matmul_precision(how):
        expected, shipped = run(), graph_seconds(run)
        stage.add("time", shipped, **row, note="as shipped")
        best, chosen = GAIN * shipped, None
        for config in configs[:1] if device.REHEARSAL else configs:
            if stage.left() < 0:
                stage.add("not run", 1, **row, note=f"no time left for {config}")
                break
            try:
                with compiled.tried(kind, config):
                    got, t = run(), graph_seconds(run)
            except Exception as error:  # does not fit this device: no candidate
                if device.is_broken():
                    raise
                stage.add("not run", 1, **row, note=f"{config}: {type(error).__name__}")
                continue
            is_close = (got - expected).abs().max() <= 2e-2 * expected.abs().max()
            stage.add("time", t, **row, note=f"{config}{'' if is_close else ': wrong'}")
            if is_close and t < best:
                best, chosen = t, config
    if chosen is not None:
        note = f"{size}: {best * 1e3:.3f} ms a step, as shipped {shipped * 1e3:.3f} ms"
        print(f"{TABLE}{entry(kind, size, how, chosen)}  # {note}", flush=True)


def tune(stage: Stage) -> int:
    """Proposes entries of the static table."""
    precompile(stage)
    cases = {}
    for kind, size, how in ITEMS[1:2] if device.REHEARSAL else ITEMS:  # the interpreter is slow
        cases[f"{kind} {size} {how}"] = functools.partial(one_item, stage, kind, size, how)
    return stage.run(cases)
