"""Result files as the suites write them, with figures that are made up: two models, one of which collapses."""

import json
import math
from pathlib import Path

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
TASKS = ("passkey",)
PAIRS = (4, 8, 16, 32, 64)
SHOTS = (0, 1, 4, 16, 64)
POSITIONS = tuple(64 * 2**i for i in range(8))


def estimate(value, width=0.04, *, key="accuracy", samples=100):
    return {key: value, "low": max(0.0, value - width), "high": min(1.0, value + width), "samples": samples}


def model_of(name, *, seed=0, mitigation=None):
    facts = {"directory": f"runs/{name}/model", "fingerprint": f"{seed:x}".ljust(32, "0"), "model_type": "gla"}
    facts |= {"parameters": 119_456, "state_numbers": 1024 * (1 + seed), "vocab_size": 258, "statex": None}
    return {**facts, "mitigation": mitigation}


def recall(strength):
    def cell(length, depth):
        return round(1 / (1 + math.exp((math.log2(length) - 11 - 2 * strength) * 1.5 - 2 * (depth - 0.5))), 3)

    tasks = {}
    for i, task in enumerate(TASKS):
        cells = [
            {"length": n, "depth": d, **estimate(max(0.0, round(cell(n, d) - 0.1 * i, 3)))}
            for n in LENGTHS
            for d in (0.1, 0.3, 0.5, 0.7, 0.9)
        ]
        mean = {n: sum(c["accuracy"] for c in cells if c["length"] == n) / 5 for n in LENGTHS}
        tasks[task] = {
            "overall": estimate(sum(mean.values()) / len(mean)),
            "by_length": {str(n): estimate(value) for n, value in mean.items()},
            "cells": cells,
        }
    return {"tasks": tasks, "overall": estimate(0.5), "settings": {"lengths": LENGTHS, "seed": 0, "batch_size": 8}}


def mqar(strength):
    found = {}
    for n in PAIRS:
        value, guessing = 1 / (1 + (n / (24 * (1 + 2 * strength))) ** 3), 1 / n + (1 - 1 / n) / 64
        recalled = n * max(0.0, (value - guessing) / (1 - guessing))
        more = {"pairs_recalled_low": recalled * 0.9, "pairs_recalled_high": recalled * 1.1}
        levels = {"guessing": guessing, "eliminating": 2 * guessing}
        found[str(n)] = {**estimate(value), **levels, "pairs_recalled": recalled, **more}
    return {"by_num_pairs": found, "capacity": {"threshold": 0.95, "num_pairs": 8}, "settings": {"seed": 0}}


def icl(strength):
    by_shots = {str(n): estimate(min(0.95, 0.25 + 0.1 * (1 + strength) * math.log2(1 + n))) for n in SHOTS}
    return {"data": None, "labels": list("abcd"), "chance": 0.25, "by_shots": by_shots, "settings": {"shots": SHOTS}}


def perplexity(strength):
    edges = [1, *POSITIONS]
    losses = [3 - 0.1 * i - 0.1 * strength for i in range(len(POSITIONS))]
    buckets = [
        {
            "start": a,
            "end": b,
            "tokens": b - a,
            "loss_sum": 1.0,
            "samples": 9,
            "loss": x,
            "low": x - 0.1,
            "high": x + 0.1,
        }
        for a, b, x in zip(edges, POSITIONS, losses, strict=False)
    ]
    figures = {"loss": 2.5, "loss_low": 2.4, "loss_high": 2.6, "perplexity": math.exp(2.5), "bits_per_byte": 3.6}
    more = {"tokens": 8191, "documents": 9, "by_position": buckets, "data": "texts", "settings": {"max_tokens": None}}
    return {**figures, **more}


def collapse(strength):
    collapsed = strength > 0

    def told():
        losses = [2.0 if x <= 1024 or not collapsed else 2.0 + 0.8 * math.log2(x / 1024) for x in POSITIONS]
        starts = [1, *POSITIONS]
        worst = {"layer": 1, "head": 0, "collapsed": collapsed, "position": 2048 if collapsed else None}
        worst |= {"why": "variance" if collapsed else None, "sc_ratio": 56.2, "retention": 0.99}
        own = {"collapsed": collapsed, "position": 2048 if collapsed else None, "low": None, "high": None}
        return {
            "sequences": 4,
            "loss": {
                "by_position": [
                    {"start": a, "end": b, "loss": x, "low": x - 0.1, "high": x + 0.1}
                    for a, b, x in zip(starts, POSITIONS, losses, strict=False)
                ],
                **{"reference": 2.0, "threshold": 2.5, "ratio": 1.4},
            },
            "verdict": {**own, "share": 1.0, "why": "loss" if collapsed else None},
            "heads": {"total": 4, "collapsed": int(collapsed), "position": worst["position"]},
            "worst_heads": [worst],
        }

    verdict = {"collapsed": collapsed, "position": 2048 if collapsed else None, "heads_collapsed": int(collapsed)}
    verdict |= {"prompt": "newlines" if collapsed else None, "heads": 4}
    return {
        "settings": {"train_length": 1024, "length": POSITIONS[-1]},
        "positions": POSITIONS,
        "verdict": verdict,
        "says": f"Loss: {'collapses on newlines' if collapsed else 'no collapse'}.",
        "prompts": {"newlines": told()},
    }


def collapse_heads(strength):
    for layer in (0, 1):
        for head in (0, 1):
            bad = strength > 0 and (layer, head) == (1, 0)
            norm = [(1 + layer) * math.log2(x) * (1.0 if not bad or x < 1024 else x / 1024) for x in POSITIONS]
            variance = [x * x / 9 for x in norm[:-1]] + [None if bad else norm[-1] ** 2 / 9]
            found = {"collapsed": bad, "position": 2048 if bad else None, "norm": norm, "variance": variance}
            yield {"kind": "head", "prompt": "newlines", "layer": layer, "head": head, **found}
    yield {"kind": "sequence", "prompt": "newlines", "sequence": 0, "loss": [], "collapsed": False, "position": None}


def capacity(strength):
    ladder = []
    for i, length in enumerate(LENGTHS):
        value = 1.0 if i < 2 + strength else 0.4
        ends = {"exact_low": max(0, value - 0.06), "exact_high": min(1, value + 0.06), "passes": value == 1.0}
        ladder.append({"length": length, **estimate(value), **ends, "by_depth": []})
    tokens = LENGTHS[1 + strength]
    found = {"tokens": tokens, "low": tokens // 2, "high": tokens, "at_least": False, "monotone": True}
    return {"ladder": ladder, "capacity": {**found, "next_failing": 2 * tokens}, "settings": {"threshold": 0.95}}


def lm_eval(strength):
    rows = [("piqa", "acc", 0.55), ("hellaswag", "acc_norm", 0.31), ("a_very_long_name_of_a_task", "exact_match", 0.1)]
    figures = [
        {"task": task, "metric": metric, "filter": "none", "value": value + 0.02 * strength, "stderr": 0.02}
        | {"low": value - 0.04, "high": value + 0.06, "samples": 200, "higher_is_better": True}
        for task, metric, value in rows
    ]
    last = {"task": "wikitext", "metric": "word_perplexity", "filter": "none", "value": 1234.5, "stderr": None}
    figures.append(last | {"low": 1100.0, "high": 1400.0, "samples": 10, "higher_is_better": False})
    return {"figures": figures, "settings": {"tasks": [task for task, *_ in rows], "limit": None}}


def laws():
    points = [
        {"state_numbers": n * 100_000, "tokens": 1024 * n, "low": 900 * n, "high": 1200 * n, "used": n < 5, "why": ""}
        for n in (1, 2, 4, 5)
    ]
    fit = {
        "form": "linear",
        "parameters": {"slope": 10.0, "intercept": 0.1},
        "errors": {"slope": 0.5, "intercept": None},
    }
    fit |= {"r_squared": 0.99, "state": [0.1, 0.2, 0.4], "length": [1.0, 2.0, 4.0]}
    more = {"recall": None, "recall_refused": "3 points are needed", "recall_points": [], "forget_refused": None}
    return {"forget": fit, "forget_points": points, **more}


SUITES = {
    "recall": recall,
    "mqar": mqar,
    "icl": icl,
    "perplexity": perplexity,
    "collapse": collapse,
    "capacity": capacity,
    "lm-eval": lm_eval,
}


def write_result(directory: Path, suite: str, summary: dict, *, model=None, rows=()) -> Path:
    """Write a summary as a suite leaves it."""
    directory.mkdir(parents=True, exist_ok=True)
    head = {"version": 2, "suite": suite, **({} if model is None else {"model": model})}
    (directory / f"{suite}.json").write_text(json.dumps({**head, **summary, "timing": {"seconds": 1.0, "ranks": 1}}))
    (directory / f"{suite}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def write_results(directory: Path, *, suites=tuple(SUITES)) -> Path:
    """Write the results of two models."""
    for strength, name in enumerate(("lpt", "statex")):
        for suite in suites:
            rows = collapse_heads(strength) if suite == "collapse" else ()
            model = model_of(name, seed=strength)
            write_result(directory / name / suite, suite, SUITES[suite](strength), model=model, rows=rows)
    return directory
