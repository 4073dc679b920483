"""The benchmark group "linear": its oracle, its contenders and the memory it measures. Shapes are tiny, no time is asserted."""

import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks import gate
from benchmarks.linear import contenders, memory, oracle
from benchmarks.linear.contenders import make_call
from benchmarks.linear.group import cases
from benchmarks.linear.oracle import LossOracle, ScoreOracle, check_loss, check_score
from benchmarks.linear.page import tables
from benchmarks.linear.problem import Problem
from benchmarks.micro.case import Unavailable

CPU = torch.device("cpu")
SIZES = (40, 12, 90)  # N, H, V: all different, so that a transposed one shows


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(kind: str, dtype: str = "float32", gamma: float = 0.3) -> Problem:
    return Problem(kind, *SIZES, dtype, gamma)


class TestProblem:
    def test_the_products_are_counted(self):
        assert problem("score").flops == 2 * 40 * 12 * 90
        assert problem("loss").flops == 3 * 2 * 12 * 12 * 90  # 12 of 40 rows
        assert problem("backward", gamma=1.0).flops == 2 * 2 * 40 * 12 * 90

    def test_logits_have_the_scale_of_the_other_groups(self):
        hidden, weight, targets, indices = Problem("score", 500, 64, 400, "float32", 0.2).make(CPU, 0)
        logits = hidden @ weight.T
        assert 1.8 < logits.std() < 2.4
        lifted = logits.gather(1, targets[:, None]).mean()
        assert 2.5 < lifted < 3.5  # LIFT / 2
        assert len(indices.unique()) == len(indices) == 100

    def test_gamma_changes_the_rows_and_nothing_else(self):
        some, every = (problem("loss", gamma=gamma).make(CPU, 3) for gamma in (0.3, 1.0))
        assert all(torch.equal(a, b) for a, b in zip(some[:3], every[:3], strict=True))
        assert len(every.indices) == 40


class TestOracle:
    @pytest.mark.parametrize("kind", ["loss", "stored"])
    def test_it_equals_autograd_of_the_stored_logits(self, kind, monkeypatch):
        monkeypatch.setattr(oracle, "CHUNK_ELEMENTS", 90 * 5)  # 5 of 12 rows at a time: a shorter chunk last
        inputs = problem(kind).make(CPU, 1)
        found = LossOracle(problem(kind), inputs, inputs.indices)
        hidden, weight = (t.double().requires_grad_() for t in inputs[:2])
        logits = hidden if kind == "stored" else hidden @ weight.T
        loss = F.cross_entropy(logits[inputs.indices], inputs.targets[inputs.indices])
        loss.backward()
        torch.testing.assert_close(found.loss, loss.detach())
        assert hidden.grad is not None
        torch.testing.assert_close(found.row_gradients, hidden.grad[inputs.indices[found.picked]])
        if kind == "loss":
            assert weight.grad is not None
            torch.testing.assert_close(found.class_gradients, weight.grad[found.classes])

    def test_rows_are_sampled_from_end_to_end(self, monkeypatch):
        monkeypatch.setattr(oracle, "SAMPLED", 8)
        inputs = problem("score").make(CPU, 1)
        found = ScoreOracle(inputs)
        assert len(found.targets) == 8
        assert found.picked is not None
        assert {0, 39} <= set(found.picked.tolist())
        losses = F.cross_entropy(inputs.hidden @ inputs.weight.T, inputs.targets, reduction="none")
        gate.check_losses(losses, found)
        losses[39] += 1e-3
        with pytest.raises(gate.GateError, match="losses"):
            gate.check_losses(losses, found)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_planted_faults_of_a_loss_are_caught(self, dtype):
        case = problem("loss", dtype)
        inputs = case.make(CPU, 2)
        truth = LossOracle(case, inputs, inputs.indices)
        right = make_call("ours", case, inputs, True)()
        check_loss("ours", right, truth)
        chosen, left = int(inputs.indices[3]), next(i for i in range(40) if i not in inputs.indices)
        target = int(truth.y[5])
        faults = {
            "loss": (0, ()),
            "row gradients": (1, (chosen, 4)),
            "gradient of other rows": (1, (left, 4)),
            "class gradients": (2, (target, 4)),
        }
        for what, (which, at) in faults.items():
            for value in (0.5, torch.nan):
                wrong = [t.clone() for t in right]
                wrong[which][at] += value
                with pytest.raises(gate.GateError, match=what):
                    check_loss("ours", wrong, truth)

    def test_peers_are_held_to_less_than_ours(self):
        case = problem("loss")
        inputs = case.make(CPU, 2)
        truth = LossOracle(case, inputs, inputs.indices)
        near = [t * (1 + 1e-4) for t in make_call("naive", case, inputs, True)()]
        check_loss("naive", near, truth)
        for name in ("ours", "full"):
            with pytest.raises(gate.GateError, match="loss"):
                check_loss(name, near, truth)

    def test_planted_faults_of_scores_are_caught(self):
        case = problem("score")
        inputs = case.make(CPU, 2)
        truth = ScoreOracle(inputs)
        losses, scores, indices = make_call("ours", case, inputs, True)()
        check_score("ours", (losses, scores, indices), truth)
        with pytest.raises(gate.GateError, match="losses"):
            check_score("ours", (losses + 1e-3, scores, indices), truth)
        with pytest.raises(gate.GateError, match="sum of scores"):
            check_score("ours", (losses, 2 * scores, indices), truth)
        with pytest.raises(gate.GateError, match="wrongly"):
            check_score("ours", (losses, scores, indices.flip(0)), truth)
        found = make_call("stats", case, inputs, True)()
        check_score("stats", found, truth)
        with pytest.raises(gate.GateError, match="grad_norm"):
            check_score("stats", (found[0], found[1] + 1e-3), truth)


class TestContenders:
    def test_a_library_that_is_absent_or_needs_a_gpu_says_so(self, monkeypatch):
        case = problem("loss")
        inputs = case.make(CPU, 0)
        monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
        monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
        reasons = {
            "cce": "cut-cross-entropy is not installed",
            "liger": "needs a GPU",
            "torch": "has no linear_cross_entropy",
            "torch_chunked": "in chunks",
        }
        for name, reason in reasons.items():
            with pytest.raises(Unavailable, match=reason):
                make_call(name, case, inputs, True)

    @pytest.mark.skipif(
        not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch has no linear_cross_entropy in chunks"
    )
    @pytest.mark.parametrize("name", ["torch", "torch_chunked"])
    @pytest.mark.parametrize("kind", ["score", "loss"])
    def test_torch_is_right(self, kind, name, monkeypatch):
        monkeypatch.setattr(contenders, "CPU_CHUNK", 5)
        case = problem(kind)
        inputs = case.make(CPU, 0)
        found = make_call(name, case, inputs, True)()
        if kind == "score":
            check_score(name, found, ScoreOracle(inputs))
        else:
            check_loss(name, found, LossOracle(case, inputs, inputs.indices))

    def test_full_takes_all_rows(self):
        for kind in ("loss", "stored"):
            case = problem(kind)
            inputs = case.make(CPU, 0)
            check_loss("full", make_call("full", case, inputs, True)(), LossOracle(case, inputs, torch.arange(40)))

    def test_every_contender_of_a_case_has_a_name_of_its_own(self):
        for device in (CPU, torch.device("cuda")):
            names = [case.name for case in cases(device, False)]
            assert len(set(names)) == len(names)


class TestMemory:
    def test_the_logits_that_naive_stores_are_seen(self):
        """Without the allocator's help: in a process of its own, 8 MiB of logits, two or three of them at a time."""
        case = Problem("score", 256, 16, 8192, "float32", 0.2)
        logits = 4 * case.n * case.classes
        assert 1.8 * logits < memory.measure(case, "naive") < 4 * logits

    def test_a_process_that_fails_says_why(self, monkeypatch):
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(RuntimeError, match="exit code 1"):
            memory.measure(problem("loss"), "naive")


def test_the_page_says_what_has_no_memory():
    record = {
        "case": problem("loss").name,
        "params": problem("loss").params,
        "contender": "ours",
        "status": "measured",
        "us": {"p20": 900.0, "p50": 1000.0, "p80": 1100.0},
        "over_floor": 1.5,
        "ratio": None,
        "extra_bytes": 3 << 20,
    }
    failed = record | {"contender": "naive", "extra_bytes": None, "memory_error": "RuntimeError: no"}
    page = tables({"records": [record, failed]})
    rate = problem("loss").flops / 1e9  # in a millisecond
    assert f"| N=40 H=12 V=90 float32 gamma=0.3 | ours | 1.00 [0.90, 1.10] | 1.50 |  | {rate:.3g} | 3.0 |" in page
    assert "- memory of loss N=40 H=12 V=90 float32 gamma=0.3, naive: RuntimeError: no" in page
