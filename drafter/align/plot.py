"""The picture of a training run."""

import os
from pathlib import Path
from typing import Any


def plot_history(history: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and emitted tokens per verify step over training time as a PNG.

    Args:
        history: entries of ``read_history``, at least one.
        path: file to write; it appears complete or not at all.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    minutes = [entry["seconds"] / 60 for entry in history]
    categories = sorted(history[-1]["emitted_per_verify_step"], key=lambda name: (name != "all", name))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    left.plot(minutes, [entry["loss"] for entry in history], color="tab:gray", marker=".")
    left.set(title="Loss", xlabel="training time, minutes", ylabel="cross-entropy, nats")
    for category in categories:
        values = [entry["emitted_per_verify_step"].get(category) for entry in history]
        width = 2.4 if category == "all" else 1.1
        right.plot(minutes, values, label=f"{category} {values[-1]:.2f}", linewidth=width, marker=".")
    sampled = [entry.get("sampled_emitted_per_verify_step", {}).get("all") for entry in history]
    if sampled[-1] is not None:
        label = f"all, temperature 1 {sampled[-1]:.2f}"
        right.plot(minutes, sampled, label=label, linewidth=2.4, linestyle="--", color="tab:blue", marker=".")
    right.set(title="Emitted tokens per verify step, held-out answers", xlabel="training time, minutes")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    unfinished = path.with_suffix(".partial")
    figure.savefig(unfinished, format="png", dpi=120)
    plt.close(figure)
    os.replace(unfinished, path)
