"""What the comparison says: its settings, a summary of the runs, tables on the terminal."""

import subprocess
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adaselect_kernels import doctor
from adaselect_kernels.demo.report import table
from adaselect_kernels.demo.tokens.config import FULL, VARIANTS, TokensConfig
from adaselect_kernels.demo.tokens.corpus import Corpus
from adaselect_kernels.demo.tokens.train import PARTS

IDENTITY = ("config", "corpus", "versions", "commit")  # what must agree for seeds to be added to results
CAVEAT = (
    "Of one text, one small model and this machine. Selection spares the head's backward pass, not the body's: it can win"
    " time only where the head is a large share, and must then make up for the tokens it leaves out. docs/tokens.md."
)


def new_results(config: TokensConfig, corpus: Corpus) -> dict[str, Any]:
    """Results without runs; which seeds they have is not part of the settings, so that more can be added."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("seed", "seeds")}
    more = {
        "layers": config.layers,
        "threads": torch.get_num_threads(),
        "head_share": config.head_share(corpus.vocabulary),
    }
    return {
        "config": settings | more,
        "corpus": corpus.about,
        "versions": doctor.versions(),
        "commit": _commit(),
        "interrupted": True,
        "references": [],
        "runs": [],
        "summary": [],
    }


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, marked when files have changed; None elsewhere."""
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def introduction(config: TokensConfig, corpus: Corpus) -> str:
    about = corpus.about
    tokens = about["tokens"]
    share = config.head_share(corpus.vocabulary)
    minutes = config.seeds * (len(VARIANTS) + 1) * config.seconds / 60
    return (
        f"Text: {about['name']}; {about['bytes']:,} bytes. Tokens: {tokens['train']:,} to train on,"
        f" {tokens['reference']:,} for the reference model, {tokens['held_out']:,} held out.\n"
        f"Model: a GPT with {config.layers} layers of width {config.width} over a vocabulary of {corpus.vocabulary:,};"
        f" its head is {100 * share:.0f} % of the arithmetic of a forward pass.\n"
        f"Every variant trains for {config.seconds:g} s with each of {config.seeds} seeds,"
        f" {config.tokens_a_step:,} tokens a step; about {minutes:.1f} minutes, and evaluation."
    )


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant: means over its seeds, and its loss less that of the full loss, seed by seed."""
    full = {run["seed"]: run["bits_per_byte"] for run in runs if run["variant"] == FULL.label}
    rows = []
    for variant in VARIANTS:
        of = [run for run in runs if run["variant"] == variant.label]
        differences = [run["bits_per_byte"] - full[run["seed"]] for run in of]
        steps = sum(run["steps"] for run in of)
        rows.append(
            {
                "variant": variant.label,
                "seeds": [run["seed"] for run in of],
                "bits_per_byte": _spread([run["bits_per_byte"] for run in of]),
                "less_full_loss": _spread(differences),
                "steps": mean(run["steps"] for run in of),
                "tokens_trained_on": mean(run["tokens_trained_on"] for run in of),
                "milliseconds_a_step": {
                    part: 1000 * sum(run["seconds"][part] for run in of) / steps for part in (*PARTS, "total")
                },
            }
        )
    return rows


def _spread(values: list[float]) -> dict[str, Any]:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "values": values}


def print_results(console: Console, results: dict[str, Any]) -> None:
    """The tables, the cost of the reference model, and what they do not show."""
    console.print(_loss_table(results))
    console.print(_time_table(results))
    references = results["references"]
    console.print(
        f"Not counted above: the reference model of excess loss, trained beforehand for"
        f" {mean(entry['seconds']['total'] for entry in references):.1f} s a seed on text of its own"
        f" ({mean(entry['bits_per_byte'] for entry in references):.3f} bits a byte).",
        highlight=False,
    )
    console.print(CAVEAT, style="dim", highlight=False)


def _loss_table(results: dict[str, Any]) -> Table:
    config = results["config"]
    seeds = len(results["references"])
    made = table(
        f"Held-out bits a byte after {config['seconds']:g} s; gamma {config['gamma']:g}, {seeds} seed{'s' * (seeds > 1)}",
        *("variant", "loss", "less full loss,\nby seed", "steps", "tokens in\nthe loss"),
    )
    for row in results["summary"]:
        made.add_row(
            row["variant"],
            _text(row["bits_per_byte"], ".3f"),
            "-" if row["variant"] == FULL.label else _text(row["less_full_loss"], "+.3f"),
            f"{row['steps']:,.0f}",
            f"{row['tokens_trained_on']:,.0f}",
        )
    return made


def _time_table(results: dict[str, Any]) -> Table:
    full = results["summary"][0]["milliseconds_a_step"]["total"]
    threads = results["config"]["threads"]
    made = table(
        f"Milliseconds a step, {threads} CPU thread{'s' * (threads > 1)}",
        *(
            "variant",
            "forward\nof the body",
            "score and\nchoose",
            "loss, backward,\noptimizer",
            "total",
            "over\nfull loss",
        ),
    )
    for row in results["summary"]:
        times = row["milliseconds_a_step"]
        made.add_row(
            row["variant"], *(f"{times[part]:.1f}" for part in (*PARTS, "total")), f"{times['total'] / full:.2f}"
        )
    return made


def _text(values: dict[str, Any], form: str) -> str:
    return format(values["mean"], form) + ("" if values["std"] is None else f" ± {values['std']:.3f}")
