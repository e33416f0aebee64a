"""TinyStories (Eldan and Li 2023, arXiv:2305.07759), or a text file of one's own, as two streams of token ids on disk.

    load        the front door: tokenised once, memory-mapped ever after
    stories     where each story of a stream begins
    locate      finds the text, or has `download` fetch it from the Hugging Face hub
    divide      which of its `Stories` are trained on, which are held out
    tokenise    makes the streams

A stream is `eot s1 eot s2 ... eot sn eot`: each story follows an end of text, which is what a sampler begins with.
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
VALID, TRAIN = "TinyStoriesV2-GPT4-valid.txt", "TinyStoriesV2-GPT4-train.txt"  # 22 MB, 2.2 GB
HUB = {"tinystories": (VALID, None), "tinystories-full": (TRAIN, VALID)}       # name: training file, held-out file

HOLD_OUT = 20             # one story in so many is held out where there is no held-out file
CHUNK = 1 << 22           # bytes read at a time, and characters tokenised at a time
BPE_CHARS = 64_000_000    # characters a BPE learns from: more would hardly change a vocabulary of some thousands
HUB_SECONDS = 3           # wait for an answer of each of the hub's addresses
LAYOUT = "1"              # part of a corpus folder's name: another way of making streams needs another folder


class NoNetwork(ValueError):
    """The hub can't be reached and the file is not in its cache."""


@dataclass
class Corpus:
    train: np.ndarray       # 1-D stream of ids, a read-only memory map: uint16, or uint32 for over 65,536 ids
    val: np.ndarray         # the same of the held-out stories, none of which is in train
    tokenizer: Tokenizer
    name: str

    @cached_property
    def starts(self) -> np.ndarray:
        """Index of each training story."""
        return stories(self.train, self.tokenizer.eot)


def load(data: str, val: str | None, vocab_size: int, folder: str | Path, tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus of `data`, tokenised under `folder` unless that was done before.

    `data` is a name in HUB or a UTF-8 text file with `<|endoftext|>` between stories, `val` a held-out file like it.
    A BPE of `vocab_size` ids is learned from the training stories, unless a `tokenizer` is given.
    """
    name, path, val_path = locate(data, val)
    key = fingerprint(path, val_path, tokenizer.to_json() if tokenizer else str(vocab_size))
    home = Path(folder, f"{name}-{key}")
    if not home.is_dir():
        tokenise(home, path, val_path, vocab_size, tokenizer)
    tok = load_tokenizer(home)
    train, held = (np.memmap(home / file, dtype=id_type(tok), mode="r") for file in ("train.bin", "val.bin"))
    return Corpus(train, held, tok, name)


def stories(stream: np.ndarray, eot: int) -> np.ndarray:
    """Index of each `eot` that a story follows, that is of all but the last (int64, ascending)."""
    step = 1 << 24  # comparing all of tinystories-full at once would take half a gigabyte
    found = [np.flatnonzero(stream[at:at + step] == eot) + at for at in range(0, len(stream), step)]
    return np.concatenate(found)[:-1]


# 1. find the text -----------------------------------------------------------------------------------------------------
def locate(data: str, val: str | None) -> tuple[str, Path, Path | None]:
    """The corpus' name, its text file and its held-out file, fetched where need be."""
    held = text_file(val) if val else None
    if data not in HUB:
        return Path(data).stem, text_file(data), held
    train_file, val_file = HUB[data]
    return data, download(train_file), held or (download(val_file) if val_file else None)


def text_file(given: str) -> Path:
    if not Path(given).is_file():
        what = "is a folder" if Path(given).is_dir() else "does not exist"
        raise ValueError(f"{given} {what}: wanted is a UTF-8 text file, or one of toy, {', '.join(HUB)}")
    return Path(given)


def download(file: str, **hub: str) -> Path:
    """Path of `file` in the hub's cache, fetched whole the first time; `hub` may name `endpoint` and `cache_dir`."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    where = {"repo_id": REPO, "filename": file, "repo_type": "dataset"}
    try:
        return Path(hf_hub_download(**where, **hub, local_files_only=True))
    except FileNotFoundError:
        pass  # not in the cache; what is there needs no network, not even to ask whether it is the newest
    try:
        # hf_hub_download itself would retry an unreachable hub for half a minute
        get_hf_file_metadata(hf_hub_url(**where, endpoint=hub.get("endpoint")), timeout=HUB_SECONDS)
        return Path(hf_hub_download(**where, **hub))
    except Exception as error:  # their classes differ from one version of the hub to the next
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NoNetwork(f"{file} of {REPO} is not on this machine and can't be fetched ({reason}): connect and try "
                        "again, or use --data=toy or --data=FILE.txt") from error


# 2. part it into stories ----------------------------------------------------------------------------------------------
@dataclass
class Stories:
    """The stories of a file but those in `without`, each stripped; read anew, a chunk at a time, whenever iterated."""
    path: Path
    without: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[str]:
        rest, found = "", False
        for chunk in chain(read(self.path), [EOT]):
            *whole, rest = (rest + chunk).split(EOT)
            for story in filter(None, map(str.strip, whole)):
                found = True
                if story not in self.without:
                    yield story
        if not found:
            raise ValueError(f"{self.path} holds no story: wanted is text, with {EOT} between its stories")


def read(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, a chunk at a time; line ends become \\n, a byte order mark is dropped."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    with open(path, "rb") as file:
        for chunk in chain(iter(lambda: file.read(CHUNK), b""), [b""]):
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:  # its object ends where the chunk does, but may begin before it
                at = file.tell() - len(error.object) + error.start
                raise ValueError(f"{path} is not UTF-8 at byte {at} (0x{error.object[error.start]:02x}): "
                                 "save it as UTF-8") from error
            yield text


def divide(path: Path, val_path: Path | None) -> tuple[Iterable[str], list[str]]:
    """Training stories, held-out stories. One that is held out is not trained on, however often it stands in `path`."""
    if val_path is None and len(list(islice(Stories(path), 2))) == 1:
        return cut(path, next(iter(Stories(path))))
    held = list(Stories(val_path) if val_path else islice(Stories(path), 0, None, HOLD_OUT))
    train = Stories(path, without=frozenset(held))
    if next(iter(train), None) is None:
        raise ValueError(f"{path} has no story left to train on, since all are held out: give it other stories")
    return train, held


def cut(path: Path, text: str) -> tuple[list[str], list[str]]:
    """A single text: all but its last twentieth, and that, parted at white space."""
    end = len(text) - len(text) // HOLD_OUT
    at = max(text.rfind(space, 0, end) for space in " \t\n")
    if at < 0:
        raise ValueError(f"{path} is too short to hold a part of it out: give it stories, {EOT} between them")
    return [text[:at].rstrip()], [text[at:].lstrip()]


# 3. tokenise ----------------------------------------------------------------------------------------------------------
def fingerprint(path: Path, val_path: Path | None, vocabulary: str) -> str:
    """12 hexadecimal digits that tell apart whatever makes other streams."""
    digest = hashlib.sha256(f"{LAYOUT} {vocabulary}".encode())
    for file in filter(None, (path, val_path)):
        digest.update(f" {file.stat().st_size} ".encode())  # where one file ends and the next begins
        with open(file, "rb") as opened:
            while chunk := opened.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()[:12]


def tokenise(home: Path, path: Path, val_path: Path | None, vocab_size: int, tok: Tokenizer | None) -> None:
    """Makes the folder `home` of train.bin, val.bin and bpe.json, whole or not at all."""
    train, held = divide(path, val_path)
    tok = tok or train_bpe(first(train, BPE_CHARS), vocab_size)
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=home.parent) as unfinished:
        folder = Path(unfinished, home.name)  # inside, since the temporary folder itself is closed to other users
        tok.save(folder)
        write_stream(folder / "train.bin", train, tok, path.stat().st_size)
        write_stream(folder / "val.bin", held, tok, sum(map(len, held)))
        try:
            folder.rename(home)
        except OSError:
            if not home.is_dir():  # another process was quicker, with the same bytes
                raise


def write_stream(path: Path, texts: Iterable[str], tok: Tokenizer, chars: int) -> None:
    """Writes the stream of `texts`; `chars`, about how many characters they have, is for the progress bar."""
    texts = iter(texts)
    with open(path, "wb") as file, tqdm(desc=path.stem, total=chars, unit="ch", unit_scale=True, disable=None) as bar:
        np.array([tok.eot], dtype=id_type(tok)).tofile(file)
        while batch := list(first(texts, CHUNK)):
            ids = [i for story in tok.encode_batch(batch) for i in (*story, tok.eot)]
            np.array(ids, dtype=id_type(tok)).tofile(file)
            bar.update(sum(map(len, batch)))


def first(texts: Iterable[str], chars: int) -> Iterator[str]:
    """The first texts, until they have `chars` characters."""
    for text in texts:
        yield text
        chars -= len(text)
        if chars <= 0:
            return


def id_type(tok: Tokenizer) -> type:
    return np.uint16 if tok.vocab_size <= 1 << 16 else np.uint32
