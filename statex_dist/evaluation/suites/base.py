"""The interface of a suite: its options, its units, its files, and its part of the report and of a model card.

``statex eval`` makes a subcommand from a suite's options, runs this process's share of the units and passes the records
to ``write``. ``SUITE.json`` is the summary that all other programs read. A suite's module imports no torch and no numpy
at its top: every start of the command imports it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from statex_dist.checkpoint.json_file import parse_json
from statex_dist.errors import ConfigError, DataError, reason

if TYPE_CHECKING:
    from rich.table import Table

    from statex_dist.evaluation.journal import EvalUnit

T = TypeVar("T")

_SUFFIXES = {"k": 1 << 10, "m": 1 << 20}

Lines = Sequence[Sequence[str]]
"""A table: the head, then the rows, the first cell of each its name."""


def option(default: Any = MISSING, *, help: str, metavar: str | None = None, positional: bool = False) -> Any:
    """Return a field of a suite's options: ``--name`` on the command line.

    Args:
        default: Its value where it is not given; without one it is required.
        help: What it is.
        metavar: What stands for its value in the help.
        positional: Whether it takes one or more words without a name.
    """
    extra = {"metavar": metavar} if metavar else {}
    return field(default=default, metadata={"help": help, "positional": positional, **extra})


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing and its description in words."""

    svg: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One evaluation that is to be run.

    Attributes:
        settings: A dataclass of everything that decides the result, but for the model.
        units: Called with the model and its tokenizer: checks the settings against them and returns the units.
        write: Called with ``(records, directory, model=facts, timing=...)`` on rank 0: writes the result files and
            returns them, the summary first.
        tokenizer: Whether it needs one; else ``units`` is given None.
        given: Further facts that an interrupted evaluation must share to continue, such as the origin of the data.
    """

    settings: Any
    units: Callable[[Any, Any], Iterable[EvalUnit]]
    write: Callable[..., list[Path]]
    tokenizer: bool = True
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A suite's result for a model.

    Attributes:
        suite: Name of the suite.
        model: Name of the model; results of one model share it.
        path: The summary, ``SUITE.json``.
        summary: Contents of the summary.
    """

    suite: str
    model: str
    path: Path
    summary: Mapping[str, Any]

    def samples(self, kind: str) -> Iterator[dict[str, Any]]:
        """Yield the records of this ``kind`` beside the summary.

        Raises:
            DataError: A line is damaged.
        """
        path = self.path.with_suffix(".jsonl")
        if not path.is_file():
            return
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = parse_json(line)
                    if record["kind"] == kind:
                        yield record
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}, line {number} is damaged: {reason(error)}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A figure of a result.

    Attributes:
        name: What it is.
        value: The figure; None where it is not finite, or only words tell it.
        low: Lower end of its 95 % interval; None for none.
        high: Upper end.
        samples: Samples that it is made of.
        words: What is shown in place of the value.
        headline: Whether it stands in the report's first table.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    samples: int | None = None
    words: str | None = None
    headline: bool = False

    @property
    def text(self) -> str:
        """The figure as people read it."""
        if self.words is not None:
            return self.words
        alone = self.samples == 1 and (self.low is None or self.high is None) and self.value is not None
        return interval(self.value, self.low, self.high) + (" (1 sample)" if alone else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the figure, JSON-able."""
        return {key: value for key, value in asdict(self).items() if key != "headline"}


class Suite(ABC):
    """A suite of ``statex eval``.

    Attributes:
        name: The subcommand, and the stem of the result files.
        help: What it measures, in a line.
        title: Heading of its section in the report.
        said: What the section says first.
        options: A dataclass of its options (:func:`option`), beside those of every suite that runs a model.
        of_model: Whether it runs a model; else it reads results of others, and :meth:`run_alone` does its work.
        batch_size: Default number of sequences per forward pass.
        ragged: Whether its forward passes end wherever a text ends, and not only at multiples of the segment.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    title: ClassVar[str]
    said: ClassVar[str] = ""
    options: ClassVar[type]
    of_model: ClassVar[bool] = True
    batch_size: ClassVar[int] = 8
    ragged: ClassVar[bool] = False

    def prepare(self, args: Any) -> Evaluation:
        """Return the evaluation that the parsed options ask for.

        Raises:
            StateXError: An option is wrong.
        """
        raise NotImplementedError

    def run_alone(self, args: Any) -> list[Path]:
        """Do the work of a suite without a model; return the result files, the summary first."""
        raise NotImplementedError

    @abstractmethod
    def table(self, summary: dict[str, Any]) -> Table:
        """Return the printed table of a summary."""

    @abstractmethod
    def measured(self, summary: Mapping[str, Any]) -> Iterator[Measured]:
        """Yield the figures of a summary, for the report."""

    def figures(self, results: Sequence[Result], looks: Mapping[str, int]) -> Iterator[Figure]:
        """Yield the drawings of the report.

        Args:
            results: Those of this suite.
            looks: Number of each model's look, by its name.
        """
        return iter(())

    def details(self, results: Sequence[Result]) -> Iterator[tuple[str, Lines]]:
        """Yield titles and tables that the report shows on demand."""
        return iter(())

    def card(self, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield names and values for a model card."""
        return ((figure.name, figure.text) for figure in self.measured(summary))


def settings_of(kind: type[T], args: Any, **given: Any) -> T:
    """Return a suite's settings: ``given``, and for all other fields the option of the same name."""
    names = [field.name for field in fields(kind) if field.name not in given]  # type: ignore[arg-type]
    return kind(**given, **{name: getattr(args, name) for name in names})


def number(value: float | None) -> str:
    """Return a number as people read it."""
    if value is None:
        return "not finite"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.4g}"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """Return a number with its interval, where there are both."""
    alone = value is None or low is None or high is None
    return number(value) if alone else f"{number(value)} ({number(low)} .. {number(high)})"


def accuracy(entry: Mapping[str, Any]) -> str:
    """Return an accuracy of a summary with its interval."""
    return interval(entry["accuracy"], entry["low"], entry["high"])


def estimate_of(name: str, e: Mapping[str, Any], *, key: str = "accuracy", headline: bool = False) -> Measured:
    """Return an estimate of a summary, its value under ``key``."""
    return Measured(name=name, value=e[key], low=e["low"], high=e["high"], samples=e.get("samples"), headline=headline)


def side_by_side(columns: Iterable[tuple[str, Sequence[Measured]]]) -> list[list[str]]:
    """Return a line of names, then one for each figure; what a model has no figure for is left empty."""
    columns = list(columns)
    by_name = [{figure.name: figure.text for figure in found} for _, found in columns]
    titles = dict.fromkeys(chain.from_iterable(by_name))
    head = ["", *(name for name, _ in columns)]
    return [head, *([title, *(found.get(title, "") for found in by_name)] for title in titles)]


def short_number(value: float) -> str:
    """Return ``4K`` for 4096, ``1M`` for 1024 K, and the number itself where it is no multiple of 1024."""
    for unit, suffix in ((1 << 20, "M"), (1 << 10, "K")):
        if value >= unit and value % unit == 0:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"


def interval_text(row: Mapping[str, Any], *, low: str = "low", high: str = "high", digits: int = 3) -> str:
    """Return the interval of a summary's figure, or "1 sample", which has none."""
    if row[low] is None or row[high] is None:
        return "1 sample"
    return f"{row[low]:.{digits}f} .. {row[high]:.{digits}f}"


def title_of(suite: str, model: Mapping[str, Any]) -> str:
    """Return the title of a printed table."""
    title = (
        f"{suite}: {model['model_type']}, {model['parameters']:,} parameters, {model['state_numbers']:,} state elements"
    )
    return f"{title}, {model['mitigation']}" if model.get("mitigation") else title


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Return the numbers of a list such as ``8,16,32`` or ``4K,256K`` (K: 1024, M: 1024 K).

    Raises:
        ConfigError: It is not a list of whole numbers.
    """
    try:
        return tuple(_number(word) for word in words(text))
    except ValueError:
        raise ConfigError(
            f"{option} {text!r} is not understood; allowed: whole numbers with commas, such as 8,16 or 4K,64K"
        ) from None


def _number(word: str) -> int:
    factor = _SUFFIXES.get(word[-1].lower())
    return int(word) if factor is None else int(word[:-1]) * factor


def one_number(text: str, option: str) -> int:
    """Return a number such as ``2048`` or ``64K``.

    Raises:
        ConfigError: It is something else.
    """
    numbers = parse_numbers(text, option)
    if len(numbers) != 1:
        raise ConfigError(f"{option} {text!r}: give one number")
    return numbers[0]


def words(text: str) -> list[str]:
    """Return the words of a list with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]
