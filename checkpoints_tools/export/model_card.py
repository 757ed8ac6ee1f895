"""The model card (``README.md``) of an export: what is known of the model, and nothing else.

Facts come from the checkpoint's configuration and plan, the expansion's account, the run that it was trained in, and
result files that the user names. A card that came with the source keeps its header, and its text below ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from checkpoints_tools.export.card_evaluation import Evaluated
from checkpoints_tools.export.card_training import run_of, setting, spans_of, training_facts
from checkpoints_tools.export.hf_export import closed_note, export_notes, form_of, plain_class
from checkpoints_tools.export.hf_tokenizer import Kind
from checkpoints_tools.io.documents import read_report
from statex_dist import __version__
from statex_dist.checkpoint.formats.places import check_link
from statex_dist.checkpoint.formats.tensor_io import SourceFacts
from statex_dist.checkpoint.history import read_history
from statex_dist.checkpoint.layout import CHECKPOINTS_DIR, MODEL_DIR, TRAIN_LENGTH_KEY
from statex_dist.models.config import ModelConfig
from statex_dist.state.geometry import FeatureMap
from statex_dist.state.plan import ExpansionPlan

CARD_NAME = "README.md"

_OUR_TAG = "statex"
_ORIGINAL = "## Original model card"
_HEADER = re.compile(r"\A---\n(.*?)\n---\n", flags=re.DOTALL)
_BASE = re.compile(r"^Base model: (.+)\.$", flags=re.MULTILINE)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """Facts that a model card shows.

    Attributes:
        values: Contents of the source's ``config.json``.
        config: The same, typed.
        source: Facts about the checkpoint that is exported.
        parameters: Elements of the floating-point tensors.
        dtypes: Their dtypes, by torch's names, most bytes first.
        tokenizer: Kind of the tokenizer that the export holds; None if it holds none.
        evaluations: Results that the card shows.
    """

    values: dict[str, Any]
    config: ModelConfig
    source: SourceFacts
    parameters: int
    dtypes: Sequence[str]
    tokenizer: Kind | None
    evaluations: Sequence[Evaluated] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _EarlierCard:
    """The card that came with the source.

    Attributes:
        header: Its metadata.
        original: Text that we did not write.
        base: What an earlier export named as the base.
        training: What an earlier export told of the training; empty where none did.
        evaluation: The same of the evaluation.
    """

    header: dict[str, Any] = field(default_factory=dict)
    original: str = ""
    base: str | None = None
    training: str = ""
    evaluation: str = ""


def model_card(facts: CardFacts) -> str:
    """Return the text of ``README.md``.

    Raises:
        CheckpointError: A file that the card tells of is damaged, or the earlier card is a link out of its directory.
    """
    earlier = _earlier_card(facts.source.model_dir)
    run = run_of(facts.source.path)
    base = _base_model(facts, run) or earlier.base
    sections = [
        _introduction(facts),
        f"Base model: {base}." if base else "",
        _plan(facts),
        _numbers(facts),
        # Of a training that ended before an earlier export, the earlier card knows more than the checkpoint.
        earlier.training or _training(facts, run),
        _evaluation(facts) or earlier.evaluation,
        *_use(facts),
        f"{_ORIGINAL}\n\n{earlier.original}" if earlier.original else "",
    ]
    header = yaml.safe_dump(_metadata(facts, earlier.header, base), sort_keys=False, allow_unicode=True)
    expanded = ", state expanded" if facts.config.statex else ""
    title = f"Recurrent language model ({facts.config.MODEL_TYPE}){expanded}"
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{header}---\n\n# {title}\n\n{body}\n"


def _earlier_card(model_dir: Path | None) -> _EarlierCard:
    path = None if model_dir is None else model_dir / CARD_NAME
    if path is None or not path.is_file():
        return _EarlierCard()
    check_link(path, path.parent)
    text = path.read_text(encoding="utf-8", errors="replace")
    match = _HEADER.match(text)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        header = None
    if match is None or not isinstance(header, dict):
        # Text that is no header stays text.
        return _EarlierCard(original=text.strip())
    body = text[match.end() :]
    if _OUR_TAG not in (header.get("tags") or []):
        return _EarlierCard(header=header, original=body.strip())
    ours, _, original = body.partition(_ORIGINAL)
    told = {part.splitlines()[0]: f"## {part.strip()}" for part in ours.split("\n## ")[1:]}
    base = _BASE.search(ours)
    return _EarlierCard(
        header=header,
        original=original.strip(),
        base=base[1] if base else None,
        training=told.get("Training", ""),
        evaluation=told.get("Evaluation", ""),
    )


def _base_model(facts: CardFacts, run: Path | None) -> str | None:
    """Return what the model was made from, as far as that is known: a name on the hub, or the end of a path."""
    named = facts.values.get("_name_or_path")
    if isinstance(named, str) and _HUB_NAME.fullmatch(named) and not Path(named).exists():
        return named
    account = read_report(facts.source.model_dir) if facts.source.model_dir is not None else None
    # The first start has the model that the run began with; a later one may be given any of the same shape.
    spans = [] if account is not None else spans_of(facts.source.path, run, None)
    if spans and spans[0].first_step == 1:
        start = setting(spans[0].settings, "model.path")
        if isinstance(start, str) and start:
            account = read_report(Path(start)) if Path(start).is_dir() else None
            if account is None:
                return _place(start)
    return _place(account["source"]) if account and isinstance(account.get("source"), str) else None


def _place(path: str) -> str | None:
    """Return what tells a directory from others: its name and the one above, without those that every run has."""
    names = [name for name in Path(path).parts if name not in ("/", ".", "..", CHECKPOINTS_DIR, MODEL_DIR)]
    return f"`{'/'.join(names[-2:])}`" if names else None


def _metadata(facts: CardFacts, header: dict[str, Any], base: str | None) -> dict[str, Any]:
    tags = [_OUR_TAG, facts.config.MODEL_TYPE, "recurrent"] + (["state-expansion"] if facts.config.statex else [])
    given = header.get("tags") or []
    tags += [tag for tag in given if tag not in tags] if isinstance(given, list) else []
    ours: dict[str, Any] = {"pipeline_tag": "text-generation", "tags": tags}
    if form_of(facts.config) != "none":
        ours = {"library_name": "transformers", **ours}
    elif header.get("library_name") == "transformers":
        header = {key: value for key, value in header.items() if key != "library_name"}
    if base and _HUB_NAME.fullmatch(base):
        ours["base_model"] = base
    return {**header, **ours}


def _introduction(facts: CardFacts) -> str:
    grown = " whose recurrent state was made larger" if facts.config.statex else ""
    step = facts.source.info.get("step")
    trained = run_of(facts.source.path) or read_history(facts.source.path)
    at = f", step {step:,} of a training run" if isinstance(step, int) and trained else ""
    return (
        f"A recurrent language model of the family `{facts.config.MODEL_TYPE}`{grown}, exported by statex-dist "
        f"{__version__} from a checkpoint of layout `{facts.source.kind}`{at}."
    )


def _plan(facts: CardFacts) -> str:
    config = facts.config
    if config.statex is None:
        return ""
    before = config.replace(statex=None)
    rows = [
        (
            *(e.layer, e.op, f"x{e.factor}", e.init + (", dynamics reset" if e.reset_dynamics else "")),
            *(f"{c.layer_geometry(e.layer).elements:,}" for c in (before, config)),
        )
        for e in config.statex.layers
    ]
    names = ("layer", "operation", "factor", "start", "state elements before", "after")
    parts = ["## Expansion", _table(names, rows), *_features(config.statex)]
    return "\n\n".join([*parts, "The plan is also in `config.json`, under `statex`."])


def _features(plan: ExpansionPlan) -> Iterator[str]:
    """Yield a paragraph for each kind of features that layers have."""
    layers: dict[FeatureMap, list[int]] = {}
    for expansion in plan.layers:
        if expansion.features is not None:
            layers.setdefault(expansion.features, []).append(expansion.layer)
    for features, found in layers.items():
        rolls = ", ".join(f"{roll} (squares)" if roll == 0 else str(roll) for roll in features.rolls)
        source = "y = relu(x)" if features.relu else "y = x"
        scaled = ", scaled to the norm of `x`" if features.match_norm else ""
        yield (
            f"Features in layers {', '.join(map(str, found))}: of the keys and queries `x` of a head, the products "
            f"`y * roll(y, r)` with `{source}` and rolls `r` = {rolls}{scaled}, are further key channels. "
            "`feature_gain` has a gain for each product. All gains were 0 when the state was expanded, which left the "
            "function as it was."
        )


def _numbers(facts: CardFacts) -> str:
    config = facts.config
    rows = [("parameters", f"{facts.parameters:,}"), ("layers", f"{config.num_hidden_layers:,}")]
    if facts.dtypes:
        rows.append(("stored in", ", ".join(facts.dtypes)))
    versions = [("", config)] if config.statex is None else [(" before", config.replace(statex=None)), ("", config)]
    for when, version in versions:
        size = sum(version.layer_geometry(layer).state_bytes for layer in version.recurrent_layers)
        rows.append((f"state elements{when}", f"{version.state_elements:,}"))
        rows.append((f"bytes of state per sequence{when} (fp32, convolutions included)", f"{size:,}"))
    length = "The state has this size whatever the length of the text."
    if config.kv_elements:
        rows.append(("keys and values per token, of softmax attention", f"{config.kv_elements:,}"))
        length += " Keys and values are kept of every token."
    return f"## Numbers\n\n{_table(('', ''), rows)}\n\n{length}"


def _training(facts: CardFacts, run: Path | None) -> str:
    step, length = facts.source.info.get("step"), facts.values.get(TRAIN_LENGTH_KEY)
    rows: list[tuple[str, str]] = []
    if run is not None or read_history(facts.source.path):
        if isinstance(step, int):
            rows.append(("optimizer steps", f"{step:,}"))
        rows += training_facts(facts.source.path, run, step if isinstance(step, int) else None)
    if isinstance(length, int):
        rows.append(("longest text in training (tokens)", f"{length:,}"))
    return f"## Training\n\n{_table(('', ''), rows)}" if rows else ""


def _evaluation(facts: CardFacts) -> str:
    parts = ["## Evaluation", "By `statex eval`; in brackets 95 % intervals."]
    for found in facts.evaluations:
        data = f" on `{found.data}`" if found.data else ""
        parts += [f"### {found.suite}{data}", _table(("", ""), found.figures)]
    return "\n\n".join(parts) if facts.evaluations else ""


def _use(facts: CardFacts) -> Iterator[str]:
    yield "## Use"
    form, tokenizer = form_of(facts.config), facts.tokenizer
    if form == "none":
        note = closed_note(facts.config)
        yield f"{note[0].upper()}{note[1:]}."
    else:
        yield "\n".join(["```python", *_code(form, tokenizer), "```"])
    if tokenizer is None:
        yield "No tokenizer is included: the checkpoint had none. Texts need the one that the model was trained with."
    if form == "remote_code":
        closed = ", nor does another library" if facts.config.ours_alone else ""
        memory = "in constant memory" if not facts.config.attention_layers else "which needs less memory at once"
        yield (
            "transformers has no class for these layers, so the code comes with the weights, in `modeling_statex.py`: "
            f"plain PyTorch, for CPU and GPU. Without `trust_remote_code=True`, transformers does not open it{closed}. "
            "Prompts of unequal length are padded on the left. "
            f"`generate(..., prefill_chunk_size=4096)` reads a long prompt in pieces, {memory}."
        )
        if host := plain_class(facts.config) if facts.config.is_mixed else None:
            yield f"Attention and the other layers are those of transformers' `{host}`, from which the code derives."
    elif form == "plain":
        notes = "".join(f" Note: {note}." for note in export_notes(facts.config))
        yield f"transformers' own class opens it; no other code is needed.{notes}"
    if facts.config.obstacle is None:
        option = "" if tokenizer else " --tokenizer DIR"
        command = f'statex generate --model .{option} --prompt "Once upon a time"'
        yield f"With statex-dist, on its scan kernels:\n\n    {command}"


def _code(form: str, tokenizer: Kind | None) -> Iterator[str]:
    """Yield the lines that open an export and write a text with it."""
    trust = ", trust_remote_code=True" if form == "remote_code" else ""
    # AutoTokenizer takes the class that the files name, and some of transformers 5 put their own normalizer and
    # pre-tokenizer in place of the file's: other ids than those of the training.
    kind = "AutoTokenizer" if tokenizer == "files" else "PreTrainedTokenizerFast"
    yield f"from transformers import AutoModelForCausalLM{f', {kind}' if tokenizer else ''}\n"
    yield 'directory = "."  # where this file is'
    yield f"model = AutoModelForCausalLM.from_pretrained(directory{trust})"
    if tokenizer is None:
        return
    yield f"tokenizer = {kind}.from_pretrained(directory{trust if tokenizer == 'files' else ''})"
    settings = 'add_special_tokens=False, return_tensors="pt", return_token_type_ids=False'
    yield f'inputs = tokenizer("Once upon a time", {settings})'
    yield "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
