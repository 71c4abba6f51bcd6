from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from bench.figures import main
from bench.measure.data import LabelledImages
from bench.networks.opened import open_networks, stream_for
from bench.networks.removal import MASKED_PERCENTS, PERCENTS
from bench.pictures.gradients import draw_gradients, gradient_magnitudes
from bench.pictures.maps import draw_maps, one_of_each_class
from bench.pictures.methods import draw_methods
from bench.pictures.removal import Peaks, draw_peaks, draw_removal_curves, find_peaks
from runtime.errors import FileError, OptionError
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint
from train.data.images import ImageData
from train.figures import COLORS, draw_alphas, draw_mask_shares, draw_training_curves


def history(epochs: int, layers: int) -> list[dict[str, float]]:
    return [
        {"epoch": e, "mask_percent_min": 50 - e, "mask_percent_median": 50, "mask_percent_max": 50 + 2 * e}
        | {f"alpha/relu{n}": n + 1 / e for n in range(layers)}
        for e in range(1, epochs + 1)
    ]


def is_picture(path: Path) -> bool:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"))
    return path.suffix == ".png" and pixels.std() > 5


def test_alphas_of_every_layer_and_run_are_drawn(tmp_path: Path) -> None:
    figure = draw_alphas({"mnist": history(3, 3), "cifar": history(8, 20)}, tmp_path / "alpha.png")
    assert is_picture(tmp_path / "alpha.png")
    few, many = figure.axes
    assert (few.get_title(), many.get_title()) == ("mnist", "cifar")
    assert (len(few.lines), len(many.lines)) == (3, 20)
    assert few.lines[2].get_label() == "relu2"
    np.testing.assert_allclose(few.lines[2].get_ydata(), [3, 2.5, 2 + 1 / 3])
    for axes in (few, many):
        assert len({to_hex(line.get_color()) for line in axes.lines}) == len(axes.lines)
        legend = axes.get_legend().get_window_extent()
        assert legend.x0 >= axes.get_window_extent().x1  # beside the data
        assert legend.x1 <= figure.bbox.x1


def test_the_spread_of_mask_shares_is_drawn(tmp_path: Path) -> None:
    figure = draw_mask_shares({"smoot": history(9, 1)}, tmp_path / "masks.png")
    assert is_picture(tmp_path / "masks.png")
    (axes,) = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines == {
        "max": [50 + 2 * e for e in range(1, 10)],
        "median": [50] * 9,
        "min": [50 - e for e in range(1, 10)],
    }


def test_training_curves_show_both_splits(tmp_path: Path) -> None:
    rows = [
        {"epoch": e, "train_cross_entropy": 1 / e, "train_divergence": 0.1, "train_accuracy": 90 + e}
        | {"test_accuracy": 89}
        for e in (1, 2)
    ]
    figure = draw_training_curves(rows, tmp_path / "curves.png")
    loss, accuracy = figure.axes
    assert [line.get_label() for line in loss.lines] == ["cross entropy", "KL(clean || masked)"]
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[91, 92], [89, 89]]


def test_removal_curves_of_every_network_are_drawn(tmp_path: Path) -> None:
    networks = [
        {"model": f"run{n}", "precision": "8 bit", "masked_auc": 30.0, "deletion_auc": 0.2, "insertion_auc": 0.9,
         "masked_curve": [100 - n - p for p in MASKED_PERCENTS], "deletion_curve": [1 - p / 100 for p in PERCENTS],
         "insertion_curve": [p / 100 for p in PERCENTS]}
        for n in range(8)
    ]  # fmt: skip
    result = {
        "n": 10,
        "data": "digits",
        "target": "predicted",
        "fill": "black",
        "canvas": "blur",
        "networks": networks,
    }
    figure = draw_removal_curves(result, tmp_path / "curves.png")
    assert is_picture(tmp_path / "curves.png")
    masked, deletion, insertion = figure.axes
    assert list(masked.lines[3].get_ydata()) == networks[3]["masked_curve"]
    assert list(masked.lines[3].get_xdata()) == list(MASKED_PERCENTS)
    assert (len(deletion.lines), len(insertion.lines)) == (8, 8)
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in masked.lines}
    assert len(styles) == 8
    (legend,) = figure.legends
    assert legend.get_window_extent().y1 <= masked.get_window_extent().y0  # below the data


def test_maps_of_all_networks_share_one_scale(
    digits_checkpoint_path: Path, digits_models: dict[str, Path], digits: ImageData, tmp_path: Path
) -> None:
    networks = [
        *open_networks(str(digits_checkpoint_path), with_float=True), *open_networks(str(digits_models["ort"]))
    ]  # fmt: skip
    images = digits.test_images.permute(0, 2, 3, 1).contiguous().numpy()
    test = one_of_each_class(LabelledImages("digits", images, digits.test_labels.numpy()), 12)
    assert test.labels.tolist() == [*range(10), 0, 1]
    test.labels[4] = 9  # to have a wrong prediction
    figure = draw_maps(networks, test, tmp_path / "maps.png", target="predicted")
    assert is_picture(tmp_path / "maps.png")
    grid = np.array(figure.axes[: 4 * 12]).reshape(4, 12)
    assert len({axes.images[0].get_clim() for axes in grid[1:].flat}) == 1
    for line, network in zip(grid[1:], networks, strict=True):
        logits, maps = network.explain(test.images, np.full(12, -1))
        for axes, one, index, label in zip(line, maps, logits.argmax(1), test.labels, strict=True):
            assert np.array_equal(axes.images[0].get_array(), one)
            assert axes.title.get_text().split()[0] == str(index)
            assert axes.title.get_color() == ("black" if index == label else COLORS[1])


def test_a_networks_maps_are_drawn_on_its_own_scale_on_request(
    digits_models: dict[str, Path], digits: ImageData, tmp_path: Path
) -> None:
    (network,) = open_networks(str(digits_models["ort"]))

    def faint(images: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, maps = network.explain(images, target)
        return logits, maps / 100

    networks = [network, dataclasses.replace(network, explain=faint)]
    images = digits.test_images[:3].permute(0, 2, 3, 1).contiguous().numpy()
    test = LabelledImages("digits", images, digits.test_labels[:3].numpy())
    figure = draw_maps(networks, test, tmp_path / "maps.png", target="true", scale="network")
    limits = [axes.images[0].get_clim()[1] for axes in figure.axes[3:9]]
    assert len(set(limits[:3])) == len(set(limits[3:])) == 1
    assert limits[0] == pytest.approx(100 * limits[3], rel=1e-6)
    figure = draw_maps(networks, test, tmp_path / "maps.png", target="true")
    assert len({axes.images[0].get_clim() for axes in figure.axes[3:9]}) == 1


def test_the_command_draws_from_run_folders(
    digits_checkpoint: Checkpoint, digits_checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smoot = tmp_path / "smoot"
    checkpoints.save(dataclasses.replace(digits_checkpoint, history=history(4, 3)), smoot / "ckpt.pt")
    for arguments in (
        ["alpha", str(digits_checkpoint_path), str(smoot)],
        ["masks", str(smoot)],
        ["maps", str(digits_checkpoint_path), str(smoot), "--data", "digits", "--images", "3"],
    ):
        picture = tmp_path / f"{arguments[0]}.png"
        main([*arguments, "-o", str(picture)])
        assert capsys.readouterr().out == f"{picture}\n"
        assert is_picture(picture)


def test_wrong_runs_are_refused_and_nothing_is_written(
    digits_checkpoint: Checkpoint, digits_checkpoint_path: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "out" / "figure.png"
    new, bare = tmp_path / "new.pt", tmp_path / "bare.pt"
    checkpoints.save(dataclasses.replace(digits_checkpoint, history=[]), new)
    checkpoints.save(dataclasses.replace(digits_checkpoint, history=[{"epoch": 1}]), bare)
    run, end = str(digits_checkpoint_path), ["-o", str(picture)]
    for arguments, message in (
        (["alpha", run, str(bare)], f"^{bare}: no alpha: a network in float; train with --bits 8$"),
        (["alpha", str(new)], f"^{new}: no epoch is done; train it first$"),
        (["masks", run], f"^{run}: no mask shares; train with --method smoot$"),
        (["maps", run], "^maps: --data is missing; name the data set of the runs, or an .npz file$"),
        (
            ["maps", run, "--data", "digits", "--images", "65"],
            "^--images 65: expected a whole number from 1 to 64$",
        ),
    ):
        with pytest.raises((OptionError, FileError), match=message):
            main([*arguments, *end])
    with pytest.raises(FileError, match=r"ckpt.pt: no such file; check the path$"):
        main(["alpha", str(tmp_path), *end])
    assert not picture.exists()


def test_an_image_rises_where_its_probability_gains_a_hundredth() -> None:
    curves = np.full((4, 10), 0.5)
    curves[0, 1:] = 0.1  # only falls
    curves[1, 3] = 0.51
    curves[2, 8] = 0.505  # gains too little
    curves[3, [2, 9]] = 0.6, 0.7
    found = Peaks.of(curves)
    assert found.rises.tolist() == [False, True, False, True]
    assert found.percent.tolist() == [0, 30, 0, 90]


def test_peaks_are_drawn_and_told(
    digits_checkpoint_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "peaks.png"
    main(["peaks", str(digits_checkpoint_path), "--data", "digits", "--images", "100", "-o", str(picture)])
    out = capsys.readouterr().out.splitlines()
    (network,) = open_networks(str(digits_checkpoint_path))
    test = stream_for([network], "digits", "data").evenly_spaced(100)
    found = find_peaks(network, test, fill="black")
    assert 0 < found.rises.mean() < 1
    assert out[0].startswith(f"{network.name}, 8 bit: {found.rises.mean():.1%} of the images first rise, peak at ")
    figure = draw_peaks({"a": found}, picture, title="t")
    heights = [bar.get_height() for bar in figure.axes[2].patches]
    assert sum(heights) == pytest.approx(100 * found.rises.mean())
    assert figure.axes[2].get_title() == f"{found.rises.mean():.1%} rise"


def test_gradients_are_those_of_the_maps_and_every_pixel_is_counted(
    digits_checkpoint_path: Path, digits_models: dict[str, Path], tmp_path: Path
) -> None:
    picture = tmp_path / "gradients.png"
    runs = [str(digits_checkpoint_path), str(digits_models["ort"])]
    main(["gradients", *runs, "--data", "digits", "--images", "70", "-o", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    (network,) = open_networks(runs[0])
    test = stream_for([network], "digits", "data").evenly_spaced(70)
    found = gradient_magnitudes(network, test)
    expected = [network.explain(images, np.full(len(images), -1))[1].ravel() for images, _ in test.batches()]
    np.testing.assert_array_equal(found, np.concatenate(expected))
    figure = draw_gradients({"a": found, "b": found[:100]}, picture, title="t")
    for patch in figure.axes[1].patches:
        assert patch.get_data().values.sum() == pytest.approx(100)  # type: ignore[attr-defined]


def test_methods_are_drawn_a_panel_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("gradient", "layercam:stage3.2.conv2", "layercam:stage2")
    rows = [
        {"model": f"files/{bits}.onnx", "precision": "int8", "method": method, "road": 30.0 + n,
         "times_class": n + 1.0}
        for bits in ("8bit", "4bit") for n, method in enumerate(names)
    ]  # fmt: skip
    found = {"bench": "saliency-methods", "data": "cifar10", "n": 200, "methods": rows}
    other = {**found, "data": "folder:caltech101-128@a50c93f4624f", "methods": rows[:2]}
    figure = draw_methods([found, other], tmp_path / "methods.png")
    assert is_picture(tmp_path / "methods.png")
    assert [axes.get_title() for axes in figure.axes] == ["cifar10, 200 images", "caltech101-128, 200 images"]
    drawn = [
        points.get_offsets()[0].tolist() for points in figure.axes[0].collections if len(points.get_offsets())
    ]
    assert drawn == [[1, 30], [2, 31], [3, 32]] * 2
    (legend,) = figure.legends
    kinds = [text.get_text() for text in legend.get_texts()]
    assert kinds == ["gradient", "layercam, last convolution", "layercam, earlier layer"]
    recorded = tmp_path / "results.jsonl"
    recorded.write_text("".join(f"{json.dumps(one)}\n" for one in (found, other)))
    main(["methods", str(recorded), "-o", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "methods.png").read_bytes()
    recorded.write_text('{"bench": "accuracy"}\n')
    with pytest.raises(OptionError, match="no methods; record them with bench"):
        main(["methods", str(recorded), "-o", str(tmp_path / "none.png")])
