"""The temperature of the text that a student learns from: its rates, predictions and page."""
import statistics

from experiments.common.results import load_results, results_path
from experiments.temperature import run, tables


def test_development_stories_are_not_those_of_the_numbers():
    trial = run.trial_of("stories", 0.01, run.Options())
    job = run.job_of("stories", 0.01, 0, run.Options())
    assert trial.first_story >= job.first_story + job.stories


def test_a_rate_is_scored_at_the_temperature_of_the_text():
    def trial(rate, at_0, at_1):
        point = {"verifier=self temperature=0": {"tok_per_fwd": at_0},
                 "verifier=self temperature=1": {"tok_per_fwd": at_1}}
        settings = {"name": f"trial, own text at 0, block 4, lr {rate}",
                    "flags": {"lr": rate, "temperature": 0}}
        return {"settings": settings, "points": [point]}

    rates = tables.best_rates([trial(0.01, 1.5, 2.0), trial(0.02, 1.6, 1.0)])
    assert rates == {"own text at 0": 0.02}


def results_of(speeds: dict, losses: dict) -> dict:
    """Results of one seed: by row, tokens per forward pass at 0, 0.7 and 1, and nats above the teacher."""
    runs = []
    for row, at in speeds.items():
        point = {"ar_nats": 2 + losses[row]}
        for sampler in tables.SAMPLERS:
            speed = at[tables.TEMPERATURES.index(float(sampler.rpartition("=")[2]))]
            point[sampler] = {"tok_per_fwd": speed, "distinct2": 0.5}
        settings = {"name": f"{row}, block 4, lr 0.01", "flags": {"lr": 0.01}}
        runs.append({"settings": settings, "points": [point, point], "teacher": {"val_nats": 2.0}})
    options = {"block": 4, "updates": 160, "stories": 64, "rates": "0.01", "rate": None}
    facts = {"command": "command", "commit": "0", "torch": "2", "python": "3", "device": "cpu", "threads": 1}
    return {**facts, "options": options, "runs": runs, "trials": []}


def test_predictions_about_temperature_are_judged_by_the_numbers():
    speeds = {"stories": (1.4, 1.4, 1.4), "own text at 0": (1.8, 1.5, 1.3),
              "own text at 0.7": (1.6, 1.6, 1.4), "own text at 1": (1.5, 1.5, 1.5)}
    losses = {"stories": 0.1, "own text at 0": 0.2, "own text at 0.7": 0.1, "own text at 1": 0.1}

    def verdicts(**changes):
        results = results_of(speeds | changes, losses)
        return [line.partition("**")[2].partition("**")[0] for line in tables.verdicts(results)]

    assert verdicts() == ["It held", "It held", "Not measured here", "It held"]
    assert verdicts(stories=(1.4, 1.4, 1.6))[0] == "It did not hold"
    assert verdicts(**{"own text at 1": (1.7, 1.5, 1.5)})[1] == "It did not hold"
    page = tables.page({"tinystories": results_of(speeds, losses)})
    assert "| own text at 0.7 | 0.01 | 1.60 | 1.60 | 1.40 | 1.60 |" in page
    assert "All rows have one learning rate, which was not searched." in " ".join(page.split())


def test_a_page_has_the_grid_of_rates():
    speeds = {"own text at 0": (1.8, 1.5, 1.3), "own text at 1": (1.5, 1.5, 1.5)}
    results = results_of(speeds, {"own text at 0": 0.2, "own text at 1": 0.1})
    for rate in (0.01, 0.02):
        trial = {**results["runs"][0], "settings": {"name": f"trial, own text at 0, block 4, lr {rate}",
                                                    "flags": {"lr": rate, "temperature": 0}}}
        results["trials"].append(trial)
    assert "| own text at 0 | 1.80, +0.20 | 1.80, +0.20 |" in tables.rates_table(results)
    assert "are the best of 0.01 on" in tables.rates_chosen(results)
    results["options"]["rate"] = 0.02
    assert "All rows have the learning rate 0.02." in tables.rates_chosen(results)
    section = "\n".join(tables.results_of(results, "story_world", "The story world"))
    assert section.startswith("## The story world") and "<details><summary>Learning rates" in section


def test_what_is_said_of_the_published_results():
    found = tables.groups(load_results(results_path("temperature", "tinystories")))

    def speed(row, temperature, verifier="self"):
        return statistics.mean(tables.tok_per_fwd(run, temperature, verifier) for run in found[row])

    def loss(row):
        return statistics.mean(tables.ar_loss(found[row]))

    cold, middle, hot = (f"own text at {temperature}" for temperature in tables.TEMPERATURES)
    assert min(speed(cold, 0), speed(middle, 0)) > 1.1 * max(speed(hot, 0), speed("stories", 0))
    assert 0.15 < 1 - speed(hot, 0) / speed(cold, 0) < 0.25                 # docs/method.md: about a fifth
    assert speed(middle, 0.7) > max(speed(cold, 0.7), speed(hot, 0.7))
    assert max(speed(row, 1) for row in found) < 1.05 * min(speed(row, 1) for row in found)
    assert loss(cold) > loss(middle) > loss(hot)
    assert all(speed(row, t, "teacher") < 1.35 for row in found for t in tables.TEMPERATURES)
