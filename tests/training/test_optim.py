import copy

import pytest
import torch
import torch.nn.functional as F

from training import resume
from training.optim import Muon, orthogonal


def matrices(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows, columns", [(8, 8), (16, 48), (48, 16), (64, 64), (1, 12), (12, 1)])
def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values(rows, columns):
    """Values that are at least a hundredth of the norm come near 1, all others no higher, and no vector turns."""
    g = matrices(3, rows, columns)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    made = u.mT @ orthogonal(g) @ vh.mT
    values = made.diagonal(dim1=1, dim2=2)
    seen = s > 0.01 * g.norm(dim=(1, 2))[:, None]
    assert seen.float().mean() > 0.9 and values[seen].min() > 0.6 and values.min() > 0 and values.max() < 1.3
    assert (made - values.diag_embed()).abs().max() < 1e-4
    assert (F.cosine_similarity(orthogonal(g).flatten(1), (u @ vh).flatten(1)) > 0.97).all()


@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_orthogonal_does_not_look_at_the_size(size):
    g = matrices(2, 8, 12)
    assert torch.allclose(orthogonal(g * size), orthogonal(g), atol=1e-3)


def test_orthogonal_alone_or_together():
    g = matrices(4, 8, 24) * torch.tensor([1e-2, 1.0, 3.0, 1e2]).view(4, 1, 1)
    alone = torch.cat([orthogonal(one[None]) for one in g])
    assert torch.allclose(orthogonal(g), alone, atol=1e-5, rtol=0)


def groups(net, **how):
    optimizer = Muon(net, **how)
    named = {id(p): name for name, p in net.named_parameters()}
    return optimizer, *({named[id(p)] for p in group["params"]} for group in optimizer.param_groups)


def test_muon_has_the_blocks_matrices_and_nothing_else(tiny):
    net = tiny(layers=2)
    _, muon, adam = groups(net)
    assert muon == {f"h.{i}.{name}.weight" for i in range(2)
                    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert muon | adam == {name for name, _ in net.named_parameters()} and not muon & adam


def test_all_else_is_adamw(tiny):
    """Five steps with gradients that change in size and sign, against torch's."""
    ours, theirs = tiny(), tiny()
    optimizer, _, names = groups(ours, lr=0.02, adam=0.15)
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
    optimizer, names, _ = groups(net, lr=lr)
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
    """Two gradients g, h: the matrix to be made orthogonal is h (1 - m) + m (m (1 - m) g + (1 - m) h)."""
    net = tiny(layers=1)
    optimizer, m, w = Muon(net, lr=0.1), 0.95, net.h[0].attn.c_proj.weight
    g, h = matrices(2, *w.shape).double()
    for grad in (g, h):
        w.grad, before = grad.clone(), w.detach().clone()
        optimizer.step()
    wanted = orthogonal((h * (1 - m) + m * (m * (1 - m) * g + (1 - m) * h))[None])[0]
    assert torch.allclose(before - w.detach(), 0.1 * wanted, atol=1e-10)


def descend(net, optimizer, steps):
    """The losses of a few steps, each on tokens of its own."""
    losses = []
    for step in steps:
        tokens = torch.randint(0, 11, (4, 12), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(net(tokens).view(4, 12, -1)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", [Muon, lambda net: torch.optim.AdamW(net.parameters(), 0.01)], ids=["muon", "adamw"])
def test_stopped_and_resumed_to_the_last_bit(tiny, tmp_path, make):
    net = tiny().float()
    start = copy.deepcopy(net)
    whole = descend(net, make(net), range(8))
    net, path = copy.deepcopy(start), tmp_path / "state.safetensors"
    optimizer = make(net)
    first = descend(net, optimizer, range(4))
    resume.save_state(path, net, optimizer, {"step": 4, "settings": {}})
    net = tiny(seed=9).float()
    optimizer = make(net)
    assert resume.load_state(path, net, optimizer, {})["step"] == 4
    assert first + descend(net, optimizer, range(4, 8)) == whole
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
