"""Check the first records of some input files before any work begins, so that a fault of all is an error at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice

from statex_dist.data.corpus.documents import Unit, read_unit
from statex_dist.data.corpus.records import BadRecordError, ReadReport
from statex_dist.data.corpus.rules import DocumentRules
from statex_dist.data.corpus.text_files import check_text
from statex_dist.data.corpus.unit_results import BadRecordNames

log = logging.getLogger(__name__)

_MOST_FILES = 32
_RECORDS = 16
_BYTES = 1 << 20


def check_first_records(units: Sequence[Unit], vocab_size: int, rules: DocumentRules) -> None:
    """Read the first records of up to 32 files, spread over all of them.

    Args:
        units: All units, in order.
        vocab_size: Bound of the ids in records that are tokenised already.
        rules: How records become documents. Where bad ones are skipped, a warning is given if all of them are bad.

    Raises:
        DataError: A record is no document, or a file is not readable.
    """
    firsts = [unit for unit in units if not unit.begin]
    count = min(len(firsts), _MOST_FILES)
    bad: list[str] = []
    good = 0
    for i in range(count):
        unit = firsts[i * len(firsts) // count]
        if unit.kind == "text":
            good += _check_text(unit.paths[0], rules)
            continue
        report = ReadReport()
        for _ in islice(read_unit(unit, vocab_size, rules, report, sample=True), _RECORDS):
            good += 1
        good += report.filtered
        bad += BadRecordNames().of(unit, report)
    if bad and not good:
        log.warning("all of the first records are bad: %s", bad[0])


def _check_text(path: str, rules: DocumentRules) -> bool:
    """Return whether the start of a text file is good; raise if bad ones are not skipped."""
    try:
        check_text(path, _BYTES)
    except BadRecordError:
        if not (rules.skip_bad_records or rules.skip_undecodable):
            raise
        return False
    return True
