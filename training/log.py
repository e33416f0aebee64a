"""The log of a run: log.jsonl for programs, and one line per step for people."""
import json
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

from training.dist import is_first

BAR_FORMAT = "{desc} {n}/{total} |{bar:16}| {remaining} left{postfix}"


def to_json(value, indent: int | None = None) -> str:
    """JSON. Numbers that are not finite become null, since JSON has no others."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(with_null(value), indent=indent, allow_nan=False)


def with_null(value):
    """The value, with None for each float in it that is not finite."""
    if isinstance(value, dict):
        return {name: with_null(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_null(part) for part in value]
    is_number = not isinstance(value, float) or math.isfinite(value)
    return value if is_number else None


class Log:
    """Writes records to log.jsonl and shows steps, with a progress bar on a terminal, else as plain lines."""

    def __init__(self, path: Path, header: dict, resume: bool):
        """A new log starts with the record `header`; with `resume` records are appended."""
        if not is_first():
            path = Path(os.devnull)
        if resume and path.is_file():
            size = path.read_bytes().rfind(b"\n") + 1            # without the partial line of a killed run
            os.truncate(path, size)
        self.file = open(path, "a" if resume else "w", encoding="utf-8")
        self.bar = None
        if not resume:
            self.write(header)

    def write(self, record: dict) -> None:
        print(to_json(record), file=self.file, flush=True)

    def step(self, record: dict, total: int, line: str) -> None:
        """Write the record of a step and show `line`. `record` has its "phase" and its "step", 1 .. total."""
        self.write(record)
        phase = record["phase"]
        step = record["step"]
        if not (sys.stderr.isatty() and is_first()):
            print(f"{phase:8} {step:4}/{total} | {line}", flush=True)
            return
        if self.bar is None or step <= self.bar.n:               # a new phase
            self.bar = tqdm(total=total, initial=step - 1, desc=phase, bar_format=BAR_FORMAT)
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update(step - self.bar.n)
        if step == total:
            self.bar.close()
