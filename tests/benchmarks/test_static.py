"""The table of machine code: complete, up to date, and within the targets of the kernels."""

from __future__ import annotations

import contextlib
import csv
import functools
import re
from collections import Counter, defaultdict
from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")


from benchmarks.static import compiled, loops, passes, rank, shipped, table, tiles
from benchmarks.static.machine import MachineCode, machine_code
from benchmarks.static.shipped import CHUNKED, FEW, KEPT, SWEEPS, Call
from conr_kernels.triton_backend import call as call_module
from conr_kernels.triton_backend import launch_dense
from conr_kernels.triton_backend.configs import ARCHITECTURES, BUCKETS, REGISTER_D, TABLE
from conr_kernels.triton_backend.kernels import mirrored
from conr_kernels.variants import PUSHINGS
from tests.helpers.triton_kernels import kernels_of

BOOL = {True, False}
PHIS = {pushing.phi for pushing in PUSHINGS.values()}
#: What each constant of a kernel can be; None: sizes, of which the table of configurations or the
#: shape of the call decides.
CONSTANTS = {
    **dict.fromkeys(
        ("RMSE", "SHIFTED", "INSIDE", "CONFUSED", "SCALED", "WEIGHTED", "UNIT_TERMS", "COUNT_SELF",
         "WEIGHTED_ROWS", "TINY", "SAME", "HAS_KEYS", "HAS_P", "EXACT", "NEGATIVES", "RESCALE",
         "KEPT", "LAST", "IN_HALVES", "LATE", "REDUCED"), BOOL,
    ),
    "PHI": PHIS, "PRECISION": {"tf32", "fp16x3", "ieee"}, "L": {1, 3},
    # Only the interpreter multiplies 16-bit tiles wrongly, and is given labels in float64.
    "UPCAST": {False}, "WIDE": {False},
    "ORDERS": {1, 2}, "APART": {0, 1}, "SWEEPS": {"both", "positives", "negatives"},
    # Statistics of a row: none in forward, five where exponents are shifted.
    "COLUMNS": {0, 3, 5},
    **dict.fromkeys(("D", "D_PAD", "BLOCK", "BLOCK_I", "BLOCK_J", "BLOCK_D", "ROWS", "CHUNK",
                     "BAND_ROWS", "L_PAD", "SLOTS", "BLOCK_K", "PARTS", "RUNS")),
}  # fmt: skip
#: Constants that a kernel never sees with all their values, and why.
EXCEPTIONS = {
    # Few rows are never copied, in halves neither.
    **{
        (f"conr_{name}_kernel", "PRECISION"): {"tf32", "tf32x3", "ieee"}
        for name in ("gram", "dense_sums", "dense_gradient")
    },
    # Few and several components of labels, unrolled.
    ("conr_dense_sums_kernel", "L"): {1, 3, 6},
    ("conr_dense_gradient_kernel", "L"): {1, 3, 6},
    # Neither float64 nor exponents that need a shift.
    ("conr_mirrored_kernel", "PRECISION"): {"tf32", "fp16x3"},
    ("conr_mirrored_kernel", "PHI"): PHIS - {"exponential"},
    # Their rows have a gradient.
    ("conr_dense_finish_kernel", "COLUMNS"): {3, 5},
    ("conr_scale_kernel", "COLUMNS"): {3, 5},
    # Their launches exist for several components only.
    ("conr_spread_kernel", "L"): {3},
    ("conr_sort_keys_kernel", "L"): {3},
}
KERNELS = kernels_of()


@functools.cache
def shipped_launches() -> dict[int, list[compiled.Launch]]:
    found = defaultdict(list)
    for call, index, arch in shipped.distinct(*ARCHITECTURES):
        found[arch].append(launches_of(call, arch)[index])
    return dict(found)


@functools.cache
def launches_of(call: Call, arch: int) -> list[compiled.Launch]:
    return call.launches(arch)


def test_every_kernel_is_compiled_for_every_architecture() -> None:
    assert set(shipped_launches()) == set(ARCHITECTURES)
    for arch, launches in shipped_launches().items():
        others = kernels_of([mirrored]) if arch != 90 else {}  # no entry of the table
        assert {launch.name for launch in launches} == set(KERNELS) - set(others)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_branch_is_compiled(arch: int) -> None:
    """Every value of every constant, and every pointer that may be absent both ways."""
    seen, given = defaultdict(set), defaultdict(set)
    for launch in shipped_launches()[arch]:
        for parameter in launch.kernel.params:
            value = launch.arguments[parameter.name]
            if parameter.is_constexpr:
                seen[launch.name, parameter.name].add(value)
            elif parameter.name.endswith("_ptr"):
                given[launch.name, parameter.name].add(value is not None)
    for key, values in seen.items():
        if key[1] == "EARLY":
            assert values == {arch >= 90}, key
            continue
        if key[1] in ("RESIDENT", "MIRRORED"):  # in registers, of square tiles
            having = {"RESIDENT": (90,), "MIRRORED": (80, 90)}[key[1]]
            assert values == (BOOL if arch in having else {False}), key
            continue
        domain = EXCEPTIONS.get(key, CONSTANTS[key[1]])  # a new constant needs a line there
        assert domain is None or values == domain, (key, values)
    optional = {key for key, values in given.items() if False in values}
    names = {"w_ptr", "n_absent_ptr", "gram_ptr", "out_ptr", "upstream_ptr", "G_rest_ptr"}
    assert {name for _, name in optional} >= names | {"poison_ptr"}
    # Of the copies, the anchors' and the coefficients go with HAS_KEYS and COLUMNS.
    assert all(given[key] == BOOL for key in optional), {k: given[k] for k in optional}


def asked(calls: list[Call]) -> set[tuple]:
    """``(kind, architecture, bucket, arithmetic)`` of every configuration that the calls read."""
    keys = set()
    plain = call_module.config

    def config(*key):
        keys.add(key)
        return plain(*key)

    with mock.patch.object(call_module, "config", config):
        for arch in ARCHITECTURES:
            for call in calls:
                call.launches(arch)
    return keys


def entry_of(kind: str, arch: int, bucket: int, arithmetic: str) -> int:
    """Which of the table's entries serves."""
    entries = TABLE[arithmetic][kind]
    return next(
        n for n, (on, width, _) in enumerate(entries)
        if on in (None, arch) and width in (None, bucket)
    )  # fmt: skip


def test_every_configuration_is_compiled() -> None:
    """The sweeps in every bucket of D, arithmetic and architecture, and every entry of the table,
    none of which is out of reach.
    """
    every = [
        Call(SWEEPS, D, arithmetic)
        for arithmetic, largest in REGISTER_D.items()
        for D in (*(width for width in BUCKETS if width <= largest), CHUNKED)
    ]
    shipped_keys, all_keys = asked(shipped.calls()), asked(every)
    assert all_keys <= shipped_keys
    reached = {(k[3], k[0], entry_of(*k)) for k in shipped_keys}
    assert reached == {
        (arithmetic, kind, n)
        for arithmetic, kinds in TABLE.items()
        for kind, entries in kinds.items()
        for n in range(len(entries))
    }


@pytest.fixture(scope="module")
def committed() -> list[dict[str, str]]:
    with table.TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_committed_table_has_every_shipped_kernel(committed) -> None:
    """One row for each binary: its call, tile and launch options; the rest is machine code."""
    expected = []
    for call, index, arch in shipped.distinct(90):
        launch = launches_of(call, arch)[index]
        expected.append({k: str(v) for k, v in table.identity(launch, call, arch).items()})
    assert [{k: row[k] for k in expected[0]} for row in committed] == expected


#: Compiled here; ``python -m benchmarks.static --check`` compiles every row.
SAMPLE = [
    ("conr_backward_parts_kernel", "paper", 128),
    ("conr_wide_product_kernel", "paper", 2048),
    ("conr_dense_sums_kernel", "released-age 1024 rows", 128),
    ("conr_dense_gradient_kernel", "paper 4096 rows", 128),
]
#: Of other GPUs: compiled here, in no table. D = 256 needs the most shared memory.
OTHERS = [
    ("conr_forward_kernel", Call(SWEEPS, 128, "bfloat16")),
    ("conr_forward_kernel", Call(SWEEPS, 256, "bfloat16")),
    ("conr_backward_parts_kernel", Call(SWEEPS, 128, "bfloat16")),
    ("conr_backward_parts_kernel", Call(SWEEPS, 256, "bfloat16", "released-age")),
    ("conr_dense_gradient_kernel", Call(KEPT, 128, "bfloat16")),
    ("conr_dense_gradient_kernel", Call(FEW, 128, "bfloat16", "released-age")),
    ("conr_dense_sums_kernel", Call(FEW, 128, "bfloat16", "released-age")),
    ("conr_dense_sums_kernel", Call(FEW, 128, "float32 highest")),
    ("conr_dense_gradient_kernel", Call(FEW, 64, "float64")),
]
#: Bytes of a thread.
OTHER_SPILLS = {
    ("conr_forward_kernel", 86): 8,
    ("conr_dense_gradient_kernel", 86): 8,
    ("conr_dense_sums_kernel", 100): 40,
}
#: Compute capability of their launches, and KiB of shared memory.
GPUS = {86: (86, 99), 100: (100, 227), 120: (120, 99), "gfx942": (80, 64)}


@pytest.mark.parametrize("key", SAMPLE, ids=str)
def test_the_committed_rows_regenerate(committed, key) -> None:
    name, call_name, D = key
    job = next(
        (call, index, arch)
        for call, index, arch in shipped.distinct(90)
        if (str(call), call.D, call.arithmetic) == (call_name, D, "bfloat16")
        and launches_of(call, arch)[index].name == name
    )
    row = committed[shipped.distinct(90).index(job)]
    assert {k: str(v) for k, v in table.row_of(*job).items()} == row


@pytest.mark.parametrize(
    ("name", "call", "gpu"),
    [(*other, gpu) for other in OTHERS for gpu in GPUS if gpu != 120 or other[1].D == 256],
    ids=str,
)
def test_other_gpus_run_the_kernels_without_spills_or_atomics(
    name: str, call: Call, gpu: int | str
) -> None:
    arch, kibibytes = GPUS[gpu]
    with compiled.on_amd(gpu) if gpu == "gfx942" else contextlib.nullcontext():
        launch = next(launch for launch in call.launches(arch) if launch.name == name)
    binary = compiled.compile_launch(launch, gpu)
    assert binary.metadata.shared <= kibibytes * 1024
    if gpu == "gfx942":
        code = binary.asm["amdgcn"]
        (scratch,) = re.findall(r"private_segment_fixed_size:\s+(\d+)", code)
        assert int(scratch) <= 32  # of shifted exponents at D = 256
        assert not re.search(r"\b\w+_atomic_", code)
    else:
        code = machine_code(binary)
        assert code.spill_bytes <= OTHER_SPILLS.get((name, gpu), 0)
        assert not any(op.startswith(table.ATOMICS) for op in code.counts)


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float16"])
def test_lists_of_pairs_in_64_bits_are_compiled_too(arithmetic: str) -> None:
    """Each pair once, and both ways."""
    with mock.patch.object(call_module, "LIST_NUMBERS", 0):
        launches = Call(SWEEPS, CHUNKED, arithmetic, part="wide").launches(90)
    distinct = {shipped.specialization(x): x for x in launches if "list_ptr" in x.arguments}
    assert len(distinct) == 4
    for launch in distinct.values():
        assert launch.arguments["list_ptr"].dtype == torch.int64
        assert machine_code(compiled.compile_launch(launch, 90)).spill_bytes == 0, launch.name


NO_SIMILARITY = "no-similarity 1024 rows t=0.02 no weights"
#: Bytes of a thread. Where registers are bounded so that one program more shares a multiprocessor
#: (forward at D = 256 and in float32, backward at D = 64), an H200 takes 2-6 % less time with them.
KNOWN_SPILLS = {
    ("conr_backward_parts_kernel", "both", "bfloat16", "64", "paper"): "8",
    ("conr_dense_gradient_kernel", "", "float32 highest", "128", "paper 4096 rows"): "24",
    ("conr_forward_kernel", "both", "float64", "2048", "paper"): "24",
    ("conr_order_kernel", "", "bfloat16", "128", "released-depth keys"): "8",
    ("conr_dense_rows_kernel", "", "bfloat16", "128", NO_SIMILARITY): "8",
    ("conr_backward_parts_kernel", "both", "bfloat16", "256", "released-age"): "32",
    ("conr_wide_product_kernel", "", "bfloat16", "384", "paper"): "40",
    ("conr_forward_kernel", "both", "bfloat16", "256", "paper keys"): "16",
    ("conr_forward_kernel", "both", "float16", "256", "paper keys"): "16",
    # 4 warps, which two programs a multiprocessor need.
    ("conr_dense_sums_kernel", "", "bfloat16", "128", "released-age 1024 rows"): "16",
    ("conr_dense_sums_kernel", "", "bfloat16", "128", NO_SIMILARITY): "8",
    ("conr_dense_sums_kernel", "", "bfloat16", "128", "paper 1024 rows L=6 mae"): "80",
    ("conr_dense_gradient_kernel", "", "bfloat16", "128", "paper 1024 rows L=6 mae"): "64",
    ("conr_dense_sums_kernel", "", "float16", "256", "paper 4096 rows"): "40",
    ("conr_dense_sums_kernel", "", "bfloat16", "256", "paper 4096 rows"): "40",
    ("conr_dense_sums_kernel", "", "bfloat16", "256", "paper 4096 rows L=3 mae"): "200",
    ("conr_dense_gradient_kernel", "", "float16", "128", "released-age 4096 rows"): "344",
    ("conr_forward_kernel", "both", "bfloat16", "256", "paper N=24576"): "16",
    ("conr_forward_kernel", "both", "float16", "256", "paper N=24576"): "16",
}


def test_no_kernel_spills_or_uses_atomics(committed) -> None:
    def names(rows):
        return [
            tuple(r[key] for key in ("kernel", "sweep", "arithmetic", "D", "call")) for r in rows
        ]

    spilling = [row for row in committed if row["spill_bytes"] != "0"]
    assert dict(zip(names(spilling), [r["spill_bytes"] for r in spilling], strict=True)) == (
        KNOWN_SPILLS
    )
    assert names(row for row in committed if row["atomics"] != "0") == []
    assert names(row for row in committed if row["overwritten"] != "0") == []
    limit = rank.SHARED_LIMIT[90]
    assert names(row for row in committed if int(row["shared_bytes"]) > limit) == []


def with_products(committed) -> list[dict[str, str]]:
    """The rows of kernels that multiply tiles."""
    kinds = ("ward_", "gram", "dense_sums", "dense_gradient", "wide_scores", "wide_product")
    kinds += ("mirrored_kernel",)
    rows = [row for row in committed if any(kind in row["kernel"] for kind in kinds)]
    # Where a launch before multiplies few rows, the kernel of their sums has no product.
    before = {(r["arithmetic"], r["D"], r["call"]) for r in rows if "gram" in r["kernel"]}
    rows = [
        r for r in rows
        if "dense_sums" not in r["kernel"] or (r["arithmetic"], r["D"], r["call"]) not in before
    ]  # fmt: skip
    assert len(rows) > 150
    return rows


def test_tensor_cores_do_every_product(committed) -> None:
    """wgmma wherever a tile has the 64 anchors that it needs; also of float64."""
    for row in with_products(committed):
        names = row["tensor_core"]
        if row["arithmetic"] == "float64":
            assert "DMMA" in names, row
        else:
            assert ("HGMMA" if int(row["tile"].split("x")[0]) >= 64 else "HMMA") in names, row
        if row["sweep"] and row["arithmetic"] != "float64":
            assert "HGMMA" in names, row


def test_tf32_only_where_it_is_asked_for_and_three_passes_at_highest(committed) -> None:
    passes = Counter()
    for row in with_products(committed):
        if "L=3" in row["call"] or row["call"].startswith("contrastive"):
            continue  # the loop over full tiles, or over edges, which are none, is gone
        # The instruction names of sm_100 do not tell their sizes; more where warps share a product.
        done = float(row["passes"] or (3 if row["arithmetic"].endswith("highest") else 1))
        if row["arithmetic"] == "float64":
            assert "TF32" not in row["tensor_core"], row
        elif row["arithmetic"] == "float32 highest" and "TF32" in row["tensor_core"]:
            assert done >= 3, row
        elif row["arithmetic"] == "float32 highest":
            # Of halves Triton IR itself has three products.
            assert "dense" not in row["kernel"] and 1 <= done < 2, row
        else:
            # On 16 anchors two warps both compute one of the products.
            assert 1 <= done < 2 or (row["tile"][:3], done) == ("16x", 2), row
        passes[row["passes"]] += 1
    assert passes["1"] > 100 and passes["3"] > 3


def test_every_loop_over_pairs_was_taken_apart(committed) -> None:
    """No row falls back to a blank because the compiler reshaped its loops."""
    for row in committed:
        if "L=3" in row["call"] or row["call"].startswith("contrastive"):
            continue  # full tiles or edges are none, and the compiler drops their loop
        kinds = ("ward_", "dense_sums", "dense_gradient", "wide_scores", "mirrored_kernel")
        has_pairs = any(kind in row["kernel"] for kind in kinds)
        assert (row["per_pair_edge"] != "") == has_pairs, row
        # Of float64's product of wide features the compiler reshaped the loop.
        is_reshaped = (row["kernel"], row["arithmetic"]) == ("conr_wide_product_kernel", "float64")
        has_rest = not has_pairs and not row["per_pair_product"] and not is_reshaped
        assert (row["bound_rest"] != "") == has_rest, row
        if "ward_" in row["kernel"] and row["sweep"]:
            # In float64 and three passes the products decide, and the order of instructions.
            slack = 1.15 if row["arithmetic"] in ("float64", "float32 highest") else 1.0
            assert 0 < float(row["per_pair_full"]) <= slack * float(row["per_pair_edge"]), row


def test_instructions_per_pair_are_within_the_targets(committed) -> None:
    targets = {
        ("conr_forward_kernel", "both"): 9.5,  # of the negatives' loop, which comes first
        ("conr_mirrored_kernel", "both"): 5,
        ("conr_backward_parts_kernel", "both"): 8.7,
        ("conr_backward_kernel", "positives"): 8.7,
        ("conr_backward_kernel", "negatives"): 16,
    }
    for (kernel, sweep), most in targets.items():
        rows = [
            row for row in committed
            if (row["kernel"], row["sweep"], row["arch"], row["arithmetic"], row["D"], row["call"])
            == (kernel, sweep, "90", "bfloat16", "128", "paper")
        ]  # fmt: skip
        assert len(rows) == 1
        assert all(0 < float(row["per_pair_full"]) <= most for row in rows)


def test_times_are_predicted_for_an_h200_at_the_sizes_that_a_kernel_serves(committed) -> None:
    for row in committed:
        few, many = row["h200_us_few"], (row["h200_us_16384"], row["h200_us_65536"])
        is_few = " rows" in row["call"]
        assert (few != "") == is_few
        # Some binaries serve one of the sizes: sweeps in turn the larger, both at once the smaller;
        # some only others yet.
        times = [float(time) for time in many if time]
        of_others = ("backward", "forward", "mirrored", "mirrored_sums", "rank", "merge")
        is_other = row["kernel"].removesuffix("_kernel").removeprefix("conr_") in of_others
        assert bool(times) == (not is_few) or is_other, row
        assert all(time > 0 for time in times) and times == sorted(times), row


def test_every_processor_works_from_few_rows_on() -> None:
    """Programs of the launches over pairs of few rows, on a GPU of 132 processors."""
    for n, least in ((128, 64), (256, 132), (512, 132), (1024, 132), (2048, 132), (4096, 132)):
        for launch in Call(n, 128, "bfloat16").launches(90):
            if "sums" in launch.name or "gradient" in launch.name:
                assert launch.grid[0] >= least, (n, launch.name)


def test_memory_of_pairs_ends_at_a_million() -> None:
    assert launch_dense.kept_size(1024, 1024) > 1024 * 1024
    assert launch_dense.kept_size(1025, 1024) < 4 * 1025
    assert launch_dense.kept_size(4096, 4096) < 4 * 4096
    for arithmetic, sizes in shipped.FEW_SIZES.items():
        for D in (D for D, n in sizes if n == FEW):
            names = [launch.name for launch in Call(FEW, D, arithmetic).launches(90)]
            assert "conr_gram_kernel" not in names, arithmetic


@pytest.mark.parametrize("sweep", ["positives", "negatives"])
def test_visited_tiles_are_those_with_pairs_in_the_window(sweep: str) -> None:
    n, block_i, block_j = 1000, 64, 32
    values = tiles.batch(n)[sweep]
    near = ((values[:, None] - values[None, :]).abs() <= 1).float()
    pad = torch.zeros(16 * block_i, 32 * block_j)
    pad[:n, :n] = near
    pad = pad.view(16, block_i, 32, block_j)
    some = pad.amax((1, 3)).sum(1).int().tolist()
    visits = tiles.visits(n, n, block_i, block_j, sweep, 1.0, True, False)
    assert [full + edge for full, edge in visits] == some
    inside = pad[:15].amin((1, 3)).sum(1).int()
    own = torch.tensor([2 if sweep == "positives" else 0]).clamp(max=inside)
    assert [full for full, _ in visits[:15]] == (inside - own).tolist()


def test_pairs_of_tiles_that_are_listed_once_have_two_products() -> None:
    """Of all windows' programs; a pair of a tile with itself has one."""
    sweeps = ("positives", "negatives")
    runs = [tiles.upper_runs(SWEEPS, 128, 128, sweep, 1.0) for sweep in sweeps]
    listed = [[b - a for a, b, _, _ in run] for run in runs]
    visits = [tiles.visits(SWEEPS, SWEEPS, 128, 128, sweep, 1.0, True, False) for sweep in sweeps]
    both = sum(full + edge for of_sweep in visits for full, edge in of_sweep)
    assert both == 2 * sum(map(sum, listed)) - sum(map(len, listed))
    done = Counter()
    for launch in launches_of(Call(SWEEPS, CHUNKED, "bfloat16", part="wide"), 90):
        if "H_ptr" in launch.arguments:
            assert passes.is_mirrored(launch)
            done[launch.name] += sum(n for _, n in passes.anchor_tiles(launch))
    columns = CHUNKED // 256
    assert done["conr_wide_scores_kernel"] == sum(map(sum, listed))
    assert done["conr_wide_product_kernel"] == both * columns


def test_natural_loops_are_found_across_cold_blocks_behind_the_end() -> None:
    """A wait at a barrier jumps back from behind the exit: that is no loop around the kernel's."""
    body = ["HGMMA.64x64x16 R1"] + ["FADD R0, R0, R0"] * 8
    lines = ["MOV R0, RZ", "IADD3 R0", "@P0 BRA `(.L_wait)", *body, "@P1 BRA `(.L_1)", "EXIT",
             "SYNCS.PHASECHK.TRANS64.TRYWAIT P0", "BRA `(.L_3)"]  # fmt: skip
    code = MachineCode(lines, {2: 14, 12: 1, 15: 3}, 32, 0, 0)
    (loop,) = loops.code_loops(code).loops
    assert loop.loops == [] and loop.count("HGMMA") == 1 and loop.count("IADD3") == 1
    assert loops.code_loops(code).count("MOV", "EXIT") == 2


def test_candidates_are_ranked_by_the_times_of_the_table(committed) -> None:
    """The shipped configuration costs what its rows say; one with too large tiles is rejected."""
    key = ("mirrored", 90, 128, "bfloat16")
    shipped_config = replace(call_module.config(*key), max_registers=None)
    assert shipped_config in rank.candidates("mirrored", 128, "bfloat16")
    shipped_config = call_module.config(*key)
    judge = functools.partial(
        rank.judge, "mirrored", D=128, arithmetic="bfloat16", arch=90, variant="paper", N=65_536
    )
    _, time, remark = judge(shipped_config)
    rows = [
        row for row in committed
        if row["kernel"] == "conr_mirrored_kernel" and row["sweep"] and row["arch"] == "90"
        and (row["D"], row["arithmetic"], row["call"]) == ("128", "bfloat16", "paper")
        and row["h200_us_65536"]
    ]  # fmt: skip
    assert len(rows) == 1 and remark.count("HGMMA") == 1
    assert time == pytest.approx(sum(float(row["h200_us_65536"]) for row in rows), abs=0.2)
    _, time, remark = judge(replace(shipped_config, num_stages=16))
    assert time is None and "shared memory" in remark
