"""A suite of a user's own: one file, and one call of ``register``."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from statex_dist.evaluation.suites.base import Evaluation, Suite, estimate_of, option, settings_of


@dataclass
class Options:
    """How many bytes are asked for."""

    count: int = option(3, help="bytes to predict")
    loud: bool = option(False, help="say it in capitals")


@dataclass
class Settings:
    """Everything that decides the result."""

    count: int
    batch_size: int
    segment_length: int
    seed: int


class ToySuite(Suite):
    """How often the model's next byte is an even number."""

    name = "toy"
    help = "how often the next byte is even"
    title = "A toy"
    said = "Share of even bytes."
    options = Options

    def prepare(self, args):
        from statex_dist.evaluation.journal import EvalUnit
        from statex_dist.evaluation.report import bootstrap, write_results

        settings = settings_of(Settings, args)

        def units(model, tokenizer):
            import torch

            def run(i):
                token = model(torch.tensor([[i]])).logits[0, -1].argmax().item()
                return [{"kind": "byte", "byte": i, "even": int(token % 2 == 0)}]

            return [EvalUnit(key=f"byte {i}", run=lambda i=i: run(i), tokens=1) for i in range(settings.count)]

        def write(records, directory, *, model, timing):
            share = bootstrap([record["even"] for record in records]).to_dict()
            summary = {"model": model, "even": share, "timing": timing}
            return write_results(directory, "toy", {**summary, "settings": asdict(settings)}, records, {})

        return Evaluation(settings=settings, units=units, write=write)

    def table(self, summary):
        from rich.table import Table

        table = Table("even", title="toy")
        table.add_row(f"{summary['even']['accuracy']:.3f}")
        return table

    def measured(self, summary):
        yield estimate_of("even bytes", summary["even"], headline=True)

    def details(self, results):
        for result in results:
            lines = [["byte", "even"], *([str(r["byte"]), str(r["even"])] for r in result.samples("byte"))]
            yield f"Each byte: {result.model} <&>", lines
