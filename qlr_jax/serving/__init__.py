"""An OpenAI-style endpoint for one model: a queue of requests with one worker, and the HTTP application in front of it.

`engine` knows nothing of HTTP. `application` and `server` need starlette and uvicorn (`pip install 'qlr-jax[serve]'`).
"""

from qlr_jax.serving.engine import Engine, Failed, QueueFull, Request, Stopping, Ticket

__all__ = ["Engine", "Failed", "QueueFull", "Request", "Stopping", "Ticket"]
