"""The course: the checks accept the solutions and refuse wrong answers; the pages keep their promises."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from course import check
from tests.course.mistakes import MISTAKES
from tests.course.solved import SOLUTIONS, functions, solved
from training import cli

ROOT = Path(__file__).parents[2]
COURSE = ROOT / "course"
LESSONS = check.lessons()
PLANTED = [(number, *mistake) for number in LESSONS for mistake in MISTAKES[number]]
NAMES = [f"{number}: {name}" for number, name, *_ in PLANTED]
QUICK = [1, 2, 3, 4, 5, 7]        # lessons whose demonstration takes seconds
NUMBER = r"\d+(?:\.\d+)?"
PAGES = [COURSE / "README.md", *(folder / "README.md" for folder in LESSONS.values())]
SECTIONS = ["What you will be able to do", "Predict first", "The idea", "The exercise",
            "Cause a failure", "Exam questions", "Answers"]


def run_check(capsys, *argv) -> tuple[int, str]:
    """(exit code, what it printed) of the check."""
    code = cli.run(check.main, [str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out + err


# 1. the checks --------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", LESSONS)
def test_a_solution_is_accepted(number, capsys, tmp_path):
    answer = tmp_path / "answer.py"
    answer.write_text(solved(number))
    code, text = run_check(capsys, number, answer)
    assert code == 0 and "All laws hold." in text, text
    assert text.count("law: ok") >= 3


@pytest.mark.parametrize("number", LESSONS)
def test_an_untouched_exercise_is_still_to_write(number, capsys):
    code, text = run_check(capsys, number)
    assert code == 1 and "still to write" in text and "law: ok" not in text, text


@pytest.mark.parametrize("number, name, old, new, said", PLANTED, ids=NAMES)
def test_a_wrong_answer_is_refused(number, name, old, new, said, capsys, tmp_path):
    source = solved(number)
    assert source.count(old) == 1, f"{name}: the text to replace stands {source.count(old)} times"
    answer = tmp_path / "answer.py"
    answer.write_text(source.replace(old, new))
    code, text = run_check(capsys, number, answer)
    assert code == 1 and "law: BROKEN" in text, f"{name}: {text}"
    assert said in text and "hint:" in text, f"{name}: {text}"


@pytest.mark.parametrize("number", LESSONS)
def test_there_are_three_wrong_answers_and_each_has_its_own_message(number, capsys, tmp_path):
    mistakes = MISTAKES[number]
    assert len(mistakes) >= 3
    said = [mistake[-1] for mistake in mistakes]
    assert len(set(said)) == len(said)


@pytest.mark.parametrize("number", LESSONS)
def test_a_solution_writes_only_the_functions_of_the_exercise(number):
    """All functions to write, with their arguments; of the exercise, every other line stays."""
    stub = (LESSONS[number] / "exercise.py").read_text()
    answers = functions((SOLUTIONS / f"lesson_{number}.py").read_text())
    to_write = re.findall(r"write me: (\w+)", stub)
    assert list(answers) == to_write
    for name in to_write:
        assert ast.dump(answers[name].args) == ast.dump(functions(stub)[name].args)
    kept = [line for line in stub.splitlines() if "raise NotImplementedError" not in line]
    missing = [line for line in kept if line not in solved(number).splitlines()]
    assert missing == [] and "NotImplementedError" not in solved(number)


# 2. the command ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("source, said", [
    ("def f(:\n", "line 1"),
    ("x = 1\n", "has no"),
    ("x = 1 / 0\n", "ZeroDivisionError"),
    ("raise SystemExit(0)\n", "cannot be run"),
    ("\0", "expected a file of Python code"),
])
def test_a_file_that_is_no_exercise_is_refused_in_one_sentence(source, said, capsys, tmp_path):
    answer = tmp_path / "answer.py"
    answer.write_text(source)
    code, text = run_check(capsys, 1, answer)
    assert code == 2 and said in text and text.count("\n") == 1, text


@pytest.mark.parametrize("argv, said", [
    (["9"], "there is no lesson '9'"),
    (["x"], "there is no lesson 'x'"),
    (["1", "no/such/file.py"], "there is no file no/such/file.py"),
    (["1", "a.py", "b.py"], "got 3 words"),
])
def test_wrong_use_is_one_sentence(argv, said, capsys):
    code, text = run_check(capsys, *argv)
    assert code == 2 and said in text and text.count("\n") == 1, text


def test_an_exception_is_shown_with_the_line_of_the_learner(capsys, tmp_path):
    source = (LESSONS[1] / "exercise.py").read_text()
    broken = re.sub(r"raise NotImplementedError\(.*\)", "return tokens_of_my_own", source)
    answer = tmp_path / "answer.py"
    answer.write_text(broken)
    code, text = run_check(capsys, 1, answer)
    assert code == 1 and "return tokens_of_my_own" in text and "NameError" in text, text
    assert "Traceback" not in text


def test_a_loop_that_never_ends_is_stopped(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "LIMIT", 0.2)
    source = (LESSONS[1] / "exercise.py").read_text()
    answer = tmp_path / "answer.py"
    answer.write_text(re.sub(r"raise NotImplementedError\(.*\)", "while True: pass", source))
    code, text = run_check(capsys, 1, answer)
    assert code == 1 and "no answer after 0.2 seconds" in text and "while True" in text, text


def test_the_check_works_from_any_folder(tmp_path):
    command = [sys.executable, str(COURSE / "check.py"), "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and "still to write" in result.stdout, result.stderr


# 3. the pages -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", LESSONS)
def test_a_lesson_has_its_sections_and_a_small_picture(number):
    page = (LESSONS[number] / "README.md").read_text()
    heads = re.findall(r"^## (.+)$", page, re.M)
    assert heads == SECTIONS
    assert "](picture.png)" in page
    assert (LESSONS[number] / "picture.png").stat().st_size <= 60_000
    questions = page.partition("## Exam questions")[2].partition("## Answers")
    assert len(re.findall(r"^[12]\. ", questions[0], re.M)) == 2
    assert len(re.findall(r"^[12]\. ", questions[2], re.M)) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for file in re.findall(r"\b(?:python|cp|pytest) ([\w/.]+\.py)\b", text):
        assert (ROOT / file).is_file(), file
    for number, file in re.findall(r"check\.py (\d)(?: (course/\S+\.py))?", text):
        assert int(number) in LESSONS
        assert not file or (ROOT / file).parent == LESSONS[int(number)], file
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    assert max(map(len, lines)) <= 120


def without_numbers(line: str) -> str:
    return re.sub(NUMBER, "#", line)


@pytest.mark.parametrize("number", QUICK)
def test_a_page_shows_what_the_solved_demonstration_prints(number, capsys, tmp_path):
    """Numbers may differ by 5 %: other processors round differently, and a text may change after that."""
    page = (LESSONS[number] / "README.md").read_text()
    section = page.partition("## The exercise")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", section, re.M | re.S)
    shown = [line for language, block in blocks if not language for line in block.splitlines()]
    assert len(shown) >= 3
    answer = tmp_path / "answer.py"
    answer.write_text(solved(number))
    check.load(answer).demonstration()
    printed = capsys.readouterr().out.splitlines()
    printed = [line for line in printed if without_numbers(line) in map(without_numbers, shown)]
    assert len(printed) == len(shown)
    for line, other in zip(shown, printed):
        assert without_numbers(line) == without_numbers(other)
        numbers, others = ([float(x) for x in re.findall(NUMBER, text)] for text in (line, other))
        assert numbers == pytest.approx(others, rel=0.05), other


def test_the_course_page_names_every_lesson():
    page = (COURSE / "README.md").read_text()
    for folder in LESSONS.values():
        assert f"]({folder.name}/README.md)" in page


def test_every_lesson_has_a_drawing():
    from course import pictures
    assert list(pictures.PICTURES) == list(LESSONS)
