"""Option tables and budgets: what they hold, what they refuse, and in which words."""

import json
import re

import pytest

from allocators import (
    AllocationError,
    Budget,
    Infeasible,
    ModelFacts,
    Option,
    OptionTable,
    Row,
    Tie,
    allocate,
    baselines,
    format_size,
    from_specs,
    parse_size,
    prune,
    uniform,
)

OPTIONS = (
    Option("int-2", 160, 4.0),
    Option("int-2+r4@bf16", 200, 2.5, measured=True),
    Option("int-3", 240, 1.0),
    Option("int-4", 320, 0.25),
)
HEAD = Row(
    "lm_head", 1000, (Option("bf16", 2000, 0.0), Option("int-8g32", 1100, 0.01), Option("int-4g32", 600, 0.4)), counted=False
)


def table(*names: str, ties: tuple[Tie, ...] = (), head: bool = False) -> OptionTable:
    rows = tuple(Row(name, 640, OPTIONS) for name in names or ("0.q", "0.k", "1.q", "1.k"))
    return OptionTable(rows + ((HEAD,) if head else ()), ties, ModelFacts(fixed_bytes=100, layers=2, kv_heads=2, head_dim=4))


def test_json_round_trip_is_exact():
    full = OptionTable(
        table(head=True).rows, (Tie(("0.q", "0.k")), Tie(("1.q", "1.k"), "spec")), ModelFacts(7, 2, 4, 8), {"seed": 3}
    )
    text = full.to_json()
    assert OptionTable.from_json(text) == full
    assert OptionTable.from_json(json.loads(text)) == full
    assert OptionTable.from_json(text).to_json() == text
    awkward = OptionTable((Row("a", 3, (Option("x", 1, 0.1 + 0.2), Option("y", 10**13, 5e-324))),))
    assert OptionTable.from_json(awkward.to_json()) == awkward


def change(**changes: object) -> str:
    return json.dumps(json.loads(table().to_json()) | changes)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{", "not JSON"),
        ("[]", "its format is 'list', not 'qlr-option-table'"),
        (change(format="other"), "its format is 'other'"),
        (change(version=2), "format version 2 and this program reads 1"),
        (change(columns=["spec"]), "columns are ['spec']"),
        (change(rows=[{"name": "a"}]), "damaged: KeyError"),
        (change(model={"heads": 1}), "damaged: TypeError"),
        (change(rows=[]), "the table has no rows"),
    ],
)
def test_json_refuses_what_it_did_not_write(source, words):
    with pytest.raises(AllocationError, match=re.escape(words)):
        OptionTable.from_json(source)


def row(*options: Option, weights: int = 64, name: str = "a") -> Row:
    return Row(name, weights, options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Option("", 1, 0.0), "spec is ''"),
        (lambda: Option("int-2", -1, 0.0), "bytes is -1; pass a whole number"),
        (lambda: Option("int-2", 1.5, 0.0), "bytes is 1.5"),
        (lambda: Option("int-2", True, 0.0), "bytes is True"),
        (lambda: Option("int-2", 1, float("nan")), "damage is nan; pass a finite number"),
        (lambda: Option("int-2", 1, float("inf")), "damage is inf"),
        (lambda: Option("int-2", 1, "0"), "damage is '0'"),
        (lambda: Option("int-2", 1, 0.0, rank=-1), "rank is -1"),
        (lambda: row(weights=64), "row a has no option"),
        (lambda: row(OPTIONS[0], weights=0), "weights is 0; pass the number of weights"),
        (lambda: row(OPTIONS[0], OPTIONS[0]), "row a offers int-2 twice"),
        (lambda: OptionTable((row(OPTIONS[0]), row(OPTIONS[0]))), "two rows named a"),
        (lambda: table(ties=(Tie(("0.q", "9.k")),)), "a tie names 9.k, which is no row; rows are 0.q, 0.k"),
        (lambda: table(ties=(Tie(("0.q", "0.k")), Tie(("1.q", "0.k")))), "row 0.k is in two ties"),
        (lambda: table(ties=(Tie(("0.q", "lm_head")),), head=True), "mixes rows that count"),
        (lambda: Tie(("a", "b"), "rank"), "a tie on 'rank' is unknown; pass 'backbone' or 'spec'"),
        (lambda: ModelFacts(fixed_bytes=-3), "fixed_bytes is -3"),
        (lambda: table()["2.q"], "no row 2.q; rows are"),
        (lambda: table()["0.q"].option("nf-2"), "row 0.q does not offer nf-2; it offers int-2"),
        (lambda: table().lock("*.v", "int-2"), "no row matches '*.v'"),
        (lambda: table().lock("*.q", "nf-2"), "does not offer nf-2"),
        (lambda: table().at_least("*", 0), "bits is 0; pass a positive number"),
        (lambda: table().at_least("*", 5), "at least 5 bits for * leaves row 0.q no option"),
        (lambda: table().tie("0.q", "0.q"), "tie nothing"),
        (lambda: table().tie("*.q", "*.k", on="all"), "a tie on 'all'"),
        (
            lambda: table(ties=(Tie(("0.q", "0.k")),)).lock("0.q", "int-3").lock("0.k", "int-4"),
            "0.q, 0.k offer no backbone in common",
        ),
        (lambda: from_specs(table(), {"0.q": "int-2"}), "no spec is given for 0.k, 1.q, 1.k"),
        (lambda: from_specs(table("a"), {"a": "int-4"}, limit=319), "takes 320 bytes, more than the limit of 319"),
        (
            lambda: from_specs(table("a", "b", ties=(Tie(("a", "b")),)), {"a": "int-3", "b": "int-4"}),
            "different backbones: int-3, int-4",
        ),
        (lambda: allocate(table("a"), 159), "limit of 159 bytes is below the table's least; pass 160 to 320"),
        (lambda: allocate(table("a"), 200.0), "the limit is 200.0; pass a whole number of bytes"),
        (lambda: allocate(table("a"), 200, gap=-1), "gap is -1"),
        (lambda: allocate(table("a"), 200, seconds=0), "seconds is 0"),
        (
            lambda: uniform(OptionTable((row(*OPTIONS[:2]), row(*OPTIONS[2:], name="b"))), 1000),
            "no spec that every counted row offers fits",
        ),
        (lambda: uniform(OptionTable((HEAD,)), 2000), "there is no uniform spec"),
    ],
)
def test_errors_name_the_value(make, words):
    with pytest.raises(AllocationError, match=re.escape(words)):
        make()


def test_rank_is_read_from_the_spec():
    assert [Option(spec, 1, 0.0).rank for spec in ("int-4", "none+r64@int-8,bf16", "trellis-2.25+r8@e8-4")] == [0, 64, 8]
    assert Option("anything", 1, 0.0, rank=5).rank == 5


def test_prune_reports_and_respects_ties():
    worse = (Option("nf-3", 240, 1.5), Option("int-2+r1@bf16", 200, 3.0), Option("nf-2", 160, 4.0))
    lone = OptionTable((Row("a", 640, OPTIONS + worse),))
    pruned = prune(lone)
    assert pruned.table["a"].options == OPTIONS
    assert {(d.spec, d.by) for d in pruned.dropped} == {("nf-3", "int-3"), ("int-2+r1@bf16", "int-2+r4@bf16"), ("nf-2", "int-2")}
    tied = OptionTable((Row("a", 640, OPTIONS + worse), Row("b", 640, worse)), (Tie(("a", "b")),))
    dropped = {(d.row, d.spec, d.by) for d in prune(tied).dropped}  # nf-3 stays: b may need it; int-3 goes: b lacks it
    assert dropped == {("a", "int-3", None), ("a", "int-4", None), ("a", "int-2+r1@bf16", "int-2+r4@bf16")}
    assert prune(pruned.table).dropped == ()


def test_uniform_specs_and_locks():
    assert table(head=True).uniform_specs() == tuple(option.spec for option in OPTIONS)
    assert table().lock("0.*", "int-4").uniform_specs() == tuple(option.spec for option in OPTIONS)
    assert table().at_least("0.q", 3).uniform_specs() == ("int-3", "int-4")
    found = uniform(table(head=True).lock("0.q", "int-4"), 4 * 320 + 600 - 1)  # a byte short of int-4 everywhere
    assert dict(found.specs) == {"0.q": "int-4", "0.k": "int-3", "1.q": "int-3", "1.k": "int-3", "lm_head": "int-4g32"}


def test_baselines_that_do_not_exist_are_left_out():
    ranked = OptionTable((row(*OPTIONS[1:2]), row(*OPTIONS, name="b")))
    found = baselines(ranked, 200 + 320)
    assert set(found) == {"uniform", "filled_uniform", "greedy", "random"}
    apart = OptionTable((row(*OPTIONS[:2]), row(*OPTIONS[2:], name="b")))
    assert set(baselines(apart, 1000)) == {"rank0", "greedy", "random"}


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("2.25bpw", "2.25bpw"),
        (" 2.250 BPW ", "2.25bpw"),
        ("3.bpw", "3bpw"),
        (".5bpw", "0.5bpw"),
        ("900MB", "900MB"),
        ("900 mb", "900MB"),
        ("900MiB", "900MiB"),
        ("1.5GB", "1.5GB"),
        ("1500MB", "1.5GB"),
        ("0.5GiB", "512MiB"),
        ("1001B", "1001B"),
        ("0.3GiB", "322122547B"),
        ("70B", "70B"),
        ("device:8GiB,context=8192", "device:8GiB,context=8192,batch=1,kv=bf16"),
        ("Device: 8GiB, context=08192, batch=4, kv=FP8, work=1GiB", "device:8GiB,context=8192,batch=4,kv=fp8,work=1GiB"),
    ],
)
def test_budget_texts(text, canonical):
    budget = Budget.parse(text)
    assert str(budget) == canonical
    assert Budget.parse(canonical) == budget
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "budget '' is not understood; pass for example '2.25bpw', '900MB'"),
        ("2.25", "budget '2.25' is not understood"),
        ("900M", "not understood"),
        ("-3bpw", "not understood"),
        ("-900MB", "size '-900MB' is not a number with a unit"),
        ("1e3MB", "is not a number with a unit"),
        ("0bpw", "budget '0bpw' is nothing"),
        ("0MB", "size '0MB' is nothing"),
        (2.25, "budget 2.25 is not a text"),
        ("device:8GiB", "the context length is missing; pass for example 'device:8GiB,context=8192'"),
        ("device:8,context=8", "size '8' is not a number with a unit"),
        ("device:8GiB,context=0", "context=0 is not a whole number of at least 1"),
        ("device:8GiB,context=8,batch=x", "batch=x is not a whole number"),
        ("device:8GiB,context=8,kv=q4", "kv=q4 is unknown; pass one of bf16"),
        ("device:8GiB,length=8", "'length=8' is not understood"),
        ("device:8GiB,context=8,context=9", "each once"),
    ],
)
def test_budget_texts_refused(text, words):
    with pytest.raises(AllocationError, match=re.escape(words)):
        Budget.parse(text)


def test_sizes():
    assert (
        parse_size("1MB") == 10**6
        and parse_size("1MiB") == 2**20
        and parse_size("2KB") == 2000
        and parse_size("1.5TiB") == 3 * 2**39
    )
    for size in (1, 999, 1000, 1024, 123456789, 10**12, 2**33 + 1):
        assert parse_size(format_size(size)) == size


def test_bits_per_weight_count_the_counted_rows():
    problem = Budget.parse("3bpw").on(table(head=True))
    assert problem.limit == 4 * 240 + 2000
    assert problem.items == {"counted rows": 960, "uncounted rows": 2000}
    assert [option.spec for option in problem.table["lm_head"].options] == ["bf16"]
    found = allocate(problem.table, problem.limit)
    assert found.bits_per_weight == 3.0 and found.specs["lm_head"] == "bf16"
    assert not problem.everything_fits and Budget.parse("4bpw").on(table()).everything_fits
    for text, words in (("1.99bpw", "1.99bpw is below the table's range; pass 2bpw to 4bpw"), ("4.01bpw", "4.01bpw is above")):
        with pytest.raises(Infeasible, match=re.escape(words)):
            Budget.parse(text).on(table(head=True))
    with pytest.raises(AllocationError, match="no row of the table counts"):
        Budget.parse("3bpw").on(OptionTable((HEAD,)))


def test_the_ends_that_are_named_are_accepted():
    odd = OptionTable((Row("a", 7001, (Option("int-2", 1777, 2.0), Option("int-4", 3555, 1.0))),))
    with pytest.raises(Infeasible) as error:
        Budget.parse("1bpw").on(odd)
    for end in re.findall(r"[\d.]+bpw", str(error.value))[1:]:
        assert Budget.parse(end).on(odd).limit >= odd.least_bytes
    with pytest.raises(Infeasible) as error:
        Budget.parse("1KB").on(odd, ModelFacts(fixed_bytes=33))
    for end in re.findall(r"[\d.]+KB", str(error.value))[1:]:
        Budget.parse(end).on(odd, ModelFacts(fixed_bytes=33))


def test_byte_budgets_count_the_whole_model():
    problem = Budget.parse("2KB").on(table(head=True))
    assert problem.limit == 1900 and sum(problem.items.values()) == problem.limit and not problem.keeps_original
    assert [option.spec for option in problem.table["lm_head"].options] == ["bf16", "int-8g32", "int-4g32"]
    most = Budget.parse(f"{4 * 320 + 2000 + 100}B").on(table(head=True))
    assert most.everything_fits and not most.keeps_original
    assert Budget.parse(f"{2 * (4 * 640 + 1000) + 100}B").on(table(head=True)).keeps_original
    with pytest.raises(
        Infeasible, match=re.escape("budget 1.3KB is below what this model can be stored in; pass 1.34KB to 3.38KB")
    ):
        Budget.parse("1.3KB").on(table(head=True))


def test_bits_of_the_whole_model_count_all_rows_and_fixed_tensors():
    weights, fixed = 4 * 640 + 1000, ModelFacts(fixed_bytes=100)
    problem = Budget.parse("6bpw:all").on(table(head=True), fixed)
    assert problem.items == {"budget": 6 * (weights + 50) // 8, "norms and other fixed tensors": -100}
    assert problem.limit == sum(problem.items.values()) and not problem.keeps_original
    assert len(problem.table["lm_head"].options) == 3 and str(problem.budget) == "6bpw:all" and problem.budget.counts_all
    assert Budget.parse(" 16 bpw : all").on(table(head=True), fixed).keeps_original
    assert not Budget.parse("6bpw").counts_all and Budget.parse("6MB").counts_all
    for text, side in (("2bpw:all", "below"), ("15.9bpw:all", "above")):
        with pytest.raises(Infeasible, match=f"{text} is {side} the table's range") as refused:
            Budget.parse(text).on(table(head=True), fixed)
        for end in re.findall(r"[\d.]+bpw:all", str(refused.value))[1:]:
            Budget.parse(end).on(table(head=True), fixed)


def test_device_budgets_are_itemised():
    problem = Budget.parse("device:10KB,context=16,batch=2,kv=fp8").on(table())
    cache = 2 * 2 * 2 * 4 * 16 * 2
    assert problem.items == {
        "device": 10_000,
        "norms and other fixed tensors": -100,
        "key-value cache": -cache,
        "working allowance": -1000,
    }
    assert problem.limit == 10_000 - 100 - cache - 1000
    assert Budget.parse("device:10KB,context=16,work=3KB").on(table()).items["working allowance"] == -3000
    with pytest.raises(
        Infeasible, match=re.escape("leaves 0B for the matrices (after norms and other fixed tensors 100B, key-value")
    ):
        Budget.parse("device:10KB,context=200").on(table())
    with pytest.raises(AllocationError, match="needs the model's layers, kv_heads and head_dim"):
        Budget.parse("device:10KB,context=16").on(table(), ModelFacts())
