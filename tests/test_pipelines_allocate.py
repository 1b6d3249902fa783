"""Planning from a saved table: reading, constraints, allocations, the frontier, measured models; and the commands on top."""

import doctest
import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import allocators
from allocators import AllocationError, ModelFacts, Option, OptionTable, Row
from qlr_jax import cli
from qlr_jax.errors import QLRError
from qlr_jax.pipelines import allocate as planning
from qlr_jax.report.terminal.allocations import allocations_text
from qlr_jax.settings.constraints import Constraints

NAMES = tuple(f"model.layers.{layer}.{kind}_proj" for layer in range(2) for kind in ("q", "k", "v", "down"))


def small_table(ranks=(0, 4)):
    rows = []
    for at, name in enumerate(NAMES):
        options = []
        for rank in ranks:
            for bits in (1, 2, 3, 4):
                spec = f"trellis-{bits}" + (f"+r{rank}@trellis-4" if rank else "")
                options.append(Option(spec, 512 * bits + 10 * rank, (1 + at) * 4.0**-bits * (0.7 if rank else 1.0)))
        options.append(Option("int-2", 1024, 9.0))  # dominated
        rows.append(Row(name, 4096, tuple(options)))
    measured = [{"label": "allocated", "kind": "allocated", "bytes": 9216, "bits_per_weight": 2.25, "kl": 1.5}, {"label": "odd"}]
    return OptionTable(tuple(rows), model=ModelFacts(fixed_bytes=1000), notes={"model": "tiny", "measured": measured})


@pytest.fixture
def folder(tmp_path):
    """A folder as qlr sensitivity leaves it."""
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "table.json").write_text(small_table().to_json())
    return tmp_path / "measured"


@pytest.fixture
def compressed(tmp_path):
    """A compressed model's report, of the matrices of the table."""
    points = {
        kind: {"bytes": 9000 + at, "damage": 1.0 + at, "bits_per_weight": 2.2}
        for at, kind in enumerate(allocators.solved_strategies())
    }
    kl = {"allocated": 1.1, "uniform": 2.1, "rank0": 1.2}
    report = {"points": points, "calibration_kl": kl, "kl": {"allocated": 1.3}, "delivered": "allocated"}
    report["matrices"] = [{"name": name} for name in NAMES]
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "report.json").write_text(json.dumps(report))
    return tmp_path / "small"


def qlr(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def told(*args):
    """What a command prints with --json, as strict JSON."""
    result = qlr(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# ---- reading


def test_a_table_is_a_file_or_in_a_folder(folder):
    assert planning.read_table(folder) == planning.read_table(folder / "table.json") == small_table()


def test_tables_that_cannot_be_read(folder, tmp_path):
    with pytest.raises(QLRError, match=r"nowhere does not exist; pass a table\.json or its folder"):
        planning.read_table(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(QLRError, match=r"empty/table\.json does not exist"):
        planning.read_table(tmp_path / "empty")
    data = json.loads((folder / "table.json").read_text()) | {"version": 9}
    (folder / "table.json").write_text(json.dumps(data))
    with pytest.raises(AllocationError, match=r"table\.json: the table has format version 9 and this program reads 1"):
        planning.read_table(folder)
    (folder / "table.json").write_text("[")
    with pytest.raises(AllocationError, match=r"table\.json: this is no option table"):
        planning.read_table(folder)


# ---- constraints


def test_constraints_hold():
    given = Constraints.parse(
        lock=["*0.v_proj=trellis-4"], at_least=["*down_proj = 3"], tie=["*q_proj, *k_proj"], tie_spec=["*1.v_proj,*1.down_proj"]
    )
    table = given.on(small_table())
    specs = planning.plan(table, ["2.5bpw"])[0]["specs"]
    assert specs["model.layers.0.v_proj"] == "trellis-4"
    assert all(table[name].bits(table[name].option(specs[name])) >= 3 for name in NAMES if name.endswith("down_proj"))
    for layer in range(2):
        assert len({allocators.backbone(specs[f"model.layers.{layer}.{kind}_proj"]) for kind in "qk"}) == 1
    assert specs["model.layers.1.v_proj"] == specs["model.layers.1.down_proj"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lock": ["*v_proj"]}, "--lock '*v_proj' is not PATTERN=SPEC; pass for example --lock '*v_proj=trellis-4'"),
        ({"lock": ["=trellis-4"]}, "--lock '=trellis-4' is not PATTERN=SPEC"),
        ({"at_least": ["*v_proj"]}, "--at-least '*v_proj' is not PATTERN=BITS; pass for example --at-least '*down_proj=2.5'"),
        ({"at_least": ["*v_proj=many"]}, "--at-least '*v_proj=many': 'many' is no number of bits"),
        ({"tie": ["*q_proj"]}, "--tie '*q_proj' is not two or more patterns; pass for example --tie '*q_proj,*k_proj'"),
        ({"tie_spec": ["*q_proj,"]}, "--tie-spec '*q_proj,' is not two or more patterns"),
        ({"lock": ["*head=trellis-4"]}, "no row matches '*head'; rows are model.layers.0.q_proj"),
        ({"lock": ["*v_proj=trellis-9"]}, "does not offer trellis-9; it offers trellis-1"),
        ({"at_least": ["*=40"]}, "at least 40 bits for *"),
        ({"at_least": ["*=nan"]}, "pass a positive number of bits"),
        ({"tie": ["*q_proj,*head"]}, "no row matches '*head'"),
    ],
)
def test_constraints_that_cannot_be(given, says):
    with pytest.raises((QLRError, AllocationError)) as error:
        Constraints.parse(**given).on(small_table())
    assert says in str(error.value)


# ---- allocation


def test_plan():
    found = planning.plan(small_table(), ["2.25bpw", "9000B"], seed=1)
    assert [plan["budget"] for plan in found] == ["2.25bpw", "9KB"]
    for plan, limit in zip(found, (9216, 8000), strict=True):
        assert plan["bytes"] <= plan["limit"] == limit and plan["bound"] <= plan["damage"]
        assert set(plan["specs"]) == set(NAMES) and set(plan["baselines"]) == set(allocators.STRATEGIES) - {"allocated"}
        for other in plan["baselines"].values():
            assert other["bytes"] <= plan["limit"] and other["damage"] >= plan["damage"] * (1 - 1e-4)
            assert other["ratio"] == pytest.approx(other["damage"] / plan["damage"])
        assert plan["pruned"]["options"] == 9 * len(NAMES) and plan["pruned"]["dropped"] >= len(NAMES)
    assert found[0]["baselines"]["uniform"]["spec"].startswith("trellis-2")
    assert found[1]["items"] == {"budget": 9000, "norms and other fixed tensors": -1000}
    json.dumps(found, allow_nan=False)


def test_a_lock_is_no_uniform_spec():
    table = small_table().lock("*q_proj", "trellis-4").lock("*down_proj", "trellis-4").lock("*k_proj", "trellis-4")
    assert planning.plan(table, ["3.6bpw"])[0]["baselines"]["uniform"]["spec"].startswith("trellis-2")


def test_text_of_plans():
    text = allocations_text(planning.plan(small_table(), ["2.25bpw", "3bpw"]))
    lines = text.splitlines()
    assert lines[0].split() == ["budget", "bytes", "bits", "a", "weight", "damage", "bound", "gap", "status"]
    assert [line.split()[0] for line in lines[1:3]] == ["2.25bpw", "3bpw"]
    for wanted in ("at 3bpw", "uniform (2+r4)", "rank 0", "greedy", "random", "ranks: ", "did rank pay? ", "options are dominated"):
        assert wanted in text
    assert text.count("did rank pay? yes: predicted damage") == 2  # factors are nearly free here
    assert "did rank pay? it makes no difference (within 1 %)" in allocations_text(
        planning.plan(small_table(ranks=(0,)), ["2.25bpw"])
    )
    assert "not known" in allocations_text(planning.plan(small_table(ranks=(4,)).restrict(lambda row, o: o.rank), ["3bpw"]))
    everything = allocations_text(planning.plan(small_table(), ["1GB"]))
    assert "the budget holds the original as it is" in everything and "limit: 999,999,000 bytes: budget 1,000,000,000" in everything


def test_bad_budgets_name_both_ends(folder):
    for budget, says in (
        ("0.5bpw", "budget 0.5bpw is below the table's range; pass 1bpw to 4.078bpw"),
        ("9bpw", "budget 9bpw is above the table's range; pass 1bpw to 4.078bpw"),
        ("1KB", "budget 1KB is below what this model can be stored in; pass 5.096KB to 17.71KB"),
        ("much", "budget 'much'"),
    ):
        result = qlr("allocate", folder, "--budget", "2bpw", "--budget", budget)
        assert (result.exit_code, result.stdout) == (1, "") and says in result.stderr and len(result.stderr.splitlines()) == 1


def test_allocate_by_another_strategy(folder):
    found = told("allocate", folder, "--budget", "2.25bpw", "--strategy", "uniform")["allocations"][0]
    assert found["strategy"] == "uniform" and len(set(found["specs"].values())) == 1 and "uniform" not in found["baselines"]
    assert found["baselines"]["allocated"]["ratio"] <= 1
    text = qlr("allocate", folder, "--budget", "2.25bpw", "--strategy", "rank0").stdout
    assert "rank 0 " in text and "\nallocated " in text and "did rank pay? yes" in text
    result = qlr("allocate", folder, "--budget", "2.25bpw", "--strategy", "best")
    assert result.exit_code == 1 and "strategy 'best' is not known; there are allocated, uniform, " in result.stderr


def test_allocate_command(folder, tmp_path):
    out = tmp_path / "plans.json"
    result = qlr("allocate", folder, "--budget", "2.25bpw", "--lock", "*v_proj=trellis-4", "--out", out)
    assert result.exit_code == 0 and f"written: {out}" in result.stdout and "at 2.25bpw" in result.stdout
    written = json.loads(out.read_text())
    assert [plan["budget"] for plan in written] == ["2.25bpw"] and written[0]["specs"]["model.layers.1.v_proj"] == "trellis-4"
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["plans.json"]  # nothing temporary is left
    found = told("allocate", folder / "table.json", "--budget", "2.25bpw", "--lock", "*v_proj=trellis-4", "--out", out)
    assert found["allocations"][0]["specs"] == written[0]["specs"] and found["out"] == str(out)
    assert found["table"] == str(folder / "table.json")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "no budget is given; pass --budget"),
        (("--budget", "2bpw", "--lock", "*v_proj"), "--lock '*v_proj' is not PATTERN=SPEC"),
        (("--budget", "2bpw", "--at-least", "head=2"), "no row matches 'head'"),
        (("--budget", "2bpw", "--gap", "2"), "gap is 2.0; pass a relative gap"),
        (("--budget", "2bpw", "--seconds", "0"), "seconds is 0.0; pass a positive time"),
        (("--budget", "2bpw", "--out", "no/such/folder/plans.json"), "plans.json cannot be written: No such file or directory"),
        (("--budget", "2bpw", "--out", "/"), "is a folder; pass the name of a file"),
    ],
)
def test_allocate_refuses(folder, args, says):
    result = qlr("allocate", folder, *args)
    assert result.exit_code == 1 and result.stdout == "" and says in result.stderr
    failed = qlr("allocate", folder, *args, "--json")
    assert says in json.loads(failed.stdout)["error"]


# ---- frontier


def test_curves():
    found = planning.curves(small_table(), 5)
    assert 2 <= len(found["all"]) <= 5 < found["corners"] and found["all_counted"] and found["weights"] == 4096 * len(NAMES)
    sizes, damages = ([corner[key] for corner in found["all"]] for key in ("bytes", "damage"))
    assert sizes == sorted(sizes) and damages == sorted(damages, reverse=True)
    assert found["all"][-1]["price"] is None and found["all"][0]["bits_per_weight"] == 1.0
    assert found["rank0"][-1]["damage"] > damages[-1]
    assert planning.curves(small_table(ranks=(0,)))["rank0"] is None  # it would be the same curve
    assert planning.curves(small_table().lock("*q_proj", "trellis-2+r4@trellis-4"))["rank0"] is None
    with pytest.raises(QLRError, match="points is 1; pass at least 2"):
        planning.curves(small_table(), 1)


def test_measured_points(compressed, tmp_path):
    found = planning.measured_points(small_table(), [compressed])
    assert [point["label"] for point in found] == ["allocated", "allocated (small)", "uniform (small)", "rank0 (small)"]
    assert found[1] | {"kl": 1.1, "held_out_kl": 1.3, "predicted": 1.0, "on": "calibration", "delivered": True} == found[1]
    table = small_table()
    table.notes["measured"].append({"label": "rank0", "kind": "rank0", "bytes": 9002, "kl": 1.2})
    assert len(planning.measured_points(table, [compressed])) == 4  # told of once
    with pytest.raises(QLRError, match=r"nowhere does not exist; pass --with the folder"):
        planning.measured_points(table, [tmp_path / "nowhere"])
    report = json.loads((compressed / "report.json").read_text())
    report["matrices"][0]["name"] = "other.q_proj"
    (compressed / "report.json").write_text(json.dumps(report))
    with pytest.raises(QLRError, match="of other matrices than the table"):
        planning.measured_points(table, [compressed])
    (compressed / "report.json").write_text("{")
    with pytest.raises(QLRError, match="cannot be read"):
        planning.measured_points(table, [compressed])


def test_frontier_command(folder, compressed, tmp_path):
    out = tmp_path / "new" / "pictures"
    result = qlr("frontier", folder, "--with", compressed, "--out", out, "--tie", "*q_proj,*k_proj")
    assert result.exit_code == 0, result.output
    assert (
        "bits a weight" in result.stdout
        and "rank 0 (small)" in result.stdout
        and f"written: {out / 'frontier.svg'}" in result.stdout
    )
    assert sorted(file.name for file in out.iterdir()) == ["frontier.json", "frontier.svg"]
    svg = ElementTree.fromstring((out / "frontier.svg").read_text())
    assert {node.tag.rpartition("}")[2] for node in svg.iter()} >= {"circle", "rect", "polygon", "polyline"}
    found = told("frontier", folder, "--with", compressed, "--tie", "*q_proj,*k_proj", "--points", 7, "--out", out)
    assert len(found["all"]) <= 7 and len(found["measured"]) == 4 and found["files"][0] == str(out / "frontier.json")
    assert json.loads((out / "frontier.json").read_text())["all"] == found["all"]
    taken = qlr("frontier", folder, "--out", folder / "table.json")
    assert taken.exit_code == 1 and "table.json is a file; pass --out a folder" in taken.stderr
    assert "written" not in qlr("frontier", folder).stdout


def test_no_jax_for_plans(folder):
    code = (
        "import sys; from qlr_jax import cli\ntry: cli.main()\nfinally: print([m for m in ('jax', 'jaxlib') if m in sys.modules])"
    )
    for args in (["allocate", str(folder), "--budget", "2.25bpw"], ["frontier", str(folder), "--out", str(folder / "pictures")]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


def test_examples():
    assert doctest.testmod(planning, optionflags=doctest.NORMALIZE_WHITESPACE).attempted >= 6
    assert doctest.testmod(planning, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
