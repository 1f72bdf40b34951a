"""Train a model: `torchrun --nproc_per_node=8 train.py --config 800m.toml [--section.key VALUE ...]`.

The same as `python -m titan_dp.train`; `titan-dp train` starts the processes as well. Read on in titan_dp/train/start.py.
"""

import sys

from titan_dp.run import main

if __name__ == "__main__":
    sys.exit(main())
