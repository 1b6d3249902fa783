"""A model's files, read from the job's own process by workers that do not see its folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlr_jax.errors import QLRError

CHUNK = 2**26  # bytes that travel at once
SENT = (".json", ".safetensors", ".gguf", ".model", ".txt", ".jinja")  # of a model's folder


@dataclass(frozen=True)
class Offer:
    """Files that a process hands out.

    Attributes:
        address: where it listens.
        sizes: name -> bytes.
        single: the one of them that is the model by itself (a GGUF file); empty where the folder is.
    """

    address: str
    sizes: Mapping[str, int]
    single: str = ""

    def fetch(self) -> Path:
        """The files, on this worker's disk: each is fetched once, piece by piece.

        Raises:
            QLRError: the process that has them does not answer.
        """
        from distributed import get_worker

        worker: Any = get_worker()
        name = hashlib.sha256(repr((self.address, sorted(self.sizes.items()))).encode()).hexdigest()[:12]
        folder = Path(worker.local_directory) / f"model-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        for file, size in self.sizes.items():
            path = folder / file
            if not path.is_file() or path.stat().st_size != size:
                self._copy(worker, file, size, path)
        return folder / self.single if self.single else folder

    def _copy(self, worker: Any, file: str, size: int, path: Path) -> None:
        from distributed.utils import sync

        temporary = path.with_name(path.name + ".part")
        try:
            with temporary.open("wb") as out:
                for start in range(0, size, CHUNK):
                    out.write(sync(worker.loop, self._read, worker, file, start))
        except (OSError, TimeoutError) as error:
            raise QLRError(
                f"the job's own process at {self.address} does not answer a worker that asks for {file} ({error}); let workers "
                "connect to it, or give a model that all of them see"
            ) from None
        temporary.replace(path)

    async def _read(self, worker: Any, file: str, start: int) -> bytes:
        remote = worker.rpc(self.address)
        try:
            return await remote.read(file=file, start=start)
        finally:
            await remote.close_rpc()


def offer(client: Any, place: Path) -> Offer:
    """Hand out the files of a model as long as the client is open.

    Args:
        client: of the cluster; workers reach this process where the scheduler sees it.
        place: a folder, or a GGUF file.
    """
    from distributed.comm.addressing import get_address_host
    from distributed.core import Server

    paths = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.is_file() and p.suffix in SENT)
    known = {path.name: path for path in paths}

    def read(file: str, start: int) -> bytes:
        with known[file].open("rb") as source:
            source.seek(start)
            return source.read(CHUNK)

    async def listen() -> str:
        server = Server({"read": read}, connection_args=client.security.get_connection_args("client"))
        host = get_address_host(client.scheduler_comm.comm.local_address)
        await server.listen(
            f"{client.scheduler.address.partition('://')[0]}://{host}:0", **client.security.get_listen_args("client")
        )
        client.__dict__.setdefault("_qlr_files", []).append(server)  # as long as it is there
        return server.address

    address = client.sync(listen)
    return Offer(address, {name: path.stat().st_size for name, path in known.items()}, place.name if place.is_file() else "")
