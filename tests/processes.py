"""Processes of their own for tests: forked from one that has imported what a job needs, which takes five seconds each time."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["qlr_jax.cli", "qlr_jax.job", "transformers.models.auto.tokenization_auto"])


class Process:
    """A process that runs `code` as a program with these arguments, on so many devices, beside this one.

    Attributes:
        returncode: as that of `subprocess.Popen`, once it has been waited for.
    """

    def __init__(self, code: str, *arguments: Any, devices: int = 1, environment: dict[str, str] | None = None) -> None:
        self.returncode: int | None = None
        self._told = [tempfile.NamedTemporaryFile(prefix="qlr-tests-") for _ in range(2)]  # noqa: SIM115  closed in `communicate`
        given = code, [str(a) for a in arguments], devices, {**os.environ, **(environment or {})}, [f.name for f in self._told]
        self._process = FORKS.Process(target=_run, args=given, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it said on stdout and stderr, once it has ended; it is killed where that takes longer than `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"not ended after {timeout} s; it said: {Path(self._told[1].name).read_text()[-3000:]}")
        self.returncode = self._process.exitcode
        out, err = (Path(f.name).read_text() for f in self._told)
        return out, err

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.returncode = self._process.exitcode


def run(code: str, *arguments: Any, devices: int = 1, environment: dict[str, str] | None = None, timeout: float = 300) -> str:
    """What a program says on stdout; it must end well."""
    process = Process(code, *arguments, devices=devices, environment=environment)
    out, err = process.communicate(timeout)
    assert process.returncode == 0, err[-3000:]
    return out


def _run(code: str, arguments: list[str], devices: int, environment: dict[str, str], told: list[str]) -> None:
    """In the new process: no backend of JAX has started yet."""
    for descriptor, path in enumerate(told, start=1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # a forked process would leave them out
