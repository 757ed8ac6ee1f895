"""``statex plan``: what an expansion costs, before anything is done."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from launch.tool_options import add_context_length, add_plan_options, plan_options, sequence_lines, size
from statex_dist.errors import ConfigError
from statex_dist.state.geometry import STATE_BYTES

if TYPE_CHECKING:
    from rich.console import Console

    from checkpoints_tools.plan.forgetting import Forgetting
    from checkpoints_tools.plan.memory import TrainingMemory, TrainingSettings
    from statex_dist.models.config import ModelConfig


_OF_ENGINE = (
    *("stage", "precision", "activation_checkpointing", "loss_chunk_tokens", "segment_tokens", "max_state_bytes"),
    *("offload_optimizer", "offload_parameters", "param_persistence_threshold", "sub_group_size"),
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex plan`` to ``parser``."""
    parser.add_argument(
        "model_dir", type=str | None, nargs="?", metavar="MODEL_DIR", help="directory with the model's config.json"
    )
    add_plan_options(parser)
    add_context_length(parser)
    parser.add_argument("--config", type=str | None, default=None, help="a run's YAML, for what is not given below")
    parser.add_argument("--world-size", type=int, default=1, help="ranks that share the training states (ZeRO)")
    for name, kind, text in (
        (
            "stage",
            int,
            "what they share: nothing (0), optimizer states (1), gradients (2), parameters (3, the default)",
        ),
        ("seq-len", int, "tokens of a packed sequence (default 65536)"),
        ("context", int, "ranks that share a packed sequence (default 1)"),
        ("precision", str, "bf16 or fp32 (default bf16)"),
        ("activation-checkpointing", str, "none, block or expanded (default none)"),
        ("loss-chunk-tokens", int, "tokens whose logits are held at once, 0 for all (default 8192)"),
        ("segment-tokens", int, "tokens that are run at once, 0 for the whole sequence (default 0)"),
        ("max-state-bytes", int, "bound of the chunk states of an expanded GLA layer (default 256 MiB)"),
        ("accumulation", int, "packed sequences per rank and step (default 1)"),
        ("offload-optimizer", str, "none or cpu (default none)"),
        ("offload-parameters", str, "none, cpu or nvme (default none)"),
    ):
        parser.add_argument(f"--{name}", type=kind | None, default=None, help=text)
    parser.add_argument("--device", type=str, default="cuda", help="cuda (kernels) or cpu (PyTorch scans, gloo)")
    for name, text in (
        ("laws", "forget threshold of your own models: what `statex eval laws` wrote (default: the paper's)"),
        ("health", "what `statex eval collapse` found of such a model (family, state, plan): it beats the law"),
    ):
        parser.add_argument(f"--{name}", type=str | None, default=None, metavar="DIR", help=text)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: Any) -> int:
    """Print the plan's costs.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options are wrong or do not fit the model.
    """
    from checkpoints_tools.plan.forgetting import gather_evidence
    from checkpoints_tools.plan.options import PlanOptions, plan_model
    from checkpoints_tools.plan.report import report_plan
    from statex_dist.models.source import read_checked_config

    options = plan_options(args)
    training, model_dir, passing = _training(args)
    before = read_checked_config(model_dir)
    # A run's model is taken as it is, unless an expansion is asked for.
    after = before if args.config is not None and options == PlanOptions() else plan_model(before, options)
    evidence = gather_evidence(before, laws=args.laws, health=args.health)
    counted = count_activations if training.device == "cpu" else None
    report = report_plan(before, after, training, counted, evidence, args.context_length)
    if args.json:
        plan = after.statex.to_dict() if after.statex is not None else None
        left_out = passed_states(after) if passing else None
        values = {**report.to_dict(), "plan": plan, "left_out": {} if left_out is None else {"passed_states": left_out}}
        sys.stdout.write(json.dumps(values) + "\n")
    else:
        _print(report, passed_states(after) if passing else None)
    return 0


def _training(args: Any) -> tuple[TrainingSettings, str, bool]:
    """Return the run to plan for, the model's directory, and whether states are passed between sequences."""
    from checkpoints_tools.plan.memory import TrainingSettings

    values: dict[str, Any] = {}
    model_dir, passing = args.model_dir, False
    if args.config is not None:
        from statex_dist.config import parse_config
        from statex_dist.run_config import RunConfig

        run = parse_config(RunConfig, ["--config", args.config], prog="statex plan")
        engine, passing = run.engine, run.train.state_passing > 0
        model_dir = model_dir or run.model.path
        values = {
            "seq_len": max(stage.seq_len for stage in run.data.stages()),
            "context": run.parallel.context,
            "save_async": run.train.save_async,
            **{name: getattr(engine, name) for name in _OF_ENGINE},
        }
    if model_dir is None:
        raise ConfigError("give MODEL_DIR, or --config with a run's YAML that has model.path")
    names = ("seq_len", "context", "accumulation", *_OF_ENGINE)
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    if args.config is not None and "accumulation" not in given:
        run.parallel.context = given.get("context", run.parallel.context)
        values["accumulation"] = run.accumulation_steps(args.world_size)
    return TrainingSettings(world_size=args.world_size, device=args.device, **(values | given)), model_dir, passing


def passed_states(config: ModelConfig) -> dict[str, Any]:
    """Return what ``train.state_passing`` takes and the memory above does not count: how many sequences share a pack
    is known of the data alone.
    """
    each = 2 * STATE_BYTES * config.state_elements
    return {
        "bytes_per_sequence": each,
        "says": (
            f"memory leaves out train.state_passing: the states at the begin and the end of every sequence of a pack, "
            f"{size(each)} a sequence (2 x {STATE_BYTES} bytes x {config.state_elements:,} state elements)"
        ),
    }


def count_activations(config: ModelConfig, training: TrainingSettings) -> int:
    """Return the bytes of activations of a pass on a CPU."""
    from statex_dist.models.activations import activation_bytes

    return activation_bytes(
        config,
        num_tokens=training.tokens,
        precision=training.precision,
        recompute=training.activation_checkpointing,
        loss_chunk_tokens=training.loss_chunk_tokens,
        carried=training.carried,
    )


def _print(report: Any, left_out: dict[str, Any] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    layers = Table(title=f"State of each layer ({report.model_type}; bytes of one sequence)")
    for name in ("layer", "expansion", "numbers", "after", "bytes", "after"):
        layers.add_column(name, justify="left" if name == "expansion" else "right")
    for row in report.layers:
        layers.add_row(
            str(row.layer),
            row.expansion or "",
            f"{row.numbers_before:,}",
            f"{row.numbers_after:,}",
            size(row.bytes_before),
            size(row.bytes_after),
        )
    console.print(layers)
    before, after, run = report.before, report.after, report.training
    totals = Table(title=f"The model, and training it on {run.world_size} rank(s), {run.tokens} tokens at once on each")
    for name in ("", "before", "after", "change"):
        totals.add_column(name, justify="right" if name else "left")
    for label, old, new, shown in (
        ("state elements", before.state_numbers, after.state_numbers, "{:,}".format),
        *(
            (label, old or 0, new or 0, _or_unknown)
            for label, (old, new) in sequence_lines(before.sequence, after.sequence)
        ),
        ("parameters", before.parameters, after.parameters, "{:,}".format),
        ("forward FLOPs per token", before.flops_per_token, after.flops_per_token, "{:,}".format),
        *_memory_rows(before.memory, after.memory),
    ):
        totals.add_row(label, shown(old), shown(new), f"{100 * (new / old - 1):+.1f} %" if old else "")
    console.print(totals)
    if run.device == "cuda":
        console.print("GPU memory of activations is an estimate; host memory is that of each rank, not of a machine")
    for note in report.notes:
        console.print(note)
    if report.mixed:
        console.print(
            "FLOPs leave out the products of queries and keys in attention layers, whose number grows with the context"
            if report.counted
            else "parameters, FLOPs and memory leave out the layers of another kind, which are passed through"
        )
    if left_out is not None:
        console.print(left_out["says"])
    _print_forgetting(console, report.forgetting)


def _or_unknown(count: int) -> str:
    return size(count) if count else "not known"  # keys and values of none are not told


def _print_forgetting(console: Console, forgetting: Forgetting) -> None:
    if forgetting.threshold_tokens is None:
        if forgetting.basis != "paper":
            console.print(f"forget threshold: none known for a state of this size. Concluded from {forgetting.says}")
        return
    if forgetting.warning is None:
        console.print(
            f"forget threshold: {forgetting.threshold}; --seq-len {forgetting.train_length} reaches it. Concluded from "
            f"{forgetting.says}"
        )
        return
    console.print(f"warning: {forgetting.warning}", style="yellow")
    for line in forgetting.proposals:
        console.print(f"  {line}")


def _memory_rows(before: TrainingMemory, after: TrainingMemory) -> Iterator[tuple[str, int, int, Callable[[int], str]]]:
    """Yield the rows of memory per rank: what is held, what a pass adds, each phase, the peak."""
    for title, old, new in (
        ("held", before.parts, after.parts),
        ("of a pass", before.passing, after.passing),
        ("at", before.phases, after.phases),
        ("peak", {"": before.peak}, {"": after.peak}),
    ):
        for name, share in old.items():
            for place, label in (("device", "GPU"), ("host", "host")):
                values = getattr(share, place), getattr(new[name], place)
                if any(values):
                    yield f"{label} memory, {title} {name}".rstrip(), *values, size
