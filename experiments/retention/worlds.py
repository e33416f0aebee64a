"""Two story worlds with different words: the second is the first with upper and lower case swapped.

    First world     One sunny day, Tom took his red ball to the park.
    Second world    oNE SUNNY DAY, tOM TOOK HIS RED BALL TO THE PARK.

A word is a token. So the two share only the article "a", the comma, the full stop and the end-of-text token.
Both have the same laws.
"""
from functools import cache

from data import story_world, tokenizer
from data.corpus import FIRST_HELD_OUT, story_world_tokens, token_stream
from data.tinystories import Corpus

FIRST, SECOND = "first", "second"
WORLDS = (FIRST, SECOND)
TRAINING_STORIES = 15_000   # of each world
HELD_OUT = 1000             # of each world


def story(world: str, seed: int) -> str:
    """The story of this seed in a world's words."""
    text = story_world.story(seed)
    return text if world == FIRST else text.swapcase()


def breaks(world: str, text: str) -> list[set[str]]:
    """For each sentence, the laws of the world that it breaks, as in data/story_world.py."""
    return story_world.breaks(text if world == FIRST else text.swapcase())


@cache
def shared_tokenizer() -> tokenizer.Tokenizer:
    """The words of both worlds, one token each."""
    tokens = story_world_tokens()
    return tokenizer.word_level(tokens + [token.swapcase() for token in tokens])


@cache
def corpus_of(*worlds: str) -> Corpus:
    """Training and held-out stories of these worlds, which take turns."""
    tok = shared_tokenizer()

    def stream(first: int, count: int):
        texts = [story(world, seed) for seed in range(first, first + count) for world in worlds]
        return token_stream(texts, tok)

    train = stream(0, TRAINING_STORIES)
    held_out = stream(FIRST_HELD_OUT, HELD_OUT)
    return Corpus(train, held_out, tok, f"story-worlds-{'-'.join(worlds)}")


def both_worlds() -> Corpus:
    """The corpus of the teacher."""
    return corpus_of(*WORLDS)
