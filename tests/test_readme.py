"""What the README says of files, flags and the debugger is true."""
import json
import re
import statistics
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import opdlm
import sample
import train_tiny
from experiments.ablations import run as ablations
from experiments.common.results import by_row, cell
from experiments.decoding import tables as frontier
from experiments.main_run import run as tiny
from experiments.memory import run as memory
from experiments.methods import tables as reaching
from experiments.scheduling import tables as savings
from experiments.shallow import tables as spending
from experiments.speculative import run as verified
from experiments.speed import tables as pace
from experiments.unmasking import hull
from experiments.unmasking import run as unmasking
from experiments.unmasking import tables as gains
from model.gpt import GPT, GPTConfig
from training import cli
from training.optim import Muon

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_link_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if not link.startswith("http")]
    assert len(links) > 10 and not [link for link in links if not (ROOT / link).exists()]


def test_every_number_said_first_stands_again_below():
    first, _, rest = TEXT.partition("\n![A story, a row a forward")
    said, below = (" ".join(text.split()) for text in (first.partition("What came out")[2], rest))
    numbers = re.findall(r"\d+\.\d+(?: \(\d+\.\d+ to \d+\.\d+\))?", said)
    assert len(numbers) == 18 and not [number for number in numbers if number not in below]


def test_every_function_named_is_there():
    names = re.findall(r"`opdlm\.(\w+)`", TEXT)
    assert len(names) >= 5 and not [name for name in names if not hasattr(opdlm, name)]


def test_every_flag_named_is_there():
    flags = {f.name for program in (train_tiny, sample, tiny, unmasking) for f in fields(program.Options)}
    named = set(re.findall(r"--(\w+)", re.sub(r"--index-url|--nproc_per_node|--nnodes|--rdzv_\w+", "", TEXT)))
    assert len(named) > 8 and named <= flags


def test_the_table_of_methods_is_the_one_in_the_code():
    rows = re.findall(r"^\| `([\w-]+)`[^|]* \| (student|teacher|data) \| (\w+) \| (\w+) \| (mean|1/t) \|$", TEXT, re.M)
    assert {name: tuple(dials) for name, *dials in rows} == opdlm.METHODS
    for name, *dials in rows:
        options = cli.parse(train_tiny.Config, [f"--preset={name}"], "", train_tiny.PRESETS)
        assert [options.text, options.states, options.target, options.weight] == dials and options.warm_steps == 0


def test_the_debugger_s_tour(tmp_path):
    """Every stop is made, in the function named, and every expression has a value."""
    command = re.search(r"^\$ python (-m pdb train_tiny.py .*)$", TEXT, re.M)[1].split()
    said = re.findall(r"^\(Pdb\) (.*)$", TEXT, re.M)
    command[2:3] = [str(ROOT / "train_tiny.py")]
    flags = [flag for flag in command if not flag.startswith("--out")]
    small = ["--layers=1", "--width=64", f"--out={tmp_path}"]
    run = subprocess.run([sys.executable, *flags, *small], input="\n".join(said) + "\n", capture_output=True, text=True,
                         cwd=ROOT, timeout=300, check=False,
                         env={"OMP_NUM_THREADS": "1", "PATH": "", "PYTHONPATH": str(ROOT)})
    stops = re.findall(r"> \S*opdlm\.py\(\d+\)(\w+)\(\)", run.stdout)
    assert stops == ["train", "advance", "rollout", "train_step", "student_logits", "train_step", "distill_loss",
                     "train_step"]
    assert sum(line.startswith("tbreak") for line in said) == 5
    assert "***" not in run.stdout, run.stdout[-2000:]
    assert "▢" in run.stdout


@pytest.mark.parametrize("name", ["toy", "text"])
def test_the_tables_are_made_of_the_results(name):
    results = json.loads((ROOT / "experiments" / name / "results.json").read_text())
    assert tiny.table(results) in TEXT


def test_the_methods_table_and_what_is_said_of_it_are_made_of_the_results():
    results = json.loads((ROOT / "experiments/methods/results.json").read_text())
    assert reaching.table(results) in TEXT
    said = " ".join(TEXT.split())
    whole, states = "whole recipe", "the same of texts in 4 states"
    for pair, cost, spent in ((whole, 1, "tokens"), (whole, 1, "flops"), (whole, 1.5, "tokens"), (states, 1, "tokens"),
                              (states, 1.5, "tokens"), (states, 1, "flops"), ("alignment and context", 1, "tokens"),
                              ("on-policy alone", 1, "tokens")):
        found = {what.partition(":")[0]: value for what, value in reaching.ratios(results, 0.1, cost, spent).items()}
        assert found[pair] in said, (pair, cost, spent)
    paper = [run for name, runs in reaching.rows_of(results, 1).items() if name.endswith("paper") for run in runs]
    assert all(reaching.over(run, "gen_nats", 1)(point) > 0.25 for run in paper for point in run["points"])


def test_what_is_said_of_real_text_is_made_of_the_results():
    results = json.loads((ROOT / "experiments/methods_text/results.json").read_text())
    assert reaching.short(results) in TEXT
    said = " ".join(TEXT.partition("**On real text**")[2].partition("\n## ")[0].split())
    found = {what.partition(":")[0]: value for what, value in reaching.ratios(results, 0.5, 1).items()}
    assert all(value.removeprefix("> ") in said for value in found.values()) and found["whole recipe"][0] == ">"
    ends = {name: [reaching.over(run, "gen_nats", 1)(run["points"][-1]) for run in runs]
            for name, runs in reaching.rows_of(results, 1).items()}
    assert all(a < b for a, b in zip(ends["opdlm, ar"], ends["sft, ar"]))
    assert max(ends["ours, ar"]) < min(ends["opdlm, ar"] + ends["sdar, ar"])
    assert {run["settings"]["flags"]["lr"] for runs in reaching.rows_of(results, 1).values() for run in runs} == {0.005}


def test_what_is_said_of_verified_text_is_made_of_the_results():
    results = json.loads((ROOT / "experiments/verified/results.json").read_text())
    assert verified.table(results) in TEXT and verified.times(results) in TEXT
    section = TEXT.partition("![Tokens a forward while the student learns]")[2].partition("\nForwards are")[0]
    section = " ".join(section.split())
    known = {value.strip() for row in verified.table(results).splitlines()[2:] for value in row.split("|")}
    begin = by_row(results["runs"])["block 4, clean 0.5"]
    known.add(cell([run["points"][0]["verifier=self"]["tok_per_fwd"] for run in begin], 2))
    said = re.findall(r"\d+\.\d+ \(\d+\.\d+ to \d+\.\d+\)", section)
    assert len(said) == 10 and set(said) <= known
    first = results["runs"][0]["points"][-1]
    assert first["step"] == 320 and "(305k response tokens)" in TEXT and abs(first["tokens"] / 1000 - 305) < 2


def test_what_is_said_of_verified_real_text_is_made_of_the_results():
    results = json.loads((ROOT / "experiments/verified_text/results.json").read_text())
    assert verified.table(results) in TEXT and verified.times(results) in TEXT
    points = list(zip(*(run["points"] for run in results["runs"])))
    for look, point in (("self", 4), ("self", 3), ("self temperature=0", 4)):
        said = cell([p[f"verifier={look}"]["tok_per_fwd"] for p in points[point]], 2)
        assert f"{said} " in TEXT.partition("A token of this text has")[2].partition("\n\n")[0].replace("\n", " ")
    assert [p[0]["step"] for p in points[3:]] == [160, 320] and 605e3 < points[4][0]["tokens"] < 615e3
    assert f"{statistics.mean(run['teacher']['val_nats'] for run in results['runs']):.1f}" == "2.4"
    ratios = [statistics.median(b / a for a, b in zip(run["seconds"]["ar"], run["seconds"]["self"]))
              for run in results["speeds"]]
    assert "AR's loop is three times as fast" in " ".join(TEXT.split()) and {round(x) for x in ratios} == {3}


def test_the_table_of_speed_is_made_of_the_results_and_says_what_is_said():
    results = json.loads((ROOT / "experiments/speed/results.json").read_text())
    assert pace.table(results, pace.peers()) in TEXT
    over = {pace.key_of(row): statistics.median(row["over_ar"]) for row in results["rows"]}
    one, two = ({key: x for key, x in over.items() if key[3] == rule} for rule in ("static:1", "threshold"))
    assert max(one.values()) < 1 and {key[:2] for key, x in two.items() if x > 1} == {("wide, 6 x 384", 1)}
    assert all(over[net, 1, 16, "static:4"] > 1 for net in ("small, 4 x 128", "wide, 6 x 384"))
    assert all(row["forwards"] == row["tokens"] for row in results["rows"] if row["rule"] == "static:1")
    faster = {(row["peer"], row["batch"]): [] for row in pace.peers()}
    for row in pace.peers():
        faster[row["peer"], row["batch"]].append(statistics.median(row["faster"]))
    for peer, batch, said in (("OPDLM's release", 32, "1.28 to 1.60"), ("dllm", 32, "1.87 to 5.78"),
                              ("OPDLM's release, copies free", 32, "1.22 to 1.30"), ("SDAR", 1, "0.73 to 1.01")):
        assert f"{min(faster[peer, batch]):.2f} to {max(faster[peer, batch]):.2f}" == said and said in TEXT
    took = json.loads((ROOT / "experiments/speed/peers.json").read_text())["microseconds"]["rows"]
    for whose, part, said in (("ours", "within", "1.2 to 1.5"), ("ours", "beside", "0.3 to 0.5"),
                              ("SDAR", "beside", "0.1")):
        some = {f"{row[part] / 1000:.1f}" for row in took if row["whose"] == whose}
        assert " to ".join(dict.fromkeys((min(some), max(some)))) == said and f"{said} ms" in " ".join(TEXT.split())


def test_what_is_said_of_model_scheduling_is_made_of_the_results():
    results = json.loads((ROOT / "experiments/scheduling/results.json").read_text())
    tables, claims = [savings.table(results, steps) for steps in (32, 128)], savings.claims(results)
    section = TEXT.partition("\n## Model scheduling")[2].partition("\n**On real text**")[0]
    assert all(table in section for table in tables)
    cells = {value.strip() for row in "\n".join(tables).splitlines() for value in row.split("|")}
    number = r"\d+\.\d+ \(\d+\.\d+ to \d+\.\d+\)"
    known = {found for text in (*cells, *claims) for found in re.findall(number, text)}
    said = re.findall(number, " ".join(section.rpartition("![")[2].split()))
    assert len(said) == 14 and set(said) <= known and {"16.67 %", "15.29 %"} <= cells
    runs, words = results["runs"], " ".join(section.split())
    short, long = ([savings.by_name(run, steps) for run in runs] for steps in (32, 128))
    for seen, name, begin in (
            (short, "derived", "the derived quarter loses "), (long, "derived", "At 128 steps it loses "),
            (short, "sandwich (paper)", "placement here**: it loses "), (short, "random", "drawn at random, "),
            (short, "middle", "the middle "), (short, "all late", "All late loses "), (short, "all early", "early ")):
        assert begin + cell([savings.lost(look, name) for look in seen], 2) in words, name
    assert max(round(512 * look["heavy"]["valid"]) for look in short) == 6 and "of 512 stories 6 hold at most" in words
    assert {f"{run['curves']['stories']['gen_nats']:.3f}" for run in runs} == {"0.305"}
    low = {run["curves"]["t"][k] for run in runs for name in ("ce", "kl")
           for k, value in enumerate(run["curves"][name]) if value < 0}
    assert low == {1.0} and all(0.005 < -run["curves"]["ce"][-1] < 0.015 for run in runs)
    sure = [round(-run["curves"]["ce"][-1] / run["curves"]["ce_error"][-1]) for run in runs]
    assert f"({min(sure)} to {max(sure)} standard errors)" in words


def test_what_is_said_of_model_scheduling_on_real_text_is_made_of_the_results():
    results = json.loads((ROOT / "experiments/scheduling_text/results.json").read_text())
    tables, claims = [savings.table(results, steps) for steps in (32, 128)], savings.claims(results)
    section = TEXT.partition("\n## Model scheduling")[2].partition("\n**Inside blocks**")[0]
    section = section.partition("\n**On real text**")[2]
    assert all(table in section for table in tables) and "below -2: 0 of" in claims[1]
    words, runs = " ".join(section.rpartition("![")[2].split()), results["runs"]
    short, long = ([savings.by_name(run, steps) for run in runs] for steps in (32, 128))
    lost = {(name, n): cell([savings.lost(look, name) for look in seen], 2)
            for n, seen in ((32, short), (128, long)) for name in ("derived", "sandwich (paper)")}
    assert f"loses {lost['derived', 32]} at 32 steps and {lost['derived', 128]} at 128" in words
    assert f"the sandwich {lost['sandwich (paper)', 32]} and {lost['sandwich (paper)', 128]}." in words
    number = r"-?\d+\.\d+ \(-?\d+\.\d+ to \d+\.\d+\)"
    known = {found for text in (*tables, *claims) for found in re.findall(number, text)}
    assert len(said := re.findall(number, words)) == 9 and set(said) <= known
    assert all(look["derived"]["steps"] == look["all early"]["steps"] for look in short)
    gaps = [look["light"]["gen_nats"] - look["heavy"]["gen_nats"] for look in short + long]
    errors = [look["derived"]["error"] / gap for look, gap in zip(short + long, gaps)]
    assert f"standard error of {min(errors):.2f} to {max(errors):.2f} by seed" in words


def test_what_is_said_of_a_light_model_inside_blocks_is_made_of_the_results():
    table = spending.table(json.loads((ROOT / "experiments/shallow/results.json").read_text()))
    said = " ".join(TEXT.partition(table)[2].partition("\n## ")[0].split())
    rows = {cells[1]: cells[2:-1] for cells in ([x.strip() for x in row.split("|")] for row in table.splitlines()[2:])}
    mixed = [row for name, row in rows.items() if "light " in name]
    for k in (-2, -1):
        means = [float(row[k].split()[0]) for row in mixed]
        assert f"{min(means):.2f} to {max(means):.2f} of" in said
    numbers = re.findall(r"\d\.\d+ \(\d\.\d+ to \d\.\d+\)", said)
    assert len(numbers) == 4 and set(numbers) <= {*rows["8, light"], *rows["8, heavy"]}
    assert float(rows["16, light"][0].split()[0]) > float(rows["16, heavy"][0].split()[0])


def learned_unmasking(world: str, begin: str, end: str) -> tuple:
    """A world's results, what is said below its tables, and its gains, as numbers and as they are said."""
    results = json.loads((ROOT / f"experiments/unmasking_{world}/results.json").read_text())
    section = TEXT.partition(begin)[2].partition(end)[0]
    tables = gains.table(results), gains.table_of_gains(results)
    assert all(table in section for table in tables) and f"{len(results['heuristics'])} heuristics" in section
    words, by = " ".join(section.rpartition("</details>")[2].split()), {row["policy"]: row for row in results["gains"]}
    of = {name: {key: gains.interval(x) for key, x in row.items() if key != "policy"} for name, row in by.items()}
    return results, words, by, of


def test_what_is_said_of_learned_unmasking_is_made_of_the_results():
    results, words, by, of = learned_unmasking("blocks", "\n## Learned unmasking", "\n**Over whole texts**")
    dominated = [gains.interval(results["volumes"][name]) for name in ("policies", "heuristics")]
    for said in (f"at alpha 1 {of['alpha 1']['reward']}, standard error {by['alpha 1']['reward'][3]:.3f}",
                 f"at alpha 3 {of['alpha 3']['reward']}", f"{of['alpha 0']['reward']} and {of['alpha 10']['reward']}.",
                 f"at alpha 1 {of['alpha 1']['heuristics']} more", f"at 0.3 {of['alpha 0.3']['heuristics']}",
                 f"of thresholds alone, {of['alpha 1']['thresholds']}",
                 " and ".join(dominated), f"shuffled {of['alpha 1']['shuffled']}",
                 f"each {of['alpha 1']['mean']} of reward less"):
        assert said in words, said
    assert all(by[f"alpha {alpha}"]["heuristics"][1] < 0 for alpha in (0, 3, 10))           # what can't be told
    sooner, clock = results["choices"]["sooner"], results["costs"]["seconds a token"]
    assert f"{sooner['a text']:.1f} slots" in words and "{:.2f} to {:.2f}".format(*sooner["sure"][::4]) in words
    fast = [f"{1000 * statistics.median(clock[name]):.2f}"
            for name in ("policy", "leftmost:0.7 in 8", "threshold:0.9", "ar")]
    assert "thinks {:.2f} ms".format(1000 * results["costs"]["seconds of the policy a step"]) in words
    assert "{} ms a token, leftmost:0.7 {}, threshold:0.9 {}, AR's loop {}.".format(*fast) in words
    nfe = [statistics.mean(policy["looks"][""]["nfe"] for policy in hull.policies(results)[f"alpha {alpha}"])
           for alpha in (0, 0.3, 1, 3, 10)]
    assert nfe == sorted(nfe, reverse=True) and f"from {nfe[0]:.1f} at 0 to {nfe[-1]:.1f} at 10" in words
    shown = [policy["looks"] for policy in hull.policies(results)["alpha 1"]]
    slow, usual = ([statistics.mean(looks[f"beta {beta}"][what] for looks in shown) for what in ("nfe", "valid")]
                   for beta in (0.25, 1))
    assert f"from {usual[0]:.1f} to {slow[0]:.1f}, and" in words and slow[1] < usual[1] + 0.01
    fair, collapsed = ([step[2] for step in run["log"][-20:]] for run in results["collapse"])
    assert statistics.mean(fair) > 0.1 and max(collapsed) == 0


def test_what_is_said_of_learned_unmasking_of_whole_texts_is_made_of_the_results():
    results, words, _, of = learned_unmasking("whole", "\n**Over whole texts**", "\n## ")
    dominated = {name: gains.interval(x) for name, x in results["volumes"].items()}
    for said in (f"at alpha 1 {of['alpha 1']['heuristics']} more", f"at 0.3 {of['alpha 0.3']['heuristics']}",
                 f"at 3 {of['alpha 3']['heuristics']}", f"Not at 10: {of['alpha 10']['heuristics']}",
                 f"at alpha 1 by {of['alpha 1']['reward']}, at 3 by {of['alpha 3']['reward']};",
                 f"leftmost:0.95 is best, {of['alpha 0.3']['reward']}.",
                 f"of thresholds alone, {of['alpha 1']['thresholds']}", f"of random rules {of['alpha 1']['random']}.",
                 f"policies dominate {dominated['policies']} of it, all heuristics {dominated['heuristics']}, "
                 f"the difference is {dominated['policies less heuristics']};",
                 f"alone {dominated['thresholds']}, the difference {dominated['policies less thresholds']}.",
                 f"shuffled {of['alpha 1']['shuffled']}", f"each {of['alpha 1']['mean']} of reward less"):
        assert said in words, said
    sooner, clock = results["choices"]["sooner"], results["costs"]["seconds a token"]
    assert f"{sooner['a text']:.1f} slots" in words and f"with p above {sooner['sure'][2]:.2f}" in words
    best = [hull.best_rule(results, alpha) for alpha in (0.3, 1, 3)]
    assert best == ["leftmost:0.95 in 96", "eb:0.1 in 4, sliding", "eb:0.1 in 4, sliding"]
    assert "thinks {:.2f} ms".format(1000 * results["costs"]["seconds of the policy a step"]) in words
    fast = [f"{1000 * statistics.median(clock[name]):.2f}"
            for name in ("policy", "leftmost:0.95 in 96", "threshold:0.9", "ar")]
    assert "{} ms a token, leftmost:0.95 {}, threshold:0.9 {}, AR's loop {}.".format(*fast) in words
    assert float(fast[0]) < float(fast[1])                              # faster than the rule that it began as
    nfe = [statistics.mean(policy["looks"][""]["nfe"] for policy in hull.policies(results)[f"alpha {alpha}"])
           for alpha in (0.3, 1, 3, 10)]
    assert nfe == sorted(nfe, reverse=True) and f"from {nfe[0]:.1f} at 0.3 to {nfe[-1]:.1f} at 10" in words
    shown = [policy["looks"] for policy in hull.policies(results)["alpha 1"]]
    slow, usual = ([statistics.mean(looks[f"beta {beta}"][what] for looks in shown) for what in ("nfe", "valid")]
                   for beta in (0.25, 1))
    assert f"from {usual[0]:.1f} to {slow[0]:.1f}, and" in words and slow[1] < usual[1] + 0.01


def test_what_is_said_of_quality_against_speed_is_made_of_the_results():
    results = json.loads((ROOT / "experiments/decoding/results.json").read_text())
    table, points = frontier.table(results), frontier.points(results)
    assert table in TEXT and points in TEXT
    section = " ".join(TEXT.partition("![Valid stories against")[2].partition("\n## ")[0].split())
    known = {value.strip() for row in (table + points).splitlines() for value in row.split("|")}
    said = re.findall(r"\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\)", section)
    assert len(said) == 5 and set(said) <= known
    seen = frontier.by_block(results)
    assert all(look["self"]["valid"] > max(look[name]["valid"] for name in look if name not in frontier.POINTS and
               look[name]["tok_per_fwd"] >= 1.1) for block in (4, 8) for look in seen[block])
    one = statistics.mean(look["static, largest static:1"]["valid"] for look in seen[4])
    faster = [float(row.split("|")[8].split()[0]) for row in table.splitlines()[2:] if row.split("|")[8].strip() != "-"]
    assert f"no better ({one:.2f})" in section and f"({min(faster):.2f} to {max(faster):.2f} times as fast)" in section


def test_the_ablations_table_and_what_is_said_of_it_are_made_of_the_results():
    results = json.loads((ROOT / "experiments/ablations/results.json").read_text())
    assert ablations.table(results) in TEXT
    section = " ".join(TEXT.partition("\n- **Large blocks**")[2].partition("\n## ")[0].split())
    shares = [ablations.share_lost(results, f"stories, block {block}", cost) for block in (8, 16) for cost in (1.5, 2)]
    assert all(max(share) < 0.5 and cell(share, 2) in section for share in shares)
    rows = ablations.table(results).splitlines()[2:]
    known = {value.strip() for row in rows for value in row.split("|")} | {cell(share, 2) for share in shares}
    known |= {cell(ablations.numbers(results, name, "valid", 1), 2) for name in ablations.ROWS}
    said = re.findall(r"-?\d\.\d\d \(-?\d\.\d\d to -?\d\.\d\d\)", section)
    assert len(said) > 15 and set(said) <= known


def test_numbers_in_the_help_of_flags_are_means_of_the_ablations():
    results = json.loads((ROOT / "experiments/ablations/results.json").read_text())
    means = {value.split()[0] for row in ablations.table(results).splitlines()[2:] for value in row.split("|")[2:-2]}
    helps = [f.metadata["help"] for f in fields(train_tiny.Config)]
    said = [re.findall(r"\d\.\d\d\b", text.partition(". leftmost")[0]) for text in helps if "nats*" in text]
    assert len(said) >= 6 and all(set(some) <= means for some in said)


def test_the_memory_of_gpt2_xl_adds_up():
    with torch.device("meta"):
        net = GPT(GPTConfig(50257, 1024, 48, 25, 1600))
    count, matrices = (sum(p.numel() for p in some) for some in (net.parameters(), Muon(net).param_groups[0]["params"]))
    assert f"{count / 1e6:,.0f}M parameters" in TEXT
    parts = [[4 * count / n, 4 * count / n, (4 * matrices + 8 * (count - matrices)) / n, 2 * count, 2 * count]
             for n in (1, 8, 16)]
    for i, name in enumerate(("student, shards", "gradients", "Muon's", "student gathered", "teacher, bf16")):
        cells = " | ".join(f"{part[i] / 1e9:.1f}" for part in parts)
        assert re.search(rf"^\| {name}[^|]* \| {re.escape(cells)} \|$", TEXT, re.M), cells
    assert "| sum | " + " | ".join(f"{sum(part) / 1e9:.1f}" for part in parts) + " |" in TEXT


def test_what_compiling_is_worth_is_in_the_results():
    rows = json.loads((ROOT / "experiments/compiled/results.json").read_text())["rows"]
    ratios = [statistics.median(b / a for a, b in zip(row["plain"], row["compiled"])) for row in rows]
    assert f"take {min(ratios):.2f} to {max(ratios):.2f} of their time" in TEXT


def test_the_table_of_memory_is_made_of_the_results():
    results = json.loads((ROOT / "experiments/memory/results.json").read_text())
    rows = {(row["kl"], row["checkpointing"]): row["peak"] for row in results["rows"]}
    plain, full = (rows[kind, False] - rows["none", False] + results["table_gradient"] for kind in ("plain", "full"))
    assert memory.table(results) in TEXT and f"full is {plain / full:.1f} times less" in TEXT
    assert f"{results['rows'][0]['record']['places']} of them" in TEXT
    assert f"({results['table_gradient'] / memory.MB:.0f} MB)" in TEXT


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_ci_runs_the_readme_s_test_line():
    line = re.search(r"requirements.txt && (python -m pytest.*)$", TEXT, re.M)[1]
    script = (ROOT / ".ci/run").read_text()
    assert all(part.split(" ")[0] in script for part in line.split(" && "))
