"""One corpus, whatever it is made of: TinyStories, a text file, or the embedded story world."""
from pathlib import Path

import numpy as np

from data import story_world, tinystories, tokenizer
from data.tinystories import Corpus

FOLDER = Path("out/data")       # where texts lie tokenised


def open_corpus(data: str | None, val_data: str | None, vocab: int, own: tokenizer.Tokenizer | None = None) -> Corpus:
    """The corpus of --data; without a name the real text, or, where there is no network, the story world.

    `own` is the tokenizer of a checkpoint, which is then used as it is.
    """
    if data == "toy":
        return story_world_corpus(own)
    try:
        return tinystories.load(data or "tinystories", val_data, vocab, FOLDER, own)
    except tinystories.NoNetwork:
        if data:
            raise
        print("no network, so no TinyStories: taking the embedded story world (--data=toy)")
        return story_world_corpus(own)


def story_world_corpus(own: tokenizer.Tokenizer | None = None, stories: int = 30_000, held_out: int = 1000) -> Corpus:
    """Stories 0, 1, 2, ... of the world to train on, and others to be judged by; a word is a token."""
    bare = [word for word in story_world.words() if not word.isalpha() or word[0].isupper()]      # what may begin a story
    forms = bare + [" " + word for word in story_world.words() if word.isalpha()]
    tok = own or tokenizer.word_level(forms)

    def stream(seeds):
        ids = tok.encode_batch([story_world.story(seed) for seed in seeds])
        return np.array([i for story in ids for i in (tok.eot, *story)] + [tok.eot], dtype=tinystories.id_type(tok))
    return Corpus(stream(range(stories)), stream(range(10 ** 9, 10 ** 9 + held_out)), tok, "toy")


def windows(stream: np.ndarray, starts: np.ndarray, u: np.ndarray, length: int) -> np.ndarray:
    """(B, length) int64: for each number of `u` in [0, 1), a window of the stream that begins with a story.

    `starts` are the stories' indices in the stream; a window that hangs over its end is filled up with end-of-text.
    """
    whole = starts[:max(1, np.searchsorted(starts, len(stream) - length, "right"))]
    rows = [stream[whole[int(x * len(whole))]:][:length] for x in u.astype(np.float64)]
    return np.stack([np.pad(row, (0, length - len(row)), constant_values=stream[0]) for row in rows]).astype(np.int64)
