"""Candidates for the table of configurations, compiled and sorted by their predicted time."""

from __future__ import annotations

import functools
import itertools
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from unittest import mock

from conr_kernels.triton_backend import call
from conr_kernels.triton_backend.configs import Config

from . import compiled, shipped
from .buffers import overwritten
from .cost import Model
from .machine import machine_code, tensor_core_names

#: Of a thread's 255 registers; more are sure to spill, which takes minutes to compile.
ACCUMULATORS = 200
#: Bytes of shared memory of one program: the least of the GPUs that a column of the table serves,
#: which are sm_86, sm_89 and sm_120 beside sm_80.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: Added to the warps of the configuration in question: launches that carry it have read it.
MARK = 1024


def candidates(kind: str, width: int, arithmetic: str, arch: int = 90) -> list[Config]:
    """Tile shapes, chunks, warps and stages worth a look; ``width`` 0 for rows read in chunks."""
    double = arithmetic == "float64"
    if kind == "product":  # its tiles of pairs are those of "wide"
        wide = call.config("wide", arch, 0, arithmetic)
        steps, columns = ((16, 32), (16, 32, 64)) if double else ((32, 64, 128), (64, 128, 256))
        return [
            Config(wide.BLOCK_I, block_j, block_d, warps, stages)
            for block_j, block_d, warps, stages in itertools.product(
                steps, columns, (4, 8), (1,) if double else (2, 3, 4)
            )
            if block_j <= wide.BLOCK_J and wide.BLOCK_I * block_d / (32 * warps) <= ACCUMULATORS
        ]
    sides = (16, 32) if double else (32, 64, 128)
    anchors = sides if double else (*sides, 256)
    chunks = (width,) if width else (16, 32) if double else (32, 64, 128)
    tiles = itertools.product(anchors, sides, chunks, (4, 8), (1, 2, 3))
    found = [
        found for found in itertools.starmap(Config, tiles)
        if found.BLOCK_I * found.BLOCK_J / (32 * found.num_warps) >= 2
        and fits_registers(kind, found)
        and (kind != "mirrored" or found.BLOCK_J % found.BLOCK_I == 0)
    ]  # fmt: skip
    if arch == 90 and width and kind not in ("wide", "mirrored") and not double:
        found += [
            replace(one, max_registers=most, in_registers=True)
            for one in found for most in (128, 168, 255)
            if one.BLOCK_I == 64 and one.num_warps == 4 and one.num_stages > 1
        ]  # fmt: skip
    return found


def fits_registers(kind: str, config: Config) -> bool:
    """Whether what a program holds from one tile to the next and the tile's own numbers do."""
    kept = {"backward": config.BLOCK_D, "wide": 0}.get(kind, config.BLOCK_J)
    if kind == "mirrored":  # pairs of rows
        kept = config.BLOCK_J // 2
    numbers = config.BLOCK_I * (config.BLOCK_J + kept)
    return numbers / (32 * config.num_warps) <= ACCUMULATORS


def judge(
    kind: str, chosen: Config, D: int, arithmetic: str, arch: int, variant: str, N: int
) -> tuple[Config, float | None, str]:
    """The predicted microseconds of the kernels that read the configuration, and remarks; None and
    the reason where it is rejected.
    """
    of = shipped.Call(N, D, arithmetic, variant)
    bucket = (lambda *_: 0) if kind in ("wide", "product") else call.bucket
    launches = []
    for mark in (0, MARK):
        config = replace(chosen, num_warps=chosen.num_warps + mark)
        with compiled.tried(kind, config), mock.patch.object(call, "bucket", bucket):
            launches.append(of.launches(arch))
    total, remarks = 0.0, []
    models: dict[str, Model] = {}
    for launch, twin in zip(*launches, strict=True):
        if twin.options.get("num_warps", 0) < MARK:
            continue
        key = shipped.specialization(launch)
        if key in models:  # wide features: once more, for other rows or keys
            total += models[key].at(launch).microseconds()
            continue
        try:
            binary = compiled.compile_launch(launch, arch)
            code = machine_code(binary)
        except Exception as error:  # the compiler's, of any type: this candidate is none
            return chosen, None, f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        spills = f" spills {code.spill_bytes}" if code.spill_bytes else ""
        if spills and not chosen.max_registers:  # as much as a bound asks for may pay
            return chosen, None, f"{spills} bytes ({launch.name})"
        if code.shared_bytes > SHARED_LIMIT[arch]:
            return chosen, None, f"shared memory {code.shared_bytes} bytes ({launch.name})"
        if overwritten(binary.asm["ttgir"]):
            return chosen, None, f"a copy overwrites what a product reads ({launch.name})"
        model = models[key] = Model(launch, binary.asm["ttir"], code, arch)
        time = model.microseconds()
        total += time
        bounds = "/".join(f"{name}:{model.bound(name)}" for name in model.phases())
        products = tensor_core_names(code) or "no tensor core"
        registers = f"{code.registers} regs{spills} x{model.resident}"
        remarks.append(f"{time:.0f} us {registers} {bounds} {products}")
    if not remarks:
        return chosen, None, "no launch reads it"
    return chosen, total, " | ".join(remarks)


def rank(kind: str, D: int, arithmetic: str, arch: int, variant: str, N: int) -> None:
    """Prints the candidates, best first, and those that are rejected."""
    from tqdm import tqdm  # the stage that tunes needs none

    width = call.bucket(D, arithmetic)
    kind = "wide" if kind == "backward" and width == 0 else kind
    width = {"wide": 0, "product": call.columns_of(D)}.get(kind, width)
    configs = candidates(kind, width, arithmetic, arch)
    judged = functools.partial(
        judge, kind, D=D, arithmetic=arithmetic, arch=arch, variant=variant, N=N
    )
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(tqdm(pool.map(judged, configs), total=len(configs), file=sys.stderr))
    shipped = call.config(kind, arch, width, arithmetic)
    results.sort(key=lambda result: (result[1] is None, result[1] or 0.0))
    print(f"{kind}, D = {D}, {arithmetic}, sm_{arch}, {variant}, N = {N}: predicted for an H200")
    for chosen, time, remark in results:
        tile = f"{chosen.BLOCK_I}x{chosen.BLOCK_J}x{chosen.BLOCK_D}"
        mark = "*" if chosen == shipped else " "
        cost = "rejected" if time is None else f"{time:8.0f}"
        print(f"{mark} {tile:>12} w{chosen.num_warps} s{chosen.num_stages} {cost}  {remark}")
