"""Muon, AdamW and the guard around them; schedules of the learning rate and of the response length."""
import copy

import pytest
import torch
import torch.nn.functional as F

from training import resume
from training.optim import LR_SHAPES, Muon, SkipNonFinite, length_schedule, lr_schedule, orthogonalize


def matrices(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Muon and AdamW -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows, columns", [(8, 8), (16, 48), (48, 16), (64, 64), (1, 12), (12, 1)])
def test_orthogonalize_keeps_the_singular_vectors_and_levels_the_values(rows, columns):
    """Singular values of a hundredth of the norm or more get near 1, no others exceed that."""
    g = matrices(3, rows, columns)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    in_basis = u.mT @ orthogonalize(g) @ vh.mT
    values = in_basis.diagonal(dim1=1, dim2=2)
    large = s > 0.01 * g.norm(dim=(1, 2))[:, None]
    assert large.float().mean() > 0.9
    assert values[large].min() > 0.6 and values.min() > 0 and values.max() < 1.3
    assert (in_basis - values.diag_embed()).abs().max() < 1e-4
    assert (F.cosine_similarity(orthogonalize(g).flatten(1), (u @ vh).flatten(1)) > 0.97).all()


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_orthogonalize_ignores_the_scale(scale):
    g = matrices(2, 8, 12)
    assert torch.allclose(orthogonalize(g * scale), orthogonalize(g), atol=1e-3)


def test_orthogonalize_alone_or_in_a_batch():
    g = matrices(4, 8, 24) * torch.tensor([1e-2, 1.0, 3.0, 1e2]).view(4, 1, 1)
    alone = torch.cat([orthogonalize(matrix[None]) for matrix in g])
    assert torch.allclose(orthogonalize(g), alone, atol=1e-5, rtol=0)


def names_of_groups(net, optimizer):
    """The names of Muon's parameters, and of AdamW's."""
    name_of = {id(p): name for name, p in net.named_parameters()}
    muon, adamw = optimizer.param_groups
    return {name_of[id(p)] for p in muon["params"]}, {name_of[id(p)] for p in adamw["params"]}


def test_muon_has_the_matrices_of_the_blocks_and_nothing_else(tiny):
    net = tiny(layers=2)
    muon, adamw = names_of_groups(net, Muon(net))
    assert muon == {f"h.{i}.{name}.weight" for i in range(2)
                    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert muon | adamw == {name for name, _ in net.named_parameters()} and not muon & adamw


def test_all_other_parameters_use_adamw(tiny):
    """Five steps with gradients that change in size and sign, against torch.optim.AdamW."""
    ours = tiny()
    theirs = tiny()
    optimizer = Muon(ours, lr=0.02, adam_ratio=0.15)
    _, names = names_of_groups(ours, optimizer)
    others = [p for name, p in theirs.named_parameters() if name in names]
    adamw = torch.optim.AdamW(others, lr=0.02 * 0.15, betas=(0.9, 0.95), eps=1e-10, weight_decay=0)
    generator = torch.Generator().manual_seed(3)
    for step in range(5):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 10.0 ** -step
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    theirs = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert name not in names or torch.allclose(p, theirs[name], atol=1e-6, rtol=0), name


@pytest.mark.parametrize("lr", [0.02, 0.1])
def test_a_step_has_the_length_of_its_learning_rate(tiny, lr):
    """In spectral norm lr * sqrt(max(1, rows / columns)), however small the gradient."""
    net = tiny(layers=1)
    optimizer = Muon(net, lr=lr)
    names, _ = names_of_groups(net, optimizer)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = 1e-3 * matrices(*p.shape).to(p)
    optimizer.step()
    for name, p in net.named_parameters():
        if name in names:
            length = lr * max(1, p.size(0) / p.size(1)) ** 0.5
            moved = torch.linalg.matrix_norm(p.detach() - before[name], 2)
            assert 0.6 * length < moved < 1.3 * length, name
            assert ((before[name] - p.detach()) * p.grad).sum() > 0                  # downhill


def test_momentum_is_nesterov_s(tiny):
    """For gradients g, h the direction is that of h (1 - m) + m (m (1 - m) g + (1 - m) h)."""
    net = tiny(layers=1)
    optimizer = Muon(net, lr=0.1)
    w = net.h[0].attn.c_proj.weight
    m = 0.95
    g, h = matrices(2, *w.shape).double()
    for grad in (g, h):
        w.grad = grad.clone()
        before = w.detach().clone()
        optimizer.step()
    direction = h * (1 - m) + m * (m * (1 - m) * g + (1 - m) * h)
    expected = orthogonalize(direction[None])[0]
    assert torch.allclose(before - w.detach(), 0.1 * expected, atol=1e-10)


def descend(net, optimizer, steps):
    """The losses of some steps; the tokens of a step depend on its number."""
    losses = []
    for step in steps:
        tokens = torch.randint(0, 11, (4, 12), generator=torch.Generator().manual_seed(step))
        logits = net(tokens).view(4, 12, -1)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", [Muon, lambda net: torch.optim.AdamW(net.parameters(), 0.01)],
                         ids=["muon", "adamw"])
def test_stopped_and_resumed_to_the_last_bit(tiny, tmp_path, make):
    net = tiny().float()
    start = copy.deepcopy(net)
    whole = descend(net, make(net), range(8))

    path = tmp_path / "state.safetensors"
    net = copy.deepcopy(start)
    optimizer = make(net)
    first = descend(net, optimizer, range(4))
    resume.save_state(path, net, optimizer, {"step": 4, "settings": {}})
    net = tiny(seed=9).float()
    optimizer = make(net)
    assert resume.load_state(path, net, optimizer, {})["step"] == 4
    assert first + descend(net, optimizer, range(4, 8)) == whole
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# SkipNonFinite --------------------------------------------------------------------------------------------

def guarded_sgd(grad_accum=1):
    """A parameter of two zeros, and SGD with rate 1."""
    p = torch.nn.Parameter(torch.zeros(2))
    return p, SkipNonFinite(torch.optim.SGD([p], 1.0), grad_accum)


def take_step(p, optimizer, gradient):
    optimizer.zero_grad()
    (p * torch.tensor(gradient)).sum().backward()
    optimizer.step()


def test_a_step_whose_gradient_is_not_finite_is_skipped(capsys):
    p, optimizer = guarded_sgd()
    for gradient in ([1.0, 2.0], [float("nan"), 1.0], [1.0, float("inf")], [1.0, 1.0]):
        take_step(p, optimizer, gradient)
    assert p.tolist() == [-2.0, -3.0] and optimizer.skipped == 2
    assert capsys.readouterr().out.count("not finite") == 2


def test_ten_skipped_steps_in_a_row_stop_the_run():
    p, optimizer = guarded_sgd()
    for _ in range(2):
        for _ in range(9):
            take_step(p, optimizer, [float("nan"), 0.0])
        if optimizer.skipped == 9:
            take_step(p, optimizer, [0.0, 0.0])                  # a finite gradient starts the count again
    with pytest.raises(ValueError, match="ten steps in a row"):
        take_step(p, optimizer, [float("nan"), 0.0])


def test_gradients_are_accumulated_as_a_sum():
    p, optimizer = guarded_sgd(grad_accum=3)
    for gradient in ([1.0, 0.0], [2.0, 0.0], [0.0, 5.0], [1.0, 1.0]):
        take_step(p, optimizer, gradient)
    assert p.tolist() == [-3.0, -5.0]


# schedules ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, half, last", [("linear", 0.5, 0.01), ("trapezoid", 1.0, 0.02),
                                               ("cosine", 0.55, 0.1), ("constant", 1.0, 1.0)])
def test_learning_rate_schedules(shape, half, last):
    """A warm-up to the peak, then down to the end; two groups keep their ratio."""
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (4.0, 1.0)]
    optimizer = torch.optim.SGD(groups)
    set_lr = lr_schedule(optimizer, shape, 100, warmup=10)

    def lr_at(step):
        set_lr(step)
        first, second = optimizer.param_groups
        assert first["lr"] == pytest.approx(4 * second["lr"])
        return second["lr"]
    assert lr_at(0) == pytest.approx(0.1 * LR_SHAPES[shape](0))
    assert lr_at(4) == pytest.approx(0.5 * LR_SHAPES[shape](0.04))
    assert lr_at(50) == pytest.approx(half) and lr_at(99) == pytest.approx(last, abs=2e-3)
    assert all(lr_at(i) >= lr_at(i + 1) for i in range(10, 99))


@pytest.mark.parametrize("shape, expected", [
    ("linear", [0.1, 0.91, 0.9, 0.5, 0.25, 0.01]),
    ("trapezoid", [0.1, 1.0, 1.0, 1.0, 0.5, 0.02]),
    ("cosine", [0.1, 0.9821322, 0.9779754, 0.55, 0.2318019, 0.1002220]),
    ("constant", [0.1, 1.0, 1.0, 1.0, 1.0, 1.0])])
def test_learning_rates_by_hand(shape, expected):
    """At the first step, the last one of the warm-up, the next one, halfway, at 3/4, and at the last step.

    The first step is taken at a tenth of the peak: a rate of 0 would waste it.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    set_lr = lr_schedule(optimizer, shape, 100)
    rates = []
    for step in (0, 9, 10, 50, 75, 99):
        set_lr(step)
        rates.append(optimizer.param_groups[0]["lr"] / 2)
    assert rates == pytest.approx(expected, abs=1e-6)


def test_the_response_length_grows_to_the_longest():
    length = length_schedule(4, 96, 10)
    lengths = [length(step) for step in range(12)]
    assert lengths[0] == 4 and lengths[10:] == [96, 96] and lengths == sorted(lengths)
    assert length_schedule(4, 96, 0)(0) == 96
