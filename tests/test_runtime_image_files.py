"""What may lie in a folder or in a file: everything, and nothing but our own errors comes of it."""

from __future__ import annotations

import io
import os
import random
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from runtime.errors import FileError, ImageError
from runtime.images import decode_image, folders_in, is_hidden, is_image_file, list_images, load_image, to_array

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "TGA", "PPM", "JPEG2000", "AVIF", "PCX", "ICO", "DIB")


def picture(mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def contents(kind: str) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a maker"
    picture().save(buffer, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}))
    return buffer.getvalue()


def test_contents_are_read_as_files_are(tmp_path: Path) -> None:
    for kind in FORMATS:
        (tmp_path / "photo").write_bytes(contents(kind))
        assert (decode_image(contents(kind), "photo") == load_image(tmp_path / "photo")).all()
    # Pillow would start Ghostscript.
    with pytest.raises(FileError, match=r"^photo: cannot be read as an image \(not an image file\)"):
        decode_image(contents("EPS"), "photo")


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_but_our_own_errors_leaves_a_damaged_file(kind: str, tmp_path: Path) -> None:
    chance, whole, path = random.Random(kind), contents(kind), tmp_path / "photo"
    refused = []
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            # Mostly near the start, where headers and tags are.
            position = min(int(chance.expovariate(1 / 60)), len(damaged) - 1)
            damaged[position] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        path.write_bytes(
            damaged[: chance.choice((len(damaged), len(damaged), chance.randrange(len(damaged) + 1)))]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pixels = load_image(path)
            except FileError as error:
                refused.append(str(error))
                continue
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 2 or pixels.shape[2] == 3
    assert refused
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in refused)


@pytest.mark.parametrize("tag", [0x010F, 0x0112, 0x829A, 0x9286])
def test_an_exif_tag_of_the_wrong_type_stops_no_training(tag: int, tmp_path: Path) -> None:
    # Type 2 is text, type 5 a fraction: whatever the tag should be, one of them is wrong.
    for kind in (2, 5, 12, 99):
        orientation = b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00"
        wrong = tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + b"\x01\x00\x00\x00\xff\x00\x00\x00"
        exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + (wrong if tag == 0x0112 else orientation) + wrong + b"\0\0\0\0"
        path = tmp_path / "photo.jpg"
        picture().save(path, exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load_image(path)
        if tag != 0x0112:  # the orientation is whole: the photograph stands upright
            assert found.shape == (9, 7, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_photographs_are_turned_as_pillow_turns_them(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / "photo", kind, exif=exif)
    with Image.open(tmp_path / "photo") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
        assert np.array_equal(to_array(image), expected)
    assert np.array_equal(load_image(tmp_path / "photo"), expected)


@pytest.mark.parametrize("mode", ["P", "PA", "LA", "RGBA", "CMYK", "1", "YCbCr", "HSV", "L", "RGB", "RGBX"])
def test_a_pil_image_of_any_mode_is_what_it_shows(mode: str) -> None:
    image = picture(mode) if mode != "PA" else picture("P").convert("PA")
    expected = np.asarray(image if mode == "L" else image.convert("RGB"))
    assert np.array_equal(to_array(image), expected)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_pil_image_of_more_than_8_bits_is_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=f"^PIL image: has {mode} pixels, expected 8 bits a channel; convert it"):
        to_array(Image.new(mode, (4, 4)))


def test_a_closed_pil_image_is_our_error() -> None:
    closed = picture()
    closed.close()
    with pytest.raises(ImageError, match=r"^PIL image: cannot be read"):
        to_array(closed)


@pytest.mark.parametrize("kind", FORMATS[:6] + FORMATS[8:10])
def test_an_image_without_suffix_is_known_by_how_it_begins(kind: str, tmp_path: Path) -> None:
    for name in ("photo", "photo.dat", "17"):
        (tmp_path / name).write_bytes(contents(kind))
        assert is_image_file(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["a.jfif", "a.jpe", "a.JPE", "a.avif", "a.heic", "a.HEIF", "a.jp2", "a.tga", "a.jxl", "a.pbm"]
)
def test_an_image_is_known_by_its_suffix_whether_or_not_it_can_be_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"?")
    assert is_image_file(tmp_path / name)


def test_what_is_no_image_is_known_too(tmp_path: Path) -> None:
    for name, text in (("labels.csv", "BMW,3"), ("README", "GIF of a cat"), ("empty", ""), ("b.txt", "P5 x")):
        (tmp_path / name).write_text(text)
        assert not is_image_file(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    assert not is_image_file(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    assert not is_image_file(tmp_path / "pipe")
    assert not is_image_file(tmp_path)


def test_links_to_nothing_and_to_themselves_are_missed(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "absent")
    (tmp_path / "gone").symlink_to(tmp_path / "absent")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "notes.txt").symlink_to(tmp_path / "absent")
    picture().save(tmp_path / "real.png")
    found = list_images([str(tmp_path)])
    assert [path.name for path in found] == ["gone", "gone.png", "loop.jpg", "real.png"]
    for path in found[:3]:
        with pytest.raises(FileError, match=path.name):
            load_image(path)


def test_hidden_files_are_no_images_and_folders_are_named(tmp_path: Path) -> None:
    for name in (".thumb.png", "._photo.jpg", "photo.png", "b"):
        picture().save(tmp_path / name, "PNG")
    for name in ("cats", ".cache", "__MACOSX", "@eaDir"):
        (tmp_path / name).mkdir()
    assert [p.name for p in list_images([str(tmp_path)])] == ["b", "photo.png"]
    assert folders_in([str(tmp_path), str(tmp_path / "photo.png")]) == [tmp_path / "cats"]
    assert [is_hidden(name) for name in ("_background", "__MACOSX", ".git", "a")] == [False, True, True, False]


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (10_000, 5_001)).save(path)
    assert path.stat().st_size < 10_000
    message = r"has 5001x10000 pixels, expected at most 50,000,000 together; make it smaller, or allow more with"
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match=f"^{path}: {message} max_pixels$"):
            load_image(path)
        with Image.open(path) as image, pytest.raises(ImageError, match=f"^PIL image: {message}"):
            to_array(image)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**20
    assert load_image(path, max_pixels=10_000 * 5_001).shape == (5_001, 10_000, 3)


@pytest.mark.parametrize("side", [9_600, 13_500])  # Pillow warns of the first and refuses the second
def test_what_pillow_finds_too_large_is_our_error(side: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(FileError, match=f"^{tmp_path}/bomb.png: has more pixels than Pillow takes"):
        load_image(tmp_path / "bomb.png")


def test_a_large_photograph_is_held_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(size=(3000, 2000)).save(tmp_path / "photo.jpg", exif=exif)
    load_image(tmp_path / "photo.jpg")
    tracemalloc.start()  # Pillow's own memory, 24 MB, is not counted
    try:
        found = load_image(tmp_path / "photo.jpg")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.shape == (3000, 2000, 3)
    assert found.flags.c_contiguous
    assert peak_bytes < 1.7 * found.nbytes


@pytest.mark.parametrize("kind", ["EPS", "PDF", "SGI", "XBM", "MSP", "DDS", "SPIDER"])
def test_kinds_that_cameras_and_scanners_do_not_write_are_not_tried(kind: str, tmp_path: Path) -> None:
    # Under a name of its own: Pillow's SPIDER writer gives all later files of a suffix its own kind.
    made = tmp_path / f"photo.{kind.lower()}"
    picture("F" if kind == "SPIDER" else "1" if kind in ("XBM", "MSP") else "RGB").save(made, kind)
    made.rename(tmp_path / "photo.png")
    with pytest.raises(FileError, match=r"cannot be read as an image \(not an image file\)"):
        load_image(tmp_path / "photo.png")
