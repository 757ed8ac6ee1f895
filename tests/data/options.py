"""Plans, loaders and datasets made from options by name, whichever value object takes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from statex_dist.data import prepare as module
from statex_dist.data.config import ONLY_SOURCE
from statex_dist.data.corpus.document_rules import DocumentRules
from statex_dist.data.corpus.source import WorkOptions
from statex_dist.data.loader import LoaderOptions, PackedLoader, StepShare
from statex_dist.data.mixture import Stage
from statex_dist.data.plan import PackPlan, PackPlanOptions
from statex_dist.data.store import ShardStore


def values(options: dict[str, Any], *classes: type) -> list[Any]:
    """An instance of each class, with its fields among ``options``; every option must be a field."""
    names = [{field.name for field in dataclasses.fields(cls)} for cls in classes]
    unknown = set(options).difference(*names)
    assert not unknown, unknown
    return [
        cls(**{key: options[key] for key in options if key in own}) for cls, own in zip(classes, names, strict=True)
    ]


def make_plan(store: ShardStore, *, lanes: int = 1, **options) -> PackPlan:
    return PackPlan(store, PackPlanOptions(**options), lanes=lanes)


def make_loader(store: ShardStore | Mapping[str, ShardStore], *, seq_len=None, stages=None, **options) -> PackedLoader:
    stores = store if isinstance(store, Mapping) else {ONLY_SOURCE: store}
    share, reading, plan = values(options, StepShare, LoaderOptions, PackPlanOptions)
    return PackedLoader(stores, stages or [Stage(seq_len=seq_len)], share, reading, plan)


def prepare(inputs, out, tokenizer="bytes", *, merge: bool = False, **options) -> module.PrepareSummary:
    shards, rules, work = values(options, module.ShardOptions, DocumentRules, WorkOptions)
    return module.prepare(inputs, out, tokenizer, rules=rules, shards=shards, options=work, merge=merge)


def prepare_part(inputs, out, tokenizer, part, rules: DocumentRules | None = None, **options) -> module.PartSummary:
    (work,) = values(options, WorkOptions)
    return module.prepare_part(inputs, out, tokenizer, part, rules=rules, options=work)
