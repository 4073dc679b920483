"""The measurement of approximate scoring: its figures are right, and its page says what its files hold."""

import pytest
import torch

from adaselect_kernels import SampleStats
from benchmarks import linear_scores as scores


def test_words_are_numbered_by_frequency(tmp_path):
    (tmp_path / "a.txt").write_text("the cat the\ndog")
    (tmp_path / "b.txt").write_text("the cat bird")
    assert scores.read_words(tmp_path) == ["the", "cat", "the", "dog", "the", "cat", "bird"]
    assert scores.encode(scores.read_words(tmp_path), 3).tolist() == [1, 2, 1, 0, 1, 2, 0]
    with pytest.raises(FileNotFoundError, match=r"no \*\.txt"):
        scores.read_words(tmp_path / "nothing")


def test_examples_are_the_words_before_each_word():
    contexts, targets = scores.examples(torch.arange(7))
    assert contexts.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]
    assert targets.tolist() == [4, 5, 6]


def test_agreement():
    loss = torch.arange(10.0)
    swapped = loss.clone()
    swapped[[9, 8]] = loss[[8, 9]]
    found = scores.agreement(SampleStats(loss=loss, grad_norm=loss), SampleStats(loss=swapped + 2, grad_norm=-loss))
    assert found["spearman_loss"] == pytest.approx(1 - 6 * 2 / (10 * 99))  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert found["spearman_grad_norm"] == -1
    assert found["overlap"] == {"0.1": 0.0, "0.3": 1.0, "0.5": 1.0}
    assert found["bias"] == pytest.approx(2)
    assert found["spread"] == pytest.approx(float(torch.tensor([1.0, -1.0, *[0.0] * 8]).std()), abs=1e-6)


def test_a_measurement_and_its_table(generator):
    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    targets = torch.randint(64, (50,), generator=generator)
    found = scores.measure(draw(50, 8), draw(64, 8), targets, draw(64), seconds=0.01)
    assert [r["contender"] for r in found] == ["exact", *scores.APPROXIMATIONS]
    by_name = {r["contender"]: r for r in found}
    assert by_name["float16"]["agreement"]["spearman_loss"] > by_name["stride 16"]["agreement"]["spearman_loss"]
    assert by_name["exact"]["status"] == by_name["stride 4"]["status"] == "measured"
    skipped = [r for r in found if r["status"] == "skipped"]
    assert all(r["reason"] == scores.SIMULATED and "ratio" not in r and "agreement" in r for r in skipped)


def test_the_page_holds_what_the_files_say():
    files = list(scores.result_files())
    assert files
    text = scores.PAGE.read_text(encoding="utf-8")
    assert scores.page(text, files) == text
    for folder, _ in files:
        assert (scores.DOCS / "figures" / f"{scores.GROUP}-{folder}.png").exists()
