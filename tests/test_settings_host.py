"""What a job sets in its process: flags of XLA once, those that are set already left alone, and none that XLA may not know."""

import pytest

from qlr_jax.settings import host

BOTH = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=2"


@pytest.mark.parametrize(
    "jaxlib, given, wanted",
    [
        ("0.10.2", None, BOTH),
        ("0.10.2", "--xla_dump_to=x", f"--xla_dump_to=x {BOTH}"),
        ("0.10.2", "--xla_cpu_use_fusion_emitters=true", f"--xla_cpu_use_fusion_emitters=true {BOTH.split()[1]}"),
        ("0.12.0", "--xla_dump_to=x", "--xla_dump_to=x"),
        ("0.12.0", None, None),
    ],
)
def test_flags_are_added_where_xla_knows_them(jaxlib, given, wanted, monkeypatch):
    monkeypatch.setattr(host, "version", lambda package: jaxlib)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if given is not None:
        monkeypatch.setenv("XLA_FLAGS", given)
    for _ in range(2):
        host.quick_compiling()
        assert host.os.environ.get("XLA_FLAGS") == wanted
