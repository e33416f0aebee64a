import pytest
import torch

from model.gpt import GPT, Cache, GPTConfig
from model.masks import context_mask


def tokens_of(net, rows=3, length=12, seed=1):
    return torch.randint(0, net.config.vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_no_mask_is_the_causal_mask(tiny):
    net = tiny()
    tokens = tokens_of(net)
    assert torch.allclose(net(tokens), net(tokens, context_mask(12, 0, 1)), atol=1e-10, rtol=0)


@pytest.mark.parametrize("block", [1, 4])
def test_cache_in_pieces_is_one_pass(tiny, block):
    net, where = tiny(), torch.arange(12).expand(3, 12)
    tokens, mask = tokens_of(net), context_mask(12, 0, block)
    cache, pieces = [Cache(12) for _ in net.h], []
    for a, b in ((0, 4), (4, 8), (8, 12)):
        at = cache[0].place(where[:, a:b])
        pieces.append(net(tokens[:, a:b], mask[a:b, :b][None, None], where[:, a:b], None, cache, at))
    whole = net(tokens, mask).view(3, 12, -1)
    assert torch.allclose(torch.cat([p.view(3, 4, -1) for p in pieces], 1), whole, atol=1e-10, rtol=0)


@pytest.mark.parametrize("block, moves", [(1, False), (4, True)])
def test_the_future_moves_the_past_inside_a_block_and_never_across(tiny, block, moves):
    """Change the token at 6, in the block 4 .. 7."""
    net, mask = tiny(), context_mask(12, 0, block)
    tokens = tokens_of(net)
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 1) % net.config.vocab
    change = (net(tokens, mask) - net(other, mask)).view(3, 12, -1).abs().amax((0, 2)) > 1e-9
    assert not change[:4].any() and change[6:].all()
    assert change[4:6].all() == moves and change[4:6].any() == moves


def test_read_picks_places(tiny):
    net = tiny()
    tokens = tokens_of(net)
    assert torch.allclose(net(tokens, read=torch.tensor([5, 30])), net(tokens)[[5, 30]], atol=1e-10, rtol=0)


def test_mask_has_a_vector_and_no_logit(tiny):
    net = tiny()
    tokens = tokens_of(net)
    tokens[:, 3] = net.mask_id
    before = net(tokens)
    assert before.size(1) == net.config.vocab
    with torch.no_grad():
        net.mask_vector[0] += 1              # one channel: a shift of them all is lost in the norms
    change = (net(tokens) - before).view(3, 12, -1).abs().amax((0, 2)) > 1e-9
    assert not change[:3].any() and change[3:].all()


def test_init_mask_is_the_mean_embedding(tiny):
    net = tiny().init_mask()
    assert torch.allclose(net.mask_vector, net.wte.weight.mean(0), atol=1e-12)


def test_weights_depend_on_the_generator_alone():
    def made(noise):
        torch.manual_seed(noise)
        return GPT(GPTConfig(11, 16, 2, 2, 16)).init_weights(torch.Generator().manual_seed(5))
    for a, b in zip(made(1).parameters(), made(2).parameters()):
        assert torch.equal(a, b)


def test_logits_equal_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=31, n_positions=20, n_embd=24, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0)).double().eval()
    ours = GPT(GPTConfig(31, 20, 2, 3, 24)).double()
    state = {name.removeprefix("transformer."): value for name, value in theirs.state_dict().items()}
    ours.load_state_dict({name: state[name].T if name.endswith("weight") and ".c_" in name else state[name]
                          for name in ours.state_dict() if name != "mask_vector"}, strict=False)
    tokens = tokens_of(ours)
    assert torch.allclose(ours(tokens).view(3, 12, -1), theirs(tokens).logits, atol=1e-10, rtol=0)


def test_width_that_heads_cannot_share():
    with pytest.raises(ValueError, match="width of 10 can't be shared by 4 heads"):
        GPTConfig(width=10, heads=4)
