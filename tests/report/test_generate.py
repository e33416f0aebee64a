"""generate_texts: the lengths of prompts and responses."""
import pytest
import torch

from decoding import reveal
from model.masks import Layout
from report import generate


@pytest.mark.parametrize("min_prompt", [1, 12])
@pytest.mark.parametrize("batch", [4, 128])
def test_every_text_fits_and_all_responses_have_the_same_room(tiny, min_prompt, batch):
    """With the longest prompt a text has exactly the length asked for; end-of-text is never sampled."""
    net = tiny(context=48).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    stories = list(torch.randint(0, 10, (10, 25), generator=generator))
    length = 30
    static = generate.diffusion_generator(net, Layout(4, 1, 1), reveal.parse("static:1"))
    texts, _ = generate.generate_texts(static, stories, -1, length, seed=0, batch=batch,
                                       min_prompt=min_prompt)
    prompt_lens = torch.cat([lens for _, lens in texts]).tolist()
    responses = torch.cat([rollout.response_mask.sum(1) for rollout, _ in texts]).tolist()
    assert prompt_lens == [min_prompt + k % 8 for k in range(10)]
    assert max(prompt_lens) == min_prompt + 7
    assert responses == [length - max(prompt_lens)] * 10
