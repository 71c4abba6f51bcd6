from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.demo import draw_samples
from bench.measure import data
from runtime.classifier import Classifier


def test_the_picture_shows_why_and_for_a_wrong_image_why_not_the_true_class(
    digits_models: dict[str, Path], tmp_path: Path
) -> None:
    test = data.load("digits")
    with Classifier(digits_models["float"]) as floating, Classifier(digits_models["openvino"]) as int8:
        figure = draw_samples(test, {"float": floating, "int8": int8}, tmp_path / "samples.png")
        predicted = int8.predict(list(test.images))
        found = int8.explain(test.images)
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    cells = [figure.axes[i : i + 4] for i in range(0, len(figure.axes), 4)]
    assert len(cells) == 12
    wrong = sum(p.index != label for p, label in zip(predicted, test.labels, strict=True))
    assert sum(axes[0].title.get_color() == "crimson" for axes in cells) == min(wrong, 4) > 0
    assert len({axes[0].get_title() for axes in cells}) >= 8  # classes
    for axes in cells:
        image = np.asarray(axes[0].images[0].get_array())
        (index,) = np.flatnonzero((test.images[:, :, :, 0] == image).all((1, 2)))[:1]
        label = str(test.labels[index])
        assert axes[0].get_title() == f"it is {label}"
        assert axes[2].get_title().startswith(f"int8: why {predicted[index].label}\n")
        other = label if label != predicted[index].label else predicted[index].top[1][0]
        assert axes[3].get_title().startswith(f"int8: why not {other}\n")
        assert np.array_equal(np.asarray(axes[2].images[0].get_array()), found.overlay()[index])
