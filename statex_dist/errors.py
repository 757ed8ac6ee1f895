"""Errors that a user can cause and mend.

Every message says what was given, what is allowed and what to do, in one line; entry points print it without a
traceback and exit with code 2. Anything else that escapes is a programming error and keeps its traceback.
"""


class StateXError(Exception):
    """Base of every error that is reported to the user as one line."""


class ConfigError(StateXError):
    """A configuration, plan or command-line value is wrong."""


class DataError(StateXError):
    """Training or evaluation data is missing, unreadable or inconsistent."""


class CheckpointError(StateXError):
    """A checkpoint is missing, incomplete, damaged or of another architecture."""
