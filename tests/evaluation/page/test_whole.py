"""``statex report`` on results and expansions: what the page says, what is refused, and how it looks in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from launch.cli import main
from statex_dist.evaluation.page.figures import ROLES, length_ticks, look_of, new_axes, styled
from statex_dist.evaluation.page.inputs import DEPTH, read_inputs
from statex_dist.evaluation.page.whole import headline_lines, make_report
from statex_dist.models.registry import make_plan
from tests.evaluation.page.fixtures import SUITES, icl, laws, lm_eval, model_of, mqar, write_result, write_results
from tests.evaluation.page.test_runs import NOT_DRAWN, Page, make_run
from tests.evaluation.stand_ins import tiny_config

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADLESS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)


def write_expansion(directory: Path) -> Path:
    """Write what the report reads of an expanded model."""
    directory.mkdir(parents=True)
    config = make_plan(tiny_config(num_hidden_layers=3), layers="0,2", factor=2, init="inherit")
    (directory / "config.json").write_text(config.to_json())
    (directory / "expansion_report.json").write_text('{"parameters_before": 1000, "parameters_after": 1010}')
    return directory


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Two models' results of every suite, laws, a training run and an expansion, in one directory."""
    root = write_results(tmp_path_factory.mktemp("all") / "root")
    write_result(root / "laws", "laws", laws())
    make_run(root / "run-a", 3, **NOT_DRAWN)
    write_expansion(root / "expanded")
    (root / "lpt" / "notes.txt").write_text("not ours")
    return root


@pytest.fixture(scope="module")
def page_file(everything):
    assert main(["report", str(everything), "--out", str(everything.parent / "page.html")]) == 0
    return everything.parent / "page.html"


@pytest.fixture(scope="module")
def page(page_file):
    return Page(page_file.read_text())


def words_of(svg: str) -> set[str]:
    return {element.text for element in ElementTree.fromstring(svg).iter() if element.text}


def test_one_page_has_every_figure_and_needs_nothing_else(page, page_file):
    assert all(target.startswith("#") for target in page.outside), "the page must work without a network"
    assert not re.search(r"<script|@import|url\(|http-equiv", page_file.read_text())
    titles = [
        *("State of each layer: expanded", "Training loss", "passkey: lpt", "passkey: statex", "passkey by length"),
        *("Associative recall", "In-context classification", "Loss by position"),
        *("Loss on newlines (× collapse)", "Norm of the states on newlines: lpt"),
        *("Variance of the states on newlines: lpt", "Norm of the states on newlines: statex"),
        "Variance of the states on newlines: statex",
        *("Passkey recall by length", "Forget threshold", "lm-eval"),
    ]
    assert len(page.images) == len(titles)
    for title, (text, svg) in zip(titles, page.images.items(), strict=True):
        assert title in words_of(svg)
        assert title.split(" (")[0] in text


def test_alternative_texts_say_what_is_seen(page):
    def text_of(start: str) -> str:
        return next(text for text in page.images if text.startswith(start))

    assert text_of("passkey: statex") == (
        "passkey: statex: accuracy by length and depth, mean 0.58; best 0.99 at 1K tokens and depth 90 %, "
        "worst 0.02 at 32K tokens and depth 10 %"
    )
    recalled = text_of("Associative recall")
    assert "lpt from 0.995 at 4 to 0.0501 at 64 (lowest 0.0501 at 64, highest 0.995 at 4)" in recalled
    assert "; a random value of the context; the commonest value not yet answered" in recalled
    assert "lpt from 0.25 at 0 to 0.852 at 64" in text_of("In-context")
    loss = text_of("Loss on newlines")
    assert "statex marked at 2K" in loss
    assert "training length, 1K at 1K" in loss
    assert "lpt: Loss: no collapse." in page.text
    assert "statex: Loss: collapses on newlines." in page.text
    norm = text_of("Norm of the states on newlines: statex")
    assert "1 of 4 heads collapse, the first in layer 1, head 0, at 2048 tokens" in norm
    assert "T = 10 N + 0.1" in text_of("Forget threshold")
    assert "piqa acc: lpt 0.550, statex 0.570" in text_of("lm-eval")
    assert "layer 0 from 64 to 128; layer 2 from 64 to 128" in text_of("State of each layer")


def test_tables_set_the_models_side_by_side_with_their_intervals(page):
    text = " ".join(page.text.split())
    glance, rest = text.split("At a glance")[-1].split("Expansion plan", 1)
    assert "lptstatex" in glance
    assert "recall: passkey, all lengths0.262 (0.222 .. 0.302)0.581 (0.541 .. 0.621)" in glance
    assert "collapse: collapsenone seenat 2,048 tokens (newlines)" in glance
    assert "capacity: tokens with 95% recall2,048 (1,024 .. 2,048)4,096 (2,048 .. 4,096)" in glance
    assert "state elements192320+66.7 %" in rest
    assert "parameters1,0001,010+1.0 %" in rest
    assert "0merge_heads ×2, inherit64128" in rest
    assert "forget: slope10.000 (9.500 .. 10.500)" in rest
    assert "recall: fit3 points are needed" in rest
    assert "wikitext word_perplexity1,234 (1,100 .. 1,400)" in rest.replace("1,234.5", "1,234")
    assert "2 evaluated models" in text
    assert "Settings that differ" not in rest


def test_the_same_input_gives_the_same_bytes_in_both_schemes(tmp_path):
    write_results(tmp_path, suites=("mqar",))
    first, second = (make_report(read_inputs([tmp_path])) for _ in range(2))
    assert first == second
    (svg,) = Page(first).images.values()
    for role in ("ink", "grid", "s0", "s1"):
        light, dark = ROLES[role]
        assert f"var(--{role})" in svg
        # Only the style sheet names a colour.
        assert svg.count(light) == svg.count(dark) == 1
    assert "prefers-color-scheme: dark" in svg


def contrast(colour: str, ground: str) -> float:
    """Of WCAG 2.2."""

    def luminance(text: str) -> float:
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(colour), luminance(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("role", [role for role in ROLES if role != "grid"])
def test_colours_stand_out_from_either_ground(role):
    least = 4.5 if role in ("ink", "faint") else 3.0
    light, dark = ROLES[role]
    assert contrast(light, "#ffffff") >= least
    assert contrast(dark, "#1c1c20") >= least


def test_no_two_series_differ_by_their_colour_alone():
    looks = [look_of(number) for number in range(7)]
    for part in ("colour", "marker", "line"):
        assert len({str(getattr(look, part)) for look in looks}) == 7
    assert len({(look.colour, look.marker, str(look.line)) for look in map(look_of, range(28))}) == 28


@pytest.mark.parametrize(
    ("positions", "names"),
    [
        ((4, 8, 64), ["64", "8", "4"]),
        (tuple(1024 * 2**i for i in range(6)), ["32K", "16K", "8K", "4K", "2K", "1K"]),
        (tuple(range(32, 4097, 32)), ["4K", "2K", "1K", "512", "256", "128", "64", "32"]),
        ((1000, 1010, 1020, 4000), ["4000", "1020"]),
        ((512,), ["512"]),
    ],
)
def test_names_on_an_axis_of_lengths_never_lie_on_each_other(positions, names):
    with styled():
        axes = new_axes("", "", "")
        length_ticks(axes, positions)
        assert [label.get_text() for label in axes.get_xticklabels()] == names


def test_many_tasks_are_drawn_in_several_figures(tmp_path):
    figures = [{**lm_eval(0)["figures"][0], "task": f"task_{i}"} for i in range(15)]
    write_result(tmp_path / "r", "lm-eval", {"figures": figures, "settings": {}}, model=model_of("m"))
    images = list(Page(make_report(read_inputs([tmp_path]))).images)
    assert [text.split(",")[1] for text in images] == [" 1 of 2", " 2 of 2"]
    assert all(f"task_{i} acc" in " ".join(images) for i in range(15))


def test_results_are_told_apart_by_model_mitigation_and_place(tmp_path):
    places = [
        ("a/mqar", model_of("lpt")),
        ("b/mqar", model_of("lpt", mitigation="forget-more")),
        ("c/mqar", model_of("lpt", seed=1)),
        ("d/mqar", model_of("lpt")),
    ]
    for place, model in places:
        write_result(tmp_path / place, "mqar", {**mqar(0), "settings": {"seed": len(place)}}, model=model)
    inputs = read_inputs([tmp_path])
    assert inputs.models == [
        *("lpt 000000 (a/mqar)", "lpt 000000 with forget-more"),
        *("lpt 100000", "lpt 000000 (d/mqar)"),
    ]
    write_result(tmp_path / "d/mqar", "mqar", {**mqar(0), "settings": {"seed": 77}}, model=model_of("lpt"))
    text = Page(make_report(read_inputs([tmp_path]))).text
    assert "77" in text.split("Settings that differ")[1].split("Settings")[0]


@pytest.mark.parametrize(
    ("models", "names"),
    [
        # (directory, fingerprint) of two results; what the models are called.
        ([("models/best", "a"), ("models/best/", "b")], ["best aaaaaa", "best bbbbbb"]),
        ([("models/best", "a"), ("models/best/", "a")], ["best"]),
        ([("/abs/models/best", "a"), ("models/best", "a")], ["best"]),
        ([("models/best", "a"), ("models/best/model", "b")], ["models/best", "models/best/model"]),
    ],
)
def test_a_model_is_known_by_its_weights_and_not_by_the_spelling_of_its_path(tmp_path, models, names):
    for suite, (directory, digit) in zip(("mqar", "icl"), models, strict=True):
        model = {**model_of("x"), "directory": directory, "fingerprint": 32 * digit}
        write_result(tmp_path / suite, suite, SUITES[suite](0), model=model)
    inputs = read_inputs([tmp_path])
    assert inputs.models == [names[-1], *names[:-1]]
    assert headline_lines(inputs.results)[0][1:] == [names[0], *names[1:]]


def test_each_set_of_levels_without_recall_has_its_own_curve(tmp_path):
    for name, factor in (("a", 1.0), ("b", 0.5), ("c", 1.0)):
        summary = mqar(0)
        for told in summary["by_num_pairs"].values():
            told["guessing"] *= factor
        write_result(tmp_path / name, "mqar", summary, model=model_of(name, seed=ord(name)))
    ((text, svg),) = Page(make_report(read_inputs([tmp_path]))).images.items()
    name = "a random value of the context"
    assert text.split("; ")[-3:] == [f"{name}: a, c", f"{name}: b", "the commonest value not yet answered"]
    assert {f"{name}: a, c", f"{name}: b"} <= words_of(svg)


def test_tables_that_open_hold_the_points_of_the_figures(page):
    text = " ".join(page.text.split())
    (cells,) = re.findall(r"passkey by depth and length: statex(.*?)passkey|$", text)[:1]
    assert "1K tokens2K tokens4K tokens8K tokens16K tokens32K tokens" in cells
    assert "10 %0.976 (0.936 .. 1.000)0.900 (0.860 .. 0.940)" in cells
    assert "Loss on newlines by positionlptstatex1 .. 642.000 (1.900 .. 2.100)2.000 (1.900 .. 2.100)" in text
    assert "statenumberstokensused100,0001,024 (900 .. 1,200)yes" in text.replace("state elements", "statenumbers")
    assert "Right without recall: lptpairsa random value of the contextthe commonest value not yet answered40.2" in text


def without_intervals(values):
    """Return a summary as a suite writes it of one sample."""
    if isinstance(values, dict):
        ends = ("low", "high", "loss_low", "loss_high", "pairs_recalled_low", "pairs_recalled_high", "stderr")
        counts = ("samples", "sequences", "documents")
        return {
            key: None if key in ends else 1 if key in counts else without_intervals(value)
            for key, value in values.items()
        }
    return [without_intervals(value) for value in values] if isinstance(values, list) else values


@pytest.mark.filterwarnings("error")
def test_one_sample_has_no_band_and_the_tables_say_so(tmp_path):
    suites = ("mqar", "perplexity", "lm-eval")
    drawn = {}
    for name, change in (("many", lambda summary: summary), ("one", without_intervals)):
        for suite in suites:
            summary = change(SUITES[suite](0))
            write_result(tmp_path / name / suite, suite, summary, model=model_of("m"))
        drawn[name] = Page(make_report(read_inputs([tmp_path / name])))
    assert list(drawn["one"].images) == list(drawn["many"].images), "the values are drawn all the same"
    bands = [[svg.count('style="fill: var(--s0); fill-opacity') for svg in p.images.values()] for p in drawn.values()]
    assert bands == [[1, 1, 0], [0, 0, 0]]
    assert not any("nan" in svg.lower() for svg in drawn["one"].images.values())
    text = drawn["one"].text
    for figure in ("4 pairs0.995", "at most12.", "perplexity12.182", "2.900", "piqa acc0.550"):
        assert re.search(re.escape(figure) + r"\d* \(1 sample\)", text), figure
    assert "(1 sample)" not in drawn["many"].text


def test_a_dollar_in_a_name_is_a_dollar(tmp_path):
    names = ("a$x_{$b", "$\\frac$")
    for number, name in enumerate(names):
        write_result(tmp_path / str(number), "icl", icl(0), model=model_of(name, seed=number))
    (svg,) = Page(make_report(read_inputs([tmp_path]))).images.values()
    # The directory's last part is "model", and says little.
    assert {*names} <= words_of(svg)


def test_text_of_files_is_never_markup(tmp_path):
    model = {**model_of("x"), "directory": "runs/<img src=x onerror=alert(1)>"}
    summary = {**mqar(0), "settings": {"seed": "</style><script>alert(1)</script>"}}
    write_result(tmp_path / "one", "mqar", summary, model=model)
    text = make_report(read_inputs([tmp_path]))
    assert "<img src=x" not in text
    assert "<script" not in text
    assert "<img src=x onerror=alert(1)>" in Page(text).text


def test_directories_are_searched_to_a_depth_and_without_checkpoints(tmp_path, capsys):
    run = make_run(tmp_path / "run", 3)
    for depth in (DEPTH, DEPTH + 1):
        parts = ["deep", *map(str, range(depth - 1))]
        write_result(tmp_path.joinpath(f"d{depth}", *parts), "mqar", mqar(0), model=model_of(f"m{depth}"))
    write_expansion(run / "checkpoints" / "global_step9" / "copy")
    write_result(tmp_path / "d3" / "half.unfinished", "mqar", mqar(0), model=model_of("half"))
    (tmp_path / "d3" / "loop").symlink_to(tmp_path / "d4" / "deep", target_is_directory=True)
    write_result(tmp_path / "d3" / "old", "mqar", {**mqar(0), "version": 1}, model=model_of("old"))
    (tmp_path / "d3" / "started").mkdir()
    (tmp_path / "d3" / "started" / "metrics.jsonl").write_text('{"step": 1')
    assert main(["report", str(run), str(tmp_path / "d3"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(one["run"]).name for one in found["runs"]] == ["run"]
    assert [one["model"] for one in found["results"]] == ["m3"]
    assert found["expansions"] == []
    assert found["results"][0]["figures"][0]["name"] == "accuracy, 4 pairs"
    assert main(["report", str(tmp_path / "d3")]) == 0
    said = capsys.readouterr().out
    assert "mqar: accuracy, 64 pairs" in said
    assert "started is a training run" in said
    assert "mqar.json has version 1, this release reads 2" in said
    assert main(["report", str(tmp_path / "d4")]) == 2
    assert "no results of `statex eval`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "mqar.json has version 1, this release reads 2; evaluate again"),
        ({"model": None}, "does not say which model it is of"),
        ({"by_num_pairs": {"4": {}}}, "does not hold what this release writes (KeyError: 'accuracy')"),
        ({"by_num_pairs": {"many": {"accuracy": 1}}}, "does not hold what this release writes"),
    ],
)
def test_a_file_that_no_release_wrote_is_named(tmp_path, capsys, change, message):
    write_result(tmp_path / "r", "mqar", {**mqar(0), **change}, model=model_of("m"))
    assert main(["report", str(tmp_path / "r"), "--out", str(tmp_path / "page.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "page.html").exists()


def test_a_damaged_sample_is_named_with_its_line(tmp_path, capsys):
    write_results(tmp_path, suites=("collapse",))
    with (tmp_path / "lpt" / "collapse" / "collapse.jsonl").open("a") as file:
        file.write("{\n")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    assert re.search(r"collapse\.jsonl, line 6 is damaged", capsys.readouterr().err)


MEASURE = """<script>addEventListener("load", () => {
  const images = [...document.images], wide = document.documentElement
  parent.postMessage({
    widths: images.map(i => [i.naturalWidth, i.getBoundingClientRect().width, i.complete]),
    page: [wide.scrollWidth, innerWidth],
    tables: [...document.querySelectorAll(".wide")].map(b => b.getBoundingClientRect().right <= innerWidth),
    headings: [...document.querySelectorAll("h1, h2")].map(h => h.textContent),
    ink: getComputedStyle(document.body).color,
    requests: performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:")),
  }, "*")
})</script>"""

# A window has a least width of its own, a frame has none.
FRAMES = """<iframe src="page.html" style="width: 390px; height: 900px"></iframe>
<iframe src="page.html" style="width: 1280px; height: 900px"></iframe><style>iframe { border: 0 }</style>
<script>const seen = []; addEventListener("message", event => {
  seen.push(event.data); document.body.dataset.measured = JSON.stringify(seen)
})</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_shows_every_figure_on_a_phone_and_on_a_desk(page, page_file, tmp_path):
    assert CHROMIUM is not None
    (tmp_path / "page.html").write_text(page_file.read_text().replace("</body>", MEASURE + "</body>"))
    (tmp_path / "frames.html").write_text(FRAMES)
    scheme = "--blink-settings=preferredColorScheme=0"
    options = [*HEADLESS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1800,1000", scheme]
    command = [CHROMIUM, *options, "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frames.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (found,) = re.findall(r'data-measured="([^"]*)"', result.stdout)
    both = json.loads(html.unescape(found))
    assert sorted(seen["page"] for seen in both) == [[390, 390], [1280, 1280]], "the page must not scroll sideways"
    for seen in both:
        assert len(seen["widths"]) == len(page.images)
        for natural, shown, complete in seen["widths"]:
            assert complete
            assert natural > 0
            assert 300 <= shown <= seen["page"][1]
        assert seen["tables"]
        assert all(seen["tables"])
        assert seen["requests"] == []
        assert seen["headings"][:3] == ["Report", "At a glance", "Expansion plan"]
        assert "State health: collapse" in seen["headings"]
        assert seen["ink"] == "rgb(236, 236, 240)", "dark where the reader's system is"
