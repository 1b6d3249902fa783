"""A cluster from what a person gives: a scheduler's address, a file of a scheduler, so many processes here, or a client."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlr_jax.errors import QLRError

if TYPE_CHECKING:
    from qlr_jax.cluster.engine import DaskEngine

ANSWER, PATIENCE = 15.0, 60.0  # seconds for a scheduler to answer, and for its first worker to come


@contextmanager
def connected(cluster: Any, say: Callable[[str], None] = lambda line: None) -> Iterator[DaskEngine]:
    """The engine of a cluster, as long as the context is open; processes that it started here end with it.

    Args:
        cluster: `tcp://scheduler:8786` (or tls://, ucx://), `local:4` for that many processes here, the path of a scheduler file,
            or a `distributed.Client`, which stays open.
        say: is told where its dashboard is, and which workers come and go.

    Raises:
        QLRError: dask is not installed, nothing answers there, no worker comes within a minute, or one has other versions.
    """
    if importlib.util.find_spec("distributed") is None:
        raise QLRError("a cluster needs Dask, which is not installed; run: pip install 'qlr-jax[cluster]'")
    from qlr_jax.cluster.engine import DaskEngine

    with ExitStack() as stack:
        client = _client(cluster, stack)
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except (OSError, TimeoutError):
            raise QLRError(
                f"the scheduler at {cluster} has no worker after {PATIENCE:.0f} s; start one on each machine: dask worker "
                f"{_address(client)} --nthreads 1"
            ) from None
        engine = DaskEngine(client, say)
        say(f"{len(client.scheduler_info(n_workers=-1)['workers'])} workers; dashboard: {client.dashboard_link}")
        yield engine


def _client(cluster: Any, stack: ExitStack) -> Any:
    from distributed import Client, LocalCluster

    if isinstance(cluster, Client):
        return cluster
    text = str(cluster)
    if text.startswith("local:"):
        count = text.removeprefix("local:")
        if not count.isdigit() or int(count) < 1:
            raise QLRError(f"cluster {text!r} has no number of processes; give e.g. local:4")
        own = stack.enter_context(
            LocalCluster(n_workers=int(count), threads_per_worker=1, dashboard_address=":0", host="127.0.0.1", silence_logs=50)
        )
        return stack.enter_context(Client(own))
    if "://" in text:
        address = text
    elif Path(text).is_file():
        address = _address_in(Path(text))
    else:
        raise QLRError(
            f"cluster {text!r} is neither an address (tcp://HOST:PORT), nor local:N, nor a scheduler's file that is there"
        )
    try:
        return stack.enter_context(Client(address, timeout=ANSWER))
    except (OSError, TimeoutError, ValueError) as error:
        raise QLRError(
            f"no scheduler answers at {text} ({type(error).__name__}); start one there with: dask scheduler; and on each machine: "
            f"dask worker {text if '://' in text else 'ADDRESS'} --nthreads 1"
        ) from None


def _address_in(file: Path) -> str:
    """Where a scheduler's file says that it is; a scheduler that just starts has not written all of it yet."""
    until = time.monotonic() + ANSWER
    while True:
        try:
            return str(json.loads(file.read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, KeyError, TypeError):
            if time.monotonic() > until:
                raise QLRError(
                    f"cluster {str(file)!r} is no scheduler's file: it names no address; give the one that dask scheduler "
                    "--scheduler-file FILE writes"
                ) from None
            time.sleep(0.05)


def _address(client: Any) -> str:
    return getattr(client.scheduler, "address", "ADDRESS")
