"""The section on why bits and rank went where they went: how sensitive and how low-rank the matrices are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlr_jax.report.content.allocation import spectra_line
from qlr_jax.report.html.drawings.heat import sensitivity_map
from qlr_jax.report.html.drawings.spectra import leading_shares
from qlr_jax.report.html.elements import figure, pair


def why_section(report: Mapping[str, Any]) -> str:
    """Sensitivity and decay side by side where there is room; empty where neither is known."""
    sensitive = "The KL for each unit of squared relative error: where it is large, an error costs most, so bits belong there."
    low = (
        f"{spectra_line(report)} Where a line rises at once, a few components make up the matrix and rank is cheap; "
        "a line that rises slowly leaves L R little to take."
    )
    return pair(
        [
            figure("sensitivity", "Why: how sensitive every matrix is", sensitivity_map(report), sensitive),
            figure("spectra", "Why: how low-rank the matrices are", leading_shares(report), low),
        ]
    )
