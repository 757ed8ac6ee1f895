"""Opening a checkpoint of any layout as a model: what the tools and the loader of models share."""

from __future__ import annotations

from pathlib import Path

from statex_dist.checkpoint.formats.dcp_source import DcpSource
from statex_dist.checkpoint.formats.sources import check_records, open_files
from statex_dist.checkpoint.formats.tensor_io import TensorSource
from statex_dist.models.config import read_config_dict
from statex_dist.models.kinds import config_from_dict, find_family
from statex_dist.models.megatron_source import join_parts


def open_source(path: str | Path, *, verify: bool = True, describe: bool = False) -> TensorSource:
    """Open a checkpoint of any layout that we read; arguments and errors of :func:`open_files`."""
    source = open_files(path, verify=verify, describe=describe)
    if isinstance(source, DcpSource) and source.facts.model_dir is not None:
        values = read_config_dict(source.facts.model_dir)
        if find_family(values):
            source = join_parts(source, config_from_dict(values))
    check_records(source)
    return source
