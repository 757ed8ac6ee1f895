"""lm-evaluation-harness on our checkpoints: the only importer of ``lm_eval``.

The harness turns tasks into requests and answers into figures; between the two lies :class:`StateXLM`, which answers
with a recurrent state. It is a plain ``lm_eval`` model and can be given to ``lm_eval.simple_evaluate``.
:class:`Harness` takes the two halves apart, so that the answers can be found piece by piece
(:mod:`statex_dist.evaluation.lm_eval_suite`); every figure is the harness's own.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError, DataError
from statex_dist.evaluation.scoring import score_continuations
from statex_dist.inference.decoding import Sampling
from statex_dist.inference.generate import generate_continuations
from statex_dist.inference.prefill import DEFAULT_SEGMENT_LENGTH
from statex_dist.models.lm import RecurrentLM

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM, TemplateLM
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
except ImportError as error:
    raise ConfigError(
        f"eval lm-eval needs lm-evaluation-harness ({error}); run: pip install 'statex-dist[eval]'"
    ) from None

DEFAULT_NEW_TOKENS = 256
"""Tokens generated at most where a task does not say, as by the harness's own models."""

_SAMPLING_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
_KINDS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until")
_NEAR_MATCHES = 3


class StateXLM(TemplateLM):
    """One of our models as the harness sees it: a context of any length is read segment by segment into the state.

    No special tokens are added. Where a request has no context, EOS stands in its place.

    Args:
        model: The model, fp32 where the figures are to be compared.
        tokenizer: Its tokenizer.
        batch_size: Rows per forward pass.
        segment_length: Most tokens per forward pass.
        max_length: Tokens of context that the model may see; None for all there are.
        seed: Of sampled continuations.
    """

    def __init__(
        self,
        model: RecurrentLM,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        segment_length: int = DEFAULT_SEGMENT_LENGTH,
        max_length: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model
        self.text = tokenizer
        self.reading: dict[str, Any] = {"batch_size": batch_size, "segment_length": segment_length}
        self.max_length = max_length
        self.seed = seed

    @property
    def eot_token_id(self) -> int:
        """Id of EOS.

        Raises:
            DataError: The tokenizer has none.
        """
        if self.text.eos_token_id is None:
            raise DataError(
                f"tokenizer {self.text.spec} has no EOS token, behind which the harness begins its texts; set "
                "eos_token in its tokenizer_config.json"
            )
        return self.text.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of ``string``, without special tokens whatever is asked for."""
        return [int(i) for i in self.text.encode(string)]

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = []
        for (_, continuation_text), context, continuation in requests:
            if not continuation:
                raise DataError(f"the harness asks for the likelihood of {continuation_text!r}, which has no token")
            context = context or [self.prefix_token_id]
            if self.max_length is not None:
                # At least one token of context is left, even before a continuation longer than what may be seen.
                context = context[-max(1, self.max_length + 1 - len(continuation)) :]
            pairs.append((context, continuation))
        scores = dict(score_continuations(self.model, pairs, **self.reading))
        return [(scores[i].logprob, scores[i].is_greedy) for i in range(len(pairs))]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return each request's log-likelihood, and whether its continuation is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return each text's log-likelihood after EOS: one pass over it, its whole past in the state."""
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = [([self.prefix_token_id], tokens)] if tokens else []
            if self.max_length is not None and len(tokens) > self.max_length:
                rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
                windows = [make_disjoint_window(window) for window in rolling]
            pairs.extend(windows)
            owners.extend([number] * len(windows))
        totals = [0.0] * len(requests)
        for i, score in score_continuations(self.model, pairs, **self.reading):
            totals[owners[i]] += score.logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the model's continuation of each request, up to a stop string, EOS or the most tokens."""
        texts = [""] * len(requests)
        groups: dict[Sampling, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(sampling_of(request.args[1]), []).append(number)
        for sampling, numbers in groups.items():
            contexts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in numbers]
            if self.max_length is not None:
                room = self.max_length - sampling.max_tokens
                if room < 1:
                    raise ConfigError(
                        f"max_length {self.max_length} leaves no room for a context beside the {sampling.max_tokens} "
                        "tokens that a task generates; set --max-length above that, or leave it out"
                    )
                contexts = [context[-room:] for context in contexts]
            seeds = self._seeds_of([requests[i] for i in numbers])
            for i, text in generate_continuations(
                self.model, contexts, sampling, tokenizer=self.text, seeds=seeds, **self.reading
            ):
                texts[numbers[i]] = text
        return texts

    def _seeds_of(self, requests: Sequence[Instance]) -> list[int]:
        """Return a seed for each request, from its contents and the number of equal requests before it.

        The seed does not depend on the batch of the request.
        """
        asked: dict[str, int] = {}
        seeds = []
        for request in requests:
            said = json.dumps([self.seed, request.args], default=handle_non_serializable)
            asked[said] = asked.get(said, -1) + 1
            digest = hashlib.blake2b(f"{asked[said]} {said}".encode(), digest_size=8).digest()
            seeds.append(int.from_bytes(digest, "little"))
        return seeds


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """Return a task's ``generation_kwargs`` as what we generate by.

    Raises:
        ConfigError: They ask for something that we do not do.
    """
    values = dict(normalize_gen_kwargs(dict(options), DEFAULT_NEW_TOKENS))
    if unknown := sorted(values.keys() - set(_SAMPLING_OPTIONS)):
        raise ConfigError(
            f"generation option {unknown[0]!r} is not supported; allowed in generation_kwargs: "
            f"{', '.join(_SAMPLING_OPTIONS)}"
        )
    return Sampling(
        max_tokens=values["max_gen_toks"],
        until=tuple(text for text in values["until"] if text),
        temperature=float(values.get("temperature", 1.0)) if values["do_sample"] else 0.0,
        top_k=int(values.get("top_k", 0)),
        top_p=float(values.get("top_p", 1.0)),
    )


class _Answered(LM):
    """Gives the harness answers that were found before, in the order of its requests."""

    def __init__(self, asked: Mapping[str, Sequence[Instance]], answers: Mapping[str, Sequence[Any]]):
        super().__init__()
        self.asked, self.answers = asked, answers

    def _of(self, kind: str, requests: list[Instance]) -> list[Any]:
        if [r.args for r in requests] != [r.args for r in self.asked[kind]]:
            raise DataError(f"a task asked other {kind} questions the second time; its file makes them at random")
        return list(self.answers[kind])

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(logprob, is_greedy) for logprob, is_greedy in self._of("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._of("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._of("generate_until", requests)


class Harness:
    """The harness's tasks: the requests that they make, and the figures that they make of the answers.

    Args:
        tasks: Names or patterns of tasks, groups and tags, or paths of task files.
        include_path: A directory with more task files, or None.
        num_fewshot: Examples before a question; None leaves each task its own number.
        limit: Documents of each task, or below 1 their share; None for all.
        fewshot_seed: Of the choice of examples; None for the harness's own.

    Attributes:
        requests: Every request by the method of ``LM`` that answers it, in the harness's order.
        seeds: What the harness draws from.
        version: Of the package ``lm_eval``.

    Raises:
        ConfigError: A task is unknown, or not one for a language model.
        DataError: A task cannot be loaded, or has no document.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        include_path: str | None = None,
        num_fewshot: int | None = None,
        limit: float | None = None,
        fewshot_seed: int | None = None,
    ):
        self.version = version("lm_eval")
        self.limit = limit
        self.seeds = {
            "random": DEFAULT_RANDOM_SEED,
            "numpy": DEFAULT_OTHER_SEED,
            "fewshot": DEFAULT_OTHER_SEED if fewshot_seed is None else fewshot_seed,
        }
        self.loaded = load_tasks(tasks, include_path)
        for name, task in self.loaded["tasks"].items():
            if task.OUTPUT_TYPE not in _KINDS:
                raise ConfigError(f"task {name} has output type {task.OUTPUT_TYPE!r}; allowed: {', '.join(_KINDS)}")
            # As the harness does: a number of 0 in a task's file is meant, and stays.
            own = task.get_config("num_fewshot")
            task.set_config(key="num_fewshot", value=own if own == 0 or num_fewshot is None else num_fewshot)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        self.requests = self._ask()

    def _seed(self) -> None:
        random.seed(self.seeds["random"])
        np.random.seed(self.seeds["numpy"])
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=self.seeds["fewshot"])

    def _ask(self) -> dict[str, list[Instance]]:
        self._seed()
        found: dict[str, list[Instance]] = {}
        for name, task in self.loaded["tasks"].items():
            count = len(task.eval_docs)
            if not count:
                raise DataError(f"task {name} has no document to evaluate on")
            wanted = self.limit
            task.build_all_requests(
                limit=None if wanted is None else math.ceil(count * wanted) if wanted < 1 else int(wanted)
            )
            for instance in task.instances:
                found.setdefault(instance.request_type, []).extend([instance] * instance.repeats)
        for instance in found.get("generate_until", ()):
            sampling_of(instance.args[1])
        return found

    def digest(self) -> str:
        """Return a digest of all requests: the tasks' files, data and examples decide it."""
        asked = {kind: [request.args for request in requests] for kind, requests in self.requests.items()}
        said = json.dumps(asked, default=handle_non_serializable)
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def score(self, answers: Mapping[str, Sequence[Any]], *, bootstrap_iters: int) -> dict[str, Any]:
        """Return what ``lm_eval.evaluate`` makes of answers, JSON-able, figures that are not finite as null.

        Args:
            answers: One for each of :attr:`requests`.
            bootstrap_iters: Resamples of standard errors that have no closed form.

        Raises:
            DataError: A task's requests are not the same as before.
        """
        self._seed()
        results = evaluate(
            _Answered(self.requests, answers),
            self.loaded,
            limit=self.limit,
            bootstrap_iters=bootstrap_iters,
            log_samples=True,
        )
        return _plain(json.loads(json.dumps(results, default=handle_non_serializable)))


def _plain(value: Any) -> Any:
    """Return a JSON value with null in place of what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_tasks(names: Sequence[str], include_path: str | None) -> Any:
    """Return the harness's tasks and groups of these names.

    Raises:
        ConfigError: A name or pattern fits no task, group or tag and is no task file.
        DataError: A task cannot be loaded.
    """
    found = None
    if include_path is not None:
        # To read the harness's own 14,000 names takes many seconds; those of the user's directory may be all.
        own = TaskManager(include_path=include_path, include_defaults=False)
        found = _wanted(names, own)
    manager = own if found is not None else TaskManager(include_path=include_path)
    found = found if found is not None else _wanted(names, manager)
    if found is None:
        unknown = next(name for name in names if not _fitting(name, manager))
        near = difflib.get_close_matches(unknown, manager.all_tasks, n=_NEAR_MATCHES)
        hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` prints the harness's own"
        raise ConfigError(f"task {unknown!r} is unknown to lm-eval {version('lm_eval')}; {hint}")
    try:
        return manager.load(found)
    except Exception as error:
        # Whatever the many data sets' loaders raise: no network, a moved data set, a missing file, a wrong key.
        raise DataError(
            f"tasks {', '.join(names)} cannot be loaded ({type(error).__name__}: {error}); without a network their "
            "data must be in the cache of the package datasets, or in local files (docs/lm_eval.md)"
        ) from error


def _wanted(names: Sequence[str], manager: TaskManager) -> list[str] | None:
    """Return all that the names stand for, each once; None where one stands for nothing."""
    fitting = [_fitting(name, manager) for name in names]
    return list(dict.fromkeys(name for found in fitting for name in found)) if all(fitting) else None


def _fitting(name: str, manager: TaskManager) -> list[str]:
    if Path(name).suffix in (".yaml", ".yml") and Path(name).is_file():
        return [name]
    return [known for known in manager.all_tasks if fnmatchcase(known, name)]
