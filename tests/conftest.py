"""Fixtures. One thread: the tests are small, and on few cores several threads only wait for each other."""
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers

from model.gpt import GPT, GPTConfig

torch.set_num_threads(1)
# The same examples at each run.
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.load_profile("same")


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


def sentence_pieces(path: Path) -> Tokenizer:
    """The tokenizer in a file of llama2.c: int32 longest; then per token float32 score, int32 length, bytes.

    A merge makes the token of the best score, and scores fall with the ids.
    """
    data, at, pieces = path.read_bytes(), 4, ["<unk>", "<s>", "</s>"]
    while at < len(data):
        _, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8:at + 8 + length].decode().replace(" ", "\u2581"))
        at += 8 + length
    del pieces[3:6]                                                   # the same three, written for a terminal
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [(piece[:k], piece[k:]) for piece in pieces[259:] for k in range(1, len(piece))
              if piece[:k] in vocab and piece[k:] in vocab]
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
             decoders.Strip(" ", 1, 0)]
    tok.decoder = decoders.Sequence(steps)
    tok.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tok


@pytest.fixture(scope="session")
def stories260k(tmp_path_factory):
    """A folder with a real TinyStories model in the Llama layout, and its tokenizer."""
    real = Path(__file__).parents[1].parent / "shared/data/stories260K"
    if not real.is_dir():
        pytest.skip(f"no checkpoint in {real}, and tests use no network")
    folder = tmp_path_factory.mktemp("stories260K")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(real / name, folder / name)
    sentence_pieces(real / "tok512.bin").save(str(folder / "tokenizer.json"))
    return folder
