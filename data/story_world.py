"""The story world: short English stories that a program can check, so that quality has an exact measure.

A child brings a thing to a place and loses it; an animal that can reach it brings it back; the last sentence
tells what becomes of child and place. A story has seven sentences and 60 to 75 tokens; every word and every
punctuation mark is a token. Its laws, in the order in which `check` tests them:

    grammar   every sentence is one of the world's sentences
    plot      the events are in order, none is missing, and the thing is brought back from where it went
    name      there is one child and one animal, and no other
    pronoun   he, she, his, her, him, boy and girl agree with the child's name
    object    the thing has a property that such a thing can have, and what is found is what was lost
    place     the place of the last sentence is the place of the first

The order of the file: the words, the sentences, the plots; `story` and `tell`, which write; `parse`,
`check` and `breaks`, which read; `words`. Both sides share the table of sentences and one idea: the first
mention of a thing decides what it is, and every later mention must agree. The writer chooses a word at the
first mention and repeats it afterwards. The checker, which has only the text, remembers the first mention and
compares.
"""
import random
import re

# 1. the words -------------------------------------------------------------------------------------

BOYS = ("Tom", "Ben", "Max", "Sam", "Jack", "Leo")
GIRLS = ("Lily", "Mia", "Sue", "Anna", "Lucy", "Emma")

# the slot of a pronoun is named after the boy's word; the second word is the girl's
PRONOUNS = {"He": ("He", "She"), "he": ("he", "she"), "his": ("his", "her"), "him": ("him", "her"),
            "boy": ("boy", "girl")}

# what a thing can look or feel like, and the things that can: a red ball and a soft hat, never a soft ball
THINGS = {
    ("red", "blue", "green", "yellow"): ("ball", "kite", "boat"),
    ("soft", "warm", "woolly", "fluffy"): ("hat", "scarf", "glove"),
    ("shiny", "golden", "silver", "rusty"): ("coin", "ring", "key"),
}

# who can bring a thing back out of the water, from a tree, from under the ground
HELPERS = {
    "diver": ("duck", "frog", "otter", "beaver"),
    "flyer": ("bird", "owl", "crow", "parrot"),
    "digger": ("mole", "mouse", "rabbit", "fox"),
}

# every slot that a sentence can have, and the words that fit it
SLOTS = {
    **PRONOUNS,
    **HELPERS,
    "animal": sum(HELPERS.values(), ()),
    "name": BOYS + GIRLS,
    "colour": sum(THINGS, ()),
    "object": sum(THINGS.values(), ()),
    "place": ("park", "farm", "beach", "forest", "garden", "market", "school", "castle"),
    "weather": ("sunny", "windy", "cloudy", "cold"),
    "mood": ("sad", "upset", "lonely", "angry"),
    "size": ("big", "small", "tiny", "kind"),
    "treat": ("cookie", "carrot", "nut", "flower"),
}

# the law that a wrong word in a slot breaks; the other slots occur once, and any of their words is right
LAW_OF = {
    **dict.fromkeys(["name", "animal", *HELPERS], "name"),
    **dict.fromkeys(PRONOUNS, "pronoun"),
    **dict.fromkeys(["colour", "object"], "object"),
    "place": "place",
}

# 2. the sentences: each event can be told in several ways -----------------------------------------

SENTENCES = {
    "have": ["One {weather} day, {name} took {his} {colour} {object} to the {place}.",
             "A {boy} named {name} went to the {place} with a {colour} {object}.",
             "At the {place}, little {name} had fun with {his} {colour} {object}."],
    "lose diver": ["But it slipped from {his} hand into a deep pond.",
                   "Soon a huge wave carried the {object} far away."],
    "lose flyer": ["But {he} threw it too high, up into a tree.",
                   "Soon the wind blew the {object} onto a thin branch."],
    "lose digger": ["But it fell down a dark hole by the wall.",
                    "Soon {he} dropped the {object} under a heavy rock."],
    "cry": ["{He} sat down and cried.",
            "{He} felt very {mood}.",
            "Nobody was there to help {him}."],
    "meet": ["Just then, a {size} {animal} came by.",
             "A {size} {animal} heard {him} and stopped.",
             "Then {name} met a {size} {animal}."],
    "find diver": ["The {diver} swam down and got the {colour} {object}.",
                   "With one splash, the {diver} saved the {colour} {object}."],
    "find flyer": ["The {flyer} flew up for the {colour} {object}.",
                   "With two flaps, the {flyer} brought back the {colour} {object}."],
    "find digger": ["The {digger} crawled inside and found the {colour} {object}.",
                    "With its paws, the {digger} pulled out the {colour} {object}."],
    "thank": ["{He} hugged the {animal} and said thank you.",
              "{He} gave the {animal} a {treat}.",
              "They danced and became good friends."],
    "end": ["In the end, {name} left the {place} with {his} {object}.",
            "Then {name} ran home from the {place}.",
            "After that, {name} loved the {place} even more."],
}

# 3. the plots: what went into the water is found by a diver, and so on ----------------------------

PLOTS = {
    helper: ["have", f"lose {helper}", "cry", "meet", f"find {helper}", "thank", "end"]
    for helper in HELPERS
}

KINDS = [event.partition(" ")[0] for event in PLOTS["diver"]]     # have, lose, cry, meet, find, thank, end

# 4. writing ---------------------------------------------------------------------------------------

PIECES = {
    sentence: re.findall(r"\{\w+\}|\w+|[.,]", sentence)
    for told in SENTENCES.values() for sentence in told
}


def story(seed: int) -> str:
    """The story of this seed, with one space before each word but the first."""
    text = ""
    for word, _ in tell(random.Random(seed)):
        text += word if text == "" or word in ".," else " " + word
    return text


def tell(rng: random.Random):
    """Yield a story's tokens as (word, slot); the slot of a fixed word is None.

    Every random choice is an `rng.choice` between distinct options and can be seen in the text. So the
    probability of a story is the product of 1 / (number of options).
    """
    helper = rng.choice(list(HELPERS))
    world = {}  # what the story has said so far: slot -> word
    for event in PLOTS[helper]:
        for piece in PIECES[rng.choice(SENTENCES[event])]:
            slot = piece[1:-1] if piece[0] == "{" else None
            yield (fill(slot, world, helper, rng) if slot else piece), slot


def fill(slot, world, helper, rng):
    """The word for a slot: chosen at its first mention (and put into `world`), repeated at later ones."""
    if slot in PRONOUNS:
        return PRONOUNS[slot][fill("name", world, helper, rng) in GIRLS]
    if slot in HELPERS:
        slot = "animal"
    if slot not in world:
        world[slot] = rng.choice(options(slot, world, helper))
    return world[slot]


def options(slot, world, helper):
    """The words possible at a first mention. In every sentence a colour precedes its object."""
    if slot == "animal":
        return HELPERS[helper]
    if slot == "object":
        return next(objects for colours, objects in THINGS.items() if world["colour"] in colours)
    return SLOTS[slot]


# 5. reading ---------------------------------------------------------------------------------------

def pattern(sentence: str) -> re.Pattern:
    """A sentence as a regular expression, a group per slot: "{name} sat." becomes "(Tom|Ben|...) sat\\."."""
    escaped = sentence.replace(".", r"\.")
    return re.compile(re.sub(r"\{(\w+)\}", lambda slot: f"({'|'.join(SLOTS[slot[1]])})", escaped))


GRAMMAR = [
    (event, re.findall(r"\{(\w+)\}", sentence), pattern(sentence))
    for event, told in SENTENCES.items() for sentence in told
]


def parse(sentence: str):
    """(event, mentions as a list of (slot, word)) of a sentence of this world; None for any other."""
    for event, slots, expected in GRAMMAR:
        if match := expected.fullmatch(sentence):
            return event, list(zip(slots, match.groups()))
    return None


def check(text: str) -> str | None:
    """The first law that a text breaks, None for a story of this world. It accepts any string."""
    sentences = [parse(sentence) for sentence in re.split(r"(?<=\.) ", text)]
    if None in sentences:
        return "grammar"
    if [event for event, _ in sentences] not in PLOTS.values():
        return "plot"
    mentions = []
    for _, mentioned in sentences:
        for slot, word in mentioned:
            mentions.append(("animal" if slot in HELPERS else slot, word))
    world = dict(reversed(mentions))  # reversed, so that the first mention of a slot stays
    broken = {LAW_OF.get(slot) for slot, word in mentions if not agrees(slot, word, world)}
    return next((law for law in ("name", "pronoun", "object", "place") if law in broken), None)


def breaks(text: str) -> list[set[str]]:
    """For each sentence, the laws that it breaks; one more set if the story ends too early.

    All sets are empty exactly if `check` returns None. A sentence is judged by what came before it: its event
    has to follow the event of the sentence before, and its words have to agree with the first mention. So a
    story can recover from an error. A sentence that is not one of this world stands for the next event.
    """
    found = []
    world = {}                          # slot -> word of its first mention
    helper = None                       # of the event that loses the thing, or finds it
    num_events = 0                      # the events told so far
    for sentence in re.split(r"(?<=\.) ", text):
        parsed = parse(sentence)
        if parsed is None:
            found.append({"grammar"})
            num_events += 1
            continue
        event, mentioned = parsed
        kind, _, event_helper = event.partition(" ")
        helper = helper or event_helper
        laws = set()
        if KINDS.index(kind) != num_events or event_helper not in ("", helper):
            laws.add("plot")
        num_events = KINDS.index(kind) + 1
        mentions = [("animal" if slot in HELPERS else slot, word) for slot, word in mentioned]
        world = {**dict(reversed(mentions)), **world}            # the first mention of a slot stays
        for slot, word in mentions:
            if not agrees(slot, word, world) and slot in LAW_OF:
                laws.add(LAW_OF[slot])
        found.append(laws)
    if num_events < len(KINDS):
        found.append({"plot"})
    return found


def agrees(slot, word, world):
    """Whether a mention agrees with the first mention of its slot, as far as `world` has it."""
    if slot in PRONOUNS:
        return "name" not in world or word == PRONOUNS[slot][world["name"] in GIRLS]
    if slot == "object":
        is_possible = "colour" not in world or word in options("object", world, None)
        return word == world["object"] and is_possible
    return word == world[slot]


# 6. the vocabulary --------------------------------------------------------------------------------

def words() -> list[str]:
    """Every word and punctuation mark of the world, sorted, without the space before a word."""
    fixed = {piece for pieces in PIECES.values() for piece in pieces if piece[0] != "{"}
    return sorted(fixed.union(*SLOTS.values()))
