"""Every path and marker of a run's directory.

    RUN/
      config.yaml                 the resolved configuration of the last start
      config-until-step40.yaml    that of an earlier one, where it was another
      metrics.jsonl               one line per logged step
      status.json                 how the last start of the run is doing, or how it ended
      stacks/rank0.txt            where each rank was when the watchdog ended the job
      stacks/collectives_rank0    its last collectives, for torchfrtrace
      logs/rank0.log              what each rank has logged, over all starts
      checkpoints/
        best                      a link to the tag with the least validation loss, where the run keeps it
        latest                    the newest complete tag, written last (DeepSpeed's own marker)
        global_step100/           one tag; complete if and only if it holds MANIFEST.json
          zero_pp_rank_0_mp_rank_00_model_states.pt       DeepSpeed's files, one pair per rank
          bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt
          ranks-00256/                                    from 257 ranks on those files are in folders of 256 ranks
          model/config.json                               the model's configuration and tokenizer marker
          training.json                                   the settings of its steps
          MANIFEST.json
        global_step100-ranks2/    the same step, resharded for two ranks
        damaged-global_step80/    one that was found damaged, set aside
        .tmp-global_step200/      a save that has not been committed (or was killed)

Those are the files of ZeRO stage 3. In stages 0 to 2 rank 0 writes ``mp_rank_00_model_states.pt`` with the whole model
(in stage 0 also with the optimizer's states), and every rank ``rank_R_client_states.pt``; the ``optim_states`` of each
rank are there in stages 1 and 2. A plain (one process, no DeepSpeed) run writes ``plain_state.pt`` alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from statex_dist.durable.files import TEMPORARY_PREFIX as TEMPORARY_PREFIX

CHECKPOINTS_DIR = "checkpoints"
LATEST_NAME = "latest"
BEST_NAME = "best"
MANIFEST_NAME = "MANIFEST.json"
MODEL_DIR = "model"
CONFIG_NAME = "config.json"
STATES_FORMAT = "statex-states"
"""Name of the format in the safetensors header of a file of states."""

TRAIN_LENGTH_KEY = "train_length"
"""Key of ``config.json`` with the longest text that the weights were trained on, in tokens; no part of the model."""

SETTINGS_NAME = "config.yaml"
HISTORY_NAME = "training.json"
PLAIN_STATE_NAME = "plain_state.pt"
DAMAGED_PREFIX = "damaged-"
STATUS_NAME = "status.json"
STACKS_DIR = "stacks"
LOGS_DIR = "logs"

FIRST_RANK_FOLDER = "ranks-00000"
RANKS_PER_FOLDER = 256
"""With more ranks than these, a checkpoint's rank files lie in folders of that number of ranks."""

_TAG = re.compile(r"global_step(\d+)(?:-ranks([1-9]\d*))?", flags=re.ASCII)
_RANK_FOLDER = re.compile(r"ranks-\d{5,}", flags=re.ASCII)
_RANK_FILE = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_)?rank_(\d+)_(?:mp_rank_\d+_(?:model|optim)|client)_states\.pt$")


def tag_of(step: int, ranks: int | None = None) -> str:
    """Return the tag of an optimizer step, or of its copy that was resharded for a number of ranks."""
    return f"global_step{step}" if ranks is None else f"global_step{step}-ranks{ranks}"


def step_of(tag: str) -> int | None:
    """Return the optimizer step of a tag, or None for a name that is not one of our tags."""
    match = _TAG.fullmatch(tag)
    return int(match[1]) if match else None


def ranks_of(tag: str) -> int | None:
    """Return the number of ranks that a tag was resharded for, or None of a tag as it was saved, or another name."""
    match = _TAG.fullmatch(tag)
    return int(match[2]) if match and match[2] else None


def is_tag_name(name: str) -> bool:
    """Return whether a name, of anybody's tag, is that of an entry of a directory and not too long for one."""
    return 0 < len(name.encode()) <= 255 and Path(name).name == name and name not in (".", "..") and "\0" not in name


def tag_named_in(directory: Path) -> Path | None:
    """Return the tag that ``latest`` in a directory names, or None where there is none."""
    latest = directory / LATEST_NAME
    name = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    tag = directory / name
    return tag if is_tag_name(name) and tag.is_dir() else None


def client_file(rank: int) -> str:
    """Return the name of the file with a rank's client state, of ZeRO stages 0 to 2."""
    return f"rank_{rank}_client_states.pt"


def rank_of(file_name: str) -> int | None:
    """Return the rank that wrote a file of one rank, by its name or path, or None for any other file."""
    match = _RANK_FILE.match(file_name.rpartition("/")[2])
    return int(match[1]) if match else None


def rank_folder(rank: int, world_size: int) -> str:
    """Return the folder of a rank's files in a checkpoint of ``world_size`` ranks; empty where there are none."""
    return f"ranks-{rank // RANKS_PER_FOLDER * RANKS_PER_FOLDER:05d}" if world_size > RANKS_PER_FOLDER else ""


def rank_folders(world_size: int) -> list[str]:
    """Return the folders of the rank files of a checkpoint; none where they lie in the checkpoint itself."""
    return sorted({rank_folder(rank, world_size) for rank in range(0, world_size, RANKS_PER_FOLDER)} - {""})


def placed_name(name: str, world_size: int) -> str:
    """Return the path, in a checkpoint of ``world_size`` ranks, of a file that an engine names."""
    rank = rank_of(name)
    folder = "" if rank is None else rank_folder(rank, world_size)
    return f"{folder}/{name}" if folder else name


def tag_files(directory: Path) -> list[Path]:
    """Return the entries of a checkpoint's directory, those of the folders of rank files in place of the folders."""
    entries = sorted(directory.iterdir())
    folders = [path for path in entries if _RANK_FOLDER.fullmatch(path.name) and path.is_dir()]
    return [path for path in entries if path not in folders] + [p for f in folders for p in sorted(f.iterdir())]


def complete_tags(checkpoints: Path) -> list[str]:
    """Return the tags that hold a manifest, newest first; of one step the resharded copies come before the original."""
    if not checkpoints.is_dir():
        return []
    tags = [p.name for p in checkpoints.iterdir() if step_of(p.name) is not None and (p / MANIFEST_NAME).is_file()]
    return sorted(tags, key=lambda tag: (step_of(tag) or 0, ranks_of(tag) or 0, tag), reverse=True)
