"""Invariants of model/llama.py: those of model/gpt.py for every family, and its own."""
import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import opdlm
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig
from model import checkpoint
from model.llama import Llama, LlamaConfig, RMSNorm
from model.masks import AR, Layout
from report import metrics
from tests import test_opdlm
from tests.model import test_gpt
from training.optim import Muon

REAL = Path(__file__).parents[2].parent / "shared/data/stories260K"
KINDS = {       # each has a feature that the others do not have
    "llama": {"family": "llama", "tied": True},
    "llama, its own head": {"family": "llama", "kv_heads": 4},
    "qwen2": {"family": "qwen2", "kv_heads": 1},
    "qwen3": {"family": "qwen3", "head_size": 6, "theta": 50.0},
    "a2d-qwen3": {"family": "qwen3", "vocab": 12, "mask": 11, "tied": True},
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def llama(vocab=11, context=48, layers=2, heads=4, width=16, kv_heads=2, head_size=4, hidden=20, seed=0,
          **kind):
    """A small random network in float64, whose weights are large enough that every one of them matters."""
    config = LlamaConfig(vocab, context, layers, heads, width, kv_heads, head_size, hidden, **kind)
    net = Llama(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            mean = 1 if "norm" in name else 0
            p.copy_(mean + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return net


def maker(kind):
    """A function that makes networks of this kind, as the fixture `tiny` does for GPT-2."""
    return lambda **sizes: llama(**{**kind, **sizes})


# invariants of model/gpt.py -----------------------------------------------------------------------------

def test_no_mask_is_the_causal_mask(kind):
    test_gpt.test_no_mask_is_the_causal_mask(maker(kind))


@pytest.mark.parametrize("block", [1, 4])
def test_cache_in_pieces_is_one_pass(kind, block):
    test_gpt.test_cache_in_pieces_is_one_pass(maker(kind), block)


def test_a_cache_without_some_rows_is_the_cache_of_the_others(kind):
    test_gpt.test_a_cache_without_some_rows_is_the_cache_of_the_others(maker(kind))


@pytest.mark.parametrize("block, moves", [(1, False), (4, True)])
def test_the_future_moves_the_past_inside_a_block_and_never_across(kind, block, moves):
    net = maker(kind)()
    if net.config.mask is not None:
        net.config.mask = None      # otherwise the logit of [MASK] is constant
    test_gpt.test_the_future_moves_the_past_inside_a_block_and_never_across(lambda: net, block, moves)


def test_read_picks_places(kind):
    test_gpt.test_read_picks_places(maker(kind))


@pytest.mark.parametrize("layout", [Layout(4, 1, 1), Layout(4, 4, 0), Layout(3, 3, 1)], ids=str)
def test_on_policy_means_exactly_on_policy(kind, layout):
    test_opdlm.test_on_policy_means_exactly_on_policy(maker(kind), layout, 3)


def test_every_method_learns_from_it(kind):
    test_opdlm.test_every_method_runs_and_leaves_the_teacher_alone(maker(kind), "opdlm", Layout(4, 4, 0))


# invariants of the Llama family -------------------------------------------------------------------------

def test_only_distances_matter(kind):
    """Rotary positions: moving all positions by 7 changes no logit, exchanging two of them does."""
    net = maker(kind)()
    tokens = test_gpt.tokens_of(net)
    position = torch.arange(12)
    before = net(tokens, position=position)
    swapped = position.clone()
    swapped[[3, 5]] = swapped[[5, 3]]
    moved = net(tokens, position=position + 7)
    assert torch.allclose(moved, before, atol=1e-5, rtol=0)      # the angles are in float32
    assert (net(tokens, position=swapped) - before).abs().max() > 1e-3


def test_shared_keys_and_values_are_copies_of_their_own():
    """Two heads that share a key-value head equal two heads with a copy of it each."""
    shared = llama(kv_heads=2, heads=4, family="qwen2")
    own = llama(kv_heads=4, heads=4, family="qwen2")
    state = {}
    for name, x in shared.state_dict().items():
        if ".k_proj" in name or ".v_proj" in name:
            x = x.unflatten(0, (2, 1, 4))                        # (G, 1, D, ...)
            x = x.expand(2, 2, 4, *x.shape[3:]).flatten(0, 2)    # (H * D, ...)
        state[name] = x
    own.load_state_dict(state)
    tokens = test_gpt.tokens_of(own)
    assert torch.allclose(own(tokens), shared(tokens), atol=1e-10, rtol=0)


def test_a_head_of_its_own_that_is_the_embedding_is_a_tied_one():
    """An output layer of its own gives other logits, until its weights are the embedding."""
    own = llama()
    tied = llama(tied=True)
    tied.load_state_dict({name: x for name, x in own.state_dict().items() if name != "lm_head.weight"})
    tokens = test_gpt.tokens_of(own)
    assert (own(tokens) - tied(tokens)).abs().max() > 0.1
    own.lm_head.load_state_dict(own.wte.state_dict())
    assert torch.equal(own(tokens), tied(tokens))


def test_norms_by_hand():
    norm = RMSNorm(2, 1e-6).double()
    out = norm(torch.tensor([3.0, 4.0]).double()).tolist()
    assert out == pytest.approx([3 / 12.5 ** 0.5, 4 / 12.5 ** 0.5], rel=1e-6)


def test_a_mask_of_its_own_has_a_vector_and_no_logit():
    test_gpt.test_mask_has_a_vector_and_no_logit(maker(KINDS["llama"]))
    test_gpt.test_init_mask_is_the_mean_embedding(maker(KINDS["llama"]))


def test_a_mask_of_the_vocabulary_is_its_row_and_is_never_drawn():
    net = maker(KINDS["a2d-qwen3"])()
    row = net.wte.weight[11].clone()
    assert net.mask_id == 11 and "mask_vector" not in net.state_dict()
    assert torch.equal(net.init_mask().wte.weight[11], row)
    probs = net(test_gpt.tokens_of(net)).softmax(-1)
    assert not probs[:, 11].any() and torch.allclose(probs.sum(-1), torch.ones(36).double())
    u = torch.full((4, 21, 1), 1 - 2 ** -24)    # samples the last token of nonzero probability
    denoiser = Denoiser(net, Layout(4, 4, 0))
    text = opdlm.rollout(denoiser, test_opdlm.prompts(3), 18, reveal.parse("static:1"), u, 10)
    assert (text.tokens < 11).all()


def test_greedy_text_is_the_argmax_of_whole_passes(kind):
    net = maker(kind)()
    prompt = test_opdlm.prompts(3)
    u = torch.zeros(4, 15, 1)
    text = opdlm.rollout(Denoiser(net, AR), prompt, 12, reveal.parse("static:1"), u, 99,
                         sampling=SamplingConfig(temperature=0))
    for _ in range(12):
        logits = net(prompt).view(4, -1, net.config.vocab)
        prompt = torch.cat([prompt, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text.tokens, prompt)


def test_flops_and_matrices_are_what_torch_counts(kind):
    net = maker(kind)()
    T = 12
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net(torch.zeros(2, T, dtype=torch.long))
    flops = metrics.body_flops(net.config, T) + metrics.head_flops(net.config)
    assert counter.get_total_flops() == 2 * T * flops
    matrices = Muon(net).param_groups[0]["params"]
    assert sum(p.numel() for p in matrices) == net.config.layers * net.config.matrices


WRONG_SIZES = [
    ({"kv_heads": 3}, "heads=4: must be a multiple of kv_heads=3"),
    ({"head_size": 5}, "head_size=5: must be even"),
    ({"mask": 11}, "mask id 11 is outside the vocabulary: expected 0 to 10"),
]


def test_sizes_that_do_not_fit_are_refused():
    for sizes, message in WRONG_SIZES:
        with pytest.raises(ValueError, match=message):
            llama(**sizes)


# against `transformers` ---------------------------------------------------------------------------------

def test_logits_equal_transformers(kind):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    net = maker(kind)().float()     # the norms of `transformers` are always in float32
    config = transformers.AutoConfig.for_model(**checkpoint.to_hf_config(net.config))
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    state = {name: x for name, x in net.state_dict().items() if name != checkpoint.MASK}
    result = theirs.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}
    theirs.tie_weights()
    tokens = test_gpt.tokens_of(net)
    our_logits = net(tokens).view(3, 12, -1)[..., :11]
    their_logits = theirs(tokens).logits[..., :11]
    assert torch.allclose(our_logits, their_logits, atol=1e-5, rtol=0)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no checkpoint in {REAL}, and tests use no network")
def test_the_real_checkpoint_s_logits_equal_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(REAL).eval()
    net, layout = checkpoint.load(REAL)
    tokens = test_gpt.tokens_of(net, length=200)
    assert layout is None and json.loads((REAL / "config.json").read_text())["tie_word_embeddings"]
    ours = net(tokens).view(3, 200, -1)
    assert torch.allclose(ours, theirs(tokens).logits, atol=1e-5, rtol=1e-5) and ours.std() > 1
