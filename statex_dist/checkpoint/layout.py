"""Every path and marker of a run's directory.

    RUN/
      config.yaml                 the resolved configuration
      metrics.jsonl               one line per logged step
      checkpoints/
        latest                    the newest complete tag, written last (DeepSpeed's own marker)
        global_step100/           one tag; complete if and only if it holds MANIFEST.json
          zero_pp_rank_0_mp_rank_00_model_states.pt       DeepSpeed's files, one pair per rank
          bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt
          model/config.json                               the model's configuration and tokenizer marker
          MANIFEST.json
        .tmp-global_step200/      a save that has not been committed (or was killed)

A plain (one process, no DeepSpeed) run writes ``plain_state.pt`` in place of the rank files.
"""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS_DIR = "checkpoints"
LATEST_NAME = "latest"
MANIFEST_NAME = "MANIFEST.json"
MODEL_DIR = "model"
CONFIG_NAME = "config.json"
PLAIN_STATE_NAME = "plain_state.pt"
TEMPORARY_PREFIX = ".tmp-"

_TAG = re.compile(r"global_step(\d+)$")
_RANK_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_\d+_(?:model|optim)_states\.pt$")


def tag_of(step: int) -> str:
    """Return the tag of an optimizer step."""
    return f"global_step{step}"


def step_of(tag: str) -> int | None:
    """Return the optimizer step of a tag, or None for a name that is not one of our tags."""
    match = _TAG.match(tag)
    return int(match[1]) if match else None


def rank_of(file_name: str) -> int | None:
    """Return the data-parallel rank that wrote a ZeRO file, or None for any other file."""
    match = _RANK_FILE.match(file_name)
    return int(match[1]) if match else None


def complete_tags(checkpoints: Path) -> list[str]:
    """Return the tags that hold a manifest, newest first."""
    if not checkpoints.is_dir():
        return []
    tags = [p.name for p in checkpoints.iterdir() if step_of(p.name) is not None and (p / MANIFEST_NAME).is_file()]
    return sorted(tags, key=lambda tag: step_of(tag) or 0, reverse=True)
