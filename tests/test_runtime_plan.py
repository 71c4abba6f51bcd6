from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engines.tensorrt.plan import PlanSidecar, read_sidecar, sidecar_path, this_platform
from runtime.errors import ModelError
from tests.test_runtime_manifest import EXAMPLE as MANIFEST

PLAN = b"ftrt and what follows"
REBUILD = "python -m export.engine model.onnx -o engine.plan"
EXAMPLE = PlanSidecar(
    manifest=MANIFEST,
    onnx_sha256="ab" * 32,
    plan_sha256=hashlib.sha256(PLAN).hexdigest(),
    builder="tensorrt",
    builder_version="10.16.1.11",
    compute_capability="8.7",
    device="Orin",
    driver="12.6",
    platform="linux-aarch64",
    dla_core=0,
    batch=(1, 8, 32),
    int8_layers=("conv1", "conv2"),
    rebuild=REBUILD,
)
HERE = {"builder": "tensorrt", "version": "10.16.1.11", "compute_capability": "8.7", "platform": "linux-aarch64"}


def test_a_sidecar_survives_its_json() -> None:
    assert PlanSidecar.from_json(EXAMPLE.to_json(), "e.plan.json") == EXAMPLE
    without = dataclasses.replace(EXAMPLE, dla_core=None, compute_capability="", builder="tensorrt_rtx")
    assert PlanSidecar.from_json(without.to_json(), "e.plan.json") == without


def test_a_plan_is_accepted_where_it_was_built() -> None:
    EXAMPLE.verify(PLAN, "engine.plan", **HERE)
    local = dataclasses.replace(EXAMPLE, platform=this_platform())
    local.verify(PLAN, "engine.plan", **{**HERE, "platform": None})


@pytest.mark.parametrize(
    ("changes", "here", "told"),
    [
        (
            {},
            {"builder": "tensorrt_rtx"},
            "built with TensorRT 10.16.1.11, but this is TensorRT-RTX ahead-of-time",
        ),
        ({}, {"version": "10.16.1.12"}, "but this is TensorRT 10.16.1.12"),
        ({"version_compatible": True}, {"version": "10.9.0.1"}, "but this is TensorRT 10.9.0.1"),
        ({}, {"version": "11.4.0.106"}, "but this is TensorRT 11.4.0.106"),
        ({"version_compatible": True}, {"version": "12.0.0.1"}, "but this is TensorRT 12.0.0.1"),
        ({"version_compatible": True}, {"version": "9.3.0.1"}, "but this is TensorRT 9.3.0.1"),
        ({}, {"platform": "linux-x86_64"}, "built on linux-aarch64, but this is linux-x86_64"),
        ({}, {"compute_capability": "9.0"}, "built on compute capability 8.7, but this is 9.0"),
        (
            {"hardware": "same-compute-capability"},
            {"compute_capability": "8.6"},
            "8.7 for same-compute-capability",
        ),
        ({"hardware": "ampere-plus"}, {"compute_capability": "7.5"}, "but this is 7.5"),
    ],
)
def test_a_plan_for_something_else_is_refused_with_the_command_that_rebuilds_it(
    changes: dict[str, Any], here: dict[str, str], told: str
) -> None:
    with pytest.raises(ModelError) as error:
        dataclasses.replace(EXAMPLE, **changes).verify(PLAN, "engine.plan", **{**HERE, **here})
    assert told in str(error.value)
    assert str(error.value).endswith(REBUILD)


@pytest.mark.parametrize(
    ("changes", "here"),
    [
        ({"version_compatible": True}, {"version": "10.17.0"}),
        ({"version_compatible": True}, {"version": "11.4.0.106"}),
        ({"hardware": "ampere-plus"}, {"compute_capability": "12.0"}),
        ({"compute_capability": ""}, {"compute_capability": "12.0"}),
    ],
)
def test_a_compatible_plan_is_accepted_elsewhere(changes: dict[str, Any], here: dict[str, str]) -> None:
    dataclasses.replace(EXAMPLE, **changes).verify(PLAN, "engine.plan", **{**HERE, **here})


@given(at=st.integers(0, len(PLAN) - 1), bit=st.integers(0, 7))
def test_a_plan_with_one_bit_changed_is_refused(at: int, bit: int) -> None:
    altered = bytearray(PLAN)
    altered[at] ^= 1 << bit
    with pytest.raises(ModelError, match="but its sidecar is for"):
        EXAMPLE.verify(bytes(altered), "engine.plan", **HERE)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("version", 2, "sidecar version 2, expected 1"),
        ("builder", "trtexec", "expected one of tensorrt, tensorrt_rtx"),
        ("hardware", "any", "expected one of same, "),
        ("batch", [8, 1, 32], "three rising whole numbers"),
        ("batch", [1, 8], "three rising whole numbers"),
        ("batch", [1, "8", 32], "three rising whole numbers"),
        ("dla_core", -1, "null or a whole number from 0"),
        ("plan_sha256", 5, "field plan_sha256 5: expected a text"),
        ("int8_layers", [1], "expected texts"),
        ("version_compatible", "yes", "expected true or false"),
        ("surprise", 1, "not known to this release"),
        ("manifest", {}, "manifest"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(name: str, value: Any, told: str) -> None:
    values = {**json.loads(EXAMPLE.to_json()), name: value}
    with pytest.raises(ModelError) as error:
        PlanSidecar.from_json(json.dumps(values), "e.plan.json")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(PlanSidecar)])
def test_a_missing_field_is_named(name: str) -> None:
    values = json.loads(EXAMPLE.to_json())
    del values[name]
    with pytest.raises(ModelError, match=f"field {name}: missing"):
        PlanSidecar.from_json(json.dumps(values), "e.plan.json")


@given(text=st.text(max_size=20))
def test_what_is_no_json_object_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ModelError, match="readable JSON; build the plan again") as error:
        PlanSidecar.from_json(text, "e.plan.json")
    assert "\n" not in str(error.value)


def test_the_sidecar_lies_beside_its_plan(tmp_path: Path) -> None:
    plan = tmp_path / "engine.plan"
    with pytest.raises(ModelError, match=r"its sidecar engine\.plan\.json is missing"):
        read_sidecar(plan)
    sidecar_path(plan).write_text(EXAMPLE.to_json())
    assert read_sidecar(plan) == EXAMPLE
    sidecar_path(plan).write_bytes(b"\xff\x00")
    with pytest.raises(ModelError, match="readable JSON"):
        read_sidecar(plan)
