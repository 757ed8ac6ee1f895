"""Tasks of local files through the real lm-evaluation-harness, against plain forward passes."""

import importlib
import json
import math
import sys

import pytest
import torch
from jsonargparse import ArgumentParser

from launch.cmd_eval import add_suite_options, run_suite
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import ConfigError, StateXError
from statex_dist.evaluation import lm_eval_api
from statex_dist.evaluation.lm_eval_api import Harness, StateXLM, load_tasks, sampling_of
from statex_dist.evaluation.lm_eval_suite import LmEvalSettings, _figures, units_of
from statex_dist.evaluation.suites.lm_eval import LmEvalSuite
from statex_dist.models.hf import save_pretrained
from tests.evaluation.stand_ins import Says, tiny_model
from tests.inference.text_kinds import MARK, llama

TOKENIZER = BytesTokenizer()
CHOICES = ["red", "dark green", "blue"]
TEXTS = ["Some text.", "A text that is longer. " * 9, "é"]
TASKS = {
    "local_choice": (
        [{"q": f"Colour of {thing}?", "choices": CHOICES, "answer": i % 3} for i, thing in enumerate("abcd")],
        {
            "fewshot_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Q: {{q}}\nA:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
    "local_generate": (
        [{"q": question, "a": "x"} for question in ("The sky", "A leaf")],
        {
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{a}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
    "local_documents": (
        [{"text": text} for text in TEXTS],
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
                {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            ],
        },
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of task files with their data, as a user would write them."""
    directory = tmp_path_factory.mktemp("tasks")
    for name, (rows, options) in TASKS.items():
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test", **options}
        # JSON is YAML.
        (directory / f"{name}.yaml").write_text(json.dumps({**task, "metadata": {"version": 1.0}}))
    metrics = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "local_group", "task": ["local_choice"], "aggregate_metric_list": metrics}
    (directory / "local_group.yaml").write_text(json.dumps(group))
    return directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_pretrained(tiny_model(), directory)
    TOKENIZER.save(directory)
    return directory


@pytest.fixture
def few_names(monkeypatch):
    """Leaves the harness's own 14,000 names out: to read them takes ten seconds."""
    whole = lm_eval_api.TaskManager
    monkeypatch.setattr(lm_eval_api, "TaskManager", lambda **options: whole(**{**options, "include_defaults": False}))


def evaluate(*arguments):
    parser, suite = ArgumentParser(), LmEvalSuite()
    add_suite_options(parser, suite)
    return run_suite(suite, parser.parse_args([str(argument) for argument in arguments]))


def plain_logprob(model, context, continuation):
    """Of one forward pass over all tokens, context in front."""
    before, after = list(context.encode()) or [TOKENIZER.eos_token_id], list(continuation.encode())
    with torch.inference_mode():
        logprobs = model(torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(after)[:, None]).sum().item()


def test_figures_and_samples_are_those_of_plain_forward_passes(tasks, model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    names = ",".join(["local_group", "local_generate", "local_documents"])
    arguments = ["--model", model_dir, "--out", out, "--include-path", tasks, "--tasks", names, "--batch-size", 2]
    assert evaluate(*arguments, "--segment-length", 16, "--limit", 3) == 0
    assert "bits_per_byte" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["lm-eval.json", "lm-eval.jsonl"]
    summary = json.loads((out / "lm-eval.json").read_text())
    rows = [json.loads(line) for line in (out / "lm-eval.jsonl").read_text().splitlines()]
    by_task = {task: [row for row in rows if row["task"] == task] for task in TASKS}
    assert [len(found) for found in by_task.values()] == [3, 2, 3]
    model = tiny_model().eval()

    for row in by_task["local_choice"]:
        for (context, continuation), (logprob, _) in zip(row["arguments"], row["filtered_resps"], strict=True):
            assert logprob == pytest.approx(plain_logprob(model, context, continuation), abs=1e-5)
    right = [
        max(range(3), key=lambda i, d=row["doc"]: plain_logprob(model, f"Q: {d['q']}\nA:", f" {CHOICES[i]}"))
        == row["doc"]["answer"]
        for row in by_task["local_choice"]
    ]
    figures = {(figure["task"], figure["metric"]): figure for figure in summary["figures"]}
    assert len(figures) == len(summary["figures"]) == 5, "a group is told once"
    assert figures["local_group", "acc"]["value"] == figures["local_choice", "acc"]["value"]
    accuracy = figures["local_choice", "acc"]
    assert accuracy["value"] == summary["results"]["local_choice"]["acc,none"] == pytest.approx(sum(right) / 3)
    assert accuracy["stderr"] == summary["results"]["local_choice"]["acc_stderr,none"]
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]

    logprobs = [plain_logprob(model, "", text) for text in TEXTS]
    assert [row["filtered_resps"][0] for row in by_task["local_documents"]] == pytest.approx(logprobs, abs=1e-4)
    bits = figures["local_documents", "bits_per_byte"]
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert bits["value"] == pytest.approx(-sum(logprobs) / math.log(2) / num_bytes, rel=1e-6)
    assert bits["low"] < bits["value"] < bits["high"]
    words = figures["local_documents", "word_perplexity"]
    assert words["low"] < words["value"] < words["high"]

    for row in by_task["local_generate"]:
        tokens = list(row["doc"]["q"].encode())
        with torch.inference_mode():
            for _ in range(6):
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        text = TOKENIZER.decode(tokens[len(row["doc"]["q"]) :]).split("\n")[0]
        assert row["filtered_resps"] == [text]
    assert summary["versions"] == {**dict.fromkeys(TASKS, 1.0), "local_group": "N/A"}
    assert summary["n-samples"]["local_choice"] == {"original": 4, "effective": 3}
    assert summary["seeds"]["fewshot"] == 1234


@pytest.mark.parametrize(
    ("metric", "sample", "value"),
    [("acc", True, 1.0), ("bits_per_byte", [-8 * math.log(2), 4], 2.0), ("word_perplexity", [-4.0, 4], math.e)],
)
def test_one_document_has_no_interval(metric, sample, value):
    results = {"results": {"t": {f"{metric},none": value, "alias": "t"}}, "higher_is_better": {}}
    one, two = (
        list(_figures(results, {"t": [{"filter": "none", metric: sample}] * count}, seed=0)) for count in (1, 2)
    )
    assert [(f["value"], f["low"], f["high"], f["samples"]) for f in one] == [(value, None, None, 1)]
    assert [(f["low"], f["high"]) for f in two] == [(pytest.approx(value), pytest.approx(value))]


def test_examples_stand_before_the_question_and_units_change_nothing(tasks):
    model = tiny_model().eval()
    settings = LmEvalSettings(tasks=("local_choice", "local_gen*"), include_path=str(tasks), num_fewshot=2)
    answers = []
    for batch_size in (1, 8):
        harness = settings.harness()
        assert all(request.args[0].count("Q: ") == 3 for request in harness.requests["loglikelihood"])
        changed = LmEvalSettings(tasks=settings.tasks, batch_size=batch_size)
        units = units_of(harness, changed, model, TOKENIZER)
        records = [record for unit in units for record in unit.run()]
        answers.append({(record["kind"], record["request"]): record["answer"] for record in records})
    assert len(units_of(harness, LmEvalSettings(tasks=("a",), batch_size=1), model, TOKENIZER)) == 2
    assert answers[0].keys() == answers[1].keys()
    for key, answer in answers[0].items():
        assert answer == answers[1][key] or answer[0] == pytest.approx(answers[1][key][0], abs=1e-5)
    other = LmEvalSettings(tasks=settings.tasks, include_path=str(tasks), num_fewshot=2, fewshot_seed=1)
    assert other.harness().digest() != settings.harness().digest() == harness.digest()


def test_only_max_length_cuts_a_context(tasks):
    model = tiny_model().double().eval()
    short = StateXLM(model, TOKENIZER, max_length=8)
    harness = Harness(["local_documents", "local_choice"], include_path=str(tasks))
    request = harness.requests["loglikelihood"][0]
    context, continuation = request.args
    assert len(context) > 8
    ((logprob, _),) = short.loglikelihood([request])
    # The last token is not read: of 8 tokens seen, 4 are context before " red".
    kept = context[-(8 + 1 - len(continuation)) :]
    assert logprob == pytest.approx(plain_logprob(model, kept, continuation), abs=1e-9)
    long, cut = (
        lm.loglikelihood_rolling(harness.requests["loglikelihood_rolling"])
        for lm in (StateXLM(model, TOKENIZER, segment_length=8), short)
    )
    assert long == pytest.approx([plain_logprob(model, "", text) for text in TEXTS], abs=1e-9)
    assert cut[1] != pytest.approx(long[1], abs=1e-3)
    assert cut[2] == pytest.approx(long[2], abs=1e-9)


def test_repeated_questions_are_drawn_anew_and_alike_in_any_batch():
    model, options = tiny_model().eval(), {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "until": []}
    request = lm_eval_api.Instance("generate_until", {}, ("The sky", options), 0, ("task", 0, 3))
    drawn = [StateXLM(model, TOKENIZER, batch_size=n).generate_until([request] * 3) for n in (1, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 3
    assert StateXLM(model, TOKENIZER, seed=1).generate_until([request] * 3) != drawn[0]


def test_generation_options_are_read_as_the_harness_means_them():
    assert sampling_of({"until": "a", "max_new_tokens": 3}) == lm_eval_api.Sampling(max_tokens=3, until=("a",))
    assert sampling_of({"do_sample": False, "temperature": 0.7}).temperature == 0
    assert sampling_of({"temperature": 0.7, "top_k": 4, "top_p": 0.5}).temperature == 0.7
    assert sampling_of({}).max_tokens == 256
    with pytest.raises(ConfigError, match=r"'num_beams'.*generation_kwargs"):
        sampling_of({"num_beams": 4})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "local_choise"], "'local_choise'.*local_choice"),
        (["--tasks", ","], "no task.*--tasks"),
        (["--tasks", "local_choice", "--include-path", "nowhere"], "--include-path nowhere"),
        (["--tasks", "local_choice", "--limit", "2.5"], "limit must"),
        (["--tasks", "local_choice", "--num-fewshot", "-1"], "num_fewshot.*not -1"),
        (["--tasks", "local_generate", "--max-length", "6"], "max_length 6.*the 6"),
        (
            ["--tasks", "local_choice", "--mitigation", "state-norm:learn=64"],
            "lm-eval.*state-norm.*every=1",
        ),
        (["--tasks", "no_data"], r"tasks no_data.*docs/lm_eval.md"),
        (
            ["--tasks", "local_choice", "--model", "{small}"],
            "tokenizer 'bytes'.* 257",
        ),
    ],
)
def test_wrong_usage_is_one_clear_line(tasks, model_dir, tmp_path, few_names, arguments, message):
    broken = {"task": "no_data", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "none.jsonl")}}
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "no_data.yaml").write_text(json.dumps({**broken, "output_type": "generate_until"}))
    include = ["--include-path", tmp_path / "broken" if "no_data" in arguments else tasks]
    if "{small}" in arguments:
        save_pretrained(tiny_model(vocab_size=200), tmp_path / "small")
        TOKENIZER.save(tmp_path / "small")
    given = [argument.format(small=tmp_path / "small") for argument in arguments]
    options = [*(() if "--model" in given else ("--model", model_dir)), "--out", tmp_path / "out"]
    with pytest.raises(StateXError, match=message) as caught:
        evaluate(*options, *include, *given)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out" / "lm-eval.json").exists()


def test_a_task_file_can_be_named_by_its_path(tasks, few_names):
    assert list(load_tasks([str(tasks / "local_choice.yaml")], None)["tasks"]) == ["local_choice"]


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, "statex_dist.evaluation.lm_eval_api")
    with pytest.raises(ConfigError, match=r"'statex-dist\[eval\]'"):
        importlib.import_module("statex_dist.evaluation.lm_eval_api")


def test_texts_have_the_space_behind_their_context_and_end_at_all_end_tokens(caplog):
    """The harness's own model decodes the continuation alone, and loses that space."""
    tokenizer = llama()
    tokenizer.end_tokens = {1: ("tokenizer",), 2: ("generation_config.json",)}
    ids = tokenizer._tokenizer.convert_tokens_to_ids
    script = ids([MARK + "is", MARK + "the", "<|im_end|>", "a"])
    context = tokenizer.encode("the").tolist()
    model = StateXLM(Says(script, behind=len(context), vocab_size=tokenizer.vocab_size), tokenizer)

    def said(*until):
        options = {"until": list(until), "do_sample": False, "max_gen_toks": 9}
        request = lm_eval_api.Instance("generate_until", {}, ("the", options), 0, ("task", 0, 1))
        return model.generate_until([request])

    assert said("zzz") == [" is the"]
    assert said(" the") == [" is"]
    assert not caplog.records
    assert said("<|im_end|>\n") == [" is the"]
    assert "special token" in caplog.text
