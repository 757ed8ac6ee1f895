"""Errors that a user can cause and mend.

Every message says what was given, what is allowed and what to do, in one line; entry points print it without a
traceback. Anything else that escapes is a programming error and keeps its traceback.
"""

from typing import ClassVar


class StateXError(Exception):
    """Base of every error that is reported to the user as one line; by itself: a job that began and failed."""

    exit_code: ClassVar[int] = 1


class ConfigError(StateXError):
    """A configuration, plan or command-line value is wrong."""

    exit_code = 2


class DataError(StateXError):
    """Training or evaluation data is missing, unreadable or inconsistent."""

    exit_code = 2


class CheckpointError(StateXError):
    """A checkpoint is missing, incomplete, damaged or of another architecture."""

    exit_code = 2


class ShardError(DataError):
    """One shard of a dataset is missing, damaged or cannot be fetched; the others may be well."""


class CorruptShardError(ShardError):
    """The shard itself is missing or damaged at its origin; network, cache and credentials are not to blame."""
