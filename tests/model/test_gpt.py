"""Invariants of model/gpt.py. tests/model/test_llama.py applies most of them to the Llama family too."""
import pytest
import torch

from model.gpt import GPT, Cache, GPTConfig
from model.masks import context_mask


def tokens_of(net, rows=3, length=12, seed=1):
    """Random token ids."""
    return torch.randint(0, net.config.vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_no_mask_is_the_causal_mask(tiny):
    net = tiny()
    tokens = tokens_of(net)
    assert torch.allclose(net(tokens), net(tokens, context_mask(12, 0, 1)), atol=1e-10, rtol=0)


@pytest.mark.parametrize("block", [1, 4])
def test_cache_in_pieces_is_one_pass(tiny, block):
    """Three passes of four positions with a cache give the logits of one pass without."""
    net = tiny()
    tokens = tokens_of(net)
    position = torch.arange(12).expand(3, 12)
    mask = context_mask(12, 0, block)
    cache = [Cache(12) for _ in net.h]
    pieces = []
    for a, b in ((0, 4), (4, 8), (8, 12)):
        index = cache[0].flat_index(position[:, a:b])
        logits = net(tokens[:, a:b], mask[a:b, :b][None, None], position[:, a:b], None, cache, index)
        pieces.append(logits.view(3, 4, -1))
    whole = net(tokens, mask).view(3, 12, -1)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-10, rtol=0)


def test_a_cache_without_some_rows_is_the_cache_of_the_others(tiny):
    net = tiny()
    tokens = tokens_of(net)
    position = torch.arange(12).expand(3, 12)
    mask = context_mask(12, 0, 1)
    cache = [Cache(12) for _ in net.h]
    net(tokens[:, :8], mask[:8, :8][None, None], position[:, :8], None, cache,
        cache[0].flat_index(position[:, :8]))
    rows = torch.tensor([True, False, True])
    for block_cache in cache:
        block_cache.keep_rows(rows)
    index = cache[0].flat_index(position[rows, 8:])
    logits = net(tokens[rows, 8:], mask[8:][None, None], position[rows, 8:], None, cache, index)
    whole = net(tokens, mask).view(3, 12, -1)[rows, 8:]
    assert torch.allclose(logits.view(2, 4, -1), whole, atol=1e-10, rtol=0)


@pytest.mark.parametrize("block, moves", [(1, False), (4, True)])
def test_the_future_moves_the_past_inside_a_block_and_never_across(tiny, block, moves):
    """Change the token at position 6, which is in the block 4 .. 7."""
    net = tiny()
    mask = context_mask(12, 0, block)
    tokens = tokens_of(net)
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 1) % net.config.vocab
    difference = (net(tokens, mask) - net(other, mask)).view(3, 12, -1)
    change = difference.abs().amax((0, 2)) > 1e-9                            # (12,)
    assert not change[:4].any() and change[6:].all()
    assert change[4:6].all() == moves and change[4:6].any() == moves


def test_read_picks_places(tiny):
    net = tiny()
    tokens = tokens_of(net)
    read = torch.tensor([5, 30])
    assert torch.allclose(net(tokens, read=read), net(tokens)[read], atol=1e-10, rtol=0)


def test_mask_has_a_vector_and_no_logit(tiny):
    net = tiny()
    tokens = tokens_of(net)
    tokens[:, 3] = net.mask_id
    before = net(tokens)
    assert before.size(1) == net.config.vocab
    with torch.no_grad():
        net.mask_vector[0] += 1     # in one channel: the norms would remove a shift of all channels
    change = (net(tokens) - before).view(3, 12, -1).abs().amax((0, 2)) > 1e-9
    assert not change[:3].any() and change[3:].all()


def test_init_mask_is_the_mean_embedding(tiny):
    net = tiny().init_mask()
    assert torch.allclose(net.mask_vector, net.wte.weight.mean(0), atol=1e-12)


def test_weights_depend_on_the_generator_alone():
    def make(global_seed):
        torch.manual_seed(global_seed)
        return GPT(GPTConfig(11, 16, 2, 2, 16)).init_weights(torch.Generator().manual_seed(5))
    for a, b in zip(make(1).parameters(), make(2).parameters()):
        assert torch.equal(a, b)


def test_logits_equal_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(vocab_size=31, n_positions=20, n_embd=24, n_layer=2, n_head=3,
                                     bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    ours = GPT(GPTConfig(31, 20, 2, 3, 24)).double()
    state = {}
    for name, x in theirs.state_dict().items():
        name = name.removeprefix("transformer.")
        if name in ours.state_dict():
            state[name] = x.T if name.endswith("weight") and ".c_" in name else x
    missing = ours.load_state_dict(state, strict=False).missing_keys
    assert missing == ["mask_vector"]
    tokens = tokens_of(ours)
    assert torch.allclose(ours(tokens).view(3, 12, -1), theirs(tokens).logits, atol=1e-10, rtol=0)


def test_width_that_heads_cannot_share():
    with pytest.raises(ValueError, match="width=10: must be a multiple of heads=4"):
        GPTConfig(width=10, heads=4)
