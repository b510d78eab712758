"""The two errors a user sees as one line; anything else is a defect and keeps its traceback."""


class SlopeError(Exception):
    """A known fault of a run, its files or its machine: one clear line, exit code 1."""

    exit_code = 1


class UsageError(SlopeError):
    """A wrong command line, config or input: one clear line that says what to set, exit code 2."""

    exit_code = 2
