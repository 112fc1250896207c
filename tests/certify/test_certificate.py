"""Check certificates: a sound config is within all tolerances, and a planted wrong spec is told by
the name of its tensor."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from jax.sharding import PartitionSpec as P

from mtnlg_jax.certify import figures, report
from mtnlg_jax.certify.certificate import Certificate, Maker, certify
from mtnlg_jax.certify.compute import Computation, objectives_of, plain
from mtnlg_jax.certify.culprit import odd_specs
from mtnlg_jax.certify.figures import STRICT, Figure, tensor_differences, types_of
from mtnlg_jax.certify.inputs import open_data, write_data
from mtnlg_jax.certify.shrink import small_copy
from mtnlg_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
    from_json,
)
from mtnlg_jax.parallel import collectives
from mtnlg_jax.parallel import mesh as plan
from mtnlg_jax.parallel.mesh import parameter_name
from mtnlg_jax.train import averages, gradients, step

# Without biases, which take a third longer to compile.
MODEL = ModelConfig(
    num_layers=8, hidden_size=512, num_attention_heads=8, vocab_size=1024, add_bias=False
)
LLAMA = dataclasses.replace(
    MODEL,
    position_embedding_type="rotary",
    normalization="rmsnorm",
    activation="swiglu",
    tie_embeddings=False,
)


def config_of(dtype="float32", model=MODEL, **mesh):
    return Config(
        name="tested",
        model=model,
        mesh=MeshConfig(**mesh),
        train=TrainConfig(
            steps=100,
            global_batch_size=64,
            micro_batch_size=1,
            compute_dtype=dtype,
        ),
    )


@pytest.fixture(scope="module")
def sound():
    """Return the certificate of a config whose mesh has a pipeline, replicas and tensor shards."""
    config = config_of(model=LLAMA, pipe=4, data=8, tensor=4, schedule="1f1b")
    train = dataclasses.replace(config.train, ema_decay=0.999)
    return certify(dataclasses.replace(config, train=train))


def test_a_sound_config_is_within_all_tolerances(sound):
    assert sound.within, report.render(sound)
    assert sound.copy.meshes[0]["pipe"] == sound.copy.meshes[0]["tensor"] == 2
    found = {}
    for figure in sound.figures:
        found.setdefault(figure.check, []).append(figure)
    assert set(found) == {
        *(figures.PLAN, figures.LOSS, figures.GRADIENT, figures.RESTORED, figures.NEXT),
        *(figures.NORMS, figures.MOMENTS, figures.EXCHANGE),
        *(figures.UPDATE, figures.PARAMETERS, figures.AVERAGES),
    }
    # Rounding on a mesh is not that of one device: figures of 0 alone would compare nothing.
    largest = max(figure.difference for figure in found[figures.GRADIENT])
    assert 1e-8 < largest < found[figures.GRADIENT][0].tolerance
    names = {figure.name for figure in found[figures.GRADIENT]}
    assert {"blocks.attention.w_q_DNH", "blocks.mlp.w_out_FD", "tokens_VD"} <= names
    assert len({figure.mesh for figure in found[figures.RESTORED]}) == 2
    assert {figure.mesh for figure in found[figures.EXCHANGE]} == {"llama"}


def test_the_table_and_the_json_tell_the_same(sound):
    told = json.loads(json.dumps(report.to_json(sound), allow_nan=False))
    keys = (
        "kind step commit versions created command config settings within suspects seconds "
        "processor_seconds devices meshes pairs moved_to shrunk tolerances left_out figures"
    ).split()
    assert list(told) == keys and told["kind"] == "certificate" and told["within"] is True
    assert set(told["figures"][0]) == {
        *("check", "name", "mesh", "objective", "types"),
        *("difference", "tolerance", "within", "problem"),
    }
    assert from_json(json.dumps(told["settings"])) == sound.config
    assert all(each["why"] for each in told["tolerances"])
    limits = {(each["check"], each["tolerance"]) for each in told["tolerances"]}
    assert {(each["check"], each["tolerance"]) for each in told["figures"]} <= limits
    table = report.render(sound)
    assert "pipe 4 x data 8 x tensor 4 -> pipe 2 x data 2 x tensor 2" in table
    assert "WITHIN all tolerances" in table and max(map(len, table.splitlines())) < 130
    for figure in sound.figures:
        if figure.check == figures.GRADIENT:
            assert f"  {figure.name} " in table


def test_every_objective_is_compared(tmp_path):
    config = config_of(tensor=4, data=4, zero=3)
    stages = (
        StageConfig("masked", masked=1.0),
        StageConfig("taught", distill="RUN", distill_temperature=2.0),
    )
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, stages=stages))
    found = examined(tmp_path, config)
    assert found.within, report.render(found)
    told = [figure.objective for figure in found.figures if figure.check == figures.LOSS]
    assert told == ["masked", "causal, distilled at temperature 2, weight 0.5"]


# --- planted faults


def examined(tmp_path, config):
    """Return the certificate of loss and gradients alone."""
    copy = small_copy(config, 4, write_data(tmp_path, 0))
    maker = Maker(copy, str(tmp_path), lambda text: None)
    maker.gradients()
    return Certificate(
        *(config, 4, copy, maker.figures, maker.tolerances),
        *(maker.left_out, maker.suspects, 1.0, 1.0),
    )


def test_a_gradient_summed_over_the_wrong_axis_is_named(tmp_path, monkeypatch):
    real = gradients.reduce_gradients

    def planted(grads, *args, **options):
        on_mesh = "tensor" in jax.sharding.get_abstract_mesh().manual_axes

        def one(path, leaf):
            if parameter_name(path) != "w_in_DF" or not on_mesh:
                return leaf
            # The parts of F that tensor splits are added up, as if all devices had the same.
            return jax.lax.pcast(jax.lax.psum(leaf, "tensor"), "tensor", to="varying")

        return jax.tree_util.tree_map_with_path(one, real(grads, *args, **options))

    monkeypatch.setattr(gradients, "reduce_gradients", planted)
    found = examined(tmp_path, config_of(tensor=4, data=4, zero=0))
    named = {figure.name for figure in found.outside()}
    assert named == {"blocks.mlp.w_in_DF"}, report.render(found)
    assert (
        "OUTSIDE" in report.render(found) and "w_in_DF" in report.render(found).split("OUTSIDE")[1]
    )


def test_an_update_and_an_average_that_are_wrong_on_a_mesh_are_named(tmp_path, monkeypatch):
    make = step.make_update
    updated = averages.updated

    def without_decay(config, mesh, total):
        if mesh.size > 1:
            optimizer = dataclasses.replace(config.optimizer, weight_decay=0.0)
            config = dataclasses.replace(config, optimizer=optimizer)
        return make(config, mesh, total)

    def doubled(config, state, trained):
        found = updated(config, state, trained)
        return jax.tree.map(lambda x: 2 * x, found) if config.mesh.data > 1 else found

    config = config_of(data=4)
    train = dataclasses.replace(config.train, ema_decay=0.999)
    # Low enough that two steps show nothing of it.
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-5)
    config = dataclasses.replace(config, train=train, optimizer=optimizer)
    maker = Maker(small_copy(config, 4, write_data(tmp_path, 0)), str(tmp_path), lambda text: None)
    maker.gradients()
    monkeypatch.setattr(step, "make_update", without_decay)
    monkeypatch.setattr(averages, "updated", doubled)
    maker.updates()
    named = {}
    for figure in maker.figures:
        if not figure.within:
            named.setdefault(figure.check, set()).add(figure.name)
    all_of_them = {each.name for each in maker.figures if each.check == figures.AVERAGES}
    decayed = {name for name in all_of_them if "scale" not in name and "bias" not in name}
    assert named == {
        figures.UPDATE: decayed,
        figures.PARAMETERS: decayed,
        figures.AVERAGES: all_of_them,
    }
    assert {"tokens_VD", "blocks.mlp.w_in_DF"} <= decayed < all_of_them


def test_units_that_are_not_finite_are_within_no_tolerance(tmp_path):
    config = config_of(data=4)
    optimizer = OptimizerConfig(name="adamw", dp_noise_multiplier=1.0)
    train = dataclasses.replace(config.train, micro_batch_size=None)
    config = dataclasses.replace(config, optimizer=optimizer, train=train)
    copy = small_copy(config, 4, write_data(tmp_path, 0))
    maker = Maker(copy, str(tmp_path), lambda text: None)
    (objective,) = objectives_of(copy.config)
    alone = Computation(plain(copy.config), objective, open_data(copy.config), None)
    assert math.isfinite(alone(maker._params)[0].loss)
    broken = alone(jax.tree.map(lambda x: np.full_like(x, np.nan), maker._params))[0]
    assert math.isnan(broken.loss)  # and so is its difference to any other


def plant_a_wrong_spec(monkeypatch):
    real = plan.spec_of

    def planted(dims, zero=1, whole=""):
        # Each device along tensor holds a part of the positions and takes it for all of them.
        return P("tensor", None) if dims == "PD" else real(dims, zero, whole)

    for module in (plan, collectives):
        monkeypatch.setattr(module, "spec_of", planted)


def test_a_wrong_spec_is_named_although_every_gradient_differs(tmp_path, monkeypatch):
    plant_a_wrong_spec(monkeypatch)
    found = examined(tmp_path, config_of(tensor=4, data=4, zero=0))
    wrong = found.outside()
    assert sum(figure.check == figures.GRADIENT for figure in wrong) > 3
    assert found.suspects == ["positions_PD"]
    assert odd_specs(found.copy.config) == {"positions_PD": "its dim P is split over tensor"}
    assert "look at positions_PD" in report.render(found)


def test_a_spec_that_no_program_can_run_is_named(monkeypatch):
    real = plan.spec_of
    config = small_copy(config_of(tensor=4, data=4, zero=0), 4).config
    assert odd_specs(config) == {}
    monkeypatch.setattr(
        plan,
        "spec_of",
        lambda dims, *rest: P("pipe", None, None) if dims == "LFD" else real(dims, *rest),
    )
    (name, problem), *others = odd_specs(config).items()
    assert name == "blocks.mlp.w_out_FD" and "its dim F is not split" in problem and not others


def test_the_command_exits_with_1_and_tells_the_tensor(
    proving, sound, tmp_path, monkeypatch, capsys
):
    wrong = Figure(figures.GRADIENT, "tokens_VD", "data 8", "causal", "float32", 0.5, 2e-6)
    bad = dataclasses.replace(sound, figures=[*sound.figures, wrong])
    monkeypatch.setattr("mtnlg_jax.certify.certificate.certify", lambda *args: bad)
    flags.FLAGS.unparse_flags()
    with flagsaver.flagsaver():
        flags.FLAGS(["prove", "--config=a.py", f"--output={tmp_path / 'a.json'}"])
        assert proving.perform(config_of()) == 1
        monkeypatch.setattr("mtnlg_jax.certify.certificate.certify", lambda *args: sound)
        assert proving.perform(config_of()) == 0
    assert "gradient tokens_VD (causal, float32, data 8): 5.0e-01 is above 2.0e-06" in (
        capsys.readouterr().out
    )
    assert json.loads((tmp_path / "a.json").read_text())["within"] is True


@pytest.mark.slow
def test_the_command_names_a_planted_spec(proving, tmp_path, monkeypatch, capsys):
    plant_a_wrong_spec(monkeypatch)
    flags.FLAGS.unparse_flags()
    output = tmp_path / "a.json"
    with flagsaver.flagsaver():
        flags.FLAGS(["prove", "--config=a.py", "--devices=4", "--noprogress", f"--output={output}"])
        assert proving.perform(config_of(tensor=4, data=4, zero=0)) == 1
    assert "look at positions_PD: its part of the plan is wrong" in capsys.readouterr().out
    told = json.loads(output.read_text())
    assert told["within"] is False and told["suspects"] == ["positions_PD"]


# --- figures


def test_differences_are_relative_to_each_tensor_but_for_those_that_are_0():
    wanted = {"large": np.array([100.0, -50.0]), "small": np.array([2.0]), "none": np.array([1e-9])}
    got = {"large": np.array([100.0, -51.0]), "small": np.array([2.5]), "none": np.array([3e-9])}
    found = tensor_differences(got, wanted, STRICT)
    assert found["large"] == pytest.approx(0.01) and found["small"] == pytest.approx(0.25)
    assert found["none"] == pytest.approx(2e-9)
    (broken,) = tensor_differences(
        {"a": np.array([np.nan])}, {"a": np.array([1.0])}, STRICT
    ).values()
    assert math.isnan(broken)
    assert not Figure(figures.GRADIENT, "a", "", "", "", broken, 1.0).within


def test_tolerances_follow_the_types():
    config = small_copy(config_of("bfloat16", data=8), 8).config
    strict, own = types_of(config)
    assert strict == STRICT and own.compute == "bfloat16"
    assert types_of(config_of()) == [STRICT]
    limit = {
        (check, types.name): figures.tolerance_of(check, types, config, 8)
        for check in (figures.LOSS, figures.GRADIENT, figures.RESTORED)
        for types in (strict, own)
    }
    assert limit[figures.GRADIENT, "float32"].value == 2e-6
    layers = config.model.num_layers
    assert limit[figures.GRADIENT, "bfloat16"].value == 3 * 2**-9 * math.sqrt(16 * layers)
    assert limit[figures.RESTORED, "bfloat16"].value == 0
    # Of experts some tokens visit others, which no tolerance of a rounding covers.
    moe = dataclasses.replace(config.model, moe=MoEConfig(4, 2))
    chosen = figures.tolerance_of(
        figures.GRADIENT, own, dataclasses.replace(config, model=moe), devices=8
    )
    assert chosen.value == limit[figures.GRADIENT, "bfloat16"].value + 0.1
    assert "visits another expert" in chosen.why
    # Of an expert with few tokens, two are more.
    few = dataclasses.replace(config.model, moe=MoEConfig(64, 1))
    few = dataclasses.replace(config, model=few)
    tokens = config.train.global_batch_size * config.sequence_length / 64
    assert 4 < tokens < 20
    told = figures.tolerance_of(figures.GRADIENT, own, few, devices=8)
    assert told.value == limit[figures.GRADIENT, "bfloat16"].value + 2 / tokens
    assert f"2 of the {tokens:g} of an expert" in told.why
    assert figures.tolerance_of(figures.LOADS, own, few, 8).value == 2 / tokens
    # Where only sums are bfloat16 none does, until these sums have changed the parameters.
    sums = figures.Types("sums", "float32", "bfloat16")
    of_experts = dataclasses.replace(config, model=moe)
    for check, more in ((figures.GRADIENT, 0.0), (figures.NORMS, 0.1)):
        alone = figures.tolerance_of(check, sums, config, devices=8).value
        assert figures.tolerance_of(check, sums, of_experts, 8).value == alone + more
    assert figures.tolerance_of(figures.LOADS, sums, of_experts, 8).value == 0
    assert figures.tolerance_of(figures.LOADS, own, of_experts, 8).value == 0.05
    # Moments in fewer bits are rounded at random, by one neighbor each step.
    rounded = dataclasses.replace(config.optimizer, moments_dtype="bfloat16")
    told = figures.tolerance_of(
        figures.MOMENTS, strict, dataclasses.replace(config, optimizer=rounded), devices=8
    )
    assert told.value == pytest.approx(1e-5 + 2**-6) and "moments_dtype" in told.why
    assert figures.differing_bits(np.float32([0.0]), np.float32([-0.0])) > 0
