"""The machine code of a compiled kernel, by the disassembler that comes with Triton."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


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
#: Loops are also left by calls that never return (sm_80).
_JUMP = re.compile(r"(?:BRA|CALL\.REL\.NOINC).*`\((\.L_x_\d+)\)")
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
            if jump := _JUMP.search(found[2]):
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


def tensor_core_names(code: MachineCode) -> str:
    """``HGMMA.BF16:48``: tensor-core instructions by type, and how many."""
    names: Counter[str] = Counter()
    for op, n in code.counts.items():
        if is_tensor_core(op):
            kinds = [part for part in op.split(".")[1:] if part in ("BF16", "TF32")]
            names[".".join([op.split(".")[0], *kinds])] += n
    return " ".join(f"{name}:{n}" for name, n in sorted(names.items()))


def product_flop(op: str, warps: int) -> float:
    """FLOP of one tensor-core instruction of all warps; 0 where the name does not tell its size."""
    if found := re.match(r"(HGMMA|DMMA)\.(\d+)x(\d+)x(\d+)", op):
        m, n, k = map(int, found.groups()[1:])
        return 2 * m * n * k * (warps / 4 if found[1] == "HGMMA" else warps)
    if found := re.match(r"HMMA\.16(8)(\d+)", op):
        return 2 * 16 * 8 * int(found[2]) * warps
    return 2 * 8 * 8 * 4 * warps if op.startswith("DMMA.884") else 0.0
