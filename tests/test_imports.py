"""A program loads only what it uses."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Modules that training a GPT-2 sized model from scratch does not need.
NOT_LOADED = ("unmasking", "model.llama", "decoding.speculative", "decoding.scheduling")


@pytest.mark.parametrize("program", ["train_tiny", "opdlm"])
def test_training_loads_no_other_methods(program):
    code = f"import sys, {program}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    modules = result.stdout.split()
    assert program in modules
    loaded = [name for name in modules if any((name + ".").startswith(part + ".") for part in NOT_LOADED)]
    assert loaded == []
