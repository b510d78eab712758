"""A share of work that several processes divide among them, as the tasks of a job array do."""

import re

from slope_cli.errors import UsageError


def shard_of(text: str) -> tuple[int, int]:
    """(I, N) of the option --shard I/N; UsageError if it is not I/N with I from 1 to N."""
    found = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(f"--shard {text}: must be I/N with I from 1 to N, as 1/8 to 8/8 (sbatch --array=1-8)")
    return number, count
