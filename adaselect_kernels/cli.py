"""The command `adaselect`: doctor, demo and experiment."""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from adaselect_kernels import doctor
from adaselect_kernels._version import __version__

INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


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

    # It has arguments of its own, known to the checkout's benchmarks: they are parsed there.
    experiment = commands.add_parser("experiment", help="the papers' experiments, and their report", add_help=False)
    experiment.set_defaults(run=_experiment)
    return parser


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
