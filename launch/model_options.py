"""Options of the commands that run a model, and the loading of the model, its tokenizer and its mitigation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from statex_dist.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from statex_dist.data.tokenizer import Tokenizer
    from statex_dist.models.lm import RecurrentLM
    from statex_dist.models.mitigation import Mitigation
    from statex_dist.models.tensor_parallel.share import TensorShare

_SMALL_MODEL = 1 << 24
_DTYPES = ("auto", "fp32", "bf16", "fp16")


def add_model_options(parser: ArgumentParser, *, segment_length: int = 1024) -> None:
    """Add the options of every command that runs a model.

    Args:
        parser: The command's parser.
        segment_length: Default number of tokens per forward pass.
    """
    parser.add_argument(
        "--model",
        type=str,
        required=True,
        metavar="DIR",
        help="model or checkpoint of any layout (a run: its newest)",
    )
    add_digests_option(parser)
    parser.add_argument(
        "--tokenizer", type=str | None, default=None, help="bytes or a directory (default: the model's)"
    )
    parser.add_argument(
        "--mitigation",
        type=str | None,
        default=None,
        metavar="NAME[:key=value,...]",
        help="remedy against state collapse: forget-more, state-norm:learn=2048 or sliding-window:tokens=2048",
    )
    parser.add_argument("--segment-length", type=int, default=segment_length, help="tokens per forward pass")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads", type=int | None, default=None, help="CPU threads (default: 1 for a small model, else torch's)"
    )


def add_digests_option(parser: ArgumentParser) -> None:
    """Add ``--no-digests``, of the commands that load weights."""
    parser.add_argument(
        "--no-digests",
        action="store_true",
        help="do not compare weights with the digests of MANIFEST.json and archives' checksums (sizes always are)",
    )


def add_dtype_option(parser: ArgumentParser) -> None:
    """Add ``--dtype``, of the commands that produce text (those that measure compute in fp32)."""
    parser.add_argument(
        "--dtype",
        type=str,
        default="auto",
        help="of the weights: fp32, bf16, fp16, or auto: fp32 on a CPU, as stored on a GPU (states are always fp32)",
    )


def load_for_decoding(args: Any) -> tuple[RecurrentLM, Tokenizer]:
    """Load the model and tokenizer that the options of a text-producing command name, and set the mitigation.

    Args:
        args: The parsed options of :func:`add_model_options` and :func:`add_dtype_option`.

    Raises:
        ConfigError: An option is wrong, or model and tokenizer do not belong together.
        CheckpointError: The directory holds no whole model.
    """
    mitigation = read_mitigation(args)
    model = load_model(args.model, args.device, dtype=args.dtype, threads=args.threads, digests=not args.no_digests)
    model.mitigation = mitigation
    return model.eval(), load_matching_tokenizer(args, model)


def load_share(args: Any, share: TensorShare) -> tuple[RecurrentLM, Tokenizer]:
    """Load this rank's share of the model, and the tokenizer; every rank must call this.

    Args:
        args: The parsed options, as for :func:`load_for_decoding`.
        share: This rank among those that share the model.

    Raises:
        StateXError: As :func:`load_for_decoding`, or another rank failed.
    """
    from statex_dist.models.tensor_parallel.model import load_tensor_parallel

    with share.together():
        mitigation = read_mitigation(args)
        if share.size > 1 and args.device.startswith("cuda:"):
            raise ConfigError(f"--device {args.device} is one GPU for {share.size} ranks; use auto or cuda")
        place = parse_device("auto" if args.device == "cuda" else args.device)
        dtype = parse_dtype(args.dtype, place)
    model = load_tensor_parallel(Path(args.model), share, dtype=dtype, device=place, digests=not args.no_digests)
    with share.together():
        set_threads(args.threads, sum(parameter.numel() for parameter in model.parameters()))
        model.mitigation = mitigation
        tokenizer = load_matching_tokenizer(args, model)
    with share.together():
        # Each rank looks for stop strings in its own text, and all must end at the same token.
        if len(set(share.gather_objects((tokenizer.hash, *sorted(tokenizer.end_tokens))))) > 1:
            raise ConfigError(
                f"the ranks have different tokenizers at {tokenizer.spec}, or different end tokens at {args.model}; "
                "copy one directory to all machines"
            )
    return model, tokenizer


def load_matching_tokenizer(args: Any, model: RecurrentLM) -> Tokenizer:
    """Load the tokenizer that the options name, with the end tokens that the model's files name.

    Raises:
        ConfigError: There is none, or it has ids that the model has no embedding for.
        CheckpointError: The model's ``generation_config.json`` is damaged.
    """
    from statex_dist.data.tokenizer import load_tokenizer
    from statex_dist.inference.vocabulary import check_vocabulary, doubt_tokenizer, tokenizer_of, use_end_tokens
    from statex_dist.models.source import find_model

    tokenizer = load_tokenizer(tokenizer_of(args.model, args.tokenizer))
    check_vocabulary(model, tokenizer)
    doubt_tokenizer(model, tokenizer)
    use_end_tokens(tokenizer, model.config, find_model(args.model))
    return tokenizer


def read_mitigation(args: Any) -> Mitigation | None:
    """Return the mitigation that ``--mitigation`` names, or None.

    Raises:
        ConfigError: ``--mitigation`` or ``--segment-length`` is wrong, or they exclude each other.
    """
    from statex_dist.models.mitigation import parse_mitigation

    if args.segment_length < 1:
        raise ConfigError(f"--segment-length must be 1 or more, not {args.segment_length}")
    if args.mitigation is None:
        return None
    mitigation = parse_mitigation(args.mitigation)
    mitigation.check_segments(args.segment_length)
    return mitigation


def check_ragged(mitigation: Mitigation | None, what: str) -> None:
    """Raise if texts of unequal length that are read together would change each other's states.

    Args:
        mitigation: The model's mitigation, or None.
        what: The command, for the message.

    Raises:
        ConfigError: The mitigation would change them.
    """
    if mitigation is None:
        return
    try:
        mitigation.check_segments(1)
    except ConfigError:
        raise ConfigError(
            f"{what} ends forward passes wherever a text ends, where {mitigation} would change the states: its "
            f"results would depend on what is read together; allowed: {mitigation.NAME} with every=1, or another remedy"
        ) from None


def load_model(
    directory: str, device: str, *, dtype: str = "fp32", threads: int | None = None, digests: bool = True
) -> RecurrentLM:
    """Load a model.

    Args:
        directory: Model directory, or a checkpoint of any layout.
        device: ``auto`` (CUDA where there is one, under a launcher that of the local rank), or a torch device.
        dtype: Of the weights, as in :func:`add_dtype_option`. Measurements use fp32: otherwise they would
            measure rounded states in place of the model.
        threads: CPU threads; None takes 1 for a model below 16M parameters.
        digests: Whether contents are compared with digests and checksums.

    Raises:
        ConfigError: There is no such device or dtype, or fewer than one thread.
        CheckpointError: The directory holds no whole model.
    """
    from statex_dist.models.hf import from_pretrained

    place = parse_device(device)
    model = from_pretrained(Path(directory), dtype=parse_dtype(dtype, place), device=place, digests=digests)
    set_threads(threads, sum(parameter.numel() for parameter in model.parameters()))
    return model


def parse_device(device: str) -> torch.device:
    """Return the device that ``--device`` names.

    Raises:
        ConfigError: There is no such device.
    """
    import torch

    from statex_dist.distributed.env import read_env

    if device == "auto":
        device = (
            str(read_env().device) if "LOCAL_RANK" in os.environ else "cuda" if torch.cuda.is_available() else "cpu"
        )
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
    return place


def parse_dtype(dtype: str, place: torch.device) -> torch.dtype | None:
    """Return the dtype that ``--dtype`` names on a device; None for that of the stored weights.

    Raises:
        ConfigError: The name is unknown.
    """
    import torch

    if dtype not in _DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not supported; allowed: {', '.join(_DTYPES)}")
    if dtype == "auto":
        return torch.float32 if place.type == "cpu" else None
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def set_threads(threads: int | None, num_parameters: int) -> None:
    """Set the number of CPU threads for a model of ``num_parameters`` parameters.

    Raises:
        ConfigError: ``threads`` is below 1 or above the number of cores.
    """
    import torch

    from statex_dist.distributed.env import read_env, share_cores

    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= cores:
        raise ConfigError(f"--threads must be from 1 to {cores}, the cores of this machine, not {threads}")
    # The operations of a small model are too short to share. On a busy machine its threads mostly wait for each other:
    # 65,000 against 5,000 tokens/s were measured for 0.1M parameters on two cores under load.
    if threads is None and num_parameters < _SMALL_MODEL:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
    elif "LOCAL_RANK" in os.environ:
        share_cores(read_env())
