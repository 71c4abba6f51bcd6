"""Pictures of a run: its training curves and the path of every alpha."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from runtime.files import write_atomically

History = list[dict[str, float]]


def draw_training_curves(history: History, path: Path) -> None:
    """Draw loss and accuracy over epochs into a PNG file."""

    def draw(figure: Figure) -> None:
        epochs = [row["epoch"] for row in history]
        loss, accuracy = figure.subplots(1, 2)
        loss.plot(epochs, [row["train_cross_entropy"] for row in history], label="cross entropy")
        if any(row["train_divergence"] for row in history):
            loss.plot(epochs, [row["train_divergence"] for row in history], label="KL(clean || masked)")
        loss.set(xlabel="epoch", ylabel="training loss (nats)", ylim=(0, None))
        loss.legend()
        for split in ("train", "test"):
            accuracy.plot(epochs, [row[f"{split}_accuracy"] for row in history], label=split)
        accuracy.set(xlabel="epoch", ylabel="accuracy (%)")
        accuracy.legend(loc="lower right")

    _save(draw, path, (9, 3.5))


def draw_alphas(history: History, path: Path) -> None:
    """Draw the clipping value alpha of every activation over epochs (Maleki et al. 2024, Fig. 1 and 2).

    Writes nothing where the network has no alpha.
    """
    names = [key for key in history[-1] if key.startswith("alpha/")] if history else []
    if not names:
        return

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        epochs = [row["epoch"] for row in history]
        for position, name in enumerate(names):
            color = f"C{position}" if len(names) <= 10 else _shade(position / (len(names) - 1))
            axes.plot(epochs, [row[name] for row in history], label=name.removeprefix("alpha/"), color=color)
        axes.set(xlabel="epoch", ylabel="alpha (activation units)", ylim=(0, None))
        axes.legend(fontsize="small", ncols=1 + len(names) // 12, bbox_to_anchor=(1.01, 1), loc="upper left")

    _save(draw, path, (9, 4))


def _shade(position: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](position)


def _save(draw: Callable[[Figure], None], path: Path, size_inches: tuple[float, float]) -> None:
    # A Figure of its own, without pyplot: no display, no state shared with the caller's plots.
    figure = Figure(figsize=size_inches, layout="constrained")
    draw(figure)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
