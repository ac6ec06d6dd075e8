"""Loop nests of a compiled kernel, of its Triton IR and of its machine code, and how the two match.

The IR says what a loop moves and multiplies (shapes of loads, stores and products), the machine
code what it costs to issue.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .machine import TENSOR, MachineCode, opcode

SIZES = {"i1": 1, "i8": 1, "f16": 2, "bf16": 2, "i16": 2, "f32": 4, "i32": 4, "f64": 8, "i64": 8}
_TENSOR = re.compile(r"tensor<((?:\d+x)*)(?:!tt\.ptr<)?(\w+)>*")
_DOT = re.compile(r"= tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x(\w+)>")
_SCALAR = re.compile(r"!tt\.ptr<(\w+)>")


class Tree:
    """A loop and the loops in it, the kernel around all of them at the top."""

    loops: list

    def walk(self) -> Iterator[Any]:
        yield self
        for loop in self.loops:
            yield from loop.walk()

    @property
    def has_product(self) -> bool:
        return any(loop.multiplies for loop in self.walk())

    @property
    def has_pairs(self) -> bool:
        return any(loop.is_of_pairs for loop in self.walk())


@dataclass
class Nest(Tree):
    """One loop, or the kernel around all loops: what one pass through its own body does.

    ``bound`` and ``step``: the loop counts up to this value, by this constant, as far as the IR
    names them.
    """

    bound: str = ""
    step: int = 0
    loads: int = 0
    bytes: int = 0
    #: FLOP by kind (``"half"``, ``"tf32"``, ``"tf32x3"``, ``"ieee"``, ``"f64"``), and the bytes of
    #: both factors.
    products: Counter[str] = field(default_factory=Counter)
    operand_bytes: int = 0
    #: Pairs of rows whose exponentials this very body takes.
    exponentials: int = 0
    loops: list[Nest] = field(default_factory=list)

    @property
    def multiplies(self) -> bool:
        return bool(self.products)

    @property
    def is_of_pairs(self) -> bool:
        return self.exponentials > 0


def nest_of(ttir: str) -> Nest:
    """The loops of a kernel in Triton IR; what both branches of an if do counts."""
    kernel = Nest()
    constants: dict[str, int] = {}
    stack = [kernel]
    for raw in ttir.splitlines():
        line = re.sub(r"\s*loc\(#loc\d*\)$", "", raw).strip()
        if line.startswith("}"):
            here = stack.pop()
            if line.endswith("{"):  # the other branch
                stack.append(here)
            continue
        here = stack[-1]
        if found := re.match(r"(%\S+) = arith\.constant (-?\d+) : ", line):
            constants[found[1]] = int(found[2])
        if found := re.search(r"scf\.for %\S+ = \S+ to (\S+) step (\S+)", line):
            stack.append(Nest(found[1].lstrip("%"), constants.get(found[2], 0)))
            here.loops.append(stack[-1])
            continue
        _count(here, line)
        if line.endswith("{"):
            stack.append(here)
    return kernel


def _count(nest: Nest, line: str) -> None:
    if found := _DOT.search(line):
        m, k, n = (int(size) for size in found.groups()[:3])
        kind = {"f64": "f64", "f32": "ieee"}.get(found[4], "half")
        if kind == "ieee" and (how := re.search(r"inputPrecision = (\w+)", line)):
            kind = how[1]
        nest.products[kind] += 2 * m * n * k
        nest.operand_bytes += (m + n) * k * SIZES[found[4]]
    elif found := re.search(r"\btt\.(load|store)\b", line):
        shapes = _TENSOR.findall(line.split(" : ")[-1])
        dims, kind = shapes[-1] if shapes else ("", _SCALAR.findall(line)[-1])
        nest.bytes += math.prod(int(d) for d in dims.split("x") if d) * SIZES[kind]
        nest.loads += found[1] == "load"
    elif "exp2" in line and (found := re.search(r"tensor<(\d+)x(\d+)x(?:f32|f64)>", line)):
        nest.exponentials = int(found[1]) * int(found[2])


@dataclass
class CodeLoop(Tree):
    """One loop of the machine code: the instructions of its own body and the loops in it."""

    instructions: list[str]
    loops: list[CodeLoop] = field(default_factory=list)

    def count(self, *prefixes: str) -> int:
        """Instructions of its own body that start with one of these."""
        return sum(opcode(line).startswith(prefixes) for line in self.instructions)

    @property
    def multiplies(self) -> bool:
        return self.count(*TENSOR) > 0 or self.count("DFMA") >= 32

    @property
    def is_of_pairs(self) -> bool:
        return self.count("MUFU.EX2") > 0


def code_loops(code: MachineCode) -> CodeLoop:
    """The natural loops of the control flow graph, nested; the kernel's straight code around."""
    blocks, successors = _blocks(code)
    before = [[b for b, nexts in enumerate(successors) if at in nexts] for at in range(len(blocks))]
    reached = _reached(0, successors)
    bodies: dict[int, set[int]] = {}
    for end in reached:
        for header in successors[end]:
            # A jump back to a block that every path to it has passed.
            if header == 0 or header == end or end not in _reached(0, successors, header):
                body = {header} if header == end else {header} | _reached(end, before, header)
                bodies.setdefault(header, set()).update(body)
    root = CodeLoop([])
    made = [(reached, root)]
    for _, body in sorted(bodies.items()):
        _, parent = min((m for m in made if body <= m[0]), key=lambda m: len(m[0]))
        parent.loops.append(CodeLoop([]))
        made.append((body, parent.loops[-1]))
    for block in sorted(reached):
        _, owner = min((m for m in made if block in m[0]), key=lambda m: len(m[0]))
        owner.instructions += blocks[block]
    return root


def _blocks(code: MachineCode) -> tuple[list[list[str]], list[list[int]]]:
    ends = {at + 1 for at, line in enumerate(code.instructions) if _leaves(line)}
    starts = sorted({0, *code.targets.values(), *ends, *(at + 1 for at in code.targets)})
    starts = [at for at in starts if at < len(code.instructions)]
    number = {at: block for block, at in enumerate(starts)}
    blocks, successors = [], []
    for start, stop in zip(starts, [*starts[1:], len(code.instructions)], strict=True):
        last = code.instructions[stop - 1]
        jumps = stop - 1 in code.targets
        nexts = [number[code.targets[stop - 1]]] if jumps else []
        falls = not re.match(r"BRA `", last) if jumps else not _leaves(last)
        if falls and stop in number:
            nexts.append(number[stop])
        blocks.append(code.instructions[start:stop])
        successors.append(nexts)
    return blocks, successors


def _leaves(line: str) -> bool:
    return line.startswith(("EXIT", "RET"))


def _reached(start: int, nexts: list[list[int]], barred: int | None = None) -> set[int]:
    """All blocks on paths from ``start`` that do not enter the barred one."""
    found, stack = {start}, [start]
    while stack:
        for block in nexts[stack.pop()]:
            if block not in found and block != barred:
                found.add(block)
                stack.append(block)
    return found


@dataclass(frozen=True)
class Matched(Tree):
    """A loop of the IR with its machine code; ``code`` is None where the compiler reshaped it."""

    nest: Nest
    code: CodeLoop | None
    loops: list[Matched]


#: Loops that must correspond, from all to those that do the work.
_CHOICES = (
    lambda loop: True,
    lambda loop: loop.has_product or loop.has_pairs,
    lambda loop: loop.has_product,
)


def match(nest: Nest, code: CodeLoop) -> Matched:
    """Pairs up the loops of the largest class on which both trees agree."""
    for chosen in _CHOICES:
        if _shape(nest, chosen) == _shape(code, chosen):
            return _zip(nest, code, chosen)
    return Matched(nest, code, [_alone(loop) for loop in nest.loops])


def _shape(tree: Nest | CodeLoop, chosen) -> tuple:
    return tuple(_shape(loop, chosen) for loop in tree.loops if chosen(loop))


def _zip(nest: Nest, code: CodeLoop, chosen) -> Matched:
    rest = iter([loop for loop in code.loops if chosen(loop)])
    loops = [_zip(x, next(rest), chosen) if chosen(x) else _alone(x) for x in nest.loops]
    own = code.instructions + [
        line for x in code.loops if not chosen(x) for each in x.walk() for line in each.instructions
    ]
    return Matched(nest, CodeLoop(own), loops)


def _alone(nest: Nest) -> Matched:
    return Matched(nest, None, [_alone(loop) for loop in nest.loops])
