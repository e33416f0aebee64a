"""Text to token ids and back. Every text has ids and every id has bytes: the vocabularies are byte-level.

    train_bpe    a BPE learned from texts
    word_level   a given list of tokens, one id each
    gpt2         GPT-2's vocabulary, for checkpoints that were trained with it
    load         the tokenizer of a checkpoint folder: one that `save` wrote, or a `tokenizer.json`

A text begins with the id `bos` and ends with `eot`, which are never encoded from text. Tokenizers of this
project have one special token for both, `<|endoftext|>`. Those of others may have two, and more ids that end
a text (`eos`); section 3 says how they are found.
"""
import base64
import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from model import files

EOT = "<|endoftext|>"
BYTES = [bytes([value]) for value in range(256)]
SINGLE_BYTE = "<0x([0-9A-F]{2})>"
WORDS = r" ?\w+|[^\w\s]|\s+"  # a word with the space before it, a punctuation mark, white space
LONGEST_BLANK = 1 << 18         # characters of white space in a row; tiktoken fails at about a million


# 1. tokenizers ------------------------------------------------------------------------------------

class Tokenizer:
    """A `tiktoken.Encoding` with the ids 0 .. vocab_size - 1. The last one is `eot`, the end of a text.

    bos     the id with which a text begins; here `eot`
    eos     all ids that end a text; the first one is `eot`
    """

    text_prefix = b""           # what `encode` adds before a text

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.eot = encoding.eot_token
        self.bos = self.eot
        self.eos = (self.eot,)
        self.vocab_size = encoding.max_token_value + 1

    @property
    def ends(self) -> int | tuple[int, ...]:
        """The ids that end a generated text, for opdlm.rollout: one id, or several, of which `eot` is first.

        A `bos` ends a text too, since another text begins there.
        """
        ids = tuple(dict.fromkeys([*self.eos, self.bos]))
        return ids[0] if len(ids) == 1 else ids

    @property
    def between(self) -> list[int]:
        """The ids between two texts of a stream: `eot` and `bos`, or the one id that is both."""
        return list(dict.fromkeys([self.eot, self.bos]))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never `eot`: a literal `<|endoftext|>` in it is ordinary text."""
        ids = []
        for piece in split_blanks(text):
            ids += self.encoding.encode_ordinary(piece)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        if any(len(text) > LONGEST_BLANK for text in texts):
            return [self.encode(text) for text in texts]
        return self.encoding.encode_ordinary_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. `eot` has no text; bytes that are not UTF-8 become the replacement character."""
        return b"".join(self._token_bytes(ids)).decode("utf-8", "replace")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """One string per id; joined they are `decode(ids)`. A character of several tokens is in the last."""
        parts = self._token_bytes(ids)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        strings = []
        for n, part in enumerate(parts, start=1):
            strings.append(decoder.decode(part, final=n == len(parts)))
        return strings

    def to_json(self) -> str:
        """Everything that defines this tokenizer: the pattern that splits a text, each token in base64."""
        tokens = []
        for i in range(self.eot):
            token = self.encoding.decode_single_token_bytes(i)
            tokens.append(base64.b64encode(token).decode("ascii"))
        content = {"pattern": self.encoding._pat_str, "eot": self.eot, "tokens": tokens}
        return json.dumps(content, indent=0)

    def save(self, folder: str | Path) -> None:
        """Write `folder`/bpe.json, completely or not at all."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        unfinished = Path(folder, f"bpe.json.{os.getpid()}")
        try:
            unfinished.write_bytes(self.to_json().encode("utf-8"))
            os.replace(unfinished, Path(folder, "bpe.json"))
        finally:
            unfinished.unlink(missing_ok=True)

    def save_for_transformers(self, folder: str | Path) -> None:
        """Write `folder`/tokenizer.json and tokenizer_config.json: the same ids for the same text.

        Only a literal `<|endoftext|>` differs: `transformers` takes it for the special token.
        """
        HubTokenizer(to_hub(self.encoding), self.eot).save(folder)

    def _token_bytes(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of each id; none for `eot` and for ids without a token, which a network may have."""
        parts = []
        for i in ids:
            is_token = 0 <= i < self.eot
            parts.append(self.encoding.decode_single_token_bytes(i) if is_token else b"")
        return parts


class HubTokenizer(Tokenizer):
    """The tokenizer of a `tokenizer.json`, for raw text: no template, and no token is added.

    Byte-level BPE and the kinds of SentencePiece are supported. The latter encode a text with a space before
    it, which decoding removes. `eot`, `bos` (default: `eot`) and the other ids that end a text are given,
    since `tokenizer.json` does not say which tokens they are.
    """

    def __init__(self, tok: tokenizers.Tokenizer, eot: int, bos: int | None = None,
                 other_ends: Iterable[int] = ()):
        tok.no_padding()
        tok.no_truncation()
        tok.encode_special_tokens = True            # "<s>" in a text is three characters
        self.tok = tok
        self.eot = eot
        self.bos = eot if bos is None else bos
        self.eos = tuple(dict.fromkeys([eot, *other_ends]))
        self.special = special_ids(tok) | {self.bos, *self.eos}
        self.table = bytes_by_id(tok)
        for i in (self.bos, *self.eos):
            self.table[i] = b""
        self.vocab_size = max(self.table) + 1

    def encode(self, text: str) -> list[int]:
        return spell_out(self, self.tok.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self.tok.encode_batch(texts, add_special_tokens=False)
        return [spell_out(self, encoding.ids) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        parts = self._token_bytes([self.bos, *ids])
        return b"".join(parts).decode("utf-8", "replace")

    def to_json(self) -> str:
        """The content of tokenizer.json, and the special ids."""
        ids = {"eot": self.eot}
        if self.ends != self.eot:
            ids["bos"] = self.bos
            ids["eos"] = self.eos
        return json.dumps({**ids, **json.loads(self.tok.to_str())})

    def save(self, folder: str | Path) -> None:
        """Write `folder`/tokenizer.json, and the files that name its special tokens.

        They are tokenizer_config.json, and generation_config.json if several tokens end a text.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.tok.id_to_token(self.bos),
            "eos_token": self.tok.id_to_token(self.eot),
        }
        if len(self.eos) > 1:
            generation = {"bos_token_id": self.bos, "eos_token_id": list(self.eos)}
            generation_json = json.dumps(generation, indent=1)
            Path(folder, "generation_config.json").write_text(generation_json, encoding="utf-8")
        config_json = json.dumps(config, indent=1)
        Path(folder, "tokenizer_config.json").write_text(config_json, encoding="utf-8")
        Path(folder, "tokenizer.json").write_text(self.tok.to_str(), encoding="utf-8")

    @cached_property
    def text_prefix(self) -> bytes:
        """What `encode` adds before a text: a space, or nothing."""
        encoded = b"".join(self.table[i] for i in self.encode("a"))
        return b" " if encoded == b" a" else b""

    def _token_bytes(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of each id; none for `bos`, `eos` and ids without a token, which a network may have.

        `text_prefix` is removed from the first token with bytes after each `bos` or `eos`. The first of `ids`
        is taken for the middle of a text.
        """
        boundaries = {self.bos, *self.eos}
        parts = []
        prefix = b""  # what to remove from the next token with bytes
        for i in ids:
            is_boundary = int(i) in boundaries
            token = b"" if is_boundary else self.table.get(int(i), b"")
            parts.append(token.removeprefix(prefix))
            if is_boundary:
                prefix = self.text_prefix
            elif token:
                prefix = b""
        return parts


def split_blanks(text: str) -> list[str]:
    """The text in pieces, cut within runs of more than LONGEST_BLANK white space characters."""
    if len(text) <= LONGEST_BLANK:
        return [text]
    pieces = []
    begin = 0
    for run in re.finditer(rf"\s{{{LONGEST_BLANK},}}", text):
        for cut in range(run.start() + LONGEST_BLANK, run.end(), LONGEST_BLANK):
            pieces.append(text[begin:cut])
            begin = cut
    pieces.append(text[begin:])
    return pieces


def encode_parts(tok: Tokenizer, parts: list[str], is_first: list[bool]) -> list[list[int]]:
    """The ids of each part of a text, in parallel. `is_first` says of each whether a text begins with it.

    A tokenizer may add a space before a text. None is added before a part in the middle of a text.
    """
    if not tok.text_prefix:
        return tok.encode_batch(parts)
    before = "\n"                               # the space is added before this, which is then removed
    strings = [part if first else before + part for part, first in zip(parts, is_first)]
    num_before = len(tok.encode(before))
    encoded = tok.encode_batch(strings)
    return [ids if first else ids[num_before:] for ids, first in zip(encoded, is_first)]


def special_ids(tok: tokenizers.Tokenizer) -> set[int]:
    """The ids of special tokens, but not of the one that stands for unknown characters."""
    model = json.loads(tok.to_str())["model"]
    unknown = model.get("unk_id")
    if model.get("unk_token") is not None:
        unknown = tok.token_to_id(model["unk_token"])
    added = tok.get_added_tokens_decoder().items()
    return {i for i, token in added if token.special and i != unknown}


def spell_out(tok: HubTokenizer, ids: list[int]) -> list[int]:
    """The ids of a text without special tokens: "</s>" in a text becomes four characters.

    The package already does this with special tokens that are not also in the vocabulary of the model.
    """
    if tok.special.isdisjoint(ids):
        return ids
    before = "\n"                               # so that no space is added before the character
    num_before = len(tok.tok.encode(before, add_special_tokens=False).ids)
    spelled = []
    for i in ids:
        if i not in tok.special:
            spelled.append(i)
            continue
        for character in tok.tok.id_to_token(i):
            encoded = tok.tok.encode(before + character, add_special_tokens=False).ids[num_before:]
            spelled += [token for token in encoded if token not in tok.special]
    return spelled


# 2. a token of tokenizer.json as bytes ------------------------------------------------------------

def bytes_by_id(tok: tokenizers.Tokenizer) -> dict[int, bytes]:
    """The bytes of each id; special tokens have none. ValueError for an unsupported kind of tokenizer."""
    decoder = json.dumps(json.loads(tok.to_str())["decoder"])
    kinds = {"ByteLevel": byte_level, "ByteFallback": sentence_piece, "Metaspace": sentence_piece}
    found = [kind for kind in kinds if f'"{kind}"' in decoder]
    if not found:
        raise ValueError(f"tokenizer.json has the decoder {decoder}: expected one of {', '.join(kinds)}")
    to_bytes = kinds[found[0]]
    table = {}
    for token, i in tok.get_vocab().items():
        table[i] = to_bytes(token)
    for i, added in tok.get_added_tokens_decoder().items():
        table[i] = b"" if added.special else added.content.encode()
    return table


def byte_level(token: str) -> bytes:
    """The bytes of a token in GPT-2's alphabet, where each byte is a character (see ALPHABET)."""
    parts = []
    for character in token:
        known = character in ALPHABET
        parts.append(BYTES[ALPHABET[character]] if known else character.encode())
    return b"".join(parts)


# GPT-2's alphabet: visible bytes are the character of the same number, the others are characters from 256 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
INVISIBLE = [value for value in range(256) if value not in VISIBLE]
ALPHABET = {chr(value): value for value in VISIBLE}
for _n, _value in enumerate(INVISIBLE):
    ALPHABET[chr(256 + _n)] = _value
CHARACTERS = {value: character for character, value in ALPHABET.items()}
WORD_CHARACTERS = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200c\u200d"   # what \w is in tiktoken's patterns


def sentence_piece(token: str) -> bytes:
    """The bytes of a SentencePiece token: a space is the character U+2581; <0x0A> is a single byte."""
    single_byte = re.fullmatch(SINGLE_BYTE, token)
    if single_byte:
        return bytes.fromhex(single_byte[1])
    return token.replace("\u2581", " ").encode()


def to_hub(encoding: tiktoken.Encoding) -> tokenizers.Tokenizer:
    """The same tokenizer for the package `tokenizers`.

    `tiktoken` looks up a piece of the pattern, and otherwise merges the two neighbours whose union has the
    lowest id. So every pair of tokens whose union is a token is a merge, in the order of the unions' ids.
    """
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    known = set(tokens)
    merges = []
    for token in tokens:
        for k in range(1, len(token)):
            if token[:k] in known and token[k:] in known:
                merges.append((to_alphabet(token[:k]), to_alphabet(token[k:])))
    vocab = {to_alphabet(token): i for i, token in enumerate(tokens)}
    tok = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    pattern = encoding._pat_str.replace(r"[^\w\s]", rf"[^{WORD_CHARACTERS}\s]")
    pattern = pattern.replace(r"\w", f"[{WORD_CHARACTERS}]")
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    byte_level_split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level_split])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([EOT])
    return tok


def to_alphabet(token: bytes) -> str:
    """The bytes of a token in GPT-2's alphabet."""
    return "".join(CHARACTERS[value] for value in token)


# 3. the tokenizer of a folder ---------------------------------------------------------------------

def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder: its bpe.json, else its tokenizer.json, else GPT-2's.

    GPT-2's is taken if config.json has GPT-2's type and 50,257 ids. ValueError if there is none, or if it has
    more ids than the network in the folder.
    """
    folder = Path(folder)
    config = read_settings(folder / "config.json")
    network_ids = config.get("vocab_size")
    if (folder / "bpe.json").is_file():
        tok = load_bpe(folder / "bpe.json")
    elif (folder / "tokenizer.json").is_file():
        tok = load_hub(folder, config)
    elif config.get("model_type") == "gpt2" and network_ids == 50257:
        tok = gpt2()
    else:
        raise ValueError(f"{folder / 'bpe.json'} is missing, and so is tokenizer.json: ids cannot be turned "
                         "into text; copy it from where the model was trained")
    if isinstance(network_ids, int) and tok.vocab_size > network_ids:
        raise ValueError(f"the tokenizer in {folder} has {tok.vocab_size} ids and the network there "
                         f"{network_ids}: give it its own")
    return tok


def load_bpe(path: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote."""
    with named_in_full(path):
        files.refuse_lfs_pointer(path)
    try:
        stored = json.loads(path.read_bytes())
        tokens = [base64.b64decode(token, validate=True) for token in stored["tokens"]]
        is_complete = len(tokens) == stored["eot"] and set(BYTES) <= set(tokens)
        if not is_complete or len(set(tokens)) < len(tokens):
            raise ValueError("a token is missing or occurs twice")
        return build(stored["pattern"], tokens)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a tokenizer file ({type(error).__name__}: {error}): copy it again"
                         ) from error


def load_hub(folder: Path, config: dict) -> HubTokenizer:
    """The tokenizer of the folder's tokenizer.json; `config` is the content of its config.json."""
    path = folder / "tokenizer.json"
    with named_in_full(path):
        files.refuse_lfs_pointer(path)
    try:
        tok = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # the package raises plain Exceptions
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is not a tokenizer file ({reason}): copy it again") from error
    bos, eos = boundary_ids(tok, config, folder)
    return HubTokenizer(tok, eos[0], bos, eos[1:])


def boundary_ids(tok: tokenizers.Tokenizer, config: dict, folder: Path) -> tuple[int, list[int]]:
    """The id that begins a text, and all ids that end one, from the files of a folder.

    For each of the two, in this order: the ids in config.json and in generation_config.json, the words in
    tokenizer_config.json and special_tokens_map.json, and for the end `<|endoftext|>`. Ids 1 and 2, which
    transformers writes to the config.json of a Llama if nobody says otherwise, come after the words. Ids that
    the vocabulary does not have do not count, nor do ids of ordinary tokens, which occur within texts.

    The first one found begins a text; without one, an end does. All that are found end a text; the one that
    also begins a text is the first of them, so that it is the one between the texts of a stream.
    """
    words = read_settings(folder / "special_tokens_map.json")
    words |= read_settings(folder / "tokenizer_config.json")
    generation = read_settings(folder / "generation_config.json")
    found = {}
    for name, default in (("bos", 1), ("eos", 2)):
        key = f"{name}_token_id"
        configured = checked_ids(config, key, folder / "config.json")
        ids = configured + checked_ids(generation, key, folder / "generation_config.json")
        ids = [i for i in ids if not is_ordinary(tok, i)]
        word_ids = checked_word(tok, words, f"{name}_token", folder)
        is_default = configured == [default] and config.get("model_type") == "llama"
        if is_default and word_ids:
            ids = word_ids + [i for i in ids if i != default]
        found[name] = list(dict.fromkeys(ids + word_ids))
    if not (found["eos"] or found["bos"]) and tok.token_to_id(EOT) is not None:
        found["eos"] = [tok.token_to_id(EOT)]
    if not (found["eos"] or found["bos"]):
        raise ValueError(f"{folder} does not say with which token texts begin or end: write bos_token_id and "
                         "eos_token_id, the ids of special tokens, to its config.json")
    eos = found["eos"] or found["bos"][:1]
    bos = (found["bos"] or eos)[0]
    if bos in eos:
        eos = list(dict.fromkeys([bos, *eos]))
    return bos, eos


def checked_ids(config: dict, key: str, path: Path) -> list[int]:
    """The ids that a settings file gives: one, a list or none. ValueError if they are no ids."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [value]
    if value is None:
        ids = []
    for i in ids:
        if type(i) is not int or i < 0:
            raise ValueError(f"{path}: {key} should be the id of a token or a list of ids, got "
                             f"{repr(value)[:60]}")
    return ids


def checked_word(tok: tokenizers.Tokenizer, words: dict, key: str, folder: Path) -> list[int]:
    """The id of the special token that a tokenizer's settings name, as a list; empty if they name none."""
    word = words.get(key)
    if isinstance(word, dict):
        word = word.get("content")
    if word is None:
        return []
    if not isinstance(word, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: {key} should be the text of a token, got "
                         f"{repr(word)[:60]}")
    i = tok.token_to_id(word)
    return [] if i is None else [i]


def is_ordinary(tok: tokenizers.Tokenizer, i: int) -> bool:
    """Whether an id has no token, or one that a text may contain."""
    token = tok.id_to_token(i) if i < 1 << 32 else None
    if token is None:
        return True
    if i in tok.get_added_tokens_decoder():
        return False
    is_marker = re.fullmatch(r"<[^<>]+>|\[[A-Z]+\]", token) and not re.fullmatch(SINGLE_BYTE, token)
    return not is_marker or i in tok.encode(token, add_special_tokens=False).ids


def read_settings(path: Path) -> dict:
    """The object in a JSON file; an empty one if the file does not exist. ValueError for other content."""
    if not path.is_file():
        return {}
    with named_in_full(path):
        content = files.read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}: copy it again")
    return content


@contextmanager
def named_in_full(path: Path) -> Iterator[None]:
    """The ValueErrors of model/files.py, which begin with a file's name, begin with its path instead."""
    try:
        yield
    except ValueError as error:
        reason = str(error).removeprefix(path.name)
        raise ValueError(f"{path}{reason}") from None


# 4. new tokenizers --------------------------------------------------------------------------------

def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A BPE of `vocab_size` ids, `eot` included; of fewer if the texts have no more pairs to merge."""
    import rustbpe  # here, since only training needs it

    if vocab_size < 257:
        raise ValueError(f"a vocabulary of {vocab_size} ids is too small: "
                         "256 bytes and the end of text need 257")
    trainer = rustbpe.Tokenizer()
    pieces = (piece for text in texts for piece in split_blanks(text))
    trainer.train_from_iterator(pieces, vocab_size=vocab_size - 1, buffer_size=512)
    by_rank = sorted(trainer.get_mergeable_ranks(), key=lambda token_and_rank: token_and_rank[1])
    tokens = [bytes(token) for token, _ in by_rank]
    # if two merges give the same bytes, the first one counts: tiktoken has one rank for them
    tokens = list(dict.fromkeys(tokens))
    return build(trainer.get_pattern(), tokens)


def word_level(tokens: list[str]) -> Tokenizer:
    """The 256 bytes and `tokens` ("One", " ball", "."), one id each. Other words are encoded as bytes.

    ValueError if a token is not a word, alone or after one space, a punctuation mark or white space.
    """
    # no merges are needed: tiktoken looks up a whole piece of the pattern before it merges
    given = [token.encode("utf-8") for token in tokens]
    tok = build(WORDS, list(dict.fromkeys([*BYTES, *given])))
    for token in tokens:
        if len(tok.encode(token)) != 1:
            raise ValueError(f"{token!r} cannot be one token: expected a word, alone or after one space, a "
                             "punctuation mark or white space; split it")
    return tok


def gpt2() -> Tokenizer:
    """GPT-2's 50,257 ids, which tiktoken downloads once."""
    try:
        return Tokenizer(tiktoken.get_encoding("gpt2"))
    except OSError as error:
        raise ValueError("GPT-2's vocabulary is not on this machine and cannot be downloaded "
                         f"({type(error).__name__}): connect once, or point TIKTOKEN_CACHE_DIR to a folder "
                         "that has it") from error


def build(pattern: str, tokens: list[bytes]) -> Tokenizer:
    """A tokenizer that splits texts by `pattern`. The ids are the indices of `tokens`, then `eot`."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {EOT: len(tokens)}
    encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(encoding)
