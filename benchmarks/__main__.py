"""Command line: `python -m benchmarks run|report|gpu|tune|static|list`."""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import gpu, records, runner
from benchmarks.end_to_end import group as end_to_end
from benchmarks.groups import GROUPS


def _group(name: str) -> str:
    if name not in GROUPS:
        raise argparse.ArgumentTypeError(f"the groups are {', '.join(GROUPS)}; got {name!r}")
    return name


def _names(text: str) -> list[str]:
    """Names separated by commas or spaces; "all" or nothing is an empty list."""
    names = text.replace(",", " ").split()
    return [] if names == ["all"] else names


def _group_list(text: str) -> list[str]:
    return [_group(name) for name in _names(text)] or list(GROUPS)


def _step_list(text: str) -> list[str]:
    names = _names(text) or list(gpu.STEPS)
    for name in names:
        if name not in gpu.STEPS:
            raise argparse.ArgumentTypeError(f"the steps are {', '.join(gpu.STEPS)}; got {name!r}")
    return names


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="measure groups and write one JSON file each")
    known = f"default all: {', '.join(GROUPS)}"
    run.add_argument("groups", nargs="*", type=_group, default=list(GROUPS), metavar="GROUP", help=known)
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument("--time-limit", type=float, default=300.0, metavar="SECONDS")
    run.add_argument("--out", type=Path, metavar="FOLDER", help="default benchmarks/results/<device>")
    run.add_argument("--quick", action="store_true", help="tiny shapes: proves the suite, measures nothing")
    run.add_argument("--width", type=int, help="end_to_end: channels of the first stage (default 64)")
    run.add_argument("--data", type=Path, metavar="FILE", help="end_to_end: .npz of uint8 images and labels")

    page = commands.add_parser("report", help="write docs/performance.md, its figures and the README table")
    page.add_argument("--results", type=Path, default=records.RESULTS, metavar="FOLDER")
    page.add_argument("--docs", type=Path, default=records.ROOT / "docs", metavar="FOLDER")
    page.add_argument("--readme", type=Path, default=records.ROOT / "README.md", metavar="FILE")

    lent = commands.add_parser("gpu", help="build, test and measure on a machine with a GPU")
    lent.add_argument("--groups", type=_group_list, default=list(GROUPS), metavar="A,B", help="default all")
    lent.add_argument(
        "--steps", type=_step_list, default=list(gpu.STEPS), metavar="A,B", help=f"of {', '.join(gpu.STEPS)}"
    )
    lent.add_argument("--time-limit", type=float, default=540.0, metavar="SECONDS")
    lent.add_argument("--out", type=Path, metavar="FOLDER", help="default benchmarks/results/<device>")
    lent.add_argument("--force", action="store_true", help="also groups whose results are up to date")
    lent.add_argument("--dry-run", action="store_true", help="on a CPU, tiny shapes, results thrown away")

    tables = commands.add_parser("tune", help="time other configurations than those in the launchers' tables")
    tables.add_argument("families", nargs="*", metavar="FAMILY", help="default all: tile, stream, split, block, ...")
    tables.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    tables.add_argument("--time-limit", type=float, default=540.0, metavar="SECONDS")
    tables.add_argument("--out", type=Path, metavar="FOLDER", help="default benchmarks/results/<device>")
    tables.add_argument("--quick", action="store_true", help="tiny shapes, on a CPU interpreted: measures nothing")

    gate = commands.add_parser(
        "static", help="compile the kernels for GPUs that are not there; write docs/static_gate.md"
    )
    gate.add_argument("--predictions", action="store_true", help="only the predicted times, which need no compiling")
    commands.add_parser("list", help="the groups and their cases")
    return main


def _tune(args: argparse.Namespace, device: torch.device) -> int:
    from benchmarks import tune  # needs Triton

    unknown = [name for name in args.families if name not in tune.FAMILIES]
    if unknown:
        print(f"the families are {', '.join(tune.FAMILIES)}; got {', '.join(unknown)}", file=sys.stderr)
        return 2
    out = args.out or records.RESULTS / records.device_slug(device)
    try:
        document, lines = tune.run(
            args.families or list(tune.FAMILIES), device, out, quick=args.quick, time_limit=args.time_limit
        )
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(lines))
    return int(any(record["current"] and record["status"] == "failed" for record in document["records"]))


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.command == "gpu":
        return gpu.run(args.groups, args.time_limit, args.out, steps=args.steps, force=args.force, dry_run=args.dry_run)
    if args.command == "report":
        from benchmarks import report  # needs matplotlib, which a machine that only measures may not have

        for line in report.write(args.results, args.docs, args.readme):
            print(line)
        return 0
    if args.command == "static":
        from benchmarks import static  # needs Triton

        faults = static.write(recompile=not args.predictions)
        print("\n".join(faults))
        return int(bool(faults))
    wanted = getattr(args, "device", "auto")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
    if args.command == "tune":
        return _tune(args, device)
    if args.command == "list":
        for group in GROUPS.values():
            print(f"{group.name}: {group.title}")
            for case in group.cases(device, False):
                print(f"  {case.name}")
        return 0
    known = GROUPS | {end_to_end.GROUP.name: end_to_end.group(args.width, args.data)}
    groups = [known[name] for name in args.groups]
    out = args.out or records.RESULTS / records.device_slug(device)
    documents = runner.run_groups(groups, device, out, quick=args.quick, time_limit=args.time_limit)
    for document in documents:
        runner.summary(document)
    return int(any(runner.failures(document) for document in documents))


if __name__ == "__main__":
    sys.exit(main())
