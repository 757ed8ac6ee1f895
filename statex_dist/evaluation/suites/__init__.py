"""The suites of ``statex eval``: a file and a row of :mod:`registry` each. They import no torch until they run."""
