"""report.html and the terminal's tables: well-formed, self-contained, complete, and at ease with what is missing; progress too."""

import copy
import io
import re
import threading
from html.parser import HTMLParser

import pytest

from qlr_jax import progress
from qlr_jax.report import evaluation, inspection, report_html, summary
from qlr_jax.report.figures import ticks

VOID = {"meta", "wbr", "br"}


def matrix(layer, kind, spec, bits, error):
    name = f"model.layers.{layer}.{kind}_proj"
    figures = {"relative_error": error, "predicted_error": 0.9 * error, "predicted_damage": 0.01 * error, "sensitivity": 0.5}
    return {"name": name, "layer": layer, "kind": kind, "shape": [64, 64], "spec": spec, "bytes": 1152, "bits": bits} | figures


@pytest.fixture
def report():
    return {
        "format": 1,
        "versions": {"qlr-jax": "0.1.0", "jax": "0.10.2"},
        "model": "llama <tiny> & co",
        "budget": "2.25bpw",
        "command": "qlr compress llama out --budget 2.25bpw",
        "bits_per_weight": 2.2431,
        "whole_model_bits_per_weight": 3.5,
        "bytes": {
            "before": 10_500_000,
            "after": 2_370_000,
            "parts": [
                {"part": "q", "before": 9_000_000, "after": 870_000},
                {"part": "embeddings", "before": 1_500_000, "after": 1_500_000},
            ],
        },
        "perplexity": {"original": 4.812, "allocated": 5.633, "uniform": 5.921, "rank0": 5.702},
        "kl": {"allocated": 0.1523, "uniform": 0.2051, "rank0": 0.1688},
        "calibration_kl": {"allocated": 0.1498, "uniform": 0.2001, "rank0": 0.1633},
        "agreement": {"allocated": 0.861, "uniform": 0.832, "rank0": 0.853},
        "delivered": "allocated",
        "evaluation": {"text": "held-out modules", "tokens": 65536, "window": 512},
        "seconds": {"total": 212.3, "stages": {"load": 1.2, "solve": 83.1}},
        "peak_rss_bytes": 2_210_000_000,
        "allocation": {"damage": 0.1, "bound": 0.0999, "gap": 0.001},
        "uniform_spec": "trellis-2.25",
        "frontier": [{"bytes": 1000 * at, "damage": 4.0**-at} for at in range(1, 9)],
        "points": {
            "allocated": {"bytes": 4000, "damage": 0.004},
            "uniform": {"bytes": 3990, "damage": 0.007},
            "rank0": {"bytes": 3999, "damage": 0.005},
        },
        "matrices": [
            matrix(0, "q", "trellis-1.5+r8@trellis-4", 1.9, 0.2),
            matrix(0, "v", "trellis-4", 4.0, 0.05),
            matrix(1, "q", "trellis-2.25", 2.25, 0.15),
            matrix(1, "down", "bf16", 16.0, 0.0),
        ],
        "recipe": {"budget": "2.25bpw", "seed": 11, "ranks": [0, 8], "backbones": ("trellis-2", "trellis-3")},
    }


class Checker(HTMLParser):
    """Refuses tags that do not close, repeated ids, scripts, and whatever would be loaded from elsewhere."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.text, self.seen = [], set(), [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert tag not in ("script", "link", "iframe", "img", "object")
        for name, value in attrs:
            assert name not in ("src", "href", "xlink:href") and not name.startswith("on")
            if name == "id":
                assert value not in self.ids
                self.ids.add(value)
            assert "nan" not in (value or "").lower().split()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def test_page_holds_the_numbers(report):
    page = report_html(report)
    checker = Checker(page)
    text = " ".join(" ".join(checker.text).split())
    for wanted in ("2.2431", "10.5 MB", "2.37 MB", "4.43 times smaller", "5.633", "4.812", "×1.17", "0.152", "0.205", "86.1 %"):
        assert wanted in text
    for wanted in (
        "uniform (2.25)",
        "delivered",
        "65,536 tokens",
        "qlr compress llama out",
        "seed: 11",
        "jax 0.10.2",
        "qlr.load",
        "+r8",
    ):
        assert wanted in text
    assert "median: 1.11" in text
    assert "llama <tiny> & co" in text and "<tiny>" not in page  # escaped
    assert checker.seen.count("svg") == 2
    assert {"size", "quality", "allocation", "frontier", "prediction", "again", "load"} <= checker.ids
    assert "http" not in page and "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_every_cell_of_the_heat_map_says_its_spec(report):
    page = report_html(report)
    heat = re.search(r'<table class="heat">.*?</table>', page, re.S)[0]
    assert heat.count("<td") == 2 * 3  # two layers; q, v, down
    assert re.findall(r"<span>([^<]*)</span>", heat) == ["1.5", "4", "2.25", "bf16"]


def test_another_model_was_delivered(report):
    for key, name in (("uniform", "uniform (2.25)"), ("rank0", "rank 0")):
        report["delivered"] = key
        note = f"above that of {name}, so {name} is what was delivered"
        assert note in report_html(report).replace("&#x27;", "'") and note in summary(report)


def test_whatever_is_missing(report):
    for key in report:
        for value in (None, "absent"):
            less = copy.deepcopy(report)
            if value is None:
                less[key] = None
            else:
                del less[key]
            Checker(report_html(less))
            assert "None" not in summary(less)
    for less in (
        {},
        {"matrices": [{"name": "a.q_proj", "spec": "trellis-2"}]},
        {"bytes": {"parts": [{"part": "q", "before": None}]}},
    ):
        checker = Checker(report_html(less))
        assert "Not evaluated" in " ".join(checker.text)
        assert "not evaluated" in summary(less)


def test_missing_within_nested(report):
    report["kl"]["rank0"] = report["perplexity"]["uniform"] = float("nan")
    report["points"]["rank0"] = {"bytes": None, "damage": None}
    report["matrices"][0]["predicted_error"] = report["matrices"][1]["bits"] = None
    page = report_html(report)
    Checker(page)
    assert "nan" not in page.lower().replace("finance", "")


def test_calibration_figures_only(report):
    report |= {"perplexity": {}, "kl": {}, "agreement": {}, "evaluation": None}
    text = " ".join(Checker(report_html(report)).text)
    assert "on the calibration text" in text and "no held-out text was given" in text and "0.150" in text


def test_flat_frontier_and_equal_points(report):
    report["frontier"] = [{"bytes": 4000, "damage": 0.0}, {"bytes": 4000, "damage": 0.0}]
    report["points"] = {"allocated": {"bytes": 4000, "damage": 0.0}}
    Checker(report_html(report))


def test_summary(report):
    text = summary(report)
    assert "2.2431 bits per weight as stored, of a budget of 2.25bpw" in text
    assert "ranks: 1 of 4 matrices: q 1 of 2 (r8); none for v, down" in text
    row = next(line for line in text.splitlines() if line.startswith("allocated *"))
    assert row.split() == ["allocated", "*", "5.633", "×1.17", "0.152", "0.150", "86.1", "%"]
    assert "3 min 32 s" in text and "2.21 GB" in text


def test_other_tables(report):
    shown = evaluation(
        {"perplexity": 5.6331, "kl": 0.15, "kl_p99": 1.5, "agreement": 0.861, "tokens": 65536, "protocol": "one BOS"}
    )
    assert "5.633" in shown and "86.1 %" in shown and "65,536" in shown and "protocol: one BOS" in shown
    shown = inspection({"matrices": report["matrices"], "compressed_bytes": 4608, "bits_per_weight": 2.25, "settings": {}})
    assert "trellis-1.5+r8@trellis-4" in shown and "compressed bytes: 4.61 kB" in shown and "64 × 64" in shown
    assert "no compressed matrix" in inspection({})


@pytest.mark.parametrize(("low", "high", "log"), [(0.0, 7.3, False), (0.02, 0.3, True), (0.11, 0.13, True), (1e-9, 3.0, True)])
def test_ticks(low, high, log):
    found = ticks(low, high, log)
    assert 1 <= len(found) <= 16 and all(low <= value <= high * 1.001 for value in found) and found == sorted(found)


def test_plain_progress_from_two_threads():
    stream = io.StringIO()
    told = progress.plain(stream, every=0.0)
    with told.stage("solving", total=200) as stage:
        threads = [threading.Thread(target=lambda: [stage.advance(note="q") for _ in range(100)]) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    lines = stream.getvalue().splitlines()
    assert lines[0] == "solving (200)" and re.fullmatch(r"solving: done in \d+\.\d s", lines[-1])
    counts = [int(re.match(r"solving: (\d+) of 200", line)[1]) for line in lines[1:-1]]
    assert counts == list(range(1, 200))


def test_progress_tells_seldom_and_on_stderr(capsys):
    with progress.choose().stage("loading") as stage:
        for _ in range(50):
            stage.advance()
    with pytest.raises(KeyError), progress.plain().stage("solving"):
        raise KeyError
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 4 and "stopped after" in lines[-1]


def test_silent_and_bars(capsys):
    for told in (progress.silent(), progress.bars()):
        with told.stage("outer", total=2) as outer, told.stage("inner [q]") as inner:
            outer.advance(note="[layer]")
            inner.advance(2)
            told.say("a line [with brackets]")
    shown = capsys.readouterr()
    assert shown.out == "" and "a line [with brackets]" in shown.err and "outer: done in" in shown.err
