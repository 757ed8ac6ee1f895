"""Records of clients' doing: the first of each kind are written, the others counted."""

import logging

import pytest

from statex_dist.inference.serving.server import LogLimit

NAME = "tests.log_limit"


@pytest.fixture
def limit():
    limit = LogLimit()
    with limit.on(NAME):
        yield limit


def test_a_flood_is_a_few_records_and_their_count(limit, caplog):
    logger = logging.getLogger(NAME)
    for number in range(1000):
        logger.warning("client %d sent\ngarbage", number)
    logger.warning("another kind")
    assert len(caplog.records) == 6
    caplog.clear()
    limit.end_period()
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "995 more in 60 s or less like: client 0 sent"
    limit.end_period()
    assert len(caplog.records) == 1
    logger.warning("client %d sent\ngarbage", 0)  # a new period
    assert len(caplog.records) == 2


def test_texts_that_all_differ_are_bounded_too(limit, caplog):
    logger = logging.getLogger(NAME)
    for number in range(1000):
        logger.error(f"client {number}")
    assert len(caplog.records) == 32 + 5
    limit.end_period()
    assert caplog.records[-1].getMessage().startswith("963 more")


def test_the_limit_ends_with_its_block(caplog):
    limit = LogLimit()
    with limit.on(NAME):
        for _ in range(9):
            logging.getLogger(NAME).warning("same")
    assert len(caplog.records) == 6  # with the count
    for _ in range(9):
        logging.getLogger(NAME).warning("same")
    assert len(caplog.records) == 15
