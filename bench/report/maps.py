"""What the networks rely on in the same images, and how much they agree."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps

from bench.measure.data import LabelledImages
from bench.pictures.maps import one_of_each_class
from bench.report.page import Content, Html, Section, join, missing, paragraph, table, tag
from bench.report.subjects import Subject, role
from runtime import command
from runtime.classifier import MAX_BATCH
from runtime.explanations.agreement import MEASURES, spearman
from runtime.prediction import softmax

# The saliency drawn as brightest: single pixels above it would otherwise darken all others.
_BRIGHT_PERCENTILE = 99.5
_LARGEST_PIXELS = 112
# So many images are added whose maps agree least.
_WORST = 3


@dataclass(frozen=True)
class ExplainedImages:
    """Images as all networks of a subject see them; row n of every array belongs to image n.

    Args:
        subject: whose networks they are.
        samples: the images.
        logits: of each network, float32 [n, K].
        maps: of each network, float32 [n, H, W], of the class that it predicts.
        shown: numbers of the images to show.
    """

    subject: Subject
    samples: LabelledImages
    logits: tuple[np.ndarray, ...]
    maps: tuple[np.ndarray, ...]
    shown: tuple[int, ...]


def explain(subject: Subject, samples: LabelledImages, count: int) -> ExplainedImages | None:
    """Return the maps of the samples; None where the subject explains nothing.

    Args:
        subject: whose networks explain.
        samples: images of their size.
        count: how many to show, one of each class in turn; those whose maps agree least are added, the worst last.
    """
    if not subject.networks:
        return None
    logits, maps = [], []
    for network in subject.networks:
        starts = range(0, len(samples.images), MAX_BATCH)
        parts = [
            network.explain(samples.images[start : start + MAX_BATCH], np.full(len(part), -1, np.int64))
            for start in command.progress(starts, label=f"maps: {role(network)}, images / 64")
            for part in [samples.labels[start : start + MAX_BATCH]]
        ]
        logits.append(np.concatenate([found for found, _ in parts]))
        maps.append(np.concatenate([found for _, found in parts]))
    numbered = LabelledImages(samples.name, np.arange(len(samples.labels)), samples.labels)
    shown = one_of_each_class(numbered, min(count, len(samples.labels), MAX_BATCH)).images.tolist()
    if len(maps) > 1:
        worst = spearman(maps[0], maps[-1]).argsort()[:_WORST].tolist()
        shown = [*(number for number in shown if number not in worst), *reversed(worst)]
    return ExplainedImages(subject, samples, tuple(logits), tuple(maps), tuple(shown))


def maps_section(explained: Sequence[ExplainedImages | None]) -> Section:
    """Return the maps of float, fake-quantized and exported network side by side, and how much they agree."""
    parts: list[Content] = []
    for found in explained:
        if found is not None:
            several = len(explained) > 1
            parts += [tag("h3", found.subject.name) if several else None, _agreement(found), _cards(found)]
    if not parts:
        remedy = "python -m bench.report runs/NAME --data DATA -o report.html"
        return Section("Maps", missing("No network was given that explains itself; a run does:", remedy))
    note = paragraph(
        "Saliency of the predicted class, |d logit / d pixel|, from black over red to yellow, on one scale for "
        "each image. ρ: Spearman correlation with the first network's map of the same image."
    )
    return Section("Maps", join(note, parts))


def picture(pixels: np.ndarray, alternative: str, *, brightest: float | None = None) -> Html:
    """Return an image inside the page.

    Args:
        pixels: uint8 [H, W, C], or a map float [H, W].
        alternative: what it shows, for those who do not see it.
        brightest: value of a map that is drawn as brightest.
    """
    from PIL import Image

    if brightest is None:
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    else:
        levels = np.clip(255 * pixels / max(brightest, np.finfo(np.float32).tiny), 0, 255).astype(np.uint8)
        image = Image.fromarray(levels).convert("P")
        image.putpalette((colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8).tobytes())
    if max(image.size) > _LARGEST_PIXELS:
        image = image.convert("RGB")
        image.thumbnail((_LARGEST_PIXELS, _LARGEST_PIXELS))
    written = io.BytesIO()
    image.save(written, format="png", optimize=True)
    data = base64.b64encode(written.getvalue()).decode()
    width, height = image.size
    return tag("img", src=f"data:image/png;base64,{data}", alt=alternative, width=width, height=height)


def _agreement(found: ExplainedImages) -> Html | None:
    names = [role(network) for network in found.subject.networks]
    rows = []
    for a in range(len(names)):
        for b in range(a + 1, len(names)):
            alike = {name: measure(found.maps[a], found.maps[b]) for name, measure in MEASURES.items()}
            same = found.logits[a].argmax(1) == found.logits[b].argmax(1)
            ranks = alike["Spearman"]
            agreeing = f"{ranks[same].mean():.3f}" if same.any() else "-"
            rows.append([f"{names[a]} and {names[b]}", *(f"{values.mean():.3f}" for values in alike.values()),
                         f"{np.percentile(ranks, 10):.3f}", agreeing, f"{100 * same.mean():.2f}"])  # fmt: skip
    caption = f"Agreement of the maps on {len(found.samples.labels):,} images of {found.samples.name}"
    header = ["networks", *MEASURES, "Spearman, lowest decile", "Spearman, same class", "same class %"]
    agreement = table(caption, header, rows, align="l" + "r" * (len(header) - 1)) if rows else None
    return join(agreement, paragraph(found.subject.remark) if found.subject.remark else None)


def _cards(found: ExplainedImages) -> Html:
    return tag("div", (_card(found, number) for number in found.shown), class_="cards")


def _card(found: ExplainedImages, number: int) -> Html:
    classes, label = found.subject.classes, int(found.samples.labels[number])
    worst = found.shown[-_WORST:] if len(found.maps) > 1 else ()
    least = " · maps agree least" if number in worst else ""
    shown = [_thumbnail(picture(found.samples.images[number], f"Image {number}, class {classes[label]}"), "image")]
    brightest = float(np.percentile([maps[number] for maps in found.maps], _BRIGHT_PERCENTILE))
    for network, logits, maps in zip(found.subject.networks, found.logits, found.maps, strict=True):
        index, probability = int(logits[number].argmax()), float(softmax(logits[number : number + 1]).max())
        predicted = f"{classes[index]} {probability:.0%}"
        alternative = f"Saliency of image {number} in the network {role(network)}, which predicts {predicted}"
        agrees = None
        if maps is not found.maps[0]:
            correlation = float(spearman(found.maps[0][number : number + 1], maps[number : number + 1])[0])
            alternative += f", rank correlation with the first map {correlation:.3f}"
            agrees = tag("span", f"ρ {correlation:.3f}")
        answer = tag("span", predicted, class_=None if index == label else "miss")
        heading = network.precision.replace("int", "INT").replace("fp", "FP")
        shown.append(_thumbnail(picture(maps[number], alternative, brightest=brightest), heading, answer, agrees))
    return tag("div", tag("h4", f"{classes[label]}{least}"), tag("div", shown, class_="row"), class_="card")


def _thumbnail(image: Html, heading: str, *text: Content) -> Html:
    return tag("figure", image, tag("figcaption", tag("b", heading), *text))
