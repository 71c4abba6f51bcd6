from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import FileError, ImageError
from runtime.images import SUFFIXES, list_images, load_image, to_batch
from runtime.images.resizing import middle, resize, resize_maps
from runtime.manifest import ImageInput
from train.data.decoding import decode

GREY = ImageInput((6, 5), 1, (0.5,), (0.25,))
RGB = ImageInput((6, 5), 3, (0.5,) * 3, (0.25,) * 3)


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@given(*[st.integers(1, 70)] * 4, st.sampled_from([1, 3]), st.integers(0, 9))
def test_resize_is_pillows_bilinear_within_one_level(
    height: int, width: int, new_height: int, new_width: int, channels: int, seed: int
) -> None:
    image = pixels(height, width, channels, seed=seed)
    pillow = Image.fromarray(image[..., 0] if channels == 1 else image)
    expected = np.asarray(pillow.resize((new_width, new_height), Image.Resampling.BILINEAR))
    found = resize(image[None], (new_height, new_width))[0]
    assert found.shape == (new_height, new_width, channels)
    assert np.abs(found.reshape(expected.shape) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("size", [(4, 7, 16, 14), (480, 640, 224, 224), (1080, 1920, 32, 32), (8, 8, 224, 300)])
def test_resize_of_frames_differs_from_pillow_in_one_pixel_of_a_hundred(size: tuple[int, int, int, int]) -> None:
    frame = pixels(*size[:2], 3)
    expected = np.asarray(Image.fromarray(frame).resize((size[3], size[2]), Image.Resampling.BILINEAR)).astype(int)
    difference = np.abs(resize(frame[None], size[2:])[0] - expected)
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= difference.size / 100


def test_resize_keeps_a_constant_and_the_same_size_exactly() -> None:
    assert (resize(np.full((2, 31, 17, 3), 255, np.uint8), (7, 40)) == 255).all()
    image = pixels(1, 9, 9, 3)
    assert (resize(image, (9, 9)) == image).all()


@pytest.mark.parametrize("view", [np.s_[:, ::-1], np.s_[::-1], np.s_[..., ::-1], np.s_[::-1, ::2, ::-1]])
def test_views_that_run_backwards_are_resized_as_their_copies_are(view: tuple[slice, ...]) -> None:
    turned = pixels(90, 70, 3)[view][None]
    difference = resize(turned, (31, 17)).astype(int) - resize(turned.copy(), (31, 17))
    assert np.abs(difference).max() <= 1
    assert np.count_nonzero(difference) <= difference.size / 100


def test_a_frame_is_resized_without_a_whole_copy_of_it_in_floats() -> None:
    frame = np.zeros((1, 1080, 1920, 3), np.uint8)
    resize(frame, (224, 224))
    tracemalloc.start()
    try:
        resize(frame, (224, 224))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * frame.nbytes  # 25 MB as float32, and 6 as they are


@given(st.tuples(*[st.integers(1, 30)] * 2), st.tuples(*[st.integers(1, 60)] * 2), st.integers(0, 9))
def test_maps_are_resized_as_pillow_resizes_floats(
    size: tuple[int, int], other: tuple[int, int], seed: int
) -> None:
    maps = np.random.default_rng(seed).random((3, *size), dtype=np.float32)
    found = resize_maps(maps, other)
    for values, resized in zip(maps, found, strict=True):
        expected = Image.fromarray(values).resize(other[::-1], Image.Resampling.BILINEAR)
        assert np.abs(resized - np.asarray(expected)).max() < 2e-6
        assert (resized == resize_maps(values[None], other)[0]).all()  # whatever stands beside it


def test_halving_averages_with_a_triangle() -> None:
    # Weights of a triangle two pixels wide at 1/8, 3/8, 3/8, 1/8, those outside the image left out.
    row = np.array([[0, 80, 160, 240]], np.uint8)[None, :, :, None]
    left = (3 * 0 + 3 * 80 + 160) / 7
    assert resize(row, (1, 2))[0, 0, :, 0].tolist() == [round(left), round(240 - left)]


@given(st.integers(0, 2**32 - 1))
def test_rgb_becomes_grey_as_in_pillow(seed: int) -> None:
    image = pixels(6, 5, 3, seed=seed)
    assert (to_batch(image, GREY)[0, :, :, 0] == np.asarray(Image.fromarray(image).convert("L"))).all()


def test_all_grey_levels_and_primaries_become_grey_as_in_pillow() -> None:
    levels = np.arange(256, dtype=np.uint8)
    zero = np.zeros_like(levels)
    ramps = [(levels, levels, levels), (levels, zero, zero), (zero, levels, zero), (zero, zero, levels)]
    image = np.stack([np.stack(ramp, -1) for ramp in ramps])
    found = to_batch(image, ImageInput((4, 256), 1, (0.5,), (0.5,)))[0, :, :, 0]
    assert (found == np.asarray(Image.fromarray(image).convert("L"))).all()
    assert (found[0] == levels).all()


@pytest.mark.parametrize(
    ("shape", "batch"),
    [
        ((6, 5), 1),
        ((6, 5, 1), 1),
        ((6, 5, 3), 1),
        ((4, 6, 5), 4),
        ((4, 6, 5, 1), 4),
        ((4, 6, 5, 3), 4),
        ((9, 12), 1),
    ],
)
@pytest.mark.parametrize("expected", [GREY, RGB], ids=["grey", "rgb"])
def test_every_rank_becomes_a_contiguous_batch(shape: tuple[int, ...], batch: int, expected: ImageInput) -> None:
    found = to_batch(pixels(*shape), expected)
    assert found.shape == (batch, 6, 5, expected.channels)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous


def test_pixels_of_the_right_form_are_passed_on_unchanged_and_uncopied() -> None:
    image = pixels(2, 6, 5, 3)
    assert np.shares_memory(to_batch(image, RGB), image)
    assert (to_batch(image, RGB) == image).all()
    assert (to_batch(image[0, :, :, 0], RGB) == image[:1, :, :, :1]).all()


def test_read_only_and_strided_frames_give_the_same_batch_as_a_copy() -> None:
    frame = pixels(12, 10, 3)
    frame.flags.writeable = False
    for view in (
        frame,
        frame[::2, ::2],
        frame[:, ::-1],
        frame.transpose(1, 0, 2),
        frame[..., ::-1],
        frame[..., 0],
    ):
        assert (to_batch(view, RGB) == to_batch(view.copy(), RGB)).all()
        assert to_batch(view, RGB).flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint16, bool])
def test_another_dtype_is_refused_with_what_to_pass(dtype: type) -> None:
    name = np.dtype(dtype).name
    with pytest.raises(
        ImageError, match=f"image of dtype {name}, expected uint8 .*; pass pixels 0..255 as np.uint8"
    ):
        to_batch(np.zeros((6, 5), dtype), GREY)


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((6, 5, 4), "drop its alpha channel"),
        ((480, 640, 4), "drop its alpha channel"),
        ((6, 5, 2), "drop its alpha channel"),
        ((2, 6, 5, 4), "drop its alpha channel"),
        ((2, 3, 6, 5), "put the channels last"),
        ((5,), "put the channels last"),
        ((1, 1, 6, 5, 3), "put the channels last"),
        ((), "put the channels last"),
        ((0, 5), "it holds no pixel"),
        ((0, 6, 5, 3), "it holds no pixel"),
        ((6, 5, 0), "it holds no pixel"),
    ],
)
def test_another_shape_is_refused_with_its_remedy(shape: tuple[int, ...], remedy: str) -> None:
    listed = str(list(shape)).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ImageError, match=f"^image of shape {listed}, expected uint8 .*; {remedy}$"):
        to_batch(np.zeros(shape, np.uint8), RGB)


def test_another_size_is_refused_where_the_manifest_says_so() -> None:
    strict = ImageInput((6, 5), 1, (0.5,), (0.25,), "none")
    assert to_batch(pixels(6, 5), strict).shape == (1, 6, 5, 1)
    message = "^image of 5x6 pixels, expected 6x5; resize it, or export with --resize bilinear$"
    with pytest.raises(ImageError, match=message):
        to_batch(pixels(5, 6), strict)


def test_files_are_read_as_grey_or_rgb_without_alpha(tmp_path: Path) -> None:
    grey, rgb = pixels(6, 5), pixels(6, 5, 3)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(np.dstack([rgb, grey])).save(tmp_path / "rgba.png")
    Image.fromarray(rgb).quantize(256).save(tmp_path / "palette.png")
    assert (load_image(tmp_path / "grey.png") == grey).all()
    assert (load_image(tmp_path / "rgb.png") == rgb).all()
    assert (load_image(tmp_path / "rgba.png") == rgb).all()
    assert load_image(tmp_path / "palette.png").shape == (6, 5, 3)


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: show it rotated by 90 degrees clockwise
    image = pixels(6, 5, 3)
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    assert (load_image(tmp_path / "turned.png") == np.rot90(image, -1)).all()


@pytest.mark.parametrize(("dtype", "mode"), [(np.uint16, "I;16"), (np.float32, "F"), (np.int32, "I")])
def test_files_of_more_than_8_bits_are_refused_not_clipped(tmp_path: Path, dtype: type, mode: str) -> None:
    path = tmp_path / "scan.tif"
    Image.fromarray(np.full((6, 5), 1000, dtype)).save(path)
    with pytest.raises(FileError, match=f"^{path}: has {mode} pixels, expected 8 bits a channel; convert it"):
        load_image(path)


def test_a_truncated_image_is_an_error_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(pixels(6, 5, 3)).save(path)
    data = path.read_bytes()
    for length in range(len(data) - 32):  # what comes last are checksums and the end mark
        path.write_bytes(data[:length])
        with pytest.raises(FileError, match=f"^{path}: cannot be read as an image "):
            load_image(path)


def test_what_is_no_image_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not pixels")
    with pytest.raises(
        FileError, match=r"notes.png: cannot be read as an image \(not an image file\); expected PNG"
    ):
        load_image(tmp_path / "notes.png")
    with pytest.raises(FileError, match=r"absent.png: no such file; check the path"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(FileError, match=r"cannot be read as an image \(Is a directory\)"):
        load_image(tmp_path)


def test_a_folder_is_replaced_by_its_images_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "c.txt", "d.tiff"):
        (tmp_path / name).touch()
    (tmp_path / "e.png").mkdir()
    assert list_images([str(tmp_path), "x.bin"]) == [
        *(tmp_path / n for n in ("a.jpg", "b.PNG", "d.tiff")),
        Path("x.bin"),
    ]


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileError, match=f"^{tmp_path}: a folder without images, expected files such as"):
        list_images([str(tmp_path)])


def test_every_suffix_is_one_that_pillow_reads() -> None:
    assert set(SUFFIXES) <= set(Image.registered_extensions())


@given(st.tuples(*[st.integers(1, 60)] * 2), st.tuples(*[st.integers(1, 40)] * 2))
def test_the_middle_has_the_models_shape_and_one_full_side(frame: tuple[int, int], size: tuple[int, int]) -> None:
    top, left, height, width = middle(frame, size)
    assert height == frame[0] or width == frame[1]
    assert abs(height * size[1] - width * size[0]) <= max(size) / 2 or 1 in (height, width)
    assert 0 <= frame[0] - height - 2 * top <= 1
    assert 0 <= frame[1] - width - 2 * left <= 1


@pytest.mark.parametrize("frame", [(30, 50), (50, 30), (33, 33), (200, 41)])
@pytest.mark.parametrize("channels", [None, 3])
def test_a_frame_is_cropped_as_image_folders_are_for_training(
    tmp_path: Path, frame: tuple[int, int], channels: int | None
) -> None:
    image = pixels(*frame, channels) if channels else pixels(*frame)
    Image.fromarray(image).save(tmp_path / "frame.png")
    wanted = ImageInput((12, 16), 3, (0.5,) * 3, (0.25,) * 3, "crop")
    trained_on = decode(str(tmp_path / "frame.png"), (12, 16)).astype(int)
    assert np.abs(to_batch(image, wanted)[0] - trained_on).max() <= 1
