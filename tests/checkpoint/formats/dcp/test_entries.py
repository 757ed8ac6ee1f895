"""Which entries of a torch distributed checkpoint count as the model's, by the keys that lead to them."""

import pytest

from statex_dist.checkpoint.formats.dcp.entries import as_paths, model_entries

NAMES = ("model.embed.weight", "model.layers.0.attn.o_proj.weight", "lm_head.weight")


def entries(*paths: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {".".join(path): path for path in paths}


def below(*keys: str) -> dict[str, tuple[str, ...]]:
    """The model's tensors below some keys."""
    return entries(*((*keys, name) for name in NAMES))


OPTIMIZER = [("state", f"{name}.{value}") for name in NAMES for value in ("exp_avg", "exp_avg_sq", "step")]


@pytest.mark.parametrize(
    "model",
    [below("model"), below("app", "model"), below("model_state_dict"), below("state_dict"), below("module"), below()],
    ids=["model", "app.model", "model_state_dict", "state_dict", "module", "top"],
)
@pytest.mark.parametrize(
    "optimizer", ["optimizer", "optim", "optimizers", "optimizer_0", "optimizer_state_dict", "chained_0", "opt"]
)
def test_model_and_optimizer(model, optimizer):
    others = entries(*((optimizer, *path) for path in OPTIMIZER))
    paths = {**model, **others}
    chosen = model_entries(list(paths), (), paths)
    assert sorted(chosen.names.values()) == sorted(NAMES)
    assert set(chosen.names) == set(model)
    assert chosen.left_out == {"optimizer": len(OPTIMIZER)}
    # The same dict, joined to names by hand before it was saved.
    flat = model_entries(list(paths))
    assert set(flat.names) == set(model)
    assert flat.left_out == chosen.left_out


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("lr_scheduler", "scheduler"),
        ("scheduler_state_dict", "scheduler"),
        ("opt_param_scheduler", "scheduler"),
        ("dataloader", "data loader"),
        ("train_dataloader", "data loader"),
        ("data_loader", "data loader"),
        ("train_state", "train state"),
        ("trainer_state", "train state"),
        ("rng_state", "train state"),
        ("cuda_rng_states", "train state"),
        ("grad_scaler", "train state"),
        ("ema_model", "EMA"),
    ],
)
def test_other_parts(key, part):
    others = {**entries((key, "a"), (key, "b", "c")), **entries(("step",))}
    paths = {**below("model"), **others}
    chosen = model_entries([*below("model"), f"{key}.a", "step"], [f"{key}.b.c"], paths)
    assert sorted(chosen.names.values()) == sorted(NAMES)
    expected = {part: 2, "train state": 1} if part != "train state" else {part: 3}
    assert chosen.left_out == expected
    note = chosen.note()
    assert note is not None
    assert "3 entries" in note


def test_one_level():
    """``{**model.state_dict(), **optimizer.state_dict()}``: ``state`` and ``param_groups`` are the optimizer's."""
    state = entries(*(("state", "0", value) for value in ("step", "exp_avg")), ("param_groups", "0", "lr"))
    chosen = model_entries([*NAMES, "state.0.step", "state.0.exp_avg"], ["param_groups.0.lr"], state)
    assert dict(chosen.names) == {name: name for name in NAMES}
    assert chosen.left_out == {"optimizer": 3}
    assert model_entries([*NAMES, "state.0.step", "state.0.exp_avg"]).left_out == {"optimizer": 2}


def test_values_of_an_optimizer_are_no_weights_wherever_they_are():
    names = [*NAMES, "something.lm_head.weight.exp_avg", "else.momentum_buffer"]
    chosen = model_entries(names)
    assert dict(chosen.names) == {name: name for name in NAMES}
    assert chosen.left_out == {"optimizer": 2}


def test_a_model_keeps_names_that_only_look_like_other_parts():
    names = ["scheduled.weight", "layers.0.optimizer_gate.weight", "stepper.bias", "decoder.loader_norm.weight"]
    assert dict(model_entries(names).names) == {name: name for name in names}
    nested = entries(("model", "step"), ("model", "rng_state"), ("model", "model.norm.weight"))
    assert sorted(model_entries(list(nested), (), nested).names.values()) == ["model.norm.weight", "rng_state", "step"]


def test_nothing_is_left_out_of_a_model_alone():
    chosen = model_entries(NAMES)
    assert chosen.note() is None
    bare = ("model.embed.weight", "model.norm.weight")
    assert dict(model_entries(bare).names) == {name: name for name in bare}
    doubled = tuple(f"model.{name}" for name in NAMES)
    assert tuple(model_entries(doubled).names.values()) == NAMES


def test_an_unknown_key_with_the_names_of_the_model_is_refused():
    """An optimizer under a name that no rule knows must not be taken for weights."""
    with pytest.raises(ValueError, match="'adam_m'"):
        model_entries(*_names_and_paths({**below("model"), **below("adam_m")}))
    one = {**below("model"), "tower.0": ("tower", "0")}
    assert "tower.0" in model_entries(*_names_and_paths(one)).names


def _names_and_paths(paths):
    return tuple(paths), (), paths


def test_two_models_are_refused():
    paths = {**below("model_0"), **below("model_1")}
    with pytest.raises(ValueError, match=f"'{NAMES[0]}'"):
        model_entries(list(paths), (), paths)


def test_paths_are_read_as_data():
    given = {
        "a.0.b": ("a", 0, "b"),
        "c": ["c"],
        "d": (),
        "e": (object(),),
        5: ("x",),
        "f": "text",
        "g": None,
        "h": (10**5000,),
    }
    assert as_paths(given) == {"a.0.b": ("a", "0", "b"), "c": ("c",)}
    assert as_paths(None) == {}
