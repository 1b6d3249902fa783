"""Text for many who ask one model: a queue of requests with one worker. Nothing here knows of HTTP."""

from qlr_jax.serving.engine import Engine, Failed, QueueFull, Request, Stopping, Ticket

__all__ = ["Engine", "Failed", "QueueFull", "Request", "Stopping", "Ticket"]
