"""A finished job as a page to read (`report_html`), and text for the terminal (`summary`, `evaluation`, `inspection`)."""

from qlr_jax.report.html import report_html
from qlr_jax.report.table import evaluation, inspection, summary

__all__ = ["evaluation", "inspection", "report_html", "summary"]
