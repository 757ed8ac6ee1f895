"""Retention and statistics of a hybrid are those of its recurrent layers."""

import pytest
import torch

from statex_dist.evaluation.health.collapse import recurrent_states
from statex_dist.evaluation.health.retention import RetentionProbe
from statex_dist.inference.prefill import evaluating
from statex_dist.models.hf import from_pretrained
from tests.models.hybrid.hosts import save_host


@pytest.mark.parametrize("host", ["nemotron_h", "falcon_h1", "zamba2", "qwen3_next", "minimax"])
def test_retention_is_the_share_of_a_change_that_is_left(host, tmp_path):
    """The probe is compared with two runs from states of the first recurrent layer that differ by random signs."""
    save_host(host, tmp_path)
    model = from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 97, (1, 11), generator=torch.Generator().manual_seed(5))
    with evaluating(model):
        start = model(ids[:, :4], output_states=True).states
        probe = RetentionProbe(model)
        with probe:
            after = model(ids[:, 4:], states=start, output_states=True).states
        kept = probe.retention()
        assert len(kept) == len(recurrent_states(model, after)) == len(model.config.recurrent_layers)
        place = [kind for _, kind in model.state_places].index("recurrent")
        state = start[place][0]
        signs = torch.randint(0, 2, state.shape[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
        moved = list(start)
        moved[place] = (state + 1e6 * signs, *start[place][1:])
        there = model(ids[:, 4:], states=moved, output_states=True).states[place][0]
    left = (there - after[place][0]).square().sum((-2, -1)).sqrt()
    ratio = left / (1e6 * signs[0].numel() ** 0.5)
    torch.testing.assert_close(torch.as_tensor(kept[0][0]), ratio.double(), rtol=1e-3, atol=1e-6)
