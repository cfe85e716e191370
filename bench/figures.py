"""What all drawings share: matplotlib without a display, and files that appear whole or not at all."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.arguments import output_file
from bench.errors import BenchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["colour", "panels", "plot_file", "save_figure"]

_SUFFIXES = (".svg", ".html")


def plot_file(flag: str, text: str) -> Path:
    """The file that a flag names for a drawing.

    Raises:
        BenchError: no drawing can be written there.
    """
    if Path(text).suffix.lower() not in _SUFFIXES:
        raise BenchError(f"{flag} {text}: the name must end in {' or '.join(_SUFFIXES)}")
    return output_file(text)


def panels() -> tuple["Figure", tuple["Axes", "Axes"]]:
    """A figure with two panels side by side, and the panels."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    return figure, (left, right)


def colour(number: int) -> Any:
    """One of twenty."""
    import matplotlib as mpl

    return mpl.colormaps["tab20"](number % 20)


def save_figure(figure: "Figure", concurrencies: Iterable[int], heading: str, path: Path, title: str) -> None:
    """Finish a figure whose panels go by requests in flight, write it, and be done with it.

    Args:
        figure: of ``panels``.
        concurrencies: where both panels have a tick; they double from left to right.
        heading: above the panels.
        path: the file, which ends in ``.svg`` or ``.html``.
        title: of the page around it.

    Raises:
        BenchError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    places = list(concurrencies)
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        axes.set(xlabel="concurrent requests", xticks=places, xticklabels=map(str, places))
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.suptitle(heading)
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        with mpl.rc_context({"svg.hashsalt": "slipstream", "svg.fonttype": "none"}):  # equal data, equal files
            figure.savefig(unfinished, format="svg", metadata={"Date": None})
        if path.suffix.lower() == ".html":
            _wrap(unfinished, title)
        os.replace(unfinished, path)
    except OSError as error:
        raise BenchError(f"cannot write the plot {path}: {error.strerror}") from error
    finally:
        plt.close(figure)
        unfinished.unlink(missing_ok=True)


def _wrap(path: Path, title: str) -> None:
    """Turn an SVG file into an HTML page around it."""
    text = path.read_text(encoding="utf-8")
    svg = text[text.index("<svg") :]
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>\n'
        f"<body>\n{svg}</body></html>\n",
        encoding="utf-8",
    )
