"""How many files this process may hold open. A memory map keeps a descriptor for as long as it lives."""

from __future__ import annotations

import resource

MOST_DESCRIPTORS = 1 << 16


def allow_descriptors(wanted: int) -> int:
    """Return how many descriptors this process may hold, at most :data:`MOST_DESCRIPTORS`.

    Where that is fewer than ``wanted``, the soft limit is raised as far as the hard one allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if wanted > _or_most(soft) and _or_most(soft) < _or_most(hard):
        soft = _or_most(hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return _or_most(soft)


def _or_most(limit: int) -> int:
    return MOST_DESCRIPTORS if limit == resource.RLIM_INFINITY else min(limit, MOST_DESCRIPTORS)
