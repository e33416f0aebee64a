"""The lean loss is the plain one; its bucket is a divergence; and nothing in it is (N, V)."""
import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import opdlm
from model.gpt import GPT, GPTConfig, checkpointed
from model.masks import Layout
from training import chunked_kl as loss
from training import chunked_kl as targets
from training import dist
from training.chunked_kl import LazyLogits
from training.optim import SkipNonFinite

EOT, V = 10, 11
KINDS = ["full", "topk:1", "topk:4", "topk:10", "topk:11", "topk:99"]


def sides(N=7, C=5, dtype=torch.float64, seed=0, scale=1.0):
    """The teacher's and the student's logits, and a weight for each place."""
    def make(*shape):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    return LazyLogits(make(N, C), make(V, C)), LazyLogits(make(N, C).requires_grad_(), make(V, C).requires_grad_()), make(N).abs()


def target_of(kind, teacher):
    return teacher if kind == "full" else targets.top(teacher, int(kind[5:]))


def plain_logits(late):
    logits = F.linear(late.hidden, late.table, late.bias)
    return logits if logits.dtype == torch.float64 else logits.float()


def plain_kl(kind, teacher, student):
    """The same numbers from whole tensors, written as the definition says."""
    q, p = plain_logits(teacher).log_softmax(-1), plain_logits(student).log_softmax(-1)
    if kind != "full" and int(kind[5:]) < V:
        best = q.topk(int(kind[5:])).indices
        rest = torch.ones_like(q, dtype=torch.bool).scatter(1, best, False)
        q, p = (torch.cat([x.gather(1, best), x.masked_fill(~rest, -torch.inf).logsumexp(1, True)], 1) for x in (q, p))
    return (q.exp() * (q - p)).sum(-1)


def with_gradients(kl, weight, student):
    return [kl, *torch.autograd.grad((kl * weight).sum(), (student.hidden, student.table))]


# the number ----------------------------------------------------------------------------------------------------------

def test_by_hand():
    """q = (1/2, 1/4, 1/4), p = (1/4, 1/4, 1/2). One token and a bucket of two: (1/2, 1/2) against (1/4, 3/4)."""
    teacher, student = (LazyLogits(torch.eye(3), torch.tensor(x).log().expand(3, 3).T.contiguous())
                        for x in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    full, bucketed = (loss.distill_loss(target, student)[0].item() for target in (teacher, targets.top(teacher, 1)))
    assert full == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))
    assert bucketed == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    text = loss.distill_loss(targets.Text(torch.tensor([[2]] * 3)), student)
    assert text.tolist() == pytest.approx([math.log(2)] * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_are_at_0_and_stay(kind):
    _, student, weight = sides()
    same = LazyLogits(student.hidden.detach(), student.table.detach())
    kl, *gradients = with_gradients(loss.distill_loss(target_of(kind, same), student), weight, student)
    assert kl.abs().max() < 1e-12 and all(g.abs().max() < 1e-12 for g in gradients)


def test_the_bucketed_kl_grows_with_k_up_to_the_full_one():
    teacher, student, _ = sides(N=200)
    full = loss.distill_loss(teacher, student)
    some = [loss.distill_loss(targets.top(teacher, k), student) for k in range(1, V + 1)]
    assert all((b >= a - 1e-12).all() for a, b in zip([torch.zeros(200), *some], [*some, full]))
    assert torch.allclose(some[-1], full, atol=1e-10, rtol=0) and (full - some[3] > 0.01).any()


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_plain_loss_and_its_gradients(kind, dtype, near, chunk, monkeypatch):
    """Whatever the chunk is."""
    monkeypatch.setattr(targets, "CHUNK", chunk)
    teacher, student, weight = sides(dtype=dtype)
    chunked_kl = with_gradients(loss.distill_loss(target_of(kind, teacher), student), weight, student)
    for a, b in zip(chunked_kl, with_gradients(plain_kl(kind, teacher, student), weight, student)):
        assert a.dtype == b.dtype and torch.allclose(a, b, atol=near, rtol=near)


@pytest.mark.parametrize("kind", ["full", "topk:4", "topk:11"])
def test_bf16(kind, monkeypatch):
    """As near to the plain loss as bf16's 8 bits allow; the sums over chunks are not rounded on their way."""
    monkeypatch.setattr(targets, "CHUNK", 3)
    teacher, student, weight = sides(N=960, dtype=torch.bfloat16)
    chunked_kl = with_gradients(loss.distill_loss(target_of(kind, teacher), student), weight.float(), student)
    for a, b in zip(chunked_kl, with_gradients(plain_kl(kind, teacher, student), weight.float(), student)):
        assert a.dtype == b.dtype and (a - b).abs().max() <= 2 ** -7 * b.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_far_apart_and_still_finite(kind):
    """What one side all but excludes: exp of it is 0 in float32, its logarithm is not lost."""
    teacher, student, weight = sides(dtype=torch.float32, scale=30.0)
    chunked_kl = with_gradients(loss.distill_loss(target_of(kind, teacher), student), weight, student)
    for a, b in zip(chunked_kl, with_gradients(plain_kl(kind, teacher, student), weight, student)):
        assert a.isfinite().all() and torch.allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_places(kind):
    teacher, student, weight = sides(N=0)
    target = target_of(kind, teacher)
    kl, to_hidden, to_table = with_gradients(loss.distill_loss(target, student), weight, student)
    assert kl.shape == (0,) and to_hidden.shape == (0, 5) and not to_table.any()
    assert target.gather(1, torch.zeros(0, 1, dtype=torch.long)).shape == (0, 1)


def test_a_mask_inside_the_vocabulary_is_never_said():
    """With a bias that excludes one token on both sides, the loss is that over the others."""
    teacher, student, weight = sides()
    never = torch.zeros(V, dtype=torch.float64).index_fill(0, torch.tensor(V - 1), -1e9)
    full = loss.distill_loss(teacher._replace(bias=never), student._replace(bias=never))
    others = loss.distill_loss(teacher._replace(table=teacher.table[:-1]), student._replace(table=student.table[:-1]))
    assert torch.allclose(full, others, atol=1e-10, rtol=0)


# the step ------------------------------------------------------------------------------------------------------------

def stories(numbers):
    return (opdlm.uniforms(1, 9, numbers, (22,)) * 11).long()


def recipe(target="teacher", kl="plain", states=opdlm.random_mask, **more):
    made = opdlm.Recipe(opdlm.data_text, states, opdlm.TARGETS[target], opdlm.first_masked_x8, Layout(4, 1, 1), EOT,
                        **{"batch": 4, "prompt": 4, **more})
    return replace(made, **loss.chunked_kl(kl, target))


def steps(student, teacher, made, count=3, rate=0.3):
    optimizer = SkipNonFinite(torch.optim.SGD(student.parameters(), rate))
    return list(opdlm.train(student, teacher, stories, made, optimizer, lambda step: 18, range(count)))


@pytest.mark.parametrize("target, kl", [("teacher", "full"), ("teacher", "topk:11"), ("onehot", "full"),
                                        ("onehot", "topk:2")])
@pytest.mark.parametrize("chunk", [5, 64])
def test_the_same_steps(tiny, target, kl, chunk, monkeypatch):
    """Same records, same parameters; plain in float64 too, where opdlm's own is float32."""
    monkeypatch.setattr(targets, "CHUNK", chunk)
    plain, chunked_kl = tiny(seed=1), tiny(seed=1)
    records = steps(plain, tiny(), recipe(target)), steps(chunked_kl, tiny(), recipe(target, kl))
    for a, b in zip(*records):
        assert a == pytest.approx(b, rel=1e-5) and math.isfinite(a["text_nats"])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.parameters(), chunked_kl.parameters()))
    assert any(not torch.allclose(a, b, atol=1e-2) for a, b in zip(chunked_kl.parameters(), tiny(seed=1).parameters()))


@pytest.mark.parametrize("kl", ["full", "topk:3"])
@pytest.mark.parametrize("target", ["teacher", "onehot"])
def test_a_target_gives_the_text_s_probability(tiny, target, kl):
    net, tokens = tiny(), stories(range(4))
    rows, at = (torch.rand(4, 22, generator=torch.Generator().manual_seed(0)) < 0.5)[:, 1:].nonzero(as_tuple=True)
    said = tokens[rows, at + 1][:, None]
    plain, chunked_kl = (made.target(net, tokens, rows, at + 1).gather(1, said) for made in (recipe(target),
                                                                                      recipe(target, kl)))
    assert chunked_kl.shape == plain.shape and torch.allclose(chunked_kl.float(), plain, atol=1e-6)


class Widest(TorchDispatchMode):
    """Notes the most rows that any tensor of a vocabulary's width had."""
    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dim() == 2 and 211 in x.shape and 16 not in x.shape:
                self.rows = max(self.rows, x.numel() // 211)
        return out


@pytest.mark.parametrize("target, kl", [("teacher", "full"), ("teacher", "topk:4"), ("onehot", "full")])
def test_no_tensor_is_places_by_vocabulary(tiny, target, kl, monkeypatch):
    """Neither side's, forward nor backward; the plain step's are."""
    monkeypatch.setattr(targets, "CHUNK", 5)
    widest = []
    for kind in ("plain", kl):
        with Widest() as seen:
            records = steps(tiny(vocab=211, seed=1), tiny(vocab=211), recipe(target, kind), count=1)
        widest.append(seen.rows)
    assert widest == [records[0]["loss_positions"], 5] and widest[0] > 20


def test_the_dials():
    assert loss.chunked_kl("plain", "teacher", 10 ** 6) == {} == loss.chunked_kl(None, "onehot", loss.VOCAB - 1)
    assert loss.chunked_kl(None, "teacher", loss.VOCAB)["head"] is LazyLogits
    assert loss.chunked_kl("topk:7", "teacher")["target"].keywords == {"k": 7}
    for wrong in ("topk", "topk:", "topk:0", "topk:-1", "topk:x", "full:3", "plain:1", "", "kl"):
        with pytest.raises(ValueError, match="take plain, full, or topk:K"):
            loss.chunked_kl(wrong or "?", "teacher")


# several processes, and checkpoints ----------------------------------------------------------------------------------

def small(seed):
    return GPT(GPTConfig(V, 48, 2, 2, 16)).init_weights(torch.Generator().manual_seed(seed))


def shards(rank, folder):
    """What a process of two does: its rows, with its shards of the student."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    after = {}
    for kl in ("plain", "full", "topk:4"):
        student = dist.shard_and_compile(checkpointed(small(1), kl == "full"))
        steps(student, small(0).requires_grad_(False), recipe(kl=kl, shard_rows=dist.shard_rows))
        after[kl] = dist.full_state(student)
    if rank == 0:
        torch.save(after, f"{folder}/after")
    dist.end()                          # as train_tiny.py ends: gloo aborts an interpreter now and then


def test_two_processes_with_shards_take_one_s_steps(tmp_path):
    mp.spawn(shards, (str(tmp_path),), nprocs=2)
    after = torch.load(tmp_path / "after")
    for kl in after:
        alone = small(1)
        steps(alone, small(0), recipe(kl=kl))
        assert all(torch.allclose(after[kl][name], p, atol=1e-6) for name, p in alone.state_dict().items())
        assert any((p - before).abs().max() > 1e-3 for p, before in zip(alone.parameters(), small(1).parameters()))


def gradients(net):
    steps(net, small(0).double(), recipe(), count=1, rate=0.0)
    return [p.grad for p in net.parameters()]


def test_checkpointed_gradients_are_the_same_to_the_last_bit(tiny):
    """A copy's too, and blocks run twice only where there are gradients."""
    plain, kept = tiny(), copy.deepcopy(checkpointed(tiny()))
    runs = [0, 0]
    for i, net in enumerate((plain, kept)):
        net.h[1].mlp.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(kept)))
    assert runs == [1, 2]
    with torch.no_grad():
        kept(stories(range(2)))
    assert runs == [1, 3]


def test_checkpointed_blocks_keep_only_their_input(tiny):
    """Of what the backward pass needs, counted in bytes."""
    def kept(net):
        tensors = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.setdefault(x.data_ptr(), x), lambda x: x):
            net(stories(range(4)))
        return sum(x.nbytes for x in tensors.values())
    assert kept(checkpointed(tiny(layers=6))) < 0.5 * kept(tiny(layers=6))
