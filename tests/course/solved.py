"""The exercises of the course, solved: each with the answers of tests/course/solutions in it.

    python -m tests.course.solved 3 > answer.py         the solved exercise of lesson 3
"""
import ast
import sys
from pathlib import Path

from course import check
from training import cli

SOLUTIONS = Path(__file__).parent / "solutions"


def functions(source: str) -> dict[str, ast.FunctionDef]:
    """The functions of a file, by name."""
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def solved(number: int) -> str:
    """The text of a lesson's exercise, with the bodies of the answers where something was to write."""
    exercise = (check.lessons()[number] / "exercise.py").read_text()
    answers = (SOLUTIONS / f"lesson_{number}.py").read_text()
    lines = answers.splitlines(keepends=True)
    for name, function in functions(answers).items():
        end_of_signature = function.body[0].lineno - 1
        body = "".join(lines[end_of_signature:function.end_lineno])
        exercise = exercise.replace(f'    raise NotImplementedError("write me: {name}")\n', body)
    return exercise


def main(argv: list[str]) -> None:
    known = [str(number) for number in check.lessons()]
    if len(argv) != 1 or argv[0] not in known:
        raise ValueError(f"expected one lesson, a number from {known[0]} to {known[-1]}, got "
                         f"{' '.join(argv)!r}")
    print(solved(int(argv[0])), end="")


if __name__ == "__main__":
    sys.exit(cli.run(main))
