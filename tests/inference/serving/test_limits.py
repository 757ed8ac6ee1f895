"""How many connections are taken follows what the process may open."""

import resource

import pytest

from statex_dist.errors import ConfigError
from statex_dist.inference.serving.limits import connections_allowed


@pytest.fixture
def may_open(monkeypatch):
    def set_limit(number):
        monkeypatch.setattr(resource, "getrlimit", lambda which: {resource.RLIMIT_NOFILE: (number, number)}[which])

    return set_limit


def test_the_default_leaves_room_for_other_files(may_open):
    may_open(100_000)
    assert connections_allowed(None) == 1024
    may_open(resource.RLIM_INFINITY)
    assert connections_allowed(None) == 1024
    assert connections_allowed(1_000_000) == 1_000_000
    may_open(512)
    assert 0 < connections_allowed(None) < 512 - 100


def test_a_number_that_is_given_is_taken_or_refused(may_open):
    may_open(4096)
    assert connections_allowed(3000) == 3000
    with pytest.raises(ConfigError, match=r"--max-connections 4000.*4\d\d\d.*4096"):
        connections_allowed(4000)
    may_open(64)
    with pytest.raises(ConfigError, match=r"64.*1\d\d"):
        connections_allowed(1)
