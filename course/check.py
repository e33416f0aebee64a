"""Check an exercise of the course: does the learner's file obey the laws of its lesson?

    python course/check.py 3                       lesson 3, the exercise.py in its folder
    python course/check.py 3 my_answer.py          lesson 3, another file
    python course/check.py                         all lessons, one after the other

A law is a statement that every right answer obeys, such as "cached logits equal uncached logits". At the
first broken law, the check prints the smallest input that breaks it, and a hint. It runs the code in the
file.

Exit code: 0 all laws hold, 1 a law is broken or a function is still to write, 2 wrong use (one sentence).
"""
import importlib
import signal
import sys
import threading
import traceback
import types
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))        # the project's root

from course.laws.common import Broken
from training import cli

COURSE = Path(__file__).resolve().parent
LIMIT = 60  # seconds that one law may take


def lessons() -> dict[int, Path]:
    """The folder of each lesson, by its number."""
    folders = sorted(COURSE.glob("[0-9][0-9]_*"))
    return {int(folder.name[:2]): folder for folder in folders}


def load(path: Path) -> types.ModuleType:
    """The learner's file as a module. ValueError in one sentence if Python cannot run it."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give the path of your exercise")
    source = path.read_bytes()
    try:
        code = compile(source, str(path), "exec")
    except SyntaxError as error:
        line = error.lineno or 1
        raise ValueError(f"{path}, line {line}: {error.msg}: expected a file of Python code") from None
    except ValueError as error:                                  # bytes that are no text
        raise ValueError(f"{path}: {error}: expected a file of Python code") from None
    module = types.ModuleType("exercise")
    module.__file__ = str(COURSE / "lesson" / path.name)         # exercises find the project's root from it
    sys.modules["exercise"] = module
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be run: {describe(error, path)}") from None
    return module


def describe(error: BaseException, path: Path) -> str:
    """An exception, with the last line of the learner's file that led to it."""
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if frame.filename == str(path)]
    if not mine:
        return f"{message} (raised in the check, from what your functions returned)"
    return f"line {mine[-1].lineno}: {mine[-1].line}\n    {message}"


@contextmanager
def time_limit(seconds: float):
    """TimeoutError after so many seconds, where the system can do it: a loop may never end."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError(f"no answer after {seconds:g} seconds; is there a loop that never ends?")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(number: int, path: Path) -> int:
    """Print what the laws of a lesson say of a file; returns the exit code 0 or 1."""
    laws = importlib.import_module(f"course.laws.lesson_{number}")
    mine = load(path)
    missing = [name for name in laws.WRITE if not hasattr(mine, name)]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}: keep the names of the exercise, and check the lesson")
    print(f"lesson {number}: {path}")
    for law in laws.LAWS:
        sentence = law.__doc__.splitlines()[0]
        try:
            with time_limit(LIMIT):
                law(mine)
        except NotImplementedError as error:
            print(f"still to write: {str(error).removeprefix('write me: ')}")
            return 1
        except Broken as broken:
            print(f"law: BROKEN  {sentence}")
            print(f"  counterexample: {broken.counterexample}")
            print(f"  hint: {broken.hint}")
            return 1
        except (Exception, SystemExit) as error:
            print(f"law: BROKEN  {sentence}")
            print(f"  your code stopped at {describe(error, path)}")
            return 1
        print(f"law: ok      {sentence}")
    print("All laws hold.")
    return 0


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0
    folders = lessons()
    if not argv:
        codes = [check(number, folder / "exercise.py") for number, folder in folders.items()]
        return max(codes)
    if len(argv) > 2:
        raise ValueError(f"expected a lesson and one file, got {len(argv)} words: "
                         "python course/check.py LESSON FILE")
    known = [str(number) for number in folders]
    if argv[0].lstrip("0") not in known:
        raise ValueError(f"there is no lesson {argv[0]!r}: give a number from {known[0]} to {known[-1]}")
    number = int(argv[0])
    path = Path(argv[1]) if len(argv) == 2 else folders[number] / "exercise.py"
    return check(number, path)


if __name__ == "__main__":
    sys.exit(cli.run(main))
