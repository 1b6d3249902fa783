"""The files that lie beside a model's weights: the record of its job as data, as pages and as a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlr_jax.formats.card import CARD, card_of
from qlr_jax.report.html.page import report_html
from qlr_jax.report.markdown import report_markdown
from qlr_jax.report.record import Record

SNIPPET = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER")

import qlr_jax as qlr  # or in JAX
logits = qlr.load("FOLDER")(tokens)"""


def job_files(record: Record, report: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text of all files of a job beside the weights.

    Args:
        record: of the job.
        report: `record.report()`.
    """
    return {
        "allocation.json": json.dumps(record.allocations(), indent=1) + "\n",
        "recipe.yaml": record.recipe.to_yaml(),
        **report_files(report, record.model),
    }


def report_files(report: Mapping[str, Any], base_model: str | None) -> dict[str, str]:
    """Name -> text of a report as JSON, HTML and Markdown, and of the model card.

    Args:
        report: the content of report.json.
        base_model: what was compressed, as the card names it.
    """
    return {
        "report.json": json.dumps(report, indent=1) + "\n",
        "report.html": report_html(report),
        "report.md": report_markdown(report),
        CARD: card_of(report, base_model, target="qlr", snippet=SNIPPET),
    }
