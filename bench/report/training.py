"""What training did: loss and accuracy, the path of every alpha, mask shares, and what a step costs."""

from __future__ import annotations

from bench.report.charts import line_chart
from bench.report.page import Content, Html, Section, figure, folded, join, missing, paragraph, table, tag
from bench.report.sources import Run, Sources, reading
from bench.report.speed import milliseconds
from train.figures import has_alphas, has_mask_shares

_ALPHA = "alpha/"


def training_section(sources: Sources) -> Section:
    """Return the curves of every run, alpha over training first of all, and recorded rows and steps."""
    parts: list[Content] = []
    for run in sources.runs:
        if run.checkpoint.history:
            parts += [tag("h3", run.name) if len(sources.runs) > 1 else None, _curves(run)]
        else:
            parts.append(paragraph(f"{run.file}: no epoch is done."))
    if not sources.runs:
        parts.append(missing("No training run was given; its curves are in its folder:",
                             "python -m bench.report runs/NAME -o report.html"))  # fmt: skip
    return Section("Training", join(parts, _rows(sources), _steps(sources)))


def _curves(run: Run) -> Html:
    history = run.checkpoint.history
    epochs = [row["epoch"] for row in history]

    def column(key: str) -> tuple[list[float], list[float]]:
        return epochs, [row[key] for row in history]

    first, last = history[0], history[-1]
    figures = []
    if has_alphas(history):
        keys = [key for key in last if key.startswith(_ALPHA)]
        chart = line_chart(
            {key.removeprefix(_ALPHA): column(key) for key in keys}, title=f"Alpha over training of {run.name}",
            xlabel="epoch", ylabel="alpha (activation units)", limits=(0, None), whole=True,
        )  # fmt: skip
        lowest, highest = (pick(last[key] for key in keys) for pick in (min, max))
        figures.append(figure(chart, [tag("b", "Alpha over training"), f": the learned clipping value of every "
                                      f"activation, at the end {lowest:.3g} to {highest:.3g}."]))  # fmt: skip
    accuracy = line_chart(
        {split: column(f"{split}_accuracy") for split in ("train", "test")}, title=f"Accuracy of {run.name}",
        xlabel="epoch", ylabel="accuracy (%)", whole=True,
    )  # fmt: skip
    figures.append(figure(accuracy, [tag("b", "Accuracy"), f": test {last['test_accuracy']:.2f} %, train "
                                     f"{last['train_accuracy']:.2f} % after {len(history)} epochs."]))  # fmt: skip
    losses = {"cross entropy": column("train_cross_entropy")}
    if any(row["train_divergence"] for row in history):
        losses["KL(clean, masked)"] = column("train_divergence")
    loss = line_chart(losses, title=f"Training loss of {run.name}", xlabel="epoch", ylabel="loss (nats)",
                      limits=(0, None), whole=True)  # fmt: skip
    seconds = sum(row["seconds"] for row in history)
    figures.append(figure(loss, [tag("b", "Training loss"), f": from {first['train_loss']:.3g} to "
                                 f"{last['train_loss']:.3g} in {seconds:,.0f} s."]))  # fmt: skip
    if has_mask_shares(history):
        shares = line_chart(
            {end: column(f"mask_percent_{end}") for end in ("max", "median", "min")},
            title=f"Mask shares of {run.name}", xlabel="epoch", ylabel="masked pixels (% of the image)",
            limits=(0, 100), whole=True,
        )  # fmt: skip
        figures.append(figure(shares, [tag("b", "Mask shares"), " that SMOOT learned for the training images."]))
    return tag("div", figures, class_="charts")


def _rows(sources: Sources) -> Html | None:
    lines: list[list[Content]] = []
    for record in sources.latest("training row"):
        with reading(record) as values:
            asked = "-" if values["asked"] is None else f"{values['asked']:.1f}"
            accuracies = [f"{values[f'{split}_accuracy']:.2f}" for split in ("train", "test")]
            lines.append([values["row"], values["bits"], values["recipe"]["method"], values["epochs"], asked,
                          *accuracies])  # fmt: skip
    header = ["", "bits", "method", "epochs", "asked %", "train %", "test %"]
    return table("Runs of bench.rows", header, lines, align="lrlrrrr") if lines else None


def _steps(sources: Sources) -> Html | None:
    lines: list[list[Content]] = []
    for record in sources.latest("training step"):
        with reading(record) as values:
            setting = f"{values['arch']} on {values['data']}, {values['bits']} bit, {values['precision']}"
            for method, row in values["step"].items():
                lines.append([setting, method, str(values["batch"]), milliseconds(row["p50_ms"]),
                              f"{values['plain_steps'][method]:.2f}"])  # fmt: skip
    header = ["", "method", "batch", "p50 ms", "plain steps"]
    steps = table("A training step of every method", header, lines, align="llrrr")
    return folded("What a training step costs", steps) if lines else None
