"""The results on docs/tokens.md and their figures, from what `adaselect tokens` has left in benchmarks/results/tokens/.

adaselect tokens --output benchmarks/results/tokens ...
python -m benchmarks.tokens_page
"""

import json
from pathlib import Path
from typing import Any

from adaselect_kernels.demo.tokens import figures
from adaselect_kernels.demo.tokens.config import FULL, LAYERS
from benchmarks.markdown import table
from benchmarks.records import ROOT

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "tokens", ROOT / "docs" / "tokens.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Fill the page between its markers, and draw docs/figures/tokens-VOCABULARY.png. Raises ValueError without markers."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} must have {BEGIN} and {END} once each")
    sections = ["## What came out\n"]
    for vocabulary in LAYERS:
        path = results / f"tokens_{vocabulary}.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            (page.parent / "figures").mkdir(exist_ok=True)
            figure = figures.draw(found, page.parent / "figures" / f"tokens-{vocabulary}.png")
            sections.append(_section(vocabulary, found, figure.name))
        else:
            sections.append(f"### {vocabulary.capitalize()}\n\nNot measured yet.\n")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(before + BEGIN + "\n" + "\n".join(sections) + END + after, encoding="utf-8")


def _section(vocabulary: str, results: dict[str, Any], figure: str) -> str:
    config, about = results["config"], results["corpus"]
    full = next(row for row in results["summary"] if row["variant"] == FULL.label)
    rows = [_row(row, full) for row in results["summary"]]
    head = ("variant", "bits a byte", "less full loss", "steps", "ms a step", "of it scoring", "step over full loss")
    seconds = [entry["seconds"]["total"] for entry in results["references"]]
    loads = [entry["load"] for entry in results["references"] if entry["load"] is not None]
    busy = f"; load average {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    parts = (
        f"### {vocabulary.capitalize()}: {about['vocabulary']:,} tokens, the head is {100 * config['head_share']:.0f} %"
        " of a forward\n",
        f"{_verdict(results, full)}\n",
        f"![Held-out loss over training time, and the difference at the end](figures/{figure})\n",
        table(head, rows),
        f"Mean ± standard deviation over {len(seconds)} seeds; {config['seconds']:g} s a run, gamma {config['gamma']:g},",
        f"{config['threads']} CPU threads{busy}. Text: {about['name']} ({about['bytes']:,} bytes). Reference model:",
        f"{sum(seconds) / len(seconds):.1f} s a seed, not counted. Commit {results['commit']}, torch"
        f" {results['versions']['torch']}.\n",
    )
    return "\n".join(parts)


def _row(row: dict[str, Any], full: dict[str, Any]) -> tuple[str, ...]:
    times = row["milliseconds_a_step"]
    return (
        row["variant"],
        _spread(row["bits_per_byte"], ".3f"),
        "" if row is full else _spread(row["less_full_loss"], "+.3f"),
        f"{row['steps']:,.0f}",
        f"{times['total']:.1f}",
        f"{times['select']:.1f}",
        f"{times['total'] / full['milliseconds_a_step']['total']:.2f}",
    )


def _spread(values: dict[str, Any], form: str) -> str:
    return format(values["mean"], form) + ("" if values["std"] is None else f" ± {values['std']:.3f}")


def _verdict(results: dict[str, Any], full: dict[str, Any]) -> str:
    """Who is ahead of the full loss in every seed, and who of random tokens."""
    summary = [row for row in results["summary"] if row is not full]
    random = next(row for row in summary if row["variant"] == "random tokens")
    ahead = [row["variant"] for row in summary if max(row["less_full_loss"]["values"]) < 0]
    behind = [row["variant"] for row in summary if min(row["less_full_loss"]["values"]) > 0]
    beat = [
        row["variant"]
        for row in summary
        if all(a < b for a, b in zip(row["bits_per_byte"]["values"], random["bits_per_byte"]["values"], strict=True))
    ]
    return (
        f"Better than the full loss in every seed: {', '.join(ahead) or 'none'}; worse in every seed:\n"
        f"{', '.join(behind) or 'none'}. Better than random tokens in every seed: {', '.join(beat) or 'none'}."
    )


if __name__ == "__main__":
    write()
