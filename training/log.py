"""The log of a run: log.jsonl for programs, and one line per step for people."""
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from training.dist import is_first

SECONDS_PER_LINE = 60       # in a pipe, the progress of one long task is printed this often
BAR_FORMAT = "{desc} {n}/{total} |{bar:16}| {remaining} left{postfix}"
PROGRESS_FORMAT = "{desc} {percentage:3.0f}% |{bar:16}| {remaining} left"


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


class Progress:
    """The progress of a task that is no training step: a bar with the time left on a terminal, else lines.

    A line is printed at most once a minute, and none in the first minute. `total` may be an estimate.
    """

    def __init__(self, title: str, total: int):
        self.title = title
        self.total = total
        self.done = 0
        self.began = time.monotonic()
        self.last_line = self.began
        self.bar = None
        if sys.stderr.isatty() and is_first():
            self.bar = tqdm(total=total, desc=title, bar_format=PROGRESS_FORMAT, leave=False)

    def add(self, amount: int) -> None:
        """`amount` more of the total is done."""
        amount = min(amount, self.total - self.done)             # the total may be an estimate
        self.done += amount
        if self.bar is not None:
            self.bar.update(amount)
        elif time.monotonic() - self.last_line >= SECONDS_PER_LINE:
            self.last_line = time.monotonic()
            print(self.line(), flush=True)

    def line(self) -> str:
        """The share that is done and the time left, in words."""
        share = self.done / self.total
        seconds = time.monotonic() - self.began
        left = tqdm.format_interval(seconds * (1 - share) / max(share, 1e-3))
        return f"{self.title}: {share:.0%} after {tqdm.format_interval(seconds)}, about {left} left"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@contextmanager
def progress_of_passes(title: str, positions: int, *nets) -> Iterator[None]:
    """Show how many of about `positions` positions the forward passes of these networks have processed."""
    progress = Progress(title, positions)

    def count_positions(net, inputs, output) -> None:
        tokens = inputs[0]
        progress.add(tokens.numel())

    hooks = [net.register_forward_hook(count_positions) for net in set(nets)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        progress.close()
