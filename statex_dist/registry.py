"""Registries: a short name for each of our own parts of one kind, and ``module:Name`` for a user's own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from statex_dist.errors import ConfigError, reason, shown


class Registry:
    """Parts of one kind by name.

    Args:
        option: The setting that names one, for messages.
        rows: Our own: the part, or ``module:Name`` of it, which is imported when it is asked for.
    """

    def __init__(self, option: str, rows: Mapping[str, Any]):
        self.option, self._rows = option, dict(rows)

    def register(self, name: str, part: Any) -> None:
        """Add a part, or its ``module:Name``.

        Raises:
            ConfigError: The name is taken, or holds a colon.
        """
        if name in self._rows or ":" in name:
            raise ConfigError(f"{self.option}: the name {shown(name)} is taken, or holds a colon; choose another")
        self._rows[name] = part

    def unregister(self, name: str) -> None:
        """Remove a part."""
        del self._rows[name]

    def check(self, name: str) -> None:
        """Raise if a name is neither registered nor of the form ``module:Name``; nothing is imported.

        Raises:
            ConfigError: It is neither.
        """
        if name not in self._rows and not all(part for part in name.partition(":")):
            raise ConfigError(
                f"{self.option} {shown(name)} is not known; allowed: {', '.join(self._rows)}, or module:Name of your "
                "own"
            )

    def get(self, name: str) -> Any:
        """Return the part of a name, registered or ``module:Name``.

        Raises:
            ConfigError: It is not known, or cannot be imported.
        """
        self.check(name)
        part = self._rows.get(name, name)
        if not isinstance(part, str):
            return part
        module, _, attribute = part.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:  # a user's module may fail in any way, or be a script that exits
            raise ConfigError(
                f"{self.option} {shown(name)} cannot be imported: {reason(error)}; the module must be installed or on "
                "PYTHONPATH"
            ) from None
