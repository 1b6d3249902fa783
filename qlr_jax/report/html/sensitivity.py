"""What `qlr sensitivity` found: a page to read, pictures as files, text for the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlr_jax.progress import duration
from qlr_jax.report.html.draw import standalone
from qlr_jax.report.html.sensitivity_figures import (
    coefficient_map,
    damage_map,
    error_bits,
    measured_matrices,
    spectra,
    worst_matrix,
)
from qlr_jax.report.html.style import CSS
from qlr_jax.report.terminal.table import columns
from qlr_jax.report.words import MISSING, is_number, kind_order, number, part_of, percent, rows_of, size

if TYPE_CHECKING:
    from allocators import OptionTable

MOST = 8  # matrices that the terminal names
UNIT = "nats of KL a token"
PAGE = "sensitivity.html"


def sensitivity_page(table: OptionTable | Mapping[str, Any], matrix: str | None = None) -> str:
    """One self-contained page of a table's notes: heat maps, spectra, error against bits, all matrices.

    Whatever the notes lack is left out.

    Args:
        table: an OptionTable, or what table.json holds.
        matrix: the one whose error is drawn against bits; that of the largest damage at its probe where not given.

    Raises:
        QLRError: for a matrix that is no row of the table.
    """
    table = _table(table)
    name = _model_name(table.notes)
    body = [_headline(table, name), _maps(table.notes), _curves(table, matrix), _matrices(table)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: what every matrix is sensitive to</title>\n<style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def write_pictures(table: OptionTable | Mapping[str, Any], out: str | Path, matrix: str | None = None) -> list[Path]:
    """Write sensitivity.html and every drawing as an SVG file of its own into a folder; what the notes lack is not drawn.

    Args:
        table, matrix: see `sensitivity_page`.
        out: the folder; it must exist.

    Returns:
        The files, the page first.
    """
    table, out = _table(table), Path(out)
    drawings = {
        "damage.svg": damage_map(table.notes),
        "coefficient.svg": coefficient_map(table.notes),
        "spectra.svg": spectra(table.notes),
        "error.svg": error_bits(table, _checked(table, matrix)),
    }
    texts = {PAGE: sensitivity_page(table, matrix)}
    texts |= {name: standalone(drawing) for name, drawing in drawings.items() if drawing}
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]


def sensitivity_text(result: Mapping[str, Any]) -> str:
    """The most sensitive matrices, totals by kind and by layer, how it was measured and how long that took.

    Args:
        result: of `job.sensitivity`: out, table, matrices, options, seconds, notes; whatever is missing is left out.
    """
    notes = part_of(result, "notes")
    rows = [row for row in measured_matrices(notes) if is_number(row["damage"])]
    counts = [f"{result[key]:,} {key}" for key in ("matrices", "options") if is_number(result.get(key))]
    lines = [f"{_model_name(notes)}: {', '.join(counts)}" if counts else _model_name(notes)]
    if rows:
        total = sum(row["damage"] for row in rows)
        lines += ["", f"damage of every matrix at its probe, {notes.get('unit') or UNIT}; all together {number(total)}"]
        worst = sorted(rows, key=lambda row: -row["damage"])[:MOST]
        cells = [[row["name"], number(row["damage"]), _share(row["damage"], total), *_probe_cells(row)] for row in worst]
        lines += [columns(["most sensitive", "damage", "share", "probe", "error", "coefficient"], cells), ""]
        for title, key in (("kind", "kind"), ("layer", "layer")):
            lines.append(f"by {title}: " + ", ".join(f"{name} {_share(part, total)}" for name, part in _totals(rows, key)))
    lines += ["", *_how(notes, result.get("seconds"))]
    lines += [f"{key}: {result[key]}" for key in ("table", "out") if result.get(key)]
    return "\n".join(lines).strip()


def _table(table: OptionTable | Mapping[str, Any]) -> OptionTable:
    if isinstance(table, Mapping):
        from allocators import OptionTable

        return OptionTable.from_json(table)
    return table


def _checked(table: OptionTable, matrix: str | None) -> str | None:
    """The matrix, refused where it is none of the table's."""
    if matrix is None or matrix in table.index:
        return matrix
    from qlr_jax.errors import QLRError

    raise QLRError(f"matrix {matrix!r} is not in the table; give a name such as {worst_matrix(table.notes) or table.rows[0].name}")


def _model_name(notes: Mapping[str, Any]) -> str:
    name = str(notes.get("model") or "Llama model").rstrip("/")
    return name.rpartition("/")[2] if name.startswith("/") else name  # of a folder, its own name


def _totals(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, float]]:
    """Summed damage by kind, in the order of a layer, or by layer, in the order of the model."""
    found: dict[Any, float] = defaultdict(float)
    for row in rows:
        if row.get(key) is not None:
            found[row[key]] += row["damage"]
    order = kind_order(found) if key == "kind" else sorted(found)
    return [(str(name), found[name]) for name in order]


def _share(part: float, total: float) -> str:
    return percent(part / total) if total > 0 else MISSING


def _probe_cells(row: Mapping[str, Any]) -> list[str]:
    probe = part_of(row, "probe")
    return [str(probe.get("spec") or MISSING), number(probe.get("error")), number(row.get("coefficient"))]


def _how(notes: Mapping[str, Any], seconds: Any = None) -> list[str]:
    """How it was measured, how well the predictions held, how long it took: a line each."""
    lines = [f"attribution: {notes['attribution']}"] if notes.get("attribution") else []
    quality = part_of(notes, "prediction")
    if is_number(quality.get("median")):
        spread = f", 10th to 90th percentile {number(quality.get('p10'))} to {number(quality.get('p90'))}"
        many = f", {quality['count']} solves" if is_number(quality.get("count")) else ""
        lines.append(f"solved error over predicted: median {number(quality['median'])}{spread}{many}")
    stages = {name: value for name, value in part_of(notes, "seconds").items() if is_number(value) and name != "total"}
    total = seconds if is_number(seconds) else part_of(notes, "seconds").get("total", sum(stages.values()) if stages else None)
    if is_number(total):
        spent = "; ".join(f"{name} {duration(value)}" for name, value in stages.items())
        lines.append(f"time: {duration(total)}" + (f" ({spent})" if spent else ""))
    return lines


# ---- the page's sections


def _headline(table: OptionTable, name: str) -> str:
    rows = [row for row in measured_matrices(table.notes) if is_number(row["damage"])]
    options = sum(len(row.options) for row in table.rows)
    tiles = [(f"{len(table.rows):,}", f"matrices with {options:,} options; {table.weights():,} weights")]
    if rows:
        worst, total = max(rows, key=lambda row: row["damage"]), sum(row["damage"] for row in rows)
        tiles.append((number(total), f"{UNIT} if every matrix were stored as its probe, one added to the other"))
        tiles.append((_share(worst["damage"], total), f"of it is from {worst['name']} alone"))
        if kinds := _totals(rows, "kind"):
            kind, part = max(kinds, key=lambda item: item[1])
            tiles.append((_share(part, total), f"of it is from all {kind} matrices"))
    cells = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(says)}</span></div>' for value, says in tiles)
    return (
        f'<header><h1>{escape(name)}</h1><p class="soft">How much the error of every matrix matters to what the model says, '
        f'as qlr-jax measured it.</p></header><div class="tiles">{cells}</div>'
    )


def _figure(anchor: str, title: str, drawing: str, says: str) -> str:
    if not drawing:
        return ""
    caption = f"<figcaption>{escape(says)}</figcaption>"
    return f'<section id="{anchor}"><h2>{escape(title)}</h2><figure>{drawing}{caption}</figure></section>'


def _pair(parts: Sequence[str]) -> str:
    """Two columns of sections where there is room, one below the other elsewhere."""
    found = [part for part in parts if part]
    return f'<div class="pair">{"".join(found)}</div>' if len(found) == 2 else "".join(found)


def _maps(notes: Mapping[str, Any]) -> str:
    damage = "The part that each matrix has in the KL when it is stored as its probe. Bytes belong where it is large."
    coefficient = "KL for each unit of squared relative error; an option's predicted damage is this times its error squared."
    return _pair(
        [
            _figure("damage", "Damage at the probe", damage_map(notes), damage),
            _figure("coefficient", "Coefficient", coefficient_map(notes), coefficient),
        ]
    )


def _curves(table: OptionTable, matrix: str | None) -> str:
    name = _checked(table, matrix) or worst_matrix(table.notes)
    decay = (
        "How little the leading components leave of a matrix as the data feel it (lines, a layer each) and of the matrix by itself "
        "(dashed): where a line falls fast, a low rank pays."
    )
    error = (
        f"{name}: the least error at so many bits for every rank, low-rank factors included in the bits. "
        "Marks were solved, all else is predicted."
    )
    drawings = spectra(table.notes), error_bits(table, name)
    return _pair(
        [
            _figure("spectra", "Decay of the spectra", drawings[0], decay),
            f"<div>{_figure('error', 'Error against bits', drawings[1], error)}{_about(table.notes)}</div>",
        ]
    )


def _matrices(table: OptionTable) -> str:
    """Every matrix with its figures, the most sensitive first, folded away until it is asked for."""
    rows = measured_matrices(table.notes)
    if not rows:
        return ""
    rows.sort(key=lambda row: -row["damage"] if is_number(row["damage"]) else 0.0)
    header = ("matrix", "shape", "damage at probe", "probe", "relative error", "coefficient", "options", "least size", "most size")
    body = []
    for row in rows:
        options = table[row["name"]].options if row["name"] in table.index else ()
        sizes = [option.bytes for option in options]
        shape = row.get("shape")
        cells = [
            row["name"],
            " × ".join(str(side) for side in shape) if isinstance(shape, list | tuple) else MISSING,
            number(row["damage"]),
            *_probe_cells(row),
            str(len(options) or MISSING),
            size(min(sizes, default=None)),
            size(max(sizes, default=None)),
        ]
        body.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{text}</th>" for text in header)
    return (
        f'<section id="matrices"><h2>All matrices</h2><details><summary>{len(rows)} matrices, the most sensitive first</summary>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div></details></section>'
    )


def _about(notes: Mapping[str, Any]) -> str:
    out = [f"<p>{escape(line[:1].upper() + line[1:])}.</p>" for line in _how(notes)]
    if measured := rows_of(notes, "measured"):
        told = [
            f"{row.get('label') or row.get('kind') or MISSING} {number(row.get('kl'))} at {number(row.get('bits_per_weight'))} bits"
            for row in measured
        ]
        out.append(f"<p>Models measured with this table, KL in nats a token: {escape('; '.join(told))}.</p>")
    if notes.get("command"):
        out.append(f"<h3>Command</h3><pre>{escape(str(notes['command']))}</pre>")
    out.append(
        "<h3>What to do with it</h3><pre>qlr allocate FOLDER --budget 2.25bpw\nqlr frontier FOLDER --out pictures</pre>"
        '<p class="soft">FOLDER is the folder that this page lies in; neither needs the model.</p>'
    )
    return f'<section id="about"><h2>How it was measured</h2>{"".join(out)}</section>'
