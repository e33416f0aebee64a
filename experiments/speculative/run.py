"""How many drafts are accepted: while the student learns, by the block it drafts, and by what it learns from.

    python -m experiments.speculative.run              the story world, three seeds: about an hour on two cores
    python -m experiments.speculative.run --quick      the plumbing, a minute
    python -m experiments.speculative.run --name=verified_text --data=FILE.txt --val_data=FILE.txt --length=128 --lr=0.005 \
        --rows="block 4, clean 0.5"

At the end, by one process: seconds a token beside those of AR with its cache. Leaves experiments/NAME/results.json
(every seed, every number, the commit) and curves.png.
"""
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

from data.tinystories import stories
from experiments.common import changes
from experiments.common.conversion import opened, teacher_of
from experiments.common.job import Job, tiny, without_paths
from experiments.common.pool import run_all
from experiments.common.results import by_row, cell, finish, head
from experiments.common.students import in_turns, student
from report import generate, metrics
from training import cli

LOOKS = tuple(f"verifier={verifier}{cold}" for verifier in ("self", "teacher") for cold in ("", " temperature=0"))
LEFT = {"source": "data", "states": "prefix", "target": "teacher", "weight": "first"}
DRAFTS = LEFT | {"weight": "mean"}      # and all of a block masked: that is where drafts come from
ROWS = {                                # flags, and a change of the recipe
    **{f"block {block}": (DRAFTS | {"block": block}, changes.all_masked) for block in (4, 8, 16)},
    **{f"block {block}, clean 0.5": (DRAFTS | {"block": block, "clean_weight": 0.5}, changes.all_masked)
       for block in (4, 8)},
    "block 4, one-hot": (DRAFTS | {"target": "onehot"}, changes.all_masked),
    "block 4, left parts": (LEFT, None)}
TIMED, TURNS = ("block 4, clean 0.5", "block 8, clean 0.5"), 5


@dataclass
class Options:
    name: str = "verified"  # of the results: experiments/NAME
    data: str = "toy"  # --data of train_tiny.py
    val_data: str | None = None  # --val_data of train_tiny.py
    rows: str = ';'.join(ROWS)  # which, apart by semicolons
    quick: bool = False  # tiny models, four updates: whether it runs at all
    seeds: int = 3  # teachers, and conversions of each
    updates: int = 320  # of 16 rows, of every row; looked at after all, half, a quarter, an eighth, none
    stories: int = 64  # that a look is made of
    length: int | None = None  # --length of train_tiny.py
    lr: float = 0.01  # --lr of train_tiny.py

    def __post_init__(self):
        if not set(self.rows.split(";")) <= set(ROWS):
            raise ValueError(f"--rows={self.rows}: wanted are some of {';'.join(ROWS)}")


def job_of(name: str, seed: int, options: Options) -> Job:
    text = {} if options.data == "toy" else {"data": options.data, "val_data": options.val_data}
    text |= {"length": options.length} if options.length else {}
    (flags, change), last = ROWS[name], options.updates
    points = (0, *sorted({last >> k for k in range(4) if last >> k}))
    job = Job(f"{options.name}, {name}", seed, flags | text | {"lr": options.lr}, points, LOOKS, change,
              stories=options.stories, folder="full" if options.data == "toy" else options.name)
    return tiny(job) if options.quick else job


def speeds(job: Job) -> dict[str, list[float]]:
    """Seconds a token of 8 texts, verified by the student itself and by its teacher, and AR's; a number a turn."""
    (net, layout), teacher, (_, corpus) = student(job), teacher_of(job), opened(job)
    eot = corpus.tokenizer.eot
    held = metrics.held_out(corpus.val, stories(corpus.val, eot), 8, teacher.config.context)
    writers = {"self": generate.speculative_generator(net, layout), "teacher": generate.speculative_generator(net, layout, teacher)}
    return in_turns(writers, teacher, held, eot, job.seed, TURNS)


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4)
    results = head(f"verified --name={options.name}", options)
    names = options.rows.split(";")
    runs = run_all([job_of(name, seed, options) for name in names for seed in range(options.seeds)])
    for run in runs:
        _, _, run["settings"]["name"] = run["settings"]["name"].partition(", ")
    timed = [job_of(name, seed, options) for name in TIMED if name in names for seed in range(options.seeds)]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(student, timed))
    results["runs"] = without_paths(runs)
    results["speeds"] = [{"name": job.name.partition(", ")[2], "seconds": speeds(job)} for job in timed]
    finish(options.name, results, draw, options.quick)
    print(table(results), times(results), sep="\n\n")


def table(results: dict) -> str:
    """Markdown: a row a way to convert; after the last update tokens a forward, positions a token, and what became of
    the AR model that verifies itself: its nats, and in the story world the share of its texts that is valid."""
    heads = ["`tok_per_fwd`, verified by itself", "greedy", "by the teacher", "greedy", "`positions_per_tok`, itself",
             "teacher", "`val_nats` as an AR model, less the teacher's", "`valid`, itself", "teacher"]
    toy = "valid" in results["runs"][0]["teacher"]
    lines = [f"| | {' | '.join(heads if toy else heads[:-2])} |", "|---|" + "---|" * len(heads if toy else heads[:-2])]
    for name, runs in by_row(results["runs"]).items():
        last = [run["points"][-1] for run in runs]
        cells = [cell([p[look]["tok_per_fwd"] for p in last], 2) for look in LOOKS]
        cells += [cell([p[look]["positions_per_tok"] for p in last], 1) for look in LOOKS[::2]]
        cells.append(cell([p["ar_nats"] - run["teacher"]["val_nats"] for p, run in zip(last, runs)]))
        cells += [cell([p[look]["valid"] for p in last], 2) for look in LOOKS[::2]] if toy else []
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def times(results: dict) -> str:
    """Markdown: a row a student that was timed; how many times as fast as AR with its cache, one text at a time."""
    lines = ["| | AR, ms a token | verified by itself | by the teacher |", "|" + "---|" * 4]
    for name in dict.fromkeys(run["name"] for run in results["speeds"]):
        some = [run["seconds"] for run in results["speeds"] if run["name"] == name]
        cells = [cell([1000 * statistics.median(x["ar"]) for x in some], 2)]
        cells += [cell([statistics.median(a / b for a, b in zip(x["ar"], x[way])) for x in some], 2)
                  for way in ("self", "teacher")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict, figure) -> None:
    """Tokens a forward against the tokens learned from, a line a row, a band of its seeds."""
    for axes, look in zip(figure.subplots(1, 2), ("verifier=self", "verifier=teacher")):
        for name, runs in by_row(results["runs"]).items():
            points = list(zip(*(run["points"] for run in runs)))
            x = [statistics.mean(p["tokens"] for p in some) for some in points]
            y = [[p[look]["tok_per_fwd"] for p in some] for some in points]
            axes.plot(x, [statistics.mean(some) for some in y], marker=".", label=name)
            axes.fill_between(x, list(map(min, y)), list(map(max, y)), alpha=0.15)
        axes.set_xscale("symlog", linthresh=1e4)
        axes.set(xlabel="response tokens trained on", title=look.replace("verifier=", "verified by "))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("tokens a forward")
    figure.axes[0].legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(cli.run(main))
