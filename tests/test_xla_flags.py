"""Check compiler flags: each is tried before it is set, TPU flags by compiling the run's
collectives."""

import dataclasses
import json
import os
import subprocess
from types import SimpleNamespace

import pytest

from mtnlg_jax import compat, xla_flags
from mtnlg_jax.config import MeshConfig
from mtnlg_jax.planning.topology import check_installed, parse

INVENTED = "--xla_gpu_invented_for_a_test=true"
DEAD = "--xla_gpu_lhs_enable_gpu_async_tracker=true"  # recommended once, gone from jaxlib 0.10.2 on
ZERO3 = MeshConfig(pipe=1, data=-1, tensor=4, zero=3)
ALL = MeshConfig(pipe=2, data=-1, context=2, tensor=4, zero=1)
# Formerly set for every TPU, but only v5e's compiler accepts it.
FUSE = "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    for name in ("LIBTPU_INIT_ARGS", "TPU_ACCELERATOR_TYPE", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    for name in xla_flags.ENVIRONMENT["gpu"]:
        monkeypatch.setenv(name, "set by the user")


def of(kind, groups=None, mesh=ZERO3):
    found = xla_flags.groups_of(kind, mesh)[:groups]
    return [flag for group in found for flag in group.flags]


def test_nothing_is_set_on_a_cpu():
    before = dict(os.environ)
    assert xla_flags.kind_here() == "cpu" and xla_flags.set_flags(ALL) == []
    assert dict(os.environ) == before


# --- GPUs: parsed


def test_gpu_flags_are_known_and_an_invented_one_is_rejected(monkeypatch):
    monkeypatch.setattr(xla_flags, "platform_here", lambda: "gpu")
    ours = {**xla_flags.GPU, **xla_flags.GPU_PIPELINE}
    monkeypatch.setattr(xla_flags, "GPU", xla_flags.GPU | {INVENTED: "nobody", DEAD: "nobody"})
    assert xla_flags.set_flags(ALL) == list(ours)
    assert os.environ["XLA_FLAGS"].split() == ["--xla_force_host_platform_device_count=8", *ours]
    assert os.environ["NCCL_NVLS_ENABLE"] == "set by the user"


def test_gathers_are_not_pipelined_if_a_split_layer_is_recomputed(monkeypatch):
    monkeypatch.setattr(xla_flags, "unknown_flags", lambda flags: [])
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    split = MeshConfig(tensor=8)
    whole = MeshConfig(tensor=1)
    assert xla_flags.PIPELINED_GATHER in xla_flags.GPU
    chosen = [
        xla_flags.choose("gpu", mesh, recompute=recompute).flags
        for mesh, recompute in ((split, "full"), (split, "elementwise"), (whole, "full"))
    ]
    assert [xla_flags.PIPELINED_GATHER in flags for flags in chosen] == [False, True, True]
    assert set(chosen[1]) - set(chosen[0]) == {xla_flags.PIPELINED_GATHER}


def test_results_are_cached_and_given_flags_are_kept(monkeypatch):
    monkeypatch.setattr(xla_flags, "platform_here", lambda: "gpu")
    tried = []
    monkeypatch.setattr(
        xla_flags, "_unknown", lambda flags: tried.append(flags) or ([flags[0]], True)
    )
    given = "--xla_gpu_enable_pipelined_all_gather=false"
    monkeypatch.setenv("XLA_FLAGS", given)
    set_once = xla_flags.set_flags(ZERO3)
    first, _, *rest = xla_flags.GPU
    assert set_once == rest and tried == [[first, *rest]]
    assert os.environ["XLA_FLAGS"].split() == [given, *rest]
    monkeypatch.setenv("XLA_FLAGS", given)
    assert xla_flags.set_flags(ZERO3) == rest and len(tried) == 1


def test_a_failed_try_sets_no_flag_and_is_not_cached(monkeypatch):
    monkeypatch.setattr(xla_flags, "_PARSES", "raise SystemExit(1)")
    assert xla_flags.unknown_flags([INVENTED]) == [INVENTED]
    assert not os.path.exists(compat.cache_folder())


# --- which chip


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("v5litepod-16", "v5e"),
        ("v5e-8", "v5e"),
        ("tpu-v5-lite-podslice", "v5e"),
        ("v5p-8", "v5p"),
        ("tpu-v5p-slice", "v5p"),
        ("V6E-256", "v6e"),
        ("tpu-v6e-slice", "v6e"),
        ("v4-8", "v4"),
        ("tpu7x-128", "tpu7x"),
        ("v3-8", None),
        ("", None),
    ],
)
def test_kinds_from_cloud_names(said, kind):
    assert xla_flags.kind_of(said) == kind


def test_the_pci_bus_has_precedence_over_the_environment(monkeypatch):
    monkeypatch.setattr(xla_flags, "platform_here", lambda: "tpu")
    monkeypatch.setattr(compat, "tpu_here", lambda: None)
    assert xla_flags.kind_here() == "tpu"
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    assert xla_flags.kind_here() == "v5e"
    monkeypatch.setattr(compat, "tpu_here", lambda: "v6e")
    assert xla_flags.kind_here() == "v6e"
    monkeypatch.setattr(compat, "tpu_here", lambda: "v2")
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE")
    assert xla_flags.kind_here() == "tpu"
    monkeypatch.undo()
    assert compat.tpu_here() is None  # none of our machines has one


def test_a_chip_of_unknown_kind_gets_no_flag_and_one_line():
    choice = xla_flags.choose("tpu", ZERO3)
    assert choice.flags == () and "set TPU_ACCELERATOR_TYPE, as v5p-8" in choice.left_out


# --- TPUs: compiled


def test_every_flag_has_a_source_and_one_value():
    tables = [
        xla_flags.GPU,
        xla_flags.GPU_PIPELINE,
        *(group.flags for groups in xla_flags.TPU.values() for group in groups),
    ]
    for flags in tables:
        assert all(flag.startswith("--xla_") and "20" in source for flag, source in flags.items())
    for kind, groups in xla_flags.TPU.items():
        names = [flag.partition("=")[0] for group in groups for flag in group.flags]
        assert len(names) == len(set(names))
        assert (FUSE in of(kind)) == (kind == "v5e")


@pytest.mark.parametrize(
    ("mesh", "sent"),
    [
        (MeshConfig(pipe=1, data=1, tensor=1), []),
        (MeshConfig(pipe=1, data=8, tensor=1, zero=0), [("all-reduce", "data")]),
        (
            MeshConfig(pipe=1, data=-1, tensor=1, zero=3),
            [("all-reduce", "data"), ("all-gather", "data"), ("reduce-scatter", "data")],
        ),
        (
            MeshConfig(pipe=4, data=1, tensor=2),
            [
                ("all-gather", "tensor"),
                ("reduce-scatter", "tensor"),
                ("all-reduce", "tensor"),
                ("collective-permute", "pipe"),
            ],
        ),
        (
            MeshConfig(pipe=1, data=1, tensor=2, tp_comm_overlap=True),
            [
                ("all-gather", "tensor"),
                ("reduce-scatter", "tensor"),
                ("all-reduce", "tensor"),
                ("collective-permute", "tensor"),
            ],
        ),
        (
            MeshConfig(pipe=1, data=1, tensor=1, context=2, context_mode="ring"),
            [("collective-permute", "context")],
        ),
        (
            MeshConfig(pipe=1, data=1, tensor=1, context=2, context_mode="ulysses"),
            [("all-to-all", "context")],
        ),
        (
            MeshConfig(pipe=1, data=1, tensor=1, context=2),
            [("all-to-all", "context"), ("all-gather", "context")],
        ),
    ],
)
def test_a_try_has_the_collectives_of_the_run(mesh, sent):
    assert xla_flags.collectives_of(mesh) == sent


def on(monkeypatch, kind, refuses):
    """Return a machine with chips of ``kind`` whose compiler answers as ``refuses`` says, and its
    tries."""
    tried = []

    def answer(request, flags):
        tried.append(request | {"flags": flags.split()})
        return refuses(flags), True

    monkeypatch.setattr(xla_flags, "kind_here", lambda: kind)
    monkeypatch.setattr(xla_flags, "_refusal", answer)
    return tried


def test_a_run_sets_the_flags_of_its_chip_and_keeps_given_ones(monkeypatch):
    tried = on(monkeypatch, "v5p", lambda flags: "")
    given = "--xla_enable_async_all_gather=false --xla_my_own=1"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "4")
    wanted = [flag for flag in of("v5p") if not flag.startswith("--xla_enable_async_all_gather=")]
    assert xla_flags.set_flags(ZERO3) == wanted
    assert os.environ["LIBTPU_INIT_ARGS"].split() == [*given.split(), *wanted]
    # Tried once as they will be set, over slices, with the collectives of the run.
    assert tried == [
        {
            "kind": "v5p",
            "slices": 2,
            "collectives": xla_flags.collectives_of(ZERO3),
            "flags": [*given.split(), *wanted],
        }
    ]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
    assert xla_flags.set_flags(ZERO3) == wanted and len(tried) == 1


def test_gathers_over_planes_are_for_meshes_that_split_rows_alone():
    planes = xla_flags.TPU["v5p"][-1]
    assert planes.unsplit and all("d_all_gather" in flag for flag in planes.flags)
    rows = MeshConfig(data=-1, zero=3)
    assert of("v5p", mesh=rows) == [*of("v5p"), *planes.flags]
    for axis in ("pipe", "expert", "context", "tensor"):
        assert of("v5p", mesh=dataclasses.replace(rows, **{axis: 2})) == of("v5p")


@pytest.mark.parametrize(("bad", "left"), [("offload_reduce_scatter", 1), ("async_all_gather", 0)])
def test_a_rejected_set_is_replaced_by_a_smaller_one(monkeypatch, caplog, bad, left):
    tried = on(
        monkeypatch, "v6e", lambda flags: f"FAILED_PRECONDITION: no {bad}" if bad in flags else ""
    )
    assert xla_flags.set_flags(ZERO3) == of("v6e", left)
    assert len(tried) == len(xla_flags.TPU["v6e"]) - left + (left > 0)
    said = xla_flags.choose("v6e", ZERO3).left_out
    assert said.startswith("the compiler for v6e refuses flags, left out: ") and f"no {bad}" in said
    assert all(
        (group.what in said) == (place >= left) for place, group in enumerate(xla_flags.TPU["v6e"])
    )
    assert "\n" not in said


@pytest.mark.parametrize(
    ("done", "answer", "kept"),
    [
        (SimpleNamespace(returncode=0, stdout='chatter\n{"refused": ""}\n', stderr=""), "", True),
        (
            SimpleNamespace(
                returncode=0, stdout='{"refused": "FAILED_PRECONDITION: no"}', stderr=""
            ),
            "FAILED_PRECONDITION: no",
            True,
        ),
        (
            SimpleNamespace(
                returncode=1,
                stdout="",
                stderr="E0101 Unknown command line flag 'xla_x'\nand more\n",
            ),
            "E0101 Unknown command line flag 'xla_x'",
            True,
        ),
        (SimpleNamespace(returncode=-9, stdout="", stderr=""), "not tried: exit code -9", False),
        (subprocess.TimeoutExpired("x", 1), "not tried: the compiler took more than 600 s", False),
    ],
    ids=["taken", "refused", "unknown", "killed", "slow"],
)
def test_only_certain_results_of_a_try_are_cached(monkeypatch, done, answer, kept):
    asked = []

    def run(command, input, env, **_):
        asked.append((json.loads(input)["kind"], env["LIBTPU_INIT_ARGS"]))
        if isinstance(done, Exception):
            raise done
        return done

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        assert xla_flags.refusal("v5p", ZERO3, 1, ["--xla_a=1"]) == answer
    assert asked == [("v5p", "--xla_a=1")] * (1 if kept else 2)


def needs_libtpu(kind):
    try:
        check_installed(parse(f"{kind}:2x2" if kind in ("v5e", "v6e") else f"{kind}:2x2x1"))
    except ValueError as error:
        pytest.skip(str(error))


# Slow: other chips, other meshes, two slices, every smaller set.
@pytest.mark.parametrize(
    ("kind", "mesh", "slices"),
    [
        *((kind, ZERO3, 1) for kind in ("v5e", "v5p", "v6e")),
        *(
            pytest.param(kind, *rest, marks=pytest.mark.slow)
            for kind in xla_flags.TPU
            for rest in ((ALL, 1), (ZERO3, 2), (MeshConfig(pipe=1, data=-1, tensor=1, zero=3), 1))
        ),
    ],
    ids=str,
)
def test_every_set_compiles_a_zero_3_layer(kind, mesh, slices):
    needs_libtpu(kind)
    assert xla_flags.choose(kind, mesh, slices) == xla_flags.Choice(tuple(of(kind, mesh=mesh)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", xla_flags.TPU)
def test_every_smaller_set_compiles(kind):
    needs_libtpu(kind)
    for groups in range(len(xla_flags.TPU[kind])):
        assert xla_flags.refusal(kind, ZERO3, 1, of(kind, groups)) == ""


def test_a_flag_that_parses_but_fails_to_compile_is_rejected():
    needs_libtpu("v5p")
    assert "not supported" in xla_flags.refusal("v5p", ZERO3, 1, of("v5e"))


def test_an_unknown_tpu_flag_is_rejected():
    needs_libtpu("v5p")
    assert "xla_tpu_invented" in xla_flags.refusal(
        "v5p", ZERO3, 1, ["--xla_tpu_invented_for_a_test=1"]
    )
