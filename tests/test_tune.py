"""The tuner: which candidates it tries, what it refuses, whom it lets win, and that tables are left as they were."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from adaselect_kernels import per_sample_stats
from benchmarks import gate, tune
from benchmarks.__main__ import main

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


class Waiting(NamedTuple):
    """A configuration whose work takes `milliseconds` of a made-up clock; `wrong` ones have wrong results."""

    milliseconds: int
    wrong: int = 1


@pytest.fixture
def waiting(monkeypatch):
    """Makes a family whose only entry waits, and a list of the entries it was run with."""
    ran = []

    def make(entry, **bounds):
        table = {tune.LAST: entry}

        def call():
            ran.append(table[tune.LAST])

        def check():
            if table[tune.LAST].wrong != 1:
                raise gate.GateError("planted fault")

        work = tune.Work("wait", [call], check)
        return tune.Family("waiting", "WAITING", table, lambda key, device, quick: work, bounds), ran

    def time_calls(calls, inner, device):
        for call in calls:
            call()
        return inner * 1e-3 * ran[-1].milliseconds

    monkeypatch.setattr(tune.timing, "time_calls", time_calls)
    monkeypatch.setattr(tune, "family_file", lambda family: "waiting.py")
    return make


@pytest.mark.parametrize("name", tune.FAMILIES)
def test_candidates_are_the_entry_and_its_neighbours(name):
    family = tune.FAMILIES[name]
    assert set(family.bounds) <= set(next(iter(family.table.values()))._fields)
    assert tune.family_file(family).endswith(".py")
    for key, entry in family.table.items():
        first, *others = tune.candidates(family, key)
        assert first == entry
        assert others
        assert len({first, *others}) == len(others) + 1
        for other in others:
            (changed,) = (f for f in entry._fields if getattr(other, f) != getattr(entry, f))
            low, high = family.bounds[changed]
            assert getattr(other, changed) in (getattr(entry, changed) // 2, getattr(entry, changed) * 2)
            assert low <= getattr(other, changed) <= high


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="launches are recorded without the interpreter")
def test_launchers_use_the_candidate_and_then_the_table_again():
    from benchmarks.launches import cpu_batch, record

    logits, targets = cpu_batch(100, 100)

    def launch():
        (launch,) = record(lambda: per_sample_stats(logits, targets, impl="triton"))
        return launch.num_warps, launch.grid

    family = tune.FAMILIES["tile"]
    before, table = launch(), dict(family.table)
    with tune.instead(family, 128, family.table[128]._replace(threads=8, warps=8)):
        assert launch() == (8, (4, 1, 1))  # 32 rows a program
    assert family.table == table
    assert launch() == before != (8, (4, 1, 1))


def test_the_faster_candidate_wins_and_is_printed_as_source(waiting):
    family, ran = waiting(Waiting(8), milliseconds=(4, 16))
    found = tune.tune_entry(family, tune.LAST, CPU, quick=False)
    assert [record["entry"]["milliseconds"] for record in found] == [8, 4, 16]
    assert [record["winner"] for record in found] == [False, True, False]
    assert [record["current"] for record in found] == [True, False, False]
    for record in found:
        assert record["us"]["p50"] == pytest.approx(1000 * record["entry"]["milliseconds"])
        assert len(record["samples_us"]) >= 5
    assert {entry.milliseconds for entry in ran} == {8, 4, 16}
    assert family.table == {tune.LAST: Waiting(8)}
    page = tune.page(family, found)
    source = "\n".join(page[page.index("WAITING = {") :])
    (statement,) = ast.parse(source).body
    assert eval(compile(ast.Expression(statement.value), "", "eval"), {"Waiting": Waiting}) == {tune.LAST: Waiting(4)}
    assert "of the time of Waiting(milliseconds=8, wrong=1)" in source


def test_a_wrong_candidate_has_no_time_and_cannot_win(waiting):
    family, _ = waiting(Waiting(8), milliseconds=(8, 8), wrong=(2, 2))
    own, wrong = tune.tune_entry(family, tune.LAST, CPU, quick=True)
    assert own["winner"]
    assert wrong["status"] == "failed"
    assert "planted fault" in wrong["reason"]
    assert wrong["us"] is None
    assert not wrong["winner"]
    assert any("failed: GateError: planted fault" in line for line in tune.page(family, [own, wrong]))


def test_a_table_whose_own_entry_fails_is_kept(waiting):
    family, _ = waiting(Waiting(2, wrong=2), wrong=(1, 1))
    found = tune.tune_entry(family, tune.LAST, CPU, quick=True)
    assert [record["status"] for record in found] == ["failed", "measured"]
    assert not any(record["winner"] for record in found), "there is nothing to be compared with"


@pytest.mark.parametrize(
    ("ratios", "winner"),
    [
        ([(1, 1), (0.99, 0.995)], 0),  # within the noise
        ([(1, 1), (0.9, 1.01)], 0),  # not in four rounds of five
        ([(1, 1), (0.9, 0.95), (0.8, 0.97)], 2),  # the fastest of those beyond it
    ],
)
def test_the_winner_is_faster_beyond_noise(ratios, winner):
    found = [
        {"ratio": {"p50": middle, "p80": high}, "status": "measured", "winner": False, "current": i == 0}
        for i, (middle, high) in enumerate(ratios)
    ]
    tune._mark_winner(found)
    assert [record["winner"] for record in found] == [i == winner for i in range(len(found))]


def test_a_quick_run_writes_every_sample(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "tune", "block", "--device", "cpu", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "tune.json").read_text())
    assert document["quick"]
    assert document["complete"]
    assert document["command"] == "python -m benchmarks tune block --quick"
    assert [(record["key"], record["current"]) for record in document["records"]] == [
        (1024, True), (1024, False), (4096, True), (4096, False)
    ]  # fmt: skip
    assert all(record["status"] == "measured" and len(record["samples_us"]) >= 3 for record in document["records"])
    assert "BLOCKS = {" in done.stdout
    assert "none of this was measured" in done.stdout


def test_what_cannot_be_tuned_is_refused(capsys, tmp_path, monkeypatch):
    assert main(["tune", "tiles", "--device", "cpu", "--quick"]) == 2
    assert "got tiles" in capsys.readouterr().err
    assert main(["tune", "tile", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "needs a GPU" in capsys.readouterr().err
    monkeypatch.setattr(tune.dispatch, "unavailable", lambda impl, device: "planted reason")
    assert main(["tune", "tile", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    assert "planted reason" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
