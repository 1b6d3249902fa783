"""report.html and the terminal's tables: well-formed, self-contained, complete, and at ease with what is missing; progress too."""

import copy
import io
import json
import re
import threading
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from allocators import Option, OptionTable, Row
from qlr_jax import progress
from qlr_jax.errors import QLRError
from qlr_jax.report import evaluation, inspection, report_html, report_markdown, summary
from qlr_jax.report.content.fit import fit_rows, fit_sentence
from qlr_jax.report.content.sensitivity import worst_matrix
from qlr_jax.report.html.drawings.errors import error_bits
from qlr_jax.report.html.drawings.frontier import frontier_svg
from qlr_jax.report.html.drawings.heat import coefficient_map, damage_map, sensitivity_map
from qlr_jax.report.html.drawings.loss import loss_curve
from qlr_jax.report.html.drawings.spectra import leading_shares, spectra
from qlr_jax.report.html.drawings.svg import standalone, ticks
from qlr_jax.report.html.sensitivity_page import sensitivity_page, write_pictures
from qlr_jax.report.terminal.frontier import frontier_text
from qlr_jax.report.terminal.sensitivity import sensitivity_text

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


@pytest.fixture
def full(report):
    """A report with all that a job may add: a device, an adaptation, spectra."""
    history = [{"phase": "all <parts>", "step": 0, "held_out": 0.05}]
    history += [{"phase": "all <parts>", "step": step, "loss": 0.05 - 0.0001 * step} for step in range(1, 401)]
    history += [{"phase": "R rounded", "step": step, "loss": 0.02, "held_out": 0.03} for step in range(1, 51)]
    return report | {
        "budget": "device:8MB,context=4096,batch=2,kv=fp8",
        "fit": {
            "budget": "device:8MB,context=4096,batch=2,kv=fp8",
            "items": {
                "device": 8_000_000,
                "norms and other fixed tensors": -20_000,
                "key-value cache": -3_000_000,
                "working allowance": -800_000,
            },
            "weights": 2_370_000,
            "fits": True,
        },
        "adapted": {
            "command": "qlr adapt out adapted --text 'a b.txt'",
            "text": "other <modules>",
            "verdict": "The adapted model is better & kept.",
            "trained": ["norms", "scales"],
            "steps": 450,
            "loss": "kl",
            "seconds": 123.0,
            "bits_per_weight_before": 2.2431,
            "bits_per_weight": 2.2431,
            "before": {"kl": 0.0433, "perplexity": 12.09, "agreement": 0.88},
            "after": {"kl": 0.0399, "perplexity": 12.03, "agreement": 0.885},
            "tokens": 16384,
            "history": history,
        },
        "spectra": {row["name"]: [0.5 * 0.8**at for at in range(12)] for row in report["matrices"]},
        "device": "NVIDIA <H100>",
        "cores": 2,
        "target": "gguf",
    }


def words_of(page):
    return " ".join(" ".join(Checker(page).text).split())


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
    assert checker.seen.count("svg") == 3
    wanted = {
        "size",
        "fit",
        "quality",
        "cost",
        "allocation",
        "sensitivity",
        "certificate",
        "frontier",
        "prediction",
        "again",
        "load",
    }
    assert checker.ids == wanted
    assert "http" not in page and "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_sections_come_in_the_order_of_a_decision(full):
    page = report_html(full)
    order = "size fit quality adapted cost allocation sensitivity spectra certificate frontier prediction again load"
    assert " ".join(re.findall(r'id="(\w+)"', page)) == order
    assert Checker(page).seen.count("svg") == 5
    assert "http" not in page and "url(" not in page and "@import" not in page and "<H100>" not in page and "<parts>" not in page
    heads = re.findall(r"^## (.*)$", report_markdown(full), re.M)
    said = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads == [title for title in said if title in heads] and len(heads) == 9  # of the same names, in the same order


def test_does_it_fit(full):
    words = words_of(report_html(full))
    assert "It fits the device of 8MB (8.00 MB), with a context of 4,096 tokens, batch 2, cache in fp8: 6.17 MB are needed" in words
    assert (
        "1.83 MB stay free. The original needs 14.3 MB and does not fit." in words and "where the memory ends, at 8.00 MB" in words
    )
    assert fit_rows(full) == [
        ("weights", "10.5 MB", "2.37 MB"),
        ("key-value cache", "3.00 MB", "3.00 MB"),
        ("working allowance", "800 kB", "800 kB"),
        ("needed", "14.3 MB", "6.17 MB"),
        ("there is", "8.00 MB", "8.00 MB"),
        ("free", "−6.30 MB", "1.83 MB"),
    ]
    bars = re.findall(r'<div class="fit".*?</div>', report_html(full), re.S)
    for bar in bars:  # every part has its place, none over another or beyond the bar
        places = [(float(left), float(width)) for left, width in re.findall(r"left:([\d.]+)%;width:([\d.]+)%", bar)]
        assert all(left + width <= after + 0.02 for (left, width), (after, _) in pairwise([*places, (100.0, 0.0)]))
    assert [bar.count("<i") for bar in bars] == [3, 4]  # what does not fit leaves nothing free

    full["fit"] = {"budget": "12MB", "items": {"budget": 12_000_000}, "weights": 2_370_000, "fits": True}
    assert fit_sentence(full).endswith("2.37 MB are needed, 9.63 MB stay free. The original needs 10.5 MB and fits as well.")
    full["fit"] |= {"weights": 13_000_000, "fits": False}
    assert "does not fit the budget of 12.0 MB: 13.0 MB are needed, 1.00 MB too many" in words_of(report_html(full))
    full["target"] = "adapter"
    assert "given backbone is not among these weights" in fit_sentence(full)


def test_what_a_device_budget_would_tell(report):
    assert "--budget device:8GiB,context=8192" in words_of(report_html(report)) and "--budget device" in report_markdown(report)
    report["budget"] = "900MB"
    assert "--budget device" not in report_html(report) + report_markdown(report)


def test_what_adaptation_won_back(full):
    words = words_of(report_html(full))
    for wanted in (
        "won back 7.9 % of the KL that compression had cost: 0.0433 before, 0.0399 after.",
        "12.09 12.03 −0.496 %",
        "+0.5 points",
        "bits per weight 2.2431 2.2431 the same",
        "matrices, stored 4.59 kB 4.59 kB",
        "better & kept",
        "norms, scales, on KL to the original, 450 steps, in 2 min 03 s, evaluated on 16,384 tokens of other <modules>",
        "mean of 3 steps",
        "where a phase begins (all <parts>, then R rounded)",
    ):
        assert wanted in words
    svg = inside(loss_curve(full))
    assert len([node for node in svg.iter() if node.tag == "polygon"]) == 51
    assert "400" in texts(svg)  # steps go on from phase to phase
    full["adapted"]["after"]["kl"] = 0.05
    assert "Adaptation won nothing back: KL 0.0433 before, 0.0500 after." in words_of(report_html(full))
    assert "daptation" not in words_of(report_html({key: value for key, value in full.items() if key != "adapted"}))


def test_what_it_cost(full):
    words = words_of(report_html(full))
    assert "3 min 32 s, peak memory 2.21 GB, on NVIDIA <H100>, 2 cores beside it." in words
    assert "solve 1 min 23 s" in words and "adaptation, afterwards 2 min 03 s" in words
    assert "on the CPU, 1 core." in words_of(report_html(full | {"device": "cpu", "cores": 1}))


def test_what_the_bytes_mean(full):
    for target, note in (("gguf", "GGUF blocks"), ("compressed-tensors", "integer codes"), ("adapter", "its maker's"), ("qlr", "")):
        full["target"] = target
        for page in (words_of(report_html(full)), report_markdown(full)):
            assert note in page and ("Bytes are" in page or "factors L and R alone" in page) == (target != "qlr")
    assert "bits per weight of the factors alone" in words_of(report_html(full | {"target": "adapter"}))


def test_certificate(report):
    words = words_of(report_html(report))
    assert "offered within these bytes does less predicted damage by more than 0.1 %. Predicted damage 0.1000" in words
    assert "lower bound 0.0999" in words and "is not a measurement" in words and "it is 0.150" in words
    report["allocation"] = {"damage": 0.1, "bound": None, "gap": None}
    assert "Nothing is proved of what was delivered" in words_of(report_html(report))


@pytest.mark.parametrize("layers", [1, 3, 40])
def test_why_bits_and_rank_went_there(layers):
    facts = table_of(layers).notes["matrices"]
    rows = [{"name": name, "sensitivity": fact["coefficient"]} | fact for name, fact in facts.items()]
    report = {"matrices": rows, "spectra": {name: fact["spectrum"] for name, fact in facts.items()}}
    svg = inside(leading_shares(report))
    curves = [node.get("style") for node in svg.iter() if node.tag == "polyline" and "dasharray" in (node.get("style") or "")]
    assert len(curves) == 14 and len(set(curves)) == 7  # a line and its key a kind, no two kinds alike
    assert [text for text in texts(svg) if text in KINDS] == [kind for kind in KINDS for _ in range(2)]
    assert len([node for node in inside(sensitivity_map(report)).iter() if node.tag == "g"]) == 7 * layers
    assert "8 leading components make up (median over layers): q 94.2 %, k 94.2 %" in words_of(report_html(report))
    page = report_html(report | {"spectra": {"model.layers.0.self_attn.q_proj": [0.7, float("nan")], "odd": "text", "more": [1.2]}})
    assert "nan" not in page and "leading component makes up (median over layers): more 100.0 %" in words_of(page)


def test_markdown(full):
    text = report_markdown(full)
    assert text.startswith("# llama \\<tiny> & co at 2.2431 bits per weight\n")
    for wanted in (
        "| total | 10.5 MB | 2.37 MB | 22.6 % |",
        "| free | −6.30 MB | 1.83 MB |",
        "| allocated (delivered) | 5.633 | ×1.17 | 0.152 | 0.150 | 86.1 % |",
        "| KL, nats a token | 0.0433 | 0.0399 | −7.85 % |",
        "| adaptation, afterwards | 2 min 03 s |",
        "| 0 | 1.5+r8 | 4 | – |",
        "```sh\nqlr compress llama out --budget 2.25bpw\nqlr adapt out adapted --text 'a b.txt'\n```",
        "seed: 11",
        "Versions: qlr-jax 0.1.0, jax 0.10.2.",
    ):
        assert wanted in text, wanted
    outside = re.sub(r"```.*?```", "", text, flags=re.S)
    assert not re.search(r"(?<!\\)<", outside)
    for table in re.findall(r"(?:^\|.*\n)+", outside, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1  # as many cells in every row
    full["command"] = "echo ```"
    assert "````sh\necho ```\nqlr adapt out adapted --text 'a b.txt'\n````" in report_markdown(full)
    assert report_markdown({}).startswith("# Llama model at – bits per weight") and "Not evaluated" in report_markdown({})


def test_bounds_stand_beside_the_errors(report):
    for row, bound, note in zip(report["matrices"], (0.31, None, None, None), (None, "of <U>", "of <U>", None), strict=True):
        row |= {"bound": bound, "bound_note": note}
    page, text = words_of(report_html(report)), report_markdown(report)
    line = "Upper bounds of the relative error: 1 of 4 matrices; none for 2: of <U>."
    assert line in page and line.replace("<", r"\<") in text
    assert "relative error upper bound predicted error" in page and "1.9 0.200 0.310 0.180" in page.replace("1.90", "1.9")
    assert "| relative error | upper bound |" in text
    for row in report["matrices"]:
        del row["bound"], row["bound_note"]
    assert "Upper bounds" not in report_html(report) + report_markdown(report)


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


def less_of(report):
    """The report with one value null or absent: every one of its own, and every one of the parts that a job may add."""
    for path in [(key,) for key in report] + [(part, key) for part in ("fit", "adapted", "allocation") for key in report[part]]:
        for value in (None, "absent"):
            less = copy.deepcopy(report)
            inner = less
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = None
            if value:
                del inner[path[-1]]
            yield less


def test_whatever_is_missing(full):
    for less in less_of(full):
        page = report_html(less)
        Checker(page)
        assert "None" not in summary(less) + report_markdown(less) + page
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
    assert row.split() == ["allocated", "*", "5.633", "×1.17", "0.152", "0.150", "0.00400", "86.1", "%"]
    assert "3 min 32 s" in text and "2.21 GB" in text


def test_whether_rank_paid(report):
    told = "At these bytes rank paid: KL 0.152 against 0.169 without, 9.8 % less (held-out)."
    assert told in summary(report) and told in report_html(report)
    assert "predicted before any solve → measured: allocated 0.00400 → 0.150" in report_html(report)
    report["kl"]["rank0"] = 0.1525
    assert "Rank made no difference: KL 0.152 against 0.152 without, 0.1 % less" in summary(report)
    report["kl"] = {}
    report["calibration_kl"]["rank0"] = 0.14
    assert "Rank did not pay: KL 0.150 against 0.140 without, 7.0 % more (calibration text)." in summary(report)
    report["calibration_kl"] = {}
    assert "without" not in summary(report).replace("stored without", "")


def test_what_refining_brought(report):
    assert "efined" not in summary(report) + report_html(report)
    report["refined"] = {"measured": 0.148, "start": 0.15, "gained": 0.002, "tried": 24, "accepted": 5, "seconds": 3.0}
    assert "refined: 5 of 24 proposals accepted, calibration KL 1.3 % lower" in summary(report)
    assert "Refined: 5 of 24 proposals accepted, calibration KL 1.3 % lower." in report_html(report)
    for less in (
        {},
        {"tried": 3},
        {"tried": 3, "accepted": 0, "start": 0.0},
        {"tried": 0, "accepted": 0, "start": 0.1, "gained": None},
    ):
        report["refined"] = less
        assert "None" not in summary(report)
        Checker(report_html(report))


def test_predictions_are_held_against_what_was_minimised(report):
    for row in report["matrices"]:
        row["felt_error"] = 0.9 * row["relative_error"]
    assert "median: 1.00" in " ".join(Checker(report_html(report)).text)


def test_other_tables(report):
    shown = evaluation(
        {
            "perplexity_original": 5.5, "perplexity": 5.6331, "perplexity_ratio": 1.02, "kl": 0.15, "kl_p99": 1.5,
            "agreement": 0.861, "tokens": 65536, "protocol": "one BOS", "intervals": {"kl": [0.14, 0.16]},
            "worst": {"kl": 3.0, "position": 1, "window": 2, "before": "a", "next": "b", "original": "c", "compressed": "d"},
        }
    )  # fmt: skip
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


def test_what_comes_before_the_first_piece_is_not_taken_for_a_piece(monkeypatch):
    """A pass through the whole model of 60 s, then 9 layers of 2 s each."""
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.plain(stream, every=0.0).stage("calibrating", total=10) as stage:
        for seconds in (62.0, *[2.0] * 8):
            now[0] += seconds
            stage.advance()
    lines = stream.getvalue().splitlines()[1:-1]
    assert lines[:3] == [
        "calibrating: 1 of 10",
        "calibrating: 2 of 10, about 16.0 s left",
        "calibrating: 3 of 10, about 14.0 s left",
    ]


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


KINDS = ("q", "k", "v", "o", "gate", "up", "down")


def table_of(layers=3, kinds=KINDS, ranks=(0, 4, 8), **notes):
    """A small option table with everything that a measurement notes."""
    rows, facts = [], {}
    for layer in range(layers):
        for at, kind in enumerate(kinds):
            part = "self_attn" if kind in "qkvo" else "mlp"
            name, coefficient = f"model.layers.{layer}.{part}.{kind}_proj", 10.0 ** (at - 4 - layer)
            options = []
            for rank in ranks:
                for bits in (1, 2, 3, 4):
                    spec = f"trellis-{bits}" + (f"+r{rank}@trellis-4" if rank else "")
                    error = 2.0**-bits * 0.99**rank
                    options.append(Option(spec, 512 * bits + 16 * rank, coefficient * error**2, bits == 2))
            rows.append(Row(name, 4096, tuple(options)))
            spectrum = [0.3 * 0.7**i for i in range(20)]
            probe = {"spec": "trellis-2", "error": 0.25, "kl": coefficient / 16}
            facts[name] = {"layer": layer, "kind": kind, "shape": [64, 64], "coefficient": coefficient, "probe": probe}
            facts[name] |= {"spectrum": spectrum, "plain_spectrum": [share / 2 for share in spectrum]}
    told = {
        "model": "llama <tiny> & co",
        "command": "qlr sensitivity bundled out",
        "unit": "nats of KL a token",
        "attribution": "knockout",
        "seconds": {"load": 1.0, "measure": 61.0},
        "matrices": facts,
        "measured": [{"label": "rank0", "kind": "rank0", "bytes": 30000, "bits_per_weight": 2.25, "kl": 0.02}],
        "prediction": {"median": 1.01, "p10": 0.9, "p90": 1.1, "count": 9},
    }
    return OptionTable(tuple(rows), notes=told | notes)


def number_of(node, key):
    return float(node.get(key, 0))


def inside(drawing):
    """The drawing as XML, none of its coordinates or letters outside of its view box."""
    svg = ElementTree.fromstring(drawing)
    left, top, width, height = map(float, svg.get("viewBox").split())
    xs, ys = [], []
    for node in svg.iter():
        tag = node.tag.rpartition("}")[2]
        get = partial(number_of, node)
        if tag == "text" and "transform" not in node.attrib:
            assert "nan" not in (node.text or "")
            # letters are 6.4 pixels wide on average, digits and bold ones 7
            wide = 7.0 * len(node.text or "") if node.get("class") == "label" else 6.4 * len(node.text or "")
            start = get("x") - {"end": wide, "middle": wide / 2}.get(node.get("text-anchor"), 0.0)
            xs += [start, start + wide]
            ys += [get("y") - 10, get("y") + 3]
        elif tag == "rect":
            xs += [get("x"), get("x") + get("width")] if "%" not in node.get("width") else []
            ys += [get("y"), get("y") + get("height")]
        elif tag == "circle":
            xs += [get("cx") - get("r"), get("cx") + get("r")]
            ys += [get("cy") - get("r"), get("cy") + get("r")]
        elif tag == "line":
            xs += [get("x1"), get("x2")]
            ys += [get("y1"), get("y2")]
        elif tag in ("polyline", "polygon"):
            for pair in node.get("points").split():
                x, y = map(float, pair.split(","))
                xs.append(x)
                ys.append(y)
    assert left - 1 <= min(xs) and max(xs) <= left + width + 1, (min(xs), max(xs), width)
    assert top - 1 <= min(ys) and max(ys) <= top + height + 1, (min(ys), max(ys), height)
    return svg


def texts(svg):
    return [node.text for node in svg.iter() if node.tag.endswith("text")]


@pytest.mark.parametrize("layers", [1, 3, 40])
def test_heat_maps(layers):
    notes = table_of(layers).notes
    for drawing, key in ((damage_map(notes), "damage at trellis-2"), (coefficient_map(notes), "damage per squared relative error")):
        svg = inside(drawing)
        shown = texts(svg)
        assert key in shown and shown.count("gate") == 1
        assert len([node for node in svg.iter() if node.tag == "g"]) == 7 * layers
    fallback = copy.deepcopy(dict(notes))
    for row in fallback["matrices"].values():
        del row["probe"]["kl"]  # coefficient · error² is the same number here
    assert damage_map(fallback) == damage_map(notes)


def test_heat_map_of_odd_values():
    notes = table_of(2, ("q", "odd")).notes
    names = list(notes["matrices"])
    for name, value in zip(names, (0.0, -1e-6, 1e-9, float("nan")), strict=True):
        notes["matrices"][name]["coefficient"] = notes["matrices"][name]["probe"]["kl"] = value
    assert "nan" not in coefficient_map(notes) and "nan" not in damage_map(notes)
    inside(coefficient_map(notes))


@pytest.mark.parametrize(("layers", "kinds"), [(1, ("q",)), (3, KINDS), (33, ("q", "gate", "down"))])
def test_spectra(layers, kinds):
    svg = inside(spectra(table_of(layers, kinds).notes))
    curves = [node for node in svg.iter() if node.tag == "polyline"]
    assert len(curves) == layers * len(kinds) + len(kinds) + 1  # a line a matrix, the plain median of each kind, the legend's
    assert [text for text in texts(svg) if text in kinds] == list(kinds)
    plain = [node for node in curves if "dasharray" in (node.get("style") or "")]
    assert len(plain) == len(kinds) + 1
    title = next(node for node in svg.iter() if node.tag == "title").text
    assert title.endswith("half is in 2 components")


def test_error_against_bits():
    table = table_of()
    assert worst_matrix(table.notes) == "model.layers.0.mlp.down_proj"
    svg = inside(error_bits(table))
    assert "model.layers.0.mlp.down_proj" in texts(svg) and {"rank 0", "r4", "r8"} <= set(texts(svg))
    assert len([node for node in svg.iter() if node.tag == "circle"]) == 3  # measured
    other = inside(error_bits(table, "model.layers.2.self_attn.q_proj"))
    assert "model.layers.2.self_attn.q_proj" in texts(other)
    said = next(node.find("title").text for node in svg.iter() if node.tag == "circle")
    assert "trellis-2" in said and "error 0.25" in said  # √(damage / coefficient)
    inside(error_bits(table_of(ranks=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10))))  # labels do not fall off
    kept = (Option("trellis-2", 1024, 0.1), Option("bf16", 8192, 0.0))
    inside(
        error_bits(OptionTable((Row("a.q_proj", 4096, kept),), notes={"matrices": {"a.q_proj": {"coefficient": 1.0}}}), "a.q_proj")
    )


def test_sensitivity_page():
    table = table_of()
    page = sensitivity_page(table)
    assert page == sensitivity_page(json.loads(table.to_json()))
    checker = Checker(page)
    text = " ".join(" ".join(checker.text).split())
    assert {"damage", "coefficient", "spectra", "error", "matrices", "about"} <= checker.ids and checker.seen.count("svg") == 4
    for wanted in (
        "21",
        "252 options",
        "Attribution: knockout",
        "10th to 90th percentile 0.900 to 1.10",
        "1 min 01 s",
        "rank0 0.0200",
    ):
        assert wanted in text
    assert "llama <tiny> & co" in text and "<tiny>" not in page
    assert "http" not in page and "url(" not in page and "width=device-width" in page
    chosen = sensitivity_page(table, "model.layers.2.mlp.up_proj")
    assert "model.layers.2.mlp.up_proj: the least error" in chosen
    with pytest.raises(QLRError, match=r"matrix 'up' is not in the table; give a name such as model\.layers\.0\.mlp\.down_proj"):
        sensitivity_page(table, "up")


def test_sensitivity_with_anything_missing(tmp_path):
    table = table_of()
    for key in table.notes:
        for value in (None, "absent"):
            less = {name: fact for name, fact in table.notes.items() if name != key} | ({key: None} if value is None else {})
            Checker(sensitivity_page(OptionTable(table.rows, notes=less)))
            assert "None" not in sensitivity_text({"notes": less})
    facts = table.notes["matrices"]
    for key in ("layer", "kind", "shape", "coefficient", "probe", "spectrum", "plain_spectrum"):
        for value in (None, "absent"):
            less = {
                name: {k: v for k, v in row.items() if k != key} | ({key: None} if value is None else {})
                for name, row in facts.items()
            }
            bare = OptionTable(table.rows, notes=dict(table.notes) | {"matrices": less})
            Checker(sensitivity_page(bare))
            sensitivity_text({"notes": bare.notes})
    bare = OptionTable(table.rows)
    Checker(sensitivity_page(bare))
    assert [file.name for file in write_pictures(bare, tmp_path)] == ["sensitivity.html"]
    assert sensitivity_text({}) and "None" not in sensitivity_text({})


def test_pictures_are_files_of_their_own(tmp_path):
    files = write_pictures(table_of(), tmp_path)
    assert [file.name for file in files] == ["sensitivity.html", "damage.svg", "coefficient.svg", "spectra.svg", "error.svg"]
    for file in files[1:]:
        drawing = file.read_text()
        assert "var(" not in drawing  # colours as every viewer knows them
        svg = inside(drawing)
        assert svg.tag == "{http://www.w3.org/2000/svg}svg" and float(svg.get("width")) > 100


def test_sensitivity_text():
    told = sensitivity_text(
        {"out": "o", "table": "o/table.json", "matrices": 21, "options": 252, "seconds": 62.0, "notes": table_of().notes}
    )
    assert "21 matrices, 252 options" in told and "attribution: knockout" in told and "table: o/table.json" in told
    first = next(line for line in told.splitlines() if line.startswith("model.layers."))
    assert first.split()[:3] == ["model.layers.0.mlp.down_proj", "6.25", "81.1"]
    assert "by layer: 0 90.1 %, 1 9.0 %, 2 0.9 %" in told and "by kind: q 0.0 %" in told and "time: 1 min 02 s (load 1.0 s" in told


def corners(sizes, damages):
    return [
        {"bytes": size, "bits_per_weight": size / 1000, "damage": damage, "price": 1e-6}
        for size, damage in zip(sizes, damages, strict=True)
    ]


def test_frontier_drawing():
    curves = {"weights": 8_000_000, "all_counted": True, "corners": 9}
    curves |= {"all": corners((1e6, 2e6, 4e6), (1.0, 0.1, 1e-9)), "rank0": corners((1e6, 2e6), (1.0, 0.12))}
    measured = [
        {"label": f"{kind} (a long name of a folder)", "kind": kind, "bytes": 2e6, "kl": kl, "on": "calibration"}
        for kind, kl in (("allocated", 0.11), ("uniform", 0.2), ("rank0", 0.112), ("other", 0.112))
    ]
    svg = inside(frontier_svg(curves, measured))
    assert {node.tag for node in svg.iter()} >= {"circle", "rect", "polygon", "polyline"}  # shapes tell the models apart
    assert "bits per weight" in texts(svg) and any("rank 0" in text for text in texts(svg))
    heights = sorted(float(node.get("y")) for node in svg.iter() if node.tag == "text" and "long name" in (node.text or ""))
    assert all(high - low >= 12 for low, high in pairwise(heights))
    assert "marks: measured on calibration text" in texts(svg)
    ElementTree.fromstring(standalone(frontier_svg(curves)))
    inside(frontier_svg({"all": corners((1e6,), (0.0,)), "rank0": None}))
    assert frontier_svg({}) == ""
    told = frontier_text(curves, measured)
    assert "3 of 9 corners" in told and "rank 0 (a long" in told and "0.120" in told and "None" not in told
