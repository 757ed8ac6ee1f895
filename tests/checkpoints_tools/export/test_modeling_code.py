"""Exports with code of their own: transformers opens them, and their results are compared with our models."""

import ast
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from checkpoints_tools.export.modeling_code import remote_code
from checkpoints_tools.reshard.reshard import reshard
from statex_dist.models.hf import from_pretrained
from statex_dist.models.registry import FAMILIES, family_of
from tests.checkpoints_tools.exports import MODELS, PLAIN, export
from tests.models.tiny import tokens

WITH_CODE = [name for name in MODELS if name not in PLAIN]
CODED = [kind for kind in FAMILIES if family_of(kind).block]


@pytest.fixture(autouse=True, scope="module")
def _modules_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def load(directory: Path, dtype: torch.dtype = torch.float64):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=dtype).eval()


def apart(model):
    """Move weights out of the mapped file, where products of small matrices may add up in another order."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def left_padded(rows: list[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts behind padding that is as likely a text as any, and the mask that says so."""
    ids, mask = tokens(len(rows), length, vocab=37, seed=9), torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    return ids, mask


@pytest.mark.parametrize("name", WITH_CODE)
@torch.no_grad()
def test_logits_are_those_of_our_model_whole_in_pieces_and_padded(tmp_path, name):
    ours, directory, _ = export(name, tmp_path)
    theirs, ids = apart(load(directory)), tokens(2, 150, vocab=37)
    expected = ours(ids).logits
    assert type(theirs).__module__.startswith("transformers_modules.")
    assert torch.equal(theirs(ids).logits, expected), "the same operations on the same numbers"
    memory, pieces, sizes = None, [], set()
    for piece in ids.split([70, 1, 1, 3, 75], dim=1):
        output = theirs(piece, past_key_values=memory, use_cache=True)
        memory = output.past_key_values
        pieces.append(output.logits)
        sizes.add(tuple(part.untyped_storage().nbytes() for layer in memory.layers for part in layer))
    assert error(torch.cat(pieces, dim=1), expected) < 1e-9
    assert len(sizes) == 1
    assert memory.get_seq_length() == 150
    padded, mask = left_padded([ids[0], ids[1, :20]], 160)
    found = theirs(padded, attention_mask=mask).logits
    assert error(found[0, 10:], expected[0]) < 1e-9
    assert error(found[1, 140:], expected[1, :20]) < 1e-9
    if "minimax" not in name:  # whose experts look at values, which a meta tensor does not have
        elsewhere = theirs.to("meta")(ids.to("meta"))
        assert elsewhere.logits.shape == expected.shape, "no tensor is made on another device than the model's"


@pytest.mark.parametrize(
    "name", ["gla-merged", "retnet-grown", "mamba2-grown", "gated_deltanet-features", "minimax-merged"]
)
@torch.no_grad()
def test_generate(tmp_path, name):
    _, directory, _ = export(name, tmp_path)
    model, ids = load(directory), tokens(2, 30, vocab=37)
    settings = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    rows = [ids[0], ids[1, :11]]
    alone = [model.generate(r[None], attention_mask=torch.ones_like(r)[None], **settings)[0, len(r) :] for r in rows]
    padded, mask = left_padded(rows, 33)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 33:], torch.stack(alone))
    beams = {"num_beams": 3, "num_return_sequences": 2, **settings}
    alone = [model.generate(r[None], attention_mask=torch.ones_like(r)[None], **beams)[:, len(r) :] for r in rows]
    assert torch.equal(model.generate(padded, attention_mask=mask, **beams)[:, 33:], torch.cat(alone))
    whole = {"attention_mask": torch.ones_like(ids), **settings}
    greedy = model.generate(ids, **whole)
    assert torch.equal(model.generate(ids, token_type_ids=torch.zeros_like(ids), **whole), greedy)
    assert torch.equal(model.generate(ids, use_cache=False, **whole), greedy)
    assert torch.equal(model.generate(ids, prefill_chunk_size=8, **whole), greedy)
    memory = model(ids[:, :20]).past_key_values
    assert torch.equal(model.generate(ids, cache_params=memory, **whole), greedy)
    beams = {"num_beams": 4, "num_return_sequences": 4, **whole}
    found = model.generate(ids, **beams)
    assert torch.equal(found, model.generate(ids, use_cache=False, **beams))
    assert len(found.unique(dim=0)) == 8
    sampled = []
    for _ in range(2):
        torch.manual_seed(0)
        sampled.append(model.generate(ids, do_sample=True, top_k=5, num_return_sequences=2, **whole))
    assert torch.equal(*sampled)
    assert len(sampled[0].unique(dim=0)) == 4


@torch.no_grad()
def test_rows_of_the_memory_are_chosen_and_repeated_with_their_positions(tmp_path):
    _, directory, _ = export("retnet-grown", tmp_path)
    model, ids, new = load(directory), tokens(2, 12, vocab=37), tokens(4, 3, vocab=37, seed=1)
    rows = [ids[0], ids[1, :5]]
    padded, mask = left_padded(rows, 12)
    alone = [model(torch.cat([rows[row], new[i]])[None]).logits[0, -3:] for i, row in enumerate((1, 1, 0, 0))]
    memory = model(padded, attention_mask=mask).past_key_values
    memory.reorder_cache(torch.tensor([1, 0]))
    memory.batch_repeat_interleave(2)
    assert error(model(new, past_key_values=memory).logits, torch.stack(alone)) < 1e-9


@torch.no_grad()
def test_input_that_does_not_fit_is_refused(tmp_path):
    _, directory, _ = export("gla-merged", tmp_path)
    model, ids = load(directory), tokens(2, 6, vocab=37)
    hole, right = torch.ones_like(ids), torch.ones_like(ids)
    hole[0, 2], right[1, 4:] = 0, 0

    def refused(words, *arguments, call=model, **options):
        with pytest.raises(ValueError, match=words):
            call(*arguments, **options)

    def memory():
        return model(ids).past_key_values

    refused(r"DynamicCache.*StateXCache", ids, past_key_values=DynamicCache())
    refused("2 rows.* of 1", ids[:1], past_key_values=memory())
    refused("2 rows of 0", ids[:, :0])
    refused(r"attention_mask.*\[2, 5\].*\[2, 6\]$", ids, attention_mask=hole[:, :5])
    refused(r"need \[2, 1\] or \[2, 7\]$", ids[:, :1], attention_mask=hole, past_key_values=memory())
    refused("padding inside", ids, attention_mask=hole, use_cache=False)
    refused("padding behind", ids, attention_mask=right, use_cache=True)
    refused("padding behind a text", ids, attention_mask=right, call=model.generate, max_new_tokens=2)
    refused("padding behind a text", ids, attention_mask=right, past_key_values=memory())
    refused("padding inside of a text", ids, call=model.generate, attention_mask=hole, max_new_tokens=2)
    refused("labels.*logits", ids, labels=ids, logits_to_keep=1)
    used = memory()
    model(ids, past_key_values=used)
    begun = torch.cat([torch.ones_like(ids), torch.ones_like(ids), right.flip(1)], dim=1)
    refused("padding inside of a text", ids, attention_mask=begun, past_key_values=used)
    output = model(ids, attention_mask=right)
    assert output.past_key_values is None
    assert error(output.logits[1, :4], model(ids[1:, :4]).logits[0]) < 1e-9


def test_layers_stay_whole_and_what_they_are_told_moves_with_them(tmp_path):
    _, directory, _ = export("hgrn2", tmp_path)
    model = load(directory)
    assert {type(layer).__name__ for layer in model.trunk.layers} == set(model._no_split_modules)
    segment = sys.modules[type(model).__module__].TokenSpan
    assert segment(cu_seqlens=torch.zeros(2)).to("meta").cu_seqlens.is_meta
    assert segment().to("meta").cu_seqlens is None


@torch.no_grad()
def test_logits_of_the_last_tokens_alone(tmp_path):
    _, directory, _ = export("gla-mixed", tmp_path)
    model, ids = load(directory), tokens(1, 9, vocab=37)
    every = model(ids).logits
    for kept, expected in ((2, every[:, -2:]), (torch.tensor([3]), every[:, 3:4])):
        found = model(ids, logits_to_keep=kept).logits
        assert found.shape == expected.shape
        assert error(found, expected) < 1e-12
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), return_dict=False)
    assert torch.equal(embedded[0], every)
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()


@pytest.mark.parametrize(
    "name", ["gla-merged", "mamba2-grown", "kda-mixed", "gla-features", "kda-features", "mamba2-features"]
)
@torch.no_grad()
def test_numbers_of_every_dtype_are_those_of_our_model(tmp_path, name):
    _, directory, _ = export(name, tmp_path)
    ids = tokens(2, 100, vocab=37)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours, theirs = from_pretrained(directory, dtype=dtype), apart(load(directory, dtype))
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("name", ["hgrn2-conv-merged", "mamba2-grown", "gated_deltanet-features"])
def test_loss_and_gradients_are_those_of_our_model(tmp_path, name):
    ours, directory, _ = export(name, tmp_path)
    theirs, ids = load(directory), tokens(1, 40, vocab=37)
    loss = theirs.train()(ids, labels=ids).loss
    loss.backward()
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
    expected = ours(ids, labels=labels).loss_sum / 39
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-5
    mine = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        assert torch.allclose(parameter.grad, mine[key].grad, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("name", ["gla-conv", "state_spaces-grown", "kda", "retnet-grown"])
@torch.no_grad()
def test_a_long_text_is_read_span_by_span(tmp_path, name, monkeypatch):
    ours, directory, _ = export(name, tmp_path)
    model, ids = load(directory), tokens(2, 300, vocab=37)
    monkeypatch.setattr(sys.modules[type(model).__module__], "SPAN_TOKENS", 128)
    spans = []
    model.trunk.layers[-1].register_forward_pre_hook(lambda _, given: spans.append(given[0].shape[1]))
    output = model(ids)
    assert error(output.logits, ours(ids).logits) < 1e-9
    assert spans == [128, 128, 44]
    padded, mask = left_padded([ids[0, :280], ids[1, :33]], 281)
    found = model(padded, attention_mask=mask)
    assert spans[3:] == [128, 128, 57]
    assert error(found.logits[1, 248:], output.logits[1, :33]) < 1e-9
    alone = model(ids[1:, :33])
    assert all(error(x[1:], y) < 1e-9 for x, y in zip(*map(states, (found, alone)), strict=True))


def states(output) -> list[torch.Tensor]:
    return [part.double() for layer in output.past_key_values.layers for part in layer]


@torch.no_grad()
def test_a_prompt_may_be_read_in_pieces_of_which_some_are_padding(tmp_path):
    _, directory, _ = export("retnet-conv", tmp_path)
    model, ids = load(directory), tokens(2, 9, vocab=37)
    padded, mask = left_padded([ids[0], ids[1, :5]], 12)
    memory = None
    for start in range(0, 12, 3):
        piece = {"attention_mask": mask[:, start : start + 3], "past_key_values": memory, "use_cache": True}
        output = model(padded[:, start : start + 3], **piece)
        memory = output.past_key_values
    assert error(output.logits[0, -1], model(ids[:1]).logits[0, -1]) < 1e-9
    assert error(output.logits[1, -1], model(ids[1:, :5]).logits[0, -1]) < 1e-9


@pytest.mark.parametrize("name", ["gla-mixed", "mamba2-grown", "hgrn2", "state_spaces-features", "kda-features"])
@torch.no_grad()
def test_saved_again_it_is_still_the_same_model_for_transformers_and_for_us(tmp_path, name):
    ours, directory, _ = export(name, tmp_path)
    again, ids = tmp_path / "again", tokens(1, 20, vocab=37)
    load(directory).save_pretrained(again)
    assert sorted(path.suffix for path in again.iterdir()) == [".json", ".json", ".py", ".safetensors"]
    kinds = [json.loads((path / "config.json").read_text()).get("model_type") for path in (directory, again)]
    assert kinds[0] == kinds[1]
    expected = ours(ids).logits
    assert error(load(again)(ids).logits, expected) < 1e-9
    assert torch.equal(from_pretrained(again)(ids).logits, expected)
    reshard(again, tmp_path / "third")
    assert error(load(tmp_path / "third")(ids).logits, expected) < 1e-9


@torch.no_grad()
def test_the_model_without_its_head_and_the_configuration_open_too(tmp_path):
    ours, directory, _ = export("retnet-merged", tmp_path)
    ids = tokens(1, 20, vocab=37)
    trunk = AutoModel.from_pretrained(directory, trust_remote_code=True, dtype=torch.float64).eval()
    assert error(ours.lm_head(trunk(ids).last_hidden_state), ours(ids).logits) < 1e-9
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    assert (config.model_type, config.expansion(1), config.expansion(0)) == (
        "statex_retnet",
        ("merge_heads", 2),
        ("grow_features", 3),
    )


@pytest.mark.parametrize(
    "name",
    ["gla", "gla-merged", "gla-slow", "retnet-conv", "minimax-merged", "mamba2-grown", "state_spaces-grown"],
)
def test_a_class_that_computes_something_else_is_not_taken(tmp_path, name, monkeypatch):
    # As flash-linear-attention does when it is imported.
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "gla", type("GLA", (PretrainedConfig,), {"model_type": "gla"}))
    ours, directory, _ = export(name, tmp_path)
    if name == "gla":
        assert AutoConfig.from_pretrained(directory, trust_remote_code=False).model_type == "gla"
    else:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            AutoConfig.from_pretrained(directory, trust_remote_code=False)
    again = from_pretrained(directory)
    assert again.config.MODEL_TYPE == ours.config.MODEL_TYPE
    assert torch.equal(again(tokens(1, 9)).logits, ours(tokens(1, 9)).logits)


def test_a_directory_opens_where_nothing_of_ours_is_installed(tmp_path):
    ours, directory, _ = export("gla-features", tmp_path)
    ids = tokens(1, 12, vocab=37)
    script = (
        "import json, sys\n"
        "sys.modules.update(dict.fromkeys(['statex_dist', 'checkpoints_tools', 'fla', 'mamba_ssm']))\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "directory, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))\n"
        "model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float64)\n"
        "tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)\n"
        "print(json.dumps([model(ids).logits[0, -1].tolist(), tokenizer('é <|pad|>')['input_ids']]))\n"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", script, str(directory), json.dumps(ids.tolist())]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    logits, encoded = json.loads(done.stdout.splitlines()[-1])
    assert error(torch.tensor(logits, dtype=torch.float64), ours(ids).logits[0, -1]) < 1e-9
    assert encoded == list("é <|pad|>".encode())


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("family", CODED)
def test_the_code_is_one_file_that_imports_torch_and_transformers_alone(family, features):
    tree = ast.parse(remote_code(family, ours_alone=True, features=features))
    assert "statex-dist" in (ast.get_docstring(tree) or "")
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
    # transformers cannot be imported without numpy either.
    assert imported - set(sys.stdlib_module_names) == {"numpy", "torch", "transformers"}
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(set(names)) == len(names)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(names) - used == {"StateXForCausalLM"}
    assert not {"context", "mitigation", "fla"} & used, "what an export does not need is left out"
    bound = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    assert [{"FeatureMap", "Features"} <= used, "products" in names, "features" in bound] == [features] * 3


def test_the_code_has_no_undefined_and_no_unused_names(tmp_path):
    for family, features in itertools.product(CODED, (False, True)):
        code = remote_code(family, ours_alone=False, features=features)
        (tmp_path / f"{family}_{features}.py").write_text(code)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", "--output-format", "concise"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", WITH_CODE)
@torch.no_grad()
def test_on_a_gpu(tmp_path, name):
    ours, directory, _ = export(name, tmp_path)
    model, ids = load(directory).cuda(), tokens(2, 150, vocab=37)
    assert error(model(ids.cuda()).logits.cpu(), ours(ids).logits) < 1e-9
    padded, mask = left_padded([ids[0, :20], ids[1, :9]], 24)
    settings = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(padded.cuda(), attention_mask=mask.cuda(), **settings).cpu()
    assert torch.equal(found, model.cpu().generate(padded, attention_mask=mask, **settings))
