"""One corpus from any source: TinyStories, text files, or the synthetic story world."""
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data import story_world, tinystories, tokenizer
from data.tinystories import Corpus
from data.windows import Windows

FOLDER = Path("out/data")       # tokenized texts are kept here
FIRST_HELD_OUT = 10 ** 9        # seed of the first held-out story of the story world


def open_corpus(data: str | None, val_data: str | None, vocab: int,
                own: tokenizer.Tokenizer | None = None) -> Corpus:
    """The corpus of --data. Without a name it is TinyStories, or the story world if there is no network.

    `vocab` is the number of ids of the BPE learned from a text. `own` is the tokenizer of a checkpoint; if
    given, it is used instead of a new one.
    """
    if data == "toy":
        return story_world_corpus(own)
    try:
        return tinystories.load(data or "tinystories", val_data, vocab, FOLDER, own)
    except tinystories.NoNetwork:
        if data:
            raise
        print("no network, so no TinyStories: using the synthetic story world (--data=toy)")
        return story_world_corpus(own)


def story_world_corpus(own: tokenizer.Tokenizer | None = None, stories: int = 30_000,
                       held_out: int = 1000) -> Corpus:
    """Stories 0, 1, 2, ... of the story world for training, others as held-out stories. A word is a token."""
    tok = own or tokenizer.word_level(story_world_tokens())
    train = token_stream(map(story_world.story, range(stories)), tok)
    val = token_stream(map(story_world.story, range(FIRST_HELD_OUT, FIRST_HELD_OUT + held_out)), tok)
    return Corpus(train, val, tok, "toy")


def story_world_tokens() -> list[str]:
    """The tokens of the story world: words with a space before them; without one, what can begin a story."""
    words = story_world.words()
    without_space = [word for word in words if not word.isalpha() or word[0].isupper()]
    with_space = [" " + word for word in words if word.isalpha()]
    return without_space + with_space


def token_stream(texts: Iterable[str], tok: tokenizer.Tokenizer) -> np.ndarray:
    """The texts as a stream of ids, as in data/tinystories.py."""
    ids = [tok.bos]
    for text in tok.encode_batch(list(texts)):
        ids += text
        ids += tok.between
    return np.array(ids, dtype=tinystories.id_type(tok))


def windows(stream: np.ndarray, starts: np.ndarray, u: np.ndarray, length: int) -> np.ndarray:
    """(B, length) int64: a window for each random number of `u` (B,) in [0, 1), as `Windows` says."""
    return Windows(stream, starts, length)(u)
