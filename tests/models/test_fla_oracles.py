"""Our families beside flash-linear-attention's own model classes, whose kernels run in Triton's interpreter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.models.interpreted_fla import GROUPS, checks_of
from tests.ops.interpreter import assert_script_passes


def has_fla_models() -> bool:
    """Return whether ``fla.models`` is there, without importing fla: it would register its classes here."""
    spec = importlib.util.find_spec("fla")
    folders = spec.submodule_search_locations if spec else None
    return any((Path(folder) / "models").is_dir() for folder in folders or ())


@pytest.mark.skipif(not has_fla_models(), reason="fla.models is not installed: pip install -e '.[oracles]'")
@pytest.mark.skipif(torch.cuda.is_available(), reason="fla takes a GPU for its device where there is one")
@pytest.mark.parametrize(
    "group", [pytest.param(group, marks=[pytest.mark.slow] if group == "delta rules" else []) for group in GROUPS]
)
def test_models_of_fla_are_ours(group):
    assert_script_passes("tests.models.interpreted_fla", checks_of(group), group)
