"""What README.md and docs/ say of files, flags, functions, tables and the debugger is true."""
import ast
import importlib
import json
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

import opdlm
import sample
import train_tiny
from decoding import reveal
from experiments import harness
from model import checkpoint, masks
from model.gpt import GPT, GPTConfig
from model.masks import Layout
from training import cli
from training.optim import Muon
from unmasking import train as unmasking

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]
NUMBER = r"[0-9]+[.][0-9]+"
SPREAD = r"-?\d+\.\d+\s\(-?\d+\.\d+\sto\s-?\d+\.\d+\)"           # mean (smallest to largest)
PROGRAMS = {
    "train_tiny.py": (train_tiny.Config, train_tiny.PRESETS),
    "sample.py": (sample.Options, None),
    "unmasking.train": (unmasking.Config, None),
}


def results(name: str, file: str) -> dict:
    return json.loads((ROOT / "experiments" / name / "results" / file).read_text())


def results_pages() -> str:
    """The text of all generated pages, in one line."""
    pages = sorted((ROOT / "experiments").glob("*/README.md"))
    return " ".join(" ".join(page.read_text(encoding="utf-8").split()) for page in pages)


def rows_of_table(page: str, first_cell: str) -> list[list[str]]:
    """The rows, as cells, of the first table of a page whose head begins with `first_cell`."""
    lines = iter(TEXT[page].splitlines())
    for line in lines:
        if line.startswith(f"| {first_cell} |"):
            next(lines)                                          # |---|---|
            break
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows, f"{page} has no table that begins with {first_cell}"
    return rows


def code(cell: str) -> list[str]:
    """What stands between back quotes in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def flags_of_experiments() -> set[str]:
    flags = set()
    for path in sorted((ROOT / "experiments").glob("*/run.py")):
        module = importlib.import_module(f"experiments.{path.parent.name}.run")
        for name in ("Options", "Config"):
            if is_dataclass(getattr(module, name, None)):
                flags |= {field.name for field in fields(getattr(module, name))}
    return flags | {field.name for field in fields(harness.Options)}


# 1. the README's size and its numbers ------------------------------------------------------------------

def test_the_readme_has_at_most_200_lines():
    assert len(README.splitlines()) <= 200


def test_the_first_command_stands_within_the_first_20_lines():
    first = "\n".join(README.splitlines()[:20])
    assert "pip install -r requirements.txt && python train_tiny.py" in first
    assert "](experiments/main_run/results/story_world_states.png)" in first


def test_the_readme_has_at_most_30_decimal_numbers():
    assert len(re.findall(NUMBER, README)) <= 30


def test_every_decimal_number_of_the_readme_stands_on_another_page():
    pages = [text for name, text in TEXT.items() if name != "README.md"]
    known = {number for text in [*pages, results_pages()] for number in re.findall(NUMBER, text)}
    assert set(re.findall(NUMBER, README)) <= known


def test_every_number_of_the_readme_s_results_stands_on_a_results_page():
    section = README.partition("\n## What you should see")[2].partition("\n## The method")[0]
    numbers = set(re.findall(NUMBER, section))
    assert len(numbers) >= 15 and numbers <= set(re.findall(NUMBER, results_pages()))


@pytest.mark.parametrize("page", [page for page in TEXT if re.search(SPREAD, TEXT[page])])
def test_every_number_with_its_spread_stands_on_a_results_page(page):
    pages = results_pages()
    for number in re.findall(SPREAD, " ".join(TEXT[page].split())):
        assert number in pages, number


@pytest.mark.parametrize("page", ["README.md", "docs/reference.md"])
def test_the_closing_table_is_that_of_the_first_seed(page):
    numbers = results("main_run", "story_world.json")["runs"][0]["summary"]
    assert list(numbers) == ["ar", "before", "after", "speculative"]
    header = r"^( {18} +ar +before +after +speculative)\n"
    table = re.search(header + r"((?:\w+ +[\d. ]+.*\n)+)", TEXT[page], re.M)
    found = {line.split()[0]: line[:70] for line in table[2].splitlines()}
    assert len(found) >= 5
    for name, line in found.items():
        assert line == f"{name:18}" + "".join(f"{column[name]:13.3f}" for column in numbers.values())


def test_what_is_said_of_the_main_run_is_made_of_the_results():
    runs = [run["summary"] for run in results("main_run", "story_world.json")["runs"]]

    def cell(column: str, name: str) -> str:
        values = [run[column][name] for run in runs]
        return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    section = " ".join(TEXT["docs/results.md"].partition("\n## Main run")[2].partition("\n## ")[0].split())
    for column, name in (("speculative", "valid"), ("speculative", "tok_per_fwd")):
        assert cell(column, name) in section
    for column, name in (("after", "valid"), ("ar", "valid"), ("after", "tok_per_fwd")):
        assert cell(column, name) in section
        assert cell(column, name).split()[0] in README
    before, after = (cell(column, "val_nats").split()[0] for column in ("before", "after"))
    assert f"is the teacher's, {after}." in section and f"({before} before distillation)" in section
    text = results("main_run", "tinystories.json")["runs"][0]["summary"]
    for column, name in (("speculative", "tok_per_fwd"), ("speculative", "positions_per_tok"),
                         ("speculative", "bits_per_byte"), ("ar", "bits_per_byte")):
        assert f"{text[column][name]:.3f}" in section
    assert f"{text['speculative']['tok_per_fwd']:.1f} greedy tokens" in README
    assert f"{text['speculative']['tok_per_fwd']:.3f} greedy tokens" in TEXT["docs/speculative.md"]
    by_reveal_rule = results("main_run", "tinystories_student.json")["runs"][0]["summary"]
    for name in ("tok_per_fwd", "positions_per_tok"):
        assert f"{by_reveal_rule['after'][name]:.3f}" in section


# 2. links, functions, flags, commands ------------------------------------------------------------------

@pytest.mark.parametrize("page", TEXT)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", TEXT[page])
    assert links or page == "docs/debugger.md"
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in anchors, link


def test_every_page_of_docs_is_linked_in_the_readme_or_by_a_page_that_is():
    linked = {link for text in TEXT.values() for link in re.findall(r"\]\((?:docs/)?(\w+\.md)", text)}
    assert {page.name for page in PAGES[1:]} <= linked


def test_every_function_named_is_there():
    names = {name for text in TEXT.values() for name in re.findall(r"\bopdlm\.([a-zA-Z]\w+)", text)} - {"py"}
    assert len(names) >= 15
    assert not [name for name in names if not hasattr(opdlm, name)]


def test_every_flag_named_is_there():
    known = flags_of_experiments()
    for config, _ in PROGRAMS.values():
        known |= {field.name for field in fields(config)}
    others = r"--(?:index-url|nproc_per_node|nnodes|rdzv_\w+|help|flag)\b"
    for page, text in TEXT.items():
        named = set(re.findall(r"--(\w+)", re.sub(others, "", text)))
        assert named <= known, (page, named - known)


def commands() -> list[tuple[str, str]]:
    """(program, flags) of all commands in the blocks of code of all pages."""
    found = []
    for text in TEXT.values():
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.search(r"(train_tiny\.py|sample\.py|unmasking\.train)\b([^#&]*)", line)
                if match:
                    found.append((match[1], match[2].strip()))
    return found


@pytest.mark.parametrize(("program", "flags"), sorted(set(commands())))
def test_every_command_is_accepted_by_its_program(program, flags):
    config, presets = PROGRAMS[program]
    parsed = cli.parse(config, shlex.split(flags), "", presets)
    if program == "train_tiny.py":
        train_tiny.make_recipe(parsed, eot=0)


def test_all_that_the_code_imports_is_required():
    """requirements.txt names every library outside the standard one that a file outside tests/ imports.

    One is optional: a single file imports it, not at its top, and a page says how to install it. The file
    in model/remote/ is run by transformers.
    """
    required = set(re.findall(r"^(\w+)", (ROOT / "requirements.txt").read_text(), re.M))
    own = {path.stem if path.suffix else path.name for path in ROOT.iterdir()}
    folders = ("model", "decoding", "unmasking", "training", "data", "report", "experiments")
    files = [*ROOT.glob("*.py"), *(file for name in folders for file in (ROOT / name).rglob("*.py"))]
    imported = set()
    optional = []
    for file in files:
        if file == checkpoint.REMOTE_CODE:
            continue
        source = file.read_text(encoding="utf-8")
        if "lm_eval" in source:
            optional.append(file.name)
            assert not re.search(r"^(import|from) lm_eval", source, re.M)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    packages = {{"PIL": "pillow"}.get(name, name) for name in imported}
    assert packages - own - set(sys.stdlib_module_names) - required == {"lm_eval"}
    assert optional == ["harness.py"] and "pip install lm-eval" in TEXT["docs/checkpoints.md"]
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text().splitlines()


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_ci_runs_the_readme_s_test_line():
    line = re.search(r"pip install -r requirements-dev.txt && (python -m pytest.*)$", README, re.M)[1]
    script = (ROOT / ".ci/run").read_text()
    for leaves_no_files in (" -p no:cacheprovider", " --no-cache"):
        script = script.replace(leaves_no_files, "")
    assert set(line.split(" && ")) <= set(script.splitlines())


# 3. tables that say what the code is -------------------------------------------------------------------

def test_the_table_of_methods_is_the_one_in_the_code():
    rows = rows_of_table("README.md", "`--preset`")
    assert {code(name)[0]: tuple(dials) for name, *dials in rows} == opdlm.METHODS
    for name, *dials in rows:
        config = cli.parse(train_tiny.Config, [f"--preset={code(name)[0]}"], "", train_tiny.PRESETS)
        assert [config.source, config.states, config.target, config.weight] == dials
        assert config.warm_steps == 0


def test_the_tables_of_sources_states_and_weights_are_those_in_the_code():
    text = TEXT["docs/method.md"]
    rows = [row for line in text.splitlines()
            if (row := re.match(r"\| `([\w/-]+)`(?: \(default[\w `-]*\))? \| `opdlm\.(\w+)` \|", line))]
    named = {row[1]: getattr(opdlm, row[2]) for row in rows}
    assert named == opdlm.SOURCES | opdlm.STATES | opdlm.WEIGHTS
    weights = {source: defaults["weight"] for source, defaults in train_tiny.BY_SOURCE.items()}
    assert weights == {"student": "first", "student-ar": "mean"}
    assert "| `mean` (default of `student-ar`) |" in text and "| `first` (default of the others) |" in text


def test_the_table_of_the_layout_is_the_one_in_the_code():
    config = train_tiny.Config()
    paper = cli.parse(train_tiny.Config, ["--preset=paper"], "", train_tiny.PRESETS)
    layouts = [masks.AR, *(Layout.of(c.block, c.align, c.context) for c in (config, paper))]
    for name, *values, _ in rows_of_table("docs/method.md", "integer"):
        assert values == [str(getattr(layout, code(name)[0])) for layout in layouts]


def test_the_tables_of_rules_and_confidences_are_those_in_the_code():
    specs = [code(row[0])[0] for row in rows_of_table("docs/decoding.md", "rule")]
    names = [spec.partition(":")[0] for spec in specs]
    assert names.pop() == "policy" and set(names) == set(reveal.RULES)
    confidences = [code(row[0])[0] for row in rows_of_table("docs/decoding.md", "`--confidence`")]
    assert confidences == list(reveal.CONFIDENCE)
    defaults = re.search(r"takes its default: (.*?)\.\s", TEXT["docs/decoding.md"], re.S)[1]
    for spec in code(defaults):
        assert float(spec.partition(":")[2]) == reveal.parse(spec.partition(":")[0]).argument
    assert [spec.partition(":")[0] for spec in code(defaults)] == names


def test_the_table_of_renamed_flags():
    now = {field.name for field in fields(train_tiny.Config)}
    policy = {field.name for field in fields(unmasking.Config)}
    for old, new in rows_of_table("docs/reference.md", "old"):
        names = code(old)
        assert not now & set(names)
        for flag in re.findall(r"--(\w+)", new):
            assert flag in (policy if "unmasking" in new else now)


def test_the_keys_of_the_summary_are_explained():
    explained = {key for row in rows_of_table("docs/reference.md", "key") for key in code(row[0])}
    numbers = results("main_run", "story_world.json")["runs"][0]["summary"]
    assert set(numbers) == {"ar", "before", "after", "speculative"}
    assert {key for column in numbers.values() for key in column} <= explained


def test_the_memory_of_gpt2_xl_adds_up():
    with torch.device("meta"):
        net = GPT(GPTConfig(50257, 1024, 48, 25, 1600))
    count = sum(p.numel() for p in net.parameters())
    matrices = sum(p.numel() for p in Muon(net).param_groups[0]["params"])
    text = TEXT["docs/scaling.md"]
    assert f"{count / 1e6:,.0f}M parameters" in text
    parts = [[4 * count / n, 4 * count / n, (4 * matrices + 8 * (count - matrices)) / n, 2 * count, 2 * count]
             for n in (1, 8, 16)]
    for i, name in enumerate(("student, shards", "gradients", "Muon's", "student gathered", "teacher, bf16")):
        cells = " | ".join(f"{part[i] / 1e9:.1f}" for part in parts)
        assert re.search(rf"^\| {name}[^|]* \| {re.escape(cells)} \|$", text, re.M), cells
    assert "| sum | " + " | ".join(f"{sum(part) / 1e9:.1f}" for part in parts) + " |" in text


def test_what_compiling_is_worth_is_in_the_results():
    rows = results("compile", "cpu.json")["rows"]
    ratios = [statistics.median(b / a for a, b in zip(row["plain"], row["compiled"])) for row in rows]
    for page in ("docs/scaling.md", "docs/results.md"):
        assert f"take {min(ratios):.2f} to {max(ratios):.2f} of their time" in " ".join(TEXT[page].split())


def test_what_chunks_of_the_loss_are_worth_is_in_the_results():
    found = results("memory", "cpu.json")
    peaks = {row["kl"]: row["peak"] for row in found["rows"] if not row["checkpointing"]}
    plain, full = (peaks[kind] - peaks["none"] for kind in ("plain", "full"))
    table = found["table_gradient"]
    MB = 1e6 if f"({table / 1e6:.0f} MB)" in TEXT["docs/scaling.md"] else 2 ** 20
    for page in ("docs/scaling.md", "docs/results.md"):
        words = " ".join(TEXT[page].split())
        assert f"{plain / MB:.0f} MB" in words and f"{full / MB:.0f} MB" in words
    words = " ".join(TEXT["docs/scaling.md"].split())
    assert f"({table / MB:.0f} MB), `full` takes {(plain + table) / (full + table):.1f} times less" in words
    positions = found["rows"][0]["record"]
    assert f"{positions.get('places', positions.get('loss_positions'))} positions in the loss" in words


# 4. the debugger ---------------------------------------------------------------------------------------

def tour(page: str) -> tuple[str, list[str]]:
    """The command of a session, and the lines that are typed."""
    command = re.search(r"^\$ python (-m pdb train_tiny.py .*)$", TEXT[page], re.M)[1]
    return command, re.findall(r"^\(Pdb\) (.*)$", TEXT[page], re.M)


@pytest.mark.skipif(sys.version_info[:3] == (3, 13, 0), reason="its pdb takes the script's flags for its own")
def test_the_debugger_s_tour(tmp_path):
    """Every stop is made, in the function named, and every expression has a value."""
    command, lines = tour("docs/debugger.md")
    flags = [flag for flag in command.split() if not flag.startswith("--out")]
    flags[flags.index("train_tiny.py")] = str(ROOT / "train_tiny.py")
    small = ["--layers=1", "--width=64", "--length=32", f"--out={tmp_path}"]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, *flags, *small], input="\n".join(lines) + "\n", capture_output=True,
                         text=True, cwd=ROOT, timeout=600, check=False, env=environment)
    stops = re.findall(r"> \S*opdlm\.py\(\d+\)(\w+)\(\)", run.stdout)
    expected = ["train", "rollout", "find_response", "rollout", "train_step", "student_logits", "train_step",
                "distill_loss", "train_step"]
    assert stops == expected, run.stdout[-2000:] + run.stderr[-2000:]
    breakpoints = sum(line.startswith("tbreak") for line in lines)
    assert len(re.findall(r"Deleted breakpoint", run.stdout)) == breakpoints == 6
    assert "***" not in run.stdout, run.stdout[-2000:]
    assert "▢" in run.stdout


def test_the_readme_s_session_is_a_part_of_the_tour():
    command, lines = tour("README.md")
    whole_command, whole = tour("docs/debugger.md")
    assert command == whole_command and len(lines) == 6
    assert "\n".join(lines) in "\n".join(whole)
