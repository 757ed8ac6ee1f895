"""What transformers', flash-linear-attention's and mamba_ssm's own classes make of expanded models.

Every family and operation, with and without layers of another kind, as ``expand`` writes it and as ``reshard --to hf``
exports it: each class refuses it, or computes the expanded function. A start changes values alone, so one is enough
where the names in ``config.json`` or the tensors tell a class to refuse.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from checkpoints_tools.export import modeling_code
from checkpoints_tools.reshard.reshard import reshard
from statex_dist.models.config_keys import ARCHITECTURE, OUR_CODE_PREFIX
from statex_dist.models.hf import from_pretrained
from statex_dist.models.registry import read_config
from tests.checkpoints_tools.builders import run_expand, write_model
from tests.checkpoints_tools.foreign_classes import COMMON, TRANSFORMERS, opened, save, variants
from tests.models.test_fla_oracles import has_fla_models
from tests.models.tiny import tokens

STATE_SPACES = {
    **{"d_model": 16, "n_layer": 3, "vocab_size": 40, "tie_embeddings": True, "pad_vocab_size_multiple": 8},
    "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8},
}
REASONS = {False: re.compile(f"trust_remote_code|`{OUR_CODE_PREFIX}"), True: re.compile("expanded|[Uu]nsupported")}
"""Words of a refusal by an auto class, and by a class that is named."""

NEEDS_FLA = pytest.mark.skipif(not has_fla_models(), reason="fla.models is not installed: pip install -e '.[oracles]'")


def run_with_fla(action: str, root: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.checkpoints_tools.foreign_classes", action, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Bases, and below their names with an operation and a start the expansions (``.x``) and exports (``.hf``)."""
    directory = tmp_path_factory.mktemp("foreign")
    models = {name: (kind, {**COMMON, **values}) for name, (kind, values) in TRANSFORMERS.items()}
    save(transformers, models, directory)
    write_model(directory / "state_spaces", STATE_SPACES)
    if has_fla_models():
        run_with_fla("save", directory)
    # No class reads the code of an export here, and putting it together takes seconds for each family.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_code, "_code", lambda model_type, features: f'model_type = "{model_type}"\n')
        write_expansions(directory)
    return directory


def write_expansions(directory: Path) -> None:
    for base in sorted(directory.iterdir()):
        config = read_config(base)
        for op in config.OPS:
            # Some layers of a Mamba2 with more state rows need a plan, all of them alike do not.
            plain = is_plain_growth(base.name, op)
            for init, layers in (
                (("lossless", "all"), ("reinit", "all"), ("reinit", "0")) if plain else ((None, "all"),)
            ):
                start = init or ("inherit" if op == "merge_heads" else "lossless")
                name = f"{base.name}.{op}.{start}.{layers}"
                run_expand(base, directory / f"{name}.x", op=op, init=start, layers=layers, factor=2)
                reshard(directory / f"{name}.x", directory / f"{name}.hf")


def expansions(root: Path, *families: str) -> list[Path]:
    found = [path for path in sorted(root.iterdir()) if "." in path.name and path.name.split(".")[0] in families]
    assert found
    return found


def is_plain_growth(base: str, op: str) -> bool:
    return base in ("mamba2", "bamba", "state_spaces") and op == "grow_state"


def is_plain(path: Path) -> bool:
    return path.name.startswith(("mamba2.grow_state.", "bamba.grow_state.")) and ".all." in path.name


def test_names_are_of_no_other_library(root):
    for path in expansions(root, *TRANSFORMERS, *variants(), "state_spaces") if has_fla_models() else ():
        values = json.loads((path / "config.json").read_text())
        if "state_spaces" in path.name:
            assert "model_type" not in values
        elif not is_plain(path):
            assert values["model_type"].startswith(OUR_CODE_PREFIX)
            assert values["architectures"] == [ARCHITECTURE]
        else:
            assert values["model_type"] + "." == path.name[: path.name.index(".") + 1]
            assert values["architectures"] != [ARCHITECTURE]
    assert not [name for name in CONFIG_MAPPING_NAMES if name.startswith(OUR_CODE_PREFIX)]
    assert ARCHITECTURE not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def test_transformers_refuses_or_computes_the_expanded_function(root):
    ids = tokens(2, 30)
    for name, (kind, _) in TRANSFORMERS.items():
        explicit = getattr(transformers, f"{kind}ForCausalLM")
        base = AutoModelForCausalLM.from_pretrained(root / name).eval()
        assert type(base) is explicit, "the class would open it"
        for path in expansions(root, name):
            for loader in (AutoModelForCausalLM, AutoModel, explicit):
                model, words = opened(loader, path)
                if not is_plain(path):
                    assert words.startswith("refused"), f"{path.name}: {words}"
                    assert REASONS[loader is explicit].search(words), words
                    continue
                if loader is AutoModel:  # which has no head
                    continue
                assert words.endswith("all tensors taken"), f"{path.name}: {words}"
                with torch.no_grad():
                    found = model.eval()(ids).logits
                    assert (found - from_pretrained(path)(ids).logits).abs().max() < 1e-5 * found.abs().max()
                    same = (found - base(ids).logits).abs().max() < 1e-5 * found.abs().max()
                assert same == (".lossless." in path.name), path.name


@NEEDS_FLA
def test_flash_linear_attention_refuses_or_takes_the_expanded_state(root):
    found = {row["name"]: row for row in run_with_fla("open", root)}
    assert set(found) == {path.name for path in root.iterdir() if path.name.split(".")[0] in (*variants(), "mamba2")}
    for name, row in found.items():
        plain = is_plain(root / name)
        for how in ("auto", "class"):
            if "." in name and not plain:
                assert row[how].startswith("refused"), f"{name}: {row[how]}"
                assert REASONS[how == "class"].search(row[how]), row[how]
            elif not (name == "mamba2" or plain):
                assert row[how].endswith("all tensors taken"), f"the base opens: {name}: {row[how]}"
            else:
                assert row[f"{how}_state"] == (12 if plain else 6), name


def test_transformers_finds_no_class_for_models_of_others(root):
    for path in expansions(root, "state_spaces", *(variants() if has_fla_models() else ())):
        _, words = opened(AutoModelForCausalLM, path)
        assert words.startswith("refused"), f"{path.name}: {words}"


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba_ssm is not installed")
def test_the_configuration_of_mamba_ssm_refuses_a_plan(root):
    # The class alone: the package needs its compiled kernels to be imported.
    place = Path(importlib.util.find_spec("mamba_ssm").submodule_search_locations[0]) / "models/config_mamba.py"
    names: dict[str, Any] = {}
    exec(compile(place.read_text(), str(place), "exec"), names)
    config = names["MambaConfig"]
    config(**json.loads((root / "state_spaces/config.json").read_text()))
    for path in expansions(root, "state_spaces"):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            config(**json.loads((path / "config.json").read_text()))
