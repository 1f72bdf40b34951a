"""Figures of evaluations and reports: one style, the Agg backend, and PNG files that are there whole or not at all.

matplotlib is imported here only and when the first figure is asked for, so that nothing but a plot needs it. What is
drawn is the callers' own business; nothing here opens a window.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_dp.errors import UserError
from titan_dp.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def check_matplotlib() -> None:
    """Raises UserError where matplotlib is not installed; to be called before hours are spent."""
    if find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: pip install 'titan_dp[eval]'")


def subplots(*args: Any, **kw: Any) -> tuple[Figure, Any]:
    """`matplotlib.pyplot.subplots` in one style, drawn without a display.

    Raises UserError where matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cycle = plt.cycler(color=plt.get_cmap("tab10").colors)  # type: ignore[attr-defined]
    with plt.rc_context({**_STYLE, "axes.prop_cycle": cycle}):
        return plt.subplots(*args, **kw)


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as a PNG of 150 dpi, whole or not at all, and forget it; makes the folder."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    plt.close(figure)
