"""What the approximations of scoring over a vocabulary lose and save: `python -m benchmarks.linear_scores --data FOLDER`.

Trains a small language model of words (embeddings of four words, one hidden layer, a head) on nine tenths of the text files of
FOLDER, and scores the last tokens of the rest, which it has not seen, with the exact head and with each approximation of
`linear_per_sample_stats`. Of each: the rank correlation (Spearman) of losses and of gradient norms with the exact ones, the
share of the exact choice of the largest losses that it finds too, how far its losses are off, and its time over that of
exact scoring, in turns in one run. A type that impl="auto" does not compute in on this machine is simulated by the reference:
its ranks are measured, its time is not.

Writes results/<device>/linear_scores.json in the format of records.py (agreement: {spearman_loss, spearman_grad_norm,
overlap {gamma: share}, bias, spread}), its figure, and the tables of docs/language_models.md, which without --data are made
again from the result files that are there.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaselect_kernels import SampleStats, linear_per_sample_stats
from benchmarks import records, timing
from benchmarks.markdown import number, table

GROUP = "linear_scores"
DOCS = records.ROOT / "docs"
PAGE = DOCS / "language_models.md"
BEGIN, END = f"<!-- {GROUP}:begin -->", f"<!-- {GROUP}:end -->"
VOCABULARY, CONTEXT, EMBEDDING, HIDDEN = 8192, 4, 64, 256
BATCH, UPDATES, SCORED = 256, 400, 4096
GAMMAS = (0.1, 0.3, 0.5)
STRIDES = (2, 4, 8, 16)
APPROXIMATIONS: dict[str, dict[str, Any]] = {
    **{f"stride {s}": {"vocab_stride": s} for s in STRIDES},
    "bfloat16": {"score_dtype": torch.bfloat16},
    "float16": {"score_dtype": torch.float16},
    "float8_e4m3fn": {"score_dtype": torch.float8_e4m3fn},
    "bfloat16, stride 8": {"score_dtype": torch.bfloat16, "vocab_stride": 8},
}
SIMULATED = "simulated by the reference, not measured"


class WordModel(nn.Module):
    """Logits of the next word from the last four."""

    def __init__(self, words: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding)
        self.layer = nn.Linear(CONTEXT * embedding, hidden)
        self.head = nn.Linear(hidden, words)

    def hidden(self, contexts: Tensor) -> Tensor:  # [N, CONTEXT] -> [N, hidden]
        return F.gelu(self.layer(self.embedding(contexts).flatten(1)))


def read_words(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"no *.txt in {folder.name or folder}")
    return " ".join(path.read_text(encoding="utf-8") for path in files).split()


def encode(words: Sequence[str], size: int) -> Tensor:
    """Numbers by frequency, the most frequent first; 0 is every word beyond the first `size` - 1."""
    known = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(size - 1))}
    return torch.tensor([known.get(word, 0) for word in words])


def examples(ids: Tensor) -> tuple[Tensor, Tensor]:
    """contexts [N, CONTEXT] and targets [N]."""
    return ids.unfold(0, CONTEXT, 1)[:-1], ids[CONTEXT:]


def train(model: WordModel, ids: Tensor, updates: int, batch: int = BATCH) -> float:
    """The mean loss of the last tenth of the updates."""
    contexts, targets = examples(ids)
    words = model.head.out_features
    with torch.no_grad():  # begins at the frequencies of the words, so that few updates make a trained classifier
        model.head.bias.copy_((ids.bincount(minlength=words) + 1).log() - math.log(len(ids) + words))
        model.head.weight.mul_(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses: list[float] = []
    for _ in range(updates):
        rows = torch.randint(len(targets), (batch,))
        loss = F.cross_entropy(model.head(model.hidden(contexts[rows])), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = losses[-max(1, updates // 10) :]
    return sum(last) / len(last)


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of the ranks; equal values are ranked by place."""
    ranks = [values.argsort(stable=True).argsort().double() for values in (a, b)]
    centred = [r - r.mean() for r in ranks]
    return float((centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm()))


def overlap(a: Tensor, b: Tensor, gamma: float) -> float:
    """Share of the gamma N largest of `a` that are among those of `b`."""
    k = max(1, int(gamma * len(a) + 0.5))
    chosen = torch.zeros(len(a), dtype=torch.bool).index_fill(0, a.topk(k).indices, True)
    return float(chosen[b.topk(k).indices].double().mean())


def agreement(exact: SampleStats, got: SampleStats) -> dict[str, Any]:
    losses, grad_norms = [_present(s.loss) for s in (exact, got)], [_present(s.grad_norm) for s in (exact, got)]
    off = losses[1].double() - losses[0].double()
    return {
        "spearman_loss": round(spearman(*losses), 6),
        "spearman_grad_norm": round(spearman(*grad_norms), 6),
        "overlap": {str(gamma): round(overlap(losses[0], losses[1], gamma), 4) for gamma in GAMMAS},
        "bias": round(float(off.mean()), 6),  # of the losses, in nats
        "spread": round(float(off.std()), 6),  # what is left of the error without its mean
    }


def _present(values: Tensor | None) -> Tensor:
    assert values is not None
    return values


def measure(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor, seconds: float) -> list[dict[str, Any]]:
    """One record for exact scoring and one for each approximation; ratios are over exact scoring within each round."""
    score = partial(linear_per_sample_stats, hidden, weight, targets, bias=bias, unit="token")
    exact, agreements, timed = score(), {}, {"exact": timing.Prepared([score])}
    for name, keywords in APPROXIMATIONS.items():
        call = partial(score, **keywords)
        try:
            got = call()
            timed[name] = timing.Prepared([call])
        except RuntimeError:  # the machine does not compute in this type
            got = call(impl="reference")
        agreements[name] = agreement(exact, got)
    samples = timing.interleave(timed, hidden.device, budget_s=seconds)
    params = {"N": hidden.shape[0], "H": hidden.shape[1], "V": weight.shape[0]}
    found = []
    for name in ("exact", *APPROXIMATIONS):
        record: dict[str, Any] = {"case": "words of a text", "params": params, "contender": name, "role": "ours"}
        record |= {"agreement": agreements[name]} if name in agreements else {}
        if name not in timed or samples[name].error:
            record |= {"status": "skipped", "reason": samples[name].error if name in timed else SIMULATED}
        else:
            taken = samples[name]
            record |= {
                "status": "measured",
                "reason": None,
                "us": {key: round(us * 1e6, 3) for key, us in timing.spread(taken.seconds).items()},
                "samples_us": [round(s * 1e6, 3) for s in taken.seconds],
                "inner": taken.inner,
                "cache": "warm",
                "ratio": timing.paired_ratio(taken.seconds, samples["exact"].seconds),
            }
        found.append(record)
    return found


def tables(document: Mapping[str, Any], folder: str) -> str:
    """What docs/language_models.md shows of one result file."""
    first, model, env = document["records"][0], document["model"], document["environment"]
    choices = [f"same choice, gamma {gamma}" for gamma in GAMMAS]
    head = ("scoring", "time over exact", "Spearman, loss", "Spearman, gradient norm", *choices, "loss off by, nats")
    rows = []
    for record in document["records"]:
        time_said = f"{record['ratio']['p50']:.2f}" if record["status"] == "measured" else record["reason"]
        found = record.get("agreement")
        if found is None:
            rows.append((record["contender"], f"1 ({number(record['us']['p50'] / 1e3)} ms)", *["1"] * 5, "0"))
            continue
        overlaps = [f"{100 * found['overlap'][str(gamma)]:.1f} %" for gamma in GAMMAS]
        ranks = [f"{found[key]:.4f}" for key in ("spearman_loss", "spearman_grad_norm")]
        rows.append(
            (record["contender"], time_said, *ranks, *overlaps, f"{found['bias']:+.3f} ± {found['spread']:.3f}")
        )
    size = ", ".join(f"{key} = {value:,}" for key, value in first["params"].items())
    said = (
        f'{env["device"]}, {env["threads"]} threads, impl "{document["implementation"]}"; {size}; a model of'
        f" {model['updates']:,} updates, loss {model['training_loss']:.2f} nats on what it trains on and"
        f" {model['scored_loss']:.2f} on what is scored; `{document['command']}` at"
        f" {(env['commit'] or 'unknown')[:12]}{'+changes' * bool(env['dirty'])}, {env['date']}:"
        f" benchmarks/results/{folder}/{GROUP}.json."
    )
    return f"{said}\n\n{table(head, rows)}\n![What the approximations lose and save](figures/{GROUP}-{folder}.png)\n"


def drawing(document: Mapping[str, Any]) -> Any:
    """Left, the share of the exact choice that each approximation misses; right, its time over exact scoring."""
    from matplotlib import pyplot as plt

    rows = [r for r in document["records"] if "agreement" in r]
    places = list(range(len(rows)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
    for i, gamma in enumerate(GAMMAS):
        shares = [100 - 100 * r["agreement"]["overlap"][str(gamma)] for r in rows]
        at = [p + (i - 1) * 0.27 for p in places]
        bars = left.barh(at, shares, 0.27, label=f"gamma {gamma}", color=("#0b6e4f", "#7aa6c2", "#d4a017")[i])
        left.bar_label(bars, [f"{s:.1f}" for s in shares], fontsize=6, padding=2)
    left.margins(x=0.1)
    left.set_xlabel("% of the exact choice (largest losses) that is missed")
    left.legend(fontsize=7, loc="center right", bbox_to_anchor=(1, 0.3))
    left.set_yticks(places, [r["contender"] for r in rows], fontsize=8)
    left.invert_yaxis()
    for place, r in zip(places, rows, strict=True):
        if r["status"] != "measured":
            right.text(0.02, place, "time not measured", va="center", fontsize=7, color="#555555")
            continue
        ratio = r["ratio"]
        ends = [[ratio["p50"] - ratio["p20"]], [ratio["p80"] - ratio["p50"]]]
        bar = right.barh(place, ratio["p50"], 0.6, color="#777777", xerr=ends, error_kw={"lw": 0.8})
        right.bar_label(bar, [f"{ratio['p50']:.2f}"], label_type="center", fontsize=7, color="white")
    right.axvline(1, color="black", linewidth=0.8)
    right.set_xlabel("time over exact scoring (20th, 50th, 80th percentile)")
    figure.suptitle(document["title"], fontsize=11)
    return figure


def result_files() -> Iterable[tuple[str, dict[str, Any]]]:
    for path in sorted(records.RESULTS.glob(f"*/{GROUP}.json")):
        yield path.parent.name, records.read(path)


def page(text: str, documents: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """The page with its generated part made again."""
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    generated = "\n".join(tables(document, folder) for folder, document in documents)
    return f"{before}{BEGIN}\n{generated}{END}{after}"


def run(folder: Path, updates: int, seconds: float) -> dict[str, Any]:
    began, device = time.monotonic(), torch.device("cpu")
    torch.manual_seed(0)
    ids = encode(read_words(folder), VOCABULARY)
    split = len(ids) * 9 // 10
    model = WordModel(VOCABULARY, EMBEDDING, HIDDEN)
    training_loss = train(model, ids[:split], updates)
    contexts, targets = (t[-SCORED:] for t in examples(ids[split:]))
    with torch.no_grad():
        hidden = model.hidden(contexts)
        head = model.head
        found = measure(hidden, head.weight.detach(), targets, head.bias.detach(), seconds)
        scored_loss = F.cross_entropy(head(hidden), targets).item()
    return {
        "format": records.FORMAT,
        "group": GROUP,
        "title": "Approximate scoring of the words of a text",
        "command": f"python -m benchmarks.linear_scores --data {folder.resolve().name}",
        "quick": False,
        "complete": True,
        "seconds": round(time.monotonic() - began, 1),
        "implementation": records.implementation(device),
        "environment": records.environment(device),
        "kernels": records.kernel_hashes("cpu", ("linear", "row_stats")),
        "model": {
            "updates": updates,
            "training_loss": round(training_loss, 4),
            "scored_loss": round(scored_loss, 4),
            "words": len(ids),
        },
        "records": found,
        "fits": [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of text files; without it the page alone is made again")
    parser.add_argument("--updates", type=int, default=UPDATES, help=f"of training, default {UPDATES}")
    parser.add_argument("--seconds", type=float, default=20, help="of timed rounds, default 20")
    arguments = parser.parse_args()
    if arguments.data is not None:
        document = run(arguments.data, arguments.updates, arguments.seconds)
        records.write(records.RESULTS / records.device_slug(torch.device("cpu")) / f"{GROUP}.json", document)
    from benchmarks import figures

    for folder, document in result_files():
        figures.draw({GROUP: document}, DOCS / "figures", folder, {GROUP: {"": drawing}})
        print(tables(document, folder))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), result_files()), encoding="utf-8")


if __name__ == "__main__":
    main()
