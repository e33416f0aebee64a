"""TinyStories (Eldan and Li 2023, arXiv 2305.07759), or any text file, as two streams of token ids on disk.

    load        the entry point: tokenizes a text once, later only maps the files into memory
    stories     the index of each story in a stream

    1. find the text           `locate`, and `download` from the Hugging Face hub
    2. split it into stories   `divide` into training stories and held-out stories
    3. tokenize                `tokenize` writes the streams

A stream is `eot s1 eot s2 ... eot sn eot`: every story follows an end-of-text, with which a sampler begins.
If a tokenizer begins texts with another token than it ends them: `bos s1 eot bos s2 eot ... sn eot bos`.
"""
import codecs
import hashlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.tokenizer import EOT, Tokenizer, train_bpe
from data.tokenizer import load as load_tokenizer

REPO = "roneneldan/TinyStories"
VALID = "TinyStoriesV2-GPT4-valid.txt"      # 22 MB
TRAIN = "TinyStoriesV2-GPT4-train.txt"      # 2.2 GB
HUB = {                                     # name: training file, held-out file
    "tinystories": (VALID, None),
    "tinystories-full": (TRAIN, VALID),
}

HOLD_OUT = 20               # every 20th story is held out if there is no held-out file
CHUNK = 1 << 22             # bytes read at a time, and characters tokenized at a time
BPE_CHARS = 64_000_000      # characters that a BPE is learned from; more hardly change a small vocabulary
HUB_SECONDS = 3             # timeout for each address of the hub
LAYOUT = "1"                # version of the stream format, part of the name of a corpus folder


class NoNetwork(ValueError):
    """The hub cannot be reached and the file is not in its cache."""


@dataclass
class Corpus:
    train: np.ndarray       # 1-D stream of ids: uint16, or uint32 for more than 65,536 ids
    val: np.ndarray         # the same for the held-out stories, none of which is in train
    tokenizer: Tokenizer
    name: str

    @cached_property
    def starts(self) -> np.ndarray:
        """The index of each training story."""
        return stories(self.train, self.tokenizer.bos)


def load(data: str, val: str | None, vocab_size: int, folder: str | Path,
         tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus of `data`, as read-only memory maps; tokenized in `folder` unless that was done before.

    `data` is a name in HUB or a UTF-8 text file with `<|endoftext|>` between stories; `val` is a held-out
    file of the same format. A BPE of `vocab_size` ids is learned from the training stories, unless a
    `tokenizer` is given. ValueError if a file cannot be used; NoNetwork if it cannot be downloaded.
    """
    name, path, val_path = locate(data, val)
    vocabulary = tokenizer.to_json() if tokenizer else str(vocab_size)
    key = fingerprint(path, val_path, vocabulary)
    corpus_folder = Path(folder, f"{name}-{key}")
    if not corpus_folder.is_dir():
        tokenize(corpus_folder, path, val_path, vocab_size, tokenizer)
    tok = load_tokenizer(corpus_folder)
    train = np.memmap(corpus_folder / "train.bin", dtype=id_type(tok), mode="r")
    held_out = np.memmap(corpus_folder / "val.bin", dtype=id_type(tok), mode="r")
    return Corpus(train, held_out, tok, name)


def stories(stream: np.ndarray, bos: int) -> np.ndarray:
    """(stories,) int64, ascending: the index of each `bos` that a story follows, so of all but the last."""
    step = 1 << 24  # in parts, since comparing all of tinystories-full at once takes half a gigabyte
    found = []
    for begin in range(0, len(stream), step):
        part = stream[begin:begin + step]
        found.append(np.flatnonzero(part == bos) + begin)
    return np.concatenate(found)[:-1]


# 1. find the text ---------------------------------------------------------------------------------

def locate(data: str, val: str | None) -> tuple[str, Path, Path | None]:
    """The corpus' name, its text file and its held-out file, downloaded if necessary."""
    given_val = text_file(val) if val else None
    if data not in HUB:
        return Path(data).stem, text_file(data), given_val
    train_file, val_file = HUB[data]
    train_path = download(train_file)
    if given_val is None and val_file:
        return data, train_path, download(val_file)
    return data, train_path, given_val


def text_file(given: str) -> Path:
    path = Path(given)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{given} {problem}: expected a UTF-8 text file, or one of toy, {', '.join(HUB)}")
    return path


def download(file: str, **hub: str) -> Path:
    """The path of `file` in the hub's cache, downloaded if missing. `hub`: `endpoint` and `cache_dir`."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    where = {"repo_id": REPO, "filename": file, "repo_type": "dataset"}
    try:
        return Path(hf_hub_download(**where, **hub, local_files_only=True))
    except FileNotFoundError:
        pass  # not in the cache; a file in the cache is used without asking the hub for a newer one
    try:
        # hf_hub_download itself would retry for half a minute if the hub cannot be reached
        url = hf_hub_url(**where, endpoint=hub.get("endpoint"))
        get_hf_file_metadata(url, timeout=HUB_SECONDS)
        return Path(hf_hub_download(**where, **hub))
    except Exception as error:  # the classes differ between versions of huggingface_hub
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NoNetwork(f"{file} of {REPO} is not on this machine and cannot be downloaded ({reason}): "
                        "connect and try again, or use --data=toy or --data=FILE.txt") from error


# 2. split it into stories -------------------------------------------------------------------------

@dataclass
class Stories:
    """The stories of a file except those in `without`, stripped of white space around them.

    Every iteration reads the file again, a chunk at a time.
    """
    path: Path
    without: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[str]:
        is_empty = True
        rest = ""
        for chunk in chain(read(self.path), [EOT]):
            *complete, rest = (rest + chunk).split(EOT)
            for story in complete:
                story = story.strip()
                if not story:
                    continue
                is_empty = False
                if story not in self.without:
                    yield story
        if is_empty:
            raise ValueError(f"{self.path} has no stories: expected text, with {EOT} between its stories")


def read(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, a chunk at a time. Line ends become \\n; a byte order mark is removed."""
    utf_8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf_8, translate=True)
    with open(path, "rb") as file:
        is_end = False
        while not is_end:
            chunk = file.read(CHUNK)
            is_end = not chunk
            try:
                text = decoder.decode(chunk, final=is_end)
            except UnicodeDecodeError as error:
                # error.object may begin before this chunk: it has the bytes that the decoder kept back
                position = file.tell() - len(error.object) + error.start
                byte = error.object[error.start]
                raise ValueError(f"{path} is not UTF-8 at byte {position} (0x{byte:02x}): save it as UTF-8"
                                 ) from error
            yield text


def divide(path: Path, val_path: Path | None) -> tuple[Iterable[str], list[str]]:
    """Training stories and held-out stories. A held-out story is removed wherever it occurs in `path`."""
    if val_path is None:
        first_two = list(islice(Stories(path), 2))
        if len(first_two) == 1:
            return split_text(path, first_two[0])
        held_out = list(islice(Stories(path), 0, None, HOLD_OUT))
    else:
        held_out = list(Stories(val_path))
    train = Stories(path, without=frozenset(held_out))
    if next(iter(train), None) is None:
        raise ValueError(f"{path} has no story left to train on, since all are held out: "
                         "give it other stories")
    return train, held_out


def split_text(path: Path, text: str) -> tuple[list[str], list[str]]:
    """A single text, split at white space: all but its last twentieth, and the last twentieth."""
    end = len(text) - len(text) // HOLD_OUT
    space = max(text.rfind(character, 0, end) for character in " \t\n")
    if space < 0:
        raise ValueError(f"{path} is too short to hold a part of it out: give it stories, {EOT} between them")
    return [text[:space].rstrip()], [text[space:].lstrip()]


# 3. tokenize --------------------------------------------------------------------------------------

def fingerprint(path: Path, val_path: Path | None, vocabulary: str) -> str:
    """12 hexadecimal digits, a hash of everything that the streams depend on."""
    digest = hashlib.sha256(f"{LAYOUT} {vocabulary}".encode())
    for file in (path, val_path):
        if file is None:
            continue
        digest.update(f" {file.stat().st_size} ".encode())  # tells where one file ends and the next begins
        with open(file, "rb") as opened:
            while chunk := opened.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()[:12]


def tokenize(corpus_folder: Path, path: Path, val_path: Path | None, vocab_size: int,
             tok: Tokenizer | None) -> None:
    """Write train.bin, val.bin and the tokenizer to `corpus_folder`, which appears only when complete."""
    train, held_out = divide(path, val_path)
    if tok is None:
        tok = train_bpe(take_chars(train, BPE_CHARS), vocab_size)
    parent = corpus_folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=parent) as unfinished:
        # a subfolder, since other users may not read the temporary folder itself
        folder = Path(unfinished, corpus_folder.name)
        tok.save(folder)
        write_stream(folder / "train.bin", train, tok, path.stat().st_size)
        write_stream(folder / "val.bin", held_out, tok, sum(map(len, held_out)))
        try:
            folder.rename(corpus_folder)
        except OSError:
            if not corpus_folder.is_dir():  # otherwise another process has written the same bytes
                raise


def write_stream(path: Path, texts: Iterable[str], tok: Tokenizer, chars: int) -> None:
    """Write the stream of `texts`. `chars`, about how many characters they have, is for the progress bar."""
    texts = iter(texts)
    dtype = id_type(tok)
    progress = tqdm(desc=path.stem, total=chars, unit="ch", unit_scale=True, disable=None)
    with open(path, "wb") as file, progress:
        np.array([tok.bos], dtype=dtype).tofile(file)
        while batch := list(take_chars(texts, CHUNK)):
            ids = []
            for story in tok.encode_batch(batch):
                ids += story
                ids += tok.between
            np.array(ids, dtype=dtype).tofile(file)
            progress.update(sum(map(len, batch)))


def take_chars(texts: Iterable[str], chars: int) -> Iterator[str]:
    """The first texts, until they have `chars` characters together."""
    for text in texts:
        yield text
        chars -= len(text)
        if chars <= 0:
            return


def id_type(tok: Tokenizer) -> type:
    return np.uint16 if tok.vocab_size <= 1 << 16 else np.uint32
