"""State health: figures against the recurrence in float64, verdicts on models whose collapse is known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cli import main
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import ConfigError, DataError
from statex_dist.evaluation.health.collapse import (
    STATISTICS,
    CollapseSettings,
    collapse_units,
    observed_positions,
    series,
)
from statex_dist.evaluation.health.collapse_results import conclusion
from statex_dist.evaluation.health.verdict import collapse_index, judge, sustained_from
from statex_dist.evaluation.journal import work
from statex_dist.models.hf import save_pretrained
from statex_dist.models.lm import LMOutput, RecurrentLM
from statex_dist.models.mitigation import parse_mitigation
from statex_dist.models.registry import config_from_dict
from tests.evaluation.stand_ins import tiny_config
from tests.runs import GLA, MAMBA2, OTHERS, expanded

TOKENIZER = BytesTokenizer()
VOCAB = 258

MODELS = {
    "gla": expanded(GLA),
    "mamba2": expanded(MAMBA2),
    "hgrn2": expanded(OTHERS["hgrn2"]),
    "kda": config_from_dict(OTHERS["kda"]),
}


def fresh(config, seed=0):
    model = RecurrentLM(config)
    model.init_parameters(seed)
    return model.eval()


def measured(model, **options):
    values = {"train_length": 32, "length": 128, "segment_length": 20, "points": 16, "sequences": 2, **options}
    chosen = CollapseSettings(**values)
    return chosen, work(collapse_units(model, chosen, TOKENIZER))


def text_of(settings, sequence):
    """The tokens that a sequence was made of."""
    from statex_dist.evaluation.health.collapse import _draw

    return torch.as_tensor(_draw("text", sequence, settings, TOKENIZER)).long()


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_figures_are_those_of_the_recurrence_in_float64(name):
    model = fresh(MODELS[name])
    chosen, records = measured(model, prompts=("text",), length=72, points=8)
    model = model.double()
    for record in records:
        tokens = text_of(chosen, record["sequence"])
        last = 0
        for at, position in enumerate(chosen.positions):
            with torch.no_grad():
                output = model(tokens[None, :position], output_states=True, backend="naive")
            losses = F.cross_entropy(output.logits[0], tokens[1 : position + 1], reduction="none")
            assert record["loss"][at] == pytest.approx(float(losses[last:].mean()), rel=1e-4)
            last = position
            for layer, state in enumerate(output.states):
                heads = state[0][0].flatten(1).numpy()
                wanted = {
                    "mean": heads.mean(1),
                    "variance": heads.var(1),
                    "norm": np.linalg.norm(heads, axis=1),
                    "largest": np.abs(heads).max(1),
                }
                for statistic in STATISTICS:
                    found = [values[at] for values in record["states"][statistic][layer]]
                    tiny = 1e-4 * np.abs(wanted[statistic]).max()
                    np.testing.assert_allclose(found, wanted[statistic], rtol=1e-3, atol=tiny)


@pytest.mark.parametrize("segment_length", [7, 1024])
def test_no_loss_is_dropped_where_segments_meet(segment_length):
    model = fresh(MODELS["gla"])
    chosen, records = measured(model, prompts=("text",), segment_length=segment_length)
    widths = np.diff(chosen.positions, prepend=0)
    for record in records:
        tokens = text_of(chosen, record["sequence"])
        with torch.no_grad():
            whole = F.cross_entropy(model(tokens[None, :-1]).logits[0], tokens[1:], reduction="sum")
        assert float((np.array(record["loss"]) * widths).sum()) == pytest.approx(float(whole), rel=1e-5)


def test_retention_of_gla_is_the_product_of_its_gates():
    model = fresh(config_from_dict(GLA))
    gates = []
    for layer in model.trunk.layers:
        layer.attn.gk_proj[1].bias.data += 4.0
        layer.attn.gk_proj.register_forward_hook(lambda module, inputs, output: gates.append(output))
    chosen, records = measured(model, prompts=("text",), sequences=1)
    gates.clear()
    with torch.no_grad():
        model(text_of(chosen, 0)[None, : chosen.train_length])
    for layer, logits in enumerate(gates):
        kept = (F.logsigmoid(logits[0].double()) / 16).sum(0).exp().unflatten(0, (4, -1))
        np.testing.assert_allclose(records[0]["retention"][layer], kept.square().mean(-1).sqrt(), rtol=1e-4)
        np.testing.assert_allclose(records[0]["retention_slowest"][layer], kept.amax(-1), rtol=1e-4)


def test_retention_of_mamba2_is_its_decay_and_what_is_forgotten_is_zero():
    model = fresh(MODELS["mamba2"])
    mixers = [layer.mixer for layer in model.trunk.layers]
    for mixer in mixers:
        mixer.A_log.data = torch.tensor([-4.0, -3.0, -2.0, 8.0])
    steps = []
    for mixer in mixers:
        mixer.in_proj.register_forward_hook(lambda module, inputs, output: steps.append(output[..., -4:]))
    chosen, records = measured(model, prompts=("text",), sequences=1)
    steps.clear()
    with torch.no_grad():
        model(text_of(chosen, 0)[None, : chosen.train_length])
    for layer, mixer in enumerate(mixers):
        dt = F.softplus(steps[layer][0].double() + mixer.dt_bias.double()).clamp(*model.config.time_step_limit)
        kept = (-dt * mixer.A_log.double().exp()).sum(0).exp().detach().numpy()
        np.testing.assert_allclose(records[0]["retention"][layer][:3], kept[:3], rtol=1e-4)
        assert records[0]["retention"][layer][3] == 0.0


# -- verdicts ---------------------------------------------------------------------------------------------------------


class Exploding:
    """A model whose state and loss follow given curves of the number of tokens read."""

    def __init__(self, norm, loss, heads=3):
        self.config, self.training, self.state_places = tiny_config(), False, [(0, "recurrent")]
        self.norm, self.loss, self.heads = norm, loss, heads
        self.state_places = [(0, "recurrent")]

    def parameters(self):
        return iter(())

    def eval(self):
        return self

    def train(self, mode=True):
        return self

    def __call__(self, input_ids, *, states=None, output_states=False):
        before = int(states[0][1][0]) if states else 0
        rows, width = input_ids.shape
        # Newlines only: the target is always the same token, whose probability the wanted loss fixes.
        logits = torch.zeros(rows, width, VOCAB, dtype=torch.float64)
        for i in range(width):
            p = np.exp(-self.loss(before + i + 1))
            logits[:, i, :] = np.log((1 - p) / (VOCAB - 1))
            logits[:, i, ord("\n")] = np.log(p)
        after = before + width
        # Head 1 alone follows the curve; entries of +-s have mean 0, variance s^2 and norm 4 s.
        sizes = torch.tensor([1.0, self.norm(after), 1.0], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0]).double().repeat(8).view(4, 4)
        state = (sizes[:, None, None] * signs).expand(rows, -1, -1, -1)
        return LMOutput(logits=logits, states=[(state, torch.full((rows,), after))])


def judged(model, **options):
    chosen, records = measured(model, prompts=("newlines",), points=32, **options)
    heads, verdict, curve = judge(records, chosen)["newlines"]
    return {head.head: head for head in heads}, verdict, curve


def test_a_known_collapse_is_found_where_it_is():
    # Norm t past 64 tokens: the variance is above 4 times its largest within 32 tokens (1) from 64 on.
    model = Exploding(lambda t: 1.0 if t <= 32 else t / 32, lambda t: 1.0 if t <= 80 else 3.0)
    heads, verdict, curve = judged(model)
    assert (verdict.collapsed, verdict.position, verdict.why) == (True, 84, "loss")
    assert (verdict.low, verdict.high, verdict.share) == (None, None, None), "one sequence has no interval"
    assert (curve.low, curve.high) == (None, None)
    assert curve.reference == pytest.approx(1.0)
    assert curve.ratio == pytest.approx((16 * 1 + 48 * 3) / 64)
    assert (heads[1].collapsed, heads[1].position, heads[1].why) == (True, 68, "variance")
    assert heads[1].sc_ratio == pytest.approx(16.0)
    assert (heads[1].largest_within, heads[1].largest_beyond) == (1.0, 4.0)
    assert not heads[0].collapsed
    assert heads[0].sc_ratio == pytest.approx(1.0)


def test_a_healthy_model_is_not_accused():
    rng = np.random.default_rng(0)
    noise = rng.uniform(0.8, 1.2, 1000)
    heads, verdict, _ = judged(Exploding(lambda t: noise[t], lambda t: 1.0 + 0.2 * noise[t] + 1.0 / t))
    assert not verdict.collapsed
    assert not any(head.collapsed for head in heads.values())


def test_what_the_training_length_ends_with_is_within_it():
    heads, verdict, _ = judged(Exploding(lambda t: 1.0 if t < 32 else 3.0, lambda t: 2.0 if t <= 28 else 1.0))
    assert not heads[1].collapsed
    assert heads[1].sc_ratio == pytest.approx(1.0)
    assert not verdict.collapsed


def test_a_peak_that_passes_is_no_collapse():
    heads, verdict, _ = judged(Exploding(lambda t: 9.0 if 60 < t <= 72 else 1.0, lambda t: 4.0 if t in (50, 51) else 1))
    assert not verdict.collapsed
    assert not heads[1].collapsed
    assert heads[1].sc_ratio == pytest.approx(81.0), "the ratio still says what was seen"


@pytest.mark.parametrize(
    ("length", "options", "doubted"),
    [
        (64, {}, True),
        (128, {}, True),
        (160, {}, False),
        (64, {"prompts": ("newlines",)}, True),
        (96, {"prompts": ("newlines",)}, False),
        (160, {"variance_factor": 8.0}, True),
    ],
)
def test_a_length_that_cannot_show_a_head_that_never_forgets_is_said(length, options, doubted):
    chosen = CollapseSettings(**{"train_length": 32, "length": length, "points": 32, "prompts": ("text",), **options})
    grown = np.array(chosen.positions, float) ** (2 if chosen.prompts == ("newlines",) else 1)
    within = np.array(chosen.positions) <= 32
    index, _ = collapse_index(grown, chosen.variance_factor * grown[within].max(), chosen.sustained)
    assert (index is None) == doubted, "what the verdict does with such a head"
    assert (chosen.doubt is not None) == doubted
    if doubted:
        assert f"{length} tokens are too few for the verdict on heads" in chosen.doubt


def test_thresholds_are_options():
    model = Exploding(lambda t: 1.0 if t <= 32 else t / 32, lambda t: 1.0 if t <= 80 else 3.0)
    heads, verdict, _ = judged(model, variance_factor=9.0, loss_rise=2.5)
    assert not verdict.collapsed
    assert heads[1].position == 100


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_a_collapse_with_its_position(value):
    model = Exploding(lambda t: value if t > 124 else 1.0, lambda t: float("nan") if t > 120 else 1.0)
    heads, verdict, curve = judged(model)
    assert (verdict.position, verdict.why) == (124, "not finite")
    assert (heads[1].position, heads[1].why, heads[1].sc_ratio) == (128, "not finite", None)
    assert not heads[0].collapsed
    within = Exploding(lambda t: value if t > 8 else 1.0, lambda t: float("nan"))
    heads, verdict, curve = judged(within)
    assert (verdict.position, verdict.why, curve.reference) == (4, "not finite", None)
    assert heads[1].position == 12


def test_an_exploding_model_is_read_to_its_end():
    model = fresh(MODELS["gla"])
    model.trunk.layers[1].attn.v_proj.weight.data.fill_(3e38)
    chosen, records = measured(model, prompts=("newlines", "text"))
    (heads, verdict, _) = judge(records, chosen)["text"]
    assert verdict.why == "not finite"
    assert {head.layer for head in heads if head.why == "not finite"} >= {2}
    assert not any(head.collapsed for head in heads if head.layer == 0)


def test_several_sequences_give_an_interval():
    chosen = CollapseSettings(train_length=32, length=128, points=32, prompts=("text",), sequences=6)
    positions = np.array(chosen.positions)
    records = []
    for i in range(6):
        loss = np.where(positions > 64 + 4 * i, 5.0, 1.0)
        flat = {name: [[[1.0] * len(positions)]] for name in STATISTICS}
        records.append(
            {"prompt": "text", "sequence": i, "loss": loss.tolist(), "states": flat}
            | {"retention": None, "retention_slowest": None}
        )
    _, verdict, curve = judge(records, chosen)["text"]
    assert verdict.position == 68, "the first sequence alone lifts the mean by 4/6"
    assert verdict.low <= 68 <= verdict.high
    assert verdict.low < verdict.high <= 88
    assert verdict.share == 1.0
    assert (curve.low <= curve.mean).all()
    assert (curve.mean <= curve.high).all()


@settings(max_examples=60, deadline=None)
@given(above=st.lists(st.booleans(), min_size=1, max_size=30), share=st.sampled_from([0.5, 0.9, 1.0]))
def test_sustained_is_what_its_sentence_says(above, share):
    wanted = next(
        (i for i in range(len(above) - 2) if above[i] and sum(above[i:]) / len(above[i:]) >= share),
        None,
    )
    assert sustained_from(np.array(above), share) == wanted


@settings(max_examples=40, deadline=None)
@given(train=st.integers(16, 5000), multiple=st.floats(2, 40), points=st.integers(1, 300))
def test_positions_hold_the_training_length_and_the_end(train, multiple, points):
    length = int(train * multiple)
    positions = observed_positions(length, train, points)
    assert positions == sorted(set(positions))
    assert positions[-1] == length
    assert train in positions
    inside = [position for position in positions if position <= train]
    assert len(inside) >= 4
    assert len(positions) - len(inside) >= 4
    assert len(positions) <= points + 8 + 12, "a length of many training lengths costs no more positions"
    steps = np.diff([p for p in positions if p >= train])
    assert steps.max() - steps.min() <= 1
    coarse = observed_positions(16 * length, 16 * train, points, every=16)
    assert {16 * train, 16 * length} <= set(coarse)
    assert all(position % 16 == 0 for position in coarse)


def test_a_mitigation_shows_in_the_heads():
    model = fresh(config_from_dict(GLA))
    for layer in model.trunk.layers:
        layer.attn.gk_proj[1].bias.data.fill_(30.0)
    chosen, records = measured(model, prompts=("newlines",), points=32)
    assert all(head.collapsed for head in judge(records, chosen)["newlines"][0])
    assert records[0]["retention"][0][0] == pytest.approx(1.0, rel=1e-4)
    model.mitigation = parse_mitigation("sliding-window:tokens=24")
    chosen, records = measured(model, prompts=("newlines",), points=32)
    assert not any(head.collapsed for head in judge(records, chosen)["newlines"][0])
    assert records[0]["retention"] is None, "a window is not linear in the state"


# -- what it says -----------------------------------------------------------------------------------------------------


def said_of(*, mitigation=None, doubt=None, why="loss", **prompts):
    """The conclusion over prompts, each given as where its loss collapses, heads that do, and where the first does."""
    told = {
        name: {
            "verdict": {"collapsed": place is not None, "position": place, "why": None if place is None else why},
            "heads": {"collapsed": heads, "total": 4, "position": first},
        }
        for name, (place, heads, first) in prompts.items()
    }
    chosen = {"length": 2048, "train_length": 256}
    return conclusion({"prompts": told, "settings": chosen, "model": {"mitigation": mitigation}, "doubt": doubt})


QUIET, AWAY = (None, 0, None), (None, 4, 544)


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        (
            {"newlines": QUIET, "text": QUIET},
            "Loss: no collapse up to 2,048 tokens on newlines and text. States: 0 of 4 heads run away on newlines, 0 "
            "of 4 on text. Nothing to do up to that length",
        ),
        ({"newlines": QUIET, "text": QUIET, "doubt": "short"}, "too little was read to call the heads healthy"),
        (
            {"newlines": AWAY, "text": QUIET},
            "States: 4 of 4 heads run away on newlines (from 544 tokens on), 0 of 4 on text. The state can run away, "
            "but text did not make it: nothing to do",
        ),
        ({"newlines": (600, 4, 544), "data": QUIET}, "The state can run away, but data did not make it"),
        ({"newlines": AWAY}, "newlines are far from any text: read --prompts text, or --data, too"),
        (
            {"newlines": QUIET, "text": AWAY},
            "0 of 4 heads run away on newlines, 4 of 4 on text (from 544 tokens on). States leave the range that they "
            "had in training, and the loss may follow",
        ),
        (
            {"newlines": QUIET, "text": (900, 4, 544), "data": (700, 0, None)},
            "Loss: collapses on text from 900 tokens on, collapses on data from 700 tokens on, no collapse up to 2,048 "
            "tokens on newlines. States",
        ),
        (
            {"text": (900, 4, 544)},
            "Do not rely on it past 900 tokens: train it on longer documents, or with state passing "
            "(train.state_passing); without training, try a --mitigation (docs/state_health.md).",
        ),
        ({"text": (900, 4, 544), "mitigation": "forget-more"}, "try another --mitigation"),
        ({"text": (900, 0, None)}, "no state runs away there, so it may merely be unused to such lengths"),
        ({"text": (200, 4, 100), "why": "not finite"}, "Loss: not finite on text from 200 tokens on. States"),
        ({"text": (200, 4, 100)}, "within the training length of 256 tokens: check the model, its tokenizer and"),
    ],
)
def test_the_conclusion_in_plain_sentences(found, parts):
    assert parts in said_of(**found)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "gla"
    save_pretrained(fresh(MODELS["gla"]), directory)
    return directory


@pytest.fixture
def undrawn(monkeypatch):
    """Without the plots, which take longer than all else of so small a run."""
    for name in ("plot_losses", "plot_norms"):
        monkeypatch.setattr(f"statex_dist.evaluation.health.collapse_results.{name}", lambda judged, settings: b"")


def command(model, out, *more):
    options = ["--train-length", "32", "--length", "96", "--points", "8", "--sequences", "3", "--batch-size", "1"]
    return ["eval", "collapse", "--model", str(model), "--out", str(out), "--tokenizer", "bytes", *options, *more]


@pytest.mark.usefixtures("undrawn")
def test_command_and_resumption(saved, tmp_path: Path, capsys, monkeypatch):
    assert main(command(saved, tmp_path / "whole")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "loss healthy, x " in said
    assert "0 of 14 heads" in said
    assert "32 tokens (given by --train-length)" in said
    assert "WARNING: 96 tokens" in said
    from statex_dist.evaluation.health import collapse

    calls, real = [], collapse._stream

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(collapse, "_stream", interrupted)
    assert main(command(saved, tmp_path / "cut")) == 130
    assert not (tmp_path / "cut" / "collapse.json").exists()
    assert main(command(saved, tmp_path / "cut")) == 0
    assert len(calls) == 3 + 2, "four units, two of them done before"
    whole, cut = (json.loads((tmp_path / name / "collapse.json").read_text()) for name in ("whole", "cut"))
    for summary in (whole, cut):
        del summary["timing"]
    assert whole == cut
    rows_of = [(tmp_path / name / "collapse.jsonl").read_bytes() for name in ("whole", "cut")]
    assert rows_of[0] == rows_of[1]
    assert whole["train_length_from"] == "--train-length"
    assert whole["says"] in said
    assert whole["verdict"] == {"collapsed": False, "position": None, "prompt": None, "heads_collapsed": 0, "heads": 14}
    ends = {
        name: {row["low"] is None for row in told["loss"]["by_position"]} for name, told in whole["prompts"].items()
    }
    assert ends == {"newlines": {True}, "text": {False}}, "one sequence has no interval"
    assert whole["doubt"].startswith("96 tokens are too few for the verdict on heads")
    rows = [json.loads(line) for line in (tmp_path / "cut" / "collapse.jsonl").read_text().splitlines()]
    heads = [row for row in rows if row["kind"] == "head"]
    assert len(heads) == 2 * 14
    assert all(len(row["norm"]) == len(whole["positions"]) for row in heads)
    assert len([row for row in rows if row["kind"] == "sequence"]) == 1 + 3
    assert [bucket["end"] for bucket in whole["prompts"]["text"]["loss"]["by_position"]] == whole["positions"]


@pytest.mark.usefixtures("undrawn")
def test_a_mitigation_on_the_command_line(saved, tmp_path: Path, capsys):
    more = ["--prompts", "newlines", "--json", "--mitigation", "state-norm:learn=32,every=16", "--segment-length", "48"]
    assert main(command(saved, tmp_path / "out", *more)) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["model"]["mitigation"] == "state-norm:learn=32,every=16"
    assert all(position % 16 == 0 for position in summary["positions"])


def test_help_says_which_prompts_run(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "collapse", "--help"])
    assert "(default: newlines,text; with --data: newlines,data)" in " ".join(capsys.readouterr().out.split())


def test_own_text(saved, tmp_path: Path, capsys):
    (tmp_path / "a.txt").write_text("Some text of one's own. " * 8)
    (tmp_path / "b.txt").write_text("And some more of it. " * 8)
    more = ["--data", str(tmp_path / "*.txt"), "--json"]
    assert main(command(saved, tmp_path / "out", *more)) == 0
    summary = json.loads(capsys.readouterr().out)
    assert list(summary["prompts"]) == ["newlines", "data"]
    assert summary["prompts"]["data"]["sequences"] == 3
    for name in ("collapse_loss.png", "collapse_norm.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(DataError, match=r"362.*3.*1,024.*3,075"):
        measured(fresh(MODELS["gla"]), prompts=("data",), data=str(tmp_path / "*.txt"), sequences=3, length=1024)


def test_what_was_found_of_another_text_does_not_count(tmp_path: Path):
    file, model = tmp_path / "a.txt", fresh(MODELS["gla"])
    chosen = CollapseSettings(
        train_length=32, length=64, prompts=("text", "data"), data=str(file), sequences=2, batch_size=1
    )

    def keys(text):
        file.write_text(text * 40)
        return [unit.key for unit in collapse_units(model, chosen, TOKENIZER)]

    one, again, other = keys("abcd "), keys("abcd "), keys("abce ")
    assert one == again
    assert one[:2] == other[:2] == ["text/0", "text/1"]
    assert not set(one[2:]) & set(other[2:])


def test_the_training_length_may_stand_in_the_config(saved, tmp_path: Path, capsys):
    from statex_dist.evaluation.suites.collapse import training_length

    (tmp_path / "config.json").write_text(json.dumps({**GLA, "train_length": 4096}))
    assert training_length(SimpleNamespace(model=str(tmp_path), train_length=None)) == (4096, "config.json")
    assert training_length(SimpleNamespace(model=str(tmp_path), train_length="2K")) == (2048, "--train-length")
    unknown = r"config.json.*'train_length'.*data-stats SHARDS"
    with pytest.raises(ConfigError, match=unknown):
        training_length(SimpleNamespace(model=str(saved), train_length=None))
    with pytest.raises(ConfigError, match="--train-length '1,2'"):
        training_length(SimpleNamespace(model=str(saved), train_length="1,2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_length": 8}, "train_length.*not 8"),
        (
            {"length": 63},
            "length 63 .* 32 tokens.* 64 .*128",
        ),
        ({"prompts": ()}, "no prompt given"),
        ({"prompts": ("tabs",)}, "prompt 'tabs'.*newlines, text, data"),
        ({"prompts": ("text", "text")}, "name one twice"),
        ({"prompts": ("data",)}, "'data' and --data PATH"),
        ({"data": "x"}, "'data' and --data PATH"),
        ({"sequences": 0}, "sequences must"),
        ({"variance_factor": 1.0}, "variance_factor.*not 1.0"),
        ({"loss_rise": float("nan")}, "loss_rise.*not nan"),
        ({"every": 24}, "train_length 32.*length 256.*every=24"),
        ({"sustained": 0.0}, "sustained must"),
        ({"segment_length": 0}, "segment length"),
        ({"seed": -1}, "seed must"),
    ],
)
def test_refuses_nonsense(options, message):
    with pytest.raises(ConfigError, match=message):
        CollapseSettings(**{"train_length": 32, **options})


def test_tokens_of_another_vocabulary(tmp_path: Path):
    (tmp_path / "a.txt").write_text("é" * 200)
    model = fresh(config_from_dict({**GLA, "vocab_size": 128}))
    with pytest.raises(DataError, match=r"256.*127"):
        measured(model, prompts=("data",), data=str(tmp_path / "a.txt"), sequences=1, length=400)


def test_series_gives_nan_for_null():
    record = {"states": {"mean": [[[1.0, None]]]}}
    ((layer, head, values),) = series(record, "mean")
    assert (layer, head) == (0, 0)
    assert values[0] == 1.0
    assert np.isnan(values[1])
