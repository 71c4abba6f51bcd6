from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.measure.streams import ImageStream, in_memory
from bench.networks.network import Network
from bench.networks.opened import open_networks
from bench.networks.removal import Curves, removal_curves
from bench.saliency import main, measure, summarize
from export.verification.agreement import export_agreement
from runtime.errors import FileError, ModelError, OptionError
from runtime.explanations.agreement import spearman, top_overlap
from runtime.files import write_atomically
from tests.exports import exported
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint
from train.data.__main__ import main as write_data
from train.data.images import ImageData

ROOT = Path(__file__).parents[1]
SETTINGS = {"fill": "black", "canvas": "blur", "target": "predicted"}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits_test.npz"
    write_data(["digits", "-o", str(path)])
    return path


@pytest.fixture(scope="module")
def split(digits: ImageData) -> ImageStream:
    images = digits.test_images.permute(0, 2, 3, 1).contiguous().numpy()
    return in_memory("digits", images, digits.test_labels.numpy())


def curves_of(network: Network, split: ImageStream) -> Curves:
    """Return the curves of every image."""
    found, first = [], 0
    for images, labels in split.batches():
        found.append(removal_curves(network, images, labels, first=first, **SETTINGS)[0])
        first += len(labels)
    return Curves(*(np.concatenate([getattr(c, name) for c in found])
                    for name in ("correct", "deletion", "insertion")))  # fmt: skip


def test_an_exported_float_network_has_the_checkpoints_curves(
    digits_checkpoint_path: Path, digits_models: dict[str, Path], split: ImageStream
) -> None:
    _, reference = open_networks(str(digits_checkpoint_path), with_float=True)
    exported = [
        network
        for engine in ("openvino", "ort")
        for network in open_networks(str(digits_models["float"]), engine=engine)
    ]
    assert [n.precision for n in (reference, *exported)] == ["float", "fp32", "fp32"]
    _, agreements = measure([reference, *exported], split, **SETTINGS)
    expected, *curves = (curves_of(network, split) for network in (reference, *exported))
    for found in curves:
        assert np.array_equal(found.correct, expected.correct)
        assert np.abs(found.deletion - expected.deletion).max() < 1e-5
        assert np.abs(found.insertion - expected.insertion).max() < 1e-5
    assert all(a.spearman > 1 - 1e-6 and a.top_overlap > 0.999 for a in agreements)


def test_an_exported_int8_network_has_the_checkpoints_curves(
    digits_checkpoint: Checkpoint, digits_checkpoint_path: Path, tmp_path: Path, split: ImageStream
) -> None:
    # Exported as it was trained: the paper's gate and float32 gradients. The default ranks some pixels otherwise.
    trained = exported(digits_checkpoint, gate="ste", saliency_precision="float32")
    files = [tmp_path / "trained.onnx", tmp_path / "default.onnx"]
    for file, made in zip(files, (trained, exported(digits_checkpoint)), strict=True):
        write_atomically(file, made.model.SerializeToString())
    networks = [n for path in (digits_checkpoint_path, *files) for n in open_networks(str(path))]
    sums, agreements = measure(networks, split, **SETTINGS)
    expected, same, default = (summarize(n, c) for n, c in zip(networks, sums, strict=True))
    curves = [curves_of(network, split) for network in networks[:2]]
    assert [n.precision for n in networks] == ["8 bit", "int8", "int8"]
    # Engines sum in another order, which moves a code at a tie: a probability by 0.005 at most when measured.
    assert (curves[1].correct != curves[0].correct).mean() < 0.001
    assert np.abs(curves[1].deletion - curves[0].deletion).mean() < 1e-3
    assert np.abs(curves[1].insertion - curves[0].insertion).mean() < 1e-3
    assert same["masked_auc"] == pytest.approx(expected["masked_auc"], abs=0.02)
    assert default["masked_auc"] == pytest.approx(expected["masked_auc"], abs=1.0)
    assert default["accuracy"] == expected["accuracy"]
    by_pair = {a.pair: a for a in agreements}
    assert by_pair[0, 1].spearman > 0.9999 > by_pair[0, 2].spearman > 0.97


def test_agreement_is_that_of_the_two_sets_of_maps(
    digits_checkpoint_path: Path, digits_models: dict[str, Path], split: ImageStream
) -> None:
    test = split.evenly_spaced(70)  # more than one batch, and a smaller last one
    networks = [
        *open_networks(str(digits_checkpoint_path), with_float=True), *open_networks(str(digits_models["ort"]))
    ]  # fmt: skip
    _, agreements = measure(networks, test, **SETTINGS)
    maps = []
    for network in networks:
        parts = [network.explain(images, np.full(len(images), -1))[1] for images, _ in test.batches()]
        assert [len(part) for part in parts] == [64, 6]
        maps.append(np.concatenate(parts))
    assert [a.pair for a in agreements] == [(0, 1), (0, 2), (1, 2)]
    for a in agreements:
        assert a.spearman == pytest.approx(spearman(maps[a.pair[0]], maps[a.pair[1]]).mean(), abs=1e-12)
        assert a.top_overlap == pytest.approx(top_overlap(maps[a.pair[0]], maps[a.pair[1]]).mean(), abs=1e-12)


def test_the_float_network_is_the_one_export_compares_with(
    digits_checkpoint: Checkpoint, digits_checkpoint_path: Path, digits_models: dict[str, Path]
) -> None:
    import onnx

    samples = digits_checkpoint.samples
    test = in_memory(
        "digits", samples["images"].permute(0, 2, 3, 1).contiguous().numpy(), samples["labels"].numpy()
    )
    _, float_network = open_networks(str(digits_checkpoint_path), with_float=True)
    (exported,) = open_networks(str(digits_models["ort"]))
    _, (found,) = measure([float_network, exported], test, fill="black", canvas="blur", target="true")
    expected = export_agreement(onnx.load(digits_models["ort"]), digits_checkpoint.model()).maps
    assert found.spearman == pytest.approx(expected.spearman, abs=1e-3)
    assert found.top_overlap == pytest.approx(expected.top_overlap, abs=1e-2)


def test_networks_never_get_more_than_a_batch(digits_models: dict[str, Path], split: ImageStream) -> None:
    (network,) = open_networks(str(digits_models["ort"]))
    sizes: list[int] = []

    def counted(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        return network.logits(images)

    (sums,), _ = measure([dataclasses.replace(network, logits=counted)], split, **SETTINGS)
    assert sums.images == 360
    assert [len(curve) for curve in sums.curves] == [10, 11, 11]
    assert (max(sizes), sum(sizes)) == (64, 20 * 360)


def test_a_summary_has_means_and_standard_errors_over_the_images(
    digits_models: dict[str, Path], split: ImageStream
) -> None:
    (network,) = open_networks(str(digits_models["openvino"]))
    (sums,), _ = measure([network], split, **SETTINGS)
    found, curves = summarize(network, sums), curves_of(network, split)
    per_image = [
        sum(5.0 * (a + b) for a, b in itertools.pairwise(row)) for row in curves.correct.astype(int).tolist()
    ]
    assert found["masked_auc"] == pytest.approx(np.mean(per_image), abs=1e-9)
    assert found["masked_auc_error"] == pytest.approx(np.std(per_image) / np.sqrt(360), abs=1e-9)
    assert found["masked_curve"] == pytest.approx(100 * curves.correct.mean(0))
    assert found["accuracy"] == found["masked_curve"][0] > 90
    assert found["insertion_curve"][-1] == pytest.approx(found["deletion_curve"][0])


def test_a_table_a_record_and_a_picture_of_one_call(
    digits_checkpoint_path: Path,
    digits_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record, plot = tmp_path / "results.jsonl", tmp_path / "curves.png"
    arguments = [str(digits_checkpoint_path.parent), str(digits_models["ort"]), "--float", "--data", "digits"]
    options = ["--images", "90", "--allow-dirty", "--record", str(record), "--plot", str(plot), "--threads", "1"]
    main([*arguments, *options])
    *lines, environment = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "torch" in environment
    result = json.loads(record.read_text())
    assert [n["precision"] for n in result["networks"]] == ["8 bit", "float", "int8"]
    assert (result["n"], result["data"], len(result["agreement"])) == (90, "digits", 3)
    assert result["networks"][2]["model"] == f"{digits_models['ort'].parent.name}/ort.onnx"
    rows = [line for line in lines if line[:1] == " " and line[1:2].isdigit()]
    assert len(rows) == 3 + 3 + 3
    for row, network in zip(rows, result["networks"], strict=False):
        found = f"{network['accuracy']:.2f} {network['masked_auc']:.2f} ± {network['masked_auc_error']:.2f}"
        tail = f"{network['insertion_auc']:.3f} {network['deletion_auc']:.3f}"
        assert " ".join(row.split()).endswith(f"{found} {tail}")
    with Image.open(plot) as picture:
        assert min(picture.size) > 400
    main([*arguments, *options[:2], "--json", "--allow-dirty", "--record", str(record)])
    again = json.loads(capsys.readouterr().out)
    assert [json.loads(line) for line in record.read_text().splitlines()] == [result, again]
    assert again["networks"][0]["masked_auc"] == pytest.approx(result["networks"][0]["masked_auc"], abs=0.5)


def test_an_exported_network_is_measured_without_torch(digits_models: dict[str, Path], npz: Path) -> None:
    code = """
import sys
for name in ("torch", "onnx", "matplotlib"):
    sys.modules[name] = None
from bench.saliency import main
from runtime import command
command.run(main)
"""
    base = [sys.executable, "-c", code, "--data", str(npz), "--images", "20"]
    done = subprocess.run(
        [*base, "--json", str(digits_models["ort"])], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["n"] == 20
    done = subprocess.run([*base, "absent.pt"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: absent.pt: a checkpoint needs torch; pip install 'clearpact[train]', or name an exported file\n"
    )


def test_networks_of_different_data_sets_are_not_compared(
    digits_checkpoint: Checkpoint, digits_checkpoint_path: Path, npz: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(digits_checkpoint.recipe, data="mnist")
    other = tmp_path / "other" / "ckpt.pt"
    checkpoints.save(dataclasses.replace(digits_checkpoint, recipe=recipe), other)
    name = digits_checkpoint_path.parent.name
    message = f"^other: trained on mnist, but {name} on digits; compare networks of one data set$"
    with pytest.raises(OptionError, match=message):
        main([str(digits_checkpoint_path), str(other), "--data", str(npz)])
    with pytest.raises(OptionError, match=r"^--data digits: other was trained on mnist; use --data mnist$"):
        main([str(other), "--data", "digits"])


def test_images_of_another_size_are_refused(digits_models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "large.npz"
    np.savez(path, images=np.zeros((2, 9, 8, 1), np.uint8), labels=np.zeros(2, int))
    message = rf"^--data {path}: images \[9, 8, 1\] with labels up to 0, expected \[8, 8, 1\] and below 10 for "
    with pytest.raises(OptionError, match=message):
        main([str(digits_models["ort"]), "--data", str(path)])


def test_a_file_that_gives_classes_only_is_refused(digits_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "class.onnx"
    write_atomically(path, exported(digits_checkpoint, saliency=False).model.SerializeToString())
    with pytest.raises(ModelError, match=f"^{path}: gives classes only; export it again without --no-saliency$"):
        main([str(path), "--data", "digits"])


def test_wrong_options_are_refused_before_anything_is_measured(
    digits_models: dict[str, Path], tmp_path: Path
) -> None:
    base = [str(digits_models["ort"]), "--data", "digits"]
    with pytest.raises(FileError, match=f"^{tmp_path}: is a folder"):
        main([*base, "--plot", str(tmp_path)])
    with pytest.raises(FileError, match=f"^{tmp_path}: is a folder"):
        main([*base, "--allow-dirty", "--record", str(tmp_path)])
    with pytest.raises(OptionError, match=r"^--threads 0: expected a whole number from 1$"):
        main([*base, "--threads", "0"])
    with pytest.raises(FileError, match=r"ckpt.pt: no such file; check the path$"):
        main([str(tmp_path), "--data", "digits"])


def test_the_true_classs_map_is_measured_on_request(digits_models: dict[str, Path], split: ImageStream) -> None:
    (network,) = open_networks(str(digits_models["ort"]))
    asked: list[np.ndarray] = []

    def explain(images: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        asked.append(target)
        return network.explain(images, target)

    watched: Network = dataclasses.replace(network, explain=explain)
    test = split.evenly_spaced(100)
    measure([watched], test, fill="mean", canvas="random", target="true")
    assert np.array_equal(np.concatenate(asked), np.concatenate([labels for _, labels in test.batches()]))
    asked.clear()
    measure([watched], test, fill="mean", canvas="random", target="predicted")
    assert (np.concatenate(asked) == -1).all()


def test_batches_measured_at_the_same_time_give_the_same_bits(
    digits_models: dict[str, Path], split: ImageStream
) -> None:
    settings = {"fill": "random", "canvas": "blur", "target": "predicted"}
    networks = [n for name in ("ort", "float")
                for n in open_networks(str(digits_models[name]), engine="ort", threads=1)]  # fmt: skip
    alone, parallel = (measure(networks, split, workers=workers, **settings) for workers in (1, 4))
    assert alone[1] == parallel[1]
    for a, b in zip(alone[0], parallel[0], strict=True):
        assert np.array_equal(a.areas, b.areas)
        assert all(np.array_equal(x, y) for x, y in zip(a.curves, b.curves, strict=True))


def test_memory_does_not_grow_with_the_images(digits_models: dict[str, Path], split: ImageStream) -> None:
    networks = open_networks(str(digits_models["ort"]))
    batches = list(split.batches())[:5]  # of 64 images each
    peaks = []
    tracemalloc.start()
    try:
        for times in (1, 1, 6):  # the first one also counts what is made once
            labels = np.zeros(times * 320, np.int64)
            repeated = dataclasses.replace(split, labels=labels, positions=labels, read=lambda _, n=times: (
                batch for _ in range(n) for batch in batches))  # fmt: skip
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            (sums,), _ = measure(networks, repeated, **SETTINGS)
            assert sums.images == times * 320
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    # 1,600 images more: their curves would take 300 kB if they were kept, and their maps 400.
    assert peaks[2] - peaks[1] < 50_000
