"""The picture of a simulation: speed and regret of the policies by the number of requests."""

from pathlib import Path
from typing import Any

from bench.figures import colour, panels, save_figure
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
    figure, (left, right) = panels()
    by_policy: dict[str, list[tuple[int, SimulatedRow]]] = {}
    for row in report.rows:
        if row.load.concurrency is not None:
            by_policy.setdefault(row.policy, []).append((row.load.concurrency, row))
    for number, (policy, rows) in enumerate(by_policy.items()):
        met = [place for place, _ in rows]
        look: dict[str, Any] = {
            "color": "black" if policy in (EXPECTED, CLAIRVOYANT) else colour(number),
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
    places = sorted({place for rows in by_policy.values() for place, _ in rows})
    where = report.cost.get("gpu") or report.cost.get("file")
    heading = f"Simulated: {', '.join(trace.file for trace in report.traces)} on the step times of {where}"
    save_figure(figure, places, heading, path, "Simulated draft policies")
