"""Which files of a folder are images."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import FileError

SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".bmp", ".dib", ".webp", ".gif", ".tif",
    ".tiff", ".tga", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
# Images whose reading depends on how Pillow was built, or needs a plugin: never passed over without a word.
RARE_SUFFIXES = (".avif", ".avifs", ".heic", ".heif", ".hif", ".jxl", ".jpf", ".jpx", ".j2c", ".jpc", ".mpo")
# How files of these kinds begin, whatever they are called.
_BEGINNINGS = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51", b"\xff\x0a", b"\0\0\0\x0cJXL ",
)  # fmt: skip
_HEIF_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")
# Folders that systems make beside images, for their own copies of them.
_SYSTEM_FOLDERS = ("__MACOSX", "__pycache__", "@eaDir")


def is_image_file(path: Path) -> bool:
    """Return whether a file is meant as an image: by its suffix or, failing that, by how it begins.

    A link to nothing is meant as one too, if its name does not say otherwise: what it stood for must be missed.
    """
    if path.exists() and not path.is_file():  # a pipe would wait for its writer
        return False
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or suffix in RARE_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        return not suffix
    except OSError:
        return False
    riff = start.startswith(b"RIFF") and start[8:12] == b"WEBP"
    bitmap = start.startswith(b"BM") and start[6:10] == b"\0\0\0\0"
    return (
        start.startswith(_BEGINNINGS) or riff or bitmap or (start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS)
    )


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is a system's or an editor's, not a person's."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def list_images(paths: list[str]) -> list[Path]:
    """Return the files among `paths`, with every folder replaced by the images in it, sorted by name.

    Folders in folders are not looked into; `folders_in` names them.

    Raises:
        FileError: a folder holds no image or cannot be read.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        inside = [p for p in _entries(path) if not p.is_dir() and is_image_file(p)]
        if not inside:
            raise FileError(f"{path}: a folder without images, expected files such as *.png or *.jpg")
        found += inside
    return found


def folders_in(paths: list[str]) -> list[Path]:
    """Return the folders, not hidden, in the folders among `paths`, which `list_images` does not look into."""
    return [inside for path in map(Path, paths) if path.is_dir() for inside in _entries(path) if inside.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name))
    except OSError as error:
        raise FileError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None
