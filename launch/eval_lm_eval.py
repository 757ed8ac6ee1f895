"""``statex eval lm-eval``: tasks of lm-evaluation-harness on a model of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from launch.eval_options import add_common, reading_options, run_suite, title_of, words

if TYPE_CHECKING:
    from rich.table import Table


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex eval lm-eval`` to ``parser``."""
    add_common(parser, batch_size=8)
    parser.add_argument(
        "--tasks", type=str, required=True, metavar="NAMES", help="tasks, groups, tags, patterns or .yaml files"
    )
    parser.add_argument(
        "--include-path", type=str | None, default=None, metavar="DIR", help="a directory with more task files"
    )
    parser.add_argument(
        "--num-fewshot", type=int | None, default=None, help="examples before a question (default: each task's own)"
    )
    parser.add_argument(
        "--limit", type=float | None, default=None, help="documents of each task, or below 1 their share (default: all)"
    )
    parser.add_argument(
        "--max-length", type=int | None, default=None, help="tokens of context that the model may see (default: all)"
    )
    parser.add_argument(
        "--bootstrap-iters", type=int, default=100_000, help="resamples of lm-eval's own standard errors; 0 for none"
    )
    parser.add_argument(
        "--fewshot-seed", type=int | None, default=None, help="seed of the choice of examples (default: lm-eval's)"
    )


def run(args: Any) -> int:
    """Run the suite.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The package is missing, or the options, the tasks or the model are wrong.
    """
    from statex_dist.evaluation import lm_eval_suite as suite

    settings = suite.LmEvalSettings(
        tasks=tuple(words(args.tasks)),
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        max_length=args.max_length,
        bootstrap_iters=args.bootstrap_iters,
        fewshot_seed=args.fewshot_seed,
        **reading_options(args),
    )
    harness = settings.harness()
    return run_suite(
        args,
        suite.SUITE,
        settings,
        units=lambda model, tokenizer: suite.units_of(harness, settings, model, tokenizer),
        write=lambda records, directory, *, model, timing: suite.write_lm_eval(
            records, directory, harness=harness, settings=settings, model=model, timing=timing
        ),
        table=_table,
        ragged=True,
        given={"lm_eval": harness.version, "requests": harness.digest()},
    )


def _table(summary: dict[str, Any]) -> Table:
    from rich.table import Column, Table

    table = Table(
        Column("task", overflow="fold"),
        Column("metric", overflow="fold"),
        "value ± standard error",
        "95 % interval",
        "samples",
        title=title_of("lm-eval", summary["model"]),
    )
    for figure in summary["figures"]:
        value, error, low, high = (figure[name] for name in ("value", "stderr", "low", "high"))
        table.add_row(
            figure["task"],
            figure["metric"] + ("" if figure["filter"] == "none" else f" ({figure['filter']})"),
            ("not finite" if value is None else f"{value:.4g}") + ("" if error is None else f" ± {error:.2g}"),
            "" if low is None else f"{low:.4g} .. {high:.4g}",
            "" if figure["samples"] is None else str(figure["samples"]),
        )
    return table
