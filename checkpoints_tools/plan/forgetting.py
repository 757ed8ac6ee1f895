"""Judge whether a planned training is long enough for the planned state to learn to forget; propose alternatives.

The verdict follows from a law of state size (:mod:`statex_dist.state.laws`: the paper's, or one fitted to the user's
own models) and, if there is one, from a measurement (``statex eval collapse``) of a checkpoint of the same family,
state and plan. A measurement has priority: the law is moved until it agrees with it. Measured capacities are never
used, because a capacity is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from checkpoints_tools.plan.size_search import SmallerPlan, smaller_plans
from statex_dist.checkpoint.json_file import read_json
from statex_dist.errors import ConfigError, reason, shown
from statex_dist.models.config import ModelConfig
from statex_dist.state.laws import MILLION, PAPER_FORGET, THOUSAND_TOKENS, Law, read_forget_law

Basis = Literal["paper", "fit", "measurement"]

_ROUND_ABOVE = 8192
_FINE, _COARSE = 64, 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What ``statex eval collapse`` found of a checkpoint.

    Attributes:
        directory: Where its result is.
        state_numbers: Of the checkpoint.
        train_length: What it was trained on.
        length: How far it was read.
        position: Where the model collapses on these prompts; None if it does not.
        prompts: The prompts that this is concluded from: made-up or own texts, newlines only where there is nothing
            else, as they are far from any text.
        newline_heads: What newlines made of the states, in words; None where no head collapsed, or they were not read.
    """

    directory: str
    state_numbers: int
    train_length: int
    length: int
    position: int | None
    prompts: tuple[str, ...] = ("text",)
    newline_heads: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Evidence for a forget threshold.

    Attributes:
        law: A linear law with a positive slope.
        source: File of the law; None for the paper's.
        measurement: Measurement of a checkpoint like the one that is to be trained, or None.
    """

    law: Law = PAPER_FORGET
    source: str | None = None
    measurement: Measurement | None = None

    def threshold(self, state_numbers: int) -> float:
        """Return the training length in tokens that a state asks for; 0 or less where it asks for none."""
        return self.law.tokens(state_numbers) + self._shift(state_numbers)

    def interval(self, state_numbers: int) -> tuple[float, float] | None:
        """Return the threshold's 95 % prediction interval in tokens, or None where the fit's error is not known."""
        found = self.law.interval(state_numbers / MILLION)
        if found is None:
            return None
        shift = self._shift(state_numbers)
        return found[0] * THOUSAND_TOKENS + shift, found[1] * THOUSAND_TOKENS + shift

    def _shift(self, state_numbers: int) -> float:
        """Return by how many tokens the law is moved for a size, so that it agrees with the measurement."""
        measured = self.measurement
        if measured is None:
            return 0.0
        law = self.law.tokens(measured.state_numbers)
        if measured.position is None:
            # Its training was long enough: the threshold of its size is no higher.
            return min(0.0, measured.train_length - law)
        shift = max(0.0, measured.train_length + 1 - law)
        if shift and self.law.parameters[1] <= 0:
            # A line through a point, with an intercept of 0 or less, rises in proportion at least.
            least = (measured.train_length + 1) * state_numbers / measured.state_numbers
            shift = max(shift, least - self.law.tokens(state_numbers))
        return shift

    def says(self, model_type: str, state_numbers: int) -> str:
        """Return in one line what is concluded from."""
        low, high = min(self.law.state), max(self.law.state)
        known = f"{low:.3g} .. {high:.3g} M state elements"
        if self.source is None:
            line = f"the law of Stuffed Mamba (arXiv 2410.07145), fitted on Mamba-2 with {known}"
        else:
            quality = "" if self.law.r_squared is None else f", R^2 {self.law.r_squared:.3f}"
            line = f"the law fitted in {self.source} to {len(self.law.state)} sizes, {known}{quality}"
        if not self.law.covers(state_numbers):
            line += f"; {state_numbers / MILLION:.3g} M is "
            silent = state_numbers / MILLION < low and self.law.tokens(state_numbers) <= 0
            line += "too small for the law to say anything" if silent else "outside that range: an extrapolation"
        if self.law.model_type is None:
            line += f"; of what family is not known, this is a {model_type} model"
        elif _family(self.law.model_type) != _family(model_type) and (self.source or self.law.covers(state_numbers)):
            of = "" if self.source is None else f"it is of {self.law.model_type} models, "
            line += f"; {of}this is a {model_type} model"
        measured = self.measurement
        if measured is None:
            return line
        trained = f"a checkpoint of this family, state and plan, trained at {measured.train_length} tokens"
        if measured.position is not None:
            found = f"{trained}, collapses at {measured.position}"
        else:
            found = f"{trained}, shows no collapse up to {measured.length}"
        found += f" on {' and '.join(measured.prompts)}"
        if measured.prompts == ("newlines",):
            found += " alone, which says little of texts"
        if measured.newline_heads is not None:
            found += f"; {measured.newline_heads}"
        return f"the measurement in {measured.directory} ({found}) and {line}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgetting:
    """Whether a training is long enough for the state.

    Attributes:
        basis: What decides: the paper's law, the user's fit, or a measurement.
        says: The same in one line.
        threshold_tokens: The training length that the state asks for; None where it asks for none.
        low: Lower end of its 95 % interval, or None.
        high: Upper end.
        extrapolated: Whether the state lies outside the law's points.
        train_length: The planned length.
        long_enough: Whether it reaches the threshold.
        as_it_is: The length that the model asks for before the expansion; None where it asks for none.
        seq_len: A length that would be long enough; None where the planned one is.
        smaller: Smaller plans for the planned length, the largest state first; None where none was looked for: the
            length is enough, nothing is expanded, or layers are expanded in different ways.
    """

    basis: Basis
    says: str
    threshold_tokens: int | None
    low: int | None
    high: int | None
    extrapolated: bool
    train_length: int
    long_enough: bool
    as_it_is: int | None
    seq_len: int | None = None
    smaller: tuple[SmallerPlan, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        names = ("basis", "says", "threshold_tokens", "low", "high", "extrapolated", "train_length", "long_enough")
        of_plan = ("op", "init", "factor", "reset_dynamics", "state_numbers", "options")
        smaller = [
            {**{name: getattr(plan, name) for name in of_plan}, "layers": list(plan.layers)}
            for plan in self.smaller or ()
        ]
        return {
            **{name: getattr(self, name) for name in (*names, "as_it_is")},
            "proposals": {"seq_len": self.seq_len, "smaller": smaller},
        }

    @property
    def threshold(self) -> str:
        """The threshold in words, with its interval where that is known."""
        between = "" if self.low is None else f" (95 %: {max(self.low, 0)} .. {self.high})"
        return f"{self.threshold_tokens} tokens{between}"

    @property
    def warning(self) -> str | None:
        """One line where the training is too short, or None."""
        if self.long_enough:
            return None
        return (
            f"--seq-len {self.train_length} is below the forget threshold of {self.threshold}: "
            "the model may not learn to forget, and can collapse beyond its training length. Concluded from "
            f"{self.says}"
        )

    @property
    def proposals(self) -> Iterator[str]:
        """Lines that propose alternatives."""
        if self.seq_len is not None:
            sure = "" if self.high is None else f" ({_rounded_up(self.high)} for the upper end of the interval)"
            yield f"train longer: --seq-len {self.seq_len}{sure}"
        for plan in self.smaller or ():
            yield f"or a smaller state, {plan.state_numbers / MILLION:.4g} M numbers: {plan.options}"
        if self.smaller == ():
            if self.as_it_is is not None and self.as_it_is > self.train_length:
                yield f"no smaller expansion helps: the model as it is asks for {self.as_it_is} tokens already"
            else:
                yield "no smaller expansion of this kind fits that length"


def judge_forgetting(before: ModelConfig, after: ModelConfig, train_length: int, evidence: Evidence) -> Forgetting:
    """Return whether a training is long enough for the state of ``after``, and proposals where it is not.

    Args:
        before: The model as it is.
        after: The model with its plan.
        train_length: Tokens of a training sequence.
        evidence: What to conclude from.
    """
    numbers = after.state_elements
    needed = evidence.threshold(numbers)
    interval = evidence.interval(numbers)
    basis: Basis = "paper" if evidence.source is None else "fit"
    if evidence.measurement is not None:
        basis = "measurement"
    enough = train_length >= needed
    as_it_is = evidence.threshold(before.state_elements)
    return Forgetting(
        basis=basis,
        says=evidence.says(before.MODEL_TYPE, numbers),
        threshold_tokens=math.ceil(needed) if needed > 0 else None,
        low=None if interval is None else math.floor(interval[0]),
        high=None if interval is None else math.ceil(interval[1]),
        extrapolated=not evidence.law.covers(numbers),
        train_length=train_length,
        long_enough=enough,
        as_it_is=math.ceil(as_it_is) if as_it_is > 0 else None,
        seq_len=None if enough else _rounded_up(needed),
        smaller=None if enough else smaller_plans(before, after, lambda n: train_length >= evidence.threshold(n)),
    )


def _rounded_up(tokens: float) -> int:
    step = _COARSE if tokens > _ROUND_ABOVE else _FINE
    return math.ceil(tokens / step) * step


def gather_evidence(before: ModelConfig, *, laws: str | None = None, health: str | None = None) -> Evidence:
    """Return what ``--laws`` and ``--health`` say of a model.

    Args:
        before: The model as it is.
        laws: ``laws.json`` of ``statex eval laws``, or its directory; None for the paper's law.
        health: Result directory of ``statex eval collapse`` of such a model, or None.

    Raises:
        ConfigError: One of them cannot be read, or the measured model has another family, state or plan.
    """
    return Evidence(
        law=PAPER_FORGET if laws is None else read_forget_law(Path(laws)),
        source=laws,
        measurement=None if health is None else read_measurement(Path(health), before),
    )


def read_measurement(path: Path, config: ModelConfig) -> Measurement:
    """Read the result of ``statex eval collapse`` on a model.

    Args:
        path: Its directory, or ``collapse.json`` itself.
        config: The model that it must be of: same family, state and plan.

    Raises:
        ConfigError: It cannot be read, is of another model, or was measured with a mitigation.
    """
    file = path / "collapse.json" if path.is_dir() else path
    try:
        values = read_json(file)
        if values["suite"] != "collapse":
            raise ValueError(f"suite {shown(values['suite'])}")
        model, settings = values["model"], values["settings"]
        position, prompts = _place(values["prompts"])
        found = model["model_type"], model["state_numbers"], model["statex"]
        measurement = Measurement(
            directory=str(path),
            state_numbers=int(model["state_numbers"]),
            train_length=int(settings["train_length"]),
            length=int(settings["length"]),
            position=position,
            prompts=prompts,
            newline_heads=_newline_heads(values["prompts"]),
        )
        mitigation = model.get("mitigation")
    except OSError as error:
        raise ConfigError(f"--health {path} cannot be read: {error.strerror} ({file})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"--health {file} is not a result of `statex eval collapse`: {reason(error)}") from None
    wanted = config.MODEL_TYPE, config.state_elements, config.statex.to_dict() if config.statex else None
    if found != wanted:
        raise ConfigError(
            f"--health {path} is of another model ({found[0]}, {found[1]:,} state elements"
            f"{', expanded' if found[2] else ''}), this is {wanted[0]} with {wanted[1]:,}"
            f"{', expanded' if wanted[2] else ''}; measure this one: statex eval collapse --model DIR --out DIR"
        )
    if mitigation is not None:
        raise ConfigError(f"--health {path} was measured with the mitigation {shown(mitigation)}; measure without one")
    return measurement


def _place(prompts: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    """Return where a model first collapses, and on which prompts: where it does first, or all where it does not."""
    texts = [name for name in prompts if name != "newlines"] or list(prompts)
    if not texts:
        raise ValueError("no prompt")
    found = {name: prompts[name]["verdict"]["position"] for name in texts}
    places = [int(position) for position in found.values() if position is not None]
    if not places:
        return None, tuple(texts)
    return min(places), tuple(name for name in texts if found[name] == min(places))


def _newline_heads(prompts: Mapping[str, Any]) -> str | None:
    """Return how many heads newlines made collapse, and from where on, or None."""
    heads = prompts["newlines"]["heads"] if "newlines" in prompts else {"collapsed": 0}
    if not heads["collapsed"]:
        return None
    return (
        f"on newlines {heads['collapsed']} of {heads['total']} heads collapse, from {heads['position']} on: the state "
        "can run away"
    )


def _family(model_type: str) -> str:
    """Return the family of a model type: a checkpoint layout of its own is none."""
    return model_type.removesuffix("_state_spaces")
