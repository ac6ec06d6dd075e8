"""Shared memory that a copy may overwrite while a product still reads it, in Triton's IR for sm_90.

A product of 64 rows or more runs on while its program copies the next tile; a wait says how many
products may still run. Triton 3.6 to 3.8 give a tile that a product and registers read one buffer
where two are needed: results then differ from run to run, rarely. (Not looked at: sm_80's, which
end where they are, and sm_100's. A loop's n-th pass is taken to multiply what its n-th copy wrote.)
"""

from __future__ import annotations

import re

ALLOCATED = re.compile(r"(%[\w#]+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
VIEW = re.compile(r"(%[\w#]+) = ttg\.memdesc_\w+ (%[\w#]+)")
STEPS = {
    "copy": re.compile(r"async_copy_global_to_local %[\w#]+, (%[\w#]+)"),
    "product": re.compile(r"warp_group_dot (%[\w#]+), (%[\w#]+), .*isAsync = true"),
    "wait": re.compile(r"warp_group_dot_wait .*pendings = (\d+)"),
}
#: Passes through a loop that are followed: more than any tile has buffers.
PASSES = 8
Steps = list[tuple[str, tuple[str, ...]]]


def overwritten(ttgir: str) -> set[str]:
    """The buffers of loops that a copy writes while an unfinished product reads them."""
    views: dict[str, str] = {}
    sizes: dict[str, int] = {}
    found: set[str] = set()
    here: Steps = []
    around: list[tuple[Steps, bool]] = []  # and whether what is inside is a loop
    for line in map(str.strip, re.sub(r" loc\(.*\)", "", ttgir).splitlines()):
        if match := ALLOCATED.match(line):  # regions side by side may share names
            views[match[1]] = f"{match[1]}, {len(sizes)}"
            sizes[views[match[1]]] = int(match[2])
        if match := VIEW.match(line):
            views[match[1]] = views.get(match[2], match[2])
        for kind, pattern in STEPS.items():
            if match := pattern.search(line):
                here.append((kind, tuple(views.get(name, name) for name in match.groups())))
                if kind == "copy" and here[-1][1][0] not in sizes:
                    raise ValueError(f"no allocation is known where this copies to: {line}")
        if line.endswith("{") and not line.startswith("}"):
            around.append((here, "scf.for" in line))
            here = []
        elif line.startswith("}") and not line.endswith("{") and around:
            inner, (here, is_loop) = here, around.pop()
            if is_loop:
                found |= _overwritten(here, inner, sizes)
            else:
                here += inner
    return found


def _overwritten(before: Steps, loop: Steps, sizes: dict[str, int]) -> set[str]:
    """A tile's buffers take turns; those before the loop were copied ahead."""
    found: set[str] = set()
    unfinished: list[set[tuple[str, int]]] = []
    for n in range(PASSES):
        for kind, names in loop:
            if kind == "product":
                unfinished.append({(name, n % sizes[name]) for name in names if name in sizes})
            elif kind == "wait":
                unfinished = unfinished[max(len(unfinished) - int(names[0]), 0) :]
            elif names[0] in sizes:
                turn = (n + before.count((kind, names))) % sizes[names[0]]
                found |= {names[0] for reads in unfinished if (names[0], turn) in reads}
    return found
