"""The compiler's flags: each is tried before it is set."""

import os

import pytest

from mtnlg_jax import xla_flags

INVENTED = "--xla_gpu_invented_for_a_test=true"
DEAD = "--xla_gpu_lhs_enable_gpu_async_tracker=true"  # recommended once, gone from jaxlib 0.10.2 on


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    for name in xla_flags.ENVIRONMENT["gpu"]:
        monkeypatch.setenv(name, "set by the user")


def test_nothing_is_set_on_a_cpu():
    before = dict(os.environ)
    assert xla_flags.platform_here() == "cpu" and xla_flags.set_flags(pipelined=True) == []
    assert dict(os.environ) == before


def test_gpu_flags_are_known_and_an_invented_one_is_found_out(monkeypatch):
    monkeypatch.setattr(xla_flags, "platform_here", lambda: "gpu")
    ours = {**xla_flags.FLAGS["gpu"], **xla_flags.PIPELINE_FLAGS["gpu"]}
    monkeypatch.setitem(xla_flags.FLAGS, "gpu", xla_flags.FLAGS["gpu"] | {INVENTED: "nobody", DEAD: "nobody"})
    assert xla_flags.set_flags(pipelined=True) == list(ours)
    assert os.environ["XLA_FLAGS"].split() == ["--xla_force_host_platform_device_count=8", *ours]
    assert os.environ["NCCL_NVLS_ENABLE"] == "set by the user"


def test_what_is_known_is_remembered_and_what_is_given_stays(monkeypatch):
    monkeypatch.setattr(xla_flags, "platform_here", lambda: "gpu")
    tried = []
    monkeypatch.setattr(xla_flags, "_try", lambda platform, flags: tried.append(flags) or [flags[0]])
    given = "--xla_gpu_enable_pipelined_all_gather=false"
    monkeypatch.setenv("XLA_FLAGS", given)
    set_once = xla_flags.set_flags(pipelined=False)
    first, _, *rest = xla_flags.FLAGS["gpu"]
    assert set_once == rest and tried == [[first, *rest]]
    assert os.environ["XLA_FLAGS"].split() == [given, *rest]
    monkeypatch.setenv("XLA_FLAGS", given)
    assert xla_flags.set_flags(pipelined=False) == rest and len(tried) == 1


def test_a_probe_that_fails_for_another_reason_sets_no_flag(monkeypatch):
    monkeypatch.setitem(xla_flags._PROGRAM, "gpu", "raise SystemExit(1)")
    assert xla_flags.unknown_flags("gpu", [INVENTED]) == [INVENTED]


def test_every_flag_has_a_source():
    for flags in (*xla_flags.FLAGS.values(), *xla_flags.PIPELINE_FLAGS.values()):
        assert all(flag.startswith("--xla_") and "20" in source for flag, source in flags.items())


def test_tpu_flags_are_known(monkeypatch):
    pytest.importorskip("libtpu")
    assert xla_flags.unknown_flags("tpu", [*xla_flags.FLAGS["tpu"], "--xla_tpu_invented_for_a_test=1"]) == [
        "--xla_tpu_invented_for_a_test=1"]
