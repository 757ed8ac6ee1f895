"""Whether one checkpoint is what its writer wrote: held to its manifest, and to the checksums inside its files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from checkpoints_tools.io.target_writer import DEFAULT_WORKERS
from checkpoints_tools.io.tensor_stream import TensorJob
from checkpoints_tools.verify.compare import read_all
from checkpoints_tools.verify.verify import Verdict
from statex_dist.checkpoint.formats.piece_io import SourceCrcs
from statex_dist.checkpoint.formats.tensor_io import Progress
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.errors import CheckpointError
from statex_dist.models.source import open_source


def verify_alone(path: str | Path, *, workers: int = DEFAULT_WORKERS, progress: Progress | None = None) -> Verdict:
    """Read a whole checkpoint and hold it to everything that is known of it.

    Of files written by torch or DeepSpeed every entry has a CRC-32, so that a flipped byte is found without a manifest.
    With one, also a file or a tensor that was exchanged for another sound one is found.

    Args:
        path: Whatever :func:`statex_dist.models.source.open_source` opens.
        workers: Tensors read at a time.
        progress: Told of the bytes read.

    Raises:
        CheckpointError: The checkpoint cannot be opened: files are missing, truncated or of two saves.
    """
    source = open_source(path)
    facts = source.facts
    verdict = Verdict(first=str(facts.path), second=None)
    manifest = Manifest.read(facts.path) if (facts.path / MANIFEST_NAME).is_file() else None
    weights = {file.name for file in source.files}
    for name, record in (manifest.files if manifest else {}).items():
        # An archive of which the directory alone is recorded is held to it when it is opened, and to its CRCs below.
        if name not in weights or record.xxh3_128 is not None:
            with _noted(verdict):
                record.check(facts.path / name)
    jobs = [
        TensorJob.copy(source.of_state(state).info(name), state=state)
        for state in (None, *source.states())
        for name in source.of_state(state).owned()
    ]
    archives = list(source.archives())
    crcs = SourceCrcs(archives)
    with _noted(verdict):
        read_all(jobs, source, crcs, workers=workers, progress=progress)
    saved = [path for path in source.files if path.suffix in (".pt", ".bin")]
    if saved:
        from statex_dist.checkpoint.formats.torch_archive.zip import check_small_entries  # only where there are some

        for path in saved:
            with _noted(verdict):
                check_small_entries(path)
    if archives:
        with _noted(verdict):
            verdict.tensors["storages by CRC-32"] = crcs.finish(everything=True)
    if manifest is not None and manifest.tensors:
        verdict.tensors["tensors by digest"] = len(manifest.tensors) + sum(map(len, manifest.states.values()))
    elif manifest is not None:
        verdict.tensors["files by digest"] = len(manifest.files)
    elif not archives:
        verdict.notes.append(
            f"no {MANIFEST_NAME}, and safetensors have no checksums: only names and sizes were checked"
        )
    else:
        verdict.notes.append(
            f"no {MANIFEST_NAME}: a whole file that was exchanged for a sound one would not be noticed"
        )
    return verdict


@contextlib.contextmanager
def _noted(verdict: Verdict) -> Iterator[None]:
    """Enter damage in the verdict and go on: there may be more."""
    try:
        yield
    except CheckpointError as error:
        verdict.differences.append(str(error))
