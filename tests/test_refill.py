"""The refill buffer: which rows come out when, whatever a batch is made of, and runs saved in the middle."""

import copy
import dataclasses
import io
import itertools
import math
import time
import types
import weakref
from collections import OrderedDict, UserDict, defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from adaselect_kernels.checks import selected_count
from adaselect_kernels.functional import SampleStats
from adaselect_kernels.policies import get_policy
from adaselect_kernels.training import Rows, SelectedBatches
from adaselect_kernels.training.batches import count_rows, join_rows, map_leaves, move_to, slice_rows, take_rows
from tests.states import flat

pytestmark = pytest.mark.usefixtures("one_thread")


def losses_of(model, batch):
    """The batch is [N, 2]: row number and loss."""
    return batch[:, 1]


def numbered(sizes, seed=0):
    """Candidate batches [N, 2] of (row number, loss) with the given sizes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.arange(sum(sizes)).float(), torch.rand(sum(sizes), generator=generator)], 1)
    return list(rows.split(sizes))


def algorithm(epochs, gamma, size):
    """Algorithms 1 and 2 with the biggest losses, in plain Python: the expected batches, and what is left."""
    buffer, updates = [], []
    for candidates in epochs:
        updates.append([])
        for candidate in candidates:
            k = selected_count(gamma, len(candidate))
            worst = sorted(range(len(candidate)), key=lambda i: -candidate[i, 1].item())[:k]
            buffer += [candidate[i, 0].item() for i in sorted(worst)]
            while len(buffer) >= size:
                updates[-1].append(buffer[:size])
                buffer = buffer[size:]
    return updates, buffer


@pytest.mark.parametrize(
    ("sizes", "gamma", "size"),
    [
        ([10, 10, 10, 10], 0.3, 4),  # k does not divide b
        ([10, 10, 10, 10], 0.5, 5),  # k equals b
        ([10, 10, 10], 0.2, 4),  # k divides b
        ([10, 10, 10], 0.9, 4),  # k > b: two updates from one candidate batch
        ([10, 10, 10], 1.0, 3),  # k > b, three updates
        ([10, 10, 3], 0.3, 4),  # short last batch, k = 1
        ([10, 1], 0.1, 1),  # k = 1, b = 1
        ([10, 10], 0.1, 7),  # no update in one epoch
        ([8, 8, 8], 1.0, 8),  # everything
        ([], 0.3, 4),  # empty loader
    ],
)
def test_it_is_the_algorithm(sizes, gamma, size):
    loader = numbered(sizes)
    batches = SelectedBatches(loader, nn.Identity(), get_policy("big_loss", gamma), size, forward=losses_of)
    epochs = [[batch[:, 0].tolist() for batch in batches] for _ in range(3)]
    expected, left = algorithm([loader] * 3, gamma, size)
    assert epochs == expected
    assert batches.buffered == len(left)
    assert batches._buffer.peek() is None if not left else batches._buffer.peek()[:, 0].tolist() == left
    k = sum(selected_count(gamma, n) for n in sizes)
    counts = batches.counts
    assert (counts.candidates, counts.chosen, counts.epochs) == (3 * sum(sizes), 3 * k, 3)
    assert counts.updates == sum(map(len, expected)) == 3 * k // size


def test_the_model_is_scored_with_the_weights_of_the_moment():
    """Scoring a candidate batch waits for every update before it, also when one candidate batch makes several."""
    events = []

    def forward(model, batch):
        events.append("score")
        return batch[:, 1]

    batches = SelectedBatches(numbered([6, 6]), nn.Identity(), get_policy("big_loss", 1.0), 3, forward=forward)
    events.extend("update" for _ in batches)
    assert events == ["score", "update", "update"] * 2


def test_the_last_selection_is_at_hand():
    batches = SelectedBatches(numbered([4]), nn.Identity(), get_policy("big_loss", 0.5), 2, forward=losses_of)
    assert batches.last is None
    (batch,) = batches
    assert torch.equal(batch, batches.loader[0][batches.last.indices])


class TestRecord:
    def test_before_anything(self):
        batches = SelectedBatches(numbered([4]), nn.Identity(), get_policy("big_loss", 0.5), 2, forward=losses_of)
        record = batches.record()
        assert (record.step, record.epoch, record.weights, record.loss_chosen, record.loss_all) == (
            0,
            0,
            None,
            None,
            None,
        )
        assert math.isnan(record.rate)
        assert record.seconds == {"load": 0.0, "score": 0.0, "select": 0.0, "update": 0.0}

    def test_in_the_middle(self):
        losses = torch.tensor([3.0, math.nan, 1.0, 8.0, 4.0, 2.0, 0.5, 0.25])
        policy = get_policy("adaselection", 0.5, methods=("big_loss", "small_loss"))
        batches = SelectedBatches([losses] * 3, nn.Identity(), policy, 3, forward=lambda model, batch: batch)
        for _ in batches:
            pass
        record, chosen = batches.record(), losses[batches.last.indices]
        assert (record.step, record.epoch) == (4, 1)
        assert record.rate == 4 * 3 / 24  # trained on; all 12 chosen rows are
        assert record.loss_all == pytest.approx(18.75 / 7)
        assert record.loss_chosen == pytest.approx(chosen.mean().item())
        assert record.weights == pytest.approx(
            dict(zip(("big_loss", "small_loss"), policy.state.weights.tolist(), strict=True))
        )
        assert sum(record.weights.values()) == pytest.approx(1)
        assert record.seconds == vars(batches.seconds)
        assert record.seconds["score"] > 0
        assert record.as_dict()["step"] == 4

    def test_waiting_rows_are_not_trained_on(self):
        batches = SelectedBatches(numbered([10]), nn.Identity(), get_policy("big_loss", 0.5), 4, forward=losses_of)
        list(batches)
        assert batches.record().rate == 0.4

    def test_rows_without_a_finite_loss_alone(self):
        loader = [torch.full((4,), math.nan)]
        batches = SelectedBatches(loader, nn.Identity(), get_policy("big_loss", 0.5), 2, forward=lambda m, b: b)
        list(batches)
        assert (batches.record().loss_chosen, batches.record().loss_all) == (None, None)


class Pair(NamedTuple):
    x: Any
    extra: Any


@dataclasses.dataclass(frozen=True)
class Record:
    x: Any
    extra: Any
    label: int = dataclasses.field(default=3, init=False)


@dataclasses.dataclass
class Slotted:
    __slots__ = ("x",)
    x: Any


class Items(dict):
    """A Mapping subclass."""


x = torch.arange(6.0)
TREES = {
    "tensor": x,
    "matrix": torch.arange(12.0).reshape(6, 2),
    "strided": torch.arange(12.0).reshape(2, 6).T,
    "integers": torch.arange(6, dtype=torch.int32),
    "bools": x > 2,
    "tuple": (x, -x),
    "list": [x, -x],
    "dict": {"a": x, 3: -x},
    "namedtuple": Pair(x, {"deep": [x, (x, x)]}),
    "frozen dataclass": Record(x, -x),
    "dataclass with slots": Slotted(x),
    "ordered": OrderedDict(b=x, a=-x),
    "default": defaultdict(list, a=x),
    "user": UserDict(a=x),
    "own mapping": Items(a=x),
    "read only": types.MappingProxyType({"a": x}),
    "array": (x, np.arange(12).reshape(6, 2)),
    "array of strings": np.array(list("abcdef")),
    "strings": (x, list("abcdef")),
    "tuple of strings": (x, tuple("abcdef")),
    "objects": {"x": x, "ids": [object() for _ in range(6)]},
    "whole rows": (x, Rows([torch.ones(i + 1) for i in range(6)]), Rows({"boxes": torch.ones(i, 4)} for i in range(6))),
    "shared": {"x": x, "none": None, "number": 2.5, "flag": True, "name": "train", "bytes": b"b"},
    "no tensor": {"text": list("abcdef"), "label": [1, 2, 3, 4, 5, 6]},
}


def leaves(tree):
    found = []
    map_leaves(lambda path, leaf: found.append((path, leaf)), [tree])
    return found


def rows_of_leaf(leaf):
    """The leaf as a list of comparable rows, or itself where it has none."""
    if isinstance(leaf, (torch.Tensor, np.ndarray)):
        return [(str(leaf.dtype), row) for row in leaf.tolist()]
    if isinstance(leaf, Rows):
        return [repr(row) for row in leaf]
    return list(leaf) if isinstance(leaf, (list, tuple)) else leaf


def expected_rows(tree, rows):
    return [
        (path, [whole[row] for row in rows] if isinstance(whole, list) else whole) for path, whole in flat_rows(tree)
    ]


def flat_rows(tree):
    return [(path, rows_of_leaf(leaf)) for path, leaf in leaves(tree)]


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
class TestTrees:
    def test_rows_are_counted_taken_joined_and_sliced(self, tree):
        assert count_rows(tree) == 6
        taken = take_rows(tree, torch.tensor([1, 4]))
        assert type(taken) is type(tree)
        assert flat_rows(taken) == expected_rows(tree, [1, 4])
        joined = join_rows([taken, take_rows(tree, torch.tensor([0, 2, 3]))])
        assert type(joined) is type(tree)
        assert flat_rows(joined) == expected_rows(tree, [1, 4, 0, 2, 3])
        assert flat_rows(slice_rows(joined, 1, 4)) == expected_rows(tree, [4, 0, 2])
        assert flat_rows(tree) == expected_rows(tree, range(6))  # untouched

    def test_a_loop_over_them(self, tree):
        losses = torch.tensor([3.0, 9.0, 1.0, 8.0, 2.0, 7.0])  # rows 1, 3, 5
        batches = SelectedBatches(
            [tree, tree], nn.Identity(), get_policy("big_loss", 0.5), 4, forward=lambda model, batch: losses
        )
        got = [batch for _ in range(2) for batch in batches]
        assert [flat_rows(batch) for batch in got] == [
            expected_rows(tree, rows) for rows in ([1, 3, 5, 1], [3, 5, 1, 3], [5, 1, 3, 5])
        ]
        assert all(type(batch) is type(tree) for batch in got)

    def test_moved(self, tree):
        moved = move_to(tree, torch.device("meta"))
        found = leaves(moved)
        assert [path for path, _ in found] == [path for path, _ in leaves(tree)]
        for _, leaf in found:
            for part in [leaf] if isinstance(leaf, torch.Tensor) else leaf if isinstance(leaf, Rows) else []:
                assert all(t.device.type == "meta" for _, t in leaves(part))


def test_what_a_mapping_carries_besides_its_items_is_kept():
    taken = take_rows(defaultdict(list, a=x), torch.tensor([0]))
    assert taken.default_factory is list
    assert take_rows(Record(x, x), torch.tensor([0])).label == 3


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ((x, x[:5]), r"batch\[0\] has 6 rows, batch\[1\] has 5"),
        ({"ids": list("abc"), "x": x}, r"batch\['x'\] has 6 rows, batch\['ids'\] has 3; wrap a list of whole rows"),
        ({"a": {"b": [x, np.zeros(4)]}}, r"batch\['a'\]\['b'\]\[0\] has 6 rows, batch\['a'\]\['b'\]\[1\] has 4"),
        (Pair(x, torch.zeros(2, 3)), r"batch\.x has 6 rows, batch\.extra has 2"),
        ((x, Rows([1])), r"batch\[1\] has 1$"),
        ((x, torch.tensor(3.0)), r"batch\[1\] has no rows: a tensor must be \[N, ...\], got a scalar"),
        ((x, {1, 2}), r"batch\[1\]: cannot take rows of a set"),
        ({"a": None, "b": 3}, "a batch needs a tensor"),
        (None, "a batch needs a tensor, an array or a list with one value a row, got NoneType"),
    ],
)
def test_rows_that_disagree_are_refused_by_their_path(batch, match):
    model = nn.Dropout()
    batches = SelectedBatches([batch], model, get_policy("big_loss", 0.5), 2, forward=lambda model, batch: x)
    with pytest.raises(ValueError, match=match):
        list(batches)
    assert batches.counts.candidates == 0
    assert batches.buffered == 0


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        ({"x": x, "lr": 1}, {"x": x, "lr": 2}, r"batch\['lr'\] has no rows and differs between batches: 1 and 2"),
        ({"x": x}, {"y": x}, r"batch has the keys \['x'\] in one batch and \['y'\] in another"),
        ((x, x), [x, x], "batch is a tuple in one batch and a list in another"),
        ((x, None), (x, x), r"batch\[1\] is a NoneType in one batch and a Tensor in another"),
        ([x, x], [x, x, x], r"batch has lengths \[2, 3\]"),
        ([x, x], [x, x.double()], r"batch\[1\]: rows of torch.float64 \(3,\) on cpu cannot join rows of torch.float32"),
        (torch.ones(6, 4), torch.ones(6, 5), r"batch: rows of .* \(3, 5\) on cpu cannot join .*pad to one length"),
        (np.ones((6, 4)), np.ones((6, 5)), r"batch: rows of float64 \(3, 5\) cannot join rows of float64 \(3, 4\)"),
        (np.ones(6), np.ones(6, dtype=np.int64), r"batch: rows of int64"),
    ],
)
def test_batches_that_cannot_be_joined_are_refused_by_their_path(first, second, match):
    batches = SelectedBatches(
        [first, second], nn.Identity(), get_policy("big_loss", 0.5), 6, forward=lambda model, batch: x
    )
    with pytest.raises(ValueError, match=match):
        list(batches)


def test_the_buffer_keeps_chosen_rows_only():
    """A view would keep whole candidate batches alive."""
    loader = numbered([1000])
    candidate = weakref.ref(loader[0])
    policy = get_policy("big_loss", 0.01)
    batches = SelectedBatches(iter([loader.pop()]), nn.Identity(), policy, 64, forward=losses_of)
    assert list(batches) == []
    assert candidate() is None
    assert batches._buffer.peek().shape == (10, 2)
    (piece, _) = batches._buffer._pieces[0]
    assert piece.untyped_storage().nbytes() == 10 * 2 * 4


def test_waiting_rows_hold_no_graph():
    batch = torch.rand(6, requires_grad=True) * 2
    batches = SelectedBatches([batch] * 2, nn.Identity(), get_policy("big_loss", 0.5), 2, forward=lambda m, b: b)
    assert not any(chosen.requires_grad for chosen in batches)


def test_a_yielded_batch_is_the_callers():
    batches = SelectedBatches(numbered([6]), nn.Identity(), get_policy("big_loss", 1.0), 2, forward=losses_of)
    seen = []
    for batch in batches:
        seen.append(batch[:, 0].tolist())
        batch.fill_(-1)
    assert seen == [[0, 1], [2, 3], [4, 5]]


class TestForward:
    def test_the_default_is_a_pair(self):
        model = nn.Linear(3, 4)
        inputs, targets = torch.randn(10, 3), torch.randint(4, (10,))
        expected = get_policy("big_loss", 0.3).select(model(inputs), targets)
        for pair in ((inputs, targets), [inputs, targets]):
            batches = SelectedBatches([pair], model, get_policy("big_loss", 0.3), 3)
            ((chosen, labels),) = batches
            assert torch.equal(chosen, inputs[expected.indices])
            assert torch.equal(labels, targets[expected.indices])
            assert torch.equal(batches.last.losses, expected.losses)

    def test_logits_and_targets_of_a_dict(self):
        model = nn.Linear(3, 4)
        batch = {"inputs": torch.randn(10, 3), "targets": torch.randint(4, (10,)), "text": list("abcdefghij")}
        forward = lambda model, batch: (model(batch["inputs"]), batch["targets"])  # noqa: E731
        batches = SelectedBatches([batch], model, get_policy("big_loss", 0.3), 3, forward=forward)
        (chosen,) = batches
        assert chosen["text"] == [batch["text"][i] for i in batches.last.indices]

    def test_losses_with_gradient_norms(self):
        stats = SampleStats(loss=torch.rand(6), grad_norm=torch.tensor([0.0, 5, 1, 4, 2, 3]))
        batches = SelectedBatches([x], nn.Identity(), get_policy("grad_norm", 0.5), 3, forward=lambda *_: stats)
        assert [batch.tolist() for batch in batches] == [[1, 3, 5]]

    def test_it_runs_inside_the_scoring_pass(self):
        seen = []
        model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))

        def forward(model, batch):
            seen.append((model.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return model(batch[:, None]).float().sum(1)

        for settings in ({}, {"mode": "train"}, {"autocast": torch.bfloat16}):
            list(SelectedBatches([x], model, get_policy("big_loss", 0.5), 2, forward=forward, **settings))
        assert seen == [(False, False, False), (True, False, False), (False, False, True)]
        assert model.training
        assert model[1].num_batches_tracked == 0

    def test_device(self):
        """The meta device stands for a second one."""
        devices = []

        def forward(model, batch):
            devices.append([leaf.device.type for leaf in batch])
            return batch[0]

        for device in (None, "meta"):
            policy = get_policy("big_loss", 0.5)
            batches = SelectedBatches([(x, x)], nn.Identity(), policy, 3, forward=forward, device=device)
            ((chosen, _),) = batches
            assert chosen.device.type == (device or "cpu")
        assert devices == [["cpu", "cpu"], ["meta", "meta"]]

    def test_an_exception_leaves_model_and_buffer(self):
        model = nn.Sequential(nn.Linear(1, 2), nn.Dropout())
        calls = itertools.count()

        def forward(model, batch):
            if next(calls) == 1:
                raise FloatingPointError("on purpose")
            return batch

        batches = SelectedBatches([x, x, x], model, get_policy("big_loss", 0.5), 4, forward=forward)
        with pytest.raises(FloatingPointError):
            list(batches)
        assert model.training
        assert batches.buffered == 3
        assert batches.counts.chosen == 3

    @pytest.mark.parametrize(
        ("batch", "forward", "error", "match"),
        [
            (x, None, TypeError, r"without `forward` a batch must be a pair \(inputs, targets\), got Tensor"),
            ({"x": x}, None, TypeError, "got dict; give forward="),
            ((x, x, x), None, TypeError, "must be a pair"),
            (x, lambda *_: None, TypeError, "forward must return .* got NoneType"),
            (x, lambda *_: SampleStats(), TypeError, "SampleStats with a loss"),
            (x, lambda *_: torch.rand(5), ValueError, "5 scores for 6 rows"),
            (x, lambda *_: torch.rand(()), ValueError, r"losses must be \[N\]"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, batch, forward, error, match):
        with pytest.raises(error, match=match):
            list(SelectedBatches([batch], nn.Identity(), get_policy("big_loss", 0.5), 2, forward=forward))

    def test_tokens_cannot_refill(self):
        logits, targets = torch.randn(4, 3, 5), torch.zeros(4, 3, dtype=torch.int64)
        policy = get_policy("big_loss", 0.5, unit="token")
        with pytest.raises(ValueError, match=r'12 scores for 4 rows.*unit="token"'):
            list(SelectedBatches([(logits, targets)], nn.Identity(), policy, 2))


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an int"),
        ({"batch_size": True}, TypeError, "batch_size must be an int"),
        ({"mode": "score"}, ValueError, "mode must be one of"),
        ({"autocast": "bf16"}, TypeError, "autocast must be"),
    ],
)
def test_settings_are_checked_when_made(settings, error, match):
    with pytest.raises(error, match=match):
        SelectedBatches([], nn.Identity(), get_policy("big_loss", 0.5), **{"batch_size": 2, **settings})


def test_the_hosts_time_is_split():
    def loader():
        for _ in range(2):
            time.sleep(0.02)
            yield x

    def forward(model, batch):
        time.sleep(0.04)
        return batch

    class Slow:
        def select_from_losses(self, losses):
            time.sleep(0.06)
            return get_policy("big_loss", 0.5).select_from_losses(losses)

    batches = SelectedBatches(loader(), nn.Identity(), Slow(), 3, forward=forward)
    for _ in batches:
        time.sleep(0.08)
    seconds = batches.seconds
    for got, least in ((seconds.load, 0.04), (seconds.score, 0.08), (seconds.select, 0.12), (seconds.update, 0.16)):
        assert least <= got < least + 0.5


@pytest.mark.parametrize("synchronize", [False, True])
def test_the_device_is_waited_for_on_request_only(synchronize, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(1))
    policy = get_policy("big_loss", 0.5)
    list(SelectedBatches([x, x], nn.Identity(), policy, 3, forward=lambda m, b: b, synchronize=synchronize))
    assert bool(waits) == synchronize


class TestEpochs:
    def test_leaving_early_starts_a_new_epoch_and_keeps_the_rows(self):
        loader = numbered([10] * 4)
        batches = SelectedBatches(loader, nn.Identity(), get_policy("big_loss", 0.3), 4, forward=losses_of)
        for _ in batches:
            break  # two candidate batches, six rows
        assert (batches.counts.epochs, batches.counts.updates, batches.buffered) == (0, 1, 2)
        again = [batch[:, 0].tolist() for batch in batches]
        expected, _ = algorithm([loader[:2], loader], 0.3, 4)
        assert again == expected[1]
        assert batches.counts.epochs == 1

    def test_a_state_saved_before_the_new_epoch_began_does_not_continue_the_old_one(self):
        def make():
            return SelectedBatches(numbered([6] * 3), nn.Identity(), get_policy("big_loss", 1.0), 2, forward=losses_of)

        batches = make()
        next(iter(batches))  # left early, with two more updates waiting
        again = iter(batches)
        next(again)
        resumed = make()
        resumed.load_state_dict(batches.state_dict())
        assert [batch[:, 0].tolist() for batch in resumed] == [batch[:, 0].tolist() for batch in again]

    def test_an_older_iteration_is_over_when_another_starts(self):
        batches = SelectedBatches(numbered([4] * 4), nn.Identity(), get_policy("big_loss", 0.5), 2, forward=losses_of)
        first = iter(batches)
        next(first)
        next(iter(batches))
        with pytest.raises(RuntimeError, match="another one was started"):
            next(first)

    def test_an_iteration_is_over_when_a_state_is_loaded(self):
        batches = SelectedBatches(numbered([4] * 4), nn.Identity(), get_policy("big_loss", 0.5), 2, forward=losses_of)
        first = iter(batches)
        next(first)
        batches.load_state_dict(batches.state_dict())
        with pytest.raises(RuntimeError, match="a state was loaded"):
            next(first)


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def problem(rows=50):
    generator = torch.Generator().manual_seed(9)
    return TensorDataset(torch.randn(rows, 4, generator=generator), torch.randint(3, (rows,), generator=generator))


def parameters(model):
    return [value.clone() for value in model.state_dict().values()]


def step(model, optimizer, inputs, targets):
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("workers", [0, 2])
def test_choosing_everything_is_plain_training_bit_for_bit(mode, workers):
    """Five epochs with BatchNorm, Dropout and a shuffling loader; 50 = 5 * 10, so every batch is one update."""
    results = []
    for select in (False, True):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loader = DataLoader(problem(), batch_size=10, shuffle=True, num_workers=workers)
        torch.manual_seed(3)
        if select:
            loader = SelectedBatches(loader, model, get_policy("adaselection", 1.0), 10, mode=mode)
        for _ in range(2):
            for inputs, targets in loader:
                step(model, optimizer, inputs, targets)
        results.append([*parameters(model), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Augmented(Dataset):
    """Draws from the global stream for every sample."""

    def __init__(self):
        self.data = problem()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        inputs, target = self.data[index]
        return inputs + 0.1 * torch.randn(4), target


class Stateful:
    """A loader that knows its own place, as torchdata's does: it shuffles by epoch and can go on in the middle."""

    def __init__(self):
        self.data, self.epoch, self.place, self.resumed = problem().tensors, 0, 0, False

    def __iter__(self):
        if not self.resumed:
            self.place = 0
        self.resumed = False
        order = torch.randperm(50, generator=torch.Generator().manual_seed(self.epoch)).split(9)
        while self.place < len(order):
            self.place += 1
            yield tuple(tensor[order[self.place - 1]] for tensor in self.data)
        self.epoch += 1

    def state_dict(self):
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state):
        self.epoch, self.place, self.resumed = state["epoch"], state["place"], True


def own_generator(sampler):
    generator = torch.Generator().manual_seed(4)
    if sampler:
        return DataLoader(problem(), batch_size=9, sampler=RandomSampler(problem(), generator=generator))
    return DataLoader(problem(), batch_size=9, shuffle=True, generator=generator)


LOADERS = {
    "in order": lambda: DataLoader(problem(), batch_size=9),
    "shuffled by the global stream": lambda: DataLoader(problem(), batch_size=9, shuffle=True),
    "shuffled by a generator": lambda: own_generator(False),
    "a sampler with a generator": lambda: own_generator(True),
    "two workers": lambda: DataLoader(problem(), batch_size=9, shuffle=True, num_workers=2),
    "random augmentation": lambda: DataLoader(Augmented(), batch_size=9, shuffle=True),
    "a list": lambda: list(DataLoader(problem(), batch_size=9)),
    "its own state": Stateful,
}


def train(loader, gamma, size, stop=None, resume=None, epochs=3):
    """Train; with `stop`, save after that many updates and return the file; with `resume`, continue from one."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    policy = get_policy("adaselection", gamma, seed=1)
    batches = SelectedBatches(loader, model, policy, size)
    torch.manual_seed(2)
    if resume is not None:
        resume.seek(0)
        saved = torch.load(resume, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        batches.load_state_dict(saved["batches"])
        torch.set_rng_state(saved["stream"])
    while batches.counts.epochs < epochs:
        for inputs, targets in batches:
            step(model, optimizer, inputs, targets)
            if batches.counts.updates == stop:
                file = io.BytesIO()
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "batches": batches.state_dict(),
                        "stream": torch.get_rng_state(),
                    },
                    file,
                )
                return file
    leftover = batches._buffer.peek() or ()
    return [*parameters(model), torch.get_rng_state(), policy.state.buffer, *leftover], batches.counts


@pytest.mark.parametrize(("gamma", "size"), [(0.4, 5), (0.9, 3)], ids=["k<b", "k>b"])
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS.keys())
def test_a_run_saved_in_the_middle_continues_bit_for_bit(loader, gamma, size):
    expected, counts = train(loader(), gamma, size)
    assert counts.updates > 11
    for stop in (1, 2, 5, 11):
        got, resumed = train(loader(), gamma, size, resume=train(loader(), gamma, size, stop=stop))
        assert resumed == counts, stop
        assert len(got) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), stop


def test_a_run_saved_between_epochs_continues_bit_for_bit():
    def run(interrupt):
        loader, model = own_generator(False), small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = SelectedBatches(loader, model, get_policy("adaselection", 0.4), 8)
        for epoch in range(3):
            if interrupt and epoch == 1:
                state, place = copy.deepcopy(batches.state_dict()), loader.generator.get_state()
                assert state["rows"] is not None  # a remainder that must not be lost
                assert state["position"] == 0
                loader = own_generator(False)
                loader.generator.set_state(place)
                batches = SelectedBatches(loader, model, get_policy("adaselection", 0.4), 8)
                batches.load_state_dict(state)
            for inputs, targets in batches:
                step(model, optimizer, inputs, targets)
        return parameters(model), batches.counts

    (expected, counts), (got, resumed) = run(False), run(True)
    assert counts == resumed
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_shorter_loader_cannot_continue():
    state = half_way().state_dict()
    batches = SelectedBatches(numbered([10]), nn.Identity(), get_policy("big_loss", 0.3), 4, forward=losses_of)
    batches.load_state_dict(state)
    with pytest.raises(RuntimeError, match="had consumed 2 batches, the loader has 1"):
        list(batches)


def half_way(loader=None, **settings):
    """In the middle of an epoch, with two rows waiting."""
    loader = numbered([10] * 4) if loader is None else loader
    arguments = {"batch_size": 4, "forward": losses_of, **settings}
    batches = SelectedBatches(loader, nn.Identity(), get_policy("big_loss", 0.3), **arguments)
    next(iter(batches))
    return batches


def test_a_saved_state_is_a_copy_and_holds_no_more_than_the_rows():
    batches = SelectedBatches(numbered([10] * 2), nn.Identity(), get_policy("big_loss", 1.0), 4, forward=losses_of)
    iterator = iter(batches)
    next(iterator)
    state = batches.state_dict()
    assert state["rows"].untyped_storage().nbytes() == 6 * 2 * 4
    kept = state["rows"].clone()
    for batch in iterator:
        batch.fill_(-1)
    assert torch.equal(state["rows"], kept)
    assert state["counts"]["updates"] == 1


def test_a_loaded_state_is_a_copy():
    batches, state = half_way(), half_way().state_dict()
    batches.load_state_dict(state)
    before = flat(batches.state_dict())
    state["rows"].zero_()
    state["order"][0].zero_()
    state["counts"]["epochs"] = 7
    assert flat(batches.state_dict()) == before


def set_entry(*path_and_value):
    *path, last, value = path_and_value

    def change(state):
        target = state
        for key in path:
            target = target[key]
        target[last] = value

    return change


CORRUPT = {
    "another format": set_entry("format", 0),
    "the format before": set_entry("format", 1),
    "an entry too few": lambda state: state.pop("rows"),
    "weights of a policy that has none": lambda state: state.update(weights=torch.ones(len(state["rows"]))),
    "a scorer where there is none": set_entry("scorer", {}),
    "an entry too many": set_entry("more", 1),
    "another batch size": set_entry("settings", "batch_size", 5),
    "another mode": set_entry("settings", "mode", "train"),
    "another autocast": set_entry("settings", "autocast", "torch.bfloat16"),
    "another policy": set_entry("policy", "policy", "small_loss"),
    "another gamma": set_entry("policy", "config", "gamma", 0.4),
    "a step of 0": lambda state: state["policy"]["state"]["step"].zero_(),
    "no counts": set_entry("counts", None),
    "a count too few": lambda state: state["counts"].pop("epochs"),
    "a negative count": set_entry("counts", "epochs", -1),
    "counts that do not fit the rows": set_entry("counts", "updates", 0),
    "rows lost": set_entry("rows", None),
    "a row lost": lambda state: state.update(rows=state["rows"][:1]),
    "rows that are none": set_entry("rows", 3),
    "rows that disagree": lambda state: state.update(rows=(state["rows"], state["rows"][:1])),
    "a negative position": set_entry("position", -1),
    "a position that is none": set_entry("position", 1.0),
    "a position without an order": set_entry("order", None),
    "an order of other generators": lambda state: state["order"].append(state["order"][0]),
    "an order that is none": set_entry("order", [torch.zeros(3)]),
    "an order of numbers": set_entry("order", [7]),
    "the state of a loader that cannot load it": set_entry("loader", {}),
}


@pytest.mark.parametrize("change", CORRUPT.values(), ids=CORRUPT.keys())
def test_a_foreign_or_corrupt_state_is_refused_whole(change):
    state = half_way().state_dict()
    batches = half_way(numbered([7] * 5, seed=1))
    batches.load_state_dict(copy.deepcopy(state))  # sound as it is
    batches = half_way(numbered([7] * 5, seed=1))
    before = flat(batches.state_dict())
    change(state)
    with pytest.raises(ValueError):
        batches.load_state_dict(state)
    assert flat(batches.state_dict()) == before


def test_what_is_no_state_at_all_is_refused():
    with pytest.raises(ValueError, match="not a state of SelectedBatches: got int"):
        half_way().load_state_dict(3)  # type: ignore[arg-type]


def test_a_loader_that_refuses_its_state_leaves_everything():
    class Refusing(list):
        def state_dict(self):
            return {"place": 1}

        def load_state_dict(self, state):
            raise KeyError("on purpose")

    batches = half_way(Refusing(numbered([10] * 4)))
    state = batches.state_dict()
    state["policy"]["state"]["step"] += 5
    before = flat(batches.state_dict())
    with pytest.raises(ValueError, match="the loader refused its state: 'on purpose'"):
        batches.load_state_dict(state)
    assert flat(batches.state_dict()) == before


def test_loaded_rows_go_to_the_device_of_the_batches():
    state = half_way().state_dict()
    batches = half_way(device="meta")
    batches.load_state_dict(state)
    assert batches._buffer.peek().device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_for_the_device():
    model = small_model().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [tuple(t.cuda() for t in pair) for pair in DataLoader(problem(), batch_size=10)]
    batches = SelectedBatches(data, model, get_policy("adaselection", 0.4), 8, autocast=torch.bfloat16)
    for inputs, targets in batches:  # warm-up: compilation may synchronise
        step(model, optimizer, inputs, targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for inputs, targets in batches:
            step(model, optimizer, inputs, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batches.counts.updates == 5
