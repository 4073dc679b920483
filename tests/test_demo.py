"""The demo, on a very small budget: its files, its counts, its figures, and an orderly end when interrupted."""

import json

import pytest
import torch

from adaselect_kernels import cli
from adaselect_kernels.demo import DemoConfig, figures, replay, report, run, session
from adaselect_kernels.demo.config import TRAIN_SAMPLES, VARIANTS
from adaselect_kernels.demo.task import CandidateBatches, load_task
from adaselect_kernels.doctor import DEMO_PACKAGES
from adaselect_kernels.training.files import replace_file

FIGURES = {"accuracy.png", "method_weights.png", "time_split.png"}
TINY = DemoConfig(epochs=2, gamma=0.25, repeats=2, seed=3, batch_size=200, width=4)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One demo, run to its end: (folder, results, what it printed)."""
    folder = tmp_path_factory.mktemp("demo") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "ROUNDS", 2)
        printed = []
        patch.setattr(session.Console, "print", lambda self, *what, **style: printed.extend(what))
        threads = torch.get_num_threads()
        assert run(TINY, folder)
        assert torch.get_num_threads() == threads
    return folder, json.loads((folder / "results.json").read_text()), printed


def test_files(finished):
    folder, results, _ = finished
    assert {path.name for path in folder.iterdir()} == FIGURES | {"results.json"}
    for name in FIGURES:
        assert (folder / name).read_bytes().startswith(PNG)
    assert not results["interrupted"]
    assert results["versions"]["torch"] == torch.__version__


def test_counts_are_what_the_settings_imply(finished):
    _, results, _ = finished
    batches = 2 * (1437 // 200)
    expected = {variant.label: batches * 50 // 200 for variant in VARIANTS}  # k = 0.25 * 200
    expected["no selection"] = batches
    assert results["config"]["candidates"] == batches * 200
    assert [(entry["seed"], entry["variant"]) for entry in results["runs"]] == [
        (seed, variant.label) for seed in (3, 4) for variant in VARIANTS
    ]
    for entry in results["runs"]:
        assert entry["candidates"] == batches * 200
        assert entry["updates"] == expected[entry["variant"]]
        assert entry["backward_samples"] == entry["updates"] * 200
        assert [point["candidates"] for point in entry["curve"]] == [0, 1400, 2800]
        assert entry["accuracy"] == entry["curve"][-1]["accuracy"]
        assert 0 < entry["accuracy"] <= 1
        parts = entry["seconds"]
        assert parts["total"] == pytest.approx(sum(parts[part] for part in report.PARTS))
        assert parts["total"] == entry["curve"][-1]["seconds"]
        assert min(parts.values()) >= 0


def test_summary_is_of_the_runs(finished):
    _, results, _ = finished
    assert [row["variant"] for row in results["summary"]] == [variant.label for variant in VARIANTS]
    for row in results["summary"]:
        runs = [entry for entry in results["runs"] if entry["variant"] == row["variant"]]
        first, second = (entry["accuracy"] for entry in runs)
        assert row["accuracy_mean"] == pytest.approx((first + second) / 2)
        assert row["accuracy_std"] == pytest.approx(abs(first - second) / 2**0.5)
        assert row["seconds"]["total"] == pytest.approx(sum(entry["seconds"]["total"] for entry in runs) / 2)
    plain, uniform, big_loss = results["summary"][:3]
    assert plain["time_ratio"] == plain["expected_time_ratio"] == 1
    assert plain["no_selection_at_same_time"] == pytest.approx(plain["accuracy_mean"])
    assert uniform["expected_time_ratio"] == pytest.approx(0.25)
    assert big_loss["expected_time_ratio"] == pytest.approx((1 + 3 * 0.25) / 3)
    assert big_loss["time_ratio"] == pytest.approx(big_loss["seconds"]["total"] / plain["seconds"]["total"])


def test_method_weights_are_those_of_every_scored_batch(finished):
    _, results, _ = finished
    with_weights = [entry for entry in results["runs"] if entry["methods"]]
    assert len(with_weights) == 4
    for entry in with_weights:
        assert len(entry["method_weights"]) == 14
        assert entry["method_weights"][0] == pytest.approx([1 / 3] * 3)
        for weights in entry["method_weights"]:
            assert sum(weights) == pytest.approx(1)
    assert all("method_weights" not in entry for entry in results["runs"] if not entry["methods"])


def test_naive_pytorch_chooses_the_same_rows(finished):
    _, results, _ = finished
    assert [cost["variant"] for cost in results["selection_cost"]] == [v.label for v in VARIANTS if v.methods]
    for cost in results["selection_cost"]:
        assert cost["shape"] == [200, 10]
        assert cost["agreement"]["wrong"] == 0
        assert cost["agreement"]["rows"] == 14 * 50
        assert all(len(times["rounds"]) == 2 for times in cost["microseconds"].values())
        assert cost["naive_over_kernels"] > 0


def test_tables(finished):
    _, results, printed = finished
    accuracy, time, cost = (item for item in printed if isinstance(item, report.Table))
    labels = [variant.label for variant in VARIANTS]
    assert list(accuracy.columns[0].cells) == list(time.columns[0].cells) == labels
    assert list(accuracy.columns[3].cells) == [f"{row['backward_samples']:,}" for row in results["summary"]]
    assert list(accuracy.columns[4].cells) == [str(row["updates"]) for row in results["summary"]]
    assert list(time.columns[6].cells) == ["1.00", "0.25", "0.58", "0.58", "0.58"]
    assert len(list(cost.columns[0].cells)) == 2
    console = report.Console(width=80)
    assert all(console.measure(table).maximum <= 80 for table in (accuracy, time, cost))


def test_the_plan_is_printed_before_training(finished):
    _, _, printed = finished
    plan = next(item for item in printed if isinstance(item, str) and item.startswith("Plan: "))
    assert "policy 'adaselection', scorer 'forward', gamma 0.25, 200 rows on cpu" in plan
    assert "break-even gamma" in plan
    assert printed.index(plan) < min(i for i, item in enumerate(printed) if isinstance(item, report.Table))


def test_runs_repeat_bit_for_bit():
    task = load_task()
    first, second = (session._one_run(TINY, VARIANTS[3], 5, task, lambda: None) for _ in range(2))
    assert first[0]["method_weights"] == second[0]["method_weights"]
    assert first[0]["accuracy"] == second[0]["accuracy"]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first[1], second[1], strict=True))


def test_candidates_are_the_same_for_every_variant_of_a_seed_and_fresh_in_every_epoch():
    task = load_task()
    assert len(task.train_labels) == TRAIN_SAMPLES
    assert len(task.test_labels) == 360
    assert task.test_labels.bincount().min() >= 34  # stratified
    one, same, other = (CandidateBatches(task.train_images, task.train_labels, 100, seed) for seed in (1, 1, 2))
    first = [labels for _, labels in one]
    assert len(first) == len(one) == 14
    assert all(torch.equal(a, b) for a, (_, b) in zip(first, same, strict=True))
    assert not torch.equal(first[0], next(iter(one))[1])
    assert not torch.equal(first[0], next(iter(other))[1])


def interrupt_after(runs, monkeypatch):
    started = []

    def train(*arguments, really=session.train):
        started.append(arguments)
        if len(started) > runs:
            raise KeyboardInterrupt
        return really(*arguments)

    monkeypatch.setattr(session, "train", train)


@pytest.mark.parametrize("runs", [1, 4])
def test_an_interruption_keeps_the_finished_runs(monkeypatch, tmp_path, runs):
    interrupt_after(runs, monkeypatch)
    assert cli.main(["demo", "--epochs", "1", "--repeats", "1", "--output", str(tmp_path)]) == cli.INTERRUPTED
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["interrupted"]
    assert [entry["variant"] for entry in results["runs"]] == [variant.label for variant in VARIANTS[:runs]]
    assert len(results["summary"]) == runs
    drawn = FIGURES if runs == 4 else FIGURES - {"method_weights.png"}  # no AdaSelection yet
    assert {path.name for path in tmp_path.iterdir()} == drawn | {"results.json"}


def test_an_interruption_before_the_first_run_writes_nothing(monkeypatch, tmp_path):
    interrupt_after(0, monkeypatch)
    assert not run(TINY, tmp_path / "results")
    assert list((tmp_path / "results").iterdir()) == []


def test_an_interruption_while_figures_are_drawn_leaves_whole_files(monkeypatch, tmp_path):
    (tmp_path / "accuracy.png").write_bytes(b"old")

    def print_png(self, file):
        file.write(PNG)
        raise KeyboardInterrupt

    monkeypatch.setattr(figures.FigureCanvasAgg, "print_png", print_png)
    interrupt_after(1, monkeypatch)
    assert cli.main(["demo", "--epochs", "1", "--repeats", "1", "--output", str(tmp_path)]) == cli.INTERRUPTED
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "accuracy.png"}
    assert (tmp_path / "accuracy.png").read_bytes() == b"old"


def test_replace_file(tmp_path):
    path = tmp_path / "file"
    replace_file(path, lambda file: file.write(b"one"))
    with pytest.raises(ZeroDivisionError):
        replace_file(path, lambda file: file.write(b"two") / 0)
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_an_installed_package_has_no_naive_pytorch(monkeypatch, tmp_path):
    monkeypatch.setattr(replay, "NAIVE", tmp_path / "naive.py")
    monkeypatch.setattr(replay, "ROUNDS", 1)
    batches = [(torch.randn(200, 10), torch.randint(10, (200,))) for _ in range(3)]
    cost = replay.selection_cost(TINY, VARIANTS[3], 0, batches)
    assert cost["naive_over_kernels"] is None
    assert cost["agreement"] is None
    assert set(cost["microseconds"]) == {"kernels"}
    console = report.Console(width=200, record=True)
    report.print_results(console, {"summary": [], "selection_cost": [cost]})
    assert "run the demo from a checkout" in console.export_text()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"repeats": 1.5}, "repeats must be an integer of at least 1, got 1.5"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\], got 0.0"),
        ({"gamma": 2}, r"gamma must be in \(0, 1\], got 2"),
        ({"batch_size": 1438}, r"batch_size must be in \[1, 1437\], got 1438"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**setting)


def test_every_demo_package_is_named_in_the_hint():
    assert set(DEMO_PACKAGES) == {"rich", "matplotlib", "sklearn"}
