"""The picture of a simulation: speed and regret of the policies by the number of requests."""

import os
from pathlib import Path

from bench.errors import BenchError
from bench.simulate_report import CLAIRVOYANT, EXPECTED, SimulatedRow, SimulationReport

__all__ = ["draw_simulation"]

_STRONG = ("adaptive", "adaptive:calibrated", EXPECTED)


def draw_simulation(report: SimulationReport, path: Path) -> None:
    """Draw tokens per second and regret of the rows with a fixed number of requests.

    Args:
        report: with at least one such row.
        path: file to write, whose name ends in ``.svg`` or ``.html``; it appears complete or not at all.

    Raises:
        BenchError: the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    by_policy: dict[str, list[tuple[int, SimulatedRow]]] = {}
    for row in report.rows:
        if row.load.concurrency is not None:
            by_policy.setdefault(row.policy, []).append((row.load.concurrency, row))
    with mpl.rc_context({"svg.hashsalt": "simulated", "svg.fonttype": "none"}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
        places = sorted({place for rows in by_policy.values() for place, _ in rows})
        colours = plt.get_cmap("tab20")
        for number, (policy, rows) in enumerate(by_policy.items()):
            met = [place for place, _ in rows]
            look = {
                "color": "black" if policy in (EXPECTED, CLAIRVOYANT) else colours(number % 20),
                "linestyle": {EXPECTED: "--", CLAIRVOYANT: ":"}.get(policy, "-"),
                "linewidth": 2.4 if policy in _STRONG else 1.1,
                "marker": ".",
            }
            left.plot(met, [row.tokens_per_second for _, row in rows], label=policy, **look)
            regrets = [row.regret for _, row in rows]
            if policy != CLAIRVOYANT:
                right.plot(met, [100 * regret for regret in regrets if regret is not None], **look)
        left.set(title="Emitted tokens per second", yscale="log")
        right.set(title="Regret against the expected oracle, %")
        right.axhline(5, color="tab:red", linewidth=0.8, linestyle="--")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set(xlabel="concurrent requests", xticks=places, xticklabels=map(str, places))
            axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", frameon=False)
        where = report.cost.get("gpu") or report.cost.get("file")
        figure.suptitle(f"Simulated: {', '.join(trace.file for trace in report.traces)} on the step times of {where}")
        unfinished = path.with_name(f".{path.name}.partial")
        try:
            figure.savefig(unfinished, format="svg", metadata={"Date": None})
            if path.suffix.lower() == ".html":
                _wrap(unfinished)
            os.replace(unfinished, path)
        except OSError as error:
            raise BenchError(f"cannot write the plot {path}: {error.strerror}") from error
        finally:
            plt.close(figure)
            unfinished.unlink(missing_ok=True)


def _wrap(path: Path) -> None:
    """Turn an SVG file into an HTML page around it."""
    text = path.read_text(encoding="utf-8")
    svg = text[text.index("<svg") :]
    path.write_text(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Simulated draft policies</title></head>\n'
        f"<body>\n{svg}</body></html>\n",
        encoding="utf-8",
    )
