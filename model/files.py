"""Files and folders that are written completely or not at all, and JSON files that are read with care.

New content is written under a temporary name in the same folder. The name is hidden and says whose it is:

    .best.HOST.PID.RANDOM.new    the new content of `best`, possibly incomplete
    .best.HOST.PID.RANDOM.old    its former content, until the new content is in its place

Whatever a killed process leaves behind is removed by the next one that writes `best`. Other files are never
removed: files in a replaced folder that this project does not write are moved to the new folder.
"""
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

MAX_JSON_BYTES = 1 << 28
LFS_POINTER = b"version https://git-lfs"

# 1. read ------------------------------------------------------------------------------------------------

def read_json(path: Path):
    """The content of a JSON file in UTF-8. ValueError if it is no JSON, or says something twice."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_JSON_BYTES} bytes")
    refuse_lfs_pointer(path)
    text = path.read_text(encoding="utf-8-sig")  # a byte order mark is removed
    try:
        return json.loads(text, object_pairs_hook=object_without_repeats)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON ({error}): copy it again") from None


def object_without_repeats(pairs: list[tuple]) -> dict:
    """A JSON object as a dict. ValueError if a key occurs twice with different values."""
    result = {}
    for key, value in pairs:
        if key in result and result[key] != value:
            raise ValueError(f"it has {key!r} twice, with different values")
        result[key] = value
    return result


def refuse_lfs_pointer(path: Path) -> None:
    """ValueError if the file is the pointer that git leaves where the content was not downloaded."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path.name} is a Git LFS pointer, not the file itself: run `git lfs pull`, or "
                             "download the file")


# 2. write -----------------------------------------------------------------------------------------------

def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any new file (safetensors excludes other users)."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata or {"format": "pt"})
    path.chmod(mode)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A new file to write to, which takes the place of `path` at the end if there was no error."""
    path = Path(os.path.realpath(path))  # a symbolic link stays; the file that it leads to is replaced
    remove_leftovers(path, ())
    new, _ = temporary_names(path)
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def replace_folder(folder: Path, own_files: tuple[str, ...], may_exist: bool = True) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` at the end if there was no error.

    `own_files` are the patterns of the files that are not kept from the former content. ValueError if the
    folder cannot be written; then its content is unchanged.
    """
    named = folder
    folder = Path(os.path.realpath(folder))  # a symbolic link stays; the folder that it leads to is replaced
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{named} is not a folder: give another name, or move it away")
    new, old = temporary_names(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, own_files)
        new.mkdir()
        yield new
        if folder.exists() and not may_exist:
            raise FileExistsError("it exists already")
        swap(folder, new, old)
        remove_old(old, folder, own_files)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{named} cannot be written ({error}): free some space. Its previous content is "
                         "unchanged") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def swap(folder: Path, new: Path, old: Path) -> None:
    """Move `folder`, if it exists, to `old`, and `new` to `folder`.

    A process that is killed between the two leaves both of them whole (finish_swap).
    """
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise


def finish_swap(folder: Path) -> None:
    """If a process was killed within `swap`, so that `folder` is missing: move the new content there."""
    folder = Path(os.path.realpath(folder))
    if folder.exists():
        return
    for old in leftovers(folder):
        new = old.with_suffix(".new")
        if old.suffix == ".old":
            os.rename(new if new.exists() else old, folder)
            return


def remove_leftovers(path: Path, own_files: tuple[str, ...]) -> None:
    """Remove what killed processes left behind when they wrote `path`."""
    finish_swap(path)
    for leftover in leftovers(path):
        if leftover.suffix == ".old":
            remove_old(leftover, path, own_files)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def remove_old(old: Path, folder: Path, own_files: tuple[str, ...]) -> None:
    """Remove the former content of a folder. Files that are not `own_files` are moved to `folder`."""
    if not old.is_dir():
        return
    for path in old.iterdir():
        is_own = path.is_file() and any(path.match(pattern) for pattern in own_files)
        if is_own:
            path.unlink()
        elif not os.path.lexists(folder / path.name):
            os.rename(path, folder / path.name)
    with suppress(OSError):  # it stays if it is not empty
        old.rmdir()


# 3. temporary names -------------------------------------------------------------------------------------

def temporary_names(path: Path) -> tuple[Path, Path]:
    """Two hidden names beside `path` that nobody else has, for its new and its former content."""
    name = f".{path.name}.{host()}.{os.getpid()}.{secrets.token_hex(4)}"
    return path.with_name(name + ".new"), path.with_name(name + ".old")


def leftovers(path: Path) -> list[Path]:
    """Files and folders with temporary names of `path` whose process, of this machine, has ended."""
    pattern = rf"\.{re.escape(path.name)}\.{re.escape(host())}\.(\d+)\.[0-9a-f]{{8}}\.(new|old)"
    found = []
    if not path.parent.is_dir():
        return found
    for other in sorted(path.parent.iterdir()):
        match = re.fullmatch(pattern, other.name)
        if match and not is_running(int(match[1])):
            found.append(other)
    return found


def host() -> str:
    """The name of this machine, as a part of a file name."""
    return re.sub(r"[^\w-]", "_", socket.gethostname())


def is_running(pid: int) -> bool:
    """Whether there is another process with this number."""
    if pid == os.getpid():  # of an earlier process with the same number
        return False
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
