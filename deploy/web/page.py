"""A static folder that runs an exported model in a browser: page, scripts, model, and ONNX Runtime Web."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.whole_folder import folder_at_once
from runtime import Classifier
from runtime.errors import FileError, OptionError
from runtime.files import read_bytes, write_atomically
from runtime.images import load_image, to_batch
from runtime.manifest import read_manifest
from runtime.onnx_bytes import without_gradient
from runtime.session import is_plan

HERE = Path(__file__).parent
STATIC = HERE / "static"
NODE_MODULES = HERE / "node_modules"
PACKAGE = "onnxruntime-web"
# Provider -> ONNX Runtime Web's module, the loader of its WebAssembly, and that.
PROVIDERS = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": (
        "ort.webgpu.min.mjs",
        "ort-wasm-simd-threaded.asyncify.mjs",
        "ort-wasm-simd-threaded.asyncify.wasm",
    ),
}
MODEL, CLASS_ONLY, DESCRIPTION = "model.onnx", "class.onnx", "model.json"
MOST_EXAMPLES = 24
_CHECKED = 2  # stored images whose logits the page compares
_CACHE = "clearpact-page-"  # what the names of the browser's copies begin with


@dataclass(frozen=True)
class Written:
    """A page that was written: its folder, the model's target, bytes of all files, and of those loaded at once."""

    folder: Path
    target: str
    all_bytes: int
    first_bytes: int


def pinned_version() -> str:
    """Return the version of ONNX Runtime Web that package.json asks for."""
    version: str = json.loads(read_bytes(HERE / "package.json"))["dependencies"][PACKAGE]
    return version


def runtime_folder(given: Path | None = None) -> Path:
    """Return the folder of ONNX Runtime Web's files.

    Args:
        given: a node_modules folder, or the package's; None takes that of this folder.

    Raises:
        FileError: it is not there, or of another version than the pinned one.
    """
    where = given or NODE_MODULES
    package = where if (where / "dist").is_dir() else where / PACKAGE
    remedy = f"run `make web-runtime`, or `npm install {PACKAGE}@{pinned_version()}` and --runtime node_modules"
    if not (package / "dist").is_dir():
        raise FileError(f"{where}: {PACKAGE} is not there; {remedy}")
    found = json.loads(read_bytes(package / "package.json"))["version"]
    if found != pinned_version():
        raise FileError(f"{package}: version {found}, expected {pinned_version()}; {remedy}")
    return package / "dist"


def write_page(
    model: Path, folder: Path, *, runtime: Path | None = None, examples: Sequence[Path] = (), webgpu: bool = True
) -> Written:
    """Write the folder, as a whole or not at all; one that this wrote before is replaced.

    Args:
        model: ONNX file of `python -m export.onnx`, best with `--target ort`.
        folder: to write.
        runtime: see `runtime_folder`.
        examples: image files that the page offers; it checks itself on the first two, else on two patterns.
        webgpu: copy what WebGPU needs as well (27 MB), which a browser loads only where it has one.

    Raises:
        FileError: a file cannot be read, or the folder cannot be written or holds something else.
        ModelError: ONNX Runtime cannot run the model.
        OptionError: the model is a plan, or there are too many examples.
    """
    if is_plan(model):
        raise OptionError(f"{model}: a browser runs ONNX files; name the file that the plan was built from")
    if len(examples) > MOST_EXAMPLES:
        raise OptionError(f"{len(examples)} examples, expected at most {MOST_EXAMPLES}; name fewer")
    if folder.exists() and not (folder.is_dir() and _is_ours(folder)):
        raise FileError(f"{folder}: is there already and no page of this command; name another folder")
    dist = runtime_folder(runtime)
    data = read_bytes(model)
    if read_manifest(data, str(model)).float_layout:
        raise OptionError(f"{model}: takes normalized floats; export it without --keep-input")
    files: dict[str, bytes] = {path.name: path.read_bytes() for path in STATIC.iterdir() if path.is_file()}
    for provider in PROVIDERS if webgpu else ("wasm",):
        files |= {f"runtime/{name}": read_bytes(dist / name) for name in PROVIDERS[provider]}
    with Classifier(data, engine="ort", threads=1) as classifier:
        manifest, outputs = classifier.manifest, classifier.session.outputs
        pictures = [load_image(path) for path in examples]
        batches = [to_batch(picture, manifest.input) for picture in pictures[:_CHECKED]]
        batches = batches or list(_patterns((*manifest.input.size, manifest.input.channels)))
        logits = [classifier.logits(batch)[0] for batch in batches]
        labels = [classifier.predict([picture])[0].label for picture in pictures]
    explains = outputs != ("logits",)
    files[MODEL] = data
    if explains:
        files[CLASS_ONLY] = without_gradient(data)
    files |= {f"examples/{index}.png": _png(picture) for index, picture in enumerate(pictures)}
    described = {
        "manifest": json.loads(manifest.to_json()),
        "file": MODEL,
        "classOnly": CLASS_ONLY if explains else MODEL,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "outputs": outputs,
        "check": [
            {"image": base64.b64encode(batch.tobytes()).decode(), "logits": [float(value) for value in row]}
            for batch, row in zip(batches, logits, strict=True)
        ],
        "examples": [
            {"file": f"examples/{index}.png", "label": f"{index + 1}, {label}"}
            for index, label in enumerate(labels)
        ],
        "runtime": {"version": pinned_version()}
        | {
            provider: dict(zip(("module", "loader", "wasm"), (f"./runtime/{name}" for name in names), strict=True))
            for provider, names in PROVIDERS.items()
            if webgpu or provider == "wasm"
        },
    }
    files[DESCRIPTION] = json.dumps(described, ensure_ascii=False).encode()
    files["sw.js"] = _service_worker(files)
    with folder_at_once(folder, replace=True) as temporary:
        for name, content in files.items():
            write_atomically(temporary / name, content)
    later = sum(
        len(content) for name, content in files.items() if name.startswith("runtime/") and "asyncify" in name
    )
    every = sum(map(len, files.values()))
    return Written(folder, manifest.target, every, every - later)


def _service_worker(files: dict[str, bytes]) -> bytes:
    """Return the script that keeps the files in the browser, under a name that changes with any of them."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(files[name]).digest() for name in sorted(files))).hexdigest()
    kept = sorted({"./", *files} - {"sw.js"})  # the folder itself shows index.html
    names = {"PREFIX": _CACHE, "VERSION": f"{_CACHE}{digest[:16]}", "FILES": kept}
    constants = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in names.items())
    return constants.encode() + files["sw.js"]


def _is_ours(folder: Path) -> bool:
    if not any(folder.iterdir()):
        return True
    try:
        return "classOnly" in json.loads(read_bytes(folder / DESCRIPTION))
    except (FileError, ValueError):
        return False


def _patterns(shape: tuple[int, ...]) -> np.ndarray:
    """Return two images uint8 [2, 1, H, W, C] of smooth waves: the same in every run, with all levels."""
    height, width, channels = shape
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(channels), indexing="ij")
    waves = [np.sin(y / height * (5 + c)) * np.cos(x / width * (7 - c)), np.sin((x + 2 * y) / width * 4 + c)]
    return np.stack([np.rint(127.5 + 127.5 * wave).astype(np.uint8)[None] for wave in waves])


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
