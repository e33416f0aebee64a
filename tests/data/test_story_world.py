"""Invariants of the story world: its checker is right about every change, and a model has to know whole
stories.

What to expect of a change of one word is not taken from `check`, but from the slot that the writer filled.
"""
import math
import random
import re
from collections import Counter, defaultdict
from itertools import chain, islice, repeat

from data import story_world

LAWS = {"name": {"name", "animal", "diver", "flyer", "digger"}, "pronoun": {"He", "he", "his", "him", "boy"},
        "object": {"colour", "object"}, "place": {"place"}, None: {"weather", "mood", "size", "treat"}}
BROKEN_BY = {slot: law for law, slots in LAWS.items() for slot in slots}    # None: any word is right


def told(seed):
    """A story as a list of (word, slot)."""
    return list(story_world.tell(random.Random(seed)))


def text(words):
    return re.sub(r" ([.,])", r"\1", " ".join(words))


def verdicts(change, seeds=150):
    """Counter of (expected, answer) over every position of some stories.

    `change(word, slot, rng)` returns (the law that is broken then, the new words), or None for no change.
    """
    rng = random.Random(1)
    seen = Counter()
    for seed in range(seeds):
        pairs = told(seed)
        for position, (word, slot) in enumerate(pairs):
            changed = change(word, slot, rng)
            if not changed:
                continue
            expected, new_words = changed
            words = [other for other, _ in pairs]
            words[position:position + 1] = new_words
            seen[expected, story_world.check(text(words))] += 1
    return seen


def share_right(seen):
    """Per law, the share of changes that were reported under that name."""
    total = Counter()
    right = Counter()
    for (expected, answer), count in seen.items():
        total[expected] += count
        right[expected] += count * (answer == expected)
    return {law: right[law] / total[law] for law in total}


# the checker ------------------------------------------------------------------------------------------

def test_every_story_is_accepted_and_repeats_with_its_seed():
    for seed in range(3000):
        story = story_world.story(seed)
        assert story_world.check(story) is None, story
        assert story == story_world.story(seed) == text(word for word, _ in told(seed))


def test_a_word_of_the_same_class_breaks_the_law_of_its_slot_or_none():
    def change(word, slot, rng):
        others = [other for other in story_world.SLOTS.get(slot, ()) if other != word]
        return (BROKEN_BY[slot], [rng.choice(others)]) if others else None
    right = share_right(verdicts(change))
    assert set(right) == set(LAWS) and min(right.values()) >= 0.99, right


def test_a_word_of_another_class_a_missing_and_a_doubled_word_break_the_grammar():
    vocabulary = story_world.words()

    def other(word, slot, rng):
        same_class = story_world.SLOTS.get(slot, ())
        return "grammar", [rng.choice([w for w in vocabulary if w != word and w not in same_class])]

    for change in (other, lambda word, *_: ("grammar", []), lambda word, *_: ("grammar", [word, word])):
        right = share_right(verdicts(change))
        assert right["grammar"] >= 0.99, right


def test_sentences_moved_missing_or_doubled_break_the_plot():
    for seed in range(200):
        lines = re.findall(r"[^.]+\.", " " + story_world.story(seed))
        for i in range(7):
            assert story_world.check("".join(lines[:i] + lines[i + 1:])[1:]) == "plot" or i == 0
            assert story_world.check("".join(lines[:i + 1] + lines[i:])[1:]) == "plot"
        assert story_world.check("".join(lines[:3] + [lines[4], lines[3]] + lines[5:])[1:]) == "plot"


def test_what_fell_into_the_water_is_not_found_in_a_tree():
    gone = {"diver": " But it slipped from {} hand into a deep pond.",
            "digger": " But it fell down a dark hole by the wall."}
    for seed in range(200):
        lines = re.findall(r"[^.]+\.", " " + story_world.story(seed))
        his = "his" if any(boy in lines[0] for boy in story_world.BOYS) else "her"
        for helper, loss in gone.items():
            able = any(animal in lines[4].split() for animal in story_world.HELPERS[helper])
            changed = "".join([lines[0], loss.format(his), *lines[2:]])[1:]
            assert story_world.check(changed) == (None if able else "plot")


def test_a_coin_is_not_woolly_even_if_the_story_says_so_twice():
    wrong = {"red": "woolly", "soft": "golden", "shiny": "blue"}
    for seed in range(500):
        story = story_world.story(seed)
        for colour, other in wrong.items():
            if f" {colour} " in story:
                assert story_world.check(story.replace(f" {colour} ", f" {other} ")) == "object"


def test_any_string_has_an_answer():
    rng = random.Random(0)
    story = story_world.story(0)
    no_stories = ["", " ", ".", ". .", "\n", "\0", "{name} sat down.", "ß" * 999, "." * 9999,
                  story + " ", story[:-1] + "!", story[:-1]]
    for junk in no_stories:
        assert story_world.check(junk) == "grammar"
    for seed in range(300):
        story = list(story_world.story(seed))
        story[rng.randrange(len(story))] = chr(rng.randrange(0xD800))
        story_world.check("".join(story))
        assert story_world.check("".join(story[:rng.randrange(len(story) - 1)])) in ("grammar", "plot")


def test_the_vocabulary_is_what_the_stories_use():
    used = {word for seed in range(3000) for word, _ in told(seed)}
    assert story_world.words() == sorted(used) and 150 <= len(used) <= 300
    assert all(re.fullmatch(r"\w+|[.,]", word) for word in used)


# how hard it is ---------------------------------------------------------------------------------------

class Counting(random.Random):
    """Adds up the entropy of its choices, in nats."""
    nats = 0.0

    def choice(self, options):
        assert len(set(map(str, options))) == len(options), "equal options have less entropy"
        self.nats += math.log(len(options))
        return super().choice(options)


def test_entropy_length_and_number_of_stories():
    runs = [(rng, len(list(story_world.tell(rng)))) for rng in map(Counting, range(20000))]
    lengths = [length for _, length in runs]
    assert 54 <= min(lengths) and max(lengths) <= 76
    assert 0.28 <= sum(rng.nats for rng, _ in runs) / sum(lengths) <= 0.38
    # two stories are equal with the mean probability of a story: 1e-6 for a million equally likely stories
    assert sum(math.exp(-rng.nats) for rng, _ in runs) / len(runs) < 1e-6
    stories = Counter(story_world.story(seed) for seed in range(50000))
    assert 50000 - len(stories) < 50000 ** 2 / 2 / 1e6 / 10, "collisions of fewer than ten million stories"


def test_the_end_belongs_to_the_beginning():
    stories = [[word for word, _ in told(seed)] for seed in range(1001)]
    mixed = [a[:2 * len(a) // 3] + b[2 * len(b) // 3:] for a, b in zip(stories, stories[1:])]
    assert sum(story_world.check(text(words)) is None for words in mixed) <= 0.01 * len(mixed)
    # cut where sentences meet, so that only what the sentences say can be wrong
    lines = [story_world.story(seed).split(". ") for seed in range(1001)]
    mixed = [". ".join(a[:5] + b[5:]) for a, b in zip(lines, lines[1:])]
    answers = Counter(map(story_world.check, mixed))
    assert answers[None] <= 0.02 * len(mixed) and not answers["grammar"] and not answers["plot"], answers


def test_a_4_gram_model_writes_few_valid_stories():
    counts = defaultdict(list)
    size = 0
    seed = 0
    while size < 1_000_000:
        words = ["", "", ""] + [word for word, _ in told(seed)] + [""]
        for i in range(3, len(words)):
            counts[tuple(words[i - 3:i])].append(words[i])
        size += len(words) - 3
        seed += 1
    rng = random.Random(0)
    valid = 0
    for _ in range(500):
        words = ["", "", ""]
        # every context has been seen, so the model needs no backing off
        while len(words) < 200 and (word := rng.choice(counts[tuple(words[-3:])])):
            words.append(word)
        valid += story_world.check(text(words[3:])) is None
    assert valid <= 0.05 * 500, valid / 500


# a perfect model that reveals several words at once ---------------------------------------------------

class Fork(Exception):
    """The script has ended at a choice; its argument is the number of options."""


class Script(random.Random):
    """Takes the given choices; after them it continues at random, or without `rng` it raises Fork."""

    def __new__(cls, *_):
        return super().__new__(cls)                              # Python 3.10 takes one argument here

    def __init__(self, path, rng=None):
        super().__init__(0)
        self.left, self.rng, self.probability = list(path), rng, 1.0

    def choice(self, options):
        if not self.left and self.rng is None:
            raise Fork(len(options))
        self.probability /= len(options)
        return options[self.left.pop(0)] if self.left else self.rng.choice(options)

    def write(self):
        """The words, then "" without end."""
        return chain((word for word, _ in story_world.tell(self)), repeat(""))


def beginnings(words, path=()):
    """Every way (choices, probability) in which the writer can produce these first words."""
    script = Script(path)
    try:
        if any(written != word for word, written in zip(words, script.write())):
            return []
    except Fork as fork:
        return [way for i in range(fork.args[0]) for way in beginnings(words, (*path, i))]
    return [(path, script.probability)]


def survives(seed, block, rng):
    """Whether a story is valid whose words are sampled from exact conditionals, `block` words at a time.

    The words of a block are sampled independently of each other.
    """
    words = [word for word, _ in told(seed)][:seed % 4]
    ways = beginnings(words)
    while ways and (not words or words[-1]):
        sampled = []
        for i in range(len(words), len(words) + block):
            path, = rng.choices([path for path, _ in ways], [probability for _, probability in ways])
            sampled.append(next(islice(Script(path, rng).write(), i, None)))
        words += sampled
        ways = [way for path, _ in ways for way in beginnings(words, path)]
    return bool(ways)


def test_a_block_revealed_in_one_step_costs_validity_and_one_word_at_a_time_does_not():
    rng = random.Random(0)
    assert all(survives(seed, 1, rng) for seed in range(30))
    assert sum(survives(seed, 4, rng) for seed in range(200)) / 200 <= 0.7


# laws per sentence ------------------------------------------------------------------------------------

def one_word_changed(seed, rng):
    """A story with one of its words replaced by another word of the world."""
    words = [word for word, _ in told(seed)]
    words[rng.randrange(len(words))] = rng.choice(story_world.words())
    return text(words)


def test_no_sentence_breaks_a_law_exactly_if_the_story_is_accepted():
    rng = random.Random(2)
    stories = [story_world.story(seed) for seed in range(140)]
    stories += [one_word_changed(seed, rng) for seed in range(600)]
    for seed in range(100):
        sentences = re.split(r"(?<=\.) ", story_world.story(seed))
        rng.shuffle(sentences)
        stories += [" ".join(sentences), " ".join(sentences[:5]), ""]
    verdict = Counter()
    for story in stories:
        is_valid = story_world.check(story) is None
        breaks_a_law = any(story_world.breaks(story))
        assert is_valid != breaks_a_law, story
        verdict[is_valid] += 1
    assert min(verdict.values()) > 100


def test_a_story_recovers_from_an_error():
    """Each error counts in its sentence, and the sentences after it are judged as before."""
    story = ("One sunny day, Tom took his red ball to the park. But it slipped from his hand into a deep "
             "pond. He sat down and cried. Just then, a big duck came by. The duck swam down and got the red "
             "ball. He hugged the duck and said thank you. Then Tom ran home from the park.")
    sentences = re.split(r"(?<=\.) ", story)
    assert story_world.breaks(story) == [set()] * 7

    def laws(i, old, new):
        assert old in sentences[i]
        changed = [*sentences]
        changed[i] = changed[i].replace(old, new)
        return story_world.breaks(" ".join(changed))
    assert laws(2, "He", "She") == [set(), set(), {"pronoun"}, *[set()] * 4]
    assert laws(5, "duck", "frog") == [*[set()] * 5, {"name"}, set()]
    both = laws(6, "Tom ran home from the park", "Sam ran home from the farm")
    assert both == [*[set()] * 6, {"name", "place"}]
    assert laws(2, "sat down", "sat sat") == [set(), set(), {"grammar"}, *[set()] * 4]
    assert laws(0, "red ball", "soft ball") == [{"object"}, set(), set(), set(), {"object"}, set(), set()]
    another_helper = laws(4, "The duck swam down and got", "The owl flew up for")
    assert another_helper == [*[set()] * 4, {"plot", "name"}, set(), set()]
    without = " ".join(sentences[:3] + sentences[4:])
    assert story_world.breaks(without)[3] == {"plot"} and not any(story_world.breaks(without)[4:])
    assert story_world.breaks(" ".join(sentences[:5])) == [*[set()] * 5, {"plot"}]
    assert story_world.breaks(" ".join([*sentences, sentences[6]])) == [*[set()] * 7, {"plot"}]
