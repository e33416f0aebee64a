"""A policy learned for a student: what texts are worth, and that a run goes on where it stopped."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import opdlm
import train_tiny
from data import story_world
from data.corpus import story_world_corpus
from experiments.unmasking.worlds import WORLDS
from model import checkpoint
from model.gpt import GPT, GPTConfig
from model.masks import Layout
from training import cli
from unmasking import policy as unmask
from unmasking import train as policy
from unmasking.grpo import Settings

TOK = story_world_corpus(stories=20, held_out=2).tokenizer


def text_of(*rows):
    """Prompts of one token, stories behind, in rows filled up with end-of-text."""
    ids = [[TOK.eot, *row] for row in rows]
    tokens = torch.tensor([row + [TOK.eot] * (90 - len(row)) for row in ids])
    kept = torch.tensor([[0 < i < len(row) for i in range(90)] for row in ids])
    return opdlm.Rollout(tokens, torch.zeros_like(tokens), kept, *torch.zeros(2, len(rows), dtype=torch.long))


def test_a_story_is_worth_what_the_checker_says_of_a_finished_one():
    story = TOK.encode(story_world.story(5))
    broken = [story[0], *reversed(story[1:])]
    assert policy.valid(text_of([*story, TOK.eot], story, [*broken, TOK.eot]), TOK).tolist() == [1, 0, 0]


def test_other_text_is_worth_something_if_it_is_likely_and_not_dull(tiny):
    net = tiny(vocab=TOK.vocab_size, context=96)
    text = text_of([5, 6, 7, 8], [5, 5, 5, 5], [9, 3, 9, 3])
    nats, pairs = policy.likeness(text, net)
    assert pairs.tolist() == pytest.approx([1, 1 / 3, 2 / 3])
    for row in range(3):
        said = net(text.tokens[row:row + 1, :5]).view(5, -1).log_softmax(-1)[range(4), text.tokens[row, 1:5]]
        assert nats[row].item() == pytest.approx(-said.mean().item(), rel=1e-5)
    assert policy.fluent(text, net, nats.max().item(), 0.5).tolist() == [1, 0, 1]
    assert policy.fluent(text, net, nats.min().item(), 0).sum() == 1


@pytest.fixture
def student(tmp_path, monkeypatch):
    """A run's folder with a small student of the story world, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_tiny, "open_corpus", lambda *_: story_world_corpus(stories=50, held_out=2))
    net = GPT(GPTConfig(TOK.vocab_size, 40, 1, 2, 16)).init_weights(torch.Generator().manual_seed(0))
    checkpoint.save("run/opdlm", net, TOK, Layout(4, 1, 1), reveal="leftmost:0.9", confidence="largest")
    return tmp_path / "run"


def learn(*flags):
    return cli.run(train_tiny.main, ["--data=toy", "--stage=policy", "--out=run", "--device=cpu", *flags])


def records():
    return [json.loads(line) for line in Path("run/policy.jsonl").read_text().splitlines()][1:]


@pytest.mark.parametrize("last", [2, 3, 4, 5, 6])
def test_killed_and_resumed_it_is_the_uninterrupted_run(last, student, monkeypatch):
    """While it imitates, hurries, or learns what its alpha asks for, or between; to the last bit, as long as there is
    something to learn: here a text is worth its share of even tokens."""
    monkeypatch.setattr(policy, "valid", lambda text, tokenizer: ((text.tokens % 2 == 0) & text.response_mask).float().mean(1))
    monkeypatch.setattr(policy.learn, "__defaults__", (None, 1))                       # a save each update
    assert learn("--policy_updates=6") == 0
    whole, files = records(), {p.name: p.read_bytes() for p in (student / "policy").glob("policy.*")}
    assert all("loss" in record for record in whole) and len({record["reward"] for record in whole}) > 1
    real = policy.Log.step

    def killed(log, record, *rest):
        if record["step"] == last:
            raise RuntimeError("killed")
        real(log, record, *rest)
    monkeypatch.setattr(policy.Log, "step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        learn("--policy_updates=6")
    monkeypatch.setattr(policy.Log, "step", real)
    assert learn("--policy_updates=6", "--resume") == 0
    assert [record["alpha"] for record in records()[2:]] == [10, 10, 1, 1]
    assert records() == whole
    assert {p.name: p.read_bytes() for p in (student / "policy").glob("policy.*")} == files


@pytest.mark.parametrize("done", [0, 1])
def test_rewards_go_on_from_a_policy_that_has_imitated_or_hurried(done, student, monkeypatch):
    """In a run of its own, as in the same run: to the last bit."""
    monkeypatch.setattr(policy, "valid", lambda text, tokenizer: ((text.tokens % 2 == 0) & text.response_mask).float().mean(1))
    assert learn("--policy_updates=6") == 0
    whole, real = (student / "policy/policy.safetensors").read_bytes(), policy.learn

    def parted(*given):
        until = given[6]
        real(*given[:6], tuple(min(n, until[done]) for n in until), *given[7:])
        assert (student / "policy/policy.safetensors").read_bytes() != whole
        real(*given, (unmask.load(student / "policy").requires_grad_(True), until[done]))
    monkeypatch.setattr(policy, "learn", parted)
    assert learn("--policy_updates=6") == 0
    assert (student / "policy/policy.safetensors").read_bytes() == whole


def test_a_run_that_can_learn_nothing_says_so(student, capsys):
    assert learn("--policy_updates=60") == 0
    assert records()[-1]["step"] == 40                                                  # 20 that imitate, and 20 more
    assert "20 updates in which all texts of each group were worth the same" in capsys.readouterr().out


def test_an_ar_model_has_no_masks_to_reveal(student, capsys):
    checkpoint.save("ar", checkpoint.load("run/opdlm")[0], TOK)
    assert learn("--init=ar") == 2
    assert "ar holds an AR model: convert it first" in capsys.readouterr().err


def test_text_is_judged_by_the_ar_model_that_is_named_or_lies_there(student, monkeypatch, capsys):
    text = replace(story_world_corpus(stories=50, held_out=2), name="text")
    monkeypatch.setattr(train_tiny, "open_corpus", lambda *_: text)
    assert learn("--policy_updates=1") == 2
    assert "run has no ar folder" in capsys.readouterr().err
    for seed, folder in enumerate(("ar", "run/ar")):
        net = GPT(GPTConfig(TOK.vocab_size, 40, 1, 2, 16)).init_weights(torch.Generator().manual_seed(seed))
        checkpoint.save(folder, net, TOK)
    asked, real = [], policy.learn
    monkeypatch.setattr(policy, "learn", lambda *given: asked.append(given[2]) or real(*given))
    for flags in (["--judge=ar"], []):
        assert learn("--policy_updates=1", *flags) == 0
    there = [checkpoint.load(name)[0].wte.weight for name in ("ar", "run/ar")]
    assert [torch.equal(net.wte.weight, weight) for net in asked for weight in there] == [True, False, False, True]


@pytest.mark.parametrize("world", ["blocks", "whole"])
def test_the_command_learns_with_what_was_measured(world, student, monkeypatch):
    """The same settings as in experiments/unmasking_WORLD, of whole texts the same expert; --lr is another rate."""
    asked = []
    monkeypatch.setattr(policy, "learn", lambda *given: asked.append(given[5]))
    if world == "whole":
        checkpoint.save("run/opdlm", checkpoint.load("run/opdlm")[0], TOK, Layout(40, 1, 1), reveal="leftmost:0.9",
                 confidence="largest")
    assert learn() == learn("--lr=0.01", "--alpha=3") == 0
    usual, other = asked
    assert usual == Settings(policy.room(40), expert=usual.expert, **WORLDS[world].learning)
    assert other == replace(usual, rate=0.01, alpha=3)
    measured = json.loads((Path(__file__).parents[2] / f"experiments/unmasking_{world}/results.json").read_text())
    wanted = measured["policies"][0]["expert"].partition(" in ")[0] if world == "whole" else "leftmost:0.9"
    assert str(usual.expert) == wanted


@pytest.mark.parametrize("expert", ["random:2", "ancestral:8", "eb:0.1"])
def test_an_expert_is_a_function_of_what_a_policy_sees(expert, student, capsys):
    assert learn(f"--expert={expert}", "--policy_updates=1") == 2
    assert "can't be imitated" in capsys.readouterr().err


def test_a_text_has_to_fit_behind_the_prompts(student, capsys):
    assert learn("--length=19", "--policy_updates=1") == 2
    assert "behind prompts of up to 19 tokens: give it more positions" in capsys.readouterr().err
    assert learn("--length=20", "--policy_updates=1") == 0
