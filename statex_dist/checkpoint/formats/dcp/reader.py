"""A torch distributed checkpoint (DCP, megatron-core's ``torch_dist``) as tensors, under the names that it has."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from statex_dist.checkpoint.formats.dcp.chunks import Places, Strided, open_chunks
from statex_dist.checkpoint.formats.dcp.format import METADATA_NAME, read_metadata
from statex_dist.checkpoint.formats.places import step_of_directory
from statex_dist.checkpoint.formats.registry import Layout
from statex_dist.checkpoint.formats.tensor_io import Held, Pieces, SourceFacts, TensorInfo, TensorSource
from statex_dist.checkpoint.formats.torch_archive.zip import TorchArchive
from statex_dist.checkpoint.json_file import read_json
from statex_dist.errors import CheckpointError, reason, shown

logger = logging.getLogger(__name__)

CONFIG_FILE = "metadata.json"
"""megatron-core's own file, which says in which format the rest is; DCP of others lack it."""

COMMON_FILE = "common.pt"

CHECKPOINT_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

SIDE_FILES = (METADATA_NAME, CONFIG_FILE, COMMON_FILE)
"""Files of a checkpoint beside its ``.distcp`` files."""

_MAX_JSON_BYTES = 1 << 20


class DcpSource(TensorSource):
    """A torch distributed checkpoint.

    Attributes:
        places: Where each tensor lies.
        ignored: Names of entries that are left out: pickled objects, and tensors that are not of the model.

    Args:
        facts: What is known of the checkpoint.
        infos: Every tensor, by name.
        places: Where each lies.
        archives: The files, as :func:`statex_dist.checkpoint.formats.dcp.chunks.open_chunks` gives them.
        ignored: Names of entries that are left out.
    """

    in_parts = True

    def __init__(
        self,
        facts: SourceFacts,
        infos: Mapping[str, TensorInfo],
        places: Places,
        archives: Iterable[TorchArchive],
        ignored: Iterable[str],
    ):
        self.places, self._archives, self.ignored = places, list(archives), tuple(ignored)
        super().__init__(facts, infos, [facts.path / METADATA_NAME, *(archive.path for archive in self._archives)])

    @classmethod
    def open(cls, directory: Path, facts: SourceFacts | None = None) -> DcpSource:
        """Open the directory with ``.metadata``.

        Args:
            directory: The directory.
            facts: Facts about the checkpoint; None takes them from the directory itself.

        Raises:
            CheckpointError: A file is missing, damaged or refused, or chunks do not make up the tensors.
        """
        _check_backend(directory / CONFIG_FILE)
        contents = read_metadata(directory / METADATA_NAME)
        tensors, chosen = contents.of_model(directory)
        places, archives = open_chunks(directory, tensors.values())
        infos = {name: tensor.info for name, tensor in tensors.items()}
        ignored = [*contents.ignored, *(name for name in contents.tensors if name not in chosen.names)]
        facts = (facts or SourceFacts.of_directory("megatron", directory)).with_notes(chosen.note())
        return cls(facts, infos, places, archives, ignored)

    def stored_pieces(self, name: str) -> Pieces:
        """Return where a tensor lies: a piece for each chunk."""
        found = [piece.held() if isinstance(piece, Strided) else piece for piece in self.places[name]]
        return found or [Held(0, b"")]

    def archives(self) -> Iterable[TorchArchive]:
        """Return the files: their entries are the storages of all their chunks."""
        return self._archives


def _check_backend(path: Path) -> None:
    """Raise if Megatron says that the checkpoint is of a format of another kind."""
    if not path.is_file():
        return
    try:
        backend = read_json(path, most=_MAX_JSON_BYTES)["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    if backend != CHECKPOINT_CONFIG["sharded_backend"]:
        raise CheckpointError(f"{path} names the format {shown(backend)}; only torch_dist is read")


class Dcp(Layout):
    """The layout of torch distributed checkpoints."""

    has_checksums = lists_tensors = True

    @staticmethod
    def detect(directory: Path) -> bool:
        """Return whether a directory holds ``.metadata``."""
        return (directory / METADATA_NAME).is_file()

    @staticmethod
    def read(directory: Path, facts: SourceFacts, *, describe: bool) -> TensorSource:
        """Open a directory; without a manifest its name says the step."""
        if not facts.info and (step := step_of_directory(directory)) is not None:
            facts = replace(facts, info={"step": step})
        return DcpSource.open(directory, facts)
