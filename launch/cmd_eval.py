"""``statex eval``: measure recall or perplexity of a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from statex_dist.errors import ConfigError

_SMALL_MODEL = 1 << 24

if TYPE_CHECKING:
    from rich.table import Table

    from statex_dist.models.lm import RecurrentLM


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex eval`` to ``parser``."""
    parser.add_argument("suite", type=str, metavar="SUITE", help="recall or perplexity")
    parser.add_argument("--model", type=str, required=True, metavar="DIR", help="model directory (safetensors)")
    parser.add_argument("--out", type=str, required=True, metavar="DIR", help="where the results go")
    parser.add_argument(
        "--tokenizer", type=str | None, default=None, help="bytes or a directory (default: the model's)"
    )
    parser.add_argument("--tasks", type=str, default="mqar,needle", help="recall: which tasks")
    parser.add_argument("--num-pairs", type=str, default="8,16,32,64", help="mqar: numbers of key-value pairs")
    parser.add_argument("--key-ids", type=str, default="128:192", metavar="FIRST:END", help="mqar: token ids of keys")
    parser.add_argument(
        "--value-ids", type=str, default="192:256", metavar="FIRST:END", help="mqar: token ids of values"
    )
    parser.add_argument("--lengths", type=str, default="256,512,1024,2048", help="needle: tokens of a prompt")
    parser.add_argument("--depths", type=int, default=5, help="needle: number of depths")
    parser.add_argument("--haystack", type=str | None, default=None, help="needle: a text file (default: made up)")
    parser.add_argument(
        "--num-samples",
        type=int | None,
        default=None,
        help="recall: documents per number of pairs, prompts per length and depth (default: 256 and 20)",
    )
    parser.add_argument(
        "--data", type=str | None, default=None, metavar="PATH", help="perplexity: shards or text files"
    )
    parser.add_argument("--max-tokens", type=int | None, default=None, help="perplexity: stop after so many tokens")
    parser.add_argument("--segment-length", type=int, default=1024, help="tokens per forward pass")
    parser.add_argument(
        "--batch-size",
        type=int | None,
        default=None,
        help="sequences per forward pass (default: recall 32, perplexity 8)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples and the intervals")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads", type=int | None, default=None, help="CPU threads (default: 1 for a small model, else torch's)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results in a directory that is not empty")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")


def run(args: Any) -> int:
    """Run a suite, write its files and print its table.

    Args:
        args: The parsed options of :func:`add_arguments`.

    Raises:
        StateXError: The options, the model or the data are wrong.
    """
    suites: dict[str, Callable[[Any], tuple[dict[str, Any], Table]]] = {"recall": _recall, "perplexity": _perplexity}
    if args.suite not in suites:
        raise ConfigError(f"suite {args.suite!r} is unknown; suites: {', '.join(suites)}")
    summary, table = suites[args.suite](args)
    if args.json:
        sys.stdout.write(json.dumps(summary) + "\n")
        return 0
    from rich.console import Console

    console = Console()
    console.print(table)
    console.print(f"results: {args.out}", soft_wrap=True, highlight=False)
    return 0


def _tokenizer_of(args: Any) -> str:
    """Return what was given as tokenizer, or the model's directory if it holds one."""
    from statex_dist.data.tokenizer import has_tokenizer

    if args.tokenizer:
        return args.tokenizer
    if not has_tokenizer(args.model):
        raise ConfigError(f"model {args.model} comes without a tokenizer; give --tokenizer bytes or --tokenizer DIR")
    return args.model


def _recall(args: Any) -> tuple[dict[str, Any], Table]:
    from rich.table import Table

    from statex_dist.data.tokenizer import load_tokenizer
    from statex_dist.evaluation.recall import RecallSettings, run_recall, write_recall
    from statex_dist.evaluation.report import open_target

    given = {"mqar_samples": args.num_samples, "needle_samples": args.num_samples, "batch_size": args.batch_size}
    settings = RecallSettings(
        tasks=tuple(_words(args.tasks)),
        num_pairs=parse_numbers(args.num_pairs, "--num-pairs"),
        keys=parse_range(args.key_ids, "--key-ids"),
        values=parse_range(args.value_ids, "--value-ids"),
        lengths=parse_numbers(args.lengths, "--lengths"),
        depths=args.depths,
        haystack=args.haystack,
        segment_length=args.segment_length,
        seed=args.seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    model = load_model(args.model, args.device, threads=args.threads)
    tokenizer = load_tokenizer(_tokenizer_of(args)) if "needle" in settings.tasks else None
    open_target(Path(args.out), overwrite=args.overwrite)
    result = run_recall(model, settings, tokenizer=tokenizer)
    facts = model_facts(model, args.model)
    files = write_recall(result, Path(args.out), model=facts)

    table = Table("task", "setting", "accuracy", "95 % interval", "samples", title=_title("recall", facts))
    lines = [("mqar", f"{n} pairs", estimate) for n, estimate in result.mqar.items()]
    lines += [("needle", f"{length} tokens", estimate) for length, estimate in result.needle_by_length.items()]
    for task, setting, e in lines:
        table.add_row(task, setting, f"{e.mean:.3f}", f"{e.low:.3f} .. {e.high:.3f}", str(e.samples))
    return json.loads(files[0].read_text(encoding="utf-8")), table


def _perplexity(args: Any) -> tuple[dict[str, Any], Table]:
    from rich.table import Table

    from statex_dist.data.tokenizer import load_tokenizer
    from statex_dist.evaluation.documents import read_documents
    from statex_dist.evaluation.perplexity import PerplexitySettings, run_perplexity, write_perplexity
    from statex_dist.evaluation.recall import check_vocabulary
    from statex_dist.evaluation.report import open_target

    if not args.data:
        raise ConfigError("perplexity needs text; set --data to a directory of `statex prepare`, or to text files")
    given = {"batch_size": args.batch_size} if args.batch_size is not None else {}
    settings = PerplexitySettings(
        segment_length=args.segment_length, max_tokens=args.max_tokens, seed=args.seed, **given
    )
    model = load_model(args.model, args.device, threads=args.threads)
    tokenizer = load_tokenizer(_tokenizer_of(args))
    check_vocabulary(model, tokenizer)
    open_target(Path(args.out), overwrite=args.overwrite)
    result = run_perplexity(model, read_documents(Path(args.data), tokenizer), settings, tokenizer=tokenizer)
    facts = model_facts(model, args.model)
    files = write_perplexity(result, Path(args.out), model=facts, data=args.data)

    table = Table("figure", "value", title=_title("perplexity", facts))
    e = result.loss
    table.add_row("loss (nats/token)", f"{e.mean:.4f}  ({e.low:.4f} .. {e.high:.4f} over documents)")
    table.add_row("perplexity", f"{result.perplexity:.4f}")
    if result.bits_per_byte is not None:
        table.add_row("bits per byte", f"{result.bits_per_byte:.4f}")
    table.add_row("target tokens", f"{result.tokens} in {len(result.documents)} documents")
    table.add_row("speed", f"{result.tokens / max(result.seconds, 1e-9):.0f} tokens/s")
    for bucket in result.buckets:
        table.add_row(f"loss at {bucket.start}..{bucket.end - 1}", f"{bucket.loss:.4f}  ({bucket.tokens} tokens)")
    return json.loads(files[0].read_text(encoding="utf-8")), table


def load_model(directory: str, device: str, *, threads: int | None = None) -> RecurrentLM:
    """Load a model in fp32: rounded states would be measured in place of the model.

    Args:
        directory: Model directory.
        device: ``auto`` (CUDA where there is one), or a torch device.
        threads: CPU threads; None takes 1 for a model below 16M parameters.

    Raises:
        ConfigError: There is no such device, or fewer than one thread.
        CheckpointError: The directory holds no whole model.
    """
    import torch

    from statex_dist.models.hf import from_pretrained

    if threads is not None and threads < 1:
        raise ConfigError(f"--threads must be 1 or more, not {threads}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"--device {device!r} is not a device; allowed: auto, cpu, cuda, cuda:N") from None
    if place.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device!r} is not supported; allowed: auto, cpu, cuda, cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices; use auto or cpu"
        )
    model = from_pretrained(Path(directory), dtype=torch.float32, device=place)
    # The operations of a small model are too short to share: on a busy machine its threads mostly wait for each other
    # (65,000 against 5,000 tokens/s were measured for 0.1M parameters on two cores under load).
    if threads is None and sum(parameter.numel() for parameter in model.parameters()) < _SMALL_MODEL:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
    return model


def model_facts(model: RecurrentLM, directory: str) -> dict[str, Any]:
    """Return what a result file says about its model."""
    config = model.config
    return {
        "directory": directory,
        "model_type": config.MODEL_TYPE,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_numbers": config.state_numbers,
        "vocab_size": config.vocab_size,
        "statex": config.statex.to_dict() if config.statex else None,
    }


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Return the numbers of a list such as ``8,16,32``.

    Raises:
        ConfigError: It is not a list of whole numbers.
    """
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise ConfigError(
            f"{option} {text!r} is not understood; allowed: whole numbers with commas, such as 8,16"
        ) from None


def parse_range(text: str, option: str) -> tuple[int, int]:
    """Return the bounds of a range such as ``128:192`` (192 not included).

    Raises:
        ConfigError: It is not two whole numbers with a colon.
    """
    try:
        first, end = (int(word) for word in text.split(":"))
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not understood; allowed: FIRST:END, such as 128:192") from None
    return first, end


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _title(suite: str, facts: dict[str, Any]) -> str:
    return (
        f"{suite}: {facts['model_type']}, {facts['parameters']:,} parameters, {facts['state_numbers']:,} state numbers"
    )
