"""Text to token ids and back: a byte-level BPE, so every text has ids and every id has bytes.

    train_bpe    learns a vocabulary from texts
    word_level   takes a vocabulary as given, each of its tokens one id
    gpt2         GPT-2's own, for checkpoints that were trained with it
    load         a folder's: what `save` wrote, or the `tokenizer.json` of a checkpoint of others

The end of a text is one special token, `<|endoftext|>`. It enters a sequence as the id `eot`, never by way of text.
"""

import base64
import codecs
import json
import os
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import tiktoken
import tokenizers

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


class HubTokenizer(Tokenizer):
    """A `tokenizer.json` for raw text: no template, nothing added; `eot`, which a text begins and ends with, is given.

    Byte-level BPE and SentencePiece's kinds. Those of SentencePiece put a space before a text; it is taken off again.
    """

    def __init__(self, tok: tokenizers.Tokenizer, eot: int):
        tok.no_padding()
        tok.no_truncation()
        tok.encode_special_tokens = True            # "<s>" in a text is three characters
        self.tok, self.eot, self.table = tok, eot, bytes_by_id(tok)
        self.vocab_size = max(self.table) + 1

    def encode(self, text: str) -> list[int]:
        return self.tok.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [made.ids for made in self.tok.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._token_bytes([self.eot, *ids])).decode("utf-8", "replace")

    def to_json(self) -> str:
        """tokenizer.json, and the end of text, which is not in it."""
        return json.dumps({"eot": self.eot, **json.loads(self.tok.to_str())})

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/tokenizer.json, and a tokenizer_config.json that names the end of text."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        eot = self.tok.id_to_token(self.eot)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": eot, "eos_token": eot}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        Path(folder, "tokenizer.json").write_text(self.tok.to_str(), encoding="utf-8")

    @cached_property
    def opens(self) -> bytes:
        """What `encode` puts before a text: nothing, or a space."""
        return b" " if b"".join(self.table[i] for i in self.encode("a")) == b" a" else b""

    def _token_bytes(self, ids: Iterable[int]) -> list[bytes]:
        """Of ids in the midst of a text, until an `eot` begins another; a table of vectors may have ids to spare."""
        found, opens = [], b""
        for i in ids:
            token = self.table.get(int(i), b"")
            found.append(token.removeprefix(opens))
            opens = self.opens if i == self.eot else opens if not token else b""
        return found


def bytes_by_id(tok: tokenizers.Tokenizer) -> dict[int, bytes]:
    """The bytes of each id; special tokens show as nothing."""
    decoder = json.dumps(json.loads(tok.to_str())["decoder"])
    known = {"ByteLevel": byte_level, "ByteFallback": sentence_piece, "Metaspace": sentence_piece}
    read = next((read for kind, read in known.items() if f'"{kind}"' in decoder), None)
    if read is None:
        raise ValueError(f"a tokenizer.json with the decoder {decoder}: one of {', '.join(known)} was wanted")
    added = tok.get_added_tokens_decoder().items()
    return {i: read(token) for token, i in tok.get_vocab().items()} | {
        i: b"" if token.special else token.content.encode() for i, token in added}


def byte_level(token: str) -> bytes:
    """The bytes of a token of GPT-2's alphabet, in which a byte that can't be seen is a character from 256 on."""
    return b"".join(BYTES[ALPHABET[c]] if c in ALPHABET else c.encode() for c in token)


SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = {chr(c): c for c in SEEN} | {chr(256 + n): c for n, c in enumerate(sorted({*range(256)} - {*SEEN}))}


def sentence_piece(token: str) -> bytes:
    """A space is the character U+2581, and a byte without a token of its own is written <0x0A>."""
    lone = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(lone[1]) if lone else token.replace("\u2581", " ").encode()


def load(folder: str | Path) -> Tokenizer:
    """A folder's tokenizer: its bpe.json or tokenizer.json, or GPT-2's if its config.json has GPT-2's 50,257 ids."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    most = config.get("vocab_size")
    if (folder / "bpe.json").is_file():
        tok = load_bpe(folder / "bpe.json")
    elif (folder / "tokenizer.json").is_file():
        tok = load_hub(folder, config)
    elif (config.get("model_type"), most) == ("gpt2", 50257):
        tok = gpt2()
    else:
        raise ValueError(f"{folder / 'bpe.json'} is missing, and so is tokenizer.json: without one ids are no text; "
                         "copy it from where the model was trained")
    if isinstance(most, int) and tok.vocab_size > most:
        raise ValueError(f"the tokenizer in {folder} has {tok.vocab_size} ids and the network there {most}: give it "
                         "its own")
    return tok


def load_hub(folder: Path, config: dict) -> HubTokenizer:
    path = folder / "tokenizer.json"
    try:
        tok = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the package has no class of its own for them
        raise ValueError(f"{path} is no tokenizer file ({error}): copy it again") from error
    return HubTokenizer(tok, end_of_text(tok, config, folder))


def end_of_text(tok: tokenizers.Tokenizer, config: dict, folder: Path) -> int:
    """The token that a text begins with, or if none is named, that it ends with: then all begin with it here."""
    said = read_json(folder / "tokenizer_config.json")
    for value in (config.get("bos_token_id"), said.get("bos_token"),
                  config.get("eos_token_id"), said.get("eos_token"), EOT):
        value = value[0] if isinstance(value, list) and value else value
        value = value.get("content") if isinstance(value, dict) else value
        found = tok.token_to_id(value) if isinstance(value, str) else value
        if isinstance(found, int) and tok.id_to_token(found) is not None:
            return found
    raise ValueError(f"{folder} names no token that texts begin or end with: write bos_token_id to its config.json")


def read_json(path: Path) -> dict:
    """A file of JSON; nothing if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found if isinstance(found, dict) else {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): copy it again") from error


def load_bpe(path: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote."""
    try:
        stored = json.loads(path.read_bytes())
        tokens = [base64.b64decode(token, validate=True) for token in stored["tokens"]]
        if not len(tokens) == len(set(tokens)) == stored["eot"] or not set(BYTES) <= set(tokens):
            raise ValueError("a token is missing or stands twice")
        return _build(stored["pattern"], tokens)
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
