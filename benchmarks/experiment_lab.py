"""Train and measure the models of an experiment, arm by arm: each step is a user's command, and each result is kept.

Finished steps are not repeated: the same command continues a killed experiment. Every product is stored with the recipe
that it was made from. A product of another recipe is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from benchmarks.experiment_stats import machine
from benchmarks.widening import widen, widened
from launch.cli import main as statex
from launch.demo_data import library_pieces, recall_documents, write_sources
from statex_dist.durable.files import write_durably
from statex_dist.errors import ConfigError, StateXError
from statex_dist.models.mitigation import parse_mitigation
from statex_dist.models.registry import config_from_dict

REPOSITORY = Path(__file__).resolve().parent.parent
RESULT_NAME = "result.json"
MADE_FROM_NAME = "made_from.json"
HELD_OUT = "held_out"

_EXPAND_OPTIONS = {"layers", "factor", "init", "op", "target_state", "plan", "recipe", "reset_dynamics"}


@dataclass(kw_only=True)
class Corpus:
    """A data set of recall documents and of pieces of text.

    Attributes:
        num_pairs: Numbers of key-value pairs of its recall documents.
        recall_tokens: Tokens of all recall documents, divided equally between the numbers of pairs.
        text_pieces: Pieces of the Python standard library's sources; no piece is in two corpora.
        same_text_as: Name of a corpus whose pieces it has, instead of its own.
        document_bytes: Length of the documents into which each piece is cut; None leaves a piece whole.
    """

    num_pairs: list[int] = field(default_factory=list)
    recall_tokens: int = 0
    text_pieces: int = 0
    same_text_as: str | None = None
    document_bytes: int | None = None


@dataclass(kw_only=True)
class Stage:
    """A training run.

    Attributes:
        corpus: Name of its data.
        run: The other values of its configuration (``statex_dist.run_config.RunConfig``).
    """

    corpus: str
    run: dict[str, Any]


@dataclass(kw_only=True)
class Arm:
    """An arm of the experiment: the changes to the pre-trained model.

    Attributes:
        expand: Options of ``statex expand``; None leaves the model as it is.
        mlp_channels: Channels added to every MLP without a change of the function, in place of an expansion.
        model: Values of ``config.json`` of a model that is pre-trained for this arm alone, on the same tokens.
        run: Values of its post-training's configuration, in addition to those of all arms.
        corpus: Name of its data, if it differs from that of all arms.
        train: Whether it is post-trained.
        like: Name of an arm above whose finished model is measured again, in another way.
        mitigation: The mitigation of the measurement (``statex eval --mitigation``).
    """

    expand: dict[str, Any] | None = None
    mlp_channels: int | None = None
    model: dict[str, Any] | None = None
    run: dict[str, Any] = field(default_factory=dict)
    corpus: str | None = None
    train: bool = True
    like: str | None = None
    mitigation: str | None = None

    def __post_init__(self) -> None:
        made = [name for name in ("expand", "mlp_channels", "model", "like") if getattr(self, name) is not None]
        if len(made) > 1:
            raise ConfigError(f"an arm has one of expand, mlp_channels, model and like, not {' and '.join(made)}")


@dataclass(kw_only=True)
class Experiment:
    """An experiment.

    Attributes:
        out: Directory of all output.
        model: Contents of the small model's ``config.json``.
        corpora: The data sets by name; ``held_out`` is only measured on.
        pretrain: Training runs that make the model, one after another.
        posttrain: The training run of every arm.
        arms: By name.
        seeds: Of parameters, expansions and the order of the data; the data is the same.
        piece_bytes: Length of a piece of text.
        settings: Settings of the experiment's own code.
    """

    out: str
    model: dict[str, Any]
    corpora: dict[str, Corpus]
    pretrain: list[Stage]
    posttrain: Stage
    arms: dict[str, Arm]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    piece_bytes: int = 1000
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = [stage.corpus for stage in (*self.pretrain, self.posttrain)]
        named += [arm.corpus for arm in self.arms.values() if arm.corpus is not None]
        named += [corpus.same_text_as for corpus in self.corpora.values() if corpus.same_text_as is not None]
        for name in named:
            if name not in self.corpora:
                raise ConfigError(f"corpus {name!r} is not one of {', '.join(self.corpora)}")
        if HELD_OUT not in self.corpora:
            raise ConfigError(f"an experiment needs a corpus {HELD_OUT}, that nothing is trained on")
        if not self.pretrain or not self.arms or not self.seeds:
            raise ConfigError("an experiment needs pretrain, arms and seeds")
        for name, arm in self.arms.items():
            if arm.like is not None and arm.like not in list(self.arms)[: list(self.arms).index(name)]:
                raise ConfigError(f"arm {name} is like {arm.like!r}, which is no arm above it")
            if arm.mitigation is not None:
                parse_mitigation(arm.mitigation)
            if arm.mlp_channels is not None:
                widened(config_from_dict(self.model), arm.mlp_channels)
            if arm.model is not None and (extra := config_from_dict(merged(self.model, arm.model)).extra):
                raise ConfigError(f"arm {name}: model.{next(iter(extra))} is no key of a {self.model['model_type']}")
            if unknown := sorted((arm.expand or {}).keys() - _EXPAND_OPTIONS):
                raise ConfigError(f"arm {name}: expand.{unknown[0]} is not one of {', '.join(sorted(_EXPAND_OPTIONS))}")

    def setting(self, name: str) -> Any:
        """Return a setting.

        Raises:
            ConfigError: It is not given.
        """
        if name not in self.settings:
            raise ConfigError(f"this experiment needs settings.{name}")
        return self.settings[name]

    def data_recipe(self, name: str) -> dict[str, Any]:
        """Return all values that determine a data set."""
        counts = {key: corpus.text_pieces for key, corpus in self.corpora.items()}
        return {"name": name, "corpus": asdict(self.corpora[name]), "pieces": counts, "piece_bytes": self.piece_bytes}

    def pretraining_recipe(self, seed: int, stages: int, model: Mapping[str, Any]) -> dict[str, Any]:
        """Return all values that determine a model after ``stages`` stages."""
        done = [{"data": self.data_recipe(stage.corpus), "run": stage.run} for stage in self.pretrain[:stages]]
        return {"model": dict(model), "seed": seed, "stages": done}

    def arm_recipe(self, seed: int, arm: Arm) -> dict[str, Any]:
        """Return all values that determine an arm's model."""
        if arm.like is not None:
            return self.arm_recipe(seed, self.arms[arm.like])
        corpus = arm.corpus or self.posttrain.corpus
        training = {"data": self.data_recipe(corpus), "run": merged(self.posttrain.run, arm.run)} if arm.train else None
        base = self.pretraining_recipe(seed, len(self.pretrain), merged(self.model, arm.model or {}))
        widening = {} if arm.mlp_channels is None else {"mlp_channels": arm.mlp_channels}
        return {"base": base, "expand": arm.expand, **widening, "training": training}


class Lab:
    """Trains and measures the models of an experiment.

    Args:
        experiment: The experiment.
        measure: Measures an arm's model, in a directory; its return value is kept as JSON.
    """

    def __init__(self, experiment: Experiment, measure: Callable[[Path, Arm], dict[str, Any]]):
        self.experiment, self.measure = experiment, measure
        self.out = Path(experiment.out)
        self.console = Console(stderr=True, highlight=False)

    def results(self) -> dict[str, list[dict[str, Any]]]:
        """Run the unfinished steps and return the measurements of every arm, by seed."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.experiment.arms}
        for seed in self.experiment.seeds:
            for name, arm in self.experiment.arms.items():
                found[name].append(self._result(seed, name, arm))
        return found

    def write_summary(self, arms: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Write ``summary.json``, the arms' figures and all values that determine them, and return its contents."""
        summary = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "experiment": asdict(self.experiment),
            "seeds": self.experiment.seeds,
            "arms": arms,
            **more,
        }
        write_durably(self.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def _result(self, seed: int, name: str, arm: Arm) -> dict[str, Any]:
        path = self.out / f"seed{seed}" / name / RESULT_NAME
        recipe = {
            "model": self.experiment.arm_recipe(seed, arm),
            "mitigation": arm.mitigation,
            "settings": self.experiment.settings,
            "held_out": self.experiment.data_recipe(HELD_OUT),
        }
        if not _is_made(path, recipe):
            model = self._arm(seed, name, arm)
            self.console.print(f"measuring {model}", markup=False)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(self.measure(model, arm)) + "\n")
            _say_made(path, recipe)
        return json.loads(path.read_text(encoding="utf-8"))

    def _arm(self, seed: int, name: str, arm: Arm) -> Path:
        folder = self.out / f"seed{seed}" / name
        if arm.like is not None:
            return self._arm(seed, arm.like, self.experiment.arms[arm.like])
        model = self._pretrained(seed, self.out / f"seed{seed}" if arm.model is None else folder, arm.model or {})
        if arm.expand is not None or arm.mlp_channels is not None:
            expanded = folder / "expanded"
            recipe = {**self.experiment.arm_recipe(seed, arm), "training": None}
            if not _is_made(expanded / "config.json", recipe):
                if arm.expand is None:
                    widen(model, expanded, channels=arm.mlp_channels or 0, seed=seed)
                else:
                    words = [f"--{key.replace('_', '-')}={value}" for key, value in arm.expand.items()]
                    self._statex(
                        "expand", "--source", model, "--target", expanded, "--seed", seed, "--overwrite", *words
                    )
                _say_made(expanded / "config.json", recipe)
            model = expanded
        if not arm.train:
            return model
        run = merged(self.experiment.posttrain.run, arm.run)
        # Another order of the data than in pre-training; the same for every arm.
        corpus = arm.corpus or self.experiment.posttrain.corpus
        recipe = self.experiment.arm_recipe(seed, arm)
        return self._train(folder, {"path": str(model)}, Stage(corpus=corpus, run=run), 1000 + seed, recipe)

    def _pretrained(self, seed: int, folder: Path, changes: Mapping[str, Any]) -> Path:
        values = merged(self.experiment.model, changes)
        source: dict[str, Any] = {"config": values}
        for index, stage in enumerate(self.experiment.pretrain):
            recipe = self.experiment.pretraining_recipe(seed, index + 1, values)
            model = self._train(folder / f"pretrain{index}", source, stage, seed, recipe)
            source = {"path": str(model)}
        return model

    def _train(
        self, folder: Path, source: Mapping[str, Any], stage: Stage, seed: int, recipe: Mapping[str, Any]
    ) -> Path:
        """Run one training with the command that users run, reshard its checkpoint, and return the model."""
        model, run_dir = folder / "model", folder / "run"
        if _is_made(model / "config.json", recipe):
            return model
        config = {
            "run_dir": str(run_dir),
            "seed": seed,
            "model": dict(source),
            "data": {"path": str(self._data(stage.corpus))},
            "engine": {"name": "plain", "precision": "fp32"},
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / "run.yaml", yaml.safe_dump(merged(config, stage.run), sort_keys=False))
        command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--config", str(folder / "run.yaml")]
        self.console.print(f"$ {' '.join(command[1:])}", markup=False)
        # Operations of small models are too short to share between threads.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, env=environment, check=False)
        if done.returncode:
            raise StateXError(f"training of {folder} ended with exit code {done.returncode}; its messages are above")
        self._statex("reshard", "--source", run_dir, "--target", model, "--to", "hf", "--overwrite")
        # The metrics stay; the optimizer's states of every arm would fill a disk.
        shutil.rmtree(run_dir / "checkpoints")
        _say_made(model / "config.json", recipe)
        return model

    def _data(self, name: str) -> Path:
        target = self.out / "data" / name
        if _is_made(target / "index.json", self.experiment.data_recipe(name)):
            return target
        (self.out / "data").mkdir(parents=True, exist_ok=True)
        sources = write_sources(self.out / "data", name, **self.rows(name))
        self._statex("prepare", *sources, "--tokenizer", self.tokenizer(), "--out", target, "--overwrite")
        _say_made(target / "index.json", self.experiment.data_recipe(name))
        return target

    def tokenizer(self) -> str:
        """Return the tokenizer of all data, as ``statex prepare`` takes it."""
        return "bytes"

    def rows(self, name: str) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of a corpus by kind, for ``statex prepare``."""
        corpus = self.experiment.corpora[name]
        recall = recall_documents(tuple(corpus.num_pairs), corpus.recall_tokens) if corpus.num_pairs else []
        return {"recall": recall, "text": [{"text": piece} for piece in self._pieces(name)]}

    def held_out(self) -> Path:
        """Return the data that no model is trained on."""
        return self._data(HELD_OUT)

    def _pieces(self, name: str) -> list[str]:
        """Return the documents of a corpus' text: its own stretch of all pieces, whole or cut."""
        counts = {key: corpus.text_pieces for key, corpus in self.experiment.corpora.items()}
        pieces = library_pieces(sum(counts.values()), length=self.experiment.piece_bytes)
        owner = self.experiment.corpora[name].same_text_as or name
        first = sum(list(counts.values())[: list(counts).index(owner)])
        size = self.experiment.corpora[name].document_bytes or self.experiment.piece_bytes
        own = pieces[first : first + counts[owner]]
        return [piece[start : start + size] for piece in own for start in range(0, len(piece), size)]

    def _statex(self, *arguments: object) -> None:
        words = [str(argument) for argument in arguments]
        self.console.print(f"$ statex {' '.join(words)}", markup=False)
        if statex(words):
            raise StateXError(f"statex {words[0]} failed; its message is above")


def _is_made(path: Path, recipe: Mapping[str, Any]) -> bool:
    """Return whether the product that a file completes is finished.

    Raises:
        ConfigError: It was made from another recipe.
    """
    made_from = path.parent / MADE_FROM_NAME
    if not path.is_file() or not made_from.is_file():
        return False
    before, now = json.loads(made_from.read_text(encoding="utf-8")), json.loads(json.dumps(recipe))
    if before != now:
        raise ConfigError(f"{path.parent} was made from another configuration ({made_from}); give another --out")
    return True


def _say_made(path: Path, recipe: Mapping[str, Any]) -> None:
    write_durably(path.parent / MADE_FROM_NAME, json.dumps(recipe, indent=1) + "\n")


def merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``extra``, section by section."""
    result = dict(base)
    for key, value in extra.items():
        mine = result.get(key)
        result[key] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return result
