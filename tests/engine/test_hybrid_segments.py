"""Segments of packs through models with attention: they are carried, or the run is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from statex_dist.engine.segment_states import CarriedStates
from statex_dist.errors import ConfigError
from statex_dist.models.hf import from_pretrained
from statex_dist.run_parts import build_model
from tests.distributed.test_context_group import pack
from tests.engine.test_zero3_steps import configure
from tests.models.hybrid.hosts import save_host
from tests.raising import raises

CPU = torch.device("cpu")


@pytest.mark.parametrize("model_type", ["nemotron_h", "falcon_h1", "zamba2", "qwen3_next", "kimi_linear"])
def test_segments_have_the_loss_of_the_whole_pack(tmp_path: Path, model_type: str):
    save_host(model_type, tmp_path, vocab_size=258)
    model, batch = from_pretrained(tmp_path).train(), pack([5, 40, 1, 50])
    with torch.no_grad():
        whole = CarriedStates().forward_loss(model, batch, 0, CPU)
        losses, carried = [], CarriedStates()
        for piece in batch.segments(20):
            losses.append(carried.forward_loss(model, piece, 0, CPU))
            state, carried = carried.state_dict(), CarriedStates()  # as after a resume
            carried.load_state_dict(state)
    torch.testing.assert_close(sum(losses), whole, rtol=1e-5, atol=0)


def test_state_passing_is_refused(tmp_path: Path):
    save_host("nemotron_h", tmp_path / "model", vocab_size=258)
    config = configure(tmp_path, {}, "--model.path", str(tmp_path / "model"), "--train.state_passing", "0.5")
    with raises(ConfigError, "train.state_passing", "nemotron_h"):
        build_model(config)
