"""The model that comes with the code."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sample
from data import tokenizer
from model import checkpoint
from tests.test_sample import make_checkpoint
from training import cli

SMALL = sample.PRETRAINED


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder without a run."""
    monkeypatch.chdir(tmp_path)


def said(capsys, *flags):
    assert cli.run(sample.main, ["--device=cpu", *flags]) == 0
    return capsys.readouterr().out.rstrip("\n").rpartition("\n")[0]


def test_it_is_small_and_whole():
    """At most 4 MB, in bf16; a student whose finished text is causal, so that it can verify itself."""
    files = [path for path in SMALL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert {x.dtype for x in load_file(SMALL / "model.safetensors").values()} == {torch.bfloat16}
    net, layout = checkpoint.load(SMALL)
    assert (layout.context_block, layout.logit_shift) == (1, 1)
    assert net.config.vocab == tokenizer.load(SMALL).vocab_size


def test_it_writes_before_anything_is_trained_and_a_run_comes_first(capsys):
    text = said(capsys, "--prompt=Once upon a time", "--length=40")
    assert text.startswith("Once upon a time") and len(text.split()) > 15
    assert text == said(capsys, f"--ckpt={SMALL}", "--prompt=Once upon a time", "--length=40")
    run = make_checkpoint(Path("out/tiny"))
    assert said(capsys, "--length=9") == said(capsys, f"--ckpt={run}", "--length=9")


def test_what_its_readme_says_is_in_its_summaries():
    said = (SMALL / "README.md").read_text()

    def number(when: str, temperature: str, name: str) -> float:
        summary = json.loads((SMALL / f"summaries/{when}-{temperature}.json").read_text())
        return summary["speculative"][name]

    for temperature in ("0", "0.7"):
        start, now = (number(when, temperature, "tok_per_fwd") for when in ("start", "now"))
        assert f"| tokens per forward pass, temperature {temperature} | {start:.2f} | {now:.2f} |" in said
    start, now = (number(when, "0.7", "val_nats") for when in ("start", "now"))
    assert f"| validation NLL as an AR model, nats per token | {start:.3f} | {now:.3f} |" in said


def test_it_verifies_itself(capsys):
    """At temperature 0 to the text that it writes as an AR model, in fewer forwards."""
    flags = ["--prompt=One day", "--length=60", "--temperature=0"]
    assert said(capsys, "--mode=verified", "--verifier=self", *flags) == said(capsys, "--mode=ar", *flags)
