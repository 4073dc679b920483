"""The benchmark suite computes what it claims to, refuses wrong results, and renders what it measured.

No assertion is about a time: those depend on the machine. Shapes are tiny.
"""

import json
import math
import os
import sys
import time
import zipfile
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from adaselect_kernels import AdaSelectionState, fused_select, reference
from adaselect_kernels.checks import selected_count
from adaselect_kernels.options import METHODS, STATS
from benchmarks import gate, gpu, naive, records, runner, timing
from benchmarks.__main__ import main
from benchmarks.groups import GROUPS
from benchmarks.micro.case import OURS, Case, Contender, Group, Unavailable, floors, make_logits
from benchmarks.targets import TARGETS, Target
from benchmarks.timing import Prepared, Samples

pytest.importorskip("matplotlib")
from benchmarks import figures, report

CPU = torch.device("cpu")
GAMMA = 0.3
CHILD = "the child of a group that hangs"
HANGS = f"subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)', '{CHILD}'])"


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # a process that has ended meanwhile
        return b""


def noise_of(step: int, n: int, seed: int) -> torch.Tensor:
    return -reference.philox_uniform(n, torch.tensor(float(step)), seed).float().log()


class TestNaive:
    @pytest.mark.parametrize(
        "methods",
        [
            ("big_loss", "small_loss", "grad_norm", "uniform"),  # the benchmark's
            ("big_loss", "small_loss"),  # the stacked softmaxes are the importances: no second stack
            ("uniform", "coreset1"),  # no softmax of its own; coreset1 needs those of two other methods
            METHODS,
        ],
    )
    def test_equals_the_reference_over_twenty_steps(self, methods):
        n, seed = 200, 7
        state, naive_state = AdaSelectionState.create(methods, seed=seed), naive.fresh_state(len(methods))
        k = selected_count(GAMMA, n)
        for step in range(1, 21):
            logits, targets = make_logits(n, 17, "float32", CPU, step)
            expected = fused_select(logits.double(), targets, GAMMA, methods=methods, state=state, impl="reference")
            chosen, naive_state = naive.naive_select(
                logits, targets, k, methods, naive_state, noise=noise_of(step, n, seed)
            )
            torch.testing.assert_close(chosen.losses, expected.losses, atol=2e-6, rtol=1e-6)
            torch.testing.assert_close(chosen.scores, expected.scores, atol=0, rtol=2e-4)
            torch.testing.assert_close(naive_state.log_weights.exp(), state.weights.float(), atol=1e-4, rtol=1e-4)
            only_one = set(chosen.indices.tolist()) ^ set(expected.indices.tolist())
            threshold = expected.scores[expected.indices].min()
            assert all(abs(expected.scores[i] / threshold - 1) < 1e-3 for i in only_one)
            assert len(only_one) <= 4

    def test_the_fusible_form_differs_by_cancellation_only(self):
        logits, targets = make_logits(300, 12, "float32", CPU, 0)
        logits[:20].scatter_(1, targets[:20, None], 25.0)  # p_y = 1 to all digits
        for got, expected in zip(
            naive.loss_and_grad_norm_fusible(logits, targets), naive.loss_and_grad_norm(logits, targets), strict=True
        ):
            torch.testing.assert_close(got, expected, atol=5e-4, rtol=1e-5)

    def test_stats_equal_the_reference(self):
        logits, targets = make_logits(64, 9, "bfloat16", CPU, 1)
        table = reference.per_sample_stats(logits.double(), targets, range(len(STATS)), "sample", -100, 0.0)
        for stats in (STATS, ("loss", "grad_norm")):
            found = naive.naive_stats(logits, targets, stats)
            assert list(found) == list(stats)
            for name, values in found.items():
                torch.testing.assert_close(values.double(), table[STATS.index(name)], atol=3e-6, rtol=1e-5)

    def test_one_graph_holds_it(self):
        methods = METHODS
        logits, targets = make_logits(40, 6, "float32", CPU, 2)
        start = naive.fresh_state(len(methods))
        compiled = torch.compile(naive.naive_select, fullgraph=True, dynamic=False, backend="aot_eager")
        noise = noise_of(1, 40, 0)
        got, got_state = compiled(logits, targets, 12, methods, start, noise=noise)
        expected, expected_state = naive.naive_select(logits, targets, 12, methods, start, noise=noise)
        torch.testing.assert_close(got.scores, expected.scores)
        torch.testing.assert_close(got_state.previous_losses, expected_state.previous_losses)


class TestTiming:
    def test_percentiles(self):
        samples = [5.0, 1.0, 3.0, 2.0, 4.0]
        assert timing.spread(samples) == {"p20": 1.8, "p50": 3.0, "p80": 4.2}
        assert timing.percentile([7.0], 80) == 7.0
        assert timing.percentile(samples, 100) == 5.0
        with pytest.raises(ValueError, match="no samples"):
            timing.percentile([], 50)

    def test_a_ratio_is_taken_within_rounds(self):
        assert timing.paired_ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == {"p20": 2.0, "p50": 2.0, "p80": 2.0}

    def test_log_slope(self):
        assert timing.log_slope([1, 10, 100], [3, 300, 30_000]) == pytest.approx(2)

    def test_buffers_exceed_the_cache_only_where_bandwidth_counts(self):
        assert timing.buffer_count(1000, 1 << 20) == 2
        assert timing.buffer_count(1 << 20, 1 << 20) == 2
        assert timing.buffer_count(1 << 18, 1 << 20) == 8
        assert timing.buffer_count(1 << 24, 1 << 20) == 1

    def test_contenders_take_turns_over_their_buffers(self):
        order = []
        contenders = {
            name: Prepared([lambda name=name, i=i: order.append((name, i)) for i in range(2)]) for name in ("a", "b")
        }
        taken = timing.interleave(contenders, CPU, budget_s=0, warm_s=0, min_sample_s=0)
        rounds = order[4:]  # after the warm-up
        assert rounds == [("a", 0), ("b", 0)] * timing.MIN_ROUNDS
        assert order[:4] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
        assert [len(s.seconds) for s in taken.values()] == [timing.MIN_ROUNDS] * 2

    def test_a_captured_sequence_counts_its_calls(self):
        taken = timing.interleave({"a": Prepared([lambda: None], repeats=1000)}, CPU, budget_s=0, warm_s=0)
        assert max(taken["a"].seconds) < timing.MIN_SAMPLE_S

    def test_a_contender_that_breaks_off_leaves_the_others(self):
        def broken():
            raise RuntimeError("no kernel image in /opt/somewhere/file.so\nmore")

        taken = timing.interleave({"a": Prepared([lambda: None]), "b": Prepared([broken])}, CPU, budget_s=0, warm_s=0)
        assert len(taken["a"].seconds) >= timing.MIN_ROUNDS
        assert taken["b"].error == "RuntimeError: no kernel image in <path>"

    def test_a_peer_that_recompiles_in_the_loop_has_no_time(self, monkeypatch):
        traced = iter(range(1000))
        monkeypatch.setattr(timing, "compiled_graphs", lambda: next(traced))
        taken = timing.interleave({"a": Prepared([lambda: None])}, CPU, budget_s=0, warm_s=0)
        assert taken["a"] == Samples([], taken["a"].inner, "torch.compile traced again inside the timed loop")

    def test_torch_compile_counts_as_traced_again(self):
        before = timing.compiled_graphs()
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
        assert timing.compiled_graphs() == before + 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_read_floor_sees_every_byte(self, dtype):
        tensor = torch.ones(6, 4, dtype=dtype)
        before = timing.read_bytes(tensor)()
        tensor[5, 3] = 2
        assert timing.read_bytes(tensor)() != before

    def test_extra_memory_leaves_out_the_outputs(self):
        x = torch.ones(1000)
        assert timing.extra_bytes(lambda: (x + 1,), CPU) < 100
        assert 4000 <= timing.extra_bytes(lambda: ((x + 1) * 2,), CPU) < 4200


class TestGate:
    methods = ("big_loss", "small_loss", "grad_norm", "uniform")

    @pytest.fixture
    def oracle(self) -> gate.SelectionOracle:
        return gate.SelectionOracle(gate.RowOracle(*make_logits(120, 8, "float32", CPU, 3)), self.methods, GAMMA)

    def select(self, oracle: gate.SelectionOracle):
        return fused_select(oracle.rows.logits, oracle.rows.targets, GAMMA, methods=self.methods)

    def test_a_right_result_passes(self, oracle):
        chosen = self.select(oracle)
        found = gate.check_selection(chosen.indices, chosen.scores, chosen.losses, oracle)
        assert found["rows chosen wrongly"] == 0

    def test_chunks_make_one_table(self, monkeypatch, oracle):
        whole = oracle.rows.table
        monkeypatch.setattr(gate, "CHUNK_ELEMENTS", 56)  # 7 rows at a time; 120 rows leave a shorter chunk
        torch.testing.assert_close(gate.RowOracle(oracle.rows.logits, oracle.rows.targets).table, whole)

    def test_a_sampled_table_holds_both_ends(self, monkeypatch):
        monkeypatch.setattr(gate, "SAMPLED_ELEMENTS", 8 * 64)
        logits, targets = make_logits(500, 8, "float32", CPU, 4)
        whole, sampled = gate.RowOracle(logits, targets), gate.RowOracle(logits, targets, sampled=True)
        assert 32 <= len(sampled.targets) <= 64
        assert sampled.picked is not None
        assert {0, 15, 484, 499} <= set(sampled.picked.tolist())
        right = whole.table["margin"].float()
        gate.check_stats({"margin": right}, sampled)
        for row, value in ((499, 1e3), (int(sampled.picked[20]), 1e3), (250, math.nan)):
            wrong = right.clone()
            wrong[row] = value
            with pytest.raises(gate.GateError, match="margin"):
                gate.check_stats({"margin": wrong}, sampled)
        with pytest.raises(gate.GateError, match="shape"):
            gate.check_stats({"margin": right[:499]}, sampled)

    def test_planted_faults_are_caught(self, oracle):
        right = self.select(oracle)
        k, n = len(right.indices), len(right.scores)
        left = next(i for i in range(n) if i not in set(right.indices.tolist()))

        def check(**changed):
            result = right._replace(**changed)
            return gate.check_selection(result.indices, result.scores, result.losses, oracle)

        def changed(values, row, value):
            return values.clone().index_fill_(0, torch.tensor([row]), value)

        worst = right.indices[right.scores[right.indices].argmin()].item()
        better = right.scores.max().item()
        with pytest.raises(gate.GateError, match="losses"):
            check(losses=changed(right.losses, 77, right.losses[77].item() + 1e-3))
        with pytest.raises(gate.GateError, match="losses"):
            check(losses=changed(right.losses, 77, math.nan))
        with pytest.raises(gate.GateError, match="top-k"):
            check(indices=right.indices.masked_fill(right.indices == worst, left).sort().values)
        with pytest.raises(gate.GateError, match="top-k"):
            check(indices=right.indices.flip(0))
        with pytest.raises(gate.GateError, match="shape"):
            check(indices=right.indices[: k - 1])
        with pytest.raises(gate.GateError, match="distinct"):
            check(indices=right.indices.index_fill(0, torch.tensor([0]), int(right.indices[1])))
        scores = changed(right.scores, left, better)
        indices = reference.select_topk(scores, k, True, "index")
        with pytest.raises(gate.GateError, match="scores"):  # consistent with itself, wrong against the oracle
            check(scores=scores, indices=indices)

    def test_a_wrong_method_loss_is_caught(self, oracle):
        chosen = self.select(oracle)
        right = oracle.result[1]
        gate.check_selection(*chosen[:3], oracle, method_losses=right)
        for method in range(4):
            wrong = right.clone()
            wrong[method] *= 1.01
            with pytest.raises(gate.GateError, match=f"method loss {self.methods[method]}"):
                gate.check_selection(*chosen[:3], oracle, method_losses=wrong)

    def test_peers_with_their_own_noise(self, oracle):
        k = selected_count(GAMMA, 120)
        start = naive.fresh_state(4)
        chosen, state = naive.naive_select(oracle.rows.logits, oracle.rows.targets, k, self.methods, start)
        loose = {"method_losses": state.previous_losses, "same_noise": False, "peer": True}
        gate.check_selection(*chosen, oracle, **loose)
        with pytest.raises(gate.GateError, match="better score"):
            gate.check_selection(*chosen._replace(scores=chosen.scores.neg()), oracle, **loose)
        with pytest.raises(gate.GateError, match="sum of scores"):
            gate.check_selection(*chosen._replace(scores=2 * chosen.scores), oracle, **loose)

    @pytest.mark.parametrize("name", STATS)
    def test_a_wrong_statistic_is_caught(self, oracle, name):
        right = {name: oracle.rows.table[name].float()}
        gate.check_stats(right, oracle.rows)
        right[name][60] += 1e-3
        with pytest.raises(gate.GateError, match="loss" if name == "loss" else name):
            gate.check_stats(right, oracle.rows)

    def test_topk(self):
        scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0])
        gate.check_topk(torch.tensor([1, 3]), scores, 2, exact_ties=True)
        gate.check_topk(torch.tensor([4, 3]), scores, 2, exact_ties=False)
        with pytest.raises(gate.GateError, match="wrongly"):
            gate.check_topk(torch.tensor([3, 4]), scores, 2, exact_ties=True)
        with pytest.raises(gate.GateError, match="wrongly"):
            gate.check_topk(torch.tensor([1, 2]), scores, 2, exact_ties=False)


def small_group(*contenders: Contender) -> Group:
    case = Case("case", {"n": 4}, 64, 64, lambda device, buffers: [*contenders, *floors([torch.ones(16)])])
    return Group("small", "A small group", lambda device, quick: [case])


def fails(error: Exception):
    def check():
        raise error

    return check


def prepared() -> Prepared:
    return Prepared([lambda: None])


class TestRunner:
    def test_a_wrong_result_has_no_time_and_the_rest_goes_on(self):
        document = runner.run_group(
            small_group(
                Contender(OURS, "ours", prepared),
                Contender("wrong", "peer", prepared, fails(gate.GateError("losses: error 1"))),
                Contender("absent", "peer", fails(Unavailable("it is not installed"))),
            ),
            CPU,
            quick=True,
        )
        by_name = {r["contender"]: r for r in document["records"]}
        assert by_name["wrong"]["status"] == "failed"
        assert by_name["wrong"]["reason"] == "GateError: losses: error 1"
        assert "us" not in by_name["wrong"]
        assert (by_name["absent"]["status"], by_name["absent"]["reason"]) == ("skipped", "it is not installed")
        assert by_name["read"]["ratio"]["p50"] > 0
        assert runner.failures(document) == []

    def test_a_wrong_result_of_ours_is_a_failure(self):
        wrong = Contender(OURS, "ours", prepared, fails(gate.GateError("scores")))
        document = runner.run_group(small_group(wrong), CPU, quick=True)
        assert runner.failures(document) == ["case ours: GateError: scores"]
        assert all(r["ratio"] is None for r in document["records"] if r["status"] == "measured")

    def test_a_case_may_name_its_floor_and_its_rounds(self):
        contenders = [
            Contender(OURS, "ours", lambda: Prepared([lambda: torch.ones(20_000).sum()])),
            Contender("product", "floor", prepared),
        ]
        case = Case("case", {"n": 4}, 64, 64, lambda device, buffers: contenders, floor="product", rounds=9)
        ours, product = runner.run_case(case, CPU, budget_s=0.0, quick=False, deadline=float("inf"), memory=False)
        assert len(ours["samples_us"]) == 9
        assert ours["floor_us"] == pytest.approx(product["us"]["p50"], rel=1e-2)
        assert product["over_floor"] == pytest.approx(1, rel=1e-2)

    def test_memory_comes_from_the_contender_and_says_what_failed(self):
        def broken() -> int:
            raise RuntimeError("no memory")

        group = small_group(
            Contender(OURS, "ours", prepared, dict, lambda: 7), Contender("peer", "peer", prepared, dict, broken)
        )
        (case,) = group.cases(CPU, True)
        ours, peer, *rest = runner.run_case(case, CPU, budget_s=0, quick=True, deadline=float("inf"), memory=True)
        assert (ours["extra_bytes"], "memory_error" in ours) == (7, False)
        assert (peer["extra_bytes"], peer["memory_error"]) == (None, "RuntimeError: no memory")
        assert not any("extra_bytes" in floor for floor in rest)

    def test_the_time_limit_is_kept(self):
        document = runner.run_group(small_group(Contender(OURS, "ours", prepared)), CPU, quick=True, deadline=0.0)
        assert [r["status"] for r in document["records"]] == ["skipped"]
        assert not document["complete"]

    def test_every_target_names_a_case_that_exists(self):
        for device in ("cpu", "cuda"):
            names = {(g.name, c.name) for g in GROUPS.values() for c in g.cases(torch.device(device), False)}
            wanted = {(t.group, case) for t in TARGETS if t.device == device for case in (t.case, t.other_case) if case}
            assert wanted <= names


@pytest.fixture(scope="module")
def quick_results(tmp_path_factory) -> Path:
    """A quick run of every group, as the command line writes it."""
    out = tmp_path_factory.mktemp("results") / "some-cpu"
    assert main(["run", "--quick", "--device", "cpu", "--out", str(out)]) == 0
    return out


class TestQuickRun:
    def test_it_writes_every_group(self, quick_results):
        assert sorted(p.name for p in quick_results.iterdir()) == sorted(f"{name}.json" for name in GROUPS)
        for name in GROUPS:
            document = records.read(quick_results / f"{name}.json")
            assert document["complete"]
            assert document["quick"]
            assert document["environment"]["device_type"] == "cpu"
            for record in document["records"]:
                assert record["status"] == "measured", record
                assert record["us"]["p20"] <= record["us"]["p50"] <= record["us"]["p80"]
                assert len(record["samples_us"]) >= 3
                assert "memory_error" not in record, record
            assert all(math.isfinite(fit["slope"]) for fit in document["fits"])

    def test_the_files_name_no_path_of_this_machine(self, quick_results):
        for path in quick_results.iterdir():
            text = path.read_text()
            assert str(records.ROOT) not in text
            assert str(Path.home()) not in text
            assert not [word for word in text.split('"') if word.startswith("/")]

    def test_the_report_renders(self, quick_results, tmp_path):
        docs, readme = tmp_path / "docs", tmp_path / "README.md"
        readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
        report.write(quick_results.parent, docs, readme)
        page, table = (docs / report.PAGE).read_text(), readme.read_text()
        for name in GROUPS:
            assert f"benchmarks/results/some-cpu/{name}.json" in page
            for kind in figures.DRAWINGS.get(name, {}):
                figure = docs / "figures" / figures.file_name(name, kind, "some-cpu")
                if kind == "roofline":  # of inputs that come from memory, which tiny ones do not
                    assert not figure.exists()
                    continue
                assert figure.read_bytes().startswith(b"\x89PNG")
                assert f"(figures/{figure.name})" in page
        assert "## GPU\n\nNot measured" in page
        assert "A quick run with tiny shapes: not a measurement." in page
        assert "GPU: not measured." in table
        assert "old" not in table
        assert table.startswith("before\n")
        assert table.endswith("after\n")
        for text in (page, table):
            assert "nan" not in text.lower().replace("nanosecond", "")
            assert " inf" not in text

    def test_a_readme_without_markers_is_left_alone(self, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text("nothing here\n")
        said = report.write(tmp_path / "none", tmp_path / "docs", readme)
        assert any("left README.md alone" in line for line in said)
        assert readme.read_text() == "nothing here\n"
        assert "not measured" in (tmp_path / "docs" / report.PAGE).read_text()


class TestTargets:
    @staticmethod
    def results(**samples: list[float]):
        return {
            "g": {
                ("case", name): {
                    "status": "measured",
                    "us": timing.spread(values),
                    "samples_us": values,
                    "over_floor": 1.25,
                    "extra_bytes": int(values[0]) << 20,
                    "params": {"n": 2, "classes": 5, "gamma": 0.5},
                }
                for name, values in samples.items()
            }
        }

    @pytest.mark.parametrize(
        ("measure", "limit", "against", "value", "met"),
        [
            ("faster", 3.0, ("slow", "fast"), 3.0, True),  # over the better of the two
            ("faster", 3.1, ("slow", "fast"), 3.0, False),
            ("within", 0.34, ("fast",), 1 / 3, True),
            ("within", 0.33, ("fast",), 1 / 3, False),
            ("us", 10.0, (), 10.0, True),
            ("share", 0.9, (), 0.8, False),
            ("product", 3.0, ("fast",), 3.0, True),
            ("product", 3.1, ("fast",), 3.0, False),
            ("rate", 0.23, ("slow",), 2 / 9, True),  # a ninth of the time of all rows, for half of them
            ("rate", 0.22, ("slow",), 2 / 9, False),
            ("memory", 10 << 20, (), 10 << 20, True),
            ("memory", (10 << 20) - 1, (), 10 << 20, False),
            ("less", 0.34, ("slow", "fast"), 1 / 3, True),  # of the better of the two
            ("less", 0.33, ("slow", "fast"), 1 / 3, False),
        ],
    )
    def test_measures(self, measure, limit, against, value, met):
        results = self.results(ours=[10.0, 10.0], slow=[90.0, 90.0], fast=[30.0, 30.0])
        target = Target("cpu", "g", "case", "ours", measure, limit, against)
        assert target.value(results) == pytest.approx(value)
        assert target.met(target.value(results)) is met

    def test_memory_that_was_not_measured_meets_nothing(self):
        results = self.results(ours=[10.0], fast=[30.0])
        results["g"]["case", "fast"]["extra_bytes"] = None
        assert Target("cpu", "g", "case", "ours", "less", 1, ("fast",)).value(results) is None
        assert Target("cpu", "g", "case", "fast", "memory", 1).value(results) is None

    def test_an_element_against_another_case(self):
        results = self.results(ours=[10.0])
        results["g"]["other", "ours"] = results["g"]["case", "ours"] | {"params": {"n": 1, "classes": 5}}
        target = Target("cpu", "g", "case", "ours", "element", 1.2, other_case="other")
        assert target.value(results) == 0.5

    def test_what_is_missing_is_not_measured(self):
        target = Target("cpu", "g", "case", "ours", "faster", 2, ("slow", "absent"))
        assert target.value(self.results(ours=[1.0], slow=[2.0])) is None
        assert target.value({}) is None


class TestStale:
    hashes = MappingProxyType({"kernels/select.py": "aa"})

    @pytest.fixture
    def path(self, tmp_path) -> Path:
        path = tmp_path / "g.json"
        document = {
            "format": 1,
            "quick": False,
            "complete": True,
            "implementation": "cpu",
            "kernels": dict(self.hashes),
        }
        records.write(path, document)
        return path

    def change(self, path: Path, **fields) -> None:
        records.write(path, json.loads(path.read_text()) | fields)

    def test_results_of_these_kernels_are_current(self, path):
        assert records.stale(path, self.hashes, "cpu") is None

    def test_why_results_are_stale(self, path):
        assert records.stale(path.with_name("other.json"), self.hashes, "cpu") == "no results"
        assert records.stale(path, {"kernels/select.py": "bb"}, "cpu") == "kernels changed since: kernels/select.py"
        assert (
            records.stale(path, self.hashes | {"kernels/new.py": "cc"}, "cpu")
            == "kernels changed since: kernels/new.py"
        )
        assert "reference" in (records.stale(path, self.hashes, "reference") or "")
        self.change(path, complete=False)
        assert records.stale(path, self.hashes, "cpu") == "the last run did not finish"
        self.change(path, quick=True)
        assert records.stale(path, self.hashes, "cpu") == "results of a quick run"
        path.write_text("{")
        assert "not JSON" in (records.stale(path, self.hashes, "cpu") or "")

    def test_hashes_follow_the_files_a_group_uses(self, tmp_path):
        folder = tmp_path / "adaselect_kernels" / "kernels"
        folder.mkdir(parents=True)
        for name in ("select.py", "row_stats.py", "maths.py", "select.pyc"):
            (folder / name).write_text(name)
        found = records.kernel_hashes("cuda", ("select",), tmp_path)
        assert [Path(name).name for name in found] == ["maths.py", "select.py"]
        (folder / "maths.py").write_text("changed")
        again = records.kernel_hashes("cuda", ("select",), tmp_path)
        assert {name for name in found if found[name] != again[name]} == {"adaselect_kernels/kernels/maths.py"}

    def test_a_failed_write_leaves_the_old_file(self, path):
        before = path.read_text()
        with pytest.raises(ValueError, match="JSON compliant"):
            records.write(path, {"value": math.nan})
        assert path.read_text() == before
        assert [p.name for p in path.parent.iterdir()] == [path.name]


class TestGpuCommand:
    def test_a_dry_run_measures_skips_and_forces(self, tmp_path, capfd, monkeypatch):
        arguments = ["gpu", "--dry-run", "--groups", "select_topk", "--time-limit", "100", "--out", str(tmp_path)]
        assert main(arguments) == 0
        assert records.read(tmp_path / "select_topk.json")["quick"]
        said = capfd.readouterr().out
        assert "select_topk: no results" in said
        for step in ("build", "tests", "sanitizers"):
            assert f"{step:20} skipped: dry run" in said
        # as if measured in full: current, and not measured again unless forced
        document = records.read(tmp_path / "select_topk.json")
        records.write(tmp_path / "select_topk.json", document | {"quick": False})
        assert main(arguments) == 0
        assert "up to date" in capfd.readouterr().out
        monkeypatch.setattr(gpu, "measure_command", lambda *_: [sys.executable, "-c", ""])
        assert main([*arguments, "--force"]) == 0
        assert "select_topk: asked for" in capfd.readouterr().out
        assert main([*arguments, "--force", "--steps", "build,tests"]) == 0
        assert "select_topk" not in capfd.readouterr().out

    @pytest.fixture
    def measured(self, monkeypatch) -> list[str]:
        """Groups run these programs instead of measuring; the list says which ran, in order."""
        programs = {"fused_select": "sys.exit(3)", "growth": HANGS}
        began = []

        def command(group, device, out, seconds, quick):
            began.append(group)
            return [sys.executable, "-c", f"import sys, time, subprocess; {programs.get(group, 'pass')}"]

        monkeypatch.setattr(gpu, "measure_command", command)
        return began

    def test_a_group_that_fails_leaves_the_next_its_turn(self, measured, tmp_path, capsys):
        assert gpu.run(["fused_select", "select_topk"], 100, tmp_path, dry_run=True) == 1
        summary = capsys.readouterr().out.split("summary")[1]
        assert "fused_select         failed: exit code 3" in summary
        assert "select_topk          ok" in summary
        assert gpu.run(["select_topk"], 100, tmp_path, dry_run=True) == 0

    def test_a_group_that_hangs_is_ended_with_its_children(self, measured, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(gpu, "GRACE_S", 0.5)
        monkeypatch.setattr(gpu, "OVERRUN", 0.3)  # of 15 seconds
        monkeypatch.setattr(gpu, "answers", lambda group, device: group == "growth")
        began = time.monotonic()
        assert gpu.run(["select_topk", "growth"], 30, tmp_path, dry_run=True) == 1
        assert time.monotonic() - began < 30
        summary = capsys.readouterr().out.split("summary")[1]
        assert measured == ["growth", "select_topk"]
        assert "growth               failed: not done within" in summary
        assert "select_topk          ok" in summary
        alive = [path for path in Path("/proc").glob("[0-9]*/cmdline") if CHILD.encode() in read_bytes(path)]
        assert alive == []

    def test_no_step_begins_without_time(self, measured, tmp_path, capsys):
        assert gpu.run(["select_topk"], 0.5, tmp_path, dry_run=True) == 0
        assert "select_topk          skipped: no time left" in capsys.readouterr().out

    def test_stale_groups_come_first_then_those_that_answer_most(self, measured, monkeypatch, tmp_path):
        stale = {
            "select_topk": "no results",
            "per_sample_stats": "kernels changed",
            "growth": None,
            "fused_select": None,
        }
        monkeypatch.setattr(gpu, "staleness", lambda group, device, out: stale[group])
        targets = {"growth": 1, "select_topk": 2, "fused_select": 3, "per_sample_stats": 4}
        monkeypatch.setattr(gpu, "answers", lambda group, device: targets[group])
        gpu.run(list(stale), 100, tmp_path, dry_run=True)
        assert measured == ["per_sample_stats", "select_topk"]
        measured.clear()
        monkeypatch.setattr(gpu, "OVERRUN", 0.1)  # one of them hangs
        monkeypatch.setattr(gpu, "GRACE_S", 1.0)
        gpu.run(list(stale), 20, tmp_path, force=True, dry_run=True)
        assert measured == ["per_sample_stats", "select_topk", "fused_select", "growth"]

    def test_answers_are_counted_from_the_targets(self):
        assert gpu.answers("select_topk", "cuda") == 12
        assert gpu.answers("growth", "cuda") == 0

    @staticmethod
    def fake_tool(folder: Path, monkeypatch, body: str) -> None:
        tool = folder / "compute-sanitizer"
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def sanitized(self, monkeypatch, time_limit: float = 60.0) -> dict[str, str]:
        run = gpu.Run(time_limit)
        monkeypatch.setattr(gpu, "SANITIZER_TARGET", "benchmarks/__init__.py")  # a script that ends well on a CPU
        gpu._sanitizers(run)
        assert "PYTORCH_NO_CUDA_MEMORY_CACHING" not in run.environment
        return run.outcome

    def test_sanitizers_report_what_they_find(self, monkeypatch, tmp_path):
        cached = "PYTORCH_NO_CUDA_MEMORY_CACHING"
        self.fake_tool(tmp_path, monkeypatch, f'[ "$2" = memcheck ] && [ -n "${cached}" ] && exit 0; exit 9')
        outcome = self.sanitized(monkeypatch)
        assert outcome["memcheck"].startswith("ok")
        assert outcome["racecheck"].startswith("failed: exit code 9")

    def test_sanitizers_that_hang_or_are_absent_are_reported(self, monkeypatch, tmp_path):
        self.fake_tool(tmp_path, monkeypatch, "sleep 60")
        monkeypatch.setitem(gpu.LIMITS, "sanitizers", 1)
        monkeypatch.setattr(gpu, "SANITIZERS", ("memcheck",))
        assert self.sanitized(monkeypatch)["memcheck"] == "failed: not done within 1 s"
        monkeypatch.setattr(gpu, "compute_sanitizer", lambda: None)
        assert self.sanitized(monkeypatch) == {"sanitizers": "not available: there is no compute-sanitizer"}

    def test_gpu_tests_run_without_the_plugins_that_are_configured(self, monkeypatch):
        monkeypatch.setattr(gpu, "TESTS", "tests/test_import_directions.py")  # a short one under this configuration
        monkeypatch.setattr(gpu, "_importable", lambda run, module: module == "pytest")
        run = gpu.Run(200)
        gpu._tests(run)
        assert run.outcome["tests"].startswith("ok")
        monkeypatch.setattr(gpu, "_importable", lambda run, module: False)
        gpu._tests(run)
        assert run.outcome["tests"].startswith("not available: pytest")

    def test_wheels_are_importable_for_the_steps_and_gone_afterwards(self, monkeypatch, tmp_path):
        wheel = tmp_path / "a_peer-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("a_peer.py", "NAME = 'a peer'\n")
            archive.writestr("a_peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: a_peer\nVersion: 1.0\n")
            archive.writestr(
                "a_peer-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr("a_peer-1.0.dist-info/RECORD", "")
        monkeypatch.setattr(gpu, "WHEELS", tmp_path)
        run = gpu.Run(100)
        gpu._wheels(run, tmp_path / "installed")
        assert run.outcome["wheels"].startswith("ok")
        run.step("import", [sys.executable, "-c", "import a_peer, numpy"], 60)
        assert run.outcome["import"].startswith("ok")
        monkeypatch.setattr(gpu, "WHEELS", tmp_path / "none")
        gpu._wheels(run, tmp_path / "installed")
        assert run.outcome["wheels"] == "skipped: none in .whl"

    def test_it_refuses_a_machine_without_a_gpu(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["gpu"]) == 1
        assert "--dry-run" in capsys.readouterr().err

    @pytest.mark.parametrize("option", ["--groups", "--steps"])
    def test_unknown_names_are_refused(self, option, capsys):
        with pytest.raises(SystemExit):
            main(["gpu", option, "nonsense"])
        assert "nonsense" in capsys.readouterr().err
