"""log.jsonl, one record per line, and a line per step for people."""
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from training.dist import is_first


class Log:
    """log.jsonl, a record a line, and a line a step for people: a progress bar on a terminal, plain lines in a pipe."""

    def __init__(self, path: Path, header: dict, resume: bool):
        path = path if is_first() else Path(os.devnull)
        if resume and path.is_file():             # a killed run may have left half a line
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self.file, self.bar = open(path, "a" if resume else "w", encoding="utf-8"), None
        if not resume:
            self.write(header)

    def write(self, record: dict) -> None:
        print(json.dumps(record), file=self.file, flush=True)

    def step(self, record: dict, total: int, line: str) -> None:
        """Note a step, the `record["step"]`-th of `total`."""
        self.write(record)
        name, n = record["phase"], record["step"]
        if not (sys.stderr.isatty() and is_first()):
            print(f"{name:8} {n:4}/{total} | {line}", flush=True)
            return
        if self.bar is None or n <= self.bar.n:
            form = "{desc} {n}/{total} |{bar:16}| {remaining} left{postfix}"
            self.bar = tqdm(total=total, initial=n - 1, desc=name, bar_format=form)
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update(n - self.bar.n)
        if n == total:
            self.bar.close()
