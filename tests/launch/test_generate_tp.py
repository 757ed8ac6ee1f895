"""``statex generate`` on two gloo ranks: the text of one process, printed once, and errors that are said once."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

from checkpoints_tools.reshard.reshard import reshard
from launch.cli import main
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.models.config import CONFIG_NAME
from statex_dist.models.hf import from_pretrained, save_pretrained
from tests.distributed_test import run_distributed_test
from tests.runs import GLA, expanded, save_model

PROMPT = ["--prompt", "Once upon a time there was" * 3, "--max-new-tokens", "12", "--ignore-eos", "--threads", "1"]
DRAWN = [*PROMPT, "--prompt", "a", "--temperature", "1.5", "--json"]
FORGETFUL = [*PROMPT, "--mitigation", "sliding-window:tokens=2"]
CASES = {
    # for rank 0, and for rank 1 where that is told something else
    "a remedy": (["--model", "shards", *FORGETFUL],),
    "another seed": (["--model", "shards", *DRAWN], ["--model", "shards", *DRAWN, "--seed", "7"]),
    "another config": (["--model", "shards", *PROMPT], ["--model", "changed", *PROMPT]),
    "no number": (["--model", "nan", *PROMPT],),
    "no prompt": (["--model", "shards"],),
    "other end tokens": (["--model", "shards", *DRAWN], ["--model", "ended", *DRAWN]),
    "a file of states": (["--model", "shards", *PROMPT, "--save-state", "states"],),
}


def say(arguments: list[str]) -> tuple[int, str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(["generate", *arguments])
    return code, out.getvalue(), err.getvalue()


def work(rank: int, root: Path, ports: list[int]) -> dict[str, tuple[int, str, str]]:
    os.chdir(root)
    said = {}
    for (name, arguments), port in zip(CASES.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        said[name] = say([*arguments[min(rank, len(arguments) - 1)], "--tp", "2", "--device", "cpu"])
    return said


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its shards, those with a changed config, and shards of a model with a damaged row in rank 1's half."""
    root = tmp_path_factory.mktemp("ranks")
    save_model(expanded(GLA), root / "model")
    damaged = from_pretrained(root / "model")
    damaged.trunk.layers[0].attn.v_proj.weight.data[-1] = torch.nan
    save_pretrained(damaged, root / "damaged")
    for source, target in (("model", "shards"), ("damaged", "nan")):
        BytesTokenizer().save(root / source)
        reshard(root / source, root / target, to="tp", tp=2)
    shutil.copytree(root / "shards", root / "changed")
    shutil.copytree(root / "shards", root / "ended")
    (root / "ended" / "generation_config.json").write_text('{"eos_token_id": [257]}')
    config = json.loads((root / "changed" / CONFIG_NAME).read_text())
    (root / "changed" / CONFIG_NAME).write_text(json.dumps(config | {"norm_eps": 0.5}))
    return root


@pytest.fixture(scope="module")
def ranks(root: Path) -> dict[str, list[tuple[int, str, str]]]:
    """What both ranks print, and their exit codes, by case."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in CASES]
        ports = [each.getsockname()[1] for each in sockets]
    of_ranks = run_distributed_test(work, 2, root, ports, group=False)
    return {name: [of_rank[name] for of_rank in of_ranks] for name in CASES}


@pytest.mark.distributed
def test_a_remedy_acts_on_every_rank(root, ranks):
    alone = say(["--model", str(root / "model"), *FORGETFUL])[1]
    assert alone != say(["--model", str(root / "model"), *PROMPT])[1]
    assert [of_rank[:2] for of_rank in ranks["a remedy"]] == [(0, alone), (0, "")]


@pytest.mark.distributed
def test_what_rank_0_draws_is_what_all_ranks_go_on_with(root, ranks):
    alone = json.loads(say(["--model", str(root / "model"), *DRAWN])[1])
    (code, out, _), other = ranks["another seed"]
    assert (code, json.loads(out)["continuations"]) == (0, alone["continuations"])
    assert other == (0, "", "")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "speaker", "words"),
    [
        ("another config", 1, "error: changed/config.json "),
        ("no number", 0, "error: the model's output is NaN or infinite, first in layer 0 at position 0"),
        ("other end tokens", 0, "error: the ranks have different tokenizers at bytes, or different end tokens at "),
        ("no prompt", 0, "error: no prompt; give --prompt TEXT"),
        ("a file of states", 0, "error: --save-state does not go with --tp"),
    ],
)
def test_one_rank_says_what_is_wrong_and_all_end_with_its_exit_code(ranks, name, speaker, words):
    said = ranks[name]
    assert [(code, out) for code, out, _ in said] == [(2, "")] * 2
    assert said[speaker][2].startswith(words)
    assert said[speaker][2].count("\n") == 1
    assert said[1 - speaker][2] == ""
