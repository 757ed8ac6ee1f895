"""A toy layout: ``toy.json`` with shape, dtype and offset of each tensor, and ``toy.raw`` with all values."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints_tools.formats.targets import PlannedTarget, TargetRequest
from checkpoints_tools.io.target import TargetPlan
from checkpoints_tools.io.target_file import TargetFile
from statex_dist.checkpoint.formats.registry import Layout, LayoutRow, add_layout
from statex_dist.checkpoint.formats.tensor_io import Piece, Pieces, SourceFacts, TensorInfo, TensorSource

TABLE, VALUES = "toy.json", "toy.raw"


class ToySource(TensorSource):
    def __init__(self, directory: Path, facts: SourceFacts):
        table = json.loads((directory / TABLE).read_text())
        self._offsets = {name: offset for name, (_, _, offset) in table.items()}
        infos = {n: TensorInfo(name=n, shape=tuple(shape), dtype=dtype) for n, (shape, dtype, _) in table.items()}
        super().__init__(facts, infos, [directory / VALUES])

    def stored_pieces(self, name: str) -> Pieces:
        return (Piece(self.files[0], self._offsets[name], 0, self.info(name).numel),)


class Toy(Layout):
    @staticmethod
    def detect(directory: Path) -> bool:
        return (directory / TABLE).is_file()

    @staticmethod
    def read(directory: Path, facts: SourceFacts, *, describe: bool) -> TensorSource:
        return ToySource(directory, facts)

    @staticmethod
    def plan_target(request: TargetRequest) -> PlannedTarget:
        jobs, table, size = request.jobs(), {}, 0
        for job in jobs:
            table[job.info.name] = (job.info.shape, job.info.dtype, size)
            size += job.info.nbytes
        documents = {**request.documents(None), TABLE: table}
        plan = TargetPlan(
            kind="toy",
            files=[TargetFile(name=VALUES, size=size)],
            jobs=jobs,
            places=lambda job: (Piece(Path(VALUES), table[job.info.name][2], 0, job.info.numel),),
            documents=lambda _: documents,
            info=request.info,
        )
        return PlannedTarget(plan=plan, notes=["a toy"])


def add() -> None:
    """Register the layout: the one line outside this folder."""
    add_layout(LayoutRow(name="toy", where=f"{__name__}:Toy", marks=(TABLE,), weights=(VALUES, TABLE), written=True))
