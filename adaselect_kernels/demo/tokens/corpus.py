"""The text: where it comes from, its three parts, and its tokens."""

import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaselect_kernels.demo.tokens.config import TokensConfig

LIMIT = 8 * 2**20  # bytes that are read: word counts are taken in plain Python
LEAST = 50_000
BLOCK = 16 * 2**10
# Of every ten blocks of the text: seven train, two train the reference model, one is held out.
PARTS = ("train",) * 5 + ("held_out",) + ("train",) * 2 + ("reference",) * 2
_PIECE = re.compile(rb" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s")  # a word with the space before it


class Corpus(NamedTuple):
    train: Tensor  # [n] int64, tokens
    reference: Tensor  # of the text that trains the reference model of the rule "excess_loss"
    held_out: Tensor
    token_bytes: Tensor  # [V] float64, length of each token
    about: dict[str, Any]  # what results hold of it

    @property
    def vocabulary(self) -> int:
        return len(self.token_bytes)


def load_text(files: Sequence[Path]) -> tuple[bytes, str]:
    """The files one after the other, or without any Python's own library, up to LIMIT bytes; and a name for it.

    Raises ValueError, naming the file, for one that cannot be read, and for a text that is too short.
    """
    name = ", ".join(f"{file.resolve().parent.name}/{file.name}" for file in files)
    if not files:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        name = f"the standard library of Python {sysconfig.get_python_version()}, its {len(files)} top-level sources"
    text = b"\n".join(_read(file) for file in files)
    if len(text) < LEAST:
        raise ValueError(f"the text ({name}) has {len(text):,} bytes; at least {LEAST:,} are needed, some 10 pages")
    return text[:LIMIT], name


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the text {file}: {error.strerror or error}") from error


def make_corpus(text: bytes, name: str, config: TokensConfig) -> Corpus:
    """Split, and turn into tokens. Raises ValueError when a part is shorter than a sequence."""
    block = min(BLOCK, len(text) // 20)
    parts: dict[str, list[bytes]] = {part: [] for part in PARTS}
    for i, start in enumerate(range(0, len(text), block)):
        parts[PARTS[i % len(PARTS)]].append(text[start : start + block])
    joined = {part: b"".join(blocks) for part, blocks in parts.items()}
    pieces = [bytes([byte]) for byte in range(256)]
    if config.vocabulary == "words":
        pieces += frequent_pieces(joined["train"], config.words - 256)
    tokens = {part: encode(joined[part], pieces) for part in joined}
    for part, of in tokens.items():
        if len(of) <= config.context:
            raise ValueError(f"the part {part!r} of the text ({name}) has only {len(of)} tokens: give a longer text")
    about = {
        "name": name,
        "bytes": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
        "vocabulary": len(pieces),
        "tokens": {part: len(of) for part, of in tokens.items()},
    }
    lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.float64)
    return Corpus(tokens["train"], tokens["reference"], tokens["held_out"], lengths, about)


def frequent_pieces(text: bytes, count: int) -> list[bytes]:
    """Up to `count` words of two bytes and more, the most frequent first."""
    counts = Counter(piece for piece in _PIECE.findall(text) if len(piece) > 1)
    return [piece for piece, _ in counts.most_common(count)]


def encode(text: bytes, pieces: Sequence[bytes]) -> Tensor:
    """Tokens [n] int64: a word that is one of `pieces` is its place there, any other is spelled in bytes. Nothing is lost."""
    if len(pieces) == 256:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    places = {piece: place for place, piece in enumerate(pieces)}
    tokens: list[int] = []
    for piece in _PIECE.findall(text):
        place = places.get(piece)
        tokens.extend(piece if place is None else (place,))
    return torch.tensor(tokens, dtype=torch.int64)


class Batches:
    """An endless stream of random windows, the same for every variant of a seed: inputs and targets [batch, context]."""

    def __init__(self, tokens: Tensor, config: TokensConfig, seed: int) -> None:
        self._windows = tokens.unfold(0, config.context + 1, 1)
        self._batch = config.batch
        self._generator = torch.Generator().manual_seed(seed)

    def __next__(self) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(self._windows), (self._batch,), generator=self._generator)
        windows = self._windows[starts]
        return windows[:, :-1], windows[:, 1:]


def held_out_windows(tokens: Tensor, config: TokensConfig) -> tuple[Tensor, Tensor]:
    """Inputs and targets [windows, context] of windows that do not overlap, spread over the part."""
    windows = tokens.unfold(0, config.context + 1, config.context)
    keep = torch.linspace(0, len(windows) - 1, min(len(windows), config.held_out_windows)).round().long()
    return windows[keep, :-1], windows[keep, 1:]
