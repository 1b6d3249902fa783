"""A finished job as a page to read (`report_html`), and text for the terminal (`summary`, `evaluation`, `inspection`)."""

from qlr_jax.report.html import report_html
from qlr_jax.report.table import inspection, summary
from qlr_jax.report.verdicts import adapted_text, evaluation, verdict_text

__all__ = ["adapted_text", "evaluation", "inspection", "report_html", "summary", "verdict_text"]
