"""What a job is to run on, read from text."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import allocators
from allocators.budget import format_size, parse_size
from qlr_jax.errors import QLRError
from qlr_jax.settings.limits import machine_memory

DEVICE_KINDS = ("cpu", "gpu", "tpu")
EXAMPLE = "'24GiB', 'cpu:24GiB,cores=2' or 'gpu:80GiB,host=512GiB'"


@dataclass(frozen=True)
class Machine:
    """What a job is to run on.

    Attributes:
        kind: cpu, gpu or tpu.
        memory: bytes of one device; of a CPU the machine's own.
        host: bytes of a host's own memory; the same as `memory` of a CPU.
        cores: of a host.
        hosts: machines that share the work, a worker of a Dask cluster each.

    Example:
        >>> Machine.parse("cpu:24GiB,cores=2")
        Machine(kind='cpu', memory=25769803776, host=25769803776, cores=2, hosts=1)
    """

    kind: str
    memory: int
    host: int
    cores: int
    hosts: int = 1

    @classmethod
    def parse(cls, text: str | None = None, hosts: int = 1) -> Machine:
        """A machine from a text.

        Args:
            text: `[cpu:|gpu:|tpu:]SIZE[,cores=N][,host=SIZE]`; this machine where None.
            hosts: such machines that share the job.

        Raises:
            QLRError: a text that is not of that form, naming the part that is wrong.
        """
        if hosts < 1:
            raise QLRError(f"--hosts {hosts} is no number of machines; pass 1 or more")
        own, cores = machine_memory(), os.cpu_count() or 1
        if text is None:
            return cls("cpu", own, own, cores, hosts)
        head, *settings = (part.strip() for part in text.split(","))
        kind, colon, size = head.rpartition(":")
        kind = kind.lower() if colon else "cpu"
        if kind not in DEVICE_KINDS:
            raise QLRError(f"--device {text!r}: {kind!r} is no kind of device; pass {EXAMPLE}")
        given: dict[str, int] = {}
        for setting in settings:
            name, equals, value = (part.strip() for part in setting.partition("="))
            if not equals or name not in ("cores", "host") or name in given:
                raise QLRError(f"--device {text!r}: {setting!r} is not understood; pass {EXAMPLE}")
            if name == "cores" and not re.fullmatch(r"0*[1-9]\d*", value):
                raise QLRError(f"--device {text!r}: cores={value} is no number of cores; pass 1 or more")
            given[name] = int(value) if name == "cores" else _size(text, value)
        if kind == "cpu" and "host" in given:
            raise QLRError(f"--device {text!r}: a CPU's memory is its host's; leave host= out")
        memory = _size(text, size)
        return cls(kind, memory, memory if kind == "cpu" else given.get("host", own), given.get("cores", cores), hosts)

    def __str__(self) -> str:
        host = "" if self.kind == "cpu" else f",host={format_size(self.host)}"
        return f"{self.kind}:{format_size(self.memory)},cores={self.cores}{host}"


def _size(text: str, size: str) -> int:
    try:
        return parse_size(size)
    except allocators.AllocationError as error:
        raise QLRError(f"--device {text!r}: {error}") from None
