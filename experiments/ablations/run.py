"""What each choice of the conversion is worth: one thing changed at a time, same teachers, same number of
updates.

    python -m experiments.ablations.run             the story world, three seeds: 90 minutes on two cores
    python -m experiments.ablations.run --quick     does it run at all? a minute

Text is compared at equal cost, at 1.5 and 2 tokens per forward pass, by the rule that a row is sampled with:
leftmost, except where the row says otherwise. Rows that learn from the student's own text have a learning
rate of 0.005, rows that learn from stories 0.02. Writes experiments/ablations/results/story_world.json and
.png.
"""
import sys
from dataclasses import dataclass, replace

from experiments.ablations.rows import ROWS, job_name
from experiments.ablations.tables import plot, table
from experiments.common.conversion import convert_all
from experiments.common.job import Job, quick_job
from experiments.common.results import run_info, save_results
from training import cli


@dataclass
class Options:
    quick: bool = False  # tiny models, four updates: does it run at all?
    seeds: int = 3  # teachers, and conversions of each
    updates: int = 160  # updates of 16 rows, of every row


def jobs_of(options: Options) -> list[Job]:
    """One job per conversion and seed, with the samplers of all rows that are about it."""
    rows, samplers = {}, {}
    for name, row in ROWS.items():
        rows.setdefault(job_name(name), row)
        samplers.setdefault(job_name(name), {}).update(dict.fromkeys(row.samplers))
    jobs = []
    for seed in range(options.seeds):
        for name, row in rows.items():
            job = Job(
                name=name,
                seed=seed,
                flags=row.flags,
                eval_steps=(options.updates,),
                samplers=tuple(samplers[name]),
                recipes=row.recipes,
                prepare_student=row.prepare_student,
                stories=128,
            )
            jobs.append(quick_job(job) if options.quick else job)
    return jobs


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4)
    results = run_info("ablations", options)
    results["runs"] = convert_all(jobs_of(options))
    save_results("ablations", "story_world", results, plot, options.quick)
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
