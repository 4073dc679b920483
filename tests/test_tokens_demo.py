"""`adaselect tokens`, on a very small budget: its text, its runs, its files, and how it goes on after an interruption."""

import json
import math
import random

import pytest
import torch

from adaselect_kernels import cli
from adaselect_kernels.demo.tokens import TokensConfig, run, session, train
from adaselect_kernels.demo.tokens.config import FULL, VARIANTS
from adaselect_kernels.demo.tokens.corpus import (
    LEAST,
    Batches,
    encode,
    frequent_pieces,
    held_out_windows,
    load_text,
    make_corpus,
)
from adaselect_kernels.demo.tokens.report import table
from benchmarks import tokens_page

TINY = {"batch": 2, "context": 8, "width": 8, "heads": 2, "words": 300, "turns": 2, "held_out_windows": 4}
LABELS = [variant.label for variant in VARIANTS]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(90)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(draw.choices(words, k=LEAST // 3)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(text_file):
    return make_corpus(*load_text([text_file]), TokensConfig(**TINY))


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    """One comparison, run to its end: (folder, results, what it printed)."""
    folder = tmp_path_factory.mktemp("tokens") / "results"
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Console, "print", lambda self, *what, **style: printed.extend(what))
        assert run(
            TokensConfig(vocabulary="words", seconds=0.1, seeds=2, seed=3, gamma=0.25, **TINY), folder, [text_file]
        )
    return folder, json.loads((folder / "tokens_words.json").read_text()), printed


def test_every_variant_trains_for_the_same_time(finished):
    _, results, _ = finished
    assert [(entry["seed"], entry["variant"]) for entry in results["runs"]] == [(s, v) for s in (3, 4) for v in LABELS]
    for entry in results["runs"]:
        assert entry["seconds"]["total"] == pytest.approx(sum(entry["seconds"][part] for part in train.PARTS))
        assert 0.1 <= entry["seconds"]["total"] == entry["curve"][-1]["seconds"]
        assert entry["curve"][0]["steps"] == 0
        assert len(entry["curve"]) == 3
        assert entry["tokens_seen"] == 16 * entry["steps"]
        assert entry["tokens_trained_on"] == (16 if entry["variant"] == FULL.label else 4) * entry["steps"]
        assert entry["bits_per_byte"] == entry["curve"][-1]["bits_per_byte"]
    for seed in (3, 4):
        starts = {entry["curve"][0]["bits_per_byte"] for entry in results["runs"] if entry["seed"] == seed}
        assert len(starts) == 1  # the same weights
    assert [entry["seed"] for entry in results["references"]] == [3, 4]


def test_summary_files_and_tables(finished):
    folder, results, printed = finished
    assert {path.name for path in folder.iterdir()} == {"tokens_words.json", "tokens_words.png"}
    assert (folder / "tokens_words.png").read_bytes().startswith(b"\x89PNG")
    assert results["config"]["head_share"] == pytest.approx(300 * 8 / (300 * 8 + 2 * (12 * 64 + 64)), rel=0.5)
    assert results["corpus"]["vocabulary"] <= 300
    assert results["corpus"]["name"].startswith("text")  # the folder and the file, no more of the path
    assert results["corpus"]["name"].endswith("/words.txt")
    for row in results["summary"]:
        of = [entry for entry in results["runs"] if entry["variant"] == row["variant"]]
        losses = [entry["bits_per_byte"] for entry in of]
        full = [entry["bits_per_byte"] for entry in results["runs"] if entry["variant"] == FULL.label]
        assert row["bits_per_byte"]["mean"] == pytest.approx(sum(losses) / 2)
        assert row["bits_per_byte"]["std"] == pytest.approx(abs(losses[0] - losses[1]) / math.sqrt(2))
        assert row["less_full_loss"]["values"] == pytest.approx([a - b for a, b in zip(losses, full, strict=True)])
        milliseconds = 1000 * sum(e["seconds"]["total"] for e in of) / sum(e["steps"] for e in of)
        assert row["milliseconds_a_step"]["total"] == pytest.approx(milliseconds)
    tables = [item for item in printed if isinstance(item, type(table("")))]
    assert [list(one.columns[0].cells) for one in tables] == [LABELS, LABELS]
    assert any("Not counted above" in str(item) for item in printed)


def test_the_page_has_what_was_measured(finished, tmp_path):
    folder, results, _ = finished
    page = tmp_path / "tokens.md"
    page.write_text(f"before\n{tokens_page.BEGIN}\nold\n{tokens_page.END}\nafter\n")
    tokens_page.write(folder, page)
    text = page.read_text()
    assert text.startswith(f"before\n{tokens_page.BEGIN}\n")
    assert text.endswith(f"{tokens_page.END}\nafter\n")
    assert "old" not in text
    assert "### Bytes\n\nNot measured yet." in text
    assert (tmp_path / "figures" / "tokens-words.png").is_file()
    for row in results["summary"]:
        assert f"| {row['variant']} | {row['bits_per_byte']['mean']:.3f} ±" in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="once each"):
        tokens_page.write(folder, page)


def test_the_same_call_goes_on_where_it_was_interrupted(finished, text_file, tmp_path, monkeypatch):
    settings = {"seconds": 0.02, **TINY}
    really, started = session._one_seed, []

    def one_seed(config, seed, *rest):
        started.append(seed)
        if started == [0, 1]:
            raise KeyboardInterrupt
        return really(config, seed, *rest)

    monkeypatch.setattr(session, "_one_seed", one_seed)
    assert not run(TokensConfig(seeds=3, **settings), tmp_path, [text_file])
    kept = json.loads((tmp_path / "tokens_bytes.json").read_text())
    assert kept["interrupted"]
    assert len(kept["runs"]) == len(VARIANTS)
    assert run(TokensConfig(seeds=3, **settings), tmp_path, [text_file])
    assert started == [0, 1, 1, 2]
    results = json.loads((tmp_path / "tokens_bytes.json").read_text())
    assert results["runs"][: len(VARIANTS)] == kept["runs"]
    assert not results["interrupted"]
    assert run(TokensConfig(seeds=1, gamma=0.5, **settings), tmp_path, [text_file])  # another comparison: anew
    assert started == [0, 1, 1, 2, 0]
    (tmp_path / "tokens_bytes.json").write_text("{}")
    assert run(TokensConfig(seeds=1, **settings), tmp_path, [text_file])
    assert started == [0, 1, 1, 2, 0, 0]


def test_an_interruption_before_the_first_seed_writes_nothing(text_file, tmp_path, monkeypatch):
    def one_seed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "_one_seed", one_seed)
    assert not run(TokensConfig(seconds=0.01, **TINY), tmp_path / "new", [text_file])
    assert list((tmp_path / "new").iterdir()) == []


def test_with_every_token_chosen_every_rule_is_the_full_loss(corpus, monkeypatch):
    """The losses, the gradients and the stream of batches are the same; a stopped clock keeps the learning rate equal."""
    monkeypatch.setattr(train.time, "perf_counter", lambda: 0.0)
    config = TokensConfig(gamma=1.0, **TINY)
    reference = config.model(corpus.vocabulary)
    runs = train.runs_of_seed(config, VARIANTS, 5, corpus, reference)
    before = runs[0].model.head.detach().clone()
    for _ in range(3):
        for one in runs:
            one.step()
    assert not torch.allclose(runs[0].model.head, before)
    for one in runs[1:]:
        for ours, full in zip(one.model.parameters(), runs[0].model.parameters(), strict=True):
            torch.testing.assert_close(ours, full, rtol=1e-3, atol=1e-4)  # Adam divides small gradients by themselves
    assert runs[2].selector.config.rule == "excess_loss"
    assert runs[2].reference is reference
    assert runs[3].selector.methods == ("big_loss", "uniform")
    assert {one.selector.state.step.item() for one in runs[1:]} == {4}


def test_with_few_tokens_chosen_the_rules_differ(corpus):
    config = TokensConfig(gamma=0.25, **TINY)
    runs = train.runs_of_seed(config, VARIANTS, 5, corpus, config.model(corpus.vocabulary))
    for one in runs:
        one.step()
        one.step()
    heads = [one.model.head for one in runs]
    assert all(not torch.allclose(a, b) for i, a in enumerate(heads) for b in heads[:i])


def test_a_uniform_guess_costs_eight_bits_a_byte(corpus):
    one = train.Run(TokensConfig(**TINY), FULL, 0, corpus, corpus.train, None)
    torch.nn.init.zeros_(one.model.embedding.weight)
    one.evaluate()
    assert one.curve[-1]["bits_per_byte"] == pytest.approx(8.0)


def test_the_learning_rate_rises_and_has_fallen_to_zero_at_the_end():
    assert 0 < train.rate(0.0) < 0.2
    assert max(train.rate(i / 100) for i in range(100)) == pytest.approx(train.rate(0.09))
    assert train.rate(0.55) == pytest.approx(0.45)
    assert train.rate(1.0) == train.rate(1.1) == 0.0


class TestCorpus:
    def test_words_lose_nothing_and_are_of_the_training_text_alone(self):
        text = "one two one twö 12, three!\n\tone\r\n".encode()
        pieces = [bytes([byte]) for byte in range(256)] + frequent_pieces(b" one one one two 12 12\xc3", 2)
        assert pieces[256:] == [b" one", b" 12"]
        tokens = encode(text, pieces).tolist()
        assert b"".join(pieces[token] for token in tokens) == text
        assert tokens.count(256) == 1
        assert bytes(tokens[:3]) == b"one"  # at the start there is no space before it, so it is spelled

    def test_parts_are_blocks_of_their_own(self):
        text = b"".join(bytes([65 + i % 10]) * 3000 for i in range(20))  # a letter for each place among ten blocks
        corpus = make_corpus(text, "letters", TokensConfig(**TINY))
        assert set(corpus.train.tolist()) == set(b"ABCDEGH")
        assert set(corpus.held_out.tolist()) == set(b"F")
        assert set(corpus.reference.tolist()) == set(b"IJ")
        reference = TokensConfig(**TINY).model(256)
        for one in train.runs_of_seed(TokensConfig(**TINY), VARIANTS, 0, corpus, reference):
            assert set(next(one.batches)[0].flatten().tolist()) <= set(b"ABCDEGH")
        of_reference = train.reference_run(TokensConfig(**TINY), 0, corpus)
        assert set(next(of_reference.batches)[0].flatten().tolist()) <= set(b"IJ")
        assert corpus.about["tokens"] == {"train": 42_000, "held_out": 6000, "reference": 12_000}

    def test_batches_are_windows_and_the_next_tokens(self):
        config = TokensConfig(**TINY)
        tokens = torch.arange(500)
        first, same, other = (Batches(tokens, config, seed) for seed in (1, 1, 2))
        inputs, targets = next(first)
        assert inputs.shape == targets.shape == (2, 8)
        assert torch.equal(inputs + 1, targets)
        assert torch.equal(inputs, next(same)[0])
        assert not torch.equal(inputs, next(other)[0])
        assert not torch.equal(inputs, next(first)[0])
        inputs, targets = held_out_windows(tokens, config)
        assert inputs[:, 0].tolist()[0] == 0
        assert len(set(inputs.flatten().tolist())) == 4 * 8  # no overlap
        assert torch.equal(inputs + 1, targets)

    def test_without_files_it_is_the_standard_library(self):
        text, name = load_text([])
        assert name.startswith("the standard library of Python 3.")
        assert b"import" in text
        assert len(text) > LEAST


def test_what_the_command_refuses(tmp_path, text_file, capsys):
    missing, short = tmp_path / "missing.txt", tmp_path / "short.txt"
    short.write_bytes(b"too short")
    for text, message in (
        (missing, "missing.txt: No such file"),
        (tmp_path, "Is a directory"),
        (short, "short.txt) has 9 bytes"),
    ):
        assert cli.main(["tokens", "--text", str(text), "--output", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for arguments in (["--seconds", "0"], ["--seconds", "x"], ["--gamma", "0"], ["--vocabulary", "letters"]):
        with pytest.raises(SystemExit):
            cli.main(["tokens", *arguments])
    with pytest.raises(ValueError, match="only 8 tokens"):
        make_corpus(b"x" * 80, "x", TokensConfig(**TINY))
    for settings, error in (({"seconds": -1}, ValueError), ({"seconds": "1"}, TypeError), ({"seeds": 0}, ValueError)):
        with pytest.raises(error, match=next(iter(settings))):
            TokensConfig(**settings)


def test_the_command_passes_its_options_on(monkeypatch, text_file, tmp_path):
    seen = []
    monkeypatch.setattr("adaselect_kernels.demo.tokens.run", lambda *arguments: bool(seen.append(arguments)))
    arguments = ["--vocabulary", "words", "--gamma", "0.2", "--seconds", "3", "--seeds", "2", "--seed", "7"]
    assert cli.main(["tokens", *arguments, "--text", str(text_file), "--output", str(tmp_path)]) == cli.INTERRUPTED
    config = TokensConfig(vocabulary="words", gamma=0.2, seconds=3.0, seeds=2, seed=7)
    assert seen == [(config, tmp_path, [text_file])]
