"""What is claimed of the GPU backends, and what a run of ``make gpu`` says of each claim.

A claim without its numbers is "not run", never met. Beyond 4,096 rows a speed is the device's, of
steps as CUDA graphs: steps in a row wait for their host there, whatever the kernels do. What a user
then gets of it in eager mode is a claim of its own.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MET, MISSED, NOT_RUN = "met", "missed", "not run"
OFF, COLLAPSED, BOTH, GRAPH = "7 years off", "collapsed", "forward+backward", "cuda graph"
BF16, F32 = "bfloat16", "float32"
Verdict = tuple[str, str]
Row = dict[str, object]


class Rows:
    """Rows of one run, as read back from its CSV."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = [{key: str(value) for key, value in row.items()} for row in rows]

    def find(self, **wanted: object) -> list[dict[str, str]]:
        text = {key: str(value) for key, value in wanted.items()}
        return [row for row in self.rows if all(row.get(key, "") == t for key, t in text.items())]

    def value(self, **wanted: object) -> float:
        """Of the latest such row; an IndexError where there is none."""
        return float(self.find(**wanted)[-1]["value"])

    def time(self, provider: str, N: int, D: int = 128, **other: object) -> float:
        mode = "forward" if provider == "q @ q.T" else BOTH
        wanted = dict(stage="speed", mode=mode, dtype=BF16, regime=OFF) | other
        return self.value(metric="time", provider=provider, N=N, D=D, **wanted)


Value = Callable[[Rows], float]


@dataclass(frozen=True)
class Claim:
    """A sentence, what it requires, and how a run's rows decide: ``(measured, verdict)``, or a
    LookupError where they have not its numbers.
    """

    subject: str
    text: str
    required: str
    decide: Callable[[Rows], Verdict]


def limited(text: str, sign: str, limit: float, unit: str, value: Value, form: str = ".3f",
            subject: str = "triton") -> Claim:  # fmt: skip
    """A value that must be ``"≤"`` or ``"≥"`` the limit."""

    def decide(rows: Rows) -> Verdict:
        found = value(rows)
        is_met = found <= limit if sign == "≤" else found >= limit
        return f"{found:{form}}{unit}", MET if is_met else MISSED

    return Claim(subject, text, f"{sign} {limit:g}{unit}", decide)


def time(provider: str, N: int, D: int = 128, **other: object) -> Value:
    return lambda rows: rows.time(provider, N, D, **other)


def ratio(above: Value, below: Value) -> Value:
    return lambda rows: above(rows) / max(below(rows), 1e-12)


def speed_up(other: str, N: int, **where: object) -> Value:
    return ratio(time(other, N, **where), time("triton", N, **where))


def share(other: str, N: int, D: int = 128, **where: object) -> Value:
    return ratio(time("triton", N, D, **where), time(other, N, D, **where))


def dense_rate(D: int) -> Value:
    """TFLOP/s of a step that visits every pair, of one product forward and two backward."""
    step = time("triton", 65_536, D, regime=COLLAPSED, mode=GRAPH)
    return ratio(lambda rows: 6 * 65_536**2 * D / 1e12, step)


def wide_share(rows: Rows) -> float:
    """FLOP of the pairs that a step's three products visit, over a large product's rate."""
    where = dict(stage="speed", metric="visited pairs", D=2048)
    pairs = sum(rows.value(mode=mode, **where) for mode in ("forward", "scores", "product"))
    seconds = rows.time("triton", 16_384, 2048, mode=GRAPH)
    rate = 2 * 2048 * pairs / seconds / 1e12
    return rate / max(rows.value(metric="TFLOP/s"), 1e-12)


def milliseconds(N: int, D: int = 128, **where: object) -> Value:
    """Of a step on the device alone."""
    return lambda rows: 1e3 * rows.time("triton", N, D, mode=GRAPH, **where)


def once_share(N: int, D: int = 128, **where: object) -> Value:
    """Each pair taken once, over every row's pairs for itself, in turns."""
    once, for_each = (
        time("triton", N, D, stage="choices", mode=f"{GRAPH}, {way}", **where)
        for way in ("once", "sorted")
    )
    return ratio(once, for_each)


def replays(rows: Rows) -> Verdict:
    """Of large batches: whether all had the same bits."""
    found = rows.find(stage="choices", metric="equal replays")
    failed = rows.find(stage="choices", metric="failed")
    wrong = [row for row in failed if not row.get("case", "").startswith("kernels")]  # profiled
    wrong += rows.find(stage="choices", metric="wrong")
    if not found + wrong:
        return "", NOT_RUN
    return f"{len(found)} ways, {len(wrong)} wrong", MISSED if wrong else MET


def memory_share(rows: Rows) -> float:
    peak = rows.value(stage="speed", metric="memory", provider="triton", N=2**20, D=128)
    return peak / (2 * 2**20 * 128)


def tests(subject: str, text: str, stage: str, *functions: str) -> Claim:
    """All tests of those names (all of the stage where none is named) passed, one at the least."""

    def decide(rows: Rows) -> Verdict:
        outcomes = ("passed", "failed", "skipped")
        found = [row for row in rows.find(stage=stage) if row["metric"] in outcomes]
        counts = Counter(
            row["metric"] for row in found if not functions or row["case"].startswith(functions)
        )
        if not counts["passed"] + counts["failed"]:
            return "", NOT_RUN
        measured = ", ".join(f"{counts[name]} {name}" for name in outcomes if counts[name])
        if rows.find(stage=stage, metric="cut off"):
            return f"{measured}; cut off", MISSED if counts["failed"] else NOT_RUN
        return measured, MISSED if counts["failed"] else MET

    return Claim(subject, text, "all pass", decide)


def sanitizer(backend: str) -> Claim:
    def decide(rows: Rows) -> Verdict:
        found = rows.find(stage="sanitizer", provider=backend)
        ran = [row for row in found if row["metric"] in ("clean", "failed")]
        is_caught = bool(rows.find(stage="sanitizer", metric="caught"))
        if not is_caught or not any("memcheck" in row["case"] for row in ran):
            return "; ".join(row["note"] for row in found)[:40], NOT_RUN
        text = ", ".join(f"{row['case'].split()[-1]} {row['metric']}" for row in ran)
        return text, MISSED if any(row["metric"] == "failed" for row in ran) else MET

    return Claim(backend, "compute-sanitizer: clean, planted fault caught", "clean", decide)


def built(rows: Rows) -> Verdict:
    rows.value(stage="build", metric="built")
    return f"{rows.value(stage='build', metric='wall seconds'):.0f} s", MET


CLAIMS = [
    *(tests("triton", text, "tests", *names) for text, names in {
        "every dtype and regime agrees with float64": (
            "test_agrees_with", "test_float32_follows", "test_vector_labels",
            "test_small_temperature", "test_constant", "test_sweeps_in_turns"),
        "250 repeats have the same bits": ("test_repeats",),
        "no host synchronisation, and one would show": ("test_no_host", "test_a_synchronisation"),
        "a graph's replay equals the call": ("test_cuda_graph",),
        "non-finite input shows, strides, memory": (
            "test_non_finite", "test_row_strides", "test_memory"),
    }.items()),
    sanitizer("triton"),
    limited("N=16384: speed of careful eager, both as graphs", "≥", 100, "×",
            speed_up("eager", 16_384, mode=GRAPH), ".0f"),
    limited("N=16384: speed of careful eager, with the host", "≥", 10, "×",
            speed_up("eager", 16_384), ".0f"),
    *(limited(f"N=65536 D={d}: time over q @ q.T, graphs", "≤", 0.5, "",
              share("q @ q.T", 65_536, d, mode=GRAPH)) for d in (128, 512)),
    *(limited(f"N={n} D={d} {dtype}: graph's time", "≤", limit, " ms",
              milliseconds(n, d, dtype=dtype))
      for n, d, dtype, limit in (
          (65_536, 128, BF16, 0.65), (65_536, 512, BF16, 2.6), (16_384, 128, BF16, 0.15),
          (16_384, 512, BF16, 0.32), (16_384, 2048, BF16, 0.85), (65_536, 128, F32, 5),
          (2**20, 128, BF16, 125),
      )),
    Claim("triton", "large batches: replays' bits, ways agree", "all", replays),
    *(limited(f"N={n} D={d} {dtype}: once over both sides", "≤", 1, "",
              once_share(n, d, dtype=dtype))
      for n, d, dtype in ((65_536, 128, BF16), (65_536, 512, BF16), (16_384, 512, BF16),
                          (16_384, 2048, BF16), (65_536, 128, F32))),
    *(limited(f"collapsed, N=65536 D={d}: 6·N²·D over graph's time", "≥", 480, " TFLOP/s",
              dense_rate(d), ".0f") for d in (128, 512)),
    limited("collapsed, D=128: time over a dense pass, graphs", "≤", 1.15, "",
            share("dense fused", 65_536, regime=COLLAPSED, mode=GRAPH)),
    limited("N=16384 D=2048: graph's rate on visited pairs / mm", "≥", 0.6, "", wide_share),
    limited("N=1048576 D=128: extra memory over the features", "≤", 4, "", memory_share, ".2f"),
    *(limited(f"N={n}: time over careful eager{name}", "≤", 0.25, "", share("eager", n, mode=mode))
      for mode, name in ((BOTH, ""), (GRAPH, ", both as graphs")) for n in (128, 256, 512)),
    *(limited(f"N={n}: speed of {name}, both as graphs", "≥", 5, "×",
              speed_up(name, n, stage="compare", mode=GRAPH), ".1f")
      for name in ("dense fused", "memeff", "siglip-kernel") for n in (16_384, 65_536)),
    Claim("cuda", "csrc/ is built by nvcc there", "built", built),
    tests("cuda", "its tests: values, bits, no sync, graphs", "cuda-tests"),
    sanitizer("cuda"),
    *(limited(f"N=16384 {dtype}: time over Triton's, graphs", "≤", limit, "",
              ratio(*(time(p, 16_384, stage="cuda", dtype=dtype, mode=GRAPH)
                      for p in ("cuda", "triton"))),
              ".2f", "cuda") for dtype, limit in ((BF16, 3), (F32, 2))),
    *(tests("pytorch", text, "integration", *names) for text, names in {
        "opcheck of both operators": ("test_opcheck",),
        "torch.compile: inductor, fullgraph, dynamic": ("test_inductor",),
        "autocast and GradScaler": ("test_autocast", "test_a_gradient_scaler", "test_model"),
        "streams and graphs": ("test_work_stays", "test_a_graph"),
        "second derivative's error, func.grad": ("test_second", "test_func_grad"),
        "memory bank and gradient cache": ("test_a_memory_bank", "test_a_gradient_cache"),
        "group= with NCCL on one rank": ("test_a_group",),
        "deterministic mode": ("test_deterministic",),
    }.items()),
]  # fmt: skip


def decided(rows: Rows, is_rehearsal: bool = False) -> list[dict[str, str]]:
    """Every claim with what was measured; a rehearsal's numbers decide nothing."""
    found = []
    for claim in CLAIMS:
        try:
            measured, verdict = claim.decide(rows)
        except LookupError:
            measured, verdict = "", NOT_RUN
        if is_rehearsal and verdict != NOT_RUN:
            measured, verdict = "", "rehearsed"
        found.append(
            dict(subject=claim.subject, claim=claim.text, required=claim.required,
                 measured=measured, verdict=verdict)
        )  # fmt: skip
    return found


def table(found: list[dict[str, str]]) -> str:
    form = "{subject:<9}{claim:<51}{required:<15}{measured:<34}{verdict}"
    lines = [form.format_map({name: name for name in found[0]} | {"subject": ""})]
    lines += [form.format_map(row) for row in found]
    counts = Counter(row["verdict"] for row in found)
    return "\n".join([*lines, ", ".join(f"{n} {verdict}" for verdict, n in counts.items())])


def read(path: Path) -> Rows:
    with path.open(newline="") as file:
        return Rows(list(csv.DictReader(file)))


if __name__ == "__main__":
    print(table(decided(read(Path(sys.argv[1])))))
