"""One run at a time in a folder: a lock file in it names the process that writes there.

A lock whose process has ended is stale, for example after kill -9. The next run takes it over.
"""
import json
import os
import socket
import sys
from pathlib import Path

from training.dist import gather_objects, is_first
from training.resume import check_writable

FILE = "run.lock"


class FolderLock:
    """`with FolderLock(folder):` makes the folder if needed. ValueError if another run has locked it.

    In a process group only the first process locks, and all processes raise the same error.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / FILE
        self.content = None                                      # of the lock file while it is ours

    def __enter__(self) -> "FolderLock":
        refusal = None
        if is_first():
            try:
                self.acquire()
            except (ValueError, OSError) as error:
                refusal = str(error)
        refusal = gather_objects(refusal)[0]
        if refusal:
            raise ValueError(refusal)
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def acquire(self) -> None:
        self.is_new_folder = not self.folder.exists()
        check_writable(self.folder)
        content = json.dumps(describe_process())
        while not create(self.path, content):
            found = read(self.path)
            if found is None:                                    # its run has just ended
                continue
            check_stale(self.folder, self.path, found)
            if remove(self.path, found):
                print(f"{self.folder}: the run that wrote here before has ended without removing {FILE}; "
                      "this run takes over", flush=True)
        self.content = content

    def release(self) -> None:
        """Remove the lock file if it is ours, and the folder if we made it and it is empty."""
        if self.content is None or read(self.path) != self.content:
            return
        self.content = None
        self.path.unlink(missing_ok=True)
        if self.is_new_folder and not any(self.folder.iterdir()):
            self.folder.rmdir()


# 1. the lock file ---------------------------------------------------------------------------------

def create(path: Path, content: str) -> bool:
    """Create the lock file with its whole content at once; False if there is one already."""
    own = path.with_name(f"{path.name}.{os.getpid()}")
    own.write_text(content)
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:                                              # a file system without hard links
        return create_exclusively(path, content)
    finally:
        own.unlink()
    return True


def create_exclusively(path: Path, content: str) -> bool:
    try:
        with open(path, "x") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def read(path: Path) -> str | None:
    """The content of the lock file, None if there is none."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def remove(path: Path, content: str) -> bool:
    """Remove a stale lock file with this content; False if another run was faster.

    The file is renamed first, since another run may replace it between our reading and our removing.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.stale")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    is_stale = aside.read_text(errors="replace") == content
    if not is_stale:
        create(path, aside.read_text())                          # the lock of that run: put it back
    aside.unlink(missing_ok=True)
    return is_stale


def check_stale(folder: Path, path: Path, content: str) -> None:
    """ValueError if the run of this lock file still runs, or may still run."""
    if not content:                                              # of a machine that crashed
        return
    try:
        owner = json.loads(content)
        pid = int(owner["pid"])
        host = str(owner["host"])
        started = owner["started"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is not the lock file of a run: move it away or use another --out") from None
    advice = "wait until it ends, or use another --out"
    if host != socket.gethostname():
        advice += f". If it no longer runs, delete {path}"
    elif not is_running(pid, started):
        return
    raise ValueError(f"another run writes to {folder} (process {pid} on {host}): {advice}")


# 2. processes -------------------------------------------------------------------------------------

def describe_process() -> dict:
    """The content of the lock file of this process."""
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "started": start_time(pid)}


def is_running(pid: int, started: str | None) -> bool:
    """Whether the process with this number on this machine is the one that started at `started`."""
    if sys.platform == "win32":                                  # os.kill would end the process there
        return True
    if pid < 1:
        return False
    try:
        os.kill(pid, 0)                                          # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:                                      # a process of another user
        pass
    now = start_time(pid)
    return now is None or now == started


def start_time(pid: int) -> str | None:
    """When a process started: the boot of the machine, and clock ticks since then.

    A later process with the same number has another start time. None without /proc (not on Linux). The
    start time of a process that has ended, but that its parent has not waited for, is "ended".
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()                     # after the name, which may have spaces
    state = fields[0]
    ticks = fields[19]
    if state in ("Z", "X"):
        return "ended"
    return f"{boot} {ticks}"
