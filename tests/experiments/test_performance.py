"""The measurement of a GPU: it runs from end to end, and its page says what was measured and what was not."""
import json
import re
from types import SimpleNamespace

import pytest
import torch

from experiments import pages
from experiments.common import results as common
from experiments.common import timing
from experiments.performance import gpu, pieces, run, tables
from report import metrics

CPU = torch.device("cpu")
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The results file of a quick run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("quick"))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        run.main(["--quick"])
        folder = common.output_folder("performance", quick=True)
        assert (folder / "gpu.png").stat().st_size > 5000
        return json.loads((folder / "gpu.json").read_text())


# 1. the quick run -----------------------------------------------------------------------------------------

def test_the_quick_run_measures_every_piece(quick):
    assert quick["command"] == "python -m experiments.performance.run --quick=True"
    assert set(quick) >= {"commit", "torch", "python", "device", "threads", "options", "minutes"}
    assert [row["piece"] for row in quick["training"]] == list(pieces.PIECES)
    modes = ["AR", "leftmost:0.98", "static:2", "static:4", "speculative"]
    expected = [(batch, mode) for batch in run.TINY.decoding for mode in modes]
    assert [(row["batch"], row["mode"]) for row in quick["decoding"]] == expected
    for row in quick["training"] + quick["decoding"]:
        assert len(row["seconds"]) == len(row["records"]) == 2 and min(row["seconds"]) > 0
        assert row["peak"] is None                               # of a CPU


def test_all_ways_of_decoding_generate_the_same_number_of_tokens(quick):
    assert pieces.NO_EOT not in range(run.TINY.network.vocab)
    R = run.TINY.response
    passes = {"AR": R, "leftmost:0.98": R, "static:2": R // 2, "static:4": R // 4}
    for row in quick["decoding"]:
        for record in row["records"]:
            assert record["tokens"] == row["batch"] * R
            assert record["forwards"] == passes.get(row["mode"], record["forwards"])
            assert R / 4 <= record["forwards"] <= R + 1


def test_flops_are_those_of_the_project(quick):
    rows = tables.training_rows(quick)
    network = run.TINY.network
    tokens = run.TINY.batch * network.context
    forward = metrics.body_flops(network, (network.context + 1) / 2) + metrics.head_flops(network)
    for record in rows["AR pretraining", False]["records"]:
        assert record["flops"] == pytest.approx(3 * tokens * forward, rel=1e-5)
        assert record["tokens"] == tokens
    for record in rows["distillation", False]["records"]:
        assert record["flops"] == pytest.approx(metrics.distill_flops(network, record), rel=1e-5)
        assert record["positions"] == 0 and record["loss_positions"] > network.context / 4
    assert tables.mfu(rows["rollout", False], quick) == []


def test_of_the_pretraining_the_last_update_is_timed(monkeypatch):
    """A call makes an optimizer and two updates; the record has the seconds of the second."""
    record = {"seconds": 0.25, "loss": 1.0}
    row = {"seconds": [], "records": []}
    monkeypatch.setattr(run, "seconds_of", lambda call: call() or 9.0)
    run.take_turns([row], [lambda: record], 2)
    assert row["seconds"] == [0.25, 0.25]
    row["seconds"].clear()
    run.take_turns([row], [lambda: {"loss": 1.0}], 1)
    assert row["seconds"] == [9.0]
    record = pieces.pretraining(run.TINY, CPU, compiled=False)()
    assert record["step"] == 2 and record["seconds"] > 0


def test_both_variants_are_measured_and_share_their_turns(monkeypatch):
    calls = []

    def make(size, device, compiled):
        def call():
            calls.append(compiled)
            return {}
        return call
    monkeypatch.setattr(pieces, "PIECES", {"distillation": make, "of either, the optimizer": make})
    rows = run.measure_training(run.TINY, CPU, run.Options(repeats=3, compile=True))
    variants = [(row["piece"], row["compiled"]) for row in rows]
    assert variants == [("distillation", False), ("distillation", True), ("of either, the optimizer", False)]
    warm_up = [False, False, True, True]
    assert calls[:10] == warm_up + [False, True] * 3


def test_compiled_pieces_compile_the_blocks(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: compiled.append(self))
    for make, networks in ((pieces.pretraining, 1), (pieces.distillation, 2), (pieces.rollout, 1)):
        compiled.clear()
        make(run.TINY, CPU, False)
        assert compiled == []
        make(run.TINY, CPU, True)
        assert len(compiled) == networks * run.TINY.network.layers


def test_a_loss_that_is_not_finite_is_refused():
    assert pieces.checked({"loss": 1.0}) == {"loss": 1.0}
    with pytest.raises(ValueError, match="loss of an update is nan"):
        pieces.checked({"loss": float("nan")})


def test_without_a_gpu_only_the_quick_run_is_possible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--quick"):
        run.main([])
    assert gpu.main is run.main


def test_the_shape_is_that_of_gpt2_medium():
    with torch.device("meta"):
        net = pieces.GPT(run.MEDIUM.network)
    count = sum(p.numel() for p in net.parameters())
    assert count - run.MEDIUM.network.width == 354_823_168      # without the [MASK] vector
    assert run.MEDIUM.decoding == (1, 8, 64)
    config = pieces.config_of(run.MEDIUM, GPU)
    assert (config.width // 64, config.teacher_dtype) == (run.MEDIUM.network.heads, "bfloat16")


# 2. seconds and bytes -------------------------------------------------------------------------------------

def test_seconds_include_what_a_gpu_has_still_to_do(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: events.append("clock") or 0.0)
    timing.seconds_of(lambda: events.append("call"))
    assert events == ["wait", "clock", "call", "wait", "clock"]


def test_a_peak_on_a_gpu_is_of_the_call_and_of_what_it_belongs_to(monkeypatch):
    cuda = SimpleNamespace(peak=900, now=100)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: cuda.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: cuda.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(cuda, "peak", cuda.now))

    def call():
        cuda.peak = max(cuda.peak, 350)
    assert timing.gpu_peak(call, GPU, timing.allocated(GPU)) == 250          # not the 900 of an earlier call
    calls = []
    assert timing.gpu_peak(lambda: calls.append(1), CPU, timing.allocated(CPU)) is None and calls == []


def test_the_facts_are_those_of_the_device_that_is_measured(monkeypatch):
    monkeypatch.setattr(common.metrics, "facts", lambda device: {"device": str(device)})
    assert common.run_info("performance", run.Options(), GPU)["device"] == "cuda"
    assert common.run_info("performance", run.Options())["device"] == "cpu"


# 3. numbers of the page -----------------------------------------------------------------------------------

def made_up() -> dict:
    """AR: 10 and 20 ms per pass in two turns; a speculative pass takes 1.5 and 2 times as long."""
    ar = {"batch": 8, "mode": "AR", "seconds": [1.0, 2.0], "records": [{"tokens": 800, "forwards": 100}] * 2}
    own = {"batch": 8, "mode": "speculative", "seconds": [0.6, 1.6],
           "records": [{"tokens": 800, "forwards": 40}] * 2}
    rule = {**own, "mode": "leftmost:0.98"}
    update = {"piece": "distillation", "compiled": False, "seconds": [2.0, 4.0],
              "records": [{"flops": 4e12, "tokens": 10}] * 2}
    for row in (ar, own, rule, update):
        row["peak"] = 3_000_000_000
    return {"training": [update], "decoding": [ar, rule, own], "matmul": {"flops": 1e13}, "block": 4,
            "rule": "leftmost:0.98"}


def test_the_break_even_is_the_time_of_a_pass_over_ar_s_in_the_same_turn():
    results = made_up()
    assert tables.break_even(results, 8, "speculative") == pytest.approx([1.5, 2.0])
    assert tables.break_even(results, 8, "AR") == [1.0, 1.0]
    row = tables.break_even_table(results).splitlines()[-1]
    assert "| 8 | 600 | 1.75 (1.50 to 2.00) |" in row


def test_the_speed_follows_from_tokens_per_pass():
    """A pass takes 15 and 40 ms; at the break-even of a turn the speed is AR's in that turn."""
    results = made_up()
    assert tables.speed_at(results, 8, 1) == pytest.approx(8 / 0.0275)
    assert tables.speed_at(results, 8, 4) == pytest.approx(4 * 8 / 0.0275)
    row = tables.break_even_table(results).splitlines()[-1]
    assert row.endswith("| 291 | 582 | 873 | 1,164 |")
    fast = tables.decoding_rows(results)[8, "speculative"]
    fast["seconds"] = fast["seconds"][:1]
    results["decoding"][0]["seconds"] = [1.0]
    needed = tables.break_even(results, 8, "speculative")[0]
    ar = tables.tokens_per_second(results["decoding"][0])
    assert tables.speed_at(results, 8, needed) == pytest.approx(ar[0])


def test_mfu_is_relative_to_the_measured_rate():
    results = made_up()
    assert tables.mfu(results["training"][0], results) == pytest.approx([0.2, 0.1])
    row = tables.training_table(results).splitlines()[-1]
    assert row.startswith("| distillation | 3000 (2000 to 4000) | 4 | 0.150 (0.100 to 0.200) | 3.0 | - |")


def test_a_compiled_piece_is_beside_its_plain_one():
    results = made_up()
    plain = results["training"][0]
    twin = {**plain, "compiled": True, "seconds": [1.0, 3.0], "first": 7.0, "peak": 2_000_000_000}
    results["training"].append(twin)
    lines = tables.training_table(results).splitlines()
    assert len(lines) == 3 and lines[-1].endswith("| 3.0 | 0.62 (0.50 to 0.75) | 2.0 | 7 |")


def test_acceptance_with_random_weights_is_in_no_table():
    row = tables.decoding_table(made_up()).splitlines()[-1]
    assert row == "| 8, speculative | 27.50 (15.00 to 40.00) | - | - | - | 3.0 |"


# 4. pages -------------------------------------------------------------------------------------------------

def test_a_page_without_results_says_so_and_has_no_number():
    text = tables.page({})
    assert "**Not measured yet: no GPU result is published.**" in text
    assert "\npython -m experiments.performance.run\n" in text
    assert re.findall(r"\d[\d.]*", re.sub(r"GPT-2|bf16|float32", "", text)) == []
    assert "](results/" not in text


def test_pages_work_with_an_experiment_that_has_no_results(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "EXPERIMENTS", tmp_path)
    monkeypatch.setattr(pages, "NAMES", ("performance",))
    assert pages.load_all("performance") == {}
    pages.draw_pictures()
    assert list(tmp_path.rglob("*.png")) == []
    made = pages.make_pages()
    assert "Not measured yet" in made[tmp_path / "performance" / "README.md"]
    assert f"{tables.SUMMARY} (not measured yet)" in made[tmp_path / "README.md"]


def test_the_index_says_of_no_other_experiment_that_it_is_not_measured():
    measured = [name for name in pages.NAMES if pages.load_all(name)]
    assert pages.index().count("(not measured yet)") == len(pages.NAMES) - len(measured)
    assert set(pages.NAMES) - set(measured) <= {"performance"}


def test_the_page_of_results_has_the_command_and_every_table(quick):
    text = tables.page({"gpu": quick})
    assert "\npython -m experiments.performance.run --quick=True\n" in text
    assert "Not measured yet" not in text
    for table in (tables.training_table, tables.decoding_table, tables.break_even_table):
        assert table(quick) in text
    assert "Acceptance is not measured" in text
    assert "](results/gpu.png)" in text and "](results/gpu.json)" in text
    assert "Tokens per pass from which speculative decoding is faster than AR" in text
    assert "nan" not in text and "None" not in text
