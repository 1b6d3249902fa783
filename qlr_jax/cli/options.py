"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def given(path: str) -> Path:
    """A path that was typed; an empty one, of a variable that is not set, would be the current folder."""
    if not str(path).strip():
        raise typer.BadParameter("it is empty; pass the name of a folder ('.' for the current one)")
    return Path(path)


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
CompileCache = Annotated[
    str | None,
    typer.Option(
        "--compile-cache",
        metavar="DIR|none",
        help="Keeps compiled programs for the next run, 256 MiB at most; left out: QLR_COMPILE_CACHE, else ~/.cache/qlr-jax.",
    ),
]
Saved = Annotated[
    Path, typer.Argument(parser=given, metavar="TABLE", help="A table.json, or the folder that qlr sensitivity wrote it into.")
]
BudgetText = Annotated[
    str | None,
    typer.Option(
        "--budget", help="2.25bpw (linear layers), 2.5bpw:all (embedding and head too), 900MB or device:8GiB,context=8192."
    ),
]
Calibration = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="Text to calibrate on: file, folder or pattern, FILE.jsonl#FIELD; may repeat, mixed by weights: a.txt:2 b.txt:1.",
    ),
]
Lock = Annotated[
    list[str] | None,
    typer.Option("--lock", metavar="PATTERN=SPEC", help="Such matrices keep this spec, e.g. '*v_proj=trellis-4'; may repeat."),
]
AtLeast = Annotated[
    list[str] | None,
    typer.Option("--at-least", metavar="PATTERN=BITS", help="Such matrices store so many bits per weight or more; may repeat."),
]
TieBackbone = Annotated[
    list[str] | None,
    typer.Option(
        "--tie",
        metavar="PATTERN,PATTERN",
        help="Matrices with the same text for * take the same backbone, e.g. '*q_proj,*k_proj'; may repeat.",
    ),
]
TieSpec = Annotated[
    list[str] | None,
    typer.Option("--tie-spec", metavar="PATTERN,PATTERN", help="As --tie, the whole spec with its rank; may repeat."),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Format to compress for: qlr (packed), compressed-tensors or gguf. Only what it holds is offered, at its bytes.",
    ),
]
HessiansFrom = Annotated[
    Path | None,
    typer.Option("--hessians", metavar="PATH", help="Hessians made elsewhere, a folder or a file of .safetensors or .npz."),
]
HeldOut = Annotated[list[Path] | None, typer.Option("--text", metavar="FILE", help="Held-out text; may repeat.")]
Chat = Annotated[
    bool,
    typer.Option("--chat", help="Apply the tokenizer's chat template: to messages of records, else to paragraphs by turns."),
]
Original = Annotated[
    Path | None,
    typer.Option("--original", metavar="MODEL", help="Folder or GGUF file of the original, to compare with."),
]
IgnoreConfig = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-config",
        metavar="NAME",
        help="Go on without this attribute of the model's config.json, which is not known here; may repeat.",
    ),
]
Windows = Annotated[int | None, typer.Option("--windows", min=1, help="Windows of text to measure, at most.")]
Compressed = Annotated[
    Path, typer.Argument(parser=given, metavar="OUT", help="Folder of a compressed model, made by qlr compress or qlr demo.")
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="YAML of settings; options win over it.")]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="WHERE",
        help="Workers of a Dask cluster that share the work: tcp://SCHEDULER:8786, a scheduler's file, or local:N for N processes.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Accept less calibration text than a matrix has inputs.")]
Include = Annotated[
    list[str] | None, typer.Option("--include", metavar="PATTERN", help="Only such linear layers, e.g. '*.mlp.*'; may repeat.")
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Leave such linear layers as they are; may repeat.")
]
StateBits = Annotated[
    int | None, typer.Option("--state-bits", help="Of trellis codes, 6 to 16: more is better, and time grows with 2^bits.")
]
Controls = Annotated[
    str | None,
    typer.Option(
        "--controls",
        metavar="full|quick|none",
        help="Uniform and rank 0 beside the allocation: full = solved as it is, and the best of them delivered; quick = solved at "
        "8 state bits, for the report alone; none = not solved.",
    ),
]
StrategyName = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        metavar="NAME",
        help="Of allocation, whose result is delivered as it is; left out: the best. A NAME that does not exist lists them all.",
    ),
]
