"""The report of the experiments: means, deviations, ranks and verdicts equal what NumPy makes of made-up summaries."""

import re

import numpy as np
import pytest

from benchmarks.paper import report, settings, summary, tables, tasks

RATES, SEEDS = (0.1, 0.2, 0.4), (0, 1, 2)
BASELINES = ("uniform", "big_loss", "small_loss", "grad_norm", "adaboost", "coreset1", "coreset2")
ADA = tuple(f"ada{n}-{u}{v}" for n in "234" for u in settings.UPDATES for v in settings.VARIANTS)
METHODS = ("none", "rs2", "short_scored", *BASELINES, *ADA, "ada3-beta0", "impon-200")


def entry(method, gamma, seed, test, validation, seconds, diverged=False):
    points = 3
    curve = {
        "epoch": [1, 2, 3],
        "updates": [10, 20, 30],
        "seconds": [seconds / 3, seconds / 2, seconds],
        "train_loss": [0.5] * points,
        "validation": [validation] * points,
        "test": [test] * points,
    }
    methods = settings.METHODS[method].config.get("methods")
    if methods:
        curve["weights"] = {name: [1 / len(methods)] * points for name in methods}
    final = {
        "diverged": diverged, "planned": 30, "preparation_seconds": None, "split": {}, "epoch": 3, "updates": 30,
        "rows": 900, "seconds": seconds, "rate": gamma,
        "validation": None if diverged else validation, "test": None if diverged else test,
    }  # fmt: skip
    config = {"method": method, "gamma": gamma, "seed": seed, "epochs": 3, "batch_size": 32}
    return {
        "directory": f"{method}-{gamma}-{seed}", "config": config, "commit": "a" * 40, "dirty": False,
        "resumed_at": [], "environment": 0, "final": final, "curve": curve,
    }  # fmt: skip


class Made:
    """A summary of random results, and the numbers that went into it: {(method, rate): [seeds]}."""

    def __init__(self, experiment="bike", seed=None, methods=METHODS, smoke=False, diverged=()):
        numbers = np.random.default_rng(seed)
        settings_of = tasks.EXPERIMENTS[experiment]
        self.test, self.validation, self.seconds, entries = {}, {}, {}, []
        for method in methods:
            made = settings.METHODS[method]
            rates = (None,) if not made.rated else RATES if made.only_rate is None else (made.only_rate,)
            for rate in rates:
                key = method, rate
                self.test[key] = numbers.uniform(1, 9, len(SEEDS))
                self.validation[key] = numbers.uniform(1, 9, len(SEEDS))
                self.seconds[key] = numbers.uniform(1, 9, len(SEEDS))
                values = zip(SEEDS, self.test[key], self.validation[key], self.seconds[key], strict=True)
                entries += [
                    entry(method, rate, s, *map(float, row), diverged=(method, rate, s) in diverged)
                    for s, *row in values
                ]
        numbers.shuffle(entries)  # their order must not matter
        self.summary = {
            "format": 1, "experiment": experiment, "title": settings_of.title, "task": settings_of.task,
            "metric": settings_of.metric, "higher_is_better": settings_of.higher_is_better, "smoke": smoke,
            "commands": [f"adaselect experiment {experiment}"], "data": {"note": "Made up.", "differs": None},
            "costs": {"update": 0.002, "score_and_select": 0.001}, "environments": [{"device": "a test"}],
            "failed": {"some-run": "ValueError: x"}, "runs": entries,
        }  # fmt: skip
        self.results = tables.Results.of(self.summary)

    def over_rates(self, method, what="test"):
        """[seeds]: mean over the rates."""
        values = getattr(self, what)
        if (method, None) in values:
            return values[method, None]
        return np.mean([values[method, rate] for rate in RATES], axis=0)

    def best(self):
        means = {name: self.over_rates(name, "validation").mean() for name in ADA}
        return (max if self.summary["higher_is_better"] else min)(means, key=means.__getitem__)

    def ranks(self, names):
        """Average rank over the rates by NumPy; no ties."""
        sign = -1 if self.summary["higher_is_better"] else 1
        found = []
        for rate in RATES:
            means = np.array([self.test.get((n, rate), self.test.get((n, None))).mean() for n in names])
            found.append(1 + np.argsort(np.argsort(sign * means)))
        return dict(zip(names, np.mean(found, axis=0), strict=True))


@pytest.fixture(params=["bike", "mnist"])
def made(request):
    """Of losses and of accuracies."""
    return Made(request.param)


def shown(values):
    values = np.asarray(values)
    return f"{values.mean():.4g} ± {values.std(ddof=1):.2g}"


def test_means_and_deviations_over_seeds(made):
    for method in ("none", "rs2", "big_loss", "ada4-relative-cur"):
        spread = made.results.spread(method)
        values = made.over_rates(method)
        assert (spread.mean, spread.deviation, spread.count) == pytest.approx((values.mean(), values.std(ddof=1), 3))
    spread = tables.Spread.of([2.0])
    assert spread.mean == 2.0
    assert np.isnan(spread.deviation)
    assert tables.Spread.of([None, 1.0, 3.0]) == tables.Spread(2.0, pytest.approx(2**0.5), 2, 1)


def test_the_chosen_setting_is_the_best_on_validation(made):
    assert tables.chosen(made.results) == made.best()
    sign = 1 if made.summary["higher_is_better"] else -1
    for method in ADA:  # what happens on test rows must not matter
        for rate in RATES:
            for run in made.results.at(method, rate).values():
                run["final"]["test"] = sign * 1e6 if method != made.best() else 0.0
    assert tables.chosen(made.results) == made.best()


def test_ranks(made):
    assert tables.ranks({"a": 3.0, "b": 1.0, "c": 3.0, "d": None}, higher_is_better=True) == {
        "a": 1.5, "b": 3.0, "c": 1.5, "d": 4.0,
    }  # fmt: skip
    assert tables.ranks({"a": 3.0, "b": 1.0, "c": 3.0, "d": None}, higher_is_better=False) == {
        "a": 2.5, "b": 1.0, "c": 2.5, "d": 4.0,
    }  # fmt: skip
    names = tables.nine(made.results)
    assert list(names) == list(tables.NINE)
    found = tables.average_ranks(made.results, names)
    expected = made.ranks([made.best() if name == tables.CHOSEN else name for name in tables.NINE])
    assert list(found.values()) == pytest.approx(list(expected.values()))


def test_differences_are_paired_by_seed(made):
    found = tables.difference(made.results, "ada2-relative", "rs2")
    values = made.over_rates("ada2-relative") - made.over_rates("rs2")
    assert (found.mean, found.deviation, found.count) == pytest.approx((values.mean(), values.std(ddof=1), 3))
    assert tables.difference(made.results, "ada2-relative", "infobatch") is None


def test_verdicts():
    edge = 4.303 / 3**0.5  # 95 % of Student's t for three seeds
    for mean, higher, verdict in (
        (edge + 0.01, True, "better"),
        (edge + 0.01, False, "worse"),
        (-edge - 0.01, False, "better"),
        (edge - 0.01, True, "no difference seen"),
    ):
        assert tables.Difference(mean, 1.0, 3).verdict(higher) == verdict
    assert tables.Difference(1.0, float("nan"), 1).verdict(True) == "one seed: not known"
    assert tables.t_95(12) == tables.t_95(10) > tables.t_95(20)


def test_time_over_no_selection(made):
    base = made.seconds["none", None]
    expected = np.mean([made.seconds["uniform", rate] / base for rate in RATES])
    assert tables.time_ratio(made.results, "uniform") == pytest.approx(expected)
    assert tables.time_ratio(made.results, "uniform", 0.2) == pytest.approx(
        np.mean(made.seconds["uniform", 0.2] / base)
    )


def test_factors_compare_equal_company(made):
    found = tables.factor_means(made.results)
    plain = [f"ada{n}-log_ratio{v}" for n in "234" for v in ("", "-std")]
    values = np.mean([made.over_rates(name, "validation") for name in plain], axis=0)
    spread, _, count = found["update"]["log_ratio"]
    assert (spread.mean, spread.deviation, count) == pytest.approx((values.mean(), values.std(ddof=1), 6))
    curriculum = [f"ada{n}-{u}-cur" for n in "234" for u in settings.UPDATES]
    values = np.mean([made.over_rates(name, "validation") for name in curriculum], axis=0)
    assert found["curriculum"]["yes"][0].mean == pytest.approx(values.mean())
    assert found["curriculum"]["no"][2] == found["curriculum"]["yes"][2] == 6
    assert len(found["candidates"]) == 3
    assert {count for _, _, count in found["candidates"].values()} == {4}


def test_a_diverged_run_counts_last_and_is_never_chosen():
    whole = Made("mnist", seed=5)
    best = whole.best()
    made = Made("mnist", seed=5, diverged={(best, 0.2, 1), ("rs2", 0.1, 0)})
    assert tables.chosen(made.results) != best
    assert made.results.spread("rs2").diverged == 1
    assert made.results.spread("rs2").mean == pytest.approx(made.over_rates("rs2")[1:].mean())
    ranks = tables.average_ranks(made.results, {name: name for name in (best, "none")})
    assert ranks[best] >= 4 / 3


def page_of(folder, *summaries):
    for one in summaries:
        name = one["experiment"] + "-smoke" * one["smoke"]
        summary.write(folder / "results" / name / summary.NAME, one)
    said = report.write(folder / "results", folder / "docs")
    return (folder / "docs" / report.PAGE).read_text(encoding="utf-8"), said


def row(page, label):
    return next(line for line in page.splitlines() if line.startswith(f"| {label} |"))


def test_the_page_has_the_numbers_of_the_summaries(tmp_path):
    made, smoke = Made("bike"), Made("mnist", smoke=True)
    page, said = page_of(tmp_path, made.summary, smoke.summary)
    section = page[page.index("**Tables 5 and 4.**") :]
    ranks = made.ranks([made.best() if name == tables.CHOSEN else name for name in tables.NINE])
    papers = (3.61, 3.45, 3.48, 7.08, 50.19, 87.9, 7.53, 3.75, 7.54), (5.6, 3.8, 4.0, 4.2, 10.8, 12.0, 5.6, 7.0, 9.6)
    for place, name in enumerate(tables.NINE):
        method = made.best() if name == tables.CHOSEN else name
        label = settings.METHODS[method].label
        cells = row(section, f"**{label}**" if name == tables.CHOSEN else label).strip("| ").split(" | ")
        assert cells[1] == shown(made.over_rates(method))
        assert cells[3] == f"{ranks[method]:.2f}"
        assert [float(cells[2]), float(cells[4])] == [papers[0][place], papers[1][place]]
    every = page[page.index("Test metric by rate") :]
    for method in ("rs2", "ada3-log_ratio-std"):
        cells = row(every, settings.METHODS[method].label).strip("| ").split(" | ")
        assert cells[1:] == [shown(made.test[method, rate]) for rate in RATES]
    pays = page[page.index("## Does it pay?") :]
    values = made.over_rates(made.best()) - made.over_rates("rs2")
    assert f"| bike | RS2 | {values.mean():+.4g} ± {values.std(ddof=1):.2g} |" in pays
    assert shown(made.test["impon-200", None]) in row(page, "IMPON, bank 200")
    assert "s = 1.5 in (s + 3 gamma) / 3" in page
    assert "Failed: `some-run`: ValueError: x" in page
    assert (
        "`benchmarks/results/experiments/bike/summary.json`, made by `adaselect experiment bike` at aaaaaaaaaaaa"
        in page
    )
    assert "## Smoke run of MNIST" in page
    assert "no complete results of regression, digits, mnist, cifar10" in page
    figures = set(re.findall(r"\(figures/(.+?)\)", page))
    assert figures == {f"experiments-bike-{kind}.png" for kind in ("time", "rate", "seconds", "weights", "beta")}
    assert {f"figure {name}" for name in figures} < set(said)
    assert all((tmp_path / "docs" / "figures" / name).stat().st_size > 5000 for name in figures)


def test_no_number_without_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(report.plots, "draw", lambda *_: {})
    page, _ = page_of(tmp_path, Made("text", methods=("none", "uniform", "rs2")).summary)
    assert "Chosen on validation" not in page
    section = page[page.index("## Does it pay?") :]
    assert "AdaSelection," not in section
    assert "grad norm" not in section
    assert "The paper's column is wikitext2" in section


def test_a_page_needs_summaries(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no experiment"):
        report.write(tmp_path, tmp_path / "docs")
    for text in ("{", '{"format": 7}'):
        (tmp_path / "bike").mkdir(exist_ok=True)
        (tmp_path / "bike" / summary.NAME).write_text(text)
        with pytest.raises(ValueError, match=r"summary\.json: not"):
            report.write(tmp_path, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()
