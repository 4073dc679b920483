"""`load(name, folder)`: the data of an experiment as tensors, split into training, validation and test rows.

The validation rows come out of the published training part (generated data: they are extra); configurations are compared
on them, never on the test rows. Every split is fixed: no seed of a run changes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper import formats


class Split(NamedTuple):
    inputs: Tensor  # [N, ...] float32, or int64 tokens [N, T]
    targets: Tensor  # [N] int64 classes or float32 values, or int64 tokens [N, T]


@dataclass(frozen=True)
class Data:
    """task: "classification", "regression" or "language". classes: of the output (1 for regression, else the vocabulary).

    note: what was read and how it was split. differs: why its results must not be compared with the published ones.
    """

    name: str
    task: str
    classes: int
    train: Split
    validation: Split
    test: Split
    note: str
    differs: str | None = None

    def limited(self, train: int | None, held_out: int | None) -> "Data":
        """Fewer rows of each part, drawn at random once and for all: files may be sorted by class. None leaves all."""
        said = ", ".join(
            f"{rows:,} {what}" for rows, what in ((train, "training"), (held_out, "validation and test")) if rows
        )
        return Data(
            self.name,
            self.task,
            self.classes,
            *(_drawn(part, n) for part, n in ((self.train, train), (self.validation, held_out), (self.test, held_out))),
            note=f"{self.note} Of these at most {said} rows, drawn at random." if said else self.note,
            differs=self.differs,
        )

    def to(self, device: torch.device) -> "Data":
        if device.type == "cpu":
            return self
        parts = (Split(*(t.to(device) for t in part)) for part in (self.train, self.validation, self.test))
        return Data(self.name, self.task, self.classes, *parts, note=self.note, differs=self.differs)


def _drawn(part: Split, rows: int | None) -> Split:
    if rows is None or rows >= len(part.targets):
        return part
    chosen = torch.randperm(len(part.targets), generator=torch.Generator().manual_seed(0))[:rows]
    return Split(part.inputs[chosen], part.targets[chosen])


def load(name: str, folder: Path | None = None, **settings: float) -> Data:
    """The data `name`; `folder` holds its files, in a published format or as one of the packs (see docs/experiments.md).

    Raises ValueError (unknown name; no folder where one is needed; a truncated file, another format, labels out of
    range), FileNotFoundError (naming what is missing), RuntimeError (a reader that needs a package not installed).
    """
    if name not in LOADERS:
        raise ValueError(f"data must be one of {', '.join(LOADERS)}; got {name!r}")
    loader, needs_folder = LOADERS[name]
    if not needs_folder:
        return loader(**settings)
    if folder is None:
        raise ValueError(f"{name} needs the folder of its files: --data FOLDER")
    return loader(Path(folder), **settings)


# ---- regression


def regression(noise: float = 0.5, train: int = 10_000, test: int = 5_000) -> Data:
    """y = 2 x + 1 + noise * N(0, 1), x uniform in [-3, 3] (AdaSelection, section 4.2)."""
    generator = torch.Generator().manual_seed(20_230_610)
    parts = []
    for rows in (train, test // 2, test):
        x = 6 * torch.rand(rows, 1, generator=generator) - 3
        y = 2 * x[:, 0] + 1 + noise * torch.randn(rows, generator=generator)
        parts.append(Split(x, y))
    note = (
        f"Generated: y = 2x + 1 with normal noise of standard deviation {noise:g}, x uniform in [-3, 3];"
        f" {train:,} training, {test // 2:,} validation, {test:,} test rows. The noise alone has the loss {noise**2:g}."
    )
    return Data(
        "regression", "regression", 1, *parts, note=note, differs="the paper states neither noise nor range of x"
    )


BIKE_CATEGORIES = {"season": 4, "mnth": 12, "weekday": 7, "weathersit": 4}
BIKE_NUMBERS = ("yr", "holiday", "workingday", "temp", "atemp", "hum", "windspeed")


def bike(folder: Path) -> Data:
    """Bike Sharing, day.csv: 730 days (one with humidity 0 is left out), target cnt; both standardised by training rows."""
    path = formats.find(folder, ("day.csv", "bike-sharing/day.csv", "Bike-Sharing-Dataset/day.csv"), "bike")
    columns = (*BIKE_CATEGORIES, *BIKE_NUMBERS, "cnt")
    values = formats.table(path, columns)
    features = []
    for place, (name, count) in enumerate(BIKE_CATEGORIES.items()):
        codes = values[:, place].astype(np.int64) - (name != "weekday")
        if ((codes < 0) | (codes >= count)).any():
            raise ValueError(f"{path}: {name} out of range")
        features.append(np.eye(count)[codes])
    features.append(values[:, len(BIKE_CATEGORIES) : -1])
    good = values[:, columns.index("hum")] > 0
    inputs, targets = np.concatenate(features, 1)[good], values[good, -1]
    order = np.random.default_rng(0).permutation(len(targets))
    n_test = len(order) // 5
    n_validation = n_test * 4 // 7
    train, validation, test = np.split(order[::-1], [len(order) - n_test - n_validation, len(order) - n_test])
    if len(train) < 2:
        raise ValueError(f"{path}: {len(order)} days are too few")
    mean, std = inputs[train].mean(0), inputs[train].std(0)
    inputs = (inputs - mean) / np.where(std > 0, std, 1)
    targets = (targets - targets[train].mean()) / targets[train].std()
    x, y = torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets, dtype=torch.float32)
    note = (
        f"Bike Sharing, {path.name}: {len(order)} days, {len(train)} training, {len(validation)} validation and {len(test)}"
        " test rows; inputs and target standardised, so a loss of 1 is that of the mean."
    )
    parts = (Split(x[rows], y[rows]) for rows in (train.copy(), validation.copy(), test.copy()))
    differs = "the paper states neither its split nor the scale of its loss"
    return Data("bike", "regression", 1, *parts, note=note, differs=differs)


# ---- images


def _images(
    name: str,
    classes: int,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    note: str,
    differs: str | None = None,
) -> Data:
    """A tenth of the training rows validates; pixels standardised by channel."""
    order = np.random.default_rng(0).permutation(len(train[1]))
    held = max(1, len(order) // 10)
    rows = {"train": order[held:], "validation": order[:held]}
    if not len(rows["train"]):
        raise ValueError(f"{name}: {len(order)} training images are too few")
    pixels = train[0][rows["train"]]
    axes = (0, 2, 3) if pixels.ndim == 4 else None
    sample = pixels[:10_000].astype(np.float32) / 255
    mean, std = sample.mean(axes, keepdims=True), sample.std(axes, keepdims=True) + 1e-6

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        inputs = torch.tensor(images, dtype=torch.float32).div_(255)
        inputs.sub_(torch.from_numpy(mean)).div_(torch.from_numpy(std))
        return Split(inputs, torch.tensor(labels))

    own, held_out = (split(train[0][chosen], train[1][chosen]) for chosen in rows.values())
    counts = f" {len(rows['train']):,} training, {held:,} validation, {len(test[1]):,} test images."
    return Data(name, "classification", classes, own, held_out, split(*test), note=note + counts, differs=differs)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def cifar10(folder: Path) -> Data:
    places = (
        "cifar-10-batches-py",
        "cifar-10-batches-bin",
        "cifar10/cifar-10-batches-py",
        "cifar10/cifar-10-batches-bin",
        "data_batch_1",
        "data_batch_1.bin",
        "cifar10_jpegpack.npz",
        "cifar10/cifar10_jpegpack.npz",
    )
    found = formats.find(folder, places, "cifar10")
    if found.suffix == ".npz":
        images, labels, n_train = formats.jpegpack(found)
        train, test = (images[:n_train], labels[:n_train]), (images[n_train:], labels[n_train:])
        differs = "JPEG-recompressed CIFAR-10 (quality 75), not the published images"
        return _images("cifar10", 10, train, test, f"JPEG-recompressed CIFAR-10, {found.name}.", differs)
    home = found if found.is_dir() else found.parent
    binary = (home / "data_batch_1.bin").is_file()

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        return (
            formats.cifar_binary(home / f"{name}.bin", 1, 10)
            if binary
            else formats.cifar_python(home / name, b"labels", 10)
        )

    train = _joined([read(f"data_batch_{i}") for i in range(1, 6)])
    return _images("cifar10", 10, train, read("test_batch"), f"CIFAR-10, {'binary' if binary else 'Python'} version.")


def cifar100(folder: Path) -> Data:
    names = ("cifar-100-python", "cifar-100-binary")
    places = (*names, *(f"cifar100/{name}" for name in names), "train", "train.bin")
    found = formats.find(folder, places, "cifar100")
    home = found if found.is_dir() else found.parent
    binary = (home / "train.bin").is_file()

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        return (
            formats.cifar_binary(home / f"{name}.bin", 2, 100)
            if binary
            else formats.cifar_python(home / name, b"fine_labels", 100)
        )

    return _images(
        "cifar100", 100, read("train"), read("test"), f"CIFAR-100, {'binary' if binary else 'Python'} version."
    )


def svhn(folder: Path) -> Data:
    train = formats.find(folder, ("train_32x32.mat", "svhn/train_32x32.mat", "SVHN/train_32x32.mat"), "svhn")
    return _images(
        "svhn", 10, formats.svhn(train), formats.svhn(train.parent / "test_32x32.mat"), "SVHN, cropped digits."
    )


def mnist(folder: Path) -> Data:
    name = "train-images-idx3-ubyte"
    subfolders = ("", "mnist/", "MNIST/raw/", "MNIST/")
    places = [f"{sub}{file}" for sub in subfolders for file in ("mnist.npz", name, name + ".gz")]
    found = formats.find(folder, places, "mnist")
    if found.suffix == ".npz":
        pack = formats.npz(found, ("x_train", "y_train", "x_test", "y_test"))
        train, test = (formats.digit_images(pack[f"x_{part}"], pack[f"y_{part}"], found) for part in ("train", "test"))
    else:
        ending = found.name.removeprefix(name)
        train, test = (
            formats.digit_images(
                formats.idx(found.with_name(f"{part}-images-idx3-ubyte{ending}")),
                formats.idx(found.with_name(f"{part}-labels-idx1-ubyte{ending}")),
                found.with_name(f"{part}-images-idx3-ubyte{ending}"),
            )
            for part in ("train", "t10k")
        )
    return _images("mnist", 10, train, test, f"MNIST, {found.name}.")


def digits() -> Data:
    """The 1797 images of 8x8 that scikit-learn ships."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise RuntimeError("digits needs scikit-learn (pip install 'adaselect_kernels[demo]')") from None
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = (np.asarray(images).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rest, test = order[360:], order[:360]
    labels = np.asarray(labels).astype(np.int64)
    return _images("digits", 10, (images[rest], labels[rest]), (images[test], labels[test]), "Digits of scikit-learn.")


# ---- texts


def _sequences(tokens: np.ndarray, length: int, path: Path) -> Split:
    """Rows of `length` tokens and, as targets, the tokens that follow them."""
    rows = (len(tokens) - 1) // length
    if rows < 1:
        raise ValueError(f"{path}: {len(tokens)} tokens give no sequence of {length}")
    used = torch.from_numpy(tokens[: rows * length + 1].astype(np.int64))
    return Split(used[:-1].reshape(rows, length), used[1:].reshape(rows, length))


def _bytes(
    name: str, train: bytes, test: bytes, paths: tuple[Path, Path], length: int, note: str, differs: str
) -> Data:
    tokens = np.frombuffer(train, np.uint8)
    cut = len(tokens) * 9 // 10  # the end of the text validates: a sequence in between would leak its neighbours
    parts = (
        _sequences(tokens[:cut], length, paths[0]),
        _sequences(tokens[cut:], length, paths[0]),
        _sequences(np.frombuffer(test, np.uint8), length, paths[1]),
    )
    return Data(name, "language", 256, *parts, note=note, differs=differs)


def text(folder: Path, length: float = 64) -> Data:
    """WikiText-2 as bytes; trained on the validation part where the training part is not there."""
    places = [
        f"{sub}{file}" for sub in ("", "wikitext-2/") for file in ("wiki.train.tokens", "wiki.train.raw", "valid.txt")
    ]
    found = formats.find(folder, places, "text")
    other = found.with_name({"valid.txt": "test.txt"}.get(found.name, found.name.replace("train", "test")))
    note = (
        f"WikiText-2 as bytes: trained on the first nine tenths of {found.name}, validated on the rest, tested on"
        f" {other.name}; sequences of {int(length)} bytes."
    )
    differs = "bytes instead of words" + (", trained on the validation part" if found.name == "valid.txt" else "")
    return _bytes("text", formats.text(found), formats.text(other), (found, other), int(length), note, differs)


def movie_reviews(folder: Path, length: float = 64) -> Data:
    """The 2,000 reviews as one text of bytes; every tenth review of each class tests."""
    found = formats.find(folder, ("movie_reviews.zip", "movie_reviews/movie_reviews.zip"), "movie_reviews")
    reviews = formats.zipped_texts(found, lambda name: name.endswith(".txt"))
    train = b"\n".join(content for i, (_, content) in enumerate(reviews) if i % 10)
    test = b"\n".join(content for i, (_, content) in enumerate(reviews) if not i % 10)
    note = f"{len(reviews):,} movie reviews as bytes, every tenth for the test; sequences of {int(length)} bytes."
    return _bytes("movie_reviews", train, test, (found, found), int(length), note, "not a data set of the papers")


def wikitext2(folder: Path, length: float = 35) -> Data:
    """WikiText-2 as words: wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens; the vocabulary of the training part."""
    found = formats.find(folder, ("wiki.train.tokens", "wikitext-2/wiki.train.tokens"), "wikitext2")
    paths = [found.with_name(f"wiki.{part}.tokens") for part in ("train", "valid", "test")]
    words = [formats.text(path).decode("utf-8").replace("\n", " <eos> ").split() for path in paths]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", *words[0]]))}
    tokens = [np.array([vocabulary.get(word, 0) for word in part], np.int64) for part in words]
    parts = (_sequences(part, int(length), path) for part, path in zip(tokens, paths, strict=True))
    note = f"WikiText-2, {len(tokens[0]):,} + {len(tokens[2]):,} tokens, {len(vocabulary):,} words; sequences of {int(length)}."
    return Data("wikitext2", "language", len(vocabulary), *parts, note=note)


LOADERS: dict[str, tuple[Callable[..., Data], bool]] = {  # name: (loader, needs a folder)
    "regression": (regression, False),
    "digits": (digits, False),
    "bike": (bike, True),
    "mnist": (mnist, True),
    "cifar10": (cifar10, True),
    "cifar100": (cifar100, True),
    "svhn": (svhn, True),
    "text": (text, True),
    "movie_reviews": (movie_reviews, True),
    "wikitext2": (wikitext2, True),
}
