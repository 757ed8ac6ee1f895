"""The core around modules that are not ours: a mixer of transformers' Bamba, with its parameters and its norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import BambaConfig
from transformers.models.bamba import modeling_bamba

from statex_dist.models.core.mixer import StateSpace, Tokens
from statex_dist.models.core.sequences import Sequences
from statex_dist.state.geometry import StateGeometry
from tests.ops.scan_cases import borders


class HostedMamba2(StateSpace):
    """Adopts the children and parameters of the host's mixer under their names."""

    def __init__(self, host):
        super().__init__(
            StateGeometry(
                num_heads=host.num_heads,
                key_dim=host.ssm_state_size,
                value_dim=host.head_dim,
                num_key_groups=host.n_groups,
                conv_channels=host.conv_dim,
                conv_kernel=host.conv_kernel_size,
            )
        )
        for name, child in host.named_children():
            self.add_module(name, child)
        for name, parameter in host.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.add_expansion()
        self.sizes = [host.intermediate_size, host.conv_dim, host.num_heads]
        grouped = host.n_groups * host.ssm_state_size
        self.parts, self.time_step_limit = [host.intermediate_size, grouped, grouped], host.time_step_limit

    def project(self, x):
        z, xbc, dt = self.in_proj(x).split(self.sizes, dim=-1)
        return (xbc,), (z, dt)

    def conv_weights(self):
        return self.conv1d.weight, self.conv1d.bias

    def scan_inputs(self, tokens: Tokens):
        x, B, C = tokens.convolved[0].split(self.parts, dim=-1)
        dt = F.softplus(tokens.others[1] + self.dt_bias).clamp(*self.time_step_limit)
        B, C = (y.unflatten(-1, (self.heads.keys, -1)) for y in (B, C))
        return x.unflatten(-1, (self.heads.values, -1)), dt, -self.A_log.exp(), B, C

    def output(self, o, tokens: Tokens):
        return self.out_proj(self.norm(o.flatten(-2), tokens.others[0]))


@pytest.fixture(scope="module")
def host():
    torch.manual_seed(0)
    config = BambaConfig(
        hidden_size=16, num_hidden_layers=1, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=6, mamba_n_groups=2
    )
    mixer = modeling_bamba.BambaMixer(config, layer_idx=0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def test_the_core_computes_what_the_host_computes(host):
    mixer, x = HostedMamba2(host), torch.randn(2, 11, 16)
    assert mixer.state_dict().keys() == host.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(mixer(x, Sequences())[0], host(x), rtol=1e-4, atol=1e-5)


def test_packs_and_steps_come_with_the_core(host):
    mixer, x, lengths = HostedMamba2(host), torch.randn(1, 11, 16), [6, 1, 4]
    with torch.no_grad():
        packed, _ = mixer(x, Sequences(cu_seqlens=borders(lengths), chunk_size=4))
        alone = [mixer(part, Sequences(chunk_size=4))[0] for part in x.split(lengths, dim=1)]
        torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)
        state = None
        for t in range(lengths[0]):
            y, state = mixer(x[:, t : t + 1], Sequences(output_states=True), state)
            torch.testing.assert_close(y[:, 0], packed[:, t], rtol=1e-4, atol=1e-5)
