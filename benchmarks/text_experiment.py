"""Compare recall inside real text, perplexity and time per token of expanded models after equal numbers of tokens.

Run as ``python -m benchmarks.text_experiment --config configs/experiments/text_gla.yaml --text FOLDER``, with a folder
of text files. A BPE tokenizer is trained on them. After a kill the same command continues the experiment.
docs/results.md has the results and says where such text is.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.experiment_lab import HELD_OUT, Corpus, Experiment, Lab
from benchmarks.experiment_stats import device
from benchmarks.inference import decode_step
from benchmarks.measure import time_cpu
from benchmarks.recall_experiment import BASELINE, draw, make_table, summarise
from benchmarks.recall_text import RecallText, choose_words, digest, divide, read_texts, train_tokenizer
from statex_dist.config import parse_config
from statex_dist.data.tokenizer import load_tokenizer
from statex_dist.errors import ConfigError, StateXError, one_line
from statex_dist.evaluation.documents import read_documents
from statex_dist.evaluation.mqar import score_mqar
from statex_dist.evaluation.perplexity import PerplexitySettings, run_perplexity
from statex_dist.log import setup_logging
from statex_dist.models.hf import from_pretrained
from statex_dist.models.lm import RecurrentLM
from statex_dist.train.metrics import METRICS_NAME

DECODED_BATCHES = (1, 32)


@dataclass(kw_only=True)
class TextCorpus(Corpus):
    """A data set of recall documents in text and of pieces of text.

    Attributes:
        recall_pieces: Pieces of text for the recall documents, beside ``text_pieces``.
        words_between: Least and greatest number of words between two statements.
        answers_only: Whether only the answers of recall documents are targets, not all their text.
    """

    recall_pieces: int = 0
    words_between: list[int] = field(default_factory=lambda: [4, 8])
    answers_only: bool = False


@dataclass(kw_only=True)
class TextExperiment(Experiment):
    """An experiment on the text of a folder.

    Attributes:
        text: The folder.
        corpora: The data sets by name; ``held_out`` is only measured on, and no file is in two of them.
    """

    text: str
    corpora: dict[str, TextCorpus]  # type: ignore[assignment]

    @cached_property
    def texts(self) -> list[str]:
        """All texts of the folder."""
        return read_texts(Path(self.text))

    @cached_property
    def text_facts(self) -> dict[str, Any]:
        """The number of texts, their size and hash."""
        size = sum(len(text.encode()) for text in self.texts)
        return {"documents": len(self.texts), "bytes": size, "hash": digest(self.texts)}

    @cached_property
    def pieces(self) -> dict[str, list[str]]:
        """The pieces of every corpus: those of text, then those of its recall documents."""
        counts = {name: corpus.text_pieces + corpus.recall_pieces for name, corpus in self.corpora.items()}
        return divide(self.texts, counts, self.piece_bytes)

    @property
    def training_pieces(self) -> list[str]:
        """The pieces of all corpora but ``held_out``."""
        return [piece for name, pieces in self.pieces.items() if name != HELD_OUT for piece in pieces]

    def data_recipe(self, name: str) -> dict[str, Any]:
        """Return all values that determine a data set."""
        recall = {key: corpus.recall_pieces for key, corpus in self.corpora.items()}
        more = {"recall_pieces": recall, "text": self.text_facts["hash"], "vocab_size": self.model["vocab_size"]}
        return {**super().data_recipe(name), **more}


class TextLab(Lab):
    """Trains and measures models on text."""

    experiment: TextExperiment

    def tokenizer(self) -> str:
        """Return the directory of the tokenizer, which is trained on the text that is not held out."""
        target = self.out / "data" / "tokenizer"
        if not (target / "tokenizer_config.json").is_file():
            train_tokenizer(self.experiment.training_pieces, self.experiment.model["vocab_size"], target)
        return str(target)

    @cached_property
    def words(self) -> list[int]:
        """Ids of the keys and values."""
        return choose_words(load_tokenizer(self.tokenizer()), self.experiment.training_pieces)

    def recall_text(self, name: str, seed: int) -> RecallText:
        """Return the recall documents of a corpus."""
        corpus = self.experiment.corpora[name]
        pieces = self.experiment.pieces[name][corpus.text_pieces :]
        return RecallText(load_tokenizer(self.tokenizer()), self.words, pieces, corpus.words_between, seed)

    def rows(self, name: str) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of a corpus by kind, for ``statex prepare``."""
        corpus, recall = self.experiment.corpora[name], []
        source = self.recall_text(name, seed=12345)  # the evaluation draws with seed 0
        for num_pairs in corpus.num_pairs:
            remaining = corpus.recall_tokens // len(corpus.num_pairs)
            while remaining > 0:
                tokens, answers = source.draw(num_pairs)
                remaining -= len(tokens)
                recall.append({"input_ids": tokens, **({"loss_mask": answers} if corpus.answers_only else {})})
        text = [{"text": piece} for piece in self.experiment.pieces[name][: corpus.text_pieces]]
        return {"recall": recall, "text": text}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; write ``summary.json`` and ``recall.png``, and print the table."""
    setup_logging()
    try:
        experiment = parse_config(TextExperiment, sys.argv[1:] if argv is None else argv, prog="text_experiment")
        if BASELINE not in experiment.arms:
            raise ConfigError(f"a recall experiment needs an arm {BASELINE}, with which the others are compared")
        num_pairs, documents = experiment.setting("num_pairs"), experiment.setting("documents")
        lab = TextLab(experiment, lambda model, arm: measure(model, lab, num_pairs, documents))
        results = lab.results()
    except StateXError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return error.exit_code
    arms = {
        name: {**summarise(records, results[BASELINE]), "seconds_per_token": [r["seconds_per_token"] for r in records]}
        for name, records in results.items()
    }
    summary = lab.write_summary(arms, text=experiment.text_facts)
    draw(summary, Path(experiment.out) / "recall.png")
    Console(width=160).print(make_table(summary, str(experiment.model["model_type"])))
    return 0


def measure(model_dir: Path, lab: TextLab, num_pairs: Sequence[int], documents: int) -> dict[str, Any]:
    """Return a model's recall of each document, its loss of each text, its sizes and its seconds per token."""
    model = from_pretrained(model_dir, dtype=torch.float32, device=device())
    source, tokenizer, recall = lab.recall_text(HELD_OUT, seed=0), load_tokenizer(lab.tokenizer()), {}
    for n in num_pairs:
        drawn = [source.draw(n) for _ in range(documents)]
        longest = max(len(tokens) for tokens, _ in drawn)
        padded = np.array([[row + [0] * (longest - len(row)) for row in document] for document in drawn])
        recall[str(n)] = score_mqar(model, padded[:, 0], padded[:, 1].astype(np.uint8)).tolist()
    text = run_perplexity(model, read_documents(lab.held_out(), tokenizer), PerplexitySettings())
    return {
        "state_numbers": model.config.state_elements,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recall": recall,
        "text": [[n, loss] for n, loss in text.documents],
        "seconds_per_token": seconds_per_token(model, model_dir.parent / "run" / METRICS_NAME),
    }


def seconds_per_token(model: RecurrentLM, metrics: Path) -> dict[str, float]:
    """Return the seconds per token of training and of decoding.

    ``training`` is the median step of the run, in wall time. All others are CPU time of this process: another job on
    the machine changes them little.
    """
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    ids = torch.randint(model.config.vocab_size, (1, steps[0]["tokens"]), device=device())
    both = time_cpu(lambda: model(ids).logits.logsumexp(dim=-1).mean().backward())
    return {
        "training": statistics.median(step["seconds"] / step["tokens"] for step in steps),
        "forward_and_backward": both.least / ids.numel(),
        **{f"decoding, batch {n}": decode_step(model, n)["seconds"] / n for n in DECODED_BATCHES},
    }


if __name__ == "__main__":
    sys.exit(main())
