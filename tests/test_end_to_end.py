"""The end-to-end benchmark trains on the rows that were chosen, splits its time without remainder, refuses wrong choices.

Tiny networks; no assertion is about how long something takes. On a CPU the captured steps are called instead, so the loop over
static tensors is tested too.
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gate, records, runner, timing
from benchmarks.end_to_end import group as end_to_end
from benchmarks.end_to_end import loops
from benchmarks.end_to_end.images import batches, load
from benchmarks.end_to_end.page import times_table
from benchmarks.end_to_end.rig import Marks, Rig
from benchmarks.end_to_end.settings import (
    GAMMAS,
    STAGES,
    Settings,
    candidates_per_sample,
    limit,
    per_candidate,
    settings_for,
)
from benchmarks.micro.case import OURS, Group
from benchmarks.targets import Target

CPU = torch.device("cpu")
TINY = Settings(width=1, batch=8, size=8, gammas=(0.4,), pool=3)  # k = 3: updates take rows of several candidates
GAMMA = 0.4


pytestmark = pytest.mark.usefixtures("one_thread")


def rig(mode: str = "eager", dtype: str = "float32", settings: Settings = TINY) -> Rig:
    return Rig(settings, dtype, mode, CPU)


class TestArithmetic:
    def test_the_limit(self):
        assert limit(1, 0.2) == pytest.approx(1.6 / 3)
        assert limit(0.5, 1) == pytest.approx(3.5 / 3)

    def test_a_cycle_leaves_the_buffer_as_it_was(self):
        for k in (13, 26, 38, 51, 64, 128):
            cycle = candidates_per_sample(k, 128, True)
            held = [i * k % 128 for i in range(1, cycle + 1)]
            assert held.index(0) == cycle - 1

    def test_shorter_samples_are_near_whole_updates(self):
        found = {k: candidates_per_sample(k, 128, False) for k in (13, 26, 38, 51, 64, 128)}
        assert found == {13: 10, 26: 5, 38: 10, 51: 5, 64: 2, 128: 1}
        assert candidates_per_sample(2, 128, False) == 64  # at least an update

    def test_an_update_counts_as_its_share(self):
        whole = per_candidate({"score": 128.0, "select": 64.0, "update": 26.0}, 128, 13, 13 / 128)
        assert sum(whole.values()) * 128 == pytest.approx(128 + 64 + 26)
        # ten candidates gave one update, of a rate of 13 / 128: neither a tenth of it nor none
        assert per_candidate({"score": 10.0, "select": 0.0, "update": 2.0}, 10, 1, 13 / 128)["update"] == 2 * 13 / 128

    def test_defaults(self):
        gpu, cpu = (settings_for(torch.device(name), False) for name in ("cuda", "cpu"))
        assert (gpu.width, gpu.batch, gpu.gammas, gpu.whole) == (64, 128, GAMMAS, True)
        assert len(set(gpu.kinds)) == 6
        assert (cpu.width, cpu.whole) == (64, False)
        assert settings_for(CPU, False, width=32).width == 32


class TestLoops:
    @pytest.mark.parametrize("mode", ["eager", "graph"])
    @pytest.mark.parametrize("name", [OURS, "naive"])
    def test_updates_are_on_the_chosen_rows(self, mode, name):
        """Against a loop over Python lists of what a float64 NumPy step chooses from the very logits."""
        loop = end_to_end.make_loop(rig(mode), name, GAMMA)
        end_to_end.check_loop(loop, ours=name == OURS)
        loop.watch = watch = loops.Watch()
        updates = loop.run(Marks(CPU), 8)  # the cycle of k = 3 and batches of 8
        assert updates == len(watch.updates) == 3
        rows = []
        for (inputs, targets), logits, chosen in zip(watch.candidates, watch.logits, watch.choices, strict=True):
            z, y = logits.double().numpy(), targets.numpy()
            losses = np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) - (z[range(8), y] - z.max(1))
            np.testing.assert_allclose(chosen.losses.numpy(), losses, atol=1e-6)
            assert set(chosen.indices.tolist()) == set(np.argsort(-chosen.scores.numpy(), kind="stable")[:3].tolist())
            rows += [(inputs[i], int(y[i])) for i in chosen.indices.tolist()]
        for number, (inputs, targets) in enumerate(watch.updates):
            expected = rows[8 * number : 8 * number + 8]
            assert targets.tolist() == [label for _, label in expected]
            assert torch.equal(inputs, torch.stack([image for image, _ in expected]))

    @pytest.mark.parametrize("mode", ["eager", "graph"])
    def test_scoring_leaves_the_model_as_it_was_and_updates_do_not(self, mode):
        one = rig(mode)
        loop = end_to_end.make_loop(one, OURS, GAMMA)
        before = {name: value.clone() for name, value in one.model.state_dict().items()}
        if mode == "eager":  # the graphs run several steps while they are made
            loop.run(Marks(CPU), 1)
            assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())
        loop.run(Marks(CPU), 3)
        assert not torch.equal(one.model.head.weight, before["head.weight"])  # type: ignore[union-attr]
        assert all(module.training for module in one.model.modules())

    @pytest.mark.parametrize("name", [OURS, "naive"])
    def test_the_split_adds_up(self, name):
        loop = end_to_end.make_loop(rig(), name, GAMMA)
        start = time.perf_counter()
        loop.sample()
        wall = time.perf_counter() - start
        (taken,) = loop.taken
        assert (taken.candidates, taken.updates) == (8, 3)
        split = taken.split(loop.rate)
        assert set(split) == set(STAGES)
        assert all(seconds > 0 for seconds in split.values())
        assert 0.7 * wall < 8 * sum(split.values()) <= wall

    def test_stages_are_the_time_since_the_last_mark(self, monkeypatch):
        readings = iter([1.0, 3.0, 3.5, 7.5, 8.0])
        monkeypatch.setattr(Marks, "_now", lambda self: next(readings))
        marks = Marks(CPU)
        for stage in ("score", "select", "update", "select"):
            marks.mark(stage)
        assert marks.seconds() == {"score": 2.0, "select": 1.0, "update": 4.0}

    def test_bfloat16_scores_and_trains(self):
        loop = end_to_end.make_loop(rig(dtype="bfloat16"), OURS, GAMMA)
        loop.watch = loops.Watch()
        assert loop.run(Marks(CPU), 3) == 1
        assert loop.watch.logits[0].dtype == torch.bfloat16

    @pytest.mark.parametrize("name", ["plain", "forward", "score"])
    def test_steps(self, name):
        for mode in ("eager", "graph"):
            one = rig(mode)
            step = loops.steps(one, name)
            before = {key: value.clone() for key, value in one.model.state_dict().items()}
            step.sample()
            changed = {key for key, value in one.model.state_dict().items() if not torch.equal(value, before[key])}
            assert ("head.weight" in changed) == (name == "plain")
            assert ("norm.running_mean" in changed) == (name != "score")
            assert one.model.training


class TestGate:
    def test_ours_and_naive_choose_the_same_rows(self):
        for mode in ("eager", "graph"):
            found = end_to_end.check_same_rows(rig(mode), GAMMA)
            assert found["rows that ours and naive choose differently"] == 0

    def test_a_wrong_choice_is_caught(self):
        one = rig()

        def worst(logits, targets):
            chosen = loops.Chooser(one, GAMMA)(logits, targets)
            return chosen._replace(indices=chosen.scores.topk(3, largest=False).indices.sort().values)

        with pytest.raises(gate.GateError, match="top-k"):
            end_to_end.check_same_rows(one, GAMMA, (worst, loops.Chooser(one, GAMMA)))
        with pytest.raises(gate.GateError, match="better score"):
            end_to_end.check_same_rows(one, GAMMA, (loops.Chooser(one, GAMMA), worst))

    def test_a_wrong_selection_in_the_loop_is_caught(self):
        loop = loops.Ours(rig(), GAMMA)
        select = loop._select
        loop._select = lambda logits, targets: select(-logits, targets)
        with pytest.raises(gate.GateError, match="losses"):
            end_to_end.check_loop(loop, ours=True)

    def test_an_update_on_other_rows_is_caught(self):
        def watched() -> loops.Watch:
            loop = loops.Naive(rig(), GAMMA)
            loop.watch = loops.Watch()
            loop.run(Marks(CPU), 8)
            end_to_end.check_updates(loop.watch, 8)
            return loop.watch

        watch = watched()
        watch.updates[1] = (watch.updates[1][0].flip(0), watch.updates[1][1])
        with pytest.raises(gate.GateError, match="update 1 was not"):
            end_to_end.check_updates(watch, 8)
        watch = watched()
        watch.updates.pop()
        with pytest.raises(gate.GateError, match="24 rows were chosen, and 2 updates"):
            end_to_end.check_updates(watch, 8)


def made_up(**times: list[float]) -> dict[str, dict]:
    done = {
        name: {
            "status": "measured",
            "samples_us": values,
            "us": timing.spread(values),
            "params": {"n": 10},
            "over_floor": None,
        }
        for name, values in times.items()
    }
    return done


def group() -> Group:
    settings = Settings(width=1, batch=8, size=8, gammas=(0.5, 1.0), pool=2)
    cases = [end_to_end.case(settings, "float32", "eager", gamma) for gamma in settings.gammas]
    return Group("end_to_end", "title", lambda device, quick: cases, resume=True)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> dict:
    """A finished run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return runner.run_group(group(), CPU, quick=True, path=tmp_path_factory.mktemp("results") / "end_to_end.json")
    finally:
        torch.set_num_threads(before)


class TestRecords:
    def test_ratios_are_taken_within_rounds(self):
        done = made_up(plain=[10.0, 100.0], forward=[4.0, 40.0], score=[2.0, 20.0], ours=[0.0, 0.0])
        end_to_end.add_split(
            done["ours"],
            [{"score": 2.0, "select": 0.1, "update": 2.4}, {"score": 20.0, "select": 1.0, "update": 24.0}],
        )
        done["ours"]["rate"] = 0.25
        end_to_end.compare(done)
        ours = done["ours"]
        assert ours["samples_us"] == [4.5, 45.0]
        assert ours["selection_share"]["p50"] == pytest.approx(0.01)
        assert ours["over_plain"]["p50"] == pytest.approx(0.45)
        assert ours["share"]["p50"] == 0.5
        assert ours["limit"]["p50"] == pytest.approx((0.5 + 0.75) / 3, abs=1e-5)
        assert ours["over_limit"]["p50"] == pytest.approx(0.45 / (1.25 / 3), abs=1e-5)
        assert ours["over_floor"] == pytest.approx(4.5 / (2 + 2.5))
        assert done["plain"]["images_per_second"] == pytest.approx(10 / 55e-6, abs=0.1)
        assert done["plain"]["ratio"]["p50"] == pytest.approx(10 / 4.5, abs=1e-5)
        results = {"end_to_end": {("case", "ours"): ours}}
        for measure, value in (("selecting", 0.01), ("limit", 1.08)):
            target = Target("cpu", "end_to_end", "case", "ours", measure, value + 1e-3)
            assert target.met(target.value(results))  # type: ignore[arg-type]
            assert not Target("cpu", "end_to_end", "case", "ours", measure, value - 1e-3).met(value)

    def test_a_document_and_its_page(self, full, tmp_path):
        pytest.importorskip("matplotlib")
        from benchmarks.end_to_end.drawing import time_split

        path = tmp_path / "end_to_end.json"
        assert full["complete"]
        assert runner.failures(full) == []
        records.write(path, full)
        document = json.loads(path.read_text())
        assert [r["contender"] for r in document["records"]] == ["plain", "forward", "score", OURS, "naive"] * 2
        for record in document["records"]:
            assert record["status"] == "measured", record
            if record["contender"] in (OURS, "naive"):
                parts = record["split_samples_us"]
                sums = [sum(parts[stage][i] for stage in STAGES) for i in range(len(record["samples_us"]))]
                assert record["samples_us"] == pytest.approx(sums, abs=0.01)
                assert record["rate"] == record["params"]["gamma"]
                assert record["updates"] == record["candidates"] * record["rate"]
                # whole cycles: what was read off is the time as it came, but for what runs between two samples
                assert all(0.5 * w < s <= w for s, w in zip(record["samples_us"], record["wall_us"], strict=True))
                assert math.isfinite(record["over_limit"]["p50"])
        page = times_table(document)
        assert page.count("float32 eager gamma=1 ") == 5
        assert "random images" in page
        figure = time_split(document)
        assert figure is not None
        assert len(figure.axes) == 1

    def test_a_run_cut_short_is_continued(self, full, tmp_path, monkeypatch):
        path = tmp_path / "end_to_end.json"
        first, second = (f"float32 eager gamma={g}" for g in ("0.5", "1"))
        kept = [r for r in full["records"] if r["case"] == first]
        cut = [*kept, *(r | {"status": "skipped", "reason": records.CUT_SHORT} for r in full["records"][5:6])]
        records.write(path, full | {"complete": False, "records": cut})
        ran = []
        # the tree may have been committed to meanwhile
        monkeypatch.setattr(records, "environment", lambda device: full["environment"])
        monkeypatch.setattr(runner, "run_case", lambda case, *a, **k: ran.append(case.name) or full["records"][5:])
        again = runner.run_group(group(), CPU, quick=True, path=path)
        assert ran == [second]
        assert again["complete"]
        assert again["records"][:5] == kept
        for change in ({"complete": True}, {"kernels": {}}, {"command": "another"}, {"quick": False}):
            records.write(path, full | {"complete": False, "records": cut} | change)
            assert records.measured_before(path, full) == {}
        other = full["environment"] | {"commit": "another"}
        records.write(path, full | {"complete": False, "environment": other})
        assert records.measured_before(path, full) == {}
        assert records.measured_before(tmp_path / "none.json", full) == {}

    def test_width_and_data_are_part_of_the_command(self, tmp_path):
        assert end_to_end.group().arguments == ""
        assert end_to_end.group(32, tmp_path / "a.npz").arguments == "--width 32 --data a.npz"


class TestImages:
    def test_grey_images_are_padded_and_repeated(self, tmp_path):
        path = tmp_path / "grey.npz"
        images = np.random.default_rng(0).integers(1, 256, (20, 5, 6), dtype=np.uint8)
        labels = np.arange(20, dtype=np.uint8) % 10
        np.savez(path, x_train=images, y_train=labels)
        found, targets = load(path, 8, 10)
        assert found.shape == (20, 3, 8, 8)
        assert found[:, 2, 1:6, 1:7].numpy().tolist() == images.tolist()
        assert int(found.sum()) == 3 * int(images.sum())
        assert targets.tolist() == labels.tolist()
        pool = batches(Settings(batch=8, size=8, pool=4, data=path), CPU)
        assert [tuple(x.shape) for x, _ in pool] == [(8, 3, 8, 8)] * 2
        assert all(x.dtype == torch.float32 and y.dtype == torch.int64 for x, y in pool)

    def test_both_orders_of_channels(self, tmp_path):
        images = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
        for name, stored in (("last", images), ("first", images.transpose(0, 3, 1, 2))):
            np.savez(tmp_path / f"{name}.npz", images=stored, labels=np.zeros(4, np.int64))
            found, _ = load(tmp_path / f"{name}.npz", 8, 10)
            assert found.permute(0, 2, 3, 1).numpy().tolist() == images.tolist()

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"images": np.zeros((2, 8, 8), np.uint8)}, "it needs images and labels"),
            ({"images": np.zeros((2, 8, 8)), "labels": np.zeros(2, int)}, "float64"),
            ({"images": np.zeros((2, 9, 9), np.uint8), "labels": np.zeros(2, int)}, "at most 8 x 8"),
            ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros(3, int)}, r"integers \[2\]"),
            ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.array([0, 10])}, "got 0 to 10"),
            ({"images": np.zeros((2, 8, 8), np.uint8), "labels": np.array([-1, 0])}, "got -1 to 0"),
        ],
    )
    def test_wrong_files_are_named(self, tmp_path, arrays, message):
        np.savez(tmp_path / "wrong.npz", **arrays)
        with pytest.raises(ValueError, match=f"wrong.npz.*{message}"):
            load(tmp_path / "wrong.npz", 8, 10)

    def test_absent_and_broken_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.npz"):
            load(tmp_path / "none.npz", 8, 10)
        whole: Path = tmp_path / "broken.npz"
        np.savez(whole, images=np.zeros((9, 8, 8), np.uint8), labels=np.zeros(9, int))
        whole.write_bytes(whole.read_bytes()[:300])
        with pytest.raises(ValueError, match=r"broken\.npz cannot be read"):
            load(whole, 8, 10)
