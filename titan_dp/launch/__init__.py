"""How a run is started on many machines: torchrun with what a scheduler needs (torchrun.py), and SLURM and
Kubernetes files. README.md here says which to use where.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
