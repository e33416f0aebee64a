"""The generated pages are up to date, and what they say in words holds for the results."""
import importlib
import re
import shlex
import statistics

import pytest

from experiments import pages
from experiments.ablations import tables as ablations
from experiments.common.results import EXPERIMENTS
from experiments.decoding import tables as decoding
from experiments.methods import tables as methods
from experiments.scheduling import tables as scheduling
from experiments.shallow import tables as shallow
from experiments.speculative import tables as speculative
from experiments.speed import tables as speed
from experiments.unmasking import comparison
from experiments.unmasking import tables as unmasking
from training import cli

PAGES = pages.make_pages()
WITHDRAWN = (        # claims that the measurements do not support
    "24.5", "20.9", "93.1", "19.9", "9.0 ", "0.6 (", "42.2", "9.5", "alignment decides", "did not pay",
    "2.23 against", "-0.36", "-0.40",
)


def sentences(name: str) -> str:
    """A page without its tables, as one line."""
    text = PAGES[EXPERIMENTS / name / "README.md"]
    lines = [line.lstrip("> ") for line in text.splitlines() if not line.startswith("|")]
    return " ".join(" ".join(lines).split())


# 1. the files ---------------------------------------------------------------------------------------------

def test_the_pages_are_those_of_the_results():
    for path, text in PAGES.items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python -m experiments.pages"


def test_every_experiment_has_a_page():
    folders = {path.parent.name for path in EXPERIMENTS.glob("*/run.py")}
    assert folders == set(pages.NAMES)
    assert all(f"({name}/README.md)" in PAGES[EXPERIMENTS / "README.md"] for name in folders)


def test_every_link_leads_somewhere():
    links = 0
    for path, text in PAGES.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if not link.startswith("http"):
                assert (path.parent / link).exists(), (path, link)
                links += 1
    assert links > 40


@pytest.mark.parametrize("name", pages.NAMES)
def test_every_command_is_one_that_the_program_takes(name):
    program = importlib.import_module(f"experiments.{name}.run")
    commands = re.findall(r"^python -m (.*)$", PAGES[EXPERIMENTS / name / "README.md"], re.M)
    assert commands
    for command in commands:
        module, *flags = shlex.split(command)
        assert module == f"experiments.{name}.run"
        cli.parse(program.Options, flags, program.__doc__)


def test_pictures_are_small_and_shown():
    for path in EXPERIMENTS.glob("*/results/*.png"):
        assert path.stat().st_size < 200_000, path
        assert f"(results/{path.name})" in PAGES[path.parents[1] / "README.md"], path


# 2. what must not, and what must be said ------------------------------------------------------------------

@pytest.mark.parametrize("name", ["main_run", "methods", "ablations"])
def test_withdrawn_claims_are_not_made(name):
    text = sentences(name)
    assert not [claim for claim in WITHDRAWN if re.search(rf"(?<![\d.]){re.escape(claim)}", text)]


def test_the_pages_say_what_their_tables_do_not_show():
    text = sentences("methods")
    assert "An untrained copy of the teacher already meets `gen_nats` within 0.1" in text
    assert "gaps 0.0998, 0.0372 and 0.0802 on the three seeds" in text
    assert "align=paper had half the updates" in text and "four updates per rollout" in text
    assert "to be measured anew" in text
    text = sentences("ablations")
    assert "between evaluations at 1.31 and 1.82 tokens per forward pass" in text
    assert "the base row's 2.23 is 1.55 without the evaluation at level 0.4" in text
    assert "only 10 rollouts" in text and "without its length ramp" in text
    assert "against it the gain is 0.021" in sentences("unmasking")


# 3. what is said in words ---------------------------------------------------------------------------------

def test_the_words_about_the_methods_hold():
    results = pages.load_all("methods")["story_world"]
    at_1 = methods.best_rates(results["runs"], 1)
    assert {rate for name, rate in at_1.items() if name.endswith(", ar")} == {0.0025}
    rows = methods.rows_of(results, 1.5)
    valid = {name: statistics.mean(methods.end_values(runs, "valid", 1.5)) for name, runs in rows.items()}
    from_left = sorted((name for name in valid if name.endswith(", ar")), key=valid.get)
    assert set(from_left[:3]) == {"opdlm, ar", "opdlm-off, ar", "prefix, ar"}
    for run in results["runs"]:
        flags, name = run["settings"]["flags"], methods.row_name(run)
        if name != "sdar, published":
            updates = 240 if flags["align"] == "paper" else 960 if "x4" in name else 480
            assert run["points"][-1]["step"] == updates
            assert flags["updates_per_rollout"] == (1 if flags["source"] == "data" else 4)
    for metric, bound, cost in (("gen_nats", 0.1, 1.5), ("valid", 0.05, 1)):
        cell = methods.ratio(results, "warm_start, ar", "sdar, published", metric, bound, cost)
        assert min(map(float, re.findall(r"\d+\.\d", cell))) > 2
    real_text = pages.load_all("methods")["tinystories"]
    assert set(methods.best_rates(real_text["runs"], 1).values()) == {0.005}
    ends = {name: methods.end_gaps(runs) for name, runs in methods.rows_of(real_text, 1).items()}
    assert max(ends["warm_start, ar"]) < min(ends["opdlm, ar"] + ends["sdar, ar"])


def test_the_words_about_the_ablations_hold_in_both_readings():
    results = pages.load_all("ablations")["story_world"]

    def both(name):
        return [ablations.minus_base(results, name, without) for without in (None, ablations.MIDDLE_LEVEL)]
    for name in ("16 updates per rollout", "reverse KL", "Jensen-Shannon", "trained by threshold"):
        assert all(statistics.mean(values) > 0.25 for values in both(name)), name
    for name in ("random, block 4", "prefix, block 4"):
        assert all(min(values) < 0 < max(values) for values in both(name)), name
    with_level, without = both("1 update per rollout")
    assert max(with_level) < 0 and min(without) < 0 < max(without)
    for name in ("half of the updates on stories", "stories, weight 1/t"):
        assert all(max(values) < 0 for values in both(name)), name
    valid = {name: statistics.mean(ablations.values(results, name, "valid", 1)) for name in ablations.ROWS}
    assert valid["stories, mixed blocks, at 16"] > valid["stories, block 16"]
    assert valid["stories, mixed blocks, at 4"] < valid["stories, block 4"]
    assert valid["trained and sampled by threshold"] <= valid["visited, sampled by threshold"]


def test_the_words_about_decoding_hold():
    results = pages.load_all("decoding")["story_world"]
    blocks = decoding.by_block(results)
    for block in (4, 8):
        for seen in blocks[block]:
            rules = [x for name, x in seen.items() if name not in decoding.POINTS]
            assert seen["self"]["valid"] > max(x["valid"] for x in rules if x["tok_per_fwd"] >= 1.1)
    for seen in blocks.values():
        valid = {}
        for rule, names in decoding.names_by_rule(seen[0]).items():
            if decoding.is_bracketed(seen, names, 1.5):
                valid[rule] = statistics.mean(decoding.values_at(seen, names, "valid", 1.5))
                assert statistics.mean(decoding.values_at(seen, names, "speedup", 1.5)) < 1
        best_four = sorted(valid, key=valid.get)[-4:]
        assert set(best_four) == {"leftmost", "leftmost, any", "eb", "static, entropy"}


def test_the_words_about_speculative_decoding_hold():
    results = pages.load_all("speculative")["story_world"]
    for name in ("block 4, clean 0.5", "block 8, clean 0.5"):
        assert statistics.mean(speculative.speedups(results, name, "self")) < 1.05
    assert results["runs"][0]["points"][-1]["step"] == 320


def test_the_words_about_speed_hold():
    results = pages.load_all("speed")["cpu"]
    one = [row for row in results["rows"] if row["rule"] == "static:1"]
    assert all(row["forwards"] == row["tokens"] == 272 for row in one)
    assert max(statistics.median(row["over_ar"]) for row in one) < 1
    nets = {row["net"] for row in pages.load_all("speed")["cpu_peers"]["rows"]}
    assert nets == {"small, 4 x 128"} and all(speed.key_of(row)[3] for row in results["rows"])


def test_the_words_about_scheduling_hold():
    everything = pages.load_all("scheduling")
    for run in everything["story_world"]["runs"]:
        curves = run["curves"]
        assert min(curves["kl"]) > 0
        below = [t for t, nats in zip(curves["t"], curves["ce"]) if nats < 0]
        assert below == [1.0]                                   # only with everything masked
    for seed in scheduling.seeds_of(everything["tinystories"], 32):
        assert seed["derived"]["steps"] == seed["all early"]["steps"]
    assert min(scheduling.correlations(everything["tinystories"])) < 0


def test_the_words_about_a_light_model_inside_blocks_hold():
    results = pages.load_all("shallow")["story_world"]
    runs = shallow.runs_of(results, 16)
    light, heavy = (statistics.mean(shallow.values(runs, name, "valid")) for name in ("light", "heavy"))
    assert light > heavy


@pytest.mark.parametrize("world, higher, unclear", [("blocks", ("1", "0.3"), ("0", "3", "10")),
                                                    ("whole", ("1", "0.3", "3"), ())])
def test_the_words_about_learned_unmasking_hold(world, higher, unclear):
    results = pages.load_all("unmasking")[world]
    gains = {gain["policy"].removeprefix("alpha "): gain for gain in results["gains"]}
    assert all(gains[alpha]["heuristics"][1] > 0 for alpha in higher)
    assert all(gains[alpha]["heuristics"][1] < 0 < gains[alpha]["heuristics"][2] for alpha in unclear)
    alphas = sorted({policy["alpha"] for policy in results["policies"]} - {None})
    nfe = [unmasking.mean_of(results, alpha, "nfe") for alpha in alphas]
    assert nfe == sorted(nfe, reverse=True)
    slow, usual = (unmasking.mean_of(results, 1, "valid", f"beta {beta}") for beta in (0.25, 1))
    assert slow < usual + 0.01
    expert = float(unmasking.milliseconds(results, unmasking.expert_of(results)))
    assert (float(unmasking.milliseconds(results, "policy")) < expert) == (world == "whole")
    if world == "blocks":
        assert gains["0"]["reward"][2] < 0 and gains["10"]["reward"][2] < 0
        assert gains["1"]["reward"][1] < 0 < gains["1"]["reward"][2]
    else:
        assert gains["10"]["heuristics"][2] < 0
        best = [comparison.best_rule(results, alpha) for alpha in (0.3, 1, 3)]
        assert best == ["leftmost:0.95 in 96", "eb:0.1 in 4, sliding", "eb:0.1 in 4, sliding"]
