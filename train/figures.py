"""Pictures of runs: training curves, the path of every alpha, and the mask shares that SMOOT arrives at."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from runtime.files import write_atomically

History = list[dict[str, float]]

# Okabe and Ito's colours without yellow and black: told apart with any colour vision, and on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")

_ALPHA = "alpha/"
_MASK_PERCENT = "mask_percent_"


def draw_training_curves(history: History, path: Path) -> Figure:
    """Draw loss and accuracy over epochs into a PNG file."""

    def draw(figure: Figure) -> None:
        epochs = [row["epoch"] for row in history]
        loss, accuracy = figure.subplots(1, 2)
        loss.plot(epochs, [row["train_cross_entropy"] for row in history], label="cross entropy", color=COLORS[0])
        if any(row["train_divergence"] for row in history):
            divergence = [row["train_divergence"] for row in history]
            loss.plot(epochs, divergence, label="KL(clean || masked)", color=COLORS[1])
        loss.set(xlabel="epoch", ylabel="training loss (nats)", ylim=(0, None))
        loss.legend()
        for split, color in zip(("train", "test"), COLORS, strict=False):
            accuracy.plot(epochs, [row[f"{split}_accuracy"] for row in history], label=split, color=color)
        accuracy.set(xlabel="epoch", ylabel="accuracy (%)")
        accuracy.legend(loc="lower right")
        for axes in (loss, accuracy):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            tidy(axes)

    return save_figure(draw, path, (9, 3.5))


def has_alphas(history: History) -> bool:
    """Return whether a run's network has a PACT."""
    return bool(history) and any(key.startswith(_ALPHA) for key in history[-1])


def draw_alphas(histories: Mapping[str, History], path: Path) -> Figure:
    """Draw the clipping value alpha of every activation over epochs (Maleki et al. 2024, Fig. 1 and 2).

    Args:
        histories: by name, one panel each; `has_alphas` is true of every one.
        path: PNG file.
    """

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(histories), 1, squeeze=False)[:, 0]
        for axes, (name, history) in zip(panels, histories.items(), strict=True):
            keys = [key for key in history[-1] if key.startswith(_ALPHA)]
            for position, key in enumerate(keys):
                # In the order of the forward pass: the darker the earlier.
                few = len(keys) <= len(COLORS)
                color = COLORS[position] if few else colormaps["viridis"](0.93 * position / (len(keys) - 1))
                # What begins with an underscore, as layers of an nn.Sequential do, a legend leaves out.
                _plot(axes, history, key, label=key.removeprefix(_ALPHA).lstrip("_"), color=color)
            axes.set(title=name, ylabel="alpha (activation units)", ylim=(0, None))
            named = axes.lines[:: 1 + len(keys) // 25]  # of a deep network's, enough to see which colour is where
            axes.legend(handles=named, fontsize="small", ncols=1 + len(named) // 12, bbox_to_anchor=(1.01, 1),
                        loc="upper left")  # fmt: skip
            tidy(axes)
        panels[-1].set_xlabel("epoch")

    return save_figure(draw, path, (9, 0.5 + 3.5 * len(histories)))


def has_mask_shares(history: History) -> bool:
    """Return whether a run adapted its mask shares."""
    return bool(history) and f"{_MASK_PERCENT}median" in history[-1]


def draw_mask_shares(histories: Mapping[str, History], path: Path) -> Figure:
    """Draw the spread of SMOOT's K over the training images (Karkehabadi et al. 2024, Tables II and III).

    Args:
        histories: by name, one panel each; `has_mask_shares` is true of every one.
        path: PNG file.
    """

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(histories), squeeze=False, sharey=True)[0]
        for axes, (name, history) in zip(panels, histories.items(), strict=True):
            epochs = [row["epoch"] for row in history]
            lowest, highest = ([row[f"{_MASK_PERCENT}{end}"] for row in history] for end in ("min", "max"))
            axes.fill_between(epochs, lowest, highest, color=COLORS[4], alpha=0.3, linewidth=0)
            for end, style in (("max", "--"), ("median", "-"), ("min", ":")):
                _plot(axes, history, f"{_MASK_PERCENT}{end}", label=end, color=COLORS[0], linestyle=style)
            axes.set(title=name, xlabel="epoch", ylim=(0, 100))
            tidy(axes)
        panels[0].set_ylabel("K: masked pixels (% of the image)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)

    return save_figure(draw, path, (max(5.0, 4.0 * len(histories)), 4))


def save_figure(draw: Callable[[Figure], None], path: Path, size_inches: tuple[float, float]) -> Figure:
    """Draw into a figure, write it to a PNG file, whole or not at all, and return it.

    Raises:
        FileError: `path` cannot be written.
    """
    # A Figure of its own, without pyplot: no display, no state shared with the caller's plots.
    figure = Figure(figsize=size_inches, layout="constrained")
    draw(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
    return figure


def tidy(axes: Any) -> None:
    """Give axes a faint grid and no frame."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _plot(axes: Any, history: History, key: str, **style: Any) -> None:
    epochs = [row["epoch"] for row in history]
    # A line through one point would not be seen.
    axes.plot(epochs, [row[key] for row in history], marker="o" if len(epochs) < 4 else None, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
