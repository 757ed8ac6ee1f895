"""Laws between state size and length: the forget threshold, recall, and fits of both to measurements.

Two laws of "Stuffed Mamba" (arXiv 2410.07145), for ``N`` million state elements of all layers together and lengths
``T`` in thousands (1024) of tokens:

- *forget threshold*, ``T = slope N + intercept``: a model that is trained at a shorter length does not learn to forget,
  and its state collapses past that length;
- *recall*, ``T = a (b^N - 1) + c``: the longest context from which a passkey is recalled, after enough training above
  the threshold. The law is an upper bound and not a forecast. It is stored as ``a (exp(rate N) - 1) + c``, because
  ``b = exp(rate)`` exceeds the range of a float for models with a few thousand state elements.

The authors fitted both to Mamba-2. :func:`fit_line` and :func:`fit_exponential` fit them to other models and report the
error of the fit. The module needs only numpy.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from statex_dist.errors import ConfigError, shown

MILLION = 1_000_000
THOUSAND_TOKENS = 1024

Form = Literal["linear", "exponential"]

PARAMETERS: dict[str, tuple[str, ...]] = {"linear": ("slope", "intercept"), "exponential": ("a", "rate", "c")}

# Growth over the whole range of sizes that is tried: from a bend that no measurement shows to one step up at the end.
_LEAST_BEND, _MOST_BEND = 1e-2, 40.0
# The square of exp(rate N) must be a float, as must that of a, its inverse.
_MOST_EXPONENT = 300.0
_GRID = 120
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """A law between state size and length, with the error of its fit.

    Attributes:
        form: ``linear`` or ``exponential``.
        parameters: ``slope, intercept`` or ``a, rate, c``.
        covariance: Of the parameters (linearised for ``exponential``), or None where it is not known or not finite.
        residual_std: Standard deviation about the fit, in thousand tokens; None where it is not known.
        degrees_of_freedom: Points less parameters; 0 where they are not known.
        r_squared: Share of the variance that the fit explains; None where it is not known.
        state: State sizes of the points, in millions.
        length: Their lengths, in thousand tokens.
        model_type: Family of the models; None where it is not known.
    """

    form: Form
    parameters: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...] | None = None
    residual_std: float | None = None
    degrees_of_freedom: int = 0
    r_squared: float | None = None
    state: tuple[float, ...] = ()
    length: tuple[float, ...] = ()
    model_type: str | None = None

    def at(self, state: float) -> float:
        """Return the length in thousand tokens for ``state`` million state elements."""
        return float(_value(self.form, self.parameters, np.array([state]))[0])

    def tokens(self, state_numbers: float) -> float:
        """Return the length in tokens for a number of state elements; it is negative where the law is."""
        return self.at(state_numbers / MILLION) * THOUSAND_TOKENS

    def interval(self, state: float) -> tuple[float, float] | None:
        """Return the 95 % prediction interval for one more model, in thousand tokens, or None without an error.

        The parameters' errors and the points' scatter together, by Student's t.
        """
        if self.covariance is None or self.residual_std is None or self.degrees_of_freedom < 1:
            return None
        gradient = _gradient(self.form, self.parameters, np.array([state]))[0]
        variance = float(gradient @ np.array(self.covariance) @ gradient) + self.residual_std**2
        half = student_t(self.degrees_of_freedom) * math.sqrt(max(variance, 0.0))
        return self.at(state) - half, self.at(state) + half

    @property
    def errors(self) -> tuple[float | None, ...]:
        """Half-widths of the parameters' 95 % intervals."""
        if self.covariance is None or self.degrees_of_freedom < 1:
            return (None,) * len(self.parameters)
        t = student_t(self.degrees_of_freedom)
        return tuple(t * math.sqrt(max(self.covariance[i][i], 0.0)) for i in range(len(self.parameters)))

    @property
    def base(self) -> float | None:
        """The ``b`` of the published form ``a (b^N - 1) + c``; None for a line, or where it is beyond a float."""
        if self.form == "linear":
            return None
        try:
            return math.exp(self.parameters[1])
        except OverflowError:
            return None

    def covers(self, state_numbers: float) -> bool:
        """Whether a size lies among the points' (a law without points covers none)."""
        return bool(self.state) and min(self.state) <= state_numbers / MILLION <= max(self.state)

    def to_dict(self) -> dict[str, Any]:
        """Return the form of ``laws.json``."""
        names = PARAMETERS[self.form]
        residuals = [y - self.at(x) for x, y in zip(self.state, self.length, strict=True)]
        return {
            "form": self.form,
            "model_type": self.model_type,
            "parameters": dict(zip(names, self.parameters, strict=True)),
            "errors": dict(zip(names, self.errors, strict=True)),
            "b": self.base,
            "covariance": None if self.covariance is None else [list(row) for row in self.covariance],
            "r_squared": self.r_squared,
            "residual_std": self.residual_std,
            "degrees_of_freedom": self.degrees_of_freedom,
            "state": list(self.state),
            "length": list(self.length),
            "residuals": residuals,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Law:
        """Read the form of ``laws.json``.

        Raises:
            ConfigError: It is not that.
        """
        try:
            form = values["form"]
            if form not in get_args(Form):
                raise ValueError(f"form {shown(form)}")
            parameters = tuple(float(values["parameters"][name]) for name in PARAMETERS[form])
            covariance = values["covariance"]
            law = cls(
                form=form,
                parameters=parameters,
                covariance=None if covariance is None else tuple(tuple(map(float, row)) for row in covariance),
                residual_std=None if values["residual_std"] is None else float(values["residual_std"]),
                degrees_of_freedom=int(values["degrees_of_freedom"]),
                r_squared=None if values["r_squared"] is None else float(values["r_squared"]),
                state=tuple(map(float, values["state"])),
                length=tuple(map(float, values["length"])),
                model_type=None if values.get("model_type") is None else str(values["model_type"]),
            )
            size = len(parameters)
            shape = [len(row) for row in law.covariance] if law.covariance is not None else [size] * size
            if shape != [size] * size or len(law.state) != len(law.length):
                raise ValueError("sizes that do not fit each other")
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a fitted law: {error}") from None
        return law


PAPER_FORGET = Law(
    form="linear", parameters=(5.172, -4.469), state=(1.1, 12.9), length=(1.0, 64.0), model_type="mamba2"
)
"""The authors' fit for Mamba-2, with the ends of the range of their models; its error is not published."""


@functools.cache
def student_t(degrees_of_freedom: int, confidence: float = _CONFIDENCE) -> float:
    """Return the two-sided quantile of Student's t distribution.

    With ``x = sqrt(df) tan(u)`` its density becomes ``cos(u)^(df - 1)`` on a finite range.
    """
    assert degrees_of_freedom >= 1
    angle = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angle) ** (degrees_of_freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees_of_freedom) * math.tan(float(np.interp(confidence, mass / mass[-1], angle)))


def fit_line(state: Sequence[float], length: Sequence[float]) -> Law:
    """Fit ``T = slope N + intercept`` by least squares.

    Args:
        state: ``[n]`` million state elements.
        length: ``[n]`` thousand tokens.

    Raises:
        ConfigError: Fewer than three different sizes: two points always lie on a line.
    """
    x, y = _points("linear", state, length, 3)
    parameters, *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], axis=1), y, rcond=None)
    return _law("linear", tuple(map(float, parameters)), x, y)


def fit_exponential(state: Sequence[float], length: Sequence[float]) -> Law:
    """Fit ``T = a (exp(rate N) - 1) + c`` by least squares, ``rate > 0`` and ``a > 0``.

    For a given rate, linear least squares gives the other two parameters. Only the rate is searched: on a grid, then by
    golden section (variable projection; Golub and Pereyra 1973).

    Args:
        state: ``[n]`` million state elements.
        length: ``[n]`` thousand tokens.

    Raises:
        ConfigError: There are fewer than four different sizes, the points do not bend upwards, or they rise so steeply
            between close sizes that ``a`` is too small for a float.
    """
    x, y = _points("exponential", state, length, 4)
    span = float(x.max() - x.min())
    rates = np.geomspace(_LEAST_BEND, _MOST_BEND, _GRID) / span
    losses = [_project(rate, x, y)[0] for rate in rates]
    best = int(np.argmin(losses))
    if best == 0:
        raise ConfigError("the lengths do not bend upwards with the state size: no exponential law fits them")
    if best == _GRID - 1:
        raise ConfigError("only the largest state differs from the others: an exponential law needs lengths that rise")
    rate = _golden(lambda r: _project(r, x, y)[0], float(rates[best - 1]), float(rates[best + 1]))
    _, top, shift = _project(rate, x, y)
    if top <= 0:
        raise ConfigError("the lengths fall with the state size: no growing exponential law fits them")
    exponent = rate * float(x.max())
    if exponent > _MOST_EXPONENT:
        raise ConfigError(
            f"the lengths rise too steeply between sizes too close together ({x.min():.4g} .. {x.max():.4g} M "
            f"numbers): the law would grow by e^{exponent:.0f} from an empty state on; add results of smaller states"
        )
    a = top * math.exp(-exponent)
    return _law("exponential", (a, rate, shift + a), x, y)


def _points(
    form: Form, state: Sequence[float], length: Sequence[float], least: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    x, y = np.asarray(state, np.float64), np.asarray(length, np.float64)
    assert x.shape == y.shape
    if len(np.unique(x)) < least:
        raise ConfigError(
            f"{len(np.unique(x))} different state sizes are too few: the {form} law has {len(PARAMETERS[form])} "
            f"parameters and needs {least} or more"
        )
    return x, y


def _project(rate: float, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the squared error, and the best factor and shift, of ``factor exp(rate (x - max x)) + shift``."""
    design = np.stack([np.exp(rate * (x - x.max())), np.ones_like(x)], axis=1)
    (top, shift), *_ = np.linalg.lstsq(design, y, rcond=None)
    return float(np.square(y - top * design[:, 0] - shift).sum()), float(top), float(shift)


def _golden(loss: Any, low: float, high: float) -> float:
    """Return the minimum of a function between two points that enclose it."""
    ratio = (math.sqrt(5) - 1) / 2
    inner, outer = high - ratio * (high - low), low + ratio * (high - low)
    at_inner, at_outer = loss(inner), loss(outer)
    for _ in range(80):
        if at_inner < at_outer:
            high, outer, at_outer = outer, inner, at_inner
            inner = high - ratio * (high - low)
            at_inner = loss(inner)
        else:
            low, inner, at_inner = inner, outer, at_outer
            outer = low + ratio * (high - low)
            at_outer = loss(outer)
    return (low + high) / 2


def _value(form: Form, parameters: Sequence[float], x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if form == "linear":
        return parameters[0] * x + parameters[1]
    a, rate, c = parameters
    with np.errstate(over="ignore"):
        return a * np.expm1(rate * x) + c


def _gradient(form: Form, parameters: Sequence[float], x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the derivatives by the parameters, ``[n, parameters]``."""
    if form == "linear":
        return np.stack([x, np.ones_like(x)], axis=1)
    a, rate, _ = parameters
    with np.errstate(over="ignore"):
        return np.stack([np.expm1(rate * x), a * x * np.exp(rate * x), np.ones_like(x)], axis=1)


def _law(form: Form, parameters: tuple[float, ...], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Law:
    """Return a fit with its error."""
    residuals = y - _value(form, parameters, x)
    degrees = len(x) - len(parameters)
    variance = float(residuals @ residuals) / degrees
    gradient = _gradient(form, parameters, x)
    # Columns of very different size: scaled, their normal matrix can be inverted.
    scale = np.linalg.norm(gradient, axis=0)
    scaled = gradient / np.where(scale > 0, scale, 1.0)
    covariance = None
    if np.isfinite(scaled).all() and np.linalg.matrix_rank(scaled) == len(parameters):
        inverse = np.linalg.pinv(scaled)
        matrix = variance * (inverse @ inverse.T) / np.outer(scale, scale)
        covariance = tuple(tuple(map(float, row)) for row in matrix)
    spread = float(np.square(y - y.mean()).sum())
    return Law(
        form=form,
        parameters=parameters,
        covariance=covariance,
        residual_std=math.sqrt(variance),
        degrees_of_freedom=degrees,
        r_squared=1 - float(residuals @ residuals) / spread if spread > 0 else None,
        state=tuple(map(float, x)),
        length=tuple(map(float, y)),
    )


def read_forget_law(path: Path) -> Law:
    """Return the forget threshold of a ``laws.json`` that ``statex eval laws`` wrote.

    Args:
        path: The file, or the directory that it is in.

    Raises:
        ConfigError: It cannot be read, holds no forget threshold, or one that falls with the state.
    """
    file = path / "laws.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--laws {file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--laws {file} is not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("suite") != "laws":
        raise ConfigError(f"--laws {file} is not a fit; give the laws.json that `statex eval laws` wrote")
    if values.get("forget") is None:
        why = values.get("forget_refused") or "no reason is given"
        raise ConfigError(f"--laws {file} holds no forget threshold ({why}); leave --laws out for the paper's law")
    try:
        law = Law.from_dict(values["forget"])
    except ConfigError as error:
        raise ConfigError(f"--laws {file}: {error}") from None
    if law.form != "linear" or not law.parameters[0] > 0:
        raise ConfigError(
            f"--laws {file}: the fitted forget threshold does not rise with the state "
            f"(slope {law.parameters[0]:g}); measure more state sizes, or leave --laws out for the paper's law"
        )
    return law
