"""`python -m titan_dp.train --config NAME`: one process of a training run, the same as train.py."""

import sys

from titan_dp.cli import train_here

if __name__ == "__main__":
    sys.exit(train_here())
