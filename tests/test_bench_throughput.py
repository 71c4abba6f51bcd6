from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bench.throughput import main
from runtime.errors import FileError
from train.data.images import ImageData


@pytest.mark.slow
def test_the_command_is_measured_beside_one_classifier_and_beside_as_many_at_once(
    digits: ImageData, digits_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, photos = str(digits_models["openvino"]), tmp_path / "photos"
    photos.mkdir()
    with pytest.raises(FileError, match="photos: 0 images in it, expected one for each process at least"):
        main([model, str(photos)])
    for index, picture in enumerate(digits.test_images[:70, 0].numpy()):
        Image.fromarray(picture).save(photos / f"{index}.png")
    main([model, str(photos), "--explain", "--processes", "2", "--rounds", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    names = ["Classifier alone", "Classifier, 2 at once", "deploy.batch, 2 processes"]
    assert found["images"] == 70
    assert found["beside"] == {names[2]: names[1]}
    for kind in ("images_per_second", "images_per_cpu_second", "start_cpu_seconds"):
        assert list(found[kind]) == names
        assert all(len(each) == 2 and min(each) > 0 for each in found[kind].values())
    main([model, str(photos), "--rounds", "1"])
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out[1:6])) <= 80
    assert out[2].split()[-2:] == ["100.0%", "100.0%"]
