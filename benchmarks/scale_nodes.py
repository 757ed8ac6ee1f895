"""How much of a cluster a run uses after it has lost a node: the supervisor's own classes, without processes.

    python -m benchmarks.scale_nodes

A row is ``(name, nodes, value, unit)``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.growth import Row
from launch.supervisor.hosts import Host
from launch.supervisor.loop import Policy, Supervisor
from statex_dist.batch import most_packs
from statex_dist.data.config import DataConfig
from statex_dist.distributed.context_group import ParallelConfig
from statex_dist.models.model_section import ModelSource
from statex_dist.run_config import RunConfig
from statex_dist.train.config import TrainConfig

GPUS_PER_NODE = 8
PACKS_PER_NODE = 32


def supervisor(hosts: Sequence[Host], *, packs: int, context: int, spares: int = 0) -> Supervisor:
    """Return the supervisor of a run that nothing is started of."""
    config = RunConfig(
        run_dir="run",
        model=ModelSource(path="model"),
        data=DataConfig(path="shards", packs_per_step=packs),
        train=TrainConfig(num_steps=1),
        parallel=ParallelConfig(context=context),
    )
    return Supervisor(config, [], ranks=1, hosts=hosts, policy=Policy(spares=spares))


def groups_on_several_hosts(used: Sequence[Host], context: int) -> int:
    """Return how many context groups, which are neighbouring ranks, have ranks on more than one host."""
    host_of = [number for number, host in enumerate(used) for _ in range(host.slots)]
    groups = (set(host_of[first : first + context]) for first in range(0, len(host_of), context))
    return sum(len(group) > 1 for group in groups)


def divisor_rule(available: int, *, packs: int, context: int) -> int:
    """Return the ranks that were used when the packs of a step had to divide over the context groups."""
    return next(n * context for n in range(available // context, 0, -1) if packs % n == 0)


def lost_node_rows(
    sizes: Sequence[int], *, context: int = 1, gpus: int = GPUS_PER_NODE, packs_per_node: int = PACKS_PER_NODE
) -> list[Row]:
    """Return what is used of clusters that have lost one node.

    Args:
        sizes: Nodes of each cluster before the loss.
        context: Ranks of a context group.
        gpus: GPUs of a node.
        packs_per_node: Packs of a step for each node of the whole cluster.
    """
    rows: list[Row] = []
    for nodes in sizes:
        packs = packs_per_node * nodes
        hosts = [Host(f"node{number}", gpus) for number in range(nodes)]
        healthy = hosts[: nodes // 2] + hosts[nodes // 2 + 1 :]
        used = supervisor(hosts, packs=packs, context=context).use(healthy)
        ranks, available = sum(host.slots for host in used), gpus * len(healthy)
        passes = most_packs(packs, ranks // context)
        before = divisor_rule(available, packs=packs, context=context)
        rows += [
            ("healthy GPUs used", nodes, 100 * ranks / available, "%"),
            ("healthy GPUs used with the divisor rule", nodes, 100 * before / available, "%"),
            ("context groups on several hosts", nodes, groups_on_several_hosts(used, context), ""),
            ("packs per rank, at most", nodes, passes, ""),
            ("packs per rank with the divisor rule", nodes, packs * context / before, ""),
            ("share of the passes with a real pack", nodes, 100 * packs * context / (passes * ranks), "%"),
        ]
    return rows


def main() -> int:
    """Print the rows for clusters of 8 to 512 nodes, with context groups of 1 and 8."""
    for context in (1, 8):
        sys.stdout.write(f"parallel.context {context}, {GPUS_PER_NODE} GPUs and {PACKS_PER_NODE} packs a node\n")
        for name, nodes, value, unit in lost_node_rows([8, 32, 128, 512], context=context):
            sys.stdout.write(f"{nodes:5d} nodes, one lost: {name}: {value:.1f} {unit}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
