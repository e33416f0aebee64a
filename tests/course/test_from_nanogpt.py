"""course/06_on_policy/from_nanogpt.py: a nanoGPT checkpoint becomes the same network here."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from course import check
from training import cli

FILE = Path(check.__file__).parent / "06_on_policy/from_nanogpt.py"
SIZES = {
    "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 6, "vocab_size": 50304, "bias": False,
}
SHAPES = {
    "ln_1": (8,), "attn.c_attn": (24, 8), "attn.c_proj": (8, 8), "ln_2": (8,), "mlp.c_fc": (32, 8),
    "mlp.c_proj": (8, 32),
}


@pytest.fixture
def weights():
    torch.manual_seed(0)
    found = {"wte.weight": torch.randn(50304, 8), "wpe.weight": torch.randn(6, 8)}
    found["ln_f.weight"] = torch.rand(8)
    for name, shape in SHAPES.items():
        found[f"h.0.{name}.weight"] = 0.3 * torch.randn(shape)
    return found


def nanogpt_logits(w: dict, tokens: torch.Tensor) -> torch.Tensor:
    """(T, 50304): nanoGPT's forward pass with one block and no biases, for one text (T,)."""
    x = w["wte.weight"][tokens] + w["wpe.weight"][:len(tokens)]
    h = F.layer_norm(x, (8,), w["h.0.ln_1.weight"])
    qkv = (h @ w["h.0.attn.c_attn.weight"].T).split(8, 1)
    q, k, v = (part.view(-1, 2, 4).transpose(0, 1) for part in qkv)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(-1, 8)
    x = x + y @ w["h.0.attn.c_proj.weight"].T
    h = F.layer_norm(x, (8,), w["h.0.ln_2.weight"]) @ w["h.0.mlp.c_fc.weight"].T
    x = x + F.gelu(h) @ w["h.0.mlp.c_proj.weight"].T
    return F.layer_norm(x, (8,), w["ln_f.weight"]) @ w["wte.weight"].T


@pytest.mark.parametrize("prefix", ["transformer.", "_orig_mod.transformer."])
def test_the_network_is_the_same(weights, prefix):
    source = {"model_args": SIZES, "model": {prefix + name: x for name, x in weights.items()}}
    net = check.load(FILE).convert(source)
    tokens = torch.tensor([7, 50256, 3, 3, 12])
    expected = nanogpt_logits(weights, tokens)[:, :50257]
    # nanoGPT's GELU is exact, GPT-2's an approximation
    torch.testing.assert_close(net(tokens[None]), expected, rtol=0, atol=5e-3)


def test_a_file_that_is_no_checkpoint_is_refused_in_one_sentence(tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_text("no checkpoint")
    program = check.load(FILE)
    for name in ("ckpt.pt", "missing.pt"):
        assert cli.run(program.main, [str(tmp_path / name), str(tmp_path / "new")]) == 2
        error = capsys.readouterr().err
        assert "is not a checkpoint of nanoGPT" in error and error.count("\n") == 1


class Hostile:
    """Whoever reads it with its code makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_code_in_a_file_is_not_run(weights, tmp_path, capsys):
    made = tmp_path / "made"
    torch.save({"model_args": SIZES, "model": weights, "config": Hostile(made)}, tmp_path / "ckpt.pt")
    program = check.load(FILE)
    assert cli.run(program.main, [str(tmp_path / "ckpt.pt"), str(tmp_path / "new")]) == 2
    assert "is not a checkpoint of nanoGPT" in capsys.readouterr().err
    assert not made.exists() and not (tmp_path / "new").exists()


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="the model has 65 tokens"):
        check.load(FILE).convert({"model_args": SIZES | {"vocab_size": 65}, "model": {}})
