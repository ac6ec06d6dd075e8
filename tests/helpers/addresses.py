"""Reads in Triton IR whether a row number, multiplied by the length of a row, can leave 32 bits."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

#: A program's or tile's number times the rows of a tile stays a row number; a larger constant, a
#: stride or the width is the length of a row.
LARGEST_TILE = 256
#: Operations whose result holds the numbers of their operand.
SAME_NUMBERS = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "arith.extsi"}


@dataclass(frozen=True)
class Value:
    """``varies``: depends on data, the grid or a size; ``wraps``: may have overflowed 32 bits;
    ``is_length``: a stride, the width or a constant as large, or a tensor of them.
    """

    varies: bool = False
    wraps: bool = False
    is_length: bool = False
    base: str = ""


def check_row_offsets(ttir: str, matrices: set[str]) -> tuple[list[str], Counter[str]]:
    """Unsafe advances of pointers into ``matrices``, and how often each is advanced by 64 bits.

    The offset of a chunk of D (a loop up to ``width``) may have 32 bits: it is below D.
    """
    values: dict[str, Value] = {}
    unsafe, advances = [], Counter()
    for raw in ttir.splitlines():
        line = re.sub(r"\s*loc\(.*?\)+(?=[,)]|$)", "", raw).strip()
        if "tt.func" in line:
            for name, kind in re.findall(r"%(\w+): (!tt\.ptr|\w+)", line):
                is_length = "stride" in name or name == "width"
                is_pointer = kind == "!tt.ptr"
                values[name] = Value(base=name) if is_pointer else Value(True, is_length=is_length)
            continue
        if loop := re.search(r"scf\.for %(\w+) = \S+ to %(\w+) step", line):
            values[loop[1]] = Value(varies=loop[2] != "width")
        for name in re.findall(r"%(\w+) = %\w+[,)]", line):  # carried by the loop
            values[name] = Value(varies=True)
        if not (found := re.match(r"%(\w+)(?::\d+)? = \"?([\w.]+)\"?(.*)$", line)):
            continue
        name, op, rest = found.groups()
        if op == "arith.constant":
            number = re.search(r"(?:dense<)?(-?\d+)>? : ", rest)
            is_length = number is not None and int(number[1]) > LARGEST_TILE
            values[name] = Value(is_length=is_length)
            continue
        operands = re.findall(r"%(\w+)", rest.split(" : ")[0])
        known = [values.get(operand, Value()) for operand in operands]
        varies = op in ("tt.get_program_id", "tt.load") or any(v.varies for v in known)
        wraps = any(v.wraps for v in known) and op != "tt.load"
        if op == "arith.muli" and varies and re.search(r"i32>?$", rest):
            wraps |= any(v.is_length for v in known)
        is_length = op in SAME_NUMBERS and any(v.is_length for v in known)
        base = next((v.base for v in known if v.base), "") if "!tt.ptr" in rest else ""
        values[name] = Value(varies, wraps, is_length, base)
        if op == "tt.addptr":
            offset = known[1]
            values[name] = Value(base=base)
            is_wide = re.search(r"i64>?$", rest) is not None
            if base in matrices and offset.varies:
                advances[base] += is_wide
                if offset.wraps or not is_wide:
                    unsafe.append(line)
    return unsafe, advances
