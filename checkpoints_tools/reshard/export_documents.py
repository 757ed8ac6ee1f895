"""The documents of a directory that transformers opens: config, code, tokenizer, generation settings and model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints_tools.export.card_evaluation import read_evaluations
from checkpoints_tools.export.hf_export import export_documents, export_notes
from checkpoints_tools.export.hf_tokenizer import GivenTokenizer, given_tokenizer, tokenizer_kind
from checkpoints_tools.export.model_card import CARD_NAME, CardFacts, model_card
from checkpoints_tools.formats.registry import TargetRequest
from checkpoints_tools.io.config_dtype import float_dtypes, main_dtype
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.dtypes import FLOATS, TORCH_NAMES
from statex_dist.errors import ConfigError
from statex_dist.models.config import CONFIG_NAME, ModelConfig


def make_documents(
    request: TargetRequest, jobs: Sequence[TensorJob], evaluations: Sequence[str], tokenizer: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Return documents by name, and notes for the user.

    Args:
        request: The model.
        jobs: Its tensors, as they are stored.
        evaluations: Directories of ``statex eval`` whose results the model card tells.
        tokenizer: ``bytes`` or a directory; the model has no tokenizer then.

    Raises:
        ConfigError: The model has a tokenizer already.
        CheckpointError: A file that goes along is damaged, or options need a model of a known family.
    """
    documents = request.documents(main_dtype(job.info for job in jobs))
    if request.config is None:
        if evaluations or tokenizer is not None:
            request.family_config("hf with --evaluation" if evaluations else "hf with --tokenizer")
        return documents, []
    model_dir = request.source.facts.model_dir
    new = None if tokenizer is None else _new_tokenizer(tokenizer, request.config, model_dir)
    documents |= export_documents(documents[CONFIG_NAME], request.config, model_dir, new)
    assert request.values is not None
    card = CardFacts(
        values=request.values,
        config=request.config,
        source=request.source.facts,
        parameters=sum(job.info.numel for job in jobs if job.info.dtype in FLOATS),
        dtypes=[TORCH_NAMES[dtype] for dtype in float_dtypes(job.info for job in jobs)],
        tokenizer=tokenizer_kind(model_dir, new),
        evaluations=read_evaluations(evaluations, state_numbers=request.config.state_numbers),
    )
    documents[CARD_NAME] = model_card(card)
    return documents, export_notes(request.config)


def _new_tokenizer(spec: str, config: ModelConfig, model_dir: Path | None) -> GivenTokenizer:
    """Return the tokenizer for a model that has none, or raise where it has one."""
    if tokenizer_kind(model_dir) is not None:
        raise ConfigError(f"--tokenizer {spec}: {model_dir} has a tokenizer already, which goes along")
    return given_tokenizer(spec, vocab_size=config.vocab_size)
