"""Several conversions at a time, a core each."""
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from experiments.common.conversion import run, teacher_of
from experiments.common.job import Job


def prepare(job: Job) -> None:
    """See to it that the teacher is there, before two conversions ask for it at once."""
    teacher_of(job)


def run_all(jobs: list[Job], workers: int = 2) -> list[dict]:
    """Every job's result, in order. Prints progress and the time left."""
    results, begun, fresh = {}, time.perf_counter(), [job for job in jobs if not job.file.exists()]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(prepare, {job.seed: job for job in jobs}.values()))
        waiting = {pool.submit(run, job): job for job in sorted(jobs, key=lambda job: -max(job.points))}
        for n, future in enumerate(as_completed(waiting), 1):
            job, spent = waiting[future], time.perf_counter() - begun
            results[job.name, job.seed] = future.result()
            done = sum((job.name, job.seed) in results for job in fresh)
            left = spent / max(done, 1) * (len(fresh) - done)
            print(f"{n}/{len(jobs)} {job.name}, seed {job.seed} | {spent / 60:.0f} min, {left / 60:.0f} left",
                  flush=True)
    return [results[job.name, job.seed] for job in jobs]
