"""``statex generate``: continue prompts, one recurrent step a token."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from launch.model_options import (
    add_dtype_option,
    add_model_options,
    check_ragged,
    load_for_decoding,
    load_share,
)
from statex_dist.errors import ConfigError, DataError, StateXError

if TYPE_CHECKING:
    from statex_dist.data.tokenizer import Tokenizer
    from statex_dist.inference.decoding import Progress, Sampling
    from statex_dist.inference.generate import Prefix
    from statex_dist.models.lm import RecurrentLM
    from statex_dist.models.tensor_parallel.share import TensorShare

logger = logging.getLogger(__name__)

_PIECE_SEGMENTS = 16
"""Segments of a prompt between two movements of the progress bar."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``statex generate`` to ``parser``."""
    add_model_options(parser)
    add_dtype_option(parser)
    parser.add_argument("--prompt", type=str, action="append", metavar="TEXT", help="text to continue; may be repeated")
    parser.add_argument(
        "--prompt-file", type=str, action="append", metavar="FILE", help="file with a prompt, - for standard input"
    )
    parser.add_argument("--n", type=int, default=1, help="continuations of each prompt, which is read once")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to produce at most (0: only read)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from so many most likely tokens (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the fewest tokens with this probability")
    parser.add_argument("--stop", type=str, action="append", metavar="TEXT", help="end before it; may be repeated")
    parser.add_argument("--ignore-eos", action="store_true", help="go on behind the end of a document")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; continuation i draws with seed + i")
    parser.add_argument("--batch-size", type=int, default=32, help="continuations that are written together")
    parser.add_argument("--save-state", type=str | None, default=None, metavar="FILE", help="keep what the prompt left")
    parser.add_argument("--load-state", type=str | None, default=None, metavar="FILE", help="start from what was kept")
    parser.add_argument("--tp", type=int | None, default=None, help="tensor-parallel ranks that share the model")
    parser.add_argument("--json", action="store_true", help="print texts and figures as JSON when all are done")


def run(args: Any) -> int:
    """Continue prompts and print the texts: of one prompt as it comes.

    Args:
        args: The parsed options of :func:`add_arguments`, with the command line that they were parsed from.

    Raises:
        StateXError: The options, the model, the prompts or the file of states are wrong.
    """
    from launch.tensor_parallel import open_tensor_parallel, start_ranks, wants_ranks
    from statex_dist.distributed.error_sync import OtherRankError
    from statex_dist.models.tensor_parallel.share import TensorShare

    if wants_ranks(args.tp):
        _read_options(args, args.tp)
        return start_ranks(args.tp, args.command_line, device=args.device)
    try:
        with open_tensor_parallel(args.tp, device=args.device) as share:
            _generate(args, share or TensorShare())
    except OtherRankError as error:  # that rank reports the fault
        return error.exit_code
    return 0


def _generate(args: Any, share: TensorShare) -> None:
    """Do what this rank has to; all ranks produce the same tokens, and the first one prints them."""
    from statex_dist.distributed.error_sync import OtherRankError
    from statex_dist.inference.text import stop_with_special_token

    with share.together():
        sampling = _read_options(args, share.size)
        mine = read_prompts(args.prompt or [], args.prompt_file or []) if share.rank == 0 else []
    prompts = share.gather_objects(mine)[0]
    with share.together():
        prompts = _check_prompts(args, prompts)
    if share.rank == 0 and args.temperature == 0 and (args.top_k or args.top_p < 1 or args.n > 1):
        logger.warning(
            "--temperature is 0: the most likely token is taken, and --top-k, --top-p and --n change nothing"
        )
    if share.size > 1:
        model, tokenizer = load_share(args, share)
    else:
        model, tokenizer = load_for_decoding(args)
    if len(prompts) > 1:
        with share.together():
            check_ragged(model.mitigation, "generating from several prompts")
    if sampling is not None and (stop := stop_with_special_token(sampling.until, tokenizer)) is not None:
        with share.together():
            raise ConfigError(f"--stop {stop[:60]!r} is a special token with other text: it never comes; give it alone")
    session = _Session(model=model, tokenizer=tokenizer, args=args, sampling=sampling, share=share)
    try:
        session.read(prompts)
        if sampling is not None:
            as_it_comes = not args.json and len(prompts) == args.n == 1 and share.rank == 0
            session.write(sys.stdout.write if as_it_comes else None)
    except StateXError as error:
        if share.rank == 0:
            raise
        # All ranks have the same logits, and so the same error.
        raise OtherRankError("rank 0 says what is wrong", error.exit_code) from None
    if share.rank == 0:
        _print(session, args)


def _check_prompts(args: Any, prompts: list[str]) -> list[str]:
    """Return the prompts; an empty one where a file of states is all there is."""
    if not prompts and args.load_state is None:
        raise ConfigError("no prompt; give --prompt TEXT or --prompt-file FILE (or --load-state FILE)")
    if args.save_state is not None and len(prompts) > 1:
        raise ConfigError(f"--save-state keeps what one prompt left; {len(prompts)} were given")
    return prompts or [""]


def _read_options(args: Any, ranks: int) -> Sampling | None:
    """Return how texts are drawn; None where the prompt is only to be read."""
    from statex_dist.inference.decoding import Sampling

    for option in ("batch_size", "segment_length", "n"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} must be 1 or more, not {getattr(args, option)}")
    if args.seed < 0:
        raise ConfigError(f"--seed must be 0 or more, not {args.seed}")
    for option in ("save_state", "load_state"):
        path = getattr(args, option)
        if path is not None and ranks > 1:
            raise ConfigError(
                f"--{option.replace('_', '-')} does not go with --tp: each rank has only its part of states"
            )
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"--{option.replace('_', '-')} {path}: no such directory")
        if path is not None and Path(path).is_dir():
            raise ConfigError(f"--{option.replace('_', '-')} {path} is a directory; give a file")
    only_read = args.max_new_tokens == 0 and args.save_state is not None
    if args.max_new_tokens < 1 and not only_read:
        raise ConfigError(
            f"--max-new-tokens must be 1 or more, not {args.max_new_tokens} (0 with --save-state: the prompt is only "
            "read)"
        )
    sampling = Sampling(
        max_tokens=args.max_new_tokens or 1,
        until=tuple(args.stop or ()),
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        ignore_eos=args.ignore_eos,
    )
    return None if only_read else sampling


def read_prompts(texts: Sequence[str], files: Sequence[str]) -> list[str]:
    """Return the prompts of the command line, those of files last.

    Args:
        texts: Prompts.
        files: Files with one prompt each, ``-`` for standard input.

    Raises:
        DataError: A prompt is empty or not valid UTF-8, or a file cannot be read.
    """
    prompts = []
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"--prompt {number} is not valid UTF-8; put it into a file and mend it there") from None
        if not text:
            raise DataError(f"--prompt {number} is empty; there is nothing to continue")
        prompts.append(text)
    for name in files:
        content = sys.stdin.buffer.read() if name == "-" else _read_file(name)
        # The one that editors and echo put behind the last line.
        content = content.removesuffix(b"\n").removesuffix(b"\r")
        if not content:
            raise DataError(f"--prompt-file {name} is empty; there is nothing to continue")
        try:
            prompts.append(content.decode())
        except UnicodeDecodeError as error:
            raise DataError(
                f"--prompt-file {name} is not UTF-8 text: byte 0x{content[error.start]:02x} at position {error.start}; "
                "convert it (for example with iconv)"
            ) from None
    return prompts


def _read_file(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise DataError(f"--prompt-file {name} cannot be read: {error.strerror}") from None


@dataclass(kw_only=True)
class _Session:
    """The model with the texts that it reads and writes, and the times."""

    model: RecurrentLM
    tokenizer: Tokenizer
    args: Any
    sampling: Sampling | None
    share: TensorShare
    contexts: list[list[int]] = field(default_factory=list)
    prefix: Prefix | None = None
    done: dict[int, Progress] = field(default_factory=dict)
    cached_tokens: int = 0
    prompt_tokens: list[int] = field(default_factory=list)
    read_seconds: float = 0.0
    write_seconds: float = 0.0

    def read(self, prompts: Sequence[str]) -> None:
        """Encode the prompts; of a single one read all, and keep its state where that is asked for."""
        from statex_dist.inference.cache import load_prefix, save_prefix

        self.contexts = [self.tokenizer.encode(prompt).tolist() for prompt in prompts]
        self.prompt_tokens = [len(context) for context in self.contexts]
        if self.args.load_state is not None:
            self.prefix = load_prefix(Path(self.args.load_state), self.model, self.tokenizer)
            self.cached_tokens = self.prefix.num_tokens
        if len(self.contexts) == 1:
            started = time.monotonic()
            self.prefix = self._read_one(self.contexts[0])
            self.read_seconds = time.monotonic() - started
            self.contexts = [[]]
        if self.args.save_state is not None:
            assert self.prefix is not None
            save_prefix(Path(self.args.save_state), self.prefix, self.model, self.tokenizer)
            logger.info("the states after %d tokens are in %s", self.prefix.num_tokens, self.args.save_state)

    def _read_one(self, tokens: list[int]) -> Prefix:
        from statex_dist.inference.generate import read_prefix

        segment, prefix = self.args.segment_length, self.prefix
        step = _PIECE_SEGMENTS * segment
        with _reading_bar(len(tokens), shown=self.share.rank == 0) as advance:
            for first in range(0, max(len(tokens), 1), step):
                piece = tokens[first : first + step]
                prefix = read_prefix(self.model, piece, segment_length=segment, prefix=prefix)
                advance(len(piece))
        assert prefix is not None
        return prefix

    def write(self, out: Callable[[str], Any] | None) -> None:
        """Continue all prompts; with ``out`` hand each piece of text on as it comes."""
        from statex_dist.inference.generate import stream_continuations
        from statex_dist.inference.vocabulary import log_end_tokens

        assert self.sampling is not None
        if not self.args.ignore_eos and self.share.rank == 0:
            log_end_tokens(self.tokenizer, self.model.config.vocab_size)
        contexts = [context for context in self.contexts for _ in range(self.args.n)]
        seeds = [self.args.seed + number for number in range(len(contexts))]
        started = time.monotonic()
        for progress in stream_continuations(
            self.model,
            contexts,
            self.sampling,
            tokenizer=self.tokenizer,
            batch_size=self.args.batch_size,
            segment_length=self.args.segment_length,
            seeds=seeds,
            prefix=self.prefix,
            agree=self.share.agree,
        ):
            if out is not None and progress.text:
                out(progress.text)
                sys.stdout.flush()
            if progress.finish_reason is not None:
                assert isinstance(progress.key, int)
                self.done[progress.key] = progress
        self.write_seconds = time.monotonic() - started


@contextmanager
def _reading_bar(num_tokens: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Give a callback that moves a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda count: None
        return
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading", total=num_tokens)
        yield lambda count: bar.advance(task, count)


def _print(session: _Session, args: Any) -> None:
    produced = sum(len(progress.tokens) for progress in session.done.values())
    if args.json:
        document = {
            "model": args.model,
            "continuations": [
                {
                    "prompt": number // args.n,
                    "prompt_tokens": session.prompt_tokens[number // args.n],
                    "text": progress.whole,
                    "tokens": list(progress.tokens),
                    "finish_reason": progress.finish_reason,
                }
                for number, progress in sorted(session.done.items())
            ],
            "end_tokens": [] if args.ignore_eos else sorted(session.tokenizer.end_tokens),
            "cached_tokens": session.cached_tokens,
            "prompt_tokens": sum(session.prompt_tokens),
            "generated_tokens": produced,
            # Several prompts are read while others are written already: only the sum is known.
            "read_seconds": round(session.read_seconds, 3) if len(session.prompt_tokens) == 1 else None,
            "seconds": round(session.read_seconds + session.write_seconds, 3),
        }
        sys.stdout.write(json.dumps(document) + "\n")
        return
    if len(session.done) == 1:
        sys.stdout.write("\n")
    else:
        for number in sorted(session.done):
            heading = f"prompt {number // args.n}" + (f", {number % args.n}" if args.n > 1 else "")
            sys.stdout.write(f"==> {heading} <==\n{session.done[number].whole}\n")
    if not session.done:
        return
    if len(session.prompt_tokens) == 1:
        read = f"{session.prompt_tokens[0]} tokens read in {session.read_seconds:.2f} s, "
        logger.info("%s%d tokens written in %.2f s", read, produced, session.write_seconds)
    else:
        read_tokens = sum(session.prompt_tokens)
        logger.info("%d tokens read and %d written in %.2f s", read_tokens, produced, session.write_seconds)
