"""`python -m titan_dp COMMAND` is `titan-dp COMMAND`."""

import sys

from titan_dp.cli import main

if __name__ == "__main__":
    sys.exit(main())
