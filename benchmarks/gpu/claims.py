"""What is claimed of the GPU backends, and what a run of ``make gpu`` says of each claim.

A claim without its numbers is "not run", never met.
"""

from __future__ import annotations

import csv
import functools
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MET, MISSED, NOT_RUN, MEASURED = "met", "missed", "not run", "measured"
OFF, COLLAPSED, BOTH = "7 years off", "collapsed", "forward+backward"
Verdict = tuple[str, str]
Row = dict[str, object]


class Rows:
    """Rows of one run, as read back from its CSV."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = [{key: str(value) for key, value in row.items()} for row in rows]

    def find(self, **wanted: object) -> list[dict[str, str]]:
        text = {key: str(value) for key, value in wanted.items()}
        return [row for row in self.rows if all(row.get(key, "") == t for key, t in text.items())]

    def value(self, **wanted: object) -> float | None:
        """Of the latest such row."""
        found = self.find(**wanted)
        return float(found[-1]["value"]) if found else None

    def time(self, provider: str, N: int, D: int = 128, **other: object) -> float | None:
        wanted = dict(stage="speed", mode=BOTH, dtype="bfloat16", regime=OFF) | other
        if provider == "q @ q.T":
            wanted["mode"] = "forward"
        return self.value(metric="time", provider=provider, N=N, D=D, **wanted)


@dataclass(frozen=True)
class Claim:
    """A sentence, what it requires, and how a run's rows decide: ``(measured, verdict)``."""

    subject: str
    text: str
    required: str
    decide: Callable[[Rows], Verdict]


def _compared(holds: Callable, limit: float, form: str, value: Callable) -> Callable:
    def decide(rows: Rows) -> Verdict:
        found = value(rows)
        if found is None:
            return "", NOT_RUN
        return form.format(found), MET if holds(found, limit) else MISSED

    return decide


at_most, at_least = (functools.partial(_compared, holds) for holds in (operator.le, operator.ge))


def ratio(above: Callable, below: Callable) -> Callable[[Rows], float | None]:
    """Of two values of one run."""

    def value(rows: Rows) -> float | None:
        a, b = above(rows), below(rows)
        return None if a is None or b is None else a / max(b, 1e-12)

    return value


def time(provider: str, N: int, D: int = 128, **other: object) -> Callable[[Rows], float | None]:
    return lambda rows: rows.time(provider, N, D, **other)


def speed_up(other: str, N: int, D: int = 128, **where: object) -> Callable[[Rows], float | None]:
    return ratio(time(other, N, D, **where), time("triton", N, D, **where))


def share(other: str, N: int, D: int = 128, **where: object) -> Callable[[Rows], float | None]:
    return ratio(time("triton", N, D, **where), time(other, N, D, **where))


def tests(stage: str, *functions: str) -> Callable[[Rows], Verdict]:
    """All tests of those names (all of the stage where none is named) passed, one at the least."""

    def decide(rows: Rows) -> Verdict:
        counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
        for row in rows.find(stage=stage):
            if row["metric"] in counts and (not functions or row["case"].startswith(functions)):
                counts[row["metric"]] += 1
        if not counts["passed"] + counts["failed"]:
            return "", NOT_RUN
        text = ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n)
        if rows.find(stage=stage, metric="cut off"):
            return f"{text}; cut off", MISSED if counts["failed"] else NOT_RUN
        return text, MISSED if counts["failed"] else MET

    return decide


def sanitizer(backend: str) -> Callable[[Rows], Verdict]:
    def decide(rows: Rows) -> Verdict:
        found = rows.find(stage="sanitizer", provider=backend)
        is_caught = bool(rows.find(stage="sanitizer", metric="caught"))
        ran = [row for row in found if row["metric"] in ("clean", "failed")]
        if not is_caught or not any("memcheck" in row["case"] for row in ran):
            return "; ".join(row["note"] for row in found)[:40], NOT_RUN
        text = ", ".join(f"{row['case'].split()[-1]} {row['metric']}" for row in ran)
        return text, MISSED if any(row["metric"] == "failed" for row in ran) else MET

    return decide


def dense_rate(D: int) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        t = rows.time("triton", 65_536, D, regime=COLLAPSED)
        return None if t is None else 6 * 65_536**2 * D / t / 1e12

    return value


def wide_share(rows: Rows) -> float | None:
    """FLOP of the visited pairs, one product forward and two backward, over the product's rate."""
    where = dict(stage="speed", metric="visited pairs", D=2048)
    forward, backward = (rows.value(mode=mode, **where) for mode in ("forward", "backward"))
    t, rate = rows.time("triton", 16_384, 2048), rows.value(metric="TFLOP/s")
    if None in (forward, backward, t, rate):
        return None
    return 2 * 2048 * (forward + 2 * backward) / t / 1e12 / max(rate, 1e-12)


def memory_share(rows: Rows) -> float | None:
    peak = rows.value(stage="speed", metric="memory", provider="triton", N=2**20, D=128)
    return None if peak is None else peak / (2 * 2**20 * 128)


def training(N: int) -> Callable[[Rows], Verdict]:
    def decide(rows: Rows) -> Verdict:
        where = dict(stage="train", N=N)
        found = {
            (provider, metric): rows.value(provider=provider, metric=metric, **where)
            for provider in ("fused", "eager")
            for metric in ("time", "memory")
        }
        if None in found.values():
            return "", NOT_RUN
        parts = [
            f"{found[p, 'time'] * 1e3:.2f} ms {found[p, 'memory'] / 2**20:.0f} MiB"
            for p in ("fused", "eager")
        ]
        return " / ".join(parts), MEASURED

    return decide


def _small(mode: str, name: str) -> list[Claim]:
    return [
        Claim(
            "triton", f"N={n}: time over careful eager{name}", "≤ 0.25",
            at_most(0.25, "{:.3f}", share("eager", n, mode=mode)),
        )
        for n in (128, 256, 512)
    ]  # fmt: skip


CLAIMS = [
    Claim("triton", "every dtype and regime agrees with float64", "all pass",
          tests("tests", "test_agrees_with", "test_float32_follows", "test_vector_labels",
                "test_small_temperature")),
    Claim("triton", "250 repeats have the same bits", "all pass", tests("tests", "test_repeats")),
    Claim("triton", "no host synchronisation, and one would show", "all pass",
          tests("tests", "test_no_host", "test_a_synchronisation")),
    Claim("triton", "a graph's replay equals the call", "all pass",
          tests("tests", "test_cuda_graph")),
    Claim("triton", "non-finite input shows, strides, memory", "all pass",
          tests("tests", "test_non_finite", "test_row_strides", "test_memory")),
    Claim("triton", "compute-sanitizer: clean, planted fault caught", "clean", sanitizer("triton")),
    Claim("triton", "N=16384 D=128: speed of careful eager", "≥ 100×",
          at_least(100, "{:.0f}×", speed_up("eager", 16_384))),
    Claim("triton", "N=65536 D=128: time over one q @ q.T", "≤ 0.5",
          at_most(0.5, "{:.3f}", share("q @ q.T", 65_536))),
    Claim("triton", "N=65536 D=512: time over one q @ q.T", "≤ 0.5",
          at_most(0.5, "{:.3f}", share("q @ q.T", 65_536, 512))),
    Claim("triton", "collapsed, N=65536 D=128: 6·N²·D over time", "≥ 350 TFLOP/s",
          at_least(350, "{:.0f} TFLOP/s", dense_rate(128))),
    Claim("triton", "collapsed, N=65536 D=512: 6·N²·D over time", "≥ 450 TFLOP/s",
          at_least(450, "{:.0f} TFLOP/s", dense_rate(512))),
    *(Claim("triton", f"collapsed, D={d}: time over a dense pass", "≤ 1.15",
            at_most(1.15, "{:.3f}", share("dense fused", 65_536, d, regime=COLLAPSED)))
      for d in (128, 512)),
    Claim("triton", "N=16384 D=2048: rate on visited pairs over mm's", "≥ 0.60",
          at_least(0.6, "{:.3f}", wide_share)),
    Claim("triton", "N=1048576 D=128: one step", "< 1 s",
          at_most(1, "{:.3f} s", time("triton", 2**20))),
    Claim("triton", "N=1048576 D=128: extra memory over the features", "< 4",
          at_most(4, "{:.2f}", memory_share)),
    *_small(BOTH, ""),
    *_small("cuda graph", ", both as graphs"),
    *(Claim("triton", f"N={n} D=128: speed of {name}", "≥ 5×",
            at_least(5, "{:.1f}×", speed_up(name, n, stage="compare")))
      for name in ("dense fused", "memeff", "siglip-kernel") for n in (16_384, 65_536)),
    Claim("cuda", "csrc/ is built by nvcc there", "built",
          lambda rows: (f"{rows.value(stage='build', metric='wall seconds') or 0:.0f} s", MET)
          if rows.find(stage="build", metric="built") else ("", NOT_RUN)),
    Claim("cuda", "its tests: values, bits, no sync, graphs", "all pass", tests("cuda-tests")),
    Claim("cuda", "compute-sanitizer: clean, planted fault caught", "clean", sanitizer("cuda")),
    *(Claim("cuda", f"N=16384 D=128 {dtype}: time over Triton's", f"≤ {limit}",
            at_most(limit, "{:.2f}",
                    ratio(time("cuda", 16_384, stage="cuda", dtype=dtype),
                          time("triton", 16_384, stage="cuda", dtype=dtype))))
      for dtype, limit in (("bfloat16", 3), ("float32", 2))),
    *(Claim("pytorch", text, "all pass", tests("integration", *names))
      for text, names in (
          ("opcheck of both operators", ("test_opcheck",)),
          ("torch.compile: inductor, fullgraph, dynamic", ("test_inductor",)),
          ("autocast and GradScaler", ("test_autocast", "test_a_gradient_scaler", "test_model")),
          ("streams and graphs", ("test_work_stays", "test_a_graph")),
          ("second derivative's error, func.grad", ("test_second", "test_func_grad")),
          ("memory bank and gradient cache", ("test_a_memory_bank", "test_a_gradient_cache")),
          ("group= with NCCL on one rank", ("test_a_group",)),
          ("deterministic mode", ("test_deterministic",)),
      )),
    *(Claim("pytorch", f"training, batch {n}: fused / careful eager", "measured", training(n))
      for n in (128, 1024, 16_384)),
]  # fmt: skip


def decided(rows: Rows, is_rehearsal: bool = False) -> list[dict[str, object]]:
    """Every claim with what was measured; a rehearsal's numbers decide nothing."""
    found = []
    for claim in CLAIMS:
        measured, verdict = claim.decide(rows)
        if is_rehearsal and verdict != NOT_RUN:
            measured, verdict = "", "rehearsed"
        found.append(
            dict(subject=claim.subject, claim=claim.text, required=claim.required,
                 measured=measured, verdict=verdict)
        )  # fmt: skip
    return found


def table(found: list[dict[str, object]]) -> str:
    lines = [f"{'':9}{'claim':<51}{'required':<15}{'measured':<34}verdict"]
    lines += [
        f"{row['subject']:<9}{row['claim']:<51}{row['required']:<15}{row['measured']:<34}"
        f"{row['verdict']}"
        for row in found
    ]
    verdicts = [row["verdict"] for row in found]
    lines.append(", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)))
    return "\n".join(lines)


def write(path: Path, found: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


def read(path: Path) -> Rows:
    with path.open(newline="") as file:
        return Rows(list(csv.DictReader(file)))


if __name__ == "__main__":
    print(table(decided(read(Path(sys.argv[1])))))
