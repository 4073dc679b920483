"""Readers of the published file formats. What is wrong with a file is said with its name, before anything is trained.

Images are uint8 [N, 3, H, W] (or [N, H, W] for MNIST), labels int64 [N] as the file has them, checked against their range.
Every reader raises FileNotFoundError (no such file) or ValueError (truncated, of another format, labels out of range).
"""

import csv
import gzip
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CIFAR_BYTES = 3 * 32 * 32


def find(folder: Path, places: Sequence[str], what: str) -> Path:
    """The first of `places` (files or folders, relative) that `folder` has; FileNotFoundError lists them all."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{what}: {folder} is not a folder")
    for place in places:
        if (folder / place).exists():
            return folder / place
    raise FileNotFoundError(f"{what}: {folder} has none of {', '.join(places)}")


def require(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return path


def check_labels(labels: Any, rows: int, classes: int, path: Path, first: int = 0) -> np.ndarray:
    """int64 [rows] in [first, first + classes)."""
    array = np.asarray(labels)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels must be integers, got {array.dtype}")
    array = array.reshape(-1).astype(np.int64)
    if len(array) != rows:
        raise ValueError(f"{path}: {rows} images but {len(array)} labels")
    if rows == 0:
        raise ValueError(f"{path}: no rows")
    wrong = np.flatnonzero((array < first) | (array >= first + classes))
    if len(wrong):
        raise ValueError(
            f"{path}: label {array[wrong[0]]} of row {wrong[0]} is outside [{first}, {first + classes - 1}]"
        )
    return array


# ---- CIFAR


class _Arrays(pickle.Unpickler):
    """Unpickles plain values and NumPy arrays, and runs nothing else that a file may name."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar"):
            return super().find_class(module, name)
        if module == "_codecs" and name == "encode":
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")


def cifar_python(path: Path, label_key: bytes, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """One file of cifar-10-batches-py or cifar-100-python."""
    try:
        with open(require(path), "rb") as file:
            document = _Arrays(file, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError, ImportError) as error:
        raise ValueError(f"{path}: truncated or not a pickle of CIFAR: {error}") from None
    if not isinstance(document, dict) or b"data" not in document or label_key not in document:
        raise ValueError(f"{path}: must hold the entries data and {label_key.decode()}")
    data = np.asarray(document[b"data"])
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != CIFAR_BYTES:
        raise ValueError(f"{path}: data must be uint8 [N, {CIFAR_BYTES}], got {data.dtype} {list(data.shape)}")
    return data.reshape(-1, 3, 32, 32), check_labels(document[label_key], len(data), classes, path)


def cifar_binary(path: Path, label_bytes: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """One file of cifar-10-binary (label_bytes 1) or cifar-100-binary (2: coarse, fine)."""
    raw = np.fromfile(require(path), np.uint8)
    record = label_bytes + CIFAR_BYTES
    if len(raw) == 0 or len(raw) % record:
        raise ValueError(f"{path}: truncated: {len(raw)} bytes are no whole number of records of {record}")
    rows = raw.reshape(-1, record)
    labels = check_labels(rows[:, label_bytes - 1], len(rows), classes, path)
    return rows[:, label_bytes:].reshape(-1, 3, 32, 32), labels


def jpegpack(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Images recompressed as JPEG that share their headers; the first n_train rows are the training part."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise RuntimeError(f"{path} is a pack of JPEG images: reading it needs pillow (pip install pillow)") from None
    pack = npz(path, ("scan", "length", "label", "n_train"))
    heads = [bytes(pack[name]) for name in sorted(name for name in pack if name.startswith("header"))]
    ends = np.cumsum(pack["length"].astype(np.int64))
    rows, n_train = len(ends), int(pack["n_train"])
    if rows == 0 or ends[-1] != len(pack["scan"]) or not heads:
        raise ValueError(f"{path}: truncated: the lengths do not add up to its {len(pack['scan'])} bytes of images")
    if not 0 < n_train < rows:
        raise ValueError(f"{path}: n_train must be between 1 and {rows - 1}, got {n_train}")
    labels = check_labels(pack["label"], rows, 10, path)
    which = pack.get("which", np.zeros(rows, np.uint8))
    images, start = np.empty((rows, 32, 32, 3), np.uint8), 0
    for row, end in enumerate(ends):
        coded = heads[which[row]] + pack["scan"][start:end].tobytes() + b"\xff\xd9"
        try:
            images[row] = np.asarray(Image.open(io.BytesIO(coded)).convert("RGB"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: image {row}: {error}") from None
        start = end
    return images.transpose(0, 3, 1, 2), labels, n_train


# ---- SVHN, MNIST


def svhn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """train_32x32.mat or test_32x32.mat; the digit 0 has the label 10 in the file, 0 here."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise RuntimeError(f"{path} is a MATLAB file: reading it needs scipy (pip install scipy)") from None
    try:
        document = loadmat(require(path))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: truncated or not a MATLAB file: {error}") from None
    if "X" not in document or "y" not in document:
        raise ValueError(f"{path}: must hold X and y")
    images = document["X"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise ValueError(f"{path}: X must be uint8 [32, 32, 3, N], got {images.dtype} {list(images.shape)}")
    labels = check_labels(document["y"], images.shape[3], 10, path, first=1)
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels % 10


def idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes, plain or gzipped."""
    try:
        raw = require(path).read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated or not gzip: {error}") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or not 1 <= raw[3] <= 4:
        raise ValueError(f"{path}: not an idx file of unsigned bytes")
    head = 4 + 4 * raw[3]
    if len(raw) < head:
        raise ValueError(f"{path}: truncated in its header")
    shape = struct.unpack(f">{raw[3]}I", raw[4:head])
    if len(raw) - head != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path}: truncated: {len(raw) - head} bytes for the shape {list(shape)}")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def digit_images(images: np.ndarray, labels: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"{path}: images must be uint8 [N, 28, 28], got {images.dtype} {list(images.shape)}")
    return images, check_labels(labels, len(images), 10, path)


def npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, which must have `names`."""
    try:
        with np.load(require(path), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: truncated or not an .npz file: {error}") from None
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(f"{path}: has no {', '.join(missing)}")
    return arrays


# ---- tables and texts


def table(path: Path, columns: Sequence[str]) -> np.ndarray:
    """float64 [N, columns] of a CSV file with a header; the line of a value that is no number is named."""
    rows: list[list[float]] = []
    with open(require(path), newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        head = next(lines, [])
        missing = [name for name in columns if name not in head]
        if missing:
            raise ValueError(f"{path}: has no column {', '.join(missing)}")
        places = [head.index(name) for name in columns]
        for line, row in enumerate(lines, 2):
            if len(row) != len(head):
                raise ValueError(f"{path}: truncated: line {line} has {len(row)} of {len(head)} columns")
            rows.append(_numbers(row, places, head, f"{path}: line {line}"))
    if not rows:
        raise ValueError(f"{path}: no rows")
    return np.array(rows)


def _numbers(row: Sequence[str], places: Sequence[int], head: Sequence[str], where: str) -> list[float]:
    values = []
    for place in places:
        try:
            values.append(float(row[place]))
        except ValueError:
            raise ValueError(f"{where}: {head[place]} must be a number, got {row[place]!r}") from None
        if not np.isfinite(values[-1]):
            raise ValueError(f"{where}: {head[place]} must be finite, got {row[place]!r}")
    return values


def text(path: Path) -> bytes:
    raw = require(path).read_bytes()
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: truncated or not UTF-8 text: {error}") from None
    if not raw.strip():
        raise ValueError(f"{path}: empty")
    return raw


def zipped_texts(path: Path, keep: Callable[[str], bool]) -> list[tuple[str, bytes]]:
    """(name, content) of the members that `keep` accepts, by name."""
    try:
        with zipfile.ZipFile(require(path)) as archive:
            found = [(name, archive.read(name)) for name in sorted(archive.namelist()) if keep(name)]
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: truncated or not a zip archive: {error}") from None
    if not found:
        raise ValueError(f"{path}: holds none of the texts")
    return found
