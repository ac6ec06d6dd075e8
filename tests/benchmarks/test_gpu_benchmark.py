"""``make gpu`` without a GPU: limits, restarts, rows, verdicts."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import report
from benchmarks.gpu import __main__ as main
from benchmarks.gpu import claims, device, plan, rows, steps
from benchmarks.gpu.processes import LINE_SIZE, Record, Task, run_together
from benchmarks.rows import ROOT

#: Longer than any test waits.
FOREVER = 300


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(tmp_path)


def run(record: Record, code: str, seconds: float = 60.0) -> None:
    def command(seconds: float, done: list[str]) -> list[str]:
        return [sys.executable, "-u", "-c", code, *done]

    run_together([Task("stage", command)], seconds, record)


def metrics(record: Record) -> list[tuple[str, str]]:
    return [(row.get("case", ""), row["metric"]) for row in record.rows]


ROW_OF = """
import json, os, subprocess, sys, time
def row(case, metric="time"):
    print("row: " + json.dumps(dict(stage="stage", case=case, metric=metric, value=1.5)))
"""


def test_a_stage_that_hangs_is_cut_off_with_its_children_and_keeps_its_rows(record):
    code = f"""{ROW_OF}
print("a line of the log")
print("case: one")
row("one")
subprocess.run(["sleep", "{FOREVER}"])
"""
    start = time.monotonic()
    run(record, code, seconds=8.0)
    assert time.monotonic() - start < 60
    assert metrics(record) == [("one", "time"), ("", "cut off"), ("", "stage seconds")]
    assert "in one" in record.rows[1]["note"]
    text = (record.out / "rows.csv").read_text()
    assert "stage,one,,,time,,,,,1.5" in text and "cut off" in text
    assert "stage: a line of the log" in (record.out / "log.txt").read_text()


def test_a_stage_whose_process_dies_goes_on_behind_the_case_that_ended_it(record):
    code = f"""{ROW_OF}
for case in ("one", "two", "three"):
    if case in sys.argv[1:]:
        continue
    print("case: " + case)
    if case == "two":
        os._exit({rows.BROKEN})
    row(case)
"""
    run(record, code)
    assert metrics(record)[:-1] == [("one", "time"), ("two", "crashed"), ("three", "time")]
    assert any("two" in problem for problem in record.problems())


def test_a_process_that_dies_before_any_case_is_not_started_again(record):
    run(record, "import os; os._exit(5)")
    assert metrics(record) == [("", "crashed"), ("", "stage seconds")]


def test_stages_run_side_by_side_and_one_that_fails_leaves_the_other_alone(record):
    def task(name: str, code: str) -> Task:
        return Task(name, lambda *_: [sys.executable, "-u", "-c", ROW_OF + code])

    both = [task("good", "time.sleep(1); row('good')"), task("bad", "raise SystemExit(3)")]
    run_together(both, 60.0, record)
    assert ("good", "time") in metrics(record) and ("", "crashed") in metrics(record)


def test_half_a_row_and_endless_output_go_to_the_log(record):
    run(record, f"print('row: {{\"stage\": '); print('x' * 10 ** 7); print('é')\n{ROW_OF}\nrow('')")
    assert ("", "time") in metrics(record)
    log = (record.out / "log.txt").read_text()
    assert 'row: {"stage": ' in log and len(log) < 10 * LINE_SIZE


def test_lines_of_a_table_go_to_its_file(record):
    run(record, "print('table: A = {'); print('table:     1,')")
    assert (record.out / "triton_table.txt").read_text() == "A = {\n    1,\n"


def test_a_failing_case_leaves_the_later_ones_alone_and_the_deadline_skips_the_rest(capsys):
    stage = rows.Stage("name", 100.0, done=["done"])

    def fail() -> None:
        raise ValueError("why\nand more")

    def late() -> None:
        stage.add("time", 0.123456789)
        stage.deadline = 0.0

    cases = {"done": fail, "bad": fail, "good": late, "never": fail}
    assert stage.run(cases) == 1
    lines = capsys.readouterr().out.splitlines()
    written = [line for line in lines if line.startswith(rows.ROW)]
    assert [line for line in lines if line.startswith(rows.CASE)] == ["case: bad", "case: good"]
    assert '"case": "bad", "metric": "failed", "value": 1, "note": "ValueError: why"' in written[0]
    assert (
        '"value": 0.12346' in "".join(written)
        and '"case": "never", "metric": "not run"' in written[-1]
    )


def test_a_tool_that_outlasts_the_deadline_ends_with_the_program_that_it_started():
    """As compute-sanitizer does with what it watches, which holds the output open."""
    stage = rows.Stage("name", 3.0)
    tool = f"import subprocess; print('begun', flush=True); subprocess.run(['sleep', '{FOREVER}'])"
    start = time.monotonic()
    status, output = stage.output_of(stage.start([sys.executable, "-c", tool]))
    assert time.monotonic() - start < 30
    assert status < 0 and output.startswith("begun") and "cut off" in output


def test_a_lost_context_ends_the_process_for_a_restart(monkeypatch):
    monkeypatch.setattr(rows.device, "is_broken", lambda: True)
    stage = rows.Stage("name", 100.0)
    assert stage.run({"bad": lambda: 1 / 0, "next": lambda: None}) == rows.BROKEN


def test_a_test_that_ends_the_context_leaves_the_others_a_fresh_process(record, tmp_path):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "conftest.py").write_text(
        "import os\nfrom benchmarks.gpu import device\n"
        "device.is_broken = lambda: 'PYTEST_XDIST_WORKER' in os.environ\n"
    )
    tests = "def test_a(): assert 0, 'why'\ndef test_b(): pass\ndef test_c(): pass\n"
    (tmp_path / "test_faults.py").write_text(tests)
    command = [*plan.pytest_command([str(tmp_path / "test_faults.py")], 1), "-n", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    run_together([Task("tests", lambda *_: command, environment)], 280.0, record)
    found = [(row["case"], row["metric"]) for row in record.rows if row.get("provider")]
    assert found.count(("test_a", "failed")) == 2  # what it says, and that its process ended
    assert {("test_b", "passed"), ("test_c", "passed")} < set(found)
    assert any("AssertionError: why" in row["note"] for row in record.rows if "note" in row)


def test_two_runs_of_all_stages_fit_a_quarter_of_an_hour():
    seconds = plan.planned(plan.NAMES, plan.LIMIT - plan.PICTURE)
    assert sum(seconds.values()) <= plan.LIMIT - plan.PICTURE
    assert 2 * plan.LIMIT <= 15 * 60 - 100  # the machine's start
    shorter = plan.planned(plan.NAMES, 100.0)
    assert sum(shorter.values()) == pytest.approx(100) and list(shorter) == sorted(shorter)


def test_a_run_says_what_it_plans_and_stops_at_its_limit(monkeypatch, record, capsys):
    """A stage gets the time that earlier ones left; what does not fit is not run, and says so."""
    now = [0.0]
    monkeypatch.setattr(main.time, "monotonic", lambda: now[0])
    given = {}

    def take(tasks, seconds, *_):
        given[tasks[0].name] = seconds
        now[0] += seconds

    monkeypatch.setattr(main, "run_together", take)
    names = ["speed", "compare", "tune"]
    of = {stage.name: stage.seconds for stage in plan.STAGES}
    main.run_stages(names, record, 100.0)
    out = capsys.readouterr().out
    assert now[0] <= 100.0 - plan.PICTURE and list(given) == names
    share = (100 - plan.PICTURE) / sum(of[name] for name in names)
    assert f"{share * of['speed']:6.0f} s  speed" in out
    main.run_stages(["speed"], record, plan.PICTURE + plan.LEAST - 1)
    assert [row["note"] for row in record.rows if row["metric"] == "not run"] == ["no time left"]


def test_every_file_of_gpu_tests_belongs_to_a_stage():
    of_stages = {file for files, *_ in plan.TESTS.values() for file in files}
    assert {f"tests/gpu/{file.name}" for file in (ROOT / "tests/gpu").glob("test_*")} < of_stages


def test_a_graphs_time_is_that_of_replays_in_a_row():
    """Which hide the start of the first, as far as 10 ms go."""
    found = {t: device.steps_in_a_row(t) for t in (2e-5, 1e-3, 4e-3, 0.13)}
    assert list(found.values()) == [20, 10, 2, 1]


def test_stages_know_which_others_run(monkeypatch, record):
    known = []
    monkeypatch.setattr(main, "run_together", lambda tasks, *_: known.extend(tasks))
    main.run_stages(["warm", "speed"], record, 100.0)
    assert [task.environment[rows.CHOSEN] for task in known] == ["warm speed"] * 2


def test_without_a_gpu_nothing_runs_and_nothing_is_claimed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.main(["--out", str(tmp_path / "out")]) == 0
    assert "not run: no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_stages_of_cuda_need_no_triton():
    stages = ", ".join(f"benchmarks.gpu.stages.{name}" for name in ("speed", "checks", "counters"))
    code = f"import sys; sys.modules['triton'] = None; import {stages}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def time_row(provider: str, value: float, **other: object) -> dict[str, object]:
    return dict(
        stage="speed", metric="time", provider=provider, mode=claims.BOTH, N=16_384, D=128,
        dtype="bfloat16", regime=claims.OFF, value=value,
    ) | other  # fmt: skip


def verdict(text: str, rows: list[dict[str, object]]) -> tuple[str, str]:
    (row,) = [row for row in claims.decided(claims.Rows(rows)) if row["claim"].startswith(text)]
    return row["measured"], row["verdict"]


def test_verdicts_of_ratios():
    claim = "N=16384: speed of careful eager, both as graphs"
    with_host = "N=16384: speed of careful eager, with the host"
    steps = [time_row("triton", 1e-3), time_row("eager", 0.0163)]
    graphs = [row | {"mode": claims.GRAPH} for row in steps]
    assert verdict(claim, []) == verdict(claim, steps) == verdict(claim, graphs[:1])
    assert verdict(claim, steps) == ("", "not run")
    assert verdict(with_host, steps) == ("16×", "met")
    assert verdict(with_host, graphs) == ("", "not run")
    assert verdict(claim, steps + graphs) == ("16×", "missed")
    graphs[0]["value"] = 1e-4
    assert verdict(claim, steps + graphs) == ("163×", "met")
    other_run = [row | {"stage": "grid"} for row in graphs]
    assert verdict(claim, other_run) == ("", "not run")
    few = [time_row(p, t, N=256, mode="cuda graph") for p, t in (("triton", 1), ("eager", 5))]
    assert verdict("N=256: time over careful eager, both", few) == ("0.200", "met")
    assert claims.decided(claims.Rows(graphs), True)[6]["verdict"] == "rehearsed"


def test_verdicts_of_rates_and_memory():
    t = 6 * 65_536**2 * 128 / 400e12
    collapsed = time_row("triton", t, N=65_536, regime=claims.COLLAPSED, mode=claims.GRAPH)
    assert verdict("collapsed, N=65536 D=128: 6", [collapsed]) == ("400 TFLOP/s", "missed")
    wide = dict(stage="speed", metric="visited pairs", D=2048, value=1e8)
    rows = [
        *(wide | {"mode": mode} for mode in ("forward", "scores", "product")),
        time_row("triton", 2 * 2048 * 3e8 / 400e12, D=2048, mode=claims.GRAPH),
        dict(stage="speed", metric="TFLOP/s", value=800.0),
    ]
    assert verdict("N=16384 D=2048: graph's rate", rows) == ("0.500", "missed")
    f32 = time_row("triton", 4e-3, N=65_536, dtype="float32", mode=claims.GRAPH)
    assert verdict("N=65536 D=128 float32: graph's time", [f32]) == ("4.000 ms", "met")
    memory = dict(stage="speed", metric="memory", provider="triton", N=2**20, D=128, value=2**30)
    assert verdict("N=1048576 D=128: extra", [memory]) == ("4.00", "met")


def test_verdicts_of_choices_and_of_the_devices_time():
    graph = time_row("triton", 6e-4, N=65_536, mode=claims.GRAPH)
    claim = "N=65536 D=128 bfloat16: graph's time"
    assert verdict(claim, [graph]) == ("0.600 ms", "met")
    assert verdict(claim, [graph | {"value": 7e-4}]) == ("0.700 ms", "missed")
    once, for_each = (
        graph | {"stage": "choices", "mode": f"cuda graph, {way}", "value": t}
        for way, t in (("once", 6e-4), ("sorted", 8e-4))
    )
    claim = "N=65536 D=128 bfloat16: once over"
    assert verdict(claim, [once, graph]) == ("", "not run")
    assert verdict(claim, [once, for_each]) == ("0.750", "met")
    assert verdict(claim, [once | {"value": 9e-4}, for_each])[1] == "missed"
    equal = dict(stage="choices", metric="equal replays", value=15)
    claim = "large batches: replays"
    assert verdict(claim, [graph]) == ("", "not run")
    assert verdict(claim, [equal, equal]) == ("2 ways, 0 wrong", "met")
    assert verdict(claim, [equal, equal | {"metric": "wrong"}]) == ("1 ways, 1 wrong", "missed")
    failed = equal | {"metric": "failed", "case": "N=65536"}
    assert verdict(claim, [equal, failed]) == ("1 ways, 1 wrong", "missed")
    assert verdict(claim, [equal, failed | {"case": "kernels, N=65536"}])[1] == "met"


def test_verdicts_of_tests_and_sanitizer():
    def result(case: str, metric: str) -> dict[str, object]:
        return dict(stage="tests", case=case, metric=metric, value=1)

    claim = "250 repeats"
    skipped = [result("test_repeats_have_the_same_bits", "skipped")]
    assert verdict(claim, skipped) == ("", "not run")
    passed = [*skipped, result("test_repeats_have_the_same_bits", "passed")]
    assert verdict(claim, passed) == ("1 passed, 1 skipped", "met")
    assert verdict(claim, [*passed, result("test_repeats_x", "failed")])[1] == "missed"
    assert verdict(claim, [*passed, result("", "cut off")])[1] == "not run"

    clean = dict(stage="sanitizer", provider="triton", case="triton memcheck", metric="clean")
    caught = dict(stage="sanitizer", case="planted fault", metric="caught")
    claim = "compute-sanitizer: clean"
    rows = [row | {"value": 1, "note": ""} for row in (clean, caught)]
    decided = [
        [r["verdict"] for r in claims.decided(claims.Rows(some)) if claim in r["claim"]]
        for some in (rows, rows[:1], [rows[0] | {"metric": "failed"}, rows[1]])
    ]
    assert decided == [["met", "not run"], ["not run", "not run"], ["missed", "not run"]]


def sanitized(record: Record, of_fault: str, of_kernels: str, seconds: float = 60.0) -> None:
    """A run of the stage with programs in place of compute-sanitizer's, as its parent reads it."""
    code = f"""
import os, subprocess, sys
os.environ["CONR_REHEARSE"] = "1"
from benchmarks.gpu import rows
from benchmarks.gpu.stages import checks
plain = subprocess.Popen
codes = dict.fromkeys(("triton-kernels", "cuda-kernels"), {of_kernels!r})
codes["planted-fault"] = {of_fault!r}
def start(command, **options):
    (name,) = set(codes) & set(command)
    return plain([sys.executable, "-c", codes[name]], **options)
subprocess.Popen = start
sys.exit(checks.sanitizer(rows.Stage("sanitizer", {seconds})))
"""
    run(record, code)


RAISES = 'print(\'row: {"stage": "planted-fault", "metric": "failed", "value": 1}\'); '
RAN = "print('ran every regime')"


def test_the_planted_faults_own_error_is_no_failure(record):
    sanitized(record, RAISES + "raise SystemExit(9)", RAN)
    assert ("planted fault", "caught") in metrics(record)
    assert ("triton memcheck", "clean") in metrics(record) and record.problems() == []


def test_a_program_that_fails_under_the_sanitizer_is_a_failure(record):
    sanitized(record, RAISES + "raise SystemExit(9)", RAISES + "raise SystemExit(1)")
    assert ("triton memcheck", "failed") in metrics(record)
    assert [row["stage"] for row in record.rows if row["metric"] == "failed"] == 2 * ["sanitizer"]


@pytest.mark.parametrize("report, metric", [("", "not run"), ("Invalid __global__ w", "failed")])
def test_a_sanitizer_that_is_cut_off_says_how_far_it_came(record, report, metric):
    """And is a failure where it had found a fault by then."""
    code = f"import time; print('ran N=33', flush=True); print({report!r}, flush=True); "
    sanitized(record, RAISES + "raise SystemExit(9)", f"{code}time.sleep({FOREVER})", 8.0)
    (row,) = [row for row in record.rows if row.get("case") == "triton memcheck"]
    assert row["metric"] == metric and "1 of 18 regimes" in row["note"]
    assert "cut off" not in [row["metric"] for row in record.rows]


def test_the_steps_time_and_the_devices_stand_side_by_side():
    row = time_row("triton", 2e-3)
    found = [row, row | {"mode": steps.GRAPH, "value": 1e-3}, row | {"metric": "memory",
             "value": 2**22}]  # fmt: skip
    head, line = steps.table(claims.Rows(found)).splitlines()
    assert head.split()[-5:] == ["step,", "ms", "device,", "ms", "MiB"]
    assert line.split()[-3:] == ["2", "1", "4"]


def test_the_readmes_table_has_ours_beside_eager_and_the_bare_product(tmp_path):
    ours = time_row("triton", 2e-3, commit="0123456789ab")
    found = [ours, ours | {"mode": steps.GRAPH, "value": 1e-3}, time_row("eager", 8e-3),
             time_row("q @ q.T", 5e-4) | {"mode": steps.GRAPH},
             ours | {"metric": "memory", "value": 2**22}]  # fmt: skip
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- GPU figures: how -->\nold\n<!-- end of GPU figures -->\nb\n")
    report.write_figures(readme, "GPU figures", steps.markdown(claims.Rows(found)))
    first, *_, line, _, end, last = readme.read_text().splitlines()
    assert (first, end, last) == ("a", "<!-- end of GPU figures -->", "b")
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3:] == ["2 ms", "**1 ms**", "4.0 MiB", "8 ms", "–", "–", "0.5 ms"]
    found.append(time_row("triton", 2e-3, commit="ba9876543210") | {"D": 64})
    lines = steps.markdown(claims.Rows(found)).splitlines()
    assert [line.strip("| ").split(" | ")[-1] for line in lines[2:]] == ["ba98765", "0123456"]


def test_what_conr_adds_to_a_training_step():
    row = {"stage": "speed", "mode": "training step", "N": 1024}
    found = [
        row | {"provider": name, "metric": metric, "value": value}
        for name, time, memory in (("no ConR", 2e-3, 1), ("fused", 2.5e-3, 2), ("eager", 5e-3, 4))
        for metric, value in (("time", time), ("memory", memory * 2**20))
    ]
    *_, line = steps.training(claims.Rows(found)).splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    expected = ["1,024", "2 ms", "2.5 ms", "0.5 ms", "5 ms", "3 ms", "2.0 MiB", "4.0 MiB"]
    assert cells == expected
    cut_off = [row for row in found if row["provider"] != "eager" or row["metric"] != "time"]
    assert len(steps.training(claims.Rows(cut_off)).splitlines()) == 2
