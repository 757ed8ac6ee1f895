"""Which suites there are, in the order of the command's help and of the report's page."""

from __future__ import annotations

import importlib

from statex_dist.errors import ConfigError
from statex_dist.evaluation.suites.base import Suite

_SUITES: dict[str, str | Suite] = {
    "recall": "recall:RecallSuite",
    "mqar": "mqar:MqarSuite",
    "icl": "icl:IclSuite",
    "perplexity": "perplexity:PerplexitySuite",
    "collapse": "collapse:CollapseSuite",
    "capacity": "capacity:CapacitySuite",
    "laws": "laws:LawsSuite",
    "lm-eval": "lm_eval:LmEvalSuite",
}
"""By name: a suite, or where its class is. A module is imported when its suite is asked for."""


def register(suite: Suite) -> None:
    """Add a suite: ``statex eval``, the report and model cards then have it.

    Raises:
        ConfigError: Another suite has its name.
    """
    if suite.name in _SUITES:
        raise ConfigError(f"suite {suite.name!r} is registered already")
    _SUITES[suite.name] = suite


def suite_names() -> tuple[str, ...]:
    """Return the names of all suites."""
    return tuple(_SUITES)


def find_suite(name: str) -> Suite:
    """Return the suite of a name that :func:`suite_names` gives."""
    found = _SUITES[name]
    if isinstance(found, str):
        module, _, kind = found.partition(":")
        found = _SUITES[name] = getattr(importlib.import_module(f"statex_dist.evaluation.suites.{module}"), kind)()
    return found
