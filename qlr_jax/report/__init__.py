"""A finished job as a page to read (`report_html`, `report_markdown`), and text for the terminal (the others)."""

from qlr_jax.report.html.page import report_html
from qlr_jax.report.markdown import report_markdown
from qlr_jax.report.terminal.inspection import inspection
from qlr_jax.report.terminal.job import summary
from qlr_jax.report.terminal.serving import serving_text
from qlr_jax.report.terminal.verdicts import adapted_text, evaluation, verdict_text

__all__ = ["adapted_text", "evaluation", "inspection", "report_html", "report_markdown", "serving_text", "summary", "verdict_text"]
