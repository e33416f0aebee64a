"""A student's export runs in `transformers`: its text is ours, token for token at temperature 0."""
import ast
import json
import re
import shutil
import sys

import pytest
import torch

import opdlm
from data import tokenizer
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig
from decoding.speculative import speculative_decode
from model import checkpoint, files, lora
from model.gpt import GPT, GPTConfig
from model.masks import Layout
from tests.model import test_llama

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TOK = tokenizer.word_level(["One", " ball", "."])
KINDS = {"gpt2": None, **test_llama.KINDS}
AR_ALIGNED = Layout(4, 1, 1)
LAYOUTS = [AR_ALIGNED, Layout(4, 4, 0), Layout(4, 4, 1), Layout(4, 1, 0), Layout(1, 1, 1)]
GREEDY = SamplingConfig(temperature=0)
LENGTH = 11                 # not a multiple of the block size
CODE = "modeling_opdlm.py"


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """transformers keeps copies of remote code in a folder of the user: here in another one."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def network(kind="gpt2", seed=0):
    """A small random network whose distributions are neither flat nor certain."""
    if KINDS[kind]:
        return test_llama.llama(**{**KINDS[kind], "vocab": TOK.vocab_size}, seed=seed).float()
    generator = torch.Generator().manual_seed(seed)
    net = GPT(GPTConfig(TOK.vocab_size, 48, 2, 2, 16)).init_weights(generator)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return net


def exported(folder, net, layout, **extra):
    """The folder of an export."""
    checkpoint.save(folder / "run", net, TOK, layout, **extra)
    checkpoint.export(folder / "run", folder / "student")
    return folder / "student"


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)


def prompts(net):
    """(B, P) four prompts."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, min(net.config.vocab, net.mask_id), (4, 6), generator=generator)


def ours(net, layout, rule, prompt, ends, length=LENGTH, prompt_len=None):
    """The responses, as lists: by diffusion with a reveal rule; None: by speculative decoding."""
    u = torch.full((len(prompt), prompt.size(1) + length, 3), 0.5)
    if rule is None:
        text = speculative_decode(net, layout, prompt, length, u, ends, GREEDY, prompt_len=prompt_len)
        response_mask = text.accepted_in >= 0
    else:
        text = opdlm.rollout(Denoiser(net, layout), prompt, length, reveal.parse(rule), u, ends, GREEDY,
                             prompt_len)
        response_mask = text.response_mask
    return [tokens[mask].tolist() for tokens, mask in zip(text.tokens, response_mask)]


def responses(tokens, prompt_len, ends):
    """The responses in what `generate` returns, without the padding."""
    found = []
    for row in tokens[:, prompt_len:].tolist():
        at_end = [i for i, token in enumerate(row) if token in ends]
        found.append(row[:at_end[0] + 1] if at_end else row)
    return found


def remote_code(model):
    """The module of a student's code."""
    return sys.modules[type(model).__mro__[1].__module__]


# the same text ------------------------------------------------------------------------------------------

CASES = [(kind, layout) for kind in ("gpt2", "llama, its own head") for layout in LAYOUTS]
CASES += [(kind, layout) for kind in ("llama", "qwen2", "qwen3", "a2d-qwen3") for layout in LAYOUTS[:2]]


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=str)
def test_generate_writes_our_text(tmp_path, kind, layout):
    net = network(kind)
    model = load(exported(tmp_path, net, layout))
    prompt = prompts(net)[:2]
    rules = ["leftmost:0.08", "threshold:0.08", "static:3", *([None] if layout.is_ar_model else [])]
    texts = []
    for rule in rules:
        expected = ours(net, layout, rule, prompt, ends=-1)
        how = {"mode": "speculative"} if rule is None else {"reveal": rule}
        tokens = model.generate(prompt, max_new_tokens=LENGTH, eos_token_id=-1, **how)
        assert torch.equal(tokens[:, :6], prompt)
        assert tokens[:, 6:].tolist() == expected, rule
        texts.append(expected)
    assert layout.block == 1 or len({str(text) for text in texts}) > 2   # the rules matter


def test_the_reveal_rules_are_ours(tmp_path):
    code = remote_code(load(exported(tmp_path, network(), AR_ALIGNED)))
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 5, 8):
        for confidence in torch.rand(20, size, generator=generator):
            for rule in ("leftmost:0.5", "leftmost:1", "threshold:0.5", "threshold:1", "static:1",
                         "static:3"):
                masked = torch.ones(1, size, dtype=torch.bool)
                expected = reveal.parse(rule)(confidence[None], masked, None, None)[0]
                assert torch.equal(code.choose(rule, confidence), expected), rule


@pytest.mark.parametrize("rule", ["leftmost:0.08", "static:2", None])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_text_ends_where_ours_ends(tmp_path, kind, rule):
    net = network(kind)
    model = load(exported(tmp_path, net, AR_ALIGNED))
    prompt = prompts(net)
    how = {"mode": "speculative"} if rule is None else {"reveal": rule}
    written = ours(net, AR_ALIGNED, rule, prompt, ends=-1)
    for ends in ([written[0][2], written[1][5]], [written[2][0]]):
        expected = ours(net, AR_ALIGNED, rule, prompt, tuple(ends))
        tokens = model.generate(prompt, max_new_tokens=LENGTH, eos_token_id=ends, **how)
        assert responses(tokens, 6, ends) == expected
        longest = max(len(response) for response in expected)
        padding = [[ends[0]] * (longest - len(response)) for response in expected]
        assert tokens[:, 6:].tolist() == [a + b for a, b in zip(expected, padding)]
        assert min(len(response) for response in expected) < LENGTH


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_prompts_of_different_lengths_are_padded_at_the_left(tmp_path, layout):
    net = network()
    model = load(exported(tmp_path, net, layout))
    prompt = prompts(net)
    lengths = torch.tensor([6, 3, 1, 4])
    expected = ours(net, layout, "leftmost:0.08", prompt, -1, prompt_len=lengths)
    at_left = torch.zeros_like(prompt)
    for row, length in enumerate(lengths.tolist()):
        at_left[row, 6 - length:] = prompt[row, :length]
    attention_mask = (torch.arange(6) >= 6 - lengths[:, None]).long()
    tokens = model.generate(at_left, attention_mask=attention_mask, max_new_tokens=LENGTH, eos_token_id=-1,
                            reveal="leftmost:0.08")
    assert torch.equal(tokens[:, :6], at_left) and tokens[:, 6:].tolist() == expected


def test_the_defaults_are_those_that_the_student_was_trained_for(tmp_path):
    net = network()
    prompt = prompts(net)
    ends = TOK.ends if isinstance(TOK.ends, tuple) else (TOK.ends,)
    for mode, rule in (("diffusion", "threshold:0.08"), ("speculative", None)):
        folder = tmp_path / mode
        student = exported(folder, net, AR_ALIGNED, reveal="threshold:0.08", mode=mode, confidence="drawn")
        model = load(student)
        tokens = model.generate(prompt, max_new_tokens=LENGTH)
        assert responses(tokens, 6, ends) == ours(net, AR_ALIGNED, rule, prompt, ends)
        tokens = model.generate(prompt, max_new_tokens=LENGTH, reveal="static:2")
        assert responses(tokens, 6, ends) == ours(net, AR_ALIGNED, "static:2", prompt, ends)


def test_a_text_may_fill_the_context(tmp_path):
    net = network()
    model = load(exported(tmp_path, net, AR_ALIGNED))
    prompt = prompts(net)[:1]
    for rule, how in ((None, {"mode": "speculative"}), ("static:2", {"reveal": "static:2"})):
        tokens = model.generate(prompt, max_new_tokens=42, eos_token_id=-1, **how)
        assert tokens[:, 6:].tolist() == ours(net, AR_ALIGNED, rule, prompt, -1, length=42)


def test_a_mask_in_the_vocabulary_is_never_generated(tmp_path):
    net = network("a2d-qwen3")
    with torch.no_grad():
        net.wte.weight[net.mask_id] *= 20                        # the table is also the output layer
    model = load(exported(tmp_path, net, AR_ALIGNED))
    prompt = prompts(net)
    assert (model(prompt).logits.argmax(-1) == net.mask_id).any()
    tokens = model.generate(prompt, max_new_tokens=LENGTH, mode="speculative", eos_token_id=-1)
    assert (tokens != net.mask_id).all()
    assert tokens[:, 6:].tolist() == ours(net, AR_ALIGNED, None, prompt, -1)


def test_drafts_are_the_first_step_of_a_block(tmp_path, monkeypatch):
    net = network()
    model = load(exported(tmp_path, net, AR_ALIGNED))
    code = remote_code(model)
    seen = []
    verified = code.verified
    monkeypatch.setattr(code, "verified", lambda drafts, q, p: seen.append(drafts) or verified(drafts, q, p))
    for prompt in prompts(net)[:, None]:
        seen.clear()
        model.generate(prompt, max_new_tokens=LENGTH, mode="speculative", eos_token_id=-1)
        assert [seen[0].tolist()] == ours(net, AR_ALIGNED, "static:4", prompt, -1, length=4)
        assert len(seen) < LENGTH                                # drafts are accepted


def test_all_ids_that_end_a_text_are_read(tmp_path):
    folder = exported(tmp_path, network(), AR_ALIGNED)
    config = files.read_json(folder / "config.json")
    config.update(bos_token_id=4, eos_token_id=[5, 6])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"bos_token_id": 4, "eos_token_id": [6, 7]}')
    assert set(load(folder).end_ids(None).tolist()) == {4, 5, 6, 7}


def test_the_shipped_student_tells_the_same_story(tmp_path):
    folder = checkpoint.REMOTE_CODE.parents[1] / "pretrained"
    checkpoint.export(folder, tmp_path / "student")
    model = load(tmp_path / "student", torch_dtype=torch.float32)
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    net, layout = checkpoint.load(folder)
    prompt = torch.tensor([[tok.bos_token_id, *tok.encode("Once upon a time")]])
    for rule, how in ((None, {}), ("leftmost:0.98", {"mode": "diffusion"})):     # speculative is its default
        tokens = model.generate(prompt, max_new_tokens=24, **how)
        assert tokens[:, prompt.size(1):].tolist() == ours(net, layout, rule, prompt, tok.eos_token_id, 24)


def test_the_commands_of_the_page_write_the_story(tmp_path, monkeypatch, capsys):
    root = checkpoint.REMOTE_CODE.parents[2]
    page = (root / "docs/checkpoints.md").read_text(encoding="utf-8")
    commands = re.search(r"^```python\n(.*?)^```", page, re.M | re.S)[1]
    monkeypatch.chdir(tmp_path)
    checkpoint.export(root / "model/pretrained", "my-student")
    exec(commands, {})
    assert "Once upon a time, there was a little girl" in capsys.readouterr().out


# the same distribution ----------------------------------------------------------------------------------

def test_tokens_are_drawn_with_the_temperature(tmp_path):
    net = network()
    model = load(exported(tmp_path, net, AR_ALIGNED))
    prompt = prompts(net)[:1]
    logits = net(prompt)[-1]
    probs = (logits / 0.2).softmax(-1)
    assert (probs - logits.softmax(-1)).abs().max() > 0.2
    torch.manual_seed(0)
    for how in ({"mode": "speculative"}, {"reveal": "static:1"}):
        tokens = model.generate(prompt.expand(300, -1), max_new_tokens=1, temperature=0.2, **how)
        shares = tokens[:, -1].bincount(minlength=TOK.vocab_size) / 300
        assert (shares - probs).abs().max() < 0.08


@pytest.mark.parametrize("confidence", ["largest", "drawn"])
def test_the_confidence_is_the_student_s(tmp_path, monkeypatch, confidence):
    """The largest probability does not depend on what was drawn, that of the drawn token does."""
    net = network()
    model = load(exported(tmp_path, net, AR_ALIGNED, confidence=confidence))
    code = remote_code(model)
    choose = code.choose
    seen = []
    monkeypatch.setattr(code, "choose", lambda rule, x: seen.append(x) or choose(rule, x))
    torch.manual_seed(0)
    for _ in range(2):
        model.generate(prompts(net)[:1], max_new_tokens=4, reveal="static:4", temperature=100.0)
    first, second = seen
    assert torch.equal(first, second) == (confidence == "largest")
    assert ((first > 0) & (first < 1)).all()


def test_verified_drafts_have_the_verifier_s_distribution(tmp_path):
    code = remote_code(load(exported(tmp_path, network(), AR_ALIGNED)))
    torch.manual_seed(0)
    q = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    p = torch.tensor([[0.3, 0.3, 0.4], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]])
    counts = torch.zeros(3, 3)
    for _ in range(3000):
        tokens = code.verified(code.draw(q), q, p)
        for position, token in enumerate(tokens.tolist()):
            counts[position, token] += 1
    shares = counts / counts.sum(1, keepdim=True)
    assert (shares - p).abs().max() < 0.04
    assert counts[0].sum() == 3000
    assert abs(counts[1].sum() / 3000 - 0.6) < 0.04              # min(0.7, 0.3) + min(0.2, 0.3) + 0.1


def test_a_draft_that_is_rejected_by_rounding_is_drawn_again(tmp_path, monkeypatch):
    code = remote_code(load(exported(tmp_path, network(), AR_ALIGNED)))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1.0))   # as in u * q >= p, p = q
    p = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert code.verified(torch.tensor([1]), p[:1], p).tolist() == [1]


# the folder ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_without_trust_the_folder_is_the_ar_model(tmp_path, kind):
    """Also in a process that has loaded the student."""
    net = network(kind)
    folder = exported(tmp_path, net, AR_ALIGNED)
    prompt = prompts(net)
    for trust in (False, True, None):
        kwargs = {} if trust is None else {"trust_remote_code": trust}
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True,
                                                                        **kwargs)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(model).__module__.startswith("transformers.") == (not trust)
        logits = model(prompt).logits.flatten(0, 1)
        is_mask = torch.arange(TOK.vocab_size) == net.mask_id    # we never generate it
        assert torch.allclose(torch.where(is_mask, logits, net(prompt)), logits, atol=1e-5, rtol=1e-5)


def test_an_export_of_an_export_is_the_same(tmp_path):
    net = network()
    folder = exported(tmp_path, net, AR_ALIGNED, reveal="leftmost:0.9")
    assert (folder / CODE).read_bytes() == checkpoint.REMOTE_CODE.read_bytes()
    checkpoint.export(folder, tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    again, layout = checkpoint.load(tmp_path / "again")
    assert layout == AR_ALIGNED
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in net.state_dict().items())


def test_an_ar_model_and_an_adapter_get_no_code(tmp_path):
    checkpoint.save(tmp_path / "ar", network(), TOK)
    adapter = lora.adapt(network(), 2)
    checkpoint.save(tmp_path / "adapter", adapter, TOK, AR_ALIGNED, base=str(tmp_path / "ar"))
    for name in ("ar", "adapter"):
        checkpoint.export(tmp_path / name, tmp_path / "out" / name)
        assert not (tmp_path / "out" / name / CODE).exists()
        assert "auto_map" not in checkpoint.read_config(tmp_path / "out" / name)


def test_the_mask_vector_is_found_in_the_cache_of_the_hub(tmp_path):
    net = network()
    folder = exported(tmp_path, net, AR_ALIGNED)
    repository = tmp_path / "cache" / "models--me--student"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    model = load("me/student", cache_dir=tmp_path / "cache", local_files_only=True)
    assert torch.equal(model.mask_vector, net.mask_vector)


def test_the_code_needs_nothing_of_this_project():
    imported = set()
    for node in ast.walk(ast.parse(checkpoint.REMOTE_CODE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported == {"torch", "transformers", "safetensors"}


REFUSED = {
    "mode='ar'": {"mode": "ar"},
    "reveal='eb:0.1': expected leftmost:P or threshold:P": {"reveal": "eb:0.1"},
    "reveal='leftmost:98'": {"reveal": "leftmost:98"},
    "reveal='static:0.5'": {"reveal": "static:0.5"},
    "temperature=-1: expected a number from 0": {"temperature": -1},
    "a prompt of 6 tokens and max_new_tokens=43: expected at least 1 each, together at most 48":
        {"max_new_tokens": 43},
    "a prompt of 6 tokens and max_new_tokens=0": {"max_new_tokens": 0},
}


def test_what_is_not_possible_is_refused(tmp_path):
    net = network()
    model = load(exported(tmp_path / "a", net, AR_ALIGNED))
    prompt = prompts(net)
    for message, arguments in REFUSED.items():
        with pytest.raises(ValueError) as error:
            model.generate(prompt, **{"max_new_tokens": 4, **arguments})
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="a prompt of 0 tokens"):
        model.generate(prompt[:, :0], max_new_tokens=4)
    model = load(exported(tmp_path / "b", net, Layout(4, 4, 0), confidence="entropy"))
    with pytest.raises(ValueError, match="this student cannot verify its own drafts"):
        model.generate(prompt, max_new_tokens=4, mode="speculative")
    with pytest.raises(ValueError, match="confidence='entropy' in config.json"):
        model.generate(prompt, max_new_tokens=4)
    model = load(tmp_path / "a" / "student", attn_implementation="eager")
    with pytest.raises(ValueError, match="attn_implementation='eager': expected 'sdpa'"):
        model.generate(prompt, max_new_tokens=4)
