"""Which runs an experiment has: methods, rates and seeds, each run a frozen configuration with a name of its own."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adaselect_kernels.checks import selected_count
from benchmarks.paper.tasks import SHORT, Experiment

CANDIDATES = {
    "2": ("big_loss", "uniform"),
    "3": ("big_loss", "small_loss", "uniform"),
    "4": ("big_loss", "small_loss", "uniform", "grad_norm"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "-std": {"standardize": True},
    "-cur": {"curriculum_power": -0.5, "curriculum_scale": "rms"},
}
UPDATES = ("relative", "log_ratio")
BETAS = (-1.0, -0.5, 0.0, 0.5)  # 1 is ada3-relative
BETA_RATE = 0.2
BANKS = (100, 200, 400, 800)
BUDGETS = (0.2, 0.4, 0.6, 0.8)
BASELINES = ("uniform", "big_loss", "small_loss", "grad_norm", "adaboost", "coreset1", "coreset2")
PAPER_SETTING = "ada3-relative"


@dataclass(frozen=True)
class Method:
    """A way to train. kind: "none", "shortened", "policy" (`key` of get_policy) or "sampler" (`key` of get_sampler).

    rated: it has a sampling rate; otherwise it is run once a seed, and trains on the rows that it takes.
    tasks: where it applies, empty for all. only_rate: the rate it is run at. slim: trains both widths of a slimmable model.
    """

    name: str
    label: str
    group: str
    kind: str
    key: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    rated: bool = True
    tasks: tuple[str, ...] = ()
    only_rate: float | None = None
    learning_rate: float | None = None
    slim: bool = False


def _methods() -> list[Method]:
    found = [
        Method("none", "no selection", "control", "none", rated=False),
        Method("uniform", "uniform", "paper", "policy", "uniform"),
        Method("rs2", "RS2", "control", "sampler", "rs2"),
        Method(
            "short_uniform", "no selection, shortened to the updates of uniform", "control", "shortened", "unscored"
        ),
        Method("short_scored", "no selection, shortened to the time of AdaSelection", "control", "shortened", "scored"),
    ]
    labels = {"coreset1": "coreset 1", "coreset2": "coreset 2", "adaboost": "AdaBoost"}
    found += [Method(name, labels.get(name, name.replace("_", " ")), "paper", "policy", name) for name in BASELINES[1:]]
    for count, methods in CANDIDATES.items():
        for update in UPDATES:
            for ending, options in VARIANTS.items():
                says = {"": "", "-std": ", standardised", "-cur": ", curriculum"}[ending]
                label = f"AdaSelection, {count} candidates, {update.replace('_', ' ')}{says}"
                config = {"methods": list(methods), "update": update, **options}
                found.append(
                    Method(f"ada{count}-{update}{ending}", label, "adaselection", "policy", "adaselection", config)
                )
    coreset = ["big_loss", "small_loss", "uniform", "coreset1"]
    label = "AdaSelection, 4 candidates with coreset 1, relative"
    found.append(Method("ada4c-relative", label, "adaselection", "policy", "adaselection", {"methods": coreset}))
    for beta in BETAS:
        config = {"methods": list(CANDIDATES["3"]), "update": "relative", "beta": beta}
        name = f"ada3-beta{beta:g}"
        label = f"AdaSelection, 3 candidates, beta {beta:g}"
        found.append(Method(name, label, "beta", "policy", "adaselection", config, only_rate=BETA_RATE))
    for name, label in (
        ("selective_backprop", "Selective-Backprop"),
        ("rho_loss", "RHO-LOSS"),
        ("importance", "importance sampling"),
    ):
        found.append(Method(name, label, "neighbour", "policy", name))
    only = ("classification",)
    found += [
        Method("infobatch", "InfoBatch", "neighbour", "sampler", "infobatch", rated=False),
        Method("p_sgd", "p-SGD", "neighbour", "sampler", "p_sgd", rated=False, tasks=only),
        Method("c_sgd", "c-SGD", "neighbour", "sampler", "c_sgd", rated=False, tasks=only),
    ]
    for bank in BANKS:
        found.append(_impon(f"impon-{bank}", f"IMPON, bank {bank}", {"bank": bank}))
    found.append(_impon("impon-200-lowest", "IMPON with low scores, bank 200", {"bank": 200, "lowest": True}))
    found.append(_impon("impon-200-nlms", "IMPON, bank 200, normalised LMS", {"bank": 200, "normalized": True}))
    found.append(_impon("impon-200-lr1e-3", "IMPON, bank 200, its learning rate 1e-3", {"bank": 200}, 1e-3))
    for budget in BUDGETS:
        for slim in (False, True):
            name, label = f"dynams-{budget:g}", f"DynaMS, budget {budget:g}"
            if slim:
                name, label = f"{name}-psp", f"{label}, parameter-sharing proxy"
            config = {"budget": budget}
            found.append(Method(name, label, "dynams", "sampler", "dynams", config, rated=False, tasks=only, slim=slim))
    return found


def _impon(name: str, label: str, config: dict[str, Any], learning_rate: float | None = None) -> Method:
    tasks = ("classification", "regression")  # its linear model reads features, not tokens
    return Method(
        name, label, "impon", "sampler", "impon", config, rated=False, tasks=tasks, learning_rate=learning_rate
    )


METHODS: dict[str, Method] = {method.name: method for method in _methods()}
GROUPS = tuple(dict.fromkeys(method.group for method in METHODS.values()))


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run's result follows from, beside the code: plain values only.

    updates: the updates of a shortened run, None elsewhere. options: of the policy or sampler.
    """

    experiment: str
    method: str
    kind: str
    key: str
    options: Mapping[str, Any]
    gamma: float | None
    seed: int
    epochs: int
    updates: int | None
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    width: int
    slim: float | None
    augment: bool
    points: int
    train: int | None
    held_out: int | None
    device: str
    smoke: bool

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "options": dict(self.options)}

    @property
    def slug(self) -> str:
        """Name of the run's directory; another configuration has another one."""
        text = json.dumps(self.as_dict(), sort_keys=True)
        rate = "all" if self.gamma is None else f"{self.gamma:g}"
        return f"{self.method}_rate-{rate}_seed-{self.seed}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def smoke_form(experiment: Experiment) -> Experiment:
    """The experiment as a smoke run has it: one rate, one seed, few rows."""
    return dataclasses.replace(experiment, seeds=1, rates=(BETA_RATE,), **dict(experiment.smoke))


def choose_methods(experiment: Experiment, names: Collection[str] | None, smoke: bool) -> list[Method]:
    """Methods of `names` (methods or groups), by default those of the experiment, where they apply to its task.

    Raises ValueError for an unknown name.
    """
    if names is None:
        names = SHORT if smoke else experiment.groups
    unknown = [name for name in names if name not in METHODS and name not in GROUPS]
    if unknown:
        raise ValueError(
            f"no method {', '.join(map(repr, unknown))}; there are the groups {', '.join(GROUPS)}"
            f" and the methods {', '.join(METHODS)}"
        )
    chosen = [method for method in METHODS.values() if method.name in names or method.group in names]
    return [method for method in chosen if not method.tasks or experiment.task in method.tasks]


def runs(
    experiment: Experiment,
    methods: Sequence[Method],
    rates: Sequence[float],
    seeds: Sequence[int],
    costs: Mapping[str, float] | None,
    train_rows: int,
    device: str,
    smoke: bool,
) -> list[RunConfig]:
    """The runs, seed by seed, so that what is finished early compares all methods.

    costs: seconds of an update and of scoring and choosing for a candidate batch, where a method is shortened by them.
    """
    return [
        _config(experiment, method, gamma, seed, costs, train_rows, device, smoke)
        for seed in seeds
        for method in methods
        if possible(method, experiment, train_rows)
        for gamma in _rates_of(method, rates)
    ]


def possible(method: Method, experiment: Experiment, train_rows: int) -> bool:
    """Whether a bank is no larger than the training set, and a budget above what the first round of DynaMS uses up."""
    if method.key == "impon":
        return method.config["bank"] <= train_rows
    if method.key == "dynams":
        rounds = math.ceil(experiment.epochs / dynams_period(experiment.epochs))
        return method.config["budget"] * rounds > 1
    return True


def dynams_period(epochs: int) -> int:
    """Epochs of a round: ten rounds, or fewer where there are fewer epochs."""
    return max(1, epochs // 10)


def _rates_of(method: Method, rates: Sequence[float]) -> list[float | None]:
    if not method.rated:
        return [None]
    return [rate for rate in rates if method.only_rate in (None, rate)]


def _config(
    experiment: Experiment,
    method: Method,
    gamma: float | None,
    seed: int,
    costs: Mapping[str, float] | None,
    train_rows: int,
    device: str,
    smoke: bool,
) -> RunConfig:
    updates = None
    if method.kind == "shortened":
        assert gamma is not None
        updates = shortened_updates(experiment, gamma, train_rows, costs if method.key == "scored" else None)
    options = dict(method.config)
    if method.key == "impon":
        options["bank"] = max(options["bank"], experiment.batch_size)  # a bank holds at least a batch
    return RunConfig(
        experiment=experiment.name,
        method=method.name,
        kind=method.kind,
        key=method.key,
        options=options,
        gamma=gamma,
        seed=seed,
        epochs=experiment.epochs,
        updates=updates,
        batch_size=experiment.batch_size,
        learning_rate=experiment.learning_rate if method.learning_rate is None else method.learning_rate,
        momentum=experiment.momentum,
        weight_decay=experiment.weight_decay,
        width=experiment.width,
        slim=experiment.slim if method.slim else None,
        augment=experiment.augment,
        points=experiment.points,
        train=experiment.train,
        held_out=experiment.held_out,
        device=device,
        smoke=smoke,
    )


def policy_updates(epochs: int, batches: int, batch_size: int, gamma: float) -> int:
    """Full batches that `epochs` passes over `batches` candidate batches fill at the rate gamma."""
    return epochs * batches * selected_count(gamma, batch_size) // batch_size


def shortened_updates(experiment: Experiment, gamma: float, train_rows: int, costs: Mapping[str, float] | None) -> int:
    """Updates without selection that take the time of selection at `gamma`; at most those of the whole schedule.

    costs None: the updates of selection that costs nothing, so those of uniform. Else with the measured seconds:
    epochs * batches * scoring / update more.
    """
    batches = train_rows // experiment.batch_size
    updates = float(policy_updates(experiment.epochs, batches, experiment.batch_size, gamma))
    if costs is not None:
        updates += experiment.epochs * batches * costs["score_and_select"] / costs["update"]
    return min(max(1, math.floor(updates)), experiment.epochs * batches)


def expected_cost(config: RunConfig, batches: int) -> float:
    """In epochs without selection, for the time left: (s + 3 gamma) / 3 with s = 1 where a policy looks at losses."""
    if config.kind == "shortened":
        assert config.updates is not None
        return config.updates / batches
    if config.gamma is None:
        return float(config.epochs)
    scored = config.kind == "policy" and config.key != "uniform"
    return config.epochs * (float(scored) / 3 + config.gamma)
