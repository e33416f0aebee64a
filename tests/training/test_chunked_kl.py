"""The chunked loss equals the plain one; the bucketed loss is a divergence; no tensor in it is (N, V)."""
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
from training import chunked_kl, dist
from training.chunked_kl import LazyLogits, OneHotTarget, distill_loss, top_k_target
from training.optim import SkipNonFinite

EOT = 10
V = 11
KINDS = ["full", "topk:1", "topk:4", "topk:10", "topk:11", "topk:99"]


def random_case(N=7, C=5, dtype=torch.float64, seed=0, scale=1.0):
    """The logits of a teacher and of a student, and a loss weight per position (N,)."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    teacher = LazyLogits(make(N, C), make(V, C))
    student = LazyLogits(make(N, C).requires_grad_(), make(V, C).requires_grad_())
    return teacher, student, make(N).abs()


def make_target(kind, teacher):
    return teacher if kind == "full" else top_k_target(teacher, int(kind[5:]))


def plain_logits(lazy):
    logits = F.linear(lazy.hidden, lazy.table, lazy.bias)
    return logits if logits.dtype == torch.float64 else logits.float()


def with_bucket(log_probs, top_ids):
    """(N, k + 1): the log probabilities of `top_ids` (N, k), and that of all other tokens."""
    is_rest = torch.ones_like(log_probs, dtype=torch.bool).scatter(1, top_ids, False)
    log_rest = log_probs.masked_fill(~is_rest, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_probs.gather(1, top_ids), log_rest], 1)


def plain_kl(kind, teacher, student):
    """The loss by its definition, from (N, V) tensors."""
    log_q = plain_logits(teacher).log_softmax(-1)
    log_p = plain_logits(student).log_softmax(-1)
    if kind != "full" and int(kind[5:]) < V:
        top_ids = log_q.topk(int(kind[5:])).indices
        log_q = with_bucket(log_q, top_ids)
        log_p = with_bucket(log_p, top_ids)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def with_gradients(kl, weight, student):
    return [kl, *torch.autograd.grad((kl * weight).sum(), (student.hidden, student.table))]


# the loss of given logits ---------------------------------------------------------------------------------

def test_by_hand():
    """q = (1/2, 1/4, 1/4), p = (1/4, 1/4, 1/2); with one token and a bucket (1/2, 1/2) and (1/4, 3/4)."""
    def constant(probs):
        return LazyLogits(torch.eye(3), torch.tensor(probs).log().expand(3, 3).T.contiguous())
    teacher = constant([0.5, 0.25, 0.25])
    student = constant([0.25, 0.25, 0.5])
    full = distill_loss(teacher, student)[0].item()
    bucketed = distill_loss(top_k_target(teacher, 1), student)[0].item()
    assert full == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))
    assert bucketed == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    one_hot = distill_loss(OneHotTarget(torch.tensor([[2]] * 3)), student)
    assert one_hot.tolist() == pytest.approx([math.log(2)] * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_loss_0_and_gradient_0(kind):
    _, student, weight = random_case()
    same = LazyLogits(student.hidden.detach(), student.table.detach())
    kl, *gradients = with_gradients(distill_loss(make_target(kind, same), student), weight, student)
    assert kl.abs().max() < 1e-12 and all(g.abs().max() < 1e-12 for g in gradients)


def test_the_bucketed_kl_grows_with_k_up_to_the_full_one():
    teacher, student, _ = random_case(N=200)
    full = distill_loss(teacher, student)
    bucketed = [distill_loss(top_k_target(teacher, k), student) for k in range(1, V + 1)]
    for lower, higher in zip([torch.zeros(200), *bucketed], [*bucketed, full]):
        assert (higher >= lower - 1e-12).all()
    assert torch.allclose(bucketed[-1], full, atol=1e-10, rtol=0) and (full - bucketed[3] > 0.01).any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_plain_loss_and_its_gradients(kind, dtype, tolerance, chunk, monkeypatch):
    """The size of the chunks does not matter."""
    monkeypatch.setattr(chunked_kl, "CHUNK", chunk)
    teacher, student, weight = random_case(dtype=dtype)
    chunked = with_gradients(distill_loss(make_target(kind, teacher), student), weight, student)
    plain = with_gradients(plain_kl(kind, teacher, student), weight, student)
    for a, b in zip(chunked, plain):
        assert a.dtype == b.dtype and torch.allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", ["full", "topk:4", "topk:11"])
def test_bf16(kind, monkeypatch):
    """As near to the plain loss as the 8 bits of bf16 allow; sums over chunks are not rounded on the way."""
    monkeypatch.setattr(chunked_kl, "CHUNK", 3)
    teacher, student, weight = random_case(N=960, dtype=torch.bfloat16)
    chunked = with_gradients(distill_loss(make_target(kind, teacher), student), weight.float(), student)
    plain = with_gradients(plain_kl(kind, teacher, student), weight.float(), student)
    for a, b in zip(chunked, plain):
        assert a.dtype == b.dtype and (a - b).abs().max() <= 2 ** -7 * b.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_probabilities_stay_finite(kind):
    """A probability that is 0 in float32 still has a finite logarithm."""
    teacher, student, weight = random_case(dtype=torch.float32, scale=30.0)
    chunked = with_gradients(distill_loss(make_target(kind, teacher), student), weight, student)
    plain = with_gradients(plain_kl(kind, teacher, student), weight, student)
    for a, b in zip(chunked, plain):
        assert a.isfinite().all() and torch.allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_positions(kind):
    teacher, student, weight = random_case(N=0)
    target = make_target(kind, teacher)
    kl, grad_hidden, grad_table = with_gradients(distill_loss(target, student), weight, student)
    assert kl.shape == (0,) and grad_hidden.shape == (0, 5) and not grad_table.any()
    assert target.gather(1, torch.zeros(0, 1, dtype=torch.long)).shape == (0, 1)


def test_a_mask_inside_the_vocabulary_is_excluded():
    """With a bias that excludes one token on both sides, the loss is that over the other tokens."""
    teacher, student, _ = random_case()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[V - 1] = -1e9
    excluded = distill_loss(teacher._replace(bias=bias), student._replace(bias=bias))
    teacher = teacher._replace(table=teacher.table[:-1])
    student = student._replace(table=student.table[:-1])
    others = distill_loss(teacher, student)
    assert torch.allclose(excluded, others, atol=1e-10, rtol=0)


# the training step ----------------------------------------------------------------------------------------

def stories(row_ids):
    return (opdlm.uniforms(1, 9, row_ids, (22,)) * 11).long()


def make_recipe(target="teacher", kl="plain", **changes):
    recipe = opdlm.Recipe(opdlm.data_text, opdlm.random_mask, opdlm.TARGETS[target], opdlm.first_masked_x8,
                          Layout(4, 1, 1), EOT, batch=4, max_prompt=4, **changes)
    return replace(recipe, **chunked_kl.chunked_kl(kl, target))


def train(student, teacher, recipe, steps=3, lr=0.3):
    optimizer = SkipNonFinite(torch.optim.SGD(student.parameters(), lr))
    return list(opdlm.train(student, teacher, stories, recipe, optimizer, lambda step: 18, range(steps)))


@pytest.mark.parametrize("target, kl", [("teacher", "full"), ("teacher", "topk:11"), ("onehot", "full"),
                                        ("onehot", "topk:2")])
@pytest.mark.parametrize("chunk", [5, 64])
def test_the_same_steps(tiny, target, kl, chunk, monkeypatch):
    """Same records, same parameters; up to the float32 of the plain loss, since the network is float64."""
    monkeypatch.setattr(chunked_kl, "CHUNK", chunk)
    plain = tiny(seed=1)
    chunked = tiny(seed=1)
    plain_records = train(plain, tiny(), make_recipe(target))
    chunked_records = train(chunked, tiny(), make_recipe(target, kl))
    for a, b in zip(plain_records, chunked_records):
        assert a == pytest.approx(b, rel=1e-5) and math.isfinite(a["text_nats"])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.parameters(), chunked.parameters()))
    start = tiny(seed=1).parameters()
    assert any(not torch.allclose(a, b, atol=1e-2) for a, b in zip(chunked.parameters(), start))


@pytest.mark.parametrize("kl", ["full", "topk:3"])
@pytest.mark.parametrize("target", ["teacher", "onehot"])
def test_a_target_gives_the_probability_of_the_text(tiny, target, kl):
    net = tiny()
    tokens = stories(range(4))
    in_loss = torch.rand(4, 22, generator=torch.Generator().manual_seed(0)) < 0.5
    rows, before = in_loss[:, 1:].nonzero(as_tuple=True)
    position = before + 1
    ids = tokens[rows, position][:, None]
    plain = make_recipe(target).target(net, tokens, rows, position).gather(1, ids)
    chunked = make_recipe(target, kl).target(net, tokens, rows, position).gather(1, ids)
    assert chunked.shape == plain.shape and torch.allclose(chunked.float(), plain, atol=1e-6)


class MostRows(TorchDispatchMode):
    """Records the largest number of rows of any tensor that is as wide as the vocabulary of 211 tokens."""
    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dim() == 2 and 211 in x.shape and 16 not in x.shape:
                self.rows = max(self.rows, x.numel() // 211)
        return out


@pytest.mark.parametrize("target, kl", [("teacher", "full"), ("teacher", "topk:4"), ("onehot", "full")])
def test_no_tensor_is_positions_by_vocabulary(tiny, target, kl, monkeypatch):
    """Neither the student's nor the target's, forward or backward; the plain step has such tensors."""
    monkeypatch.setattr(chunked_kl, "CHUNK", 5)
    most_rows = []
    for kind in ("plain", kl):
        with MostRows() as seen:
            records = train(tiny(vocab=211, seed=1), tiny(vocab=211), make_recipe(target, kind), steps=1)
        most_rows.append(seen.rows)
    assert most_rows == [records[0]["loss_positions"], 5] and most_rows[0] > 20


def test_the_fields_of_the_recipe():
    assert chunked_kl.chunked_kl("plain", "teacher", 10 ** 6) == {}
    assert chunked_kl.chunked_kl(None, "onehot", chunked_kl.LARGE_VOCAB - 1) == {}
    assert chunked_kl.chunked_kl(None, "teacher", chunked_kl.LARGE_VOCAB)["head"] is LazyLogits
    assert chunked_kl.chunked_kl("topk:7", "teacher")["target"].keywords == {"k": 7}
    assert chunked_kl.chunked_kl(None, "sampled", chunked_kl.LARGE_VOCAB) == {}
    for kl in ("full", "topk:7"):
        with pytest.raises(ValueError, match=f"--kl={kl} does not go with --target=sampled: use --kl=plain"):
            chunked_kl.chunked_kl(kl, "sampled")
    for wrong in ("topk", "topk:", "topk:0", "topk:-1", "topk:x", "full:3", "full:", "plain:1", "?", "kl"):
        with pytest.raises(ValueError) as error:
            chunked_kl.chunked_kl(wrong, "teacher")
        assert f"--kl: expected plain, full or topk:K with K at least 1, got '{wrong}'" in str(error.value)


# several processes, and checkpointing ---------------------------------------------------------------------

def small(seed):
    return GPT(GPTConfig(V, 48, 2, 2, 16)).init_weights(torch.Generator().manual_seed(seed))


def train_shard(rank, folder):
    """One of two processes: it trains on its rows, with its shards of the student."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    states = {}
    for kl in ("plain", "full", "topk:4"):
        student = dist.shard_and_compile(checkpointed(small(1), kl == "full"))
        train(student, small(0).requires_grad_(False), make_recipe(kl=kl, shard_rows=dist.shard_rows))
        states[kl] = dist.full_state(student)
    if rank == 0:
        torch.save(states, f"{folder}/states")
    dist.end()


def test_two_processes_with_shards_take_the_steps_of_one(tmp_path):
    mp.spawn(train_shard, (str(tmp_path),), nprocs=2)
    for kl, state in torch.load(tmp_path / "states").items():
        alone = small(1)
        train(alone, small(0), make_recipe(kl=kl))
        assert all(torch.allclose(state[name], p, atol=1e-6) for name, p in alone.state_dict().items())
        start = small(1).parameters()
        assert any((p - before).abs().max() > 1e-3 for p, before in zip(alone.parameters(), start))


def gradients(net):
    train(net, small(0).double(), make_recipe(), steps=1, lr=0.0)
    return [p.grad for p in net.parameters()]


def test_checkpointed_gradients_are_the_same_to_the_last_bit(tiny):
    """For a copy of the network too; blocks run twice only where there are gradients."""
    plain = tiny()
    recomputed = copy.deepcopy(checkpointed(tiny()))
    runs = [0, 0]
    for i, net in enumerate((plain, recomputed)):
        net.h[1].mlp.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(recomputed)))
    assert runs == [1, 2]
    with torch.no_grad():
        recomputed(stories(range(2)))
    assert runs == [1, 3]


def test_checkpointed_blocks_save_only_their_input(tiny):
    """The bytes that are saved for the backward pass."""
    def saved_bytes(net):
        tensors = {}

        def save(x):
            return tensors.setdefault(x.data_ptr(), x)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            net(stories(range(4)))
        return sum(x.nbytes for x in tensors.values())
    assert saved_bytes(checkpointed(tiny(layers=6))) < 0.5 * saved_bytes(tiny(layers=6))


def test_a_frozen_table_has_no_gradient(monkeypatch):
    """That of --lora: it is not computed. The hidden states have theirs all the same."""
    products = []
    real = chunked_kl.add_product
    monkeypatch.setattr(chunked_kl, "add_product", lambda *args: products.append(1) or real(*args))
    generator = torch.Generator().manual_seed(0)
    grads = []
    for is_frozen in (False, True):
        generator.manual_seed(0)
        hidden = torch.randn(5, 4, generator=generator).requires_grad_(True)
        table = torch.randn(7, 4, generator=generator).requires_grad_(not is_frozen)
        target = LazyLogits(torch.randn(5, 4, generator=generator), table.detach(), None)
        distill_loss(target, LazyLogits(hidden, table, None)).sum().backward()
        grads.append(hidden.grad)
        assert (table.grad is None) == is_frozen
    assert len(products) == 1
    assert torch.equal(*grads)
