"""TinyStories (Eldan and Li 2023, arXiv 2305.07759), or any text files, as two streams of token ids on disk.

    load        the entry point: tokenizes a text once, later only maps the files into memory
    stories     the index of each story in a stream

    1. find the text           `locate`, and `download` from the Hugging Face hub
    2. read it                 `Stories`, in parts, so that a text may be larger than the memory
    3. hold a part of it out   `divide` into training stories and held-out stories
    4. tokenize                `tokenize` writes the streams

A stream is `eot s1 eot s2 ... eot sn eot`: every story follows an end-of-text, with which a sampler begins.
If a tokenizer begins texts with another token than it ends them: `bos s1 eot bos s2 eot ... sn eot bos`.
"""
import codecs
import hashlib
import io
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.tokenizer import EOT, Tokenizer, encode_parts, train_bpe
from data.tokenizer import load as load_tokenizer
from data.windows import Windows

REPO = "roneneldan/TinyStories"
VALID = "TinyStoriesV2-GPT4-valid.txt"      # 22 MB
TRAIN = "TinyStoriesV2-GPT4-train.txt"      # 2.2 GB
HUB = {                                     # name: training file, held-out file
    "tinystories": (VALID, None),
    "tinystories-full": (TRAIN, VALID),
}
STORY_WORLD = "toy"         # the name of the story world (data/corpus.py), of no corpus of files

HOLD_OUT = 20               # every 20th story is held out if there is no held-out file
HELD_SHARE = (1 / 40, 1 / 10)   # if they have less or more of the characters, ends of long texts are held out
LONG_TEXT = 6000            # visible characters of a text whose end can be held out
HELD_CHARS = 1000           # characters of such an end, at least: about a window of 256 tokens
CHUNK = 1 << 18             # bytes read at a time, and characters tokenized at a time
PART = 1 << 16              # characters of a part, about; longer texts are read and tokenized in parts
BPE_CHARS = 64_000_000      # characters that a BPE is learned from; more hardly change a small vocabulary
HUB_SECONDS = 3             # timeout for each address of the hub
LAYOUT = "2"                # version of the stream format, part of the name of a corpus folder


class NoNetwork(ValueError):
    """The hub cannot be reached and the file is not in its cache."""


@dataclass
class Corpus:
    train: np.ndarray       # 1-D stream of ids: uint16, or uint32 for more than 65,536 ids
    val: np.ndarray         # the same for the held-out stories, none of which is in train
    tokenizer: Tokenizer
    name: str               # "toy" is the story world, and no other corpus has this name
    samplers: dict[int, Windows] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def starts(self) -> np.ndarray:
        """The index of each training story."""
        return stories(self.train, self.tokenizer.bos)

    def windows(self, length: int) -> Windows:
        """The windows of `length` training tokens: corpus.windows(length)(u) is a batch of them."""
        if length not in self.samplers:
            self.samplers[length] = Windows(self.train, self.starts, length, self.tokenizer.eot)
        return self.samplers[length]


def load(data: str, val: str | None, vocab_size: int, folder: str | Path,
         tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus of `data`, as read-only memory maps; tokenized in `folder` unless that was done before.

    `data` is a name in HUB, a UTF-8 text file with `<|endoftext|>` between stories, or a folder of such
    files; `val` is a held-out file or folder of the same format. A BPE of `vocab_size` ids is learned from
    the training stories, unless a `tokenizer` is given. ValueError if a file cannot be used; NoNetwork if
    it cannot be downloaded.
    """
    name, files, val_files = locate(data, val)
    vocabulary = tokenizer.to_json() if tokenizer else str(vocab_size)
    key = fingerprint(files, val_files, vocabulary)
    corpus_folder = Path(folder, f"{name[:100]}-{key}")
    if not corpus_folder.is_dir():
        tokenize(corpus_folder, files, val_files, vocab_size, tokenizer)
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

def locate(data: str, val: str | None) -> tuple[str, list[Path], list[Path] | None]:
    """The corpus' name, its text files and its held-out files, downloaded if necessary."""
    given_val = text_files(val) if val else None
    if data not in HUB:
        files = text_files(data)
        if given_val and len(files) > 1:
            held = {path.resolve() for path in given_val}
            files = [path for path in files if path.resolve() not in held]   # a folder may have both
        return corpus_name(data), files, given_val
    train_file, val_file = HUB[data]
    train_path = download(train_file)
    if given_val is None and val_file:
        return data, [train_path], [download(val_file)]
    return data, [train_path], given_val


def corpus_name(data: str) -> str:
    """The name of the corpus of a file or folder, which is not the name of a corpus of another kind."""
    path = Path(data).expanduser()
    name = path.stem if path.is_file() else path.resolve().name
    return f"text-{name}" if name in (STORY_WORLD, *HUB) else name


def text_files(given: str) -> list[Path]:
    """The text file of this name, or the *.txt files of this folder, sorted by name. ~ is the home folder."""
    path = Path(given).expanduser()
    expected = f"expected a UTF-8 text file, a folder of *.txt files, or one of toy, {', '.join(HUB)}"
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if is_txt(file))
        if not files:
            raise ValueError(f"{given} is a folder without *.txt files: {expected}")
    elif path.is_file():
        files = [path]
    elif path.exists():
        raise ValueError(f"{given} is a pipe or a device, which can be read only once, and a text is read "
                         "several times: write it to a file first")
    else:
        raise ValueError(f"{given} does not exist: {expected}")
    for file in files:
        refuse_other_formats(file)
    return files


def is_txt(path: Path) -> bool:
    return path.suffix.lower() == ".txt" and not path.name.startswith(".") and path.is_file()


FORMATS = {                 # the first bytes of files that are given by mistake
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"%PDF-": "PDF",
    b"SQLite format 3": "SQLite",
    b"\x93NUMPY": "NumPy",
}
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


def refuse_other_formats(path: Path) -> None:
    """ValueError if the file is a Git LFS pointer, or is not text by its first bytes."""
    with open(path, "rb") as file:
        first = file.read(64)
    if first.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the text itself: run `git lfs pull` in its "
                         "repository, or download the file")
    is_json = path.suffix.lower() in JSON_SUFFIXES and first.lstrip()[:1] in (b"{", b"[")
    kinds = [kind for start, kind in FORMATS.items() if first.startswith(start)]
    if is_json:
        kinds = ["JSON"]
    if kinds:
        raise ValueError(f"{path} is a {kinds[0]} file: expected UTF-8 text with {EOT} between texts; "
                         "extract the text first")


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


# 2. read it ---------------------------------------------------------------------------------------

class Part(NamedTuple):
    """A story, or a part of one that is longer than PART characters."""
    text: str
    story: int              # number of the story, from 0
    is_first: bool          # whether the story begins with this part


@dataclass
class Stories:
    """The stories of some files, stripped of white space around them, in parts. A file ends a story.

    Every iteration reads the files again, a chunk at a time.
    """
    files: list[Path]

    def __iter__(self) -> Iterator[Part]:
        number = 0
        for path in self.files:
            is_first = True
            for text, is_last in split_at_separators(read(path)):
                if text:
                    yield Part(text, number, is_first)
                    is_first = False
                if is_last:
                    number += not is_first               # an empty story does not count
                    is_first = True
        if number == 0:
            where = self.files[0] if len(self.files) == 1 else self.files[0].parent
            raise ValueError(f"{where} has no stories: expected text, with {EOT} between its stories")


def split_at_separators(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(part, whether it ends a story) of a file's stories, without white space around the stories."""
    rest = ""
    is_first = True
    for chunk in chain(chunks, [EOT]):
        *complete, rest = (rest + chunk).split(EOT)
        for story in complete:
            *parts, last = split_long(story.lstrip() if is_first else story, 0)
            for part in parts:
                yield part, False
            yield last.rstrip(), True
            is_first = True
        if is_first:
            rest = rest.lstrip()
        *parts, rest = split_long(rest, len(EOT))        # its end may be the beginning of a separator
        for part in parts:
            yield part, False
            is_first = False


# Where a text can be cut without changing its ids, with every pattern and tokenizer in data/tokenizer.py.
BEFORE_SPACE = re.compile(r"(?<=\S)(?= \S)")
BETWEEN_TOKENS = re.compile(r"(?<=\S\n)(?=\S)|(?<=[^\W_])(?=\s)|(?<=[^\W_])(?=[.,;:!?。，、；：！？…])")


def split_long(text: str, reserve: int) -> list[str]:
    """Parts of about PART characters which are together the text; a short text is one part.

    The last one keeps at least `reserve` characters, and one that is not white space if the text has any.
    """
    parts = []
    begin = 0
    end = len(text.rstrip()) - max(reserve, 1)
    while end - begin > PART:
        cut = find_cut(text, begin, begin + PART)
        parts.append(text[begin:cut])
        begin = cut
    parts.append(text[begin:])
    return parts


def find_cut(text: str, begin: int, end: int) -> int:
    """The last index in begin + 1 .. end where the text can be cut; else `end`, perhaps within a token."""
    nearby = max(begin + 1, end - 4096)
    for boundary, first in ((BEFORE_SPACE, nearby), (BETWEEN_TOKENS, nearby), (BETWEEN_TOKENS, begin + 1)):
        cuts = [match.start() for match in boundary.finditer(text, first, end + 2)]
        cuts = [cut for cut in cuts if cut <= end]
        if cuts:
            return cuts[-1]
    return end


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
            if b"\0" in chunk:
                position = file.tell() - len(chunk) + chunk.index(b"\0")
                raise ValueError(f"{path} has a NUL at byte {position}, so it is not text: save it as UTF-8")
            yield text


# 3. hold a part of it out -------------------------------------------------------------------------

@dataclass
class Survey:
    """What is known about stories after reading them once."""
    num_stories: int = 0
    chars: int = 0
    visible: int = 0                    # characters that are not white space
    held_visible: int = 0               # the same of every 20th story
    held: set[bytes] = field(default_factory=set)               # digests of the held-out stories
    sizes: dict[int, int] = field(default_factory=dict)         # characters of each long story
    digests: dict[int, bytes] = field(default_factory=dict)     # of each story of several parts


def survey(stories: Stories, hold_out: int) -> Survey:
    """Read the stories; those whose number is a multiple of `hold_out` are to be held out."""
    found = Survey()
    for number, parts in groupby(stories, key=lambda part: part.story):
        digest = hashlib.blake2b(digest_size=16)
        chars = 0
        visible = 0
        num_parts = 0
        for part in parts:
            digest.update(part.text.encode())
            chars += len(part.text)
            visible += sum(map(len, part.text.split()))
            num_parts += 1
        found.num_stories += 1
        found.chars += chars
        found.visible += visible
        if number % hold_out == 0:
            found.held_visible += visible
            found.held.add(digest.digest())
        if visible >= LONG_TEXT:
            found.sizes[number] = chars
        if num_parts > 1:
            found.digests[number] = digest.digest()
    return found


@dataclass
class Selected:
    """The parts of stories that a function selects. Every iteration reads the files again."""
    stories: Stories
    select: Callable[[Iterable[Part]], Iterator[Part]]

    def __iter__(self) -> Iterator[Part]:
        return self.select(self.stories)


def divide(files: list[Path], val_files: list[Path] | None) -> tuple[Iterable[Part], Iterable[Part]]:
    """The parts of the training stories and of the held-out stories.

    The held-out stories are those of `val_files`, or every 20th story. Such a story is removed wherever it
    occurs. If every 20th story is too much or too little of a corpus, because it has few long texts, the end
    of each long text is held out instead.
    """
    stories = Stories(files)
    if val_files:
        held_out = Stories(val_files)
        held = survey(held_out, 1).held
        digests = survey(stories, HOLD_OUT).digests
    else:
        found = survey(stories, HOLD_OUT)
        share = found.held_visible / found.visible
        least, most = HELD_SHARE
        sizes = found.sizes
        if found.num_stories == 1:
            sizes = {0: found.chars}
        if sizes and not least <= share <= most:
            ends = {number: chars - held_size(chars) for number, chars in sizes.items()}
            train = Selected(stories, partial(before_ends, ends=ends, path=files[0]))
            return train, Selected(stories, partial(after_ends, ends=ends, path=files[0]))
        held_out = Selected(stories, every_20th)
        held = found.held
        digests = found.digests
    train = Selected(stories, partial(without, held=held, digests=digests))
    if next(iter(train), None) is None:
        raise ValueError(f"{files[0]} has no story left to train on, since all are held out: "
                         "give it other stories")
    return train, held_out


def every_20th(parts: Iterable[Part]) -> Iterator[Part]:
    for part in parts:
        if part.story % HOLD_OUT == 0:
            yield part


def without(parts: Iterable[Part], held: set[bytes], digests: dict[int, bytes]) -> Iterator[Part]:
    """The stories whose digests are not in `held`. `digests` has those of the stories of several parts."""
    for part in parts:
        digest = digests.get(part.story) or hashlib.blake2b(part.text.encode(), digest_size=16).digest()
        if digest not in held:
            yield part


def held_size(chars: int) -> int:
    """How many of a text's characters are held out at its end."""
    size = chars // HOLD_OUT
    return max(size, HELD_CHARS) if chars >= LONG_TEXT else size


def before_ends(parts: Iterable[Part], ends: dict[int, int], path: Path) -> Iterator[Part]:
    """The stories, those in `ends` without their ends."""
    for head, _ in split_ends(parts, ends, path):
        if head.text:
            yield head


def after_ends(parts: Iterable[Part], ends: dict[int, int], path: Path) -> Iterator[Part]:
    """The ends of the stories in `ends`."""
    for _, end in split_ends(parts, ends, path):
        if end.text:
            yield end


def split_ends(parts: Iterable[Part], ends: dict[int, int], path: Path) -> Iterator[tuple[Part, Part]]:
    """Each part as (before the end, in the end), one of them often empty.

    `ends` has of some stories the character at which its end begins. They are cut at the white space before.
    """
    offset = 0                          # characters of the story before the part
    end_begins = False                  # whether the next character of the end is its first
    for part in parts:
        if part.is_first:
            offset = 0
            end_begins = True
        size = len(part.text)
        in_part = ends.get(part.story, offset + size + 1) - offset
        if in_part > size:
            cut = size
        elif in_part <= 0:
            cut = 0
        else:
            cut = max(part.text.rfind(character, 0, in_part) for character in " \t\n")
            if cut < 0 and offset == 0 and size < LONG_TEXT:
                raise ValueError(f"{path} is too short to hold a part of it out: give it stories, {EOT} "
                                 "between them")
            if cut < 0:
                cut = 0 if offset else in_part           # a long text without white space
        head = part.text[:cut]
        end = part.text[cut:]
        if 0 < cut < size or end_begins:
            end = end.lstrip()
        if cut < size:
            head = head.rstrip()
        yield part._replace(text=head), part._replace(text=end, is_first=end_begins)
        offset += size
        if end:
            end_begins = False


# 4. tokenize --------------------------------------------------------------------------------------

def fingerprint(files: list[Path], val_files: list[Path] | None, vocabulary: str) -> str:
    """12 hexadecimal digits, a hash of everything that the streams depend on."""
    digest = hashlib.sha256(f"{LAYOUT} {vocabulary}".encode())
    for kind, paths in (("train", files), ("val", val_files or [])):
        for path in paths:
            # the size tells where one file ends and the next begins
            digest.update(f" {kind} {path.stat().st_size} ".encode())
            with open(path, "rb") as opened:
                while chunk := opened.read(CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()[:12]


def tokenize(corpus_folder: Path, files: list[Path], val_files: list[Path] | None, vocab_size: int,
             tok: Tokenizer | None) -> None:
    """Write train.bin, val.bin and the tokenizer to `corpus_folder`, which appears only when complete."""
    train, held_out = divide(files, val_files)
    if tok is None:
        texts = (part.text for part in train)
        tok = train_bpe(take_chars(texts, BPE_CHARS), vocab_size)
    parent = corpus_folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"texts are tokenized into the folder {parent}, which cannot be made "
                         f"({error.strerror}): start from a folder that can be written to") from error
    num_chars = sum(path.stat().st_size for path in files)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=parent) as unfinished:
        # a subfolder, since other users may not read the temporary folder itself
        folder = Path(unfinished, corpus_folder.name)
        tok.save(folder)
        write_stream(folder / "train.bin", train, tok, num_chars)
        write_stream(folder / "val.bin", held_out, tok, num_chars // HOLD_OUT)
        try:
            folder.rename(corpus_folder)
        except OSError:
            if not corpus_folder.is_dir():  # otherwise another process has written the same bytes
                raise


def write_stream(path: Path, parts: Iterable[Part], tok: Tokenizer, chars: int) -> None:
    """Write the stream of `parts`. `chars`, about how many characters they have, is for the progress bar."""
    dtype = id_type(tok)
    bos = np.array([tok.bos], dtype=dtype)
    between = np.array(tok.between, dtype=dtype)
    progress = tqdm(desc=path.stem, total=chars, unit="ch", unit_scale=True, disable=None)
    with open(path, "wb") as file, progress:
        bos.tofile(file)
        num_texts = 0
        for batch in batches(parts, CHUNK):
            is_first = [part.is_first for part in batch]
            for begins, ids in zip(is_first, encode_parts(tok, [part.text for part in batch], is_first)):
                if begins and num_texts:
                    between.tofile(file)
                num_texts += begins
                np.array(ids, dtype=dtype).tofile(file)
            progress.update(sum(len(part.text) for part in batch))
        if num_texts:
            between.tofile(file)


def batches(parts: Iterable[Part], chars: int) -> Iterator[list[Part]]:
    """The parts in lists of about `chars` characters."""
    batch = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= chars:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def take_chars(texts: Iterable[str], chars: int) -> Iterator[str]:
    """The first texts, until they have `chars` characters together."""
    for text in texts:
        yield text
        chars -= len(text)
        if chars <= 0:
            return


def id_type(tok: Tokenizer) -> type:
    return np.uint16 if tok.vocab_size <= 1 << 16 else np.uint32
