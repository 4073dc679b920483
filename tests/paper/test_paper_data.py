"""Readers of the published file formats: right values from tiny files; what is wrong is named with its file."""

import gzip
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from benchmarks.paper import datasets, formats


@pytest.fixture
def numbers() -> np.random.Generator:
    return np.random.default_rng()


def images(numbers, rows, *shape):
    return numbers.integers(0, 256, (rows, *shape), dtype=np.uint8)


# ---- each format, its pixels and labels


def standardised(raw: np.ndarray, train: np.ndarray) -> torch.Tensor:
    """What `load` must give for raw uint8 images, by the mean and deviation of `train` rows, in float64."""
    axes = (0, 2, 3) if raw.ndim == 4 else None
    scale = train.astype(np.float64) / 255
    mean, std = scale.mean(axes, keepdims=True), scale.std(axes, keepdims=True)
    return torch.tensor((raw / 255 - mean) / (std + 1e-6))


def check_split(data, train_images, train_labels, test_images, test_labels):
    order = np.random.default_rng(0).permutation(len(train_labels))
    held = max(1, len(order) // 10)
    own, validating = order[held:], order[:held]
    for split, raw, labels in (
        (data.train, train_images[own], train_labels[own]),
        (data.validation, train_images[validating], train_labels[validating]),
        (data.test, test_images, test_labels),
    ):
        assert split.targets.tolist() == labels.tolist()
        torch.testing.assert_close(split.inputs.double(), standardised(raw, train_images[own]), rtol=1e-5, atol=1e-5)


def write_cifar10_python(folder, numbers, label_key=b"labels"):
    home = folder / "cifar-10-batches-py"
    home.mkdir()
    parts = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        x, y = images(numbers, 4, 3, 32, 32), numbers.integers(0, 10, 4)
        parts[name] = x, y
        (home / name).write_bytes(pickle.dumps({b"data": x.reshape(4, -1), label_key: y.tolist()}, protocol=2))
    train = [parts[f"data_batch_{i}"] for i in range(1, 6)]
    return home, (np.concatenate([x for x, _ in train]), np.concatenate([y for _, y in train])), parts["test_batch"]


def test_cifar10_python(tmp_path, numbers):
    home, train, test = write_cifar10_python(tmp_path, numbers)
    for folder in (tmp_path, home):  # the folder, or the one it lies in
        check_split(datasets.load("cifar10", folder), *train, *test)


def test_cifar10_binary(tmp_path, numbers):
    parts = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        x, y = images(numbers, 3, 3, 32, 32), numbers.integers(0, 10, 3, dtype=np.uint8)
        parts[name] = x, y
        (tmp_path / f"{name}.bin").write_bytes(np.concatenate([y[:, None], x.reshape(3, -1)], 1).tobytes())
    train = [parts[f"data_batch_{i}"] for i in range(1, 6)]
    data = datasets.load("cifar10", tmp_path)
    check_split(
        data, np.concatenate([x for x, _ in train]), np.concatenate([y for _, y in train]), *parts["test_batch"]
    )
    file = tmp_path / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin: truncated"):
        datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize("binary", [False, True])
def test_cifar100(tmp_path, numbers, binary):
    parts = []
    for name in ("train", "test"):
        x, y = images(numbers, 11, 3, 32, 32), numbers.integers(0, 100, 11, dtype=np.uint8)
        coarse = numbers.integers(0, 20, 11, dtype=np.uint8)  # must not be taken for the label
        parts += [x, y]
        if binary:
            raw = np.concatenate([coarse[:, None], y[:, None], x.reshape(11, -1)], 1)
            (tmp_path / f"{name}.bin").write_bytes(raw.tobytes())
        else:
            document = {b"data": x.reshape(11, -1), b"fine_labels": y.tolist(), b"coarse_labels": coarse.tolist()}
            (tmp_path / name).write_bytes(pickle.dumps(document))
    check_split(datasets.load("cifar100", tmp_path), *parts)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, numbers):
    home, _, _ = write_cifar10_python(tmp_path, numbers)
    (home / "data_batch_2").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"data_batch_2.*os\.system, which is no array"):
        datasets.load("cifar10", tmp_path)


def test_cifar_faults_name_the_file(tmp_path, numbers):
    home, _, _ = write_cifar10_python(tmp_path, numbers)
    good = (home / "data_batch_4").read_bytes()
    x = images(numbers, 2, 3072)
    for broken, message in (
        (good[: len(good) // 2], "data_batch_4: truncated"),
        (pickle.dumps({b"data": x, b"labels": [0, 10]}), r"data_batch_4: label 10 of row 1 is outside \[0, 9\]"),
        (pickle.dumps({b"data": x, b"labels": [0]}), "data_batch_4: 2 images but 1 labels"),
        (pickle.dumps({b"data": x[:, :100], b"labels": [0, 1]}), "data_batch_4: data must be uint8"),
        (pickle.dumps({b"labels": [0, 1]}), "data_batch_4: must hold the entries data and labels"),
    ):
        (home / "data_batch_4").write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            datasets.load("cifar10", tmp_path)
    (home / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4 is missing"):
        datasets.load("cifar10", tmp_path)


def write_jpegpack(path, numbers, rows=12, n_train=10, **changed):
    """Images of one colour as JPEG files that share all up to their scan."""
    image = pytest.importorskip("PIL.Image", reason="the pack is made of JPEG files: pillow")
    colors, scans, header = numbers.integers(0, 256, rows), [], b""
    for color in colors:
        file = io.BytesIO()
        image.new("RGB", (32, 32), (int(color),) * 3).save(file, "JPEG", quality=75)
        raw = file.getvalue()
        start = raw.index(b"\xff\xda") + 14
        header, scan = raw[:start], raw[start:-2]
        scans.append(scan)
    labels = numbers.integers(0, 10, rows).astype(np.uint8)
    arrays = {
        "header": np.frombuffer(header, np.uint8),
        "scan": np.frombuffer(b"".join(scans), np.uint8),
        "length": np.array([len(scan) for scan in scans], np.uint16),
        "label": labels,
        "n_train": np.int64(n_train),
    } | changed
    np.savez(path, **arrays)
    return colors, labels


def test_jpegpack(tmp_path, numbers):
    path = tmp_path / "cifar10_jpegpack.npz"
    colors, labels = write_jpegpack(path, numbers)
    found, read, n_train = formats.jpegpack(path)
    assert found.shape == (12, 3, 32, 32)
    assert n_train == 10
    assert np.abs(found.astype(int) - colors[:, None, None, None]).max() <= 2
    assert read.tolist() == labels.tolist()
    data = datasets.load("cifar10", tmp_path)
    assert (len(data.train.targets), len(data.validation.targets), len(data.test.targets)) == (9, 1, 2)
    assert "JPEG" in str(data.differs)
    for changed, message in (
        ({"scan": np.zeros(3, np.uint8)}, "lengths do not add up"),
        ({"label": np.full(12, 11, np.uint8)}, r"label 11 of row 0 is outside \[0, 9\]"),
        ({"n_train": np.int64(12)}, "n_train must be between 1 and 11"),
    ):
        write_jpegpack(path, numbers, **changed)
        with pytest.raises(ValueError, match=message):
            datasets.load("cifar10", tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cifar10_jpegpack\.npz: truncated"):
        datasets.load("cifar10", tmp_path)


def test_svhn(tmp_path, numbers):
    io_ = pytest.importorskip("scipy.io", reason="SVHN comes as MATLAB files: scipy")
    parts = []
    for name in ("train", "test"):
        x, y = images(numbers, 10, 3, 32, 32), numbers.permutation(np.arange(1, 11))
        parts += [x, y % 10]  # the digit 0 is labelled 10
        io_.savemat(tmp_path / f"{name}_32x32.mat", {"X": x.transpose(2, 3, 1, 0), "y": y[:, None].astype(np.uint8)})
    check_split(datasets.load("svhn", tmp_path), *parts)
    good = (tmp_path / "test_32x32.mat").read_bytes()
    (tmp_path / "test_32x32.mat").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"test_32x32\.mat: truncated"):
        datasets.load("svhn", tmp_path)
    x = images(numbers, 32, 32, 3, 2)
    io_.savemat(tmp_path / "test_32x32.mat", {"X": x, "y": np.array([[0], [3]], np.uint8)})
    with pytest.raises(ValueError, match=r"test_32x32\.mat: label 0 of row 0 is outside \[1, 10\]"):
        datasets.load("svhn", tmp_path)
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_32x32\.mat"):
        datasets.load("svhn", tmp_path)


def write_mnist(folder, numbers, packed):
    parts = []
    for part in ("train", "t10k"):
        x, y = images(numbers, 12, 28, 28), numbers.integers(0, 10, 12, dtype=np.uint8)
        parts += [x, y]
        for kind, array in (("images-idx3", x), ("labels-idx1", y)):
            raw = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            name = f"{part}-{kind}-ubyte" + ".gz" * packed
            (folder / name).write_bytes(gzip.compress(raw) if packed else raw)
    return parts


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_idx(tmp_path, numbers, packed):
    parts = write_mnist(tmp_path, numbers, packed)
    check_split(datasets.load("mnist", tmp_path), *parts)
    file = tmp_path / ("t10k-images-idx3-ubyte" + ".gz" * packed)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.*: truncated"):
        datasets.load("mnist", tmp_path)
    file.write_bytes(gzip.compress(b"text") if packed else b"text")
    with pytest.raises(ValueError, match="not an idx file"):
        datasets.load("mnist", tmp_path)


def test_mnist_npz(tmp_path, numbers):
    parts = {}
    for part in ("train", "test"):
        parts[f"x_{part}"] = images(numbers, 10, 28, 28)
        parts[f"y_{part}"] = numbers.integers(0, 10, 10, dtype=np.uint8)
    path = tmp_path / "mnist.npz"
    np.savez(path, **parts)
    check_split(datasets.load("mnist", tmp_path), *parts.values())
    np.savez(path, **{**parts, "y_test": parts["y_test"].astype(float)})
    with pytest.raises(ValueError, match=r"mnist\.npz: labels must be integers"):
        datasets.load("mnist", tmp_path)
    np.savez(path, x_train=parts["x_train"])
    with pytest.raises(ValueError, match=r"mnist\.npz: has no y_train, x_test, y_test"):
        datasets.load("mnist", tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"mnist\.npz: truncated"):
        datasets.load("mnist", tmp_path)


HEAD = (
    "instant,dteday,season,yr,mnth,holiday,weekday,workingday,weathersit,temp,atemp,hum,windspeed,casual,registered,cnt"
)


def bike_lines(numbers, days=40):
    lines = [HEAD]
    for day in range(1, days + 1):
        values = (
            numbers.integers(1, 5),
            0,
            numbers.integers(1, 13),
            0,
            numbers.integers(0, 7),
            1,
            numbers.integers(1, 4),
        )
        weather = ",".join(f"{value:.4f}" for value in numbers.uniform(0.1, 1, 4))
        lines.append(f"{day},2011-01-01,{','.join(map(str, values))},{weather},1,2,{numbers.integers(22, 9000)}")
    return lines


def test_bike(tmp_path, numbers):
    path, lines = tmp_path / "day.csv", bike_lines(numbers)
    row = lines[3].split(",")
    lines[3] = ",".join([*row[:11], "0", *row[12:]])  # the day with humidity 0
    path.write_text("\n".join(lines) + "\n")
    data = datasets.load("bike", tmp_path)
    assert [len(part.targets) for part in (data.train, data.validation, data.test)] == [28, 4, 7]
    assert data.train.inputs.shape[1] == 4 + 12 + 7 + 4 + 7
    torch.testing.assert_close(data.train.targets.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train.targets.std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0)
    counts = np.array([float(line.split(",")[-1]) for i, line in enumerate(lines[1:]) if i != 2])
    every = torch.cat([part.targets for part in (data.train, data.validation, data.test)]).double().sort().values
    expected = np.sort((counts - counts.mean()) / counts.std())
    shift = (every - every.mean()) / every.std(correction=0)
    torch.testing.assert_close(shift, torch.tensor(expected), rtol=1e-5, atol=1e-5)  # each day once
    for change, message in (
        ([*lines[:-1], lines[-1][:20]], "line 41 has"),
        ([lines[0].replace("hum", "humidity"), *lines[1:]], "has no column hum"),
        ([*lines[:5], lines[5].replace("2011-01-01,", "2011-01-01,9,", 1).rsplit(",", 1)[0]], "season out of range"),
        ([*lines[:-1], lines[-1].rsplit(",", 1)[0] + ",many"], "line 41: cnt must be a number, got 'many'"),
        ([*lines[:-1], lines[-1].rsplit(",", 1)[0] + ",nan"], "line 41: cnt must be finite"),
        (lines[:1], "no rows"),
    ):
        path.write_text("\n".join(change) + "\n")
        with pytest.raises(ValueError, match=rf"day\.csv: .*{message}"):
            datasets.load("bike", tmp_path)


def test_text_as_bytes(tmp_path):
    train, test = b"abcdefghij" * 30, b"0123456789" * 10
    (tmp_path / "valid.txt").write_bytes(train)
    (tmp_path / "test.txt").write_bytes(test)
    data = datasets.load("text", tmp_path, length=8)
    assert data.classes == 256
    assert data.train.inputs.flatten().tolist() == list(train[: 33 * 8])
    assert data.train.targets.flatten().tolist() == list(train[1 : 33 * 8 + 1])
    assert data.validation.inputs[0].tolist() == list(train[270:278])
    assert data.test.inputs.flatten().tolist() == list(test[:96])
    assert "validation part" in str(data.differs)
    for broken, message in (
        (b"\xc3", r"test\.txt: truncated or not UTF-8"),
        (b" \n", r"test\.txt: empty"),
        (b"abc", "give no"),
    ):
        (tmp_path / "test.txt").write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            datasets.load("text", tmp_path)
    (tmp_path / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.txt is missing"):
        datasets.load("text", tmp_path)


def test_wikitext2_as_words(tmp_path):
    (tmp_path / "wiki.train.tokens").write_text("a b c\nb c d\n" * 10)
    (tmp_path / "wiki.valid.tokens").write_text("a b zebra c\n" * 5)
    (tmp_path / "wiki.test.tokens").write_text("c d a b\n" * 5)
    data = datasets.load("wikitext2", tmp_path, length=4)
    assert data.classes == 6  # <unk> a b c <eos> d
    assert data.train.inputs[:2].tolist() == [[1, 2, 3, 4], [2, 3, 5, 4]]
    assert data.train.targets[0].tolist() == [2, 3, 4, 2]
    assert data.validation.inputs[0].tolist() == [1, 2, 0, 3]  # a word that the training part does not have
    (tmp_path / "wiki.valid.tokens").unlink()
    with pytest.raises(FileNotFoundError, match=r"wiki\.valid\.tokens"):
        datasets.load("wikitext2", tmp_path)


def test_movie_reviews(tmp_path):
    path = tmp_path / "movie_reviews.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(20):
            archive.writestr(f"movie_reviews/neg/cv{i:03d}.txt", f"review {i:02d} " * 20)
    data = datasets.load("movie_reviews", tmp_path, length=16)
    assert bytes(data.test.inputs[0].tolist()) == b"review 00 review"
    assert b"review 10" in bytes(data.test.inputs.flatten().tolist())
    assert b"review 10" not in bytes(data.train.inputs.flatten().tolist())
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"movie_reviews\.zip: truncated"):
        datasets.load("movie_reviews", tmp_path)


@pytest.mark.parametrize("name", [name for name, (_, folder) in datasets.LOADERS.items() if folder])
def test_a_wrong_folder_says_what_it_should_hold(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} needs the folder of its files"):
        datasets.load(name)
    with pytest.raises(FileNotFoundError, match=f"{name}: .*nowhere is not a folder"):
        datasets.load(name, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"{name}: .*has none of"):
        datasets.load(name, tmp_path)


def test_unknown_data():
    with pytest.raises(ValueError, match="data must be one of regression"):
        datasets.load("imagenet")


def test_regression_is_the_line_with_its_noise():
    data = datasets.load("regression", noise=0.25)
    assert [len(part.targets) for part in (data.train, data.validation, data.test)] == [10_000, 2_500, 5_000]
    x, y = data.train.inputs[:, 0].double().numpy(), data.train.targets.double().numpy()
    slope, offset = np.polyfit(x, y, 1)
    assert slope == pytest.approx(2, abs=0.02)
    assert offset == pytest.approx(1, abs=0.02)
    assert np.std(y - 2 * x - 1) == pytest.approx(0.25, rel=0.05)
    assert not torch.equal(data.train.inputs[:100], data.test.inputs[:100])
    again = datasets.load("regression", noise=0.25)
    assert torch.equal(again.train.targets, data.train.targets)


def test_limited_data_are_drawn_from_all_rows():
    rows = torch.arange(1000)
    part = datasets.Split(rows.float()[:, None], rows // 100)  # sorted by class, as files may be
    data = datasets.Data("made", "classification", 10, part, part, part, "Made up.")
    few = data.limited(200, 50)
    assert [len(split.targets) for split in (few.train, few.validation, few.test)] == [200, 50, 50]
    assert len(few.test.targets.unique()) == 10
    assert torch.equal(few.train.inputs[:, 0].long() // 100, few.train.targets)
    assert len(few.train.inputs.unique()) == 200
    assert torch.equal(data.limited(200, 50).test.targets, few.test.targets)
    assert data.limited(None, None) == data
