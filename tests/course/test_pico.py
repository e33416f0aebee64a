"""course/opdlm_pico.py does what opdlm.py does, with the same weights, tokens and random numbers."""
import re
from pathlib import Path

import pytest
import torch

import opdlm
from course import opdlm_pico as pico
from decoding import reveal
from model import masks
from model.gpt import GPT, GPTConfig
from model.masks import Layout

FILE = Path(pico.__file__)
LAYOUT = Layout(pico.K)
NAMES = {"norm1": "ln_1", "norm2": "ln_2", "self_attn.in_proj_": "attn.c_attn.",
         "self_attn.out_proj": "attn.c_proj", "linear1": "mlp.c_fc", "linear2": "mlp.c_proj", "blocks": "h",
         "norm.": "ln_f.", "position": "wpe"}


def pair(seed: int) -> tuple[pico.GPT, GPT]:
    """A random network of the small file, and the project's GPT with the same weights."""
    torch.manual_seed(seed)
    small = pico.GPT(width=16, heads=2).double()
    with torch.no_grad():
        for p in small.parameters():
            p += 0.3 * torch.randn_like(p)
    state = small.state_dict()
    table = state.pop("token.weight")
    weights = {"wte.weight": table[:pico.V], "mask_vector": table[pico.V]}
    for name, tensor in state.items():
        for old, new in NAMES.items():
            name = re.sub(rf"(^|\.){re.escape(old)}", rf"\g<1>{new}", name)
        weights[name] = tensor
    net = GPT(GPTConfig(pico.V, pico.P + pico.R, 2, 2, 16)).double()
    net.load_state_dict(weights)
    return small, net


@pytest.fixture
def student():
    return pair(0)


@pytest.fixture
def teacher():
    return pair(1)


def rollouts(student) -> tuple[tuple, opdlm.Rollout]:
    """The same rollout by both, with the same random numbers."""
    small, net = student
    B = 5
    u = torch.rand(B, pico.P + pico.R)
    prompt = torch.randint(pico.V, (B, pico.P))
    rule = reveal.parse(f"leftmost:{pico.CONFIDENT}")
    denoiser = opdlm.PlainDenoiser(net, LAYOUT)
    return pico.rollout(small, prompt, u), opdlm.rollout(denoiser, prompt, pico.R, rule, u[..., None], eot=-1)


def test_an_ar_model_is_the_same(teacher):
    small, net = teacher
    tokens = torch.randint(pico.V, (3, 20))
    expected = net(tokens).view(3, 20, -1)[:, :-1]
    torch.testing.assert_close(pico.ar_logits(small, tokens), expected, rtol=0, atol=1e-10)


def test_a_rollout_is_the_same(student, monkeypatch):
    monkeypatch.setattr(pico, "CONFIDENT", 0.2)                  # some blocks take fewer steps than others
    (tokens, order, passes), expected = rollouts(student)
    assert torch.equal(tokens, expected.tokens)
    assert torch.equal(order, expected.order)
    assert torch.equal(passes.long(), expected.forwards)
    steps = order[:, pico.P:].unflatten(1, (-1, pico.K)).amax(-1)
    assert steps.min() < steps.max()


def test_the_logits_of_a_state_are_the_same(student):
    small, net = student
    B, P, R = 3, pico.P, pico.R
    tokens = torch.randint(pico.V, (B, P + R))
    masked = torch.rand(B, R) < 0.6
    noisy_text = tokens[:, P:].masked_fill(masked, pico.MASK)
    rows, slots = masked.nonzero(as_tuple=True)
    expected = opdlm.student_logits(net, tokens, noisy_text, P, LAYOUT, rows, slots + P)
    found = pico.student_logits(small, tokens, noisy_text)[rows, slots]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_loss_and_its_gradient_are_the_same(student, teacher, monkeypatch):
    monkeypatch.setattr(pico, "CONFIDENT", 0.2)
    (tokens, order, _), text = rollouts(student)
    u = torch.rand(len(tokens), pico.P + pico.R, 2)
    u_block = opdlm.per_block(u[:, pico.P:], pico.K)
    loss = pico.distill_loss(student[0], teacher[0], tokens, order, u_block)
    loss.backward()
    recipe = opdlm.Recipe(
        opdlm.student_text, opdlm.visited, lambda *args: opdlm.teacher_probs(*args).double(),
        opdlm.mean_of_masked, LAYOUT, eot=-1, batch=len(tokens),
    )
    optimizer = torch.optim.SGD(student[1].parameters(), lr=0.0)
    record = opdlm.train_step(student[1], teacher[1], text, pico.P, u, recipe, optimizer)
    assert loss.item() == pytest.approx(record["loss"], abs=1e-5)            # opdlm.py's loss is in float32
    torch.testing.assert_close(student[0].position.weight.grad, student[1].wpe.weight.grad, rtol=0, atol=1e-5)
    masked = student[0].token.weight.grad[pico.MASK]
    torch.testing.assert_close(masked, student[1].mask_vector.grad, rtol=0, atol=1e-5)


def test_the_mask_is_that_of_training():
    position = torch.cat([torch.arange(pico.P + pico.R), torch.arange(pico.P, pico.P + pico.R)])
    noisy = torch.arange(len(position)) >= pico.P + pico.R
    expected = masks.training_mask(pico.P + pico.R, pico.P, LAYOUT)
    assert torch.equal(pico.attention(position, noisy), expected)


def test_it_runs_and_prints_before_and_after(capsys, monkeypatch):
    for name, count in (("PRETRAINING", 2), ("WARM", 2), ("STEPS", 6), ("R", 8)):
        monkeypatch.setattr(pico, name, count)
    pico.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[::2]] == ["before", "after"]
    assert all("characters per forward pass" in line for line in lines[::2])
    assert all(len(line) == 4 + pico.P + pico.R for line in lines[1::2])


def test_it_has_at_most_150_lines_and_needs_only_torch():
    lines = [line for line in FILE.read_text().splitlines() if line.strip()]
    assert len(lines) <= 150
    imports = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imports == {"copy", "torch"}
