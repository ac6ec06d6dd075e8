"""The tiles of the torch backend hold every pair of the bands once, however blocks are cut."""

from dataclasses import replace

import pytest
import torch

from conr_kernels.core.sweep import Sweep, banded_sweep, dense_sweep
from conr_kernels.torch_backend import tiles as torch_tiles


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(torch_tiles, "BLOCK_I", 4)
    monkeypatch.setattr(torch_tiles, "TILE_PAIRS", 300)
    monkeypatch.setattr(torch_tiles, "TILE_COST", 20)


def pairs_of(tiles: list, sweep: Sweep) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each pair is in a tile, and in one's columns that are not said to be edges."""
    found = torch.zeros(sweep.n_anchors, sweep.n_keys, dtype=torch.int64)
    inside = torch.zeros_like(found)
    for tile in tiles:
        is_inside = torch.ones(tile.width, dtype=torch.int64)
        for columns in tile.edges:
            is_inside[columns] = 0
        for k in range(tile.count):
            i0, j0 = tile.i0 + k * tile.rows, tile.j0 + k * tile.step
            i, j = slice(i0, i0 + tile.rows), slice(j0, j0 + tile.width)
            assert i.stop <= sweep.n_anchors and j0 >= 0 and j.stop <= sweep.n_keys
            found[i, j] += 1
            inside[i, j] += is_inside
            if tile.mirror < tile.width:  # these columns stand for the transposed pairs
                columns = slice(j0 + tile.mirror, j.stop)
                found[columns.start : columns.stop, i] += 1
                inside[columns.start : columns.stop, i] += is_inside[tile.mirror :, None]
    return found, inside


def cost(tiles: list) -> float:
    """As ``_least_costs`` counts it."""
    edges = [sum(columns.stop - columns.start for columns in tile.edges) for tile in tiles]
    widths = [t.width + torch_tiles.EDGE_COST * edge for t, edge in zip(tiles, edges, strict=True)]
    pairs = sum(t.count * t.rows * width for t, width in zip(tiles, widths, strict=True))
    return pairs + len(tiles) * torch_tiles.TILE_COST


def check(sweep: Sweep, cut: list[int], is_in_band: torch.Tensor) -> None:
    tiles = list(torch_tiles._cut_tiles(sweep, torch_tiles._make_blocks(sweep, cut)))
    found, inside = pairs_of(tiles, sweep)
    assert bool((found <= 1).all())
    assert bool((found[is_in_band] == 1).all())
    assert not bool((inside[~is_in_band] > 0).any())


def cases():
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(1, 150, (), generator=generator))
        n_values = [3, 12, 60, 10_000][seed % 4]
        y = torch.randint(0, n_values, (n, 1), generator=generator) * (12.0 / n_values)
        key_y = torch.randint(0, n_values, (n // 2 + 1, 1), generator=generator) * (12.0 / n_values)
        for keys in (None, key_y):
            sweep = banded_sweep("positives", y, keys, 1.0, "mae")
            j = torch.arange(sweep.n_keys)
            yield sweep, (sweep.lo[:, None] <= j) & (j < sweep.hi[:, None])


def test_every_pair_of_a_band_is_in_one_tile_and_pairs_off_it_in_edges_only():
    between = 0
    for sweep, is_in_band in cases():
        check(sweep, [*range(0, sweep.n_anchors, 4), sweep.n_anchors], is_in_band)
        cut = torch_tiles._cut_between_bands(sweep)
        between += bool(cut)
        if cut:
            check(sweep, cut, is_in_band)
        found, _ = pairs_of(torch_tiles.make_tiles(sweep), sweep)
        assert bool((found[is_in_band] == 1).all())
    assert between > 50, "hardly any case had bands of many rows"


def test_blocks_cut_between_bands_have_no_edges_where_many_rows_share_a_label():
    y = torch.arange(10.0).repeat_interleave(20)[torch.randperm(200)][:, None]
    for keys in (None, y):
        sweep = banded_sweep("positives", y, keys, 1.0, "mae")
        tiles = torch_tiles.make_tiles(sweep)
        assert all(tile.edges == () for tile in tiles)
        assert max(tile.rows for tile in tiles) <= 4 * torch_tiles.BLOCK_I


def test_a_sweep_over_all_pairs_holds_each_once():
    for n_keys in (None, 31):
        sweep = dense_sweep(50, n_keys, torch.device("cpu"))
        found, inside = pairs_of(torch_tiles.make_tiles(sweep), sweep)
        assert bool((found == 1).all()) and not bool(inside.any())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_shares_of_a_sweep_hold_every_pair_once_and_cost_about_the_same(n):
    for sweep, is_in_band in cases():
        found = torch.zeros(sweep.n_anchors, sweep.n_keys, dtype=torch.int64)
        costs = []
        for k in range(n):
            part = torch_tiles.share_of(sweep, k, n)
            tiles = torch_tiles.make_tiles(part)
            costs.append(cost(tiles))
            # Of a symmetric part the keys behind its anchors have transposed pairs.
            i, j = part.key_order if sweep.is_symmetric else part.anchor_order, part.key_order
            found[i[:, None], j] += pairs_of(tiles, replace(part, n_anchors=len(i)))[0]
        found = found[sweep.anchor_order][:, sweep.key_order]
        assert bool((found[is_in_band] == 1).all()) and bool((found <= 1).all())
        blocks = torch_tiles._make_blocks(sweep, torch_tiles._cut_between_bands(sweep) or [0, 4])
        i0, i1, start, stop, *_ = blocks.unbind(1)
        largest = int(((i1 - i0) * (stop - start)).max()) + torch_tiles.TILE_COST
        assert max(costs) - sum(costs) / n <= 3 * largest
