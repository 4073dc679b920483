"""Samplers in DataLoaders, with batches in flight, saved in the middle; what they refuse."""

import copy
import io
import itertools

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from adaselect_kernels.samplers import get_sampler
from adaselect_kernels.samplers.sampler import distinct_rows
from tests.samplers.regression import Rows, TorchModel, problem

N, B = 23, 4
X, Y = problem(N)


pytestmark = pytest.mark.usefixtures("one_thread")


def make(name, model=None, **more):
    settings = {
        "uniform": {},
        "rs2": {"gamma": 0.6},
        "impon": {
            "features": torch.from_numpy(X),
            "bank": 7,
            "learning_rate": 0.05,
            "explore": 0.25,
            "model": model or TorchModel(5, 3, 0.5),
        },
        "p_sgd": {},
        "c_sgd": {},
        "infobatch": {"epochs": 4},
    }[name]
    return get_sampler(name, N, B, **{"seed": 3, **settings, **more})


NAMES = ("uniform", "rs2", "impon", "p_sgd", "c_sgd", "infobatch")


class Ahead:
    """What a DataLoader with workers does, without any: `depth` batches are drawn before the first is handed out."""

    def __init__(self, sampler, depth):
        self.sampler, self.depth = sampler, depth

    def __iter__(self):
        drawn, waiting = iter(self.sampler), []
        waiting += itertools.islice(drawn, self.depth)
        while waiting or self.depth == 0:
            waiting += itertools.islice(drawn, 1)
            if not waiting:
                return
            rows = waiting.pop(0)
            yield {"x": torch.from_numpy(X[rows]), "y": torch.from_numpy(Y[rows]), "row": torch.tensor(rows)}


def loader_of(sampler, kind):
    if isinstance(kind, tuple):
        return Ahead(sampler, kind[0])
    return DataLoader(Rows(X, Y), batch_sampler=sampler, num_workers=kind, persistent_workers=kind > 0)


def run(name, kind, epochs=3, stop=None, resume=None):
    """Train; the rows and weights of each step, and the model. Or what is saved in the loop after step `stop`."""
    model = TorchModel(5, 3, 0.5)
    sampler = make(name, model)
    if resume is not None:
        saved = torch.load(io.BytesIO(resume), weights_only=True)
        model.load_state_dict(saved["model"])
        sampler.load_state_dict(saved["sampler"])
    loader, trace = loader_of(sampler, kind), []
    while sampler.epoch < epochs:
        for batch in loader:
            assert torch.equal(batch["row"], sampler.current)
            weights = sampler.weights
            losses = model.step(batch["x"], batch["y"], None if weights is None else weights.double())
            trace.append((batch["row"].tolist(), None if weights is None else weights.tolist()))
            sampler.observe(losses)
            if sampler.step == stop:
                file = io.BytesIO()
                torch.save({"model": model.state_dict(), "sampler": sampler.state_dict()}, file)
                return trace, file.getvalue()
    return trace, (model.w, sampler.theta if name == "impon" else None, sampler.record())


def check_resume(name, kind, stops):
    expected, (w, theta, record) = run(name, kind)
    for stop in stops(len(expected)):
        before, saved = run(name, kind, stop=stop)
        after, (w_, theta_, record_) = run(name, kind, resume=saved)
        assert before + after == expected, stop
        assert torch.equal(w, w_)
        assert theta is None or torch.equal(theta, theta_)
        assert (record.step, record.epoch, record.rate, record.loss_chosen) == (
            record_.step,
            record_.epoch,
            record_.rate,
            record_.loss_chosen,
        )
    return expected


@pytest.mark.parametrize("depth", [1, 3, 50])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_saved_anywhere_continues_bit_for_bit(name, depth):
    check_resume(name, (depth,), lambda steps: range(1, steps, 1 if depth == 1 else 3))


@pytest.mark.parametrize("name", ["uniform", "impon", "infobatch"])
def test_in_a_data_loader(name):
    expected = check_resume(name, 0, lambda steps: (2, steps // 2))
    assert expected == run(name, (0,))[0]
    rows = [row for rows, _ in expected for row in rows]
    if name == "uniform":
        assert sorted(rows) == sorted(list(range(N)) * 3)
        assert [len(rows) for rows, _ in expected] == [4, 4, 4, 4, 4, 3] * 3


@pytest.mark.parametrize("name", ["impon", "infobatch"])
def test_in_a_data_loader_with_persistent_workers(name):
    expected = check_resume(name, 2, lambda steps: (steps // 2 + 1,))
    # two workers with two batches each
    assert expected == run(name, (4,))[0]
    assert expected != run(name, 0)[0] or name == "infobatch"


def test_workers_that_end_with_the_epoch():
    sampler = make("p_sgd")
    loader = DataLoader(Rows(X, Y), batch_sampler=sampler, num_workers=2)
    for epoch in range(2):
        assert sampler.epoch == epoch
        assert len(loader) == 6
        for batch in loader:
            assert torch.equal(batch["row"], sampler.current)
            sampler.observe(batch["x"].square().mean(1))
    assert (sampler.epoch, sampler.step) == (2, 12)


def test_only_the_chosen_rows_are_read():
    data = Rows(X, Y)
    sampler = make("impon")
    for batch in DataLoader(data, batch_sampler=sampler):
        sampler.observe(batch["x"].square().mean(1))
    assert sampler.step == 4  # ceil(23 / 7)
    assert int(data.read.sum()) == 16
    assert sampler.record().rate == 16 / 28


@pytest.mark.parametrize("name", NAMES)
def test_drop_last(name):
    sampler = make(name, drop_last=True)
    sizes = []
    for rows in sampler:
        sizes.append(len(rows))
        sampler.observe(torch.rand(len(rows)))
    assert sizes == [B] * {"uniform": 5, "rs2": 3, "impon": 4, "p_sgd": 6, "c_sgd": 6, "infobatch": 5}[name]
    assert len(sampler) == len(sizes) or name == "infobatch"


def test_the_default_bank_is_200_or_the_set():
    assert get_sampler("impon", 201, 4, features=torch.zeros(201, 1)).bank == 200
    small = get_sampler("impon", 9, 4, features=torch.zeros(9, 1))
    assert small.bank == 9
    assert len(list(small)) == 1


def test_the_first_batch_is_uniform_and_a_wide_bank_is_cheap():
    counts = torch.zeros(12)
    for seed in range(400):
        sampler = get_sampler("impon", 12, 3, features=torch.randn(12, 2), bank=6, seed=seed)
        counts[next(iter(sampler))] += 1
    assert counts.min() > 60  # 100 expected, standard deviation 8.7
    assert counts.max() < 140
    rows = distinct_rows(1000, 2**40, torch.Generator().manual_seed(0))  # no memory of the size of the set
    assert rows.unique().shape[0] == 1000
    assert abs(float(rows.double().mean()) / 2**40 - 0.5) < 0.05


@pytest.mark.parametrize("total", [9, 40])
def test_distinct_rows_are_uniform_in_every_place(total):
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(3, total)
    for _ in range(3000):
        drawn = distinct_rows(3, total, generator)
        assert len(set(drawn.tolist())) == 3
        counts[torch.arange(3), drawn] += 1
    expected = 3000 / total
    assert ((counts - expected).square() / expected).sum() < 3 * total + 6 * (6 * total) ** 0.5  # chi square, 6 sigma


def test_history_rows_are_drawn_by_their_weights():
    sampler = get_sampler("p_sgd", 4, 1, smoothing=0.0)
    sampler._sums[:] = torch.tensor([0.9, 0.6, 0.5, 0.0])  # weights 0.1, 0.4, 0.5, 1
    sampler._seen[:] = 1
    counts = torch.zeros(4)
    for _ in range(300):
        for rows in sampler:
            counts[rows] += 1
            sampler.observe(torch.zeros(0), rows=[])
            sampler._told = 1
    assert torch.allclose(counts / counts.sum(), torch.tensor([0.05, 0.2, 0.25, 0.5]), atol=0.07)


def test_rows_of_weight_zero_come_last():
    sampler = get_sampler("p_sgd", 5, 3, smoothing=0.0)
    sampler._sums[:] = torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0])
    sampler._seen[:] = 1
    third = set()
    for _ in range(20):
        rows = next(iter(sampler))
        assert 2 in rows
        third |= set(rows)
    assert third == {0, 1, 2, 3, 4}


# ---- epochs


def test_a_broken_off_epoch_is_forgotten():
    sampler = make("uniform")
    for rows in sampler:
        sampler.observe(torch.rand(len(rows)))
        if sampler.step == 2:
            break
    assert sampler.epoch == 0
    rows = next(iter(sampler))
    assert sampler.epoch == 1
    assert sampler.current.tolist() == rows


def test_an_old_iteration_ends_when_a_new_one_begins():
    sampler = make("uniform")
    old = iter(sampler)
    next(old)
    next(iter(sampler))
    with pytest.raises(RuntimeError, match="newer iteration"):
        next(old)
    current = iter(sampler)
    next(current)
    sampler.load_state_dict(sampler.state_dict())
    with pytest.raises(RuntimeError, match="a loaded state, has replaced"):
        next(current)


@pytest.mark.parametrize("name", ["impon", "p_sgd", "c_sgd", "infobatch"])
def test_a_second_epoch_without_losses_is_refused(name):
    sampler = make(name)
    list(sampler)
    with pytest.raises(RuntimeError, match=f"'{name}' was told no loss in the last epoch: call observe"):
        list(sampler)


def test_uniform_needs_no_losses():
    sampler = make("uniform")
    for _ in range(2):
        for _rows in sampler:
            sampler.observe(None)
    assert (sampler.epoch, sampler.record().loss_chosen) == (2, None)
    list(sampler)
    list(sampler)


def test_asking_for_the_length_changes_nothing():
    def batches(ask):
        sampler, found = make("infobatch"), []
        for _ in range(3):
            length = len(sampler) if ask else None
            if ask:
                state = sampler.state_dict()
                assert len(sampler) == length
                sampler.load_state_dict(state)
            epoch = []
            for rows in sampler:
                epoch.append(rows)
                sampler.observe(torch.tensor(rows).double())
            assert length in (None, len(epoch))
            found.append(epoch)
        return found

    assert batches(True) == batches(False)


def test_seeds_differ():
    assert list(make("uniform", seed=1)) != list(make("uniform", seed=2))
    assert list(make("uniform", seed=-1)) == list(make("uniform", seed=-1))


def test_the_record():
    sampler = make("impon")
    assert sampler.record().rate != sampler.record().rate  # NaN before any
    for rows in sampler:
        sampler.observe(torch.full((len(rows),), 2.5))
    record = sampler.record()
    assert (record.step, record.epoch, record.weights, record.loss_chosen) == (4, 1, None, 2.5)
    assert record.seconds["select"] > 0
    assert "impon" in repr(sampler).lower()


# ---- observing


def test_rows_in_another_order_and_some_of_them():
    def predictions(order):
        sampler = make("impon", explore=0.0)
        rows = next(iter(sampler))
        losses = {row: 0.1 * row for row in rows}
        told = [rows[i] for i in order]
        sampler.observe(torch.tensor([losses[row] for row in told]), rows=told)
        return sampler.theta

    assert torch.allclose(predictions([0, 1, 2, 3]), predictions([3, 1, 0, 2]), rtol=1e-12)
    assert not torch.allclose(predictions([0, 1]), predictions([0, 1, 2]))


def test_a_batch_can_be_skipped():
    sampler = make("p_sgd")
    iterator = iter(sampler)
    first, second = next(iterator), next(iterator)
    assert sampler.current.tolist() == first
    sampler.observe(torch.zeros(0), rows=[])
    assert sampler.current.tolist() == second
    assert int(sampler._seen.sum()) == 0


def test_non_finite_losses_are_left_out():
    sampler = make("p_sgd")
    rows = next(iter(sampler))
    sampler.observe(torch.tensor([0.5, float("nan"), float("inf"), 1.5]))
    assert sampler._seen[rows].tolist() == [1, 0, 0, 1]
    assert sampler.record().loss_chosen == 1.0


REFUSED = {
    "never drawn": (lambda rows: (torch.rand(4), [99, *rows[1:]]), ValueError, "row 99 was not drawn"),
    "in the set but not drawn": (
        lambda rows: (torch.rand(1), [next(i for i in range(N) if i not in rows)]),
        ValueError,
        "was not drawn: the batch at hand does not hold it",
    ),
    "twice": (lambda rows: (torch.rand(2), [rows[0], rows[0]]), ValueError, "distinct"),
    "too few losses": (lambda rows: (torch.rand(3), None), ValueError, r"losses must be \[4\], one a row, got \(3,\)"),
    "a mean": (lambda rows: (torch.tensor(1.0), None), ValueError, r"\[b\], one a row, got shape \(\)"),
    "ints": (lambda rows: (torch.ones(4, dtype=torch.int64), None), TypeError, "floats"),
    "a list": (lambda rows: ([1.0] * 4, None), TypeError, "list"),
    "none": (lambda rows: (None, None), TypeError, "NoneType"),
    "rows of floats": (lambda rows: (torch.rand(4), torch.tensor(rows).float()), TypeError, "int64"),
    "negative losses": (lambda rows: (torch.tensor([1.0, -1.0, 1.0, 1.0]), None), ValueError, "give confidences"),
}


@pytest.mark.parametrize(("what", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_observations_change_nothing(what, error, message):
    sampler = make("p_sgd")
    rows = next(iter(sampler))
    before = comparable(sampler.state_dict())
    losses, given = what(rows)
    with pytest.raises(error, match=message):
        sampler.observe(losses, given)
    assert comparable(sampler.state_dict()) == before
    sampler.observe(torch.rand(4), rows)
    with pytest.raises(RuntimeError, match="no batch at hand"):
        sampler.observe(torch.rand(4))
    with pytest.raises(RuntimeError, match="no batch at hand"):
        _ = sampler.weights


def test_confidences_are_probabilities():
    sampler = make("c_sgd")
    next(iter(sampler))
    for wrong in (torch.tensor([0.1, 1.1, 0.0, 0.0]), torch.tensor([0.1, float("nan"), 0.0, 0.0])):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            sampler.observe(torch.rand(4), confidences=wrong)
    with pytest.raises(ValueError, match="confidences must be"):
        sampler.observe(torch.rand(4), confidences=torch.rand(3))


# ---- construction


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


WRONG = {
    "no length": (("uniform", Endless(), 2), {}, TypeError, "Endless has none: pass the number of its rows as an int"),
    "no rows": (("uniform", 0, 2), {}, ValueError, "rows must be at least 1"),
    "a bool": (("uniform", True, 2), {}, TypeError, "rows must be an int"),
    "batch 0": (("uniform", 5, 0), {}, ValueError, "batch_size must be at least 1"),
    "batch 1.5": (("uniform", 5, 1.5), {}, TypeError, "batch_size must be an int"),
    "seed": (("uniform", 5, 1), {"seed": 0.5}, TypeError, "seed"),
    "drop_last": (("uniform", 5, 1), {"drop_last": 1}, TypeError, "drop_last must be a bool"),
    "unknown": (("best", 5, 1), {}, ValueError, "name must be one of 'uniform', 'rs2', 'impon'"),
    "a policy": (("big_loss", 5, 1), {}, ValueError, "use policies.get_policy"),
    "unknown setting": (("uniform", 5, 1), {"gamma": 0.5}, TypeError, "has no setting 'gamma'; it accepts seed, drop_"),
    "gamma 0": (("rs2", 5, 1), {"gamma": 0.0}, ValueError, r"gamma must be in \(0, 1\]"),
    "large batch": (("p_sgd", 5, 6), {}, ValueError, "at most the number of rows, 5"),
    "smoothing": (("c_sgd", 5, 1), {"smoothing": -0.1}, ValueError, "smoothing"),
    "smoothing text": (("c_sgd", 5, 1), {"smoothing": "1"}, TypeError, "smoothing"),
    "ratio": (("infobatch", 5, 1), {"epochs": 3, "ratio": 1.0}, ValueError, r"ratio must be in \[0, 1\)"),
    "share": (("infobatch", 5, 1), {"epochs": 3, "full_share": 2}, ValueError, "full_share"),
    "epochs": (("infobatch", 5, 1), {"epochs": 0}, ValueError, "epochs must be at least 1"),
    "no epochs": (("infobatch", 5, 1), {}, TypeError, "epochs"),
    "no features": (("impon", 5, 1), {}, TypeError, "features"),
    "bank": (("impon", 5, 1), {"features": torch.zeros(5, 1), "bank": 6}, ValueError, "number of rows, 5, got 6"),
    "batch over bank": (("impon", 5, 3), {"features": torch.zeros(5, 1), "bank": 2}, ValueError, "at most the bank, 2"),
    "features of others": (("impon", 5, 1), {"features": torch.zeros(4, 1)}, ValueError, r"\[5, D\].*got \(4, 1\)"),
    "images": (("impon", 5, 1), {"features": torch.zeros(5, 2, 2)}, ValueError, r"flatten\(1\)"),
    "int features": (("impon", 5, 1), {"features": torch.zeros(5, 2).long()}, TypeError, "floats or uint8"),
    "a name": (("impon", 5, 1), {"features": "x"}, TypeError, "a tensor .* or a function"),
    "model": (("impon", 5, 1), {"features": torch.zeros(5, 2), "model": 3}, TypeError, "nn.Module"),
    "explore": (("impon", 5, 1), {"features": torch.zeros(5, 2), "explore": 1.1}, ValueError, "explore"),
    "rate": (("impon", 5, 1), {"features": torch.zeros(5, 2), "learning_rate": 0}, ValueError, "learning_rate"),
    "lowest": (("impon", 5, 1), {"features": torch.zeros(5, 2), "lowest": 1}, TypeError, "lowest must be a bool"),
}


@pytest.mark.parametrize(("arguments", "settings", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        get_sampler(*arguments, **settings)


def test_drop_last_that_leaves_nothing():
    with pytest.raises(ValueError, match="no full batch of 6"):
        list(get_sampler("uniform", 5, 6, drop_last=True))
    assert [len(rows) for rows in get_sampler("uniform", 5, 6)] == [5]


def test_a_dataset_gives_its_length():
    assert get_sampler("uniform", Rows(X, Y), 4).rows == N


# ---- state


def comparable(state):
    if isinstance(state, dict):
        return {key: comparable(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [comparable(value) for value in state]
    return state.clone().numpy().tobytes() if isinstance(state, torch.Tensor) else state


def half_way(name, **more):
    """Some steps into the second epoch, with two batches in flight."""
    sampler = make(name, **more)
    for rows in sampler:
        sampler.observe(torch.rand(len(rows), generator=torch.Generator().manual_seed(rows[0])))
    iterator = iter(sampler)
    for _ in range(3):
        next(iterator)
    sampler.observe(torch.rand(len(sampler.current)))
    return sampler


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(state):
        for key in path:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return change


CORRUPT = {
    "format": put("format", 0),
    "another sampler": put("sampler", "best"),
    "an entry too few": lambda state: state.pop("generator"),
    "an entry too many": put("more", 1),
    "another set": put("config", "rows", 24),
    "another batch": put("config", "batch_size", 5),
    "no counts": put("counts", None),
    "a count too few": lambda state: state["counts"].pop("told"),
    "a negative count": put("counts", "begun", -1),
    "a count that is none": put("counts", "step", 1.0),
    "more emitted than planned": put("counts", "emitted", 100),
    "a loss that is none": put("loss_chosen", "1"),
    "no generator": put("generator", torch.zeros(3, dtype=torch.uint8)),
    "a generator of floats": put("generator", 3),
    "a row that is none": put("in_flight", 0, "rows", 0, 23),
    "a row twice": put("in_flight", 0, "rows", lambda rows: rows[:1].repeat(2)),
    "no rows": put("in_flight", 0, "rows", None),
    "too many rows": put("in_flight", 0, "rows", torch.arange(5)),
    "weights of others": put("in_flight", 0, "weights", torch.ones(9)),
    "a note that is none": put("in_flight", 0, "note", "1"),
    "a batch that is none": put("in_flight", 0, 7),
    "more in flight than emitted": lambda state: state["counts"].update(emitted=1),
    "no batches": put("in_flight", 5),
    "no state": put("state", None),
    "a tensor of another dtype": lambda state: state["state"].update(
        {name: value.to(torch.float16) for name, value in state["state"].items()}
    ),
    "a tensor of another shape": lambda state: state["state"].update(
        {name: torch.cat([value, value]) for name, value in state["state"].items() if value.dim()}
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_foreign_and_corrupt_states_are_refused_whole(name):
    sound = half_way(name).state_dict()
    sampler = half_way(name, seed=8)
    before = comparable(sampler.state_dict())
    for what, change in CORRUPT.items():
        state = copy.deepcopy(sound)
        change(state)
        if what == "a tensor of another shape" and comparable(state) == comparable(sound):
            continue
        with pytest.raises(ValueError):  # noqa: PT012
            sampler.load_state_dict(state)
            pytest.fail(what)
        assert comparable(sampler.state_dict()) == before, what
    with pytest.raises(ValueError, match="not a state of a sampler: got int"):
        sampler.load_state_dict(3)
    sampler.load_state_dict(sound)
    assert comparable(sampler.state_dict()) == comparable(sound)


CORRUPT_OF = {
    ("infobatch", "losses"): lambda value: value[:-1],
    ("infobatch", "below"): lambda value: value[:-1],
    ("infobatch", "order"): lambda value: value[:-4],
    ("uniform", "order"): lambda value: torch.cat([value[1:], value[1:2]]),
    ("rs2", "order"): lambda value: value + 23,
    ("impon", "theta"): lambda value: value[:-1],
    ("impon", "theta "): lambda value: value / 0,
    ("p_sgd", "sums"): lambda value: value + 2,
    ("c_sgd", "seen"): lambda value: value[:-1],
}


@pytest.mark.parametrize(("which", "change"), CORRUPT_OF.items(), ids=map(str, CORRUPT_OF))
def test_corrupt_states_of_one_sampler(which, change):
    name, tensor = which[0], which[1].strip()
    sampler = half_way(name)
    state = sampler.state_dict()
    before = comparable(state)
    state["state"][tensor] = change(state["state"][tensor])
    with pytest.raises(ValueError, match="state has"):
        sampler.load_state_dict(state)
    assert comparable(sampler.state_dict()) == before


def test_a_state_of_other_settings_is_refused():
    state = half_way("impon").state_dict()
    for other in ({"lowest": True}, {"explore": 0.5}, {"bank": 8}, {"normalized": True}, {"learning_rate": 0.1}):
        with pytest.raises(ValueError, match="state has config"):
            make("impon", **other).load_state_dict(state)


def test_saved_and_loaded_states_are_copies():
    sampler = half_way("c_sgd")
    state = sampler.state_dict()
    before = comparable(state)
    sampler.observe(torch.rand(4))
    assert comparable(state) == before
    sampler.load_state_dict(state)
    state["state"]["sums"].zero_()
    state["in_flight"][0]["rows"].zero_()
    assert comparable(sampler.state_dict()) == before
