"""A share of a job that several machines do together: ``--part I/N``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from statex_dist.errors import ConfigError


@dataclass(frozen=True, slots=True)
class WorkPart:
    """A share of a job.

    Attributes:
        index: Which one, from 1.
        count: Of how many.
    """

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_part(text: str) -> WorkPart:
    """Return the part that ``text`` names, for example ``3/8``.

    Raises:
        ConfigError: It is not ``I/N`` with ``1 <= I <= N``.
    """
    match = re.fullmatch(r"\s*(\d+)/(\d+)\s*", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(
            f"--part {text!r} is not I/N with I from 1 to N, such as 3/8 "
            "(in a Slurm job of --array=1-8: $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT)"
        )
    return WorkPart(int(match[1]), int(match[2]))
