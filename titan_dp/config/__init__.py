"""Every setting (schema.py), how it is read (load.py), shown (describe.py) and advised on (advice.py).

The schema's names are this package's: `from titan_dp import config`, then `config.Model`.
"""

from titan_dp.config.schema import *  # noqa: F403
