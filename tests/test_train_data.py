from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import FileError, OptionError
from tests.image_folders import write_digits
from train.data import datasets
from train.data.__main__ import main
from train.data.images import ImageData, batches, hold_out
from train.input_spec import InputSpec
from train.quantization.quantizers import InputQuantizer


def test_digits_are_split_without_overlap(digits: ImageData) -> None:
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert digits.train_images.dtype == torch.uint8
    assert (int(digits.train_images.max()), int(digits.train_images.min())) == (255, 0)
    assert digits.classes == tuple("0123456789")
    assert digits.test_labels.bincount().tolist() == [42, 28, 26, 48, 38, 39, 30, 26, 36, 47]


@given(st.floats(0.05, 1.0).map(lambda s: round(s, 2)))
def test_default_normalization_puts_every_pixel_on_the_int8_grid(std: float) -> None:
    spec = InputSpec((2, 2), 3, (128 / 255,) * 3, (std,) * 3)
    assert spec.exact
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    normalized = spec.normalize(pixels)
    codes = normalized / torch.tensor(spec.grid_scale, dtype=torch.float32)
    assert torch.equal(codes.round(), pixels.float() - 128)
    assert torch.allclose(normalized, (pixels / 255 - 128 / 255) / std, atol=1e-6)


def test_per_channel_normalization_covers_its_range() -> None:
    spec = InputSpec((2, 2), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert not spec.exact
    ends = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 3, 2, 2)
    normalized = spec.normalize(ends)
    assert normalized[0, 0, 0, 0].item() == pytest.approx(-0.485 / 0.229, rel=1e-6)
    assert normalized[1, 2, 0, 0].item() == pytest.approx((1 - 0.406) / 0.225, rel=1e-6)
    assert normalized.abs().max().item() == pytest.approx(127 * spec.grid_scale, rel=1e-6)


@given(zero=st.integers(0, 255), off=st.floats(-0.24, 0.24), std=st.floats(0.05, 300))
def test_a_mean_near_a_pixel_makes_the_pixels_codes(zero: int, off: float, std: float) -> None:
    spec = InputSpec((16, 16), 1, ((zero + off) / 255,), (std / 255,))
    assert spec.pixel_codes == (-zero, 255 - zero)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    quantizer = InputQuantizer(spec.pixel_scale, spec.pixel_codes)
    codes = torch.round(quantizer(spec.normalize(pixels)) / quantizer.scale)
    assert torch.equal(codes, pixels.float() - zero)


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), (0.5,)), ((0.0, 0.1, 0.0), (1.0,) * 3), ((0.0,) * 3, (0.2, 0.3, 0.2)), ((1.1,), (1.0,))],
)
def test_other_means_have_no_grid_of_pixels(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    assert InputSpec((4, 4), len(mean), mean, std).pixel_codes is None


def test_batches_visit_every_index_once_and_drop_the_rest() -> None:
    parts = list(batches(10, 4, generator=torch.Generator().manual_seed(0)))
    assert [len(p) for p in parts] == [4, 4]
    assert len(set(torch.cat(parts).tolist())) == 8
    assert [len(p) for p in batches(3, 128, generator=torch.Generator())] == [3]


def test_unknown_data_set_is_refused() -> None:
    with pytest.raises(OptionError, match="data set 'imagenet': expected one of digits, mnist"):
        datasets.load("imagenet")


def test_absent_data_without_network_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An address that refuses at once stands for a machine without network.
    from torchvision import datasets as torchvision_data

    monkeypatch.setattr(torchvision_data.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(FileError, match=r"holds no mnist and it could not be downloaded .*--data-root"):
        datasets.load("mnist", tmp_path)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def test_mnist_is_read_from_its_original_files(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 28, 28))
    for prefix, n in (("train", 5), ("t10k", 3)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images[:n])
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(n))
    loaded = datasets.load("mnist", tmp_path)
    assert np.array_equal(loaded.train_images[:, 0].numpy(), images)
    assert loaded.test_labels.tolist() == [0, 1, 2]
    assert loaded.classes == tuple("0123456789")


def write_medmnist(path: Path, counts: dict[str, int], labels: int = 2) -> dict[str, np.ndarray]:
    """Write random images uint8 [N, 28, 28] in the layout of MedMNIST; return the arrays."""
    rng = np.random.default_rng(0)
    arrays = {f"{p}_images": rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for p, n in counts.items()}
    arrays |= {f"{p}_labels": rng.integers(0, labels, (n, 1), dtype=np.uint8) for p, n in counts.items()}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return arrays


def test_medmnist_brings_its_own_validation_split(tmp_path: Path) -> None:
    arrays = write_medmnist(tmp_path / "pneumoniamnist.npz", {"train": 20, "val": 6, "test": 9})
    loaded = datasets.load("pneumoniamnist", tmp_path)
    assert loaded.classes == ("normal", "pneumonia")
    assert loaded.val_images is not None
    for part, images in (("train", loaded.train_images), ("val", loaded.val_images), ("test", loaded.test_images)):
        assert np.array_equal(images[:].numpy()[:, 0], arrays[f"{part}_images"])
    assert np.array_equal(loaded.test_labels.numpy(), arrays["test_labels"][:, 0])


@pytest.mark.parametrize("labels", [0, 3])
def test_another_file_in_the_place_of_medmnist_is_refused(tmp_path: Path, labels: int) -> None:
    path = tmp_path / "pneumoniamnist.npz"
    path.write_bytes(b"PK\x03\x04 cut")
    if labels:
        write_medmnist(path, {"train": 50, "val": 6, "test": 9}, labels)
    with pytest.raises(FileError, match=r"not what it should be, expected MedMNIST's pneumoniamnist\.npz"):
        datasets.load("pneumoniamnist", tmp_path)
    with pytest.raises(FileError, match="no such file"):
        datasets.load("pneumoniamnist", tmp_path / "nowhere")


def test_command_writes_a_split_that_needs_no_torch(tmp_path: Path, digits: ImageData) -> None:
    main(["digits", "-o", str(tmp_path / "d.npz")])
    with np.load(tmp_path / "d.npz", allow_pickle=False) as archive:
        assert archive["images"].shape == (360, 8, 8, 1)
        assert np.array_equal(archive["labels"], digits.test_labels.numpy())
        assert archive["classes"].tolist() == list("0123456789")


def write_cifar100(folder: Path, rng: np.random.Generator) -> dict[str, str]:
    """Write six training and four test images in the layout of CIFAR-100; return file name -> MD5."""
    folder.mkdir()
    contents: dict[str, dict[str, object]] = {
        name: {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), "fine_labels": list(range(n))}
        for name, n in (("train", 6), ("test", 4))
    }
    contents["meta"] = {"fine_label_names": [f"class{i}" for i in range(100)]}
    for name, value in contents.items():
        (folder / name).write_bytes(pickle.dumps(value))
    return {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in contents}


def test_cifar100_is_read_from_files_whose_content_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets as torchvision_data

    folder = tmp_path / torchvision_data.CIFAR100.base_folder
    known = write_cifar100(folder, np.random.default_rng(0))
    monkeypatch.setattr(torchvision_data.CIFAR100, "train_list", [["train", known["train"]]])
    monkeypatch.setattr(torchvision_data.CIFAR100, "test_list", [["test", known["test"]]])
    monkeypatch.setattr(
        torchvision_data.CIFAR100, "meta", {**torchvision_data.CIFAR100.meta, "md5": known["meta"]}
    )
    loaded = datasets.load("cifar100", tmp_path)
    assert loaded.train_images.shape == (6, 3, 32, 32)
    assert loaded.test_labels.tolist() == [0, 1, 2, 3]
    assert (len(loaded.classes), loaded.classes[7]) == (100, "class7")


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_pickles_of_unknown_content_are_never_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets as torchvision_data

    kind = {"cifar10": torchvision_data.CIFAR10, "cifar100": torchvision_data.CIFAR100}[name]
    monkeypatch.setattr(kind, "url", "http://127.0.0.1:9/")
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    for file, _ in (*kind.train_list, *kind.test_list, (kind.meta["filename"], "")):
        (folder / file).write_bytes(pickle.dumps(_Trap(tmp_path / "executed")))
    with pytest.raises(FileError, match=f"holds no {name} and it could not be downloaded"):
        datasets.load(name, tmp_path)
    assert not (tmp_path / "executed").exists()


def test_command_writes_the_test_split_of_a_folder(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "mine", {"zero": 20, "one": 10})
    main([f"folder:{folder}", "--image-size", "12", "-o", str(tmp_path / "d.npz")])
    with np.load(tmp_path / "d.npz", allow_pickle=False) as archive:
        assert archive["images"].shape == (3, 12, 12, 3)
        assert archive["labels"].tolist() == [0, 1, 1]
        assert archive["classes"].tolist() == ["one", "zero"]


def test_training_images_that_are_held_out_are_the_validation_split(digits: ImageData) -> None:
    held = hold_out(digits, 200)
    assert (len(held.train_images), len(held.val_images)) == (1237, 200)  # type: ignore[arg-type]
    again = hold_out(digits, 200)
    assert torch.equal(held.val_images[:], again.val_images[:])  # type: ignore[index]
    # Every training image is in one of both, with its label.
    both = torch.cat([held.train_images[:], held.val_images[:]]).flatten(1).double()  # type: ignore[index]
    labels = torch.cat([held.train_labels, held.val_labels])  # type: ignore[list-item]
    weights = torch.arange(1, both.shape[1] + 1).double().sqrt()
    ours = torch.stack([both @ weights, labels.double()], 1)
    theirs = torch.stack([digits.train_images.flatten(1).double() @ weights, digits.train_labels.double()], 1)
    assert torch.equal(ours[ours[:, 0].argsort()], theirs[theirs[:, 0].argsort()])
    assert torch.equal(held.test_images[:], digits.test_images[:])
    assert hold_out(digits, 0) is digits
    with pytest.raises(
        OptionError, match="validation 1437: expected fewer than the 1437 training images of digits"
    ):
        hold_out(digits, 1437)
