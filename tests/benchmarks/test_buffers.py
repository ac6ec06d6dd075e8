"""Few rows: what Triton 3.6 cannot compile, or compiles to copies over what a product reads."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.static import compiled
from benchmarks.static.buffers import overwritten
from benchmarks.static.shipped import FEW, KEPT, Call
from conr_kernels.triton_backend import launch_dense
from conr_kernels.triton_backend.configs import ARCHITECTURES
from conr_kernels.triton_backend.kernels.pairs import UNROLLED


@pytest.mark.parametrize(("n_rows", "arch"), [*((200, arch) for arch in ARCHITECTURES), (KEPT, 90)])
def test_labels_of_many_components_are_compiled(n_rows: int, arch: int) -> None:
    """Unrolled and in a loop, of few rows: Triton 3.6 could not carry masks to a product's factor.
    (Sorted rows have a loop over components from two on, which the table has.)
    """
    names = {"conr_dense_sums_kernel", "conr_dense_gradient_kernel"}
    for L in (UNROLLED.value, UNROLLED.value + 1):
        call = Call(n_rows, 64, "bfloat16", L=L, distance="rmse")
        launches = [launch for launch in call.launches(arch) if launch.name in names]
        assert {launch.name for launch in launches} == names
        for launch in launches:
            assert compiled.compile_launch(launch, arch).asm["cubin"], launch.name


#: N and D: chunks in the sums' own loop, and in a launch before.
CHUNKED_FEW = [(KEPT, 512), (KEPT, 8192)]


@pytest.mark.parametrize("size", CHUNKED_FEW)
@pytest.mark.parametrize("is_shipped", [True, False])
def test_no_copy_overwrites_what_a_product_reads(size: tuple[int, int], is_shipped: bool) -> None:
    """With two stages Triton has one buffer for what a running product and registers read."""
    stages = launch_dense._stages if is_shipped else lambda *_: 2
    with mock.patch.multiple(launch_dense, _plans={}, _stages=stages):
        launches = Call(*size, "bfloat16").launches(90)
    found = {
        launch.name: len(overwritten(compiled.compile_launch(launch, 90).asm["ttgir"]))
        for launch in launches if "BLOCK_J" in launch.arguments
    }  # fmt: skip
    name = "conr_gram_kernel" if size[1] > 512 else "conr_dense_sums_kernel"
    assert {name: n for name, n in found.items() if n} == ({} if is_shipped else {name: 2})


@pytest.mark.parametrize("n_rows", [600, KEPT, 1500, FEW])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunks_of_products_that_run_on_have_one_stage(n_rows: int, dtype: torch.dtype) -> None:
    for D in (16, 33, 64, 100, 128, 200, 256, 300, 2048):
        if launch_dense.serves(n_rows, n_rows, D, dtype):
            is_kept = n_rows <= KEPT
            with compiled.matmul_precision("high"):
                sums, _ = launch_dense._tiles(n_rows, D, dtype, is_kept, 90)
            assert sums.BLOCK_I >= 64 and (sums.BLOCK_D >= D or sums.num_stages == 1), D


#: A loop with {ahead} copies before it, of a tile with two buffers, whose products run on.
BRANCH = """
%a = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xbf16, #shared, #smem, mutable>
{ahead}
scf.for %i = %0 to %n {{
ttng.warp_group_dot %a, %a, %s {{isAsync = true}}
ttng.warp_group_dot_wait %d {{pendings = 1 : i32}}
ttg.async_copy_global_to_local %p, %a
}}
"""
COPY = "ttg.async_copy_global_to_local %p, %a"


@pytest.mark.parametrize(("ahead", "n"), [((1,), 0), ((2,), 1), ((1, 1), 0), ((1, 2), 1)])
def test_buffers_of_regions_side_by_side_are_told_apart(ahead: tuple[int, ...], n: int) -> None:
    """Two copies ahead meet the buffer that the product reads; names come again."""
    branches = [BRANCH.format(ahead="\n".join([COPY] * copies)) for copies in ahead]
    assert len(overwritten("scf.if %c {" + "} else {".join(branches) + "}")) == n
