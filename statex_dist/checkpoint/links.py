"""Which links a model directory may hold beside its weights.

A file that goes along with a model (tokenizer, code, generation settings) is copied by its contents. If it is a link to
somewhere else, the copy would publish a private file. So links may lead to files of the same
directory alone, or, in a snapshot of the Hugging Face hub's cache, to the blobs of the same repository::

    models--owner--name/
      blobs/4f7b...              the contents
      snapshots/REVISION/        tokenizer.json -> ../../blobs/4f7b...
"""

from __future__ import annotations

from pathlib import Path

from statex_dist.errors import CheckpointError

_HUB_PREFIXES = ("models--", "datasets--", "spaces--")


def check_link(path: Path, directory: Path) -> None:
    """Raise if a file of a directory is a link that leads out of it.

    Args:
        path: The file; its name may hold folders below ``directory``.
        directory: The directory.

    Raises:
        CheckpointError: It leads elsewhere, or in a circle.
    """
    try:
        real, root = path.resolve(strict=True), directory.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be followed: {getattr(error, 'strerror', None) or error}") from None
    allowed = [root]
    for folder in (root, *root.parents):
        if folder.name == "snapshots" and folder.parent.name.startswith(_HUB_PREFIXES):
            allowed.append(folder.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path} is a link to {real}, outside its directory; replace it by a copy of the file, or remove it"
        )
