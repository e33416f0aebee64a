"""The conversion of a real checkpoint: its prompts, its measurements, and what its page says."""
import copy

import pytest
import torch

from decoding import reveal
from decoding.sampling import SamplingConfig
from experiments.common.timing import greedy_ar
from experiments.real import prompts, run, tables
from model.masks import AR
from report import generate, metrics

NO_EOT = -1


def test_there_are_240_different_prompts():
    found = [prompt for texts in prompts.test_prompts().values() for prompt in texts]
    assert len(found) == len(set(found)) == 240


def test_held_out_text_gives_no_prompts_for_training():
    reference = "\n".join(prompts.reference_texts())
    texts = prompts.docstrings()
    assert len(texts) >= 32
    assert not [text for text in texts if text[:100] in reference]


def test_prompts_of_several_lengths_are_continued_as_each_alone(tiny):
    net = tiny()
    rows = [torch.arange(1, 1 + length) for length in (3, 1, 5)]
    generator = generate.diffusion_generator(net, AR, reveal.parse("static:1"), SamplingConfig(temperature=0))
    texts = run.continue_all(generator, rows, 6, NO_EOT, batch=2)
    responses = [ids for rollout, _ in texts for ids in metrics.response_ids(rollout)]
    for row, response in zip(rows, responses, strict=True):
        assert greedy_ar(net, row[None], 6)[0, len(row):].tolist() == response


def numbers(tok_per_fwd, responses):
    kind = {"tok_per_fwd": tok_per_fwd, "positions_per_tok": 9.0, "agreement": 0.9, "gen_nats": 1.0,
            "distinct2": 0.5}
    return {"all": kind, "kinds": {"facts": kind}, "responses": {"facts": responses}}


@pytest.fixture
def results():
    texts = {"AR": numbers(1.0, [[1, 2], [3, 4]])}
    for way in ("self-verified before training", "self-verified", "leftmost:0.9", "static:2",
                "AR, temperature 0.7", "self-verified, temperature 0.7", "self-verified, blocks of 2"):
        texts[way] = numbers(2.5, [[1, 2], [3, 5]])
    bits = {way: {"bits_per_byte": 0.9} for way in ("ar", "student_ar", "blocks")}
    return {
        "command": "python -m experiments.real.run",
        "options": {"lora": 2, "updates": 3, "answer": 4, "texts": 5, "tokens": 6, "threads": 1, "turns": 3},
        "commit": "abc", "torch": "2", "python": "3", "device": "cpu", "threads": 1,
        "conversion": {"seconds": 60, "loss_positions": 1000, "train_flops": 1e9},
        "parameters": 10, "trained": 1, "texts": texts, "likelihood": {"stories": bits},
        "seconds_per_token": {"AR": [2.0, 1.0, 3.0], "self-verified": [1.0, 1.0, 1.0],
                              "self-verified, blocks of 2": [0.5, 0.5, 0.5]},
        "samples": [{"kind": "facts", "prompt": "A", "written": {way: "b" for way in texts}}],
    }


def test_an_answer_is_the_same_if_every_token_is(results):
    assert tables.same_answers(results, "AR") == 1
    assert tables.same_answers(results, "self-verified") == 0.5


def test_the_page_says_whether_seconds_were_saved(results):
    slower = copy.deepcopy(results)
    slower["seconds_per_token"]["self-verified"] = [4.0, 4.0, 4.0]
    assert "2.00 times as fast as the AR loop, which is faster" in " ".join(tables.findings(results))
    assert "0.50 times as fast as the AR loop, which is **not faster**" in " ".join(tables.findings(slower))
    assert "and is 4.00 times as fast as AR" in " ".join(tables.findings(results))
    assert "Not measured yet" in tables.page({})
    assert "Not measured yet" not in tables.page({"smollm2": results})
