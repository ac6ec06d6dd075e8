"""The README's Python examples run as printed, and its rule for changing units holds."""

import re
from pathlib import Path

import pytest
import torch

from conr_kernels import conr_loss

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
TEXTS = [
    README,
    *(path for room in ("conr_kernels", "benchmarks") for path in (ROOT / room).rglob("*.md")),
]
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs_and_a_loss_gives_a_gradient(number):
    names: dict = {}
    exec(EXAMPLES[number], names)
    if "loss" in names:
        assert torch.isfinite(names["loss"]) and names["x"].grad.abs().max() > 0


def test_there_are_examples():
    assert sum("loss.backward()" in example for example in EXAMPLES) >= 2


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_files_that_a_text_names_exist(path):
    for target in re.findall(r"\]\(([\w./-]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("variant", ["paper", "released-age", "released-depth"])
def test_changing_the_labels_unit_changes_nothing(variant):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(65, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(20, 40, (65,), generator=generator).double()
    p = y + 3 * torch.randn(65, generator=generator, dtype=torch.float64)
    years = conr_loss(x, y, p, window=1.0, push_scale=0.01, variant=variant)
    months = conr_loss(x, 12 * y, 12 * p, window=12.0, push_scale=0.01 / 12, variant=variant)
    torch.testing.assert_close(years, months, rtol=1e-12, atol=0)
    assert years > 0
