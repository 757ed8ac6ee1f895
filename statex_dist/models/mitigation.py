"""The mitigations of state collapse as a user names them: the registry and the reader of their text form.

The text form is ``NAME[:key=value,...]``, for example ``forget-more``, ``state-norm:limit=8,every=64`` or
``sliding-window:tokens=2048``. What each computes is in :mod:`statex_dist.ops.mitigations`; docs/mitigations.md says
when to take which.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from statex_dist.errors import ConfigError
from statex_dist.models.core.mitigation import MITIGATIONS, Mitigation
from statex_dist.models.mitigations.forget_more import ForgetMore
from statex_dist.models.mitigations.sliding_window import SlidingWindow
from statex_dist.models.mitigations.state_norm import StateNorm

__all__ = ["MITIGATIONS", "ForgetMore", "Mitigation", "SlidingWindow", "StateNorm", "parse_mitigation", "register"]


def register(kind: type[Mitigation]) -> None:
    """Add a mitigation.

    Raises:
        ConfigError: Another mitigation has its name.
    """
    if kind.NAME in MITIGATIONS:
        raise ConfigError(f"a mitigation {kind.NAME!r} is registered already")
    MITIGATIONS[kind.NAME] = kind


register(ForgetMore)
register(StateNorm)
register(SlidingWindow)


def parse_mitigation(text: str) -> Mitigation:
    """Return the mitigation that ``NAME[:key=value,...]`` names.

    Raises:
        ConfigError: The name, a key or a value is not one; the message says which are.
    """
    name, _, rest = text.strip().partition(":")
    kind = MITIGATIONS.get(name.strip().replace("_", "-"))
    if kind is None:
        examples = ", ".join(known.EXAMPLE for known in MITIGATIONS.values())
        raise ConfigError(f"mitigation {name!r} is not one of {', '.join(MITIGATIONS)} (for example {examples})")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for part in rest.split(",") if rest.strip() else ():
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in fields or key in values or not value:
            wrong = f"{key!r} twice" if key in values else repr(part)
            raise ConfigError(f"mitigation {kind.NAME}: {wrong}; write it like {kind.EXAMPLE}")
        number = int if "int" in str(fields[key].type) else float
        try:
            values[key] = number(value)
        except ValueError:
            raise ConfigError(
                f"mitigation {kind.NAME}: {key} must be {'a whole number' if number is int else 'a number'}, "
                f"not {value!r}"
            ) from None
    needed = [field.name for field in fields.values() if field.default is dataclasses.MISSING]
    if missing := [key for key in needed if key not in values]:
        raise ConfigError(f"mitigation {kind.NAME} needs {', '.join(missing)}; write it like {kind.EXAMPLE}")
    return kind(**values)
