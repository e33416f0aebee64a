"""The scores of the harness's adapter are those of report/metrics.py; its text is the sampler's."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import sample
from data.corpus import story_world_corpus
from decoding import reveal
from decoding.sampling import SamplingConfig
from experiments import harness
from model import checkpoint
from model.masks import AR, Layout
from report import generate, metrics
from training import cli

EOT = 10
LAYOUTS = [AR, Layout(4, 1, 1), Layout(4, 4, 0), Layout(3, 1, 0)]


def ids(length, seed=0):
    return torch.randint(0, EOT, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_after_its_first_token_has_the_nats_of_the_metrics(layout, tiny):
    net = tiny().requires_grad_(False)
    for length in (2, 5, 13):
        text = ids(length)
        expected = metrics.story_nats(net, [torch.tensor(text)], layout, EOT).item()
        log_prob, _ = harness.score(net, layout, text[:1], text[1:], EOT)
        assert -log_prob == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_greedy_text_is_greedy_and_its_probability_is_that_of_its_steps(layout, tiny):
    """Blocks count from the end of the context, as in the sampler: revealed from left to right."""
    net = tiny().requires_grad_(False)
    greedy = SamplingConfig(temperature=0)
    left_to_right = generate.diffusion_generator(net, layout, reveal.parse("leftmost:1"), greedy)
    for P in (1, 6):
        context = ids(P, seed=P)
        text = left_to_right(torch.tensor([context]), 8, 0, range(1), -1)
        continuation = text.tokens[0, P:].tolist()
        log_prob, is_greedy = harness.score(net, layout, context, continuation, EOT)
        assert is_greedy and log_prob < 0
        other = [*continuation[:3], (continuation[3] + 1) % 11, *continuation[4:]]
        worse, is_greedy = harness.score(net, layout, context, other, EOT)
        assert not is_greedy and worse != log_prob


def test_what_exceeds_the_context_is_read_in_passes(tiny):
    net = tiny(context=12).requires_grad_(False)
    text = ids(30)
    log_prob, _ = harness.score(net, AR, text[:20], text[20:], EOT)
    first, _ = harness.score_piece(net, AR, text[14:20], text[20:26], EOT)
    second, _ = harness.score_piece(net, AR, text[18:26], text[26:], EOT)
    assert log_prob == pytest.approx((first.sum() + second.sum()).item(), rel=1e-9)


def test_white_space_belongs_to_the_continuation():
    letters = SimpleNamespace(bos=0, encode=lambda text: [ord(c) for c in text])
    assert harness.encode_pair(letters, "ab ", "c") == ([0, 97, 98], [32, 99])
    assert harness.encode_pair(letters, "", "c") == ([0], [99])


def test_text_is_cut_at_the_first_stop():
    assert harness.cut_at("a b\nc. d", ["\n", ". ", ""]) == "a b"
    assert harness.cut_at("a b", ["\n"]) == "a b"


@pytest.fixture
def student(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    tok = story_world_corpus(stories=20, held_out=2).tokenizer
    net = tiny(vocab=tok.vocab_size, context=64, layers=1).float()
    checkpoint.save("student", net, tok, Layout(4, 1, 1), reveal="leftmost:0.9", confidence="largest")
    return net


@pytest.mark.parametrize("flags, said", [
    ([], "--tasks: expected names of the harness's tasks"),
    (["--tasks=x", "--limit=0"], "--limit=0: expected an integer of at least 1"),
    (["--tasks=x", "--mode=fast"], "--mode: expected diffusion or ar or speculative"),
])
def test_bad_input_is_one_sentence(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        sys.exit(cli.run(harness.main, flags))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_task_of_the_harness(student, tmp_path, monkeypatch):
    """One with choices and one with generated text, made here; log-likelihoods and text are ours."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval import simple_evaluate

    documents = []
    for i, word in enumerate(("ball", "kite", "dog")):
        choices = ["ball", "kite", "dog"]
        documents.append({"question": f"One day a boy named Tim had a {word}. It was a", "choices": choices,
                          "answer": i})
    lines = "\n".join(map(json.dumps, documents))
    (tmp_path / "documents.jsonl").write_text(lines)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "documents.jsonl"}},
            "test_split": "test", "doc_to_text": "{{question}}", "metadata": {"version": 1}}
    chosen = {**data, "task": "chosen", "output_type": "multiple_choice", "doc_to_choice": "choices",
              "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}
    written = {**data, "task": "written", "output_type": "generate_until", "doc_to_target": " ball",
               "generation_kwargs": {"until": ["."], "max_gen_toks": 12},
               "metric_list": [{"metric": "exact_match"}]}
    found = {}

    def evaluate(model, tasks, **settings):
        found["model"] = model
        found["all"] = simple_evaluate(model=model, tasks=[chosen, written], **settings)
        return found["all"]

    results = harness.run(harness.Options(tasks="made here", ckpt="student", length=9), evaluate)
    assert 0 <= results["chosen"]["acc,none"] <= 1 and "written" in results
    generator, tok = sample.load_generator(sample.with_defaults(sample.Options("student", temperature=0.0)))
    for i, sampled in enumerate(found["all"]["samples"]["chosen"]):
        for choice, (log_prob, _) in zip(documents[i]["choices"], sampled["filtered_resps"]):
            pair = harness.encode_pair(tok, documents[i]["question"], f" {choice}")
            expected, _ = harness.score(student, Layout(4, 1, 1), *pair, tok.eot)
            assert float(log_prob) == pytest.approx(expected, rel=1e-5)
    for i, sampled in enumerate(found["all"]["samples"]["written"]):
        prompt = [tok.bos, *tok.encode(documents[i]["question"])]
        text = generator(torch.tensor([prompt]), 9, 0, range(i, i + 1), tok.ends)
        response = text.tokens[0][text.response_mask[0]].tolist()
        expected = tok.decode(prompt + response)[len(tok.decode(prompt)):].partition(".")[0]
        assert sampled["resps"][0][0] == expected
