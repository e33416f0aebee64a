"""The command of run.py under the name of what it measures: python -m experiments.performance.gpu"""
import sys

from experiments.performance.run import main
from training import cli

if __name__ == "__main__":
    sys.exit(cli.run(main))
