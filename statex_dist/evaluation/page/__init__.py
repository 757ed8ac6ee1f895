"""``statex report``: runs, evaluations and expansions on one page that needs no network."""
