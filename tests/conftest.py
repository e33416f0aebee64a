"""One thread: the tests are small, and on few cores threads that wait for each other take longer than one does."""
import pytest
import torch

from model.gpt import GPT, GPTConfig

torch.set_num_threads(1)


@pytest.fixture
def tiny():
    """A maker of small random networks in float64, loud enough that every weight matters."""
    def make(vocab=11, context=48, layers=2, heads=2, width=16, seed=0, scale=0.3):
        generator = torch.Generator().manual_seed(seed)
        net = GPT(GPTConfig(vocab, context, layers, heads, width)).double().init_weights(generator)
        with torch.no_grad():
            for p in net.parameters():
                p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        return net
    return make
