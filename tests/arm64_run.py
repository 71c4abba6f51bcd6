"""Classes, maps and every output of model files, by an ARM64 Python or any other: `arm64_run.py FOLDER RESULTS`.

FOLDER holds NAME.onnx and NAME.npy, images uint8 [N, H, W, C]; RESULTS gets NAME.npz.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from runtime import Classifier


def main(folder: Path, results: Path) -> None:
    """Run all models of the folder on ONNX Runtime, image by image."""
    for model in sorted(folder.glob("*.onnx")):
        images = np.load(model.with_suffix(".npy"))
        with Classifier(model, engine="ort", threads=1) as classifier:
            session = classifier.session
            target = np.full(1, -1, np.int64)
            runs = [session.run({"image": image[None], "target": target}, session.outputs) for image in images]
            found = {name: np.concatenate([run[name] for run in runs]) for name in session.outputs}
            found["classes"] = np.array([prediction.index for prediction in classifier.predict(images)])
            found["map"] = classifier.explain(images).map
        np.savez(results / model.with_suffix(".npz").name, **found)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
