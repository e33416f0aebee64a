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
    (out / "summary.json.new").write_text(json.dumps(numbers, indent=1))
    os.replace(out / "summary.json.new", out / "summary.json")
    curves.draw(out / "log.jsonl", out / "curves.png")
    trace.picture(stories["after"], out / "states.png")
    print(f"\nleft in {out}: ar/ opdlm/ log.jsonl summary.json curves.png states.png")
