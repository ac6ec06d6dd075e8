"""Triton launches without a GPU: what a call of the backend would launch, compiled for any
architecture.

``recorded_launches`` intercepts the launcher, ``compile_launch`` turns a record into machine code,
``pair_loops`` takes its innermost loops apart. Nothing here runs a kernel.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from conr_kernels import triton_backend
from conr_kernels.rows import scale_statistics
from conr_kernels.variants import Settings, resolve_variant

LAUNCH_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Launch:
    """One intercepted launch: the kernel, its grid and its arguments by name, launch options
    apart.
    """

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@contextlib.contextmanager
def intercepted(architecture: int) -> Iterator[list[Launch]]:
    """Collects launches instead of running them; the table is read for that architecture."""
    launches: list[Launch] = []

    def record(kernel, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in LAUNCH_OPTIONS if name in kwargs}
        arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        launches.append(Launch(kernel, grid, arguments, options))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(triton_backend, "architecture", lambda device: architecture),
    ):
        yield launches


def recorded_launches(
    N: int,
    D: int,
    dtype: torch.dtype,
    architecture: int = 90,
    *,
    variant: str = "paper",
    L: int = 1,
    K: int | None = None,
    temperature: float = 0.2,
    distance: str = "mae",
    precision: str = "high",
) -> list[Launch]:
    """The launches of one forward and backward, from tensors without storage."""
    settings = Settings(1.0, temperature, 0.01, resolve_variant(variant), distance)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, w = torch.empty(N, D, dtype=dtype, device="meta"), torch.empty(N, dtype=wide, device="meta")
    y = torch.empty(N, L, device="meta")
    keys = None
    if K is not None:
        y_j = torch.empty(K, L, device="meta")
        keys = (torch.empty(K, D, dtype=dtype, device="meta"), y_j, y_j)
    saved = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with intercepted(architecture) as launches:
            loss, stats, layout = triton_backend.forward(x, y, y, w, keys, 0, settings)
            coef_i = scale_statistics(stats, loss)
            coef_j = None if keys is None else coef_i.new_empty((K, coef_i.shape[1]))
            triton_backend.backward(coef_i, coef_j, layout, x, y, y, keys, 0, settings)
    finally:
        torch.set_float32_matmul_precision(saved)
    return launches


def source_of(launch: Launch) -> ASTSource:
    """The specialization that the launcher would choose: constants, and what 16 divides."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = mangle_type(value)
            # Slices of one allocation start where the backend cut them: always on 16 bytes.
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int) and not parameter.do_not_specialize and value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = parameter.annotation_type or mangle_type(value)
            is_free = isinstance(value, int) and not parameter.do_not_specialize
            if is_free and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Launch, architecture: int):
    """The compiled kernel: ``asm`` and ``metadata``."""
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source_of(launch), target=target, options=dict(launch.options))


@dataclass(frozen=True)
class MachineCode:
    """The disassembly of one kernel and what the assembler says of its resources."""

    instructions: list[str]
    targets: dict[int, int]
    registers: int
    spill_bytes: int
    shared_bytes: int

    @functools.cached_property
    def counts(self) -> Counter[str]:
        return Counter(opcode(line) for line in self.instructions)


def opcode(instruction: str) -> str:
    """``HGMMA.64x128x16.F32.BF16`` of ``@!P0 HGMMA.64x128x16.F32.BF16 R24, …``."""
    words = instruction.split()
    return words[1] if words[0].startswith("@") else words[0]


_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*(?:/\*.*)?$")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")


def machine_code(compiled) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    instructions, labels, jumps = [], {}, []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif (found := _INSTRUCTION.match(line)) and found[2]:
            if jump := re.search(r"BRA.*`\((\.L_x_\d+)\)", found[2]):
                jumps.append((len(instructions), jump[1]))
            instructions.append(found[2])
    counts = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return MachineCode(
        instructions,
        {at: labels[label] for at, label in jumps},
        counts["REG"],
        counts["STACK"] + counts["LOCAL"],
        compiled.metadata.shared,
    )


def _tool(name: str, *arguments: str) -> str:
    run = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return run.stdout


TENSOR = ("HGMMA", "UTCHMMA", "UTCMMA", "UTCQMMA", "HMMA", "DMMA", "IMMA")


def is_tensor_core(op: str) -> bool:
    return op.startswith(TENSOR)


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions between the target of a jump back and the jump."""

    instructions: list[str]

    def count(self, *prefixes: str) -> int:
        return sum(opcode(line).startswith(prefixes) for line in self.instructions)


def pair_loops(code: MachineCode) -> list[Loop]:
    """The innermost loops that take exponentials, in program order: one for each kind of tile."""
    spans = sorted((target, at) for at, target in code.targets.items() if target <= at)
    innermost = [
        (a, b)
        for a, b in spans
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)
    ]
    loops = [Loop(code.instructions[a : b + 1]) for a, b in innermost]
    return [loop for loop in loops if loop.count("MUFU.EX2")]
