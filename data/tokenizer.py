"""Text to token ids and back: a byte-level BPE, so every text has ids and every id has bytes.

    train_bpe    learns a vocabulary from texts
    word_level   takes a vocabulary as given, each of its tokens one id
    gpt2         GPT-2's own, for checkpoints that were trained with it
    load         what `Tokenizer.save` wrote

The end of a text is one special token, `<|endoftext|>`. It enters a sequence as the id `eot`, never by way of text.
"""

import base64
import codecs
import json
import os
from collections.abc import Iterable
from pathlib import Path

import tiktoken

EOT = "<|endoftext|>"
BYTES = [bytes([value]) for value in range(256)]
WORDS = r" ?\w+|[^\w\s]|\s+"  # a word with the space before it, a punctuation mark, white space


class Tokenizer:
    """A `tiktoken.Encoding` with ids 0 to `vocab_size` - 1, the last of them `eot`, the end of a text."""

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.eot = encoding.eot_token
        self.vocab_size = encoding.max_token_value + 1

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never `eot`: a literal `<|endoftext|>` in it is ordinary text."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        return self.encoding.encode_ordinary_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: `eot` shows as nothing, bytes that are no UTF-8 as the replacement character."""
        return b"".join(self._token_bytes(ids)).decode("utf-8", "replace")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """One string per id, together `decode(ids)`; a character split over tokens stands at the last of them."""
        parts = self._token_bytes(ids)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [decoder.decode(part, final=at == len(parts)) for at, part in enumerate(parts, start=1)]

    def to_json(self) -> str:
        """All that makes this tokenizer: the pattern that parts a text, and each token's bytes in base64, by id."""
        tokens = [self.encoding.decode_single_token_bytes(i) for i in range(self.eot)]
        tokens = [base64.b64encode(token).decode("ascii") for token in tokens]
        return json.dumps({"pattern": self.encoding._pat_str, "eot": self.eot, "tokens": tokens}, indent=0)

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/bpe.json, whole or not at all."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        unfinished = Path(folder, f"bpe.json.{os.getpid()}")
        try:
            unfinished.write_bytes(self.to_json().encode("utf-8"))
            os.replace(unfinished, Path(folder, "bpe.json"))
        finally:
            unfinished.unlink(missing_ok=True)

    def _token_bytes(self, ids: Iterable[int]) -> list[bytes]:
        return [b"" if i == self.eot else self.encoding.decode_single_token_bytes(i) for i in ids]


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote to `folder`."""
    path = Path(folder, "bpe.json")
    if not path.is_file():
        raise ValueError(f"{path} is missing: without it ids are no text; copy it from where the model was trained")
    try:
        record = json.loads(path.read_bytes())
        tokens = [base64.b64decode(token, validate=True) for token in record["tokens"]]
        if not len(tokens) == len(set(tokens)) == record["eot"] or not set(BYTES) <= set(tokens):
            raise ValueError("a token is missing or stands twice")
        return _build(record["pattern"], tokens)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no tokenizer file ({type(error).__name__}: {error}): copy it again") from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A BPE of `vocab_size` ids, `eot` included; of fewer where the texts have no more pairs to merge."""
    import rustbpe  # here, so that sampling needs no trainer

    if vocab_size < 257:
        raise ValueError(f"a vocabulary of {vocab_size} ids is too small: 256 bytes and the end of text need 257")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size=vocab_size - 1)
    by_rank = sorted(trainer.get_mergeable_ranks(), key=lambda token_and_rank: token_and_rank[1])
    # should two merges spell the same bytes, the first is the token: in tiktoken bytes have one rank
    return _build(trainer.get_pattern(), list(dict.fromkeys(bytes(token) for token, _ in by_rank)))


def word_level(tokens: list[str]) -> Tokenizer:
    """256 bytes and each of `tokens` ("One", " ball", "."): those are one id each, any other word goes by its bytes."""
    # tiktoken looks a whole piece of the pattern up before it merges, so no merges need to lead to a word
    made = _build(WORDS, list(dict.fromkeys([*BYTES, *(token.encode("utf-8") for token in tokens)])))
    for token in tokens:
        if len(made.encode(token)) != 1:
            raise ValueError(f"{token!r} can't be one token: wanted is a word, alone or after one space, a punctuation "
                             "mark or white space; split it")
    return made


def gpt2() -> Tokenizer:
    """GPT-2's 50,257 ids, which tiktoken fetches once."""
    try:
        return Tokenizer(tiktoken.get_encoding("gpt2"))
    except OSError as error:
        raise ValueError(f"GPT-2's vocabulary is not on this machine and can't be fetched ({type(error).__name__}): "
                         "connect once, or point TIKTOKEN_CACHE_DIR to a folder that has it") from error


def _build(pattern: str, tokens: list[bytes]) -> Tokenizer:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {EOT: len(tokens)}
    return Tokenizer(tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))
