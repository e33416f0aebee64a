"""The AR model under an adapter stays as it is, to the last bit; the files are those of peft."""
import json
import re
import shutil

import pytest
import torch

import opdlm
from data.corpus import story_world_corpus
from decoding import reveal
from decoding.sampling import SamplingConfig
from model import checkpoint, lora
from model.masks import AR, Layout
from report import generate
from tests.model import test_llama

KINDS = ("gpt2", "llama", "qwen2", "qwen3", "a2d-qwen3")
LAYOUT = Layout(4, 1, 1)
EOT = 0


@pytest.fixture(params=KINDS)
def net(request, tiny):
    if request.param == "gpt2":
        return tiny()
    return test_llama.maker(test_llama.KINDS[request.param])()


def disturb(student, scale=0.5):
    """As after training: A, B and the [MASK] vector are random."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p += scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return student


def text(net, rows=3, length=12):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, min(net.config.vocab, 11), (rows, length), generator=generator)


def with_masks(net):
    tokens = text(net)
    tokens[0, 3:7] = net.mask_id
    tokens[2, -1] = net.mask_id
    return tokens


def test_the_student_is_the_teacher_at_the_start(net):
    student = lora.adapt(net, 3)
    assert torch.equal(student(with_masks(net)), net(with_masks(net)))


def test_the_weights_are_not_copied(net):
    names = dict(net.named_parameters())
    student = lora.adapt(net, 3)
    for name, p in student.named_parameters():
        if p.requires_grad:
            assert name in lora.adapter_names(student)
        else:
            assert p is names[name]
    trained = sum(p.requires_grad for p in student.parameters())
    assert trained == len(lora.adapter_names(student)) > 0
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("grad", [True, False])
def test_text_is_read_by_the_ar_model_to_the_last_bit(net, grad):
    """Also in the same pass as masks, if it stands before them, and at the positions that are read."""
    student = disturb(lora.adapt(net, 3))
    tokens = with_masks(net)
    read = torch.tensor([2, 5, 14, 35, 20, 1, 34])
    with torch.set_grad_enabled(grad):
        assert torch.equal(student(text(net)), net(text(net)))
        logits = student(tokens)
        teacher = net(tokens)
        assert torch.allclose(student(tokens, None, None, read), logits[read], atol=1e-10)
    before_masks = [0, 1, 2, *range(12, 24), *range(24, 34)]
    assert torch.equal(logits[before_masks], teacher[before_masks])
    assert not torch.allclose(logits[3], teacher[3], atol=1e-3)
    assert not torch.allclose(logits[35], teacher[35], atol=1e-3)


def test_the_adapter_is_on_at_masks():
    """By hand: one layer, whose input is a mask in the second position."""
    linear = torch.nn.Linear(2, 2, bias=False)
    gate = lora.Gate(mask_id=9)
    layer = lora.AdaptedLinear(linear, 1, gate, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.lora_A.copy_(torch.tensor([[10.0, 0.0]]))
        layer.lora_B.copy_(torch.tensor([[1.0], [2.0]]))
    gate.prepare(None, (torch.tensor([[5, 9]]),), {})
    assert layer(torch.ones(1, 2, 2)).tolist() == [[[3.0, 7.0], [13.0, 27.0]]]
    gate.prepare(None, (torch.tensor([[5, 9]]), None, None, torch.tensor([1])), {})
    assert layer(torch.ones(1, 2)).tolist() == [[13.0, 27.0]]
    gate.prepare(None, (torch.tensor([[5, 9]]),), {"read": torch.tensor([0])})
    assert layer(torch.ones(1, 2)).tolist() == [[3.0, 7.0]]


def test_what_the_student_drafts_and_verifies_is_the_ar_models_text(net):
    """Greedy, and at temperature 1 from the same distributions: the verifier is the AR model."""
    student = disturb(lora.adapt(net, 3))
    prompt = text(net, length=4)
    greedy = SamplingConfig(temperature=0)
    ar = generate.diffusion_generator(net, AR, reveal.parse("static:1"), greedy)
    drafted = generate.speculative_generator(student, LAYOUT, None, greedy)
    expected = ar(prompt, 20, 0, range(3), EOT)
    found = drafted(prompt, 20, 0, range(3), EOT)
    assert torch.equal(found.tokens * found.response_mask, expected.tokens * expected.response_mask)
    assert found.forwards.sum() <= expected.forwards.sum()


@pytest.mark.parametrize("states", [opdlm.all_masked, opdlm.prefix_shown])
@pytest.mark.parametrize("length", [12, 14])
def test_text_read_without_gradients_gives_the_same_loss(net, states, length):
    """Logits and gradients are those of one pass over text and response, also with a last short block."""
    student = disturb(lora.adapt(net, 3), 0.2)
    tokens = text(net, 2, length)
    P = 3
    response = torch.ones(2, length - P, dtype=torch.bool)
    masked = states(response.long(), response, torch.rand(2, length - P, 2), LAYOUT.block)
    noisy = tokens[:, P:].masked_fill(masked, student.mask_id)
    rows, slots = masked.nonzero(as_tuple=True)
    logits, grads = {}, {}
    for function in (opdlm.student_logits, lora.student_logits):
        student.zero_grad()
        logits[function] = function(student, tokens, noisy, P, LAYOUT, rows, slots + P)
        logits[function].square().mean().backward()
        grads[function] = [p.grad.clone() for p in student.parameters() if p.requires_grad]
    torch.testing.assert_close(*logits.values(), atol=1e-5, rtol=1e-4)
    for plain, fast in zip(*grads.values(), strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-3)


def test_gradients_with_and_without_checkpointing(tiny):
    from model.gpt import checkpointed
    grads = []
    for is_checkpointed in (False, True):
        net = checkpointed(tiny(), is_checkpointed)
        student = disturb(lora.adapt(net, 3))
        loss = student(with_masks(net), None, None, torch.tensor([3, 5, 35])).square().sum()
        loss.backward()
        grads.append([p.grad for p in student.parameters() if p.requires_grad])
        assert all(p.grad is None for p in net.parameters())
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b) and a.abs().sum() > 0


def test_a_base_in_bf16_has_a_precise_adapter(tiny):
    net = tiny().bfloat16()
    student = lora.adapt(net, 3)
    dtypes = {name: p.dtype for name, p in student.named_parameters()}
    assert {dtypes.pop(name) for name in lora.adapter_names(student)} == {torch.float32}
    assert set(dtypes.values()) == {torch.bfloat16}
    logits = disturb(student)(with_masks(net))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


# files ----------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path, monkeypatch, request):
    """The folders ar and student, of a Llama or GPT-2 in float32; and the student itself."""
    monkeypatch.chdir(tmp_path)
    tok = story_world_corpus(stories=20, held_out=2).tokenizer

    def save(kind, tiny):
        sizes = {"vocab": tok.vocab_size, "width": 16}
        net = tiny(**sizes) if kind == "gpt2" else test_llama.llama(**sizes, family=kind, tied=True)
        net = net.float()
        checkpoint.save("ar", net, tok)
        student = disturb(lora.adapt(net, 3))
        checkpoint.save("student", student, tok, LAYOUT, base="../ar", reveal="leftmost:0.9")
        return student
    return save


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_saved_and_loaded(kind, saved, tiny, tmp_path):
    student = saved(kind, tiny)
    assert not (tmp_path / "student/model.safetensors").exists()
    loaded, layout = checkpoint.load("student")
    assert layout == LAYOUT and torch.equal(loaded(with_masks(student)), student(with_masks(student)))
    checkpoint.export("student", tmp_path / "elsewhere/deep")
    exported, layout = checkpoint.load(tmp_path / "elsewhere/deep")
    assert layout == LAYOUT and torch.equal(exported(with_masks(student)), student(with_masks(student)))
    config = checkpoint.read_config("elsewhere/deep")
    assert config["base"] == str(tmp_path / "ar") and config["reveal"] == "leftmost:0.9"


def edit(file, **changes):
    from pathlib import Path
    settings = json.loads(Path(file).read_text())
    Path(file).write_text(json.dumps(settings | changes))


def test_an_adapter_without_its_ar_model(saved, tiny, tmp_path):
    saved("gpt2", tiny)
    edit("student/adapter_config.json", r=0)
    with pytest.raises(ValueError, match="r in config.json: expected an integer from 1 to"):
        checkpoint.load("student")
    edit("student/adapter_config.json", r=4)
    with pytest.raises(ValueError, match=re.escape("expected shape (4, 16), got (3, 16)")):
        checkpoint.load("student")
    edit("student/adapter_config.json", r=3)
    edit("student/config.json", base="../student")
    with pytest.raises(ValueError, match="is an adapter itself"):
        checkpoint.load("student")
    edit("student/config.json", base="../ar")
    with pytest.raises(ValueError, match="is a student that is an adapter of .*ar: give that checkpoint"):
        checkpoint.ar_folder("student")
    with pytest.raises(ValueError, match="--dtype has no effect on student: it is an adapter of"):
        checkpoint.export("student", "new", torch.bfloat16)
    shutil.move("ar", "moved")
    with pytest.raises(ValueError, match="student is an adapter of the AR model in .*ar, which is not there"):
        checkpoint.load("student")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_peft_reads_the_adapter(kind, saved, tiny, monkeypatch):
    """peft has the adapter on at every position; with our gate open everywhere the logits are the same."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    student = saved(kind, tiny)
    model = AutoModelForCausalLM.from_pretrained("ar")
    model = peft.PeftModel.from_pretrained(model, "student").eval()
    monkeypatch.setattr(lora.Gate, "of", lambda gate, x: torch.tensor(True))
    tokens = text(student)
    with torch.no_grad():
        theirs = model(tokens).logits.flatten(0, 1)
    ours = student(tokens)
    assert torch.allclose(ours, theirs, atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(ours, model(tokens).logits.flatten(0, 1), atol=1e-2)
