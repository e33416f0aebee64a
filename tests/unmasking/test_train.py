"""python -m unmasking.train: the quality of texts, resuming, and what the command refuses."""
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import opdlm
from data import story_world
from data.corpus import story_world_corpus
from decoding import reveal
from experiments.unmasking.worlds import WORLDS
from model import checkpoint
from model.gpt import GPT, GPTConfig
from model.masks import Layout
from training import cli
from unmasking import train
from unmasking.grpo import Settings
from unmasking.policy import Policy, PolicyConfig, load_policy

TOK = story_world_corpus(stories=20, held_out=2).tokenizer
SHORT = ("--updates=6", "--length=28")
RESULTS = Path(__file__).parents[2] / "experiments/unmasking/results"


def rollout_of(*rows):
    """Prompts of one token, each followed by a story, in rows padded with end-of-text."""
    ids = [[TOK.eot, *row] for row in rows]
    tokens = torch.tensor([row + [TOK.eot] * (90 - len(row)) for row in ids])
    response_mask = torch.tensor([[0 < i < len(row) for i in range(90)] for row in ids])
    no_cost = torch.zeros(len(rows), dtype=torch.long)
    return opdlm.Rollout(tokens, torch.zeros_like(tokens), response_mask, no_cost, no_cost)


# quality -------------------------------------------------------------------------------------------------

def test_a_story_has_quality_1_if_it_is_finished_and_valid():
    story = TOK.encode(story_world.story(5))
    broken = [story[0], *reversed(story[1:])]
    text = rollout_of([*story, TOK.eot], story, [*broken, TOK.eot])
    assert train.valid(text, TOK).tolist() == [1, 0, 0]


def test_other_text_has_quality_1_if_it_is_likely_and_not_repetitive(tiny):
    net = tiny(vocab=TOK.vocab_size, context=96)
    text = rollout_of([5, 6, 7, 8], [5, 5, 5, 5], [9, 3, 9, 3])
    nll, distinct2 = train.nll_and_distinct2(text, net)
    assert distinct2.tolist() == pytest.approx([1, 1 / 3, 2 / 3])
    for row in range(3):
        log_probs = net(text.tokens[row:row + 1, :5]).view(5, -1).log_softmax(-1)
        of_text = log_probs[range(4), text.tokens[row, 1:5]]
        assert nll[row].item() == pytest.approx(-of_text.mean().item(), rel=1e-5)
    assert train.fluent(text, net, nll.max().item(), 0.5).tolist() == [1, 0, 1]
    assert train.fluent(text, net, nll.min().item(), 0).sum() == 1


# prompts and texts ---------------------------------------------------------------------------------------

def test_no_two_texts_share_their_random_numbers(monkeypatch):
    """Neither those of the policy and of the expert, nor those of different updates or prompts."""
    settings = Settings(length=10, group_size=3, prompts=2)
    numbers = []

    def stories(row_ids):
        return torch.zeros(len(row_ids), 30, dtype=torch.long)

    def recording_rollout(denoiser, prompt, length, rule, u, *rest):
        numbers.append(u[:, 0, 0])                                      # (B,) the first number of each text
    monkeypatch.setattr(train.opdlm, "rollout", recording_rollout)
    generate = train.make_generator(make_net(0), Layout(4, 1, 1), stories, settings, seed=0, eot=TOK.eot)
    rule = reveal.parse("static:1")
    for update in range(3):
        for count in (settings.group_size, 1):
            generate(rule, update, count)
    assert [len(u) for u in numbers] == [6, 2] * 3
    assert len(torch.cat(numbers).unique()) == 3 * (6 + 2)


def test_prompts_have_all_lengths_and_each_update_its_own_texts(monkeypatch):
    """Each prompt stands before `count` adjacent rows; an update's prompts are the next ones."""
    settings = Settings(length=10, group_size=3, prompts=2)
    prompts = []

    def stories(row_ids):
        return torch.tensor(list(row_ids))[:, None].expand(-1, 30)

    def recording_rollout(denoiser, prompt, *rest):
        prompts.append(prompt)
    monkeypatch.setattr(train.opdlm, "rollout", recording_rollout)
    generate = train.make_generator(make_net(0), Layout(4, 1, 1), stories, settings, seed=0, eot=TOK.eot)
    for update in range(200):
        generate(reveal.parse("static:1"), update, 3)
    assert {prompt.size(1) for prompt in prompts} == set(range(12, 20))
    assert [prompt[:, 0].tolist() for prompt in prompts[:2]] == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]


def test_the_bounds_of_quality_are_quantiles_of_the_student_s_own_text(tiny):
    """Of text that is not the story world: 3/4 of 4 texts per prompt are likely, 1/20 too repetitive."""
    net = tiny(vocab=TOK.vocab_size, context=96)
    rows = torch.randint(5, 12, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    text = rollout_of(*rows)
    calls = []

    def generate(rule, update, count):
        calls.append((str(rule), update, count))
        return text
    corpus = replace(story_world_corpus(stories=20, held_out=2), name="text")
    quality = train.make_quality(corpus, net, generate)
    assert calls == [("static:1", 0, 4)]
    nll, distinct2 = train.nll_and_distinct2(text, net)
    assert distinct2.min() < distinct2.quantile(0.05) < distinct2.max()
    is_likely = nll <= nll.quantile(0.75)
    is_varied = distinct2 >= distinct2.quantile(0.05)
    assert is_likely.sum() == 12
    assert quality(text).tolist() == (is_likely & is_varied).float().tolist()


# its phases ----------------------------------------------------------------------------------------------

def test_the_three_phases_by_hand():
    """Imitation, GRPO for speed, GRPO for alpha; after imitation at a sixth of the learning rate."""
    settings = Settings(length=10, alpha=2, lr=0.6, warmup_alpha=5)

    def phases(settings, ends):
        return [(p.method.__name__, p.settings.alpha, p.updates, p.lr)
                for p in train.make_phases(settings, ends)]
    assert phases(settings, (2, 5, 9)) == [("imitate", 2, range(2), 0.6), ("train", 5, range(2, 5), 0.6 / 6),
                                           ("train", 2, range(5, 9), 0.6 / 6)]
    assert phases(settings, (0, 1, 2))[1:] == [("train", 5, range(1), 0.6), ("train", 2, range(1, 2), 0.6)]
    assert phases(replace(settings, alpha=7), (1, 2, 3))[1][1] == 7      # never slower than asked for


def test_the_learning_rate_of_a_phase_rises_and_falls():
    """Ten updates of linear warm-up, times a cosine to a tenth over the updates of the phase."""
    phase = train.Phase(None, None, range(20, 60), lr=0.4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    set_lr = train.make_lr_schedule(optimizer, phase)
    rates = []
    for update in phase.updates:
        set_lr(update)
        rates.append(optimizer.param_groups[0]["lr"])
    warm = [min(1, (k + 1) / 10) for k in range(40)]
    shape = [0.55 + 0.45 * math.cos(math.pi * k / 40) for k in range(40)]
    expected = [0.4 * warm[k] * shape[k] for k in range(40)]
    assert rates == pytest.approx(expected)


def test_weights_without_a_gradient_decay_by_a_tenth_of_the_learning_rate():
    policy = Policy(PolicyConfig(4, 16)).init_weights(torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in policy.parameters()]
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    train.make_adamw(policy, 0.5).step()
    for p, old in zip(policy.parameters(), before):
        assert torch.allclose(p, old * (1 - 0.1 * 0.5))


# the command ---------------------------------------------------------------------------------------------

def make_net(seed):
    generator = torch.Generator().manual_seed(seed)
    return GPT(GPTConfig(TOK.vocab_size, 40, 1, 2, 16)).init_weights(generator)


@pytest.fixture
def student(tmp_path, monkeypatch):
    """The folder of a run with a small student of the story world; it is in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "open_corpus", lambda *_: story_world_corpus(stories=50, held_out=2))
    net = make_net(seed=0)
    checkpoint.save("run/opdlm", net, TOK, Layout(4, 1, 1), reveal="leftmost:0.9", confidence="largest")
    return tmp_path / "run"


def share_of_even_tokens(text, tokenizer):
    """A quality that even a random student has, so that there is something to learn."""
    return ((text.tokens % 2 == 0) & text.response_mask).float().mean(1)


def run(*flags):
    return cli.run(train.main, ["--ckpt=run", "--data=toy", "--device=cpu", *flags])


def records(out="run"):
    return [json.loads(line) for line in Path(out, "policy.jsonl").read_text().splitlines()][1:]


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "policy").glob("policy.*")}


@pytest.mark.parametrize("last", [2, 3, 4, 5, 6])
def test_killed_and_resumed_it_is_the_uninterrupted_run(last, student, monkeypatch):
    """To the last bit, in each of the three phases and between them."""
    monkeypatch.setattr(train, "valid", share_of_even_tokens)
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    assert run(*SHORT) == 0
    whole = records()
    whole_files = files(student)
    assert all("loss" in record for record in whole)
    assert len({record["reward"] for record in whole}) > 1

    real_step = train.Log.step

    def killed(log, record, *rest):
        if record["step"] == last:
            raise RuntimeError("killed")
        real_step(log, record, *rest)
    monkeypatch.setattr(train.Log, "step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(*SHORT)
    monkeypatch.setattr(train.Log, "step", real_step)
    assert run(*SHORT, "--resume") == 0
    assert [record["alpha"] for record in records()[2:]] == [10, 10, 1, 1]
    assert records() == whole
    assert files(student) == whole_files


@pytest.mark.parametrize("phase", [0, 1])
def test_training_can_start_from_the_policy_of_a_finished_phase(phase, student, monkeypatch):
    """Two runs, the second from where the first ended, are equal to one run, to the last bit."""
    monkeypatch.setattr(train, "valid", share_of_even_tokens)
    weights = student / "policy/policy.safetensors"
    assert run(*SHORT) == 0
    whole = weights.read_bytes()

    real_train_policy = train.train_policy

    def in_two_parts(*args):
        ends = args[6]
        first_ends = tuple(min(end, ends[phase]) for end in ends)
        real_train_policy(*args[:6], first_ends, *args[7:])
        assert weights.read_bytes() != whole
        policy = load_policy(student / "policy").requires_grad_(True)
        real_train_policy(*args, (policy, ends[phase]))
    monkeypatch.setattr(train, "train_policy", in_two_parts)
    assert run(*SHORT) == 0
    assert weights.read_bytes() == whole


def test_a_run_that_can_learn_nothing_says_so(student, capsys):
    assert run("--updates=60", "--length=22") == 0
    assert records()[-1]["step"] == 40                           # 20 updates of imitation, and 20 more
    message = "in 20 updates in a row all texts of each group had the same reward"
    out = capsys.readouterr().out
    assert f"{message}, so there is nothing to learn" in out
    assert "imitate     1/60 | reward 0.000 | quality 0.00 |" in out
    assert "steps | tied groups 1.00\n" in out


def test_the_flags_name_the_texts_and_the_student_s_tokenizer_reads_them(student, monkeypatch):
    arguments = []

    def noting_the_arguments(*args):
        arguments.extend(args)
        return story_world_corpus(stories=50, held_out=2)
    monkeypatch.setattr(train, "open_corpus", noting_the_arguments)
    monkeypatch.setattr(train, "train_policy", lambda *_: None)
    monkeypatch.setenv("HOME", str(student.parent))
    monkeypatch.setenv("USERPROFILE", str(student.parent))
    assert run("--data=~/a.txt", "--val_data=~/b.txt") == 0
    data, val_data, vocab_size, tok = arguments
    assert (data, val_data) == (str(student.parent / "a.txt"), str(student.parent / "b.txt"))
    assert vocab_size == TOK.vocab_size
    assert tok.encode("A boy named Tom") == TOK.encode("A boy named Tom")


def test_the_line_of_an_update():
    record = {"reward": 0.25, "quality": 0.5, "nfe": 12.34}
    assert train.describe(record) == "reward 0.250 | quality 0.50 | 12.3 steps"
    record["tied_groups"] = 0.125
    assert train.describe(record) == "reward 0.250 | quality 0.50 | 12.3 steps | tied groups 0.12"


def test_out_is_another_folder(student):
    assert run("--updates=1", "--out=other", "--length=22") == 0
    assert not (student / "policy").exists()
    assert len(records("other")) == 1
    assert load_policy("other/policy").config.block == 4


def test_there_must_be_something_to_resume(student, capsys):
    assert run("--resume") == 2
    assert "nothing to resume in run: it has no policy/state.safetensors" in capsys.readouterr().err


def test_there_must_be_an_update(student, capsys):
    assert run("--updates=0") == 2
    assert "--updates=0: expected an integer from 1 to 1000000000" in capsys.readouterr().err


@pytest.mark.parametrize("flag, message", [
    ("--updates=-5", "--updates=-5: expected an integer from 1 to 1000000000"),
    ("--updates=99999999999999999999", "--updates: expected an integer of at most 9223372036854775807"),
    ("--alpha=-1", "--alpha=-1: expected a number from 0.0 to 1000.0"),
    ("--alpha=1e9", "--alpha=1e+09: expected a number from 0.0 to 1000.0"),
    ("--alpha=nan", "--alpha: expected a number, got 'nan'"),
    ("--lr=0", "--lr=0: expected a number above 0 and at most 1"),
    ("--lr=-0.1", "--lr=-0.1: expected a number above 0 and at most 1"),
    ("--lr=1e30", "--lr=1e+30: expected a number above 0 and at most 1"),
    ("--seed=-1", "--seed=-1: expected an integer from 0 to 9223372036854775806"),
    ("--seed=9223372036854775807", "--seed=9223372036854775807: expected an integer from 0 to"),
    ("--seed=18446744073709551616", "--seed: expected an integer of at most 9223372036854775807"),
    ("--length=-5", "--length=-5: too short for prompts of up to 19 tokens"),
    ("--length=0", "--length=0: too short for prompts of up to 19 tokens"),
    ("--expert=static:99999999999999999999", "static:COUNT takes a number of at most 2147483647"),
    ("--out=", "--out=: expected a name, got an empty text"),
    ("--judge=", "--judge=: expected a name, got an empty text"),
    ("--ckpt=hf:some/student", "--ckpt=hf:some/student: expected --out=FOLDER beside it"),
    ("--out=run/opdlm/config.json/x", "--out=run/opdlm/config.json/x cannot be written"),
])
def test_a_value_that_cannot_be_is_one_sentence_before_any_work(student, flag, message, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_policy", lambda *_: pytest.fail("it trained"))
    before = sorted(student.rglob("*"))
    try:
        code = run(flag)
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and message in err and err.count("\n") == 1
    assert sorted(student.rglob("*")) == before


def test_a_bad_rule_of_the_student_names_its_file(student, capsys):
    path = student / "opdlm/config.json"
    content = path.read_text()
    path.write_text(content.replace("leftmost:0.9", "leftmost:7"))
    assert run("--updates=1", "--length=22") == 2
    assert "reveal in run/opdlm/config.json: leftmost:P takes a number from 0 to 1" in capsys.readouterr().err
    path.write_text(content.replace('"reveal"', '"unknown"'))    # then it is static:1
    assert run("--updates=1", "--length=22") == 0


def test_the_largest_seed_has_texts(student):
    assert run("--updates=1", "--length=22", f"--seed={2 ** 63 - 2}") == 0


def test_the_home_folder_is_known_after_an_equals_sign(student, monkeypatch):
    monkeypatch.setenv("HOME", str(student.parent))
    monkeypatch.setenv("USERPROFILE", str(student.parent))
    assert run("--updates=1", "--length=22", "--ckpt=~/run", "--out=~/other") == 0
    assert load_policy(student.parent / "other/policy").config.block == 4
    assert not Path("~").exists()


def test_a_student_that_is_not_finite_is_named(student, capsys):
    net, layout = checkpoint.load("run/opdlm")
    with torch.no_grad():
        net.ln_f.weight[3] = float("nan")
    checkpoint.save("run/opdlm", net, TOK, layout, reveal="leftmost:0.9")
    assert run("--updates=1") == 2
    assert "run/opdlm: the tensor ln_f.weight has 1 numbers that are not finite" in capsys.readouterr().err
    with pytest.raises(ValueError, match="judge: the tensor ln_f.weight has 1"):
        checkpoint.save("judge", net, TOK)
        train.load_judge("judge", student)


def test_an_ar_model_has_no_masks_to_reveal(student, capsys):
    checkpoint.save("ar", checkpoint.load("run/opdlm")[0], TOK)
    assert run("--ckpt=ar") == 2
    assert "--ckpt=ar is an AR model: convert it first" in capsys.readouterr().err


def test_text_is_scored_by_the_named_ar_model_or_by_that_of_the_run(student, monkeypatch, capsys):
    text = replace(story_world_corpus(stories=50, held_out=2), name="text")
    monkeypatch.setattr(train, "open_corpus", lambda *_: text)
    assert run("--updates=1") == 2
    assert "run has no ar folder" in capsys.readouterr().err
    for seed, folder in enumerate(("ar", "run/ar")):
        checkpoint.save(folder, make_net(seed), TOK)
    teachers = []
    real_train_policy = train.train_policy

    def noting_the_teacher(*args):
        teachers.append(args[2])
        real_train_policy(*args)
    monkeypatch.setattr(train, "train_policy", noting_the_teacher)
    for flags in (["--judge=ar"], []):
        assert run("--updates=1", *flags) == 0
    embeddings = [checkpoint.load(name)[0].wte.weight for name in ("ar", "run/ar")]
    is_equal = [torch.equal(net.wte.weight, weight) for net in teachers for weight in embeddings]
    assert is_equal == [True, False, False, True]


@pytest.mark.parametrize("world", ["blocks", "whole"])
def test_the_command_has_the_settings_that_were_measured(world, student, monkeypatch):
    """Those of experiments/unmasking, and for full-sequence models also the expert; --lr is another rate."""
    calls = []
    monkeypatch.setattr(train, "train_policy", lambda *args: calls.append(args))
    if world == "whole":
        net, _ = checkpoint.load("run/opdlm")
        layout = Layout(40, 1, 1)
        checkpoint.save("run/opdlm", net, TOK, layout, reveal="leftmost:0.9", confidence="largest")
    assert run() == run("--lr=0.01", "--alpha=3", "--updates=8", "--seed=5") == 0
    default, changed = (args[5] for args in calls)
    ends = (110, 220, 330) if world == "whole" else (150, 300, 450)
    assert [args[6] for args in calls] == [ends, (2, 5, 8)]
    assert [args[7] for args in calls] == [0, 5]
    header = calls[1][9]
    assert (header["lr"], header["alpha"], header["resume"]) == (0.01, 3, None)
    length = train.max_response(40)
    assert default == Settings(length, expert=default.expert, **WORLDS[world].learning)
    assert changed == replace(default, lr=0.01, alpha=3)
    expected = "leftmost:0.9"
    if world == "whole":
        measured = json.loads((RESULTS / "whole.json").read_text())
        expected = measured["policies"][0]["expert"].partition(" in ")[0]
    assert str(default.expert) == expected


@pytest.mark.parametrize("expert", ["random:2", "ancestral:8", "eb:0.1"])
def test_an_expert_must_be_a_function_of_the_policy_s_inputs(expert, student, capsys):
    assert run(f"--expert={expert}", "--updates=1") == 2
    assert "cannot be imitated" in capsys.readouterr().err


def test_a_text_has_to_fit_after_the_prompts(student, capsys):
    assert run("--length=19", "--updates=1") == 2
    error = capsys.readouterr().err
    assert "prompts of up to 19 tokens and a response, use at least 20" in error
    assert run("--length=20", "--updates=1") == 0


def test_help_has_one_line_per_flag(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    flags = [line.split()[0].partition("=")[0] for line in lines if line.startswith("  --")]
    assert flags == [f"--{name}" for name in train.Config.__dataclass_fields__]
    after = lines[lines.index("Student and output:"):]
    assert all(line == "" or line.endswith(":") or line.startswith("  --") for line in after)
