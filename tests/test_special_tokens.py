"""Texts begin with `bos` and end at any `eos`, where a checkpoint has two tokens for it, in every part of the
project: generation, training text, evaluation."""
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import opdlm
import sample
import train_tiny
from data import corpus, story_world, tinystories, tokenizer
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import is_end, padding_id
from decoding.speculative import speculative_decode
from model import checkpoint
from model.llama import Llama, LlamaConfig
from model.masks import AR, Layout
from report import compare, metrics
from training import cli

SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]


def chain_tokenizer():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator([], trainers.BpeTrainer(
        special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    return tok


def markov_chain(tok, last="</s>"):
    """A Llama that follows <s> O n c e `last` x x x ...: its blocks add nothing, its tables are the chain.

    The mean embedding is 0, so [MASK] is followed by every token with the same probability.
    """
    V = tok.get_vocab_size()
    net = Llama(LlamaConfig(V, 64, 2, 4, 32, 2, 8, 48, eps=1e-6))
    chain = ["<s>", "O", "n", "c", "e", last, "x", "x"]
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.ones_like(p) if "norm" in name else torch.zeros_like(p))
        for n, (before, after) in enumerate(zip(chain, chain[1:])):
            if n < len(chain) - 2:
                net.wte.weight[tok.token_to_id(before), n] = 1.0
            else:
                net.wte.weight[tok.token_to_id("x"), n] = 1.0
            net.lm_head.weight[tok.token_to_id(after), n] = 20.0
        net.wte.weight[tok.token_to_id("!")] = -net.wte.weight.sum(0)
    return net


@pytest.fixture(params=["</s>", "<|end|>"])
def run(request, tmp_path):
    """A run's folder, ar/ and opdlm/, of the chain; it ends at one of two tokens."""
    hub = chain_tokenizer()
    tok = tokenizer.HubTokenizer(hub, 2, bos=1, other_ends=[3])
    net = markov_chain(hub, request.param)
    checkpoint.save(tmp_path / "ar", net, tok)
    checkpoint.save(tmp_path / "opdlm", net.init_mask(), tok, Layout(4, 1, 1), reveal="static:1")
    return tmp_path


MODES = [["ar"], ["diffusion"], ["diffusion", "--reveal=leftmost:0.9"], ["speculative"],
         ["speculative", "--verifier=self"]]


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_a_text_begins_with_bos_and_ends_at_any_eos(run, capsys, mode):
    kind, *more = mode
    flags = [f"--ckpt={run}", f"--mode={kind}", "--length=20", "--temperature=0", "--device=cpu", "--n=2"]
    flags += more
    assert cli.run(sample.main, flags) == 0
    assert capsys.readouterr().out.splitlines()[:3] == ["Once", "", "Once"]


def test_the_files_of_a_run_say_so_too(run):
    for name in ("ar", "opdlm"):
        config = checkpoint.read_config(run / name)
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 3])
        tok = tokenizer.load(run / name)
        assert (tok.bos, tok.eos, tok.ends) == (1, (2, 3), (2, 3, 1))


def test_transformers_agrees(run):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    net = transformers.AutoModelForCausalLM.from_pretrained(run / "ar")
    tok = transformers.AutoTokenizer.from_pretrained(run / "ar")
    ids = net.generate(torch.tensor([[tok.bos_token_id]]), do_sample=False, max_new_tokens=20)[0]
    assert tok.decode(ids, skip_special_tokens=True) == "Once"


TEXT = "\n<|endoftext|>\n".join(f"Once {i}" for i in range(60))


@pytest.fixture
def two_tokens(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    tok = tokenizer.HubTokenizer(chain_tokenizer(), 2, bos=1)
    return tinystories.load(str(tmp_path / "text.txt"), None, 0, tmp_path / "data", tok)


def test_training_text_has_both(two_tokens):
    tok = two_tokens.tokenizer
    for stream, numbers in ((two_tokens.train, [i for i in range(60) if i % 20]),
                            (two_tokens.val, [0, 20, 40])):
        expected = []
        for i in numbers:
            expected += [1, *tok.encode(f"Once {i}"), 2]
        assert stream.tolist() == [*expected, 1]
    starts = two_tokens.starts
    assert len(starts) == 57 and (two_tokens.train[starts] == 1).all()
    assert tok.decode(two_tokens.train.tolist()) == "".join(f"Once {i}" for i in range(60) if i % 20)


def test_training_text_of_one_token_is_as_ever(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    tok = tokenizer.HubTokenizer(chain_tokenizer(), 2)
    stream = tinystories.load(str(tmp_path / "text.txt"), None, 0, tmp_path / "data", tok).val
    expected = [2]
    for i in (0, 20, 40):
        expected += [*tok.encode(f"Once {i}"), 2]
    assert stream.tolist() == expected


def test_stories_of_the_story_world_have_both():
    tok = tokenizer.HubTokenizer(chain_tokenizer(), 2, bos=1)
    stream = corpus.token_stream(map(story_world.story, range(3)), tok)
    starts = np.flatnonzero(stream == 1)
    assert len(starts) == 4 and (stream[starts[1:] - 1] == 2).all() and (stream == 2).sum() == 3


def test_a_held_out_story_ends_with_its_own_end(two_tokens):
    starts = tinystories.stories(two_tokens.val, 1)
    held_out = metrics.held_out(two_tokens.val, starts, 9, 99, len(two_tokens.tokenizer.between))
    stories = [[1, *two_tokens.tokenizer.encode(f"Once {i}"), 2] for i in (0, 20, 40)]
    assert [story.tolist() for story in held_out] == stories
    cut = metrics.held_out(two_tokens.val, starts, 9, 4, len(two_tokens.tokenizer.between))
    first_windows = [story[:4] for story in stories]
    following = []
    for story in stories:
        following += [story[3:7], story[6:]]     # of 8 or 9 ids; each begins with the last one before it
    assert [window.tolist() for window in cut] == first_windows + following


def test_windows_of_texts_are_separated_where_they_begin():
    tokens = torch.tensor([[1, 5, 2, 1, 6, 7, 2, 1]])
    mask, position = train_tiny.separate_texts(tokens, 1)
    assert position.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert not mask[0, 0, 3:, :3].any()


def test_the_response_of_training_text_ends_at_any_end(two_tokens):
    recipe = train_tiny.make_recipe(train_tiny.Config(), (2, 3, 1))
    texts = torch.tensor([[1, 9, 8, 2, 1, 9], [1, 9, 8, 3, 7, 7], [1, 9, 8, 1, 7, 7], [1, 9, 8, 7, 7, 7]])
    text = opdlm.data_text(None, None, texts, 2, 4, None, recipe)
    assert text.response_mask.sum(1).tolist() == [2, 2, 2, 4]
    assert text.tokens.tolist() == [[1, 9, 8, 2, 2, 2], [1, 9, 8, 3, 2, 2], [1, 9, 8, 1, 2, 2],
                                    [1, 9, 8, 7, 7, 7]]


def test_one_end_in_a_tuple_is_the_same_as_one_id(tiny):
    """Bit for bit, with and without cache, and in speculative decoding."""
    net = tiny()
    prompt = torch.tensor([[3, 4], [5, 6]])
    u = opdlm.uniforms(0, 0, range(2), (22, 3))
    for layout in (AR, Layout(4, 1, 1), Layout(4, 4, 0)):
        texts = []
        for eot in (7, (7,)):
            for denoiser in (Denoiser(net, layout), opdlm.PlainDenoiser(net, layout)):
                texts.append(opdlm.rollout(denoiser, prompt, 20, reveal.parse("static:1"), u[..., :1], eot))
        for text in texts[1:]:
            assert torch.equal(text.tokens, texts[0].tokens) and torch.equal(text.order, texts[0].order)
    one, same = (speculative_decode(net, Layout(4, 1, 1), prompt, 20, u, eot) for eot in (7, (7,)))
    assert torch.equal(one.tokens, same.tokens)
    several = speculative_decode(net, Layout(4, 1, 1), prompt, 20, u, (7, 2, 9))
    for tokens, accepted in zip(several.tokens, several.accepted_in):
        response = tokens[accepted >= 0].tolist()
        ends = [i for i, token in enumerate(response) if token in (7, 2, 9)]
        assert ends in ([], [len(response) - 1]) and (ends or len(response) == 20)


def test_helpers():
    tokens = torch.tensor([[1, 2], [3, 1]])
    assert is_end(tokens, 1).tolist() == [[True, False], [False, True]]
    assert is_end(tokens, (3, 1)).tolist() == [[True, False], [True, True]]
    assert (padding_id(4), padding_id((3, 1))) == (4, 3)


def test_the_sample_prompt_begins_with_bos(two_tokens):
    assert compare.sample_prompt_ids("On", two_tokens.tokenizer, 64)[0] == 1


def test_a_conversion_runs_and_its_student_ends_its_texts(run, tmp_path, capsys):
    """Training reads `bos text eos`, and the student that is saved has the same special tokens."""
    (tmp_path / "text.txt").write_text(TEXT)
    flags = [f"--init={run / 'ar'}", f"--data={tmp_path / 'text.txt'}", f"--out={tmp_path / 'out'}",
             "--length=48", "--distill_steps=2", "--warm_steps=1", "--batch=2", "--eval_every=2",
             "--device=cpu", "--max_prompt=2"]
    assert cli.run(train_tiny.main, flags) == 0, capsys.readouterr().err
    tok = tokenizer.load(tmp_path / "out" / "opdlm")
    assert (tok.bos, tok.ends) == (1, (2, 3, 1))
    records = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    rollout = [record for record in records if record.get("source") == "student-ar"]
    assert rollout and rollout[0]["len"] <= 6                    # <s>, a few of O n c e, the end
