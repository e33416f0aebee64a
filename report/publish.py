"""The end of a run: the table and the stories on the terminal, the summary and the pictures in its folder."""
import json
import os
import sys
from pathlib import Path

from report import curves, measure, trace


def publish(out: Path, numbers: dict, stories: dict) -> None:
    """The table and the stories on the terminal; summary.json and the pictures in the run's folder."""
    print("\n" + measure.table(numbers))
    colour = trace.wants_colour(sys.stdout)
    for name, story in stories.items():
        print(f"\n{name}: {trace.coloured(story, colour and name != 'ar')}")
    if colour:
        print("\n" + trace.legend(stories["after"].block))
    write_json(out / "summary.json", numbers)
    curves.draw(out / "log.jsonl", out / "curves.png")
    trace.picture(stories["after"], out / "states.png")
    print(f"\nleft in {out}: ar/ opdlm/ log.jsonl summary.json curves.png states.png")


def write_json(path: Path, value) -> None:
    """A file that appears whole or not at all, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(json.dumps(value, indent=1))
    os.replace(new, path)
