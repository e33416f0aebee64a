"""Short prompts whose continuations are compared, and English text that is not stories."""
import ast
import pydoc_data.topics
import sysconfig
from pathlib import Path

COUNTRIES = (
    "France", "Italy", "Spain", "Germany", "Portugal", "Greece", "Poland", "Austria", "Norway", "Sweden",
    "Finland", "Denmark", "Ireland", "Hungary", "Egypt", "Kenya", "Morocco", "Japan", "China", "India",
    "Thailand", "Vietnam", "Indonesia", "Australia", "Canada", "Mexico", "Brazil", "Argentina", "Chile",
    "Peru", "Colombia", "Cuba", "Turkey", "Iran", "Iraq", "Israel", "Russia", "Ukraine", "Romania",
    "Iceland",
)
WORDS = (
    "hot", "big", "fast", "happy", "light", "old", "rich", "early", "strong", "wet", "open", "full", "hard",
    "high", "long", "loud", "near", "new", "right", "safe", "sharp", "short", "simple", "sweet", "tall",
    "thick", "true", "warm", "wide", "young", "brave", "clean", "deep", "first", "heavy", "kind", "lazy",
    "noisy", "polite", "smooth",
)
THINGS = (
    "a bicycle", "a bridge", "a computer", "a dictionary", "a doctor", "a forest", "a garden", "a guitar",
    "a hammer", "a hospital", "a kitchen", "a library", "a map", "a microscope", "a mountain", "a museum",
    "a piano", "a planet", "a river", "a robot", "a satellite", "a school", "a ship", "a telescope",
    "a thermometer", "a train", "a tree", "a volcano", "a whale", "an airplane", "an ant", "an elephant",
    "an engine", "an island", "an ocean", "an onion", "an orchestra", "an owl", "an umbrella", "an atom",
)
OPENINGS = (
    "The old house at the end of the street", "When the train finally arrived",
    "In the middle of the night", "My grandmother always told me that",
    "The most important thing about learning is", "After the storm",
    "The teacher looked at the class and said", "On the first day of spring",
    "The recipe needs two eggs and", "If you want to sleep better", "The dog ran across the field and",
    "Nobody in the village knew why", "The scientist opened the box and", "To plant a tree",
    "The city was quiet because", "He forgot his keys, so", "She opened the letter and",
    "The best way to make a friend is", "Before you cross the road", "Every morning", "The game ended when",
    "A good leader should", "The river was so high that", "In the year 1969", "The doctor told him to",
    "The little boat", "For breakfast we had", "The museum is open", "Long ago, a king",
    "When water gets very cold", "The book is about", "My favorite season is", "The price of bread",
    "The bus was late, and", "The children built", "During the war", "The sun is", "The human heart",
    "A triangle has", "Birds fly south because",
)
LONG_DOCSTRING = 800       # characters


def test_prompts() -> dict[str, list[str]]:
    """240 prompts by kind: 40 each of facts, opposites, definitions and openings, 80 sums."""
    sums = []
    for a in range(2, 12):
        for b in range(1, 9):
            sums.append(f"Question: What is {a} plus {b}? Answer:")
    return {
        "facts": [f"The capital of {country} is" for country in COUNTRIES],
        "opposites": [f"The opposite of the word {word} is" for word in WORDS],
        "definitions": [f"What is {thing}? Explain it to a child." for thing in THINGS],
        "openings": list(OPENINGS),
        "arithmetic": sums,
    }


def reference_texts() -> list[str]:
    """The language reference that comes with Python, by topic: prompts for training begin in it."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def docstrings() -> list[str]:
    """The long docstrings of the modules of Python's library: held-out English text."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if len(text) >= LONG_DOCSTRING:
            found.append(text)
    return found
