"""The command that answers over HTTP: serve."""

from __future__ import annotations

from typing import Annotated

import typer

from qlr_jax.cli.options import AsJson, CompileCache, IgnoreConfig
from qlr_jax.cli.shell import app, computing, show


@app.command(short_help="An OpenAI-style endpoint, and a page to try it.")
def serve(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder of a compressed model, or any model's folder or name.")],
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; any but a loopback address needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="QLR_API_KEY",
            help="What clients have to send; the variable keeps it out of lists of processes.",
        ),
    ] = None,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Requests that may wait beside the one that is answered.")] = 8,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="New tokens a request, at most, and of a chat that does not say.")
    ] = 1024,
    context: Annotated[
        int | None,
        typer.Option("--context", min=2, help="Positions of a prompt and its answer, at most; left out: as many as the model has."),
    ] = None,
    ignore_config: IgnoreConfig = None,
    compile_cache: CompileCache = None,
    as_json: AsJson = False,
) -> None:
    """Serve a compressed model to a browser and to clients of OpenAI's API, on this machine alone, until Ctrl-C.

    POST /v1/completions and /v1/chat/completions (the folder's chat template; streams too), GET /v1/models and /health, and a page
    to try it at /. One request is answered at a time, the others wait, and where too many do, they get status 429. What of the API
    is not supported is refused by name. --json prints the address as an object once requests are answered.

    \b
    Example:
        qlr serve qlr-demo
        QLR_API_KEY=secret qlr serve small --host 0.0.0.0 --port 8080 --context 8192
        python -c "import openai; c = openai.OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='none')
        print(c.completions.create(model='qlr-demo', prompt='import os', max_tokens=64).choices[0].text)"
    """
    with computing(as_json, compile_cache):
        from qlr_jax import progress
        from qlr_jax.pipelines import serve as pipeline
        from qlr_jax.report import serving_text

        pipeline.serve(
            out,
            host=host,
            port=port,
            api_key=api_key,
            queue=queue,
            max_tokens=max_tokens,
            context=context,
            ignore_config=ignore_config or (),
            progress=progress.choose(as_json),
            ready=lambda about: show(about, as_json, serving_text),
        )
        typer.echo("qlr: stopped", err=True)
