"""Lesson 6, capstone: a checkpoint of nanoGPT as a folder that train_tiny.py --init reads.

    python course/06_on_policy/from_nanogpt.py ckpt.pt my-gpt

For models of GPT-2's tokens, as nanoGPT's data/openwebtext and data/shakespeare make them. Only numbers are
read: no code in the file is run.
"""
import pickle
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))    # the project's root

from data import tokenizer
from model import checkpoint
from model.gpt import GPT, GPTConfig
from training import cli

GPT2_TOKENS = 50257         # nanoGPT pads its table to a multiple of 64


def convert(source: dict) -> GPT:
    """The project's network with the weights of nanoGPT's dict of `model` and `model_args`."""
    sizes = source["model_args"]
    if sizes["vocab_size"] < GPT2_TOKENS:
        raise ValueError(f"the model has {sizes['vocab_size']} tokens: expected GPT-2's {GPT2_TOKENS}, since "
                         "the file holds no tokenizer")
    config = GPTConfig(GPT2_TOKENS, sizes["block_size"], sizes["n_layer"], sizes["n_head"], sizes["n_embd"])
    net = GPT(config)
    state = {name: torch.zeros_like(p) for name, p in net.state_dict().items()}  # there may be no biases
    for name, tensor in source["model"].items():
        name = name.removeprefix("_orig_mod.").removeprefix("transformer.")
        if name in state:                                        # not the head, which is the table
            state[name] = tensor.float()[:len(state[name])]
    net.load_state_dict(state)
    return net


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise ValueError(f"expected a file and a new folder, got {len(argv)} words: ckpt.pt FOLDER")
    try:
        net = convert(torch.load(argv[0], map_location="cpu", weights_only=True))
    except (OSError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{argv[0]} is not a checkpoint of nanoGPT ({reason}): give its ckpt.pt") from None
    checkpoint.save(argv[1], net, tokenizer.gpt2())
    print(f"python train_tiny.py --init={argv[1]} --data=FILE.txt --out=out/mine")


if __name__ == "__main__":
    sys.exit(cli.run(main))
