"""Runs of the experiments: what they do at each update; killed ones resume to the same records, finished ones are skipped."""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.paper import command, runner, settings, summary, tasks
from benchmarks.paper import run as runs
from benchmarks.paper.datasets import Data, Split

FACTS = {"commit": "0" * 40, "dirty": False, "environment": {"device": "a test"}}
EXPERIMENT = dataclasses.replace(
    tasks.EXPERIMENTS["digits"], batch_size=32, epochs=6, points=6, width=16, augment=False
)


pytestmark = pytest.mark.usefixtures("one_thread")


def classes(rows=300, held_out=40, **shape) -> Data:
    """Images whose mean tells the class, with noise."""
    size = shape.get("size", (8, 8))

    def part(count):
        targets = torch.randint(0, 10, (count,))
        return Split(torch.randn(count, *size) + targets.view(-1, *[1] * len(size)) / 2, targets)

    return Data("digits", "classification", 10, part(rows), part(held_out), part(held_out), "made up")


def config_of(method, experiment=EXPERIMENT, gamma=0.4, rows=300, **changed):
    costs = {"update": 1.0, "score_and_select": 0.5}
    found = settings.runs(experiment, [settings.METHODS[method]], [gamma], [3], costs, rows, "cpu", False)
    return dataclasses.replace(found[0], **changed)


def lines_of(folder, config):
    """epochs.jsonl without the seconds."""
    lines = (folder / config.slug / runs.RECORDS).read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


# ---- killed and resumed


def killed_run(config, experiment, data, folder, step):
    """In a process of its own: the run, killed inside update number `step`."""
    update = runs.Trainer.update

    def dying(trainer, *args):
        if trainer.step == step and not trainer.dying:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(trainer, *args)

    runs.Trainer.dying = False
    runs.Trainer.update = dying
    runs.run(config, experiment, data, folder, FACTS, checkpoint_seconds=0.0)


RESUMED = ("none", "short_scored", "uniform", "ada3-relative-cur", "selective_backprop", "importance", "rho_loss")
RESUMED += ("rs2", "infobatch", "p_sgd", "impon-100", "dynams-0.6-psp")


@pytest.mark.parametrize("method", RESUMED)
def test_a_killed_run_resumes_to_the_same_records(method, tmp_path):
    data, config = classes(), config_of(method)
    whole = runs.run(config, EXPERIMENT, data, tmp_path / "whole" / "runs", FACTS)
    if method == "rho_loss":  # made once for all runs of a seed
        (tmp_path / "cut").mkdir()
        for file in (tmp_path / "whole").glob("reference-*.pt"):
            (tmp_path / "cut" / file.name).write_bytes(file.read_bytes())
    folder = tmp_path / "cut" / "runs"
    child = multiprocessing.get_context("fork").Process(
        target=killed_run, args=(config, EXPERIMENT, data, folder, whole["updates"] * 2 // 3)
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    before = lines_of(folder, config)
    assert 0 < len(before) < 6
    assert (folder / config.slug / runs.CHECKPOINT).exists()
    updates = []
    resumed = runs.run(
        config, EXPERIMENT, data, folder, {**FACTS, "commit": "1" * 40}, after_epoch=lambda *a: updates.append(a)
    )
    assert updates[0][0] == len(before) + 1  # it went on, it did not start again
    assert lines_of(folder, config) == lines_of(tmp_path / "whole" / "runs", config)
    same = {name: value for name, value in resumed.items() if name not in ("seconds", "split", "preparation_seconds")}
    assert same == {name: whole[name] for name in same}
    document = json.loads((folder / config.slug / runs.CONFIG).read_text())
    assert (document["commit"], document["resumed_at"]) == ("0" * 40, ["1" * 40])
    assert not (folder / config.slug / runs.CHECKPOINT).exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    data, config = classes(), config_of("ada3-relative")
    whole = runs.run(config, EXPERIMENT, data, tmp_path / "whole", FACTS)
    home = tmp_path / "cut" / config.slug
    home.mkdir(parents=True)
    (home / runs.RECORDS).write_text('{"epoch": 1}\n')  # what a run without a checkpoint left
    again = runs.run(config, EXPERIMENT, data, tmp_path / "cut", FACTS)
    assert again["test"] == whole["test"]
    assert lines_of(tmp_path / "cut", config) == lines_of(tmp_path / "whole", config)


def test_images_are_augmented_from_the_saved_stream(tmp_path):
    experiment = dataclasses.replace(
        EXPERIMENT, name="cifar10", augment=True, width=2, epochs=3, points=3, batch_size=8
    )
    data = classes(rows=32, held_out=8, size=(3, 16, 16))
    config = config_of("ada3-relative", experiment, rows=32)
    runs.run(config, experiment, data, tmp_path / "whole", FACTS)
    with pytest.raises(runs.Stopped):
        runs.run(config, experiment, data, tmp_path / "cut", FACTS, after_epoch=lambda epoch, epochs: epoch == 1)
    torch.randn(5)  # another stream in between
    runs.run(config, experiment, data, tmp_path / "cut", FACTS)
    assert lines_of(tmp_path / "cut", config) == lines_of(tmp_path / "whole", config)


# ---- what a run does


@pytest.mark.parametrize(
    ("method", "planned"),
    [
        ("none", 6 * 9),
        ("uniform", 6 * 9 * 13 // 32),  # k = floor(0.4 * 32 + 0.5) = 13 of every batch of 32
        ("ada2-log_ratio", 6 * 9 * 13 // 32),
        ("short_uniform", 6 * 9 * 13 // 32),
        ("short_scored", 6 * 9 * 13 // 32 + 27),  # and half an update for each of 54 batches scored
        ("rs2", 6 * math.ceil(120 / 32)),
        ("impon-100", 6 * 3),
    ],
)
def test_updates_and_learning_rates(method, planned, tmp_path, monkeypatch):
    rates, update = [], runs.Trainer.update

    def watched(trainer, *args):
        result = update(trainer, *args)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return result

    monkeypatch.setattr(runs.Trainer, "update", watched)
    config = config_of(method)
    done = runs.run(config, EXPERIMENT, classes(), tmp_path, FACTS)
    assert done["updates"] == len(rates) == planned
    expected = [0.01 * (1 + math.cos(math.pi * t / planned)) / 2 for t in range(planned)]
    assert rates == pytest.approx(expected, rel=1e-9)


def test_all_methods_start_alike_and_see_the_same_candidates():
    data = classes()
    found = {}
    for method in ("none", "ada3-relative", "rs2", "short_uniform"):
        trainer = runs.Trainer(config_of(method), EXPERIMENT, data)
        source = runs.make_source(trainer)
        found[method] = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(found[method], found["none"], strict=True))
        if hasattr(source, "loader"):
            source.loader.epoch = 2
            order = [targets for _, targets in source.loader]
            found.setdefault("order", order)
            assert all(torch.equal(a, b) for a, b in zip(order, found["order"], strict=True))


def test_candidates_are_distinct_full_batches_in_an_order_of_seed_and_epoch(monkeypatch):
    monkeypatch.setattr(runs, "GATHERED", 3 * 32)  # gathers of three batches, and a rest
    rows = torch.arange(300.0)[:, None]
    loader = runs.Candidates((rows, torch.arange(300)), 32, seed=1, augmented=False)
    epochs = []
    for loader.epoch in (0, 1, 0):
        batches = list(loader)
        assert [len(targets) for _, targets in batches] == [32] * 9
        assert all(torch.equal(inputs[:, 0].long(), targets) for inputs, targets in batches)
        epochs.append(torch.cat([targets for _, targets in batches]).tolist())
    assert len(set(epochs[0])) == 288
    assert epochs[0] == epochs[2] != epochs[1]
    other = runs.Candidates((rows, torch.arange(300)), 32, seed=2, augmented=False)
    assert next(iter(other))[1].tolist() != epochs[0][:32]


def test_augmented_images_are_crops_of_the_padded_ones(generator):
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
    images = torch.rand(6, 3, 5, 7, generator=generator)
    made = runs.augment(images).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    for image, source in zip(made, padded, strict=True):
        crops = [source[:, y : y + 5, x : x + 7] for y in range(9) for x in range(9)]
        assert any(np.array_equal(image, crop) or np.array_equal(image, crop[:, :, ::-1]) for crop in crops)


def test_reference_losses_are_of_models_that_did_not_see_the_row(tmp_path, monkeypatch):
    data, config = classes(rows=100), config_of("rho_loss", rows=100)
    trained, asked, update, losses_of = {}, {}, runs.Trainer.update, tasks.classification_losses

    def watched(trainer, inputs, *args):
        trained.setdefault(id(trainer.model), set()).update(inputs[:, 0, 0].tolist())
        return update(trainer, inputs, *args)

    def asking(model, inputs, targets):
        if not torch.is_grad_enabled():
            assert not model.training
            asked.setdefault(id(model), set()).update(inputs[:, 0, 0].tolist())
        return losses_of(model, inputs, targets)

    models = []  # kept, so that no two have the same id
    build = runs.build_model
    monkeypatch.setattr(runs, "build_model", lambda *args: models.append(build(*args)) or models[-1])
    monkeypatch.setattr(runs.Trainer, "update", watched)
    monkeypatch.setitem(tasks.LOSSES, "classification", asking)
    found = runs.reference_losses(config, EXPERIMENT, data, tmp_path)
    assert len(trained) == len(asked) == 2
    for model, rows in asked.items():
        assert len(rows) == 50
        assert not rows & trained[model]
    assert found["losses"].isfinite().all()
    monkeypatch.setattr(runs, "Trainer", None)  # the second time they are read
    again = runs.reference_losses(config, EXPERIMENT, data, tmp_path)
    assert torch.equal(again["losses"], found["losses"])


def test_rho_loss_chooses_by_the_difference(tmp_path):
    data, config = classes(), config_of("rho_loss", gamma=0.1)
    trainer = runs.Trainer(config, EXPERIMENT, data)
    known = torch.rand(300) * 3
    source = runs.make_source(trainer, known)
    source.loader.epoch = 0
    batch = next(iter(source.loader))
    with torch.no_grad():
        excess = tasks.classification_losses(trainer.model, *batch[:2]) - batch[2]
    source.batches._consume(batch, lambda: 0.0)
    assert source.batches.last.indices.tolist() == excess.topk(3).indices.sort().values.tolist()
    order = torch.cat([targets for _, targets, _ in source.loader])
    assert len(order) == 288


def test_gradient_norms_of_regression_are_those_of_the_last_layer(generator):
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    inputs, targets = torch.randn(7, 3, generator=generator).double(), torch.randn(7, generator=generator).double()
    stats = tasks.score_regression_norms(model, (inputs, targets))
    for i in range(7):
        loss = tasks.regression_losses(model, inputs[i : i + 1], targets[i : i + 1])[0]
        grads = torch.autograd.grad(loss, [model[2].weight, model[2].bias])
        assert stats.loss[i].item() == pytest.approx(loss.item())
        assert stats.grad_norm[i].item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in grads)))


def test_evaluation_of_each_task(generator):
    class Fixed(nn.Module):
        def forward(self, inputs):
            return inputs

    logits, targets = torch.randn(7, 4, generator=generator), torch.randint(0, 4, (7,), generator=generator)
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    loss = -np.log(p[np.arange(7), targets.numpy()]).mean()
    metric = tasks.evaluate(Fixed(), "classification", Split(logits, targets), rows=3)
    share = 100 * np.mean(p.argmax(1) == targets.numpy())
    assert metric == pytest.approx((share, loss), rel=1e-6)
    values = torch.randn(7, generator=generator)
    metric = tasks.evaluate(Fixed(), "regression", Split(logits[:, :1], values), rows=3)
    assert metric == pytest.approx([np.square(logits[:, 0].double().numpy() - values.numpy()).mean()] * 2, rel=1e-6)
    tokens = torch.randint(0, 4, (5, 7), generator=generator)
    every = logits[None].expand(5, 7, 4)
    metric = tasks.evaluate(Fixed(), "language", Split(every, tokens), rows=2)
    loss = -np.mean([np.log(p[t, tokens[n, t]]) for n in range(5) for t in range(7)])
    assert metric == pytest.approx((loss, loss), rel=1e-6)


def test_a_diverged_run_says_so(tmp_path):
    config = config_of("big_loss", learning_rate=1e30)
    done = runs.run(config, EXPERIMENT, classes(), tmp_path, FACTS)
    assert done["diverged"]
    assert done["test"] is None
    json.dumps(done, allow_nan=False)
    assert len(lines_of(tmp_path, config)) < 6


# ---- lists of runs


def test_slugs_name_the_configuration():
    configs = [config_of("ada3-relative"), config_of("ada3-relative", gamma=0.1), config_of("ada3-log_ratio")]
    configs += [dataclasses.replace(configs[0], seed=4), dataclasses.replace(configs[0], epochs=7)]
    assert len({config.slug for config in configs}) == 5
    assert configs[0].slug == config_of("ada3-relative").slug
    assert configs[0].slug.startswith("ada3-relative_rate-0.4_seed-3_")


def test_the_list_has_every_method_of_the_issue_and_nothing_impossible():
    for name, experiment in tasks.EXPERIMENTS.items():
        methods = settings.choose_methods(experiment, None, False)
        names = {method.name for method in methods}
        assert {"none", "rs2", "short_uniform", "short_scored", *settings.BASELINES} <= names
        for count in "234":
            for update in ("relative", "log_ratio"):
                assert {f"ada{count}-{update}", f"ada{count}-{update}-cur"} <= names
        assert ("dynams-0.2-psp" in names) == ("p_sgd" in names) == (experiment.task == "classification"), name
        assert ("impon-800" in names) == (experiment.task != "language")
    found = settings.runs(tasks.EXPERIMENTS["bike"], methods, [0.1, 0.2], [0], None, 500, "cpu", False)
    assert all(config.options.get("bank", 0) <= 500 for config in found)
    beta = [config.gamma for config in found if config.method == "ada3-beta-1"]
    assert beta == [0.2]
    short = dataclasses.replace(tasks.EXPERIMENTS["digits"], epochs=2)
    assert not settings.possible(settings.METHODS["dynams-0.4"], short, 500)  # two rounds, the first trains on all
    assert settings.possible(settings.METHODS["dynams-0.6"], short, 500)
    with pytest.raises(ValueError, match="no method 'adam'"):
        settings.choose_methods(short, ["adam"], False)


def test_shortened_updates_by_hand():
    experiment = dataclasses.replace(EXPERIMENT, batch_size=100, epochs=10)
    # 10 epochs of 50 batches: 500 updates; a fifth of them, and 0.3 of an update for each batch scored
    assert settings.shortened_updates(experiment, 0.2, 5000, None) == 100
    assert settings.shortened_updates(experiment, 0.2, 5000, {"update": 2.0, "score_and_select": 0.6}) == 250
    assert settings.shortened_updates(experiment, 0.5, 5000, {"update": 1.0, "score_and_select": 2.0}) == 500


def arguments(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_a_smoke_experiment_is_skipped_the_second_time(tmp_path, monkeypatch, capsys):
    words = ("regression", "--smoke", "--output", str(tmp_path / "out"), "--workers", "1")
    names = "none,rs2,short_scored,ada3-relative,grad_norm"
    words += ("--methods", names)
    assert command.run(arguments(*words)) == 0
    first = (tmp_path / "out" / summary.NAME).read_text()
    found = summary.read(tmp_path / "out" / summary.NAME)
    assert [run["config"]["method"] for run in found["runs"]] == [
        "none",
        "rs2",
        "short_scored",
        "grad_norm",
        "ada3-relative",
    ]
    assert found["commands"] == [
        "adaselect experiment regression --methods none,rs2,short_scored,ada3-relative,grad_norm --smoke"
    ]
    for run in found["runs"]:
        home = tmp_path / "out" / "runs" / run["directory"]
        assert json.loads((home / runs.CONFIG).read_text())["config"] == run["config"]
        lines = [json.loads(line) for line in (home / runs.RECORDS).read_text().splitlines()]
        assert run["curve"]["test"] == pytest.approx([line["test"] for line in lines], rel=1e-5)
        assert run["final"]["test"] == run["curve"]["test"][-1]
        assert len(run["commit"]) == 40
    monkeypatch.setattr(runs.Trainer, "update", None)
    assert command.run(arguments(*words)) == 0
    assert (tmp_path / "out" / summary.NAME).read_text() == first
    assert "5 of 5 runs are finished" in capsys.readouterr().out


def test_a_time_limit_stops_and_the_same_command_goes_on(tmp_path):
    words = (
        "regression",
        "--smoke",
        "--output",
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--methods",
        "none,ada3-relative",
    )
    assert command.run(arguments(*words, "--time-limit", "0")) == command.INTERRUPTED
    assert summary.read(tmp_path / "out" / summary.NAME)["runs"] == []
    assert len(list((tmp_path / "out" / "runs").glob(f"*/{runs.CHECKPOINT}"))) == 1
    assert command.run(arguments(*words)) == 0
    assert len(summary.read(tmp_path / "out" / summary.NAME)["runs"]) == 2


def test_runs_beside_one_another_and_one_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "START", "fork")  # the workers need not import torch again
    data = classes(rows=100)
    good, bad = config_of("none", rows=100), config_of("p_sgd", rows=100, options={"smoothing": -1.0})
    job = runner.Job([good, bad], EXPERIMENT, data, tmp_path / "two", FACTS, 5.0)
    assert pickle.loads(pickle.dumps(job)).configs == job.configs  # as it is sent to a worker that starts afresh
    outcome = runner.run_all(job, workers=2)
    assert outcome.finished == 1
    assert list(outcome.failed) == [bad.slug]
    assert "ValueError: smoothing must be finite and not negative, got -1.0" in outcome.failed[bad.slug]
    assert not outcome.stopped
    here = runner.run_all(dataclasses.replace(job, folder=tmp_path / "one"), workers=1)
    assert here == outcome
    assert lines_of(tmp_path / "two", good) == lines_of(tmp_path / "one", good)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("imagenet",), 2, "NAME must be one of regression"),
        (("regression", "--rates", "0.1,1.5"), 2, r"--rates must be numbers in (0, 1], got '0.1,1.5'"),
        (("regression", "--methods", "adam"), 2, "no method 'adam'"),
        (("regression", "--workers", "0"), 2, "--workers must be at least 1"),
        (("bike",), 1, "bike needs the folder of its files: --data FOLDER"),
        (("mnist", "--data", "."), 1, "mnist: . has none of"),
    ],
)
def test_wrong_arguments_are_named_before_anything_runs(words, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.run(arguments(*words, "--output", str(tmp_path / "out"))) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
