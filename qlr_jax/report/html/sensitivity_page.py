"""What `qlr sensitivity` found: a page to read, and its drawings as files."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlr_jax.errors import QLRError
from qlr_jax.paths import local
from qlr_jax.report.content.sensitivity import UNIT, how_measured, measured_matrices, probe_cells, share, totals, worst_matrix
from qlr_jax.report.html.drawings.errors import error_bits
from qlr_jax.report.html.drawings.heat import coefficient_map, damage_map
from qlr_jax.report.html.drawings.spectra import spectra
from qlr_jax.report.html.drawings.svg import standalone
from qlr_jax.report.html.elements import document, figure, folded, header, pair, table
from qlr_jax.report.words import MISSING, is_number, model_name, number, rows_of, sentence, shape_of, size

if TYPE_CHECKING:
    from allocators import OptionTable

PAGE = "sensitivity.html"
HEADS = ("matrix", "shape", "damage at probe", "probe", "relative error", "coefficient", "options", "least size", "most size")
NEXT = (
    "<h3>What to do with it</h3><pre>qlr allocate FOLDER --budget 2.25bpw\nqlr frontier FOLDER --out pictures</pre>"
    '<p class="soft">FOLDER is the folder that this page lies in; neither needs the model.</p>'
)


def sensitivity_page(options: OptionTable | Mapping[str, Any], matrix: str | None = None) -> str:
    """One self-contained page of a table's notes: heat maps, spectra, error against bits, all matrices.

    Whatever the notes lack is left out.

    Args:
        options: an OptionTable, or the content of table.json.
        matrix: the one whose error is drawn against bits; that of the largest damage at its probe where not given.

    Raises:
        QLRError: for a matrix that is no row of the table.
    """
    options = _option_table(options)
    name = model_name(options.notes)
    sections = [_header(options, name), _maps(options.notes), _curves(options, matrix), _matrices(options)]
    return document(f"{name}: what every matrix is sensitive to", sections)


def write_pictures(options: OptionTable | Mapping[str, Any], out: str | Path, matrix: str | None = None) -> list[Path]:
    """Write sensitivity.html and every drawing as an SVG file of its own into a folder; what the notes lack is not drawn.

    Args:
        options, matrix: as for `sensitivity_page`.
        out: the folder; it must exist.

    Returns:
        The files, the page first.
    """
    options, out = _option_table(options), local(out)
    drawings = {
        "damage.svg": damage_map(options.notes),
        "coefficient.svg": coefficient_map(options.notes),
        "spectra.svg": spectra(options.notes),
        "error.svg": error_bits(options, _checked(options, matrix)),
    }
    texts = {PAGE: sensitivity_page(options, matrix)}
    texts |= {name: standalone(drawing) for name, drawing in drawings.items() if drawing}
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]


def _option_table(options: OptionTable | Mapping[str, Any]) -> OptionTable:
    if isinstance(options, Mapping):
        from allocators import OptionTable

        return OptionTable.from_json(options)
    return options


def _checked(options: OptionTable, matrix: str | None) -> str | None:
    """The matrix, refused where it is none of the table's."""
    if matrix is None or matrix in options.index:
        return matrix
    example = worst_matrix(options.notes) or options.rows[0].name
    raise QLRError(f"matrix {matrix!r} is not in the table; give a name such as {example}")


def _header(options: OptionTable, name: str) -> str:
    rows = [row for row in measured_matrices(options.notes) if is_number(row["damage"])]
    count = sum(len(row.options) for row in options.rows)
    tiles = [(f"{len(options.rows):,}", f"matrices with {count:,} options; {options.weights():,} weights")]
    if rows:
        worst, total = max(rows, key=lambda row: row["damage"]), sum(row["damage"] for row in rows)
        tiles.append((number(total), f"{UNIT} if every matrix were stored as its probe, one added to the other"))
        tiles.append((share(worst["damage"], total), f"of it is from {worst['name']} alone"))
        if kinds := totals(rows, "kind"):
            kind, part = max(kinds, key=lambda item: item[1])
            tiles.append((share(part, total), f"of it is from all {kind} matrices"))
    text = "How much the error of every matrix matters to what the model says, as qlr-jax measured it."
    return header(name, text, tiles)


def _maps(notes: Mapping[str, Any]) -> str:
    damage = "The part that each matrix has in the KL when it is stored as its probe. Bytes belong where it is large."
    coefficient = "KL for each unit of squared relative error; an option's predicted damage is this times its error squared."
    return pair(
        [
            figure("damage", "Damage at the probe", damage_map(notes), damage),
            figure("coefficient", "Coefficient", coefficient_map(notes), coefficient),
        ]
    )


def _curves(options: OptionTable, matrix: str | None) -> str:
    name = _checked(options, matrix) or worst_matrix(options.notes)
    decay = (
        "How little the leading components leave of a matrix in its metric (lines, a layer each) and of the matrix by itself "
        "(dashed): where a line falls fast, a low rank pays."
    )
    error = (
        f"{name}: the least error at so many bits for every rank, low-rank factors included in the bits. "
        "Marks were solved, all else is predicted."
    )
    drawings = spectra(options.notes), error_bits(options, name)
    return pair(
        [
            figure("spectra", "Decay of the spectra", drawings[0], decay),
            f"<div>{figure('error', 'Error against bits', drawings[1], error)}{_about(options.notes)}</div>",
        ]
    )


def _matrices(options: OptionTable) -> str:
    """Every matrix with its figures, the most sensitive first, folded away until it is asked for."""
    rows = measured_matrices(options.notes)
    if not rows:
        return ""
    rows.sort(key=lambda row: -row["damage"] if is_number(row["damage"]) else 0.0)
    cells = []
    for row in rows:
        offered = options[row["name"]].options if row["name"] in options.index else ()
        sizes = [option.bytes for option in offered]
        figures = [number(row["damage"]), *probe_cells(row), str(len(offered) or MISSING)]
        ends = [size(min(sizes, default=None)), size(max(sizes, default=None))]
        cells.append([escape(cell) for cell in (row["name"], shape_of(row), *figures, *ends)])
    content = folded(f"{len(rows)} matrices, the most sensitive first", table(HEADS, cells))
    return f'<section id="matrices"><h2>All matrices</h2>{content}</section>'


def _about(notes: Mapping[str, Any]) -> str:
    out = [f"<p>{escape(sentence(line))}</p>" for line in how_measured(notes)]
    models = [
        f"{row.get('label') or row.get('kind') or MISSING} {number(row.get('kl'))} at {number(row.get('bits_per_weight'))} bits"
        for row in rows_of(notes, "measured")
    ]
    if models:
        out.append(f"<p>Models measured with this table, KL in nats a token: {escape('; '.join(models))}.</p>")
    if notes.get("command"):
        out.append(f"<h3>Command</h3><pre>{escape(str(notes['command']))}</pre>")
    return f'<section id="about"><h2>How it was measured</h2>{"".join(out)}{NEXT}</section>'
