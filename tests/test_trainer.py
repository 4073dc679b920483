"""The trainer: runs killed at any step end with the bits of runs that were not, damaged files are refused whole."""

import json
import os
import random
import signal
import struct
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaselect_kernels.policies import get_policy
from adaselect_kernels.samplers import get_sampler
from adaselect_kernels.training import ScheduleWarning, SelectedBatches, get_scorer, planner, scale_schedule
from adaselect_kernels.training import checkpoint as files
from adaselect_kernels.training.checkpoint import load_checkpoint, random_streams, save_checkpoint, set_random_streams
from adaselect_kernels.training.trainer import Trainer

ROWS, EPOCHS = 60, 3
DATA = torch.Generator().manual_seed(3)
INPUTS, TARGETS = torch.randn(ROWS, 4, generator=DATA), torch.randint(3, (ROWS,), generator=DATA)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::adaselect_kernels.training.planner.PlanWarning"),
]


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def tripled(model, batch):
    """Batches of (inputs, targets, row number)."""
    return model(batch[0]), batch[1]


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def of_policy(model, policy, workers=0, scorer=None):
    data = TensorDataset(INPUTS, TARGETS, torch.arange(ROWS))
    loader = DataLoader(data, batch_size=10, shuffle=True, num_workers=workers)
    return SelectedBatches(loader, model, policy, 7, forward=scorer or tripled)


def of_sampler(sampler, workers=0, **settings):
    data = TensorDataset(INPUTS, TARGETS, torch.arange(ROWS))
    return DataLoader(data, batch_sampler=sampler, num_workers=workers, **settings)


def impon(model, **settings):
    return get_sampler("impon", ROWS, 6, bank=12, features=INPUTS, model=model, learning_rate=0.01, **settings)


def importance(model):
    return get_policy("importance", 0.4)


SOURCES = {
    "policy": lambda m: of_policy(m, get_policy("adaselection", 0.4)),
    "policy with weights, workers": lambda m: of_policy(m, importance(m), workers=2),
    "policy on stale losses": lambda m: of_policy(m, get_policy("big_loss", 0.4), scorer=get_scorer("stale", rows=2, size=ROWS)),
    "sampler": lambda m: of_sampler(impon(m)),
    "sampler, workers": lambda m: of_sampler(get_sampler("infobatch", ROWS, 7, epochs=4), workers=2),
    "sampler, workers that persist": lambda m: of_sampler(impon(m), workers=2, persistent_workers=True),
    "sampler with rounds": lambda m: of_sampler(
        get_sampler("dynams", ROWS, 8, epochs=EPOCHS, period=1, budget=0.6), generator=torch.Generator().manual_seed(5)
    ),
}  # fmt: skip


def trainer_in(folder, kind, loss=losses, every=3, **settings):
    torch.manual_seed(1)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = scale_schedule(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100), planned=30)
    source = SOURCES[kind](model)

    def rescore(model):
        source.batch_sampler.score(model, DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=20))

    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    return Trainer(
        model,
        optimizer,
        source,
        loss=loss,
        scheduler=schedule,
        rescore=rescore,
        checkpoint=folder / "run.pt",
        every=every,
        log=folder / "run.jsonl",
        log_every=2,
        **({"show_plan": False, "progress": False} | settings),
    )


def bits(trainer):
    """Digest of everything but the length of the log, whose seconds differ."""
    return files._digest(trainer.state_dict() | {"log": 0})


CHANCE = random.SystemRandom()


def scatter_streams():
    torch.manual_seed(CHANCE.getrandbits(32))
    random.seed()
    np.random.seed(CHANCE.getrandbits(32))  # noqa: NPY002


def logged(folder):
    records = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def killed(folder, kind, when):
    """Train in a process that SIGKILL ends; `when` plants the kill there."""
    pid = os.fork()
    if pid == 0:
        try:
            trainer = trainer_in(folder, kind, show_plan=False)
            when(trainer)
            trainer.fit(EPOCHS, updates=30)
        finally:
            os._exit(3)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def in_update(step):
    """In the middle of an update: gradients are there, half of the momenta are new."""

    def plant(trainer):
        calls = []
        really = trainer.loss

        def loss(model, batch):
            calls.append(1)
            values = really(model, batch)
            if len(calls) == step:
                values.mean().backward()
                trainer.optimizer.step()
                os.kill(os.getpid(), signal.SIGKILL)
            return values

        trainer.loss = loss

    return plant


def in_save(save):
    """While a checkpoint is written: the temporary file is whole, the old one still there."""

    def plant(trainer):
        calls = []

        def fsync(number, really=os.fsync):
            calls.append(1)
            if len(calls) == save:
                os.kill(os.getpid(), signal.SIGKILL)
            really(number)

        files.os.fsync = fsync

    return plant


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """By kind: (bits at the end, log, updates)."""
    known = {}

    def run(kind):
        if kind not in known:
            folder = tmp_path_factory.mktemp("whole")
            trainer = trainer_in(folder, kind)
            trainer.fit(EPOCHS, updates=30)
            known[kind] = bits(trainer), logged(folder), trainer.updates
        return known[kind]

    return run


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", SOURCES)
def test_a_killed_run_continues_bit_for_bit(tmp_path, uninterrupted, kind):
    expected, log, updates = uninterrupted(kind)
    step = CHANCE.randint(4, updates)
    print(f"killed in update {step} of {updates}")
    killed(tmp_path, kind, in_update(step))
    trainer = trainer_in(tmp_path, kind, show_plan=True)
    scatter_streams()  # they must come from the checkpoint
    record = trainer.fit(EPOCHS, updates=30, resume=True)
    assert (trainer.updates, record.epoch) == (updates, EPOCHS)
    assert logged(tmp_path) == log
    assert bits(trainer) == expected


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_again_and_again_also_while_it_saves(tmp_path, uninterrupted):
    expected, log, _ = uninterrupted("sampler")
    for when in (in_update(2), in_save(1), in_save(2), in_update(5), in_save(2)):
        pid = os.fork()
        if pid == 0:
            try:
                trainer = trainer_in(tmp_path, "sampler")
                when(trainer)
                trainer.fit(EPOCHS, updates=30, resume=True)
            finally:
                os._exit(3)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    trainer = trainer_in(tmp_path, "sampler")
    trainer.fit(EPOCHS, updates=30, resume=True)
    assert logged(tmp_path) == log
    assert bits(trainer) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.jsonl", "run.pt"]


@pytest.mark.parametrize("kind", ["policy on stale losses", "sampler, workers"])
def test_it_is_the_loop_that_one_would_write(tmp_path, uninterrupted, kind):
    trainer = trainer_in(tmp_path, kind)  # only for what it is made of
    model, optimizer, source = trainer.model, trainer.optimizer, trainer.data
    for _ in range(EPOCHS):
        for batch in source:
            optimizer.zero_grad()
            values = losses(model, batch)
            weights = trainer.source.weights
            (values if weights is None else values * weights).mean().backward()
            optimizer.step()
            trainer.scheduler.step()
            if isinstance(source, DataLoader):
                source.batch_sampler.observe(values)
            else:
                source.forward.update(batch[2], values)
    assert bits(trainer) == uninterrupted(kind)[0]


@pytest.mark.parametrize("kind", ["policy", "sampler, workers"])
def test_ctrl_c_waits_for_the_update_and_saves(tmp_path, uninterrupted, kind):
    expected, log, _ = uninterrupted(kind)
    trainer = trainer_in(tmp_path, kind, every=1000)
    before = signal.getsignal(signal.SIGINT)
    calls = []

    def interrupting(model, batch):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return losses(model, batch)

    trainer.loss = interrupting
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(EPOCHS, updates=30)
    assert signal.getsignal(signal.SIGINT) is before
    assert trainer.updates == 5
    resumed = trainer_in(tmp_path, kind)
    resumed.fit(EPOCHS, updates=30, resume=True)
    assert logged(tmp_path) == log
    assert bits(resumed) == expected


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def interrupting(model, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return losses(model, batch)

    trainer = trainer_in(tmp_path, "sampler", loss=interrupting)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(EPOCHS, updates=30)
    assert not (tmp_path / "run.pt").exists()


def test_epochs_in_two_calls_are_epochs_in_one(tmp_path, uninterrupted):
    trainer = trainer_in(tmp_path, "policy")
    trainer.fit(1, updates=30)
    trainer = trainer_in(tmp_path, "policy")
    trainer.fit(EPOCHS, updates=30, resume=True)
    assert bits(trainer) == uninterrupted("policy")[0]


def test_an_update_is_the_mean_of_weight_times_loss():
    model = network().double()
    reference = network().double()
    reference.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(INPUTS.double(), TARGETS, torch.arange(ROWS))
    batches = SelectedBatches(DataLoader(data, batch_size=10), model, get_policy("importance", 0.4), 7, forward=tripled)
    seen = []

    def loss(model, batch):
        seen.append((batch, batches.weights.clone(), torch.get_rng_state()))
        return losses(model, batch)

    Trainer(model, optimizer, batches, loss=loss, show_plan=False, progress=False).fit(1)
    assert len(seen) == 24 // 7
    for batch, weights, stream in seen:
        assert len(set(weights.tolist())) > 1
        torch.set_rng_state(stream)
        reference.zero_grad()
        (losses(reference, batch) * weights.double()).sum().div(7).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.1 * parameter.grad
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_the_log_is_of_step_records(tmp_path):
    trainer = trainer_in(tmp_path, "policy")
    record = trainer.fit(EPOCHS, updates=30)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(2, trainer.updates + 1, 2))
    assert set(lines[0]) == set(record.as_dict())
    assert lines[0]["weights"] == pytest.approx({"big_loss": 1 / 3, "small_loss": 1 / 3, "uniform": 1 / 3}, rel=0.5)


@pytest.mark.parametrize(
    "kind", ["policy", "policy on stale losses", "sampler", "sampler, workers", "sampler with rounds"]
)
def test_the_plan_is_printed_first_and_changes_nothing(tmp_path, uninterrupted, capsys, kind):
    order = []

    def loss(model, batch):
        order.append(capsys.readouterr().out)
        return losses(model, batch)

    trainer = trainer_in(tmp_path, kind, loss=loss, show_plan=True)
    trainer.fit(EPOCHS, updates=30)
    assert bits(trainer) == uninterrupted(kind)[0]
    printed = "".join(order)
    assert printed.count("Plan: ") == 1
    assert printed.startswith("Plan: policy" if kind.startswith("policy") else "Plan: sampler")
    turns = (2 + 5) * (2 if "rounds" in kind else 1)  # calls of the loss inside the plan; there it also scores
    assert "Plan: " in "".join(order[: turns + 1])


def test_a_schedule_that_was_not_scaled_warns(tmp_path):
    def made(source, schedule=torch.optim.lr_scheduler.CosineAnnealingLR, steps=100):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Trainer(
            model, optimizer, SOURCES[source](model), loss=losses, scheduler=schedule(optimizer, steps), show_plan=False
        )

    # 6 candidate batches of 10, 4 chosen of each, an update for 7
    with pytest.warns(ScheduleWarning, match=f"{3 * 24 // 7} optimizer updates are planned.*ends at step 100"):
        made("policy").fit(3)
    with pytest.warns(ScheduleWarning, match="15 optimizer updates are planned"):
        made("sampler").fit(3)
    with pytest.warns(ScheduleWarning, match="7 optimizer updates are planned"):
        made("sampler").fit(1, updates=7)
    with pytest.warns(ScheduleWarning, match=r"cannot be counted from the data.*fit\(updates"):
        made("sampler, workers").fit(1)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", ScheduleWarning)
        made("policy", steps=10).fit(3)


def test_the_bar_and_its_absence(tmp_path, uninterrupted, monkeypatch):
    (tmp_path / "a").mkdir()
    trainer = trainer_in(tmp_path / "a", "policy", progress=True)
    trainer.fit(EPOCHS, updates=30)
    assert bits(trainer) == uninterrupted("policy")[0]
    (tmp_path / "b").mkdir()
    monkeypatch.setattr("adaselect_kernels.training.trainer.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    trainer_in(tmp_path / "b", "policy", progress=True).fit(1, updates=30)


def half_way(folder, kind="policy", epochs=1):
    trainer = trainer_in(folder, kind)
    trainer.fit(epochs, updates=30)
    return folder / "run.pt"


def flip(path):
    data = bytearray(path.read_bytes())
    place = data.index(struct.pack(">d", 0.9))  # the momentum 0.9 of the optimizer
    data[place] ^= 1
    path.write_bytes(data)


def bend(change):
    """A checkpoint that is sound, of something else."""

    def write(path):
        state = load_checkpoint(path)
        change(state)
        save_checkpoint(path, state)

    return write


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.write_bytes(b""), "is no checkpoint, or a damaged one"),
        (lambda path: path.write_bytes(path.read_bytes()[:-700]), "is no checkpoint, or a damaged one"),
        (lambda path: torch.save({"model": 1}, path), "is no checkpoint"),
        (flip, "damaged"),
        (bend(lambda state: state.pop("model")), "not a state of a Trainer"),
        (bend(lambda state: state.update(format=9)), "state has format 9, expected 1"),
        (bend(lambda state: state.update(source="impon")), "state has source 'impon', expected 'SelectedBatches'"),
        (bend(lambda state: state.update(scheduler=None)), "a run with a scheduler"),
        (bend(lambda state: state["scheduler"].update(planned=31)), "planned 31, expected 30"),
        (bend(lambda state: state["model"].update({"0.weight": torch.zeros(8, 5)})), "size mismatch for 0.weight"),
        (bend(lambda state: state["model"].pop("4.bias")), "Missing key"),
        (bend(lambda state: state["selection"]["policy"].update(policy="big_loss")), "policy 'big_loss'"),
        (bend(lambda state: state["optimizer"]["param_groups"].pop()), "different number of parameter groups"),
        (bend(lambda state: state["streams"].update(torch=torch.zeros(3, dtype=torch.uint8))), "does not fit"),
        (bend(lambda state: state["streams"].update(python=[3, [1, 2], None])), "does not fit"),
        (bend(lambda state: state.update(log=10**6)), "has .* bytes, but 1000000 when the checkpoint"),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_checkpoint_is_refused_whole(tmp_path, harm, message):
    harm(half_way(tmp_path))
    trainer = trainer_in(tmp_path, "policy")
    log = (tmp_path / "run.jsonl").read_bytes()
    before, file = bits(trainer), (tmp_path / "run.pt").read_bytes()
    with pytest.raises(ValueError, match=message):
        trainer.fit(EPOCHS, updates=30, resume=True)
    assert bits(trainer) == before
    assert (tmp_path / "run.pt").read_bytes() == file
    assert (tmp_path / "run.jsonl").read_bytes() == log


def test_a_checkpoint_in_the_way_is_not_overwritten(tmp_path):
    path = half_way(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"run\.pt exists: fit\(resume=True\) continues it"):
        trainer_in(tmp_path, "policy").fit(1, updates=30)
    assert path.read_bytes() == before


def test_a_checkpoint_is_a_file_of_torch(tmp_path):
    state = torch.load(half_way(tmp_path), weights_only=True)
    network().load_state_dict(state["model"])


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"checkpoint\['a'\]\[1\] is a set"):
        save_checkpoint(tmp_path / "file", {"a": [1, {2}]})
    assert list(tmp_path.iterdir()) == []


def test_values_of_every_kind_survive(tmp_path):
    state = {
        "t": [torch.zeros(0), torch.tensor(1.5, dtype=torch.bfloat16), torch.ones(2, 3).t(), torch.tensor([True])],
        "v": (None, 1, 2.5, "x", float("nan"), {3: -0.0}),
    }
    save_checkpoint(tmp_path / "file", state)
    loaded = load_checkpoint(tmp_path / "file")
    assert files._digest(loaded) == files._digest(state)
    assert files._digest(loaded) != files._digest(state | {"v": (None, 1, 2.5, "x", float("nan"), {3: 0.0})})


def test_random_streams_go_on():
    states = random_streams()

    def draw():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(3).tolist()  # noqa: NPY002

    first = draw()
    draw()
    set_random_streams(states)
    assert draw() == first


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be an int of at least 1, got 0"),
        ({"log_every": 2.5}, ValueError, r"log_every must be an int of at least 1, got 2\.5"),
        ({"log": "no/such/folder/log"}, ValueError, "log: the folder .*no/such/folder does not exist"),
        ({"checkpoint": "no/such/folder/file"}, ValueError, "checkpoint: the folder .* does not exist"),
        ({"scheduler": 3}, TypeError, "scheduler must be one that counts updates, got int"),
        ({"data": DataLoader(TensorDataset(INPUTS))}, TypeError, "data must be SelectedBatches, or a DataLoader"),
        ({"data": [1, 2]}, TypeError, "data must be SelectedBatches.*got list"),
        ({"data": of_policy(network(), get_policy("big_loss", 0.5))}, ValueError, "score another model"),
    ],
)  # fmt: skip
def test_wrong_arguments(settings, error, message):
    model = network()
    data = settings.pop("data", None) or of_sampler(impon(model))
    with pytest.raises(error, match=message):
        Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), data, **settings)


def test_a_plateau_does_not_count_updates():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(TypeError, match="must be one that counts updates, got ReduceLROnPlateau"):
        Trainer(model, optimizer, of_sampler(impon(model)), scheduler=plateau)


def test_errors_of_a_run():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model, optimizer, of_sampler(impon(model)), loss=lambda m, b: losses(m, b).mean(), show_plan=False
    )
    with pytest.raises(ValueError, match=r"loss must give one value a row, \[6\], got shape \(\)"):
        trainer.fit(1)
    with pytest.raises(ValueError, match="epochs must be an int of at least 1, got 0"):
        trainer.fit(0)
    with pytest.raises(ValueError, match="given no checkpoint file"):
        trainer.save()
    dynams = of_sampler(get_sampler("dynams", ROWS, 8, epochs=2, period=1, budget=0.6))
    with pytest.raises(ValueError, match="the sampler needs scores: give rescore="):
        Trainer(model, optimizer, dynams, loss=losses, show_plan=False).fit(2)


def test_the_default_loss_is_the_cross_entropy():
    model = network().eval()
    expected = F.cross_entropy(model(INPUTS), TARGETS, reduction="none")
    torch.testing.assert_close(planner.cross_entropies(model, (INPUTS, TARGETS)), expected)
