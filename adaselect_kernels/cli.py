"""The command `adaselect`: doctor, demo, tokens, plan and experiment."""

import argparse
import importlib
import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaselect_kernels import doctor
from adaselect_kernels._version import __version__

if TYPE_CHECKING:
    from torch import nn

INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C
SAMPLERS = ("uniform", "rs2", "impon", "p_sgd", "c_sgd")  # those whose share of the rows does not depend on the losses


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Wrong arguments exit with 2, as argparse does."""
    parser = _parser()
    options, options.rest = parser.parse_known_args(arguments)
    if options.rest and options.run is not _experiment:
        parser.error(f"unrecognized arguments: {' '.join(options.rest)}")
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adaselect", description="Choose, inside each training step, the samples worth a backward pass."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    check = commands.add_parser("doctor", help="which backends work here, proven, and what is missing")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.set_defaults(run=_doctor)

    demo = commands.add_parser(
        "demo",
        help="train on handwritten digits with and without selection: tables, figures, raw numbers",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--output", type=_folder, default="demo_results", metavar="DIR", help="where results are written")
    demo.add_argument("--epochs", type=_at_least(1), default=20, help="passes over the candidate samples")
    demo.add_argument("--gamma", type=_rate, default=0.3, help="share of the candidates chosen, in (0, 1]")
    demo.add_argument("--repeats", type=_at_least(1), default=3, help="runs of every method, each with its own seed")
    demo.add_argument("--seed", type=_at_least(0), default=0, help="seed of the first repeat")
    demo.set_defaults(run=_demo)
    _add_tokens(commands)
    _add_plan(commands)

    # It has arguments of its own, known to the checkout's benchmarks: they are parsed there.
    experiment = commands.add_parser("experiment", help="the papers' experiments, and their report", add_help=False)
    experiment.set_defaults(run=_experiment)
    return parser


def _add_tokens(commands: Any) -> None:
    tokens = commands.add_parser(
        "tokens",
        help="train a small GPT on a text with token selection, the full loss and random tokens, at equal time",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    tokens.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="the text; without it, Python's own library"
    )
    tokens.add_argument("--vocabulary", choices=("bytes", "words"), default="bytes", help="256 bytes, or 8192 words")
    tokens.add_argument("--gamma", type=_rate, default=0.3, help="share of the tokens chosen, in (0, 1]")
    tokens.add_argument("--seconds", type=_seconds, default=15.0, help="training time of every run")
    tokens.add_argument("--seeds", type=_at_least(1), default=3, help="runs of every variant, each with its own seed")
    tokens.add_argument("--seed", type=_at_least(0), default=0, help="the first seed")
    tokens.add_argument(
        "--output", type=_folder, default="token_results", metavar="DIR", help="where results are written"
    )
    tokens.set_defaults(run=_tokens)


def _add_plan(commands: Any) -> None:
    from adaselect_kernels.policies import POLICIES

    plan = commands.add_parser(
        "plan",
        help="measure a model and predict what training with selection costs: time ratio, break-even gamma",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plan.add_argument("--model", default="resnet18", help="resnet18, mlp, or MODULE:FACTORY, called without arguments")
    plan.add_argument(
        "--input", type=_shape, default="3x32x32", metavar="CxHxW", help="shape of one input, without the batch"
    )
    plan.add_argument("--classes", type=_at_least(2), default=10, help="number of classes")
    plan.add_argument("--batch", type=_at_least(1), default=128, help="rows of a candidate batch")
    plan.add_argument("--gamma", type=_rate, default=0.3, help="share of the rows trained on, in (0, 1]")
    policies = [name for name in POLICIES if name != "rho_loss"]  # needs a second model
    plan.add_argument("--policy", choices=policies, help="what chooses after scoring; adaselection if nothing is given")
    plan.add_argument(
        "--sampler", choices=SAMPLERS, help="what chooses before loading, instead of a policy and a scorer"
    )
    plan.add_argument(
        "--scorer", choices=("forward", "low_resolution", "slim"), help="what scores; forward if not given"
    )
    plan.add_argument("--scale", type=_rate, default=0.5, help="of the scorer low_resolution, in (0, 1]")
    plan.add_argument("--width", type=_rate, default=0.25, help="of the scorer slim, which makes the model slimmable")
    plan.add_argument("--autocast", choices=("bfloat16", "float16"), help="of the scoring pass")
    plan.add_argument("--epochs-per-score", type=_at_least(1), default=1, help="epochs that one scoring serves, Q")
    plan.add_argument("--rows", type=_at_least(1), default=50_000, help="rows of the training set, for a sampler")
    plan.add_argument("--device", default="cpu", help="where the model runs")
    plan.add_argument(
        "--repeats", type=_at_least(1), default=7, help="turns of the measurement; more on a busy machine"
    )
    plan.add_argument("--figure", type=_file, metavar="FILE", help="draw the time ratio over gamma (png, svg, pdf)")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.set_defaults(run=_plan)


def _doctor(options: argparse.Namespace) -> int:
    report = doctor.examine()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        doctor.render(report)
    return 0 if report["ok"] else 1


def _demo(options: argparse.Namespace) -> int:
    try:
        from adaselect_kernels import demo
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in doctor.DEMO_PACKAGES:
            raise
        print(f"adaselect demo needs {error.name}: pip install 'adaselect_kernels[demo]'", file=sys.stderr)
        return 1
    config = demo.DemoConfig(epochs=options.epochs, gamma=options.gamma, repeats=options.repeats, seed=options.seed)
    try:
        return 0 if demo.run(config, options.output) else INTERRUPTED
    except KeyboardInterrupt:  # while results were being written: each file is whole or absent
        return INTERRUPTED


def _tokens(options: argparse.Namespace) -> int:
    try:
        from adaselect_kernels.demo import tokens
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in doctor.DEMO_PACKAGES:
            raise
        print(f"adaselect tokens needs {error.name}: pip install 'adaselect_kernels[demo]'", file=sys.stderr)
        return 1
    names = ("vocabulary", "gamma", "seconds", "seeds", "seed")
    config = tokens.TokensConfig(**{name: getattr(options, name) for name in names})
    try:
        return 0 if tokens.run(config, options.output, options.text) else INTERRUPTED
    except ValueError as error:
        print(f"adaselect tokens: {error}", file=sys.stderr)
        return 1
    except (
        KeyboardInterrupt
    ):  # before the first seed, or while results were being written: each file is whole or absent
        return INTERRUPTED


def _experiment(options: argparse.Namespace) -> int:
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "paper" / "command.py").is_file():
        print(
            "adaselect experiment runs from a checkout of the repository: benchmarks/paper is not beside this package",
            file=sys.stderr,
        )
        return 1
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))  # the processes of the runs inherit it
    try:
        command = importlib.import_module("benchmarks.paper.command")
        parser = argparse.ArgumentParser(prog="adaselect experiment", description=command.__doc__)
        command.add_arguments(parser)
        return command.run(parser.parse_args(options.rest))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in doctor.DEMO_PACKAGES:
            raise
        print(f"adaselect experiment needs {error.name}: pip install 'adaselect_kernels[demo]'", file=sys.stderr)
        return 1


def _plan(options: argparse.Namespace) -> int:
    if options.sampler is not None and (options.policy is not None or options.scorer is not None):
        print("adaselect plan: --sampler chooses before any scoring: leave --policy and --scorer out", file=sys.stderr)
        return 2
    try:
        made = _measured_plan(options)
        if options.figure is not None:
            made.figure(options.figure)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("adaselect plan --figure needs matplotlib: pip install 'adaselect_kernels[demo]'", file=sys.stderr)
        return 1
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        print(f"adaselect plan: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    print(json.dumps(made.as_dict(), indent=2) if options.json else made.table())
    return 0


def _measured_plan(options: argparse.Namespace) -> Any:
    import torch

    from adaselect_kernels.training import PlanWarning, get_scorer, plan, score

    torch.manual_seed(0)
    model = _model(options).to(options.device)
    batch = torch.randn(options.batch, *options.input), torch.randint(options.classes, (options.batch,))
    batch = tuple(tensor.to(options.device) for tensor in batch)
    try:
        logits = score(model, batch[0])
    except Exception as error:
        raise ValueError(f"the model fails on inputs {tuple(batch[0].shape)}: {error}") from error
    expected = (options.batch, options.classes)
    if not isinstance(logits, torch.Tensor) or logits.shape != expected:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"the model must give logits {expected}, got {got}: see --classes")
    choice: dict[str, Any] = {"epochs_per_score": options.epochs_per_score}
    if options.sampler is not None:
        choice["sampler"] = _sampler(options)
    else:
        settings: dict[str, Any] = {
            "forward": {},
            "low_resolution": {"scale": options.scale},
            "slim": {"width": options.width},
        }[options.scorer or "forward"]
        autocast = None if options.autocast is None else getattr(torch, options.autocast)
        choice["scorer"] = get_scorer(options.scorer or "forward", autocast=autocast, **settings)
        choice["policy"] = options.policy or "adaselection"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)  # the table and the JSON have them
        return plan(model, batch, options.gamma, optimizer=optimizer, repeats=options.repeats, **choice)


def _sampler(options: argparse.Namespace) -> Any:
    import torch

    from adaselect_kernels.samplers import get_sampler

    if options.sampler == "rs2":
        return get_sampler("rs2", options.rows, min(options.batch, options.rows), gamma=options.gamma)
    if options.sampler == "impon":
        bank = math.floor(options.batch / options.gamma + 0.5)
        features = torch.randn(
            max(bank, 2048), math.prod(options.input), device=options.device
        )  # its cost is that of a bank
        return get_sampler("impon", len(features), options.batch, bank=bank, features=features, normalized=True)
    return get_sampler(options.sampler, options.rows, options.batch)


def _model(options: argparse.Namespace) -> "nn.Module":
    """The model that is named. Raises ValueError."""
    from torch import nn

    if options.model == "resnet18":
        from adaselect_kernels.models.resnet import resnet18
        from adaselect_kernels.models.slimmable import slimmable_resnet18

        if len(options.input) != 3:
            raise ValueError(f"resnet18 takes images, --input CxHxW, got {options.input}")
        if options.scorer == "slim":
            return slimmable_resnet18(options.classes, (1.0, options.width), channels=options.input[0])
        return resnet18(options.classes, channels=options.input[0])
    if options.model == "mlp":
        if options.scorer == "slim":
            raise ValueError("the scorer slim needs a slimmable model: --model resnet18, or a factory of your own")
        sizes = [math.prod(options.input), 256, 256, options.classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for size, to in itertools.pairwise(sizes):
            layers += [nn.Linear(size, to), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
    name, colon, factory = options.model.partition(":")
    if not (name and colon and factory):
        raise ValueError(f"--model must be resnet18, mlp or MODULE:FACTORY, got {options.model!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(name), factory)()
    except Exception as error:
        raise ValueError(f"--model {options.model}: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"--model {options.model} must return an nn.Module, got {type(made).__name__}")
    return made


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        return value

    return parse


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1], got {text!r}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be sizes above 0 joined by x, like 3x32x32, got {text!r}")
    return tuple(map(int, parts))


def _file(text: str) -> Path:
    """A file to be written, in a folder that exists, of a format that matplotlib draws."""
    file = Path(text)
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, got {text!r}")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {file.absolute().parent} does not exist, or {text} is a folder")
    return file


def _folder(text: str) -> Path:
    """A folder that exists or can be made: its parent must exist, so that a typing error does not grow a tree."""
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    if not folder.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {folder.absolute().parent} does not exist")
    return folder


if __name__ == "__main__":
    sys.exit(main())
