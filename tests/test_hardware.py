"""Check the hardware table, FLOP counts beside published tables, and what JAX logs of cards."""

import logging

import jax
import pytest

from mtnlg_jax import compat
from mtnlg_jax.config import ModelConfig
from mtnlg_jax.hardware import CHIPS, flops_per_token, layer_flops, parse_chips, watts_of
from mtnlg_jax.train import metrics
from mtnlg_jax.train.metrics import peak_flops

SEQUENCE = 2048
A100 = CHIPS["A100-80"].flops


def gpt(layers, width, heads):
    return ModelConfig(
        num_layers=layers, hidden_size=width, num_attention_heads=heads, vocab_size=51200
    )


MTNLG = gpt(105, 20480, 128)


# Smith 2022: 1,920 sequences a step on A100s. TFLOP/s include the recomputed forward pass, MFU does
# not.
@pytest.mark.parametrize(
    ("devices", "seconds", "teraflops", "mfu"),
    [(2240, 60.1, 125.7, 30.2), (2800, 50.2, 120.4, 29.0), (3360, 44.4, 113.5, 27.3)],
)
def test_throughput_of_the_paper(devices, seconds, teraflops, mfu):
    tokens = 1920 * SEQUENCE
    model = flops_per_token(MTNLG, SEQUENCE)
    done = model + MTNLG.num_layers * sum(layer_flops(MTNLG, SEQUENCE).values())
    assert round(tokens * done / seconds / devices / 1e12, 1) == teraflops
    assert round(100 * tokens * model / seconds / devices / A100, 1) == pytest.approx(mfu, abs=0.05)


# Korthikanti 2022, tables 3 and 5: with selective recomputation and sequence parallelism.
@pytest.mark.parametrize(
    ("model", "devices", "batch", "seconds", "mfu"),
    [
        (gpt(48, 6144, 64), 8, 4, 1.10, 41.5),
        (gpt(96, 12288, 96), 64, 64, 13.75, 51.4),
        (MTNLG, 280, 280, 37.83, 56.0),
        (gpt(128, 25600, 160), 512, 512, 71.49, 56.3),
        (MTNLG, 2240, 2240, 39.15, 54.2),
    ],
)
def test_utilization_equals_korthikanti(model, devices, batch, seconds, mfu):
    flops = batch * SEQUENCE * flops_per_token(model, SEQUENCE)
    # The 22B's 1.10 s has three digits only.
    assert 100 * flops / seconds / devices / A100 == pytest.approx(
        mfu, abs=0.2 if seconds < 2 else 0.06
    )


def test_flops_of_a_layer_equal_narayanan():
    h = 20480
    s = SEQUENCE
    assert sum(layer_flops(MTNLG, s).values()) == pytest.approx(
        24 * h * h * (1 + s / (6 * h)), rel=1e-12
    )


def test_key_heads_and_gates_change_the_flops_of_a_layer():
    plain = layer_flops(ModelConfig(hidden_size=64, num_attention_heads=4), 32)
    other = layer_flops(
        ModelConfig(hidden_size=64, num_attention_heads=4, num_query_groups=1, activation="swiglu"),
        32,
    )
    assert other["qkv"] == plain["qkv"] / 2 and other["fc1"] == 2 * plain["fc1"]
    assert all(other[name] == plain[name] for name in ("scores", "out", "fc2"))


@pytest.mark.parametrize(
    ("text", "chips"), [("H100:1024", ("H100", 1024)), ("tpu7X:1", ("TPU7x", 1))]
)
def test_chip_names_are_read(text, chips):
    assert parse_chips(text) == chips


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("B100:8", "unknown chip 'B100'; choose one of A100-80, H100, .*, TPU7x$"),
        ("", "unknown chip ''"),
        ("H100", "write it as --chips=H100:1024$"),
        ("h100:0", "--chips=H100:1024$"),
        ("H100:-8", "needs a number"),
        ("H100:²", "needs a number"),
        ("H100:9999999", "a number of chips from 1 to 1048576"),
    ],
)
def test_unknown_chips_raise_an_error(text, words):
    with pytest.raises(ValueError, match=words):
        parse_chips(text)


@pytest.mark.parametrize(
    ("kind", "watts"),
    [
        ("NVIDIA A100-SXM4-80GB", 400),
        ("NVIDIA A100 80GB PCIe", 300),
        ("NVIDIA H100 80GB HBM3", 700),
        ("NVIDIA H100 PCIe", 350),
        ("TPU v4", 192),
        ("TPU v5 lite", None),
        ("TPU v6 lite", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_the_power_of_a_device_has_a_source_or_is_unknown(kind, watts):
    found = watts_of(kind)
    assert (found is None) == (watts is None)
    if found:
        assert found[0] == watts and found[1]


def running(monkeypatch, kind, platform="gpu", count=4):
    class Device:
        device_kind = kind

    Device.platform = platform
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(jax, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "TPU7x"),
    ],
)
def test_a_device_finds_its_row(kind, chip, monkeypatch):
    running(monkeypatch, kind)
    assert peak_flops() == 4 * CHIPS[chip].flops


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_each_kind_of_gpu_has_its_own_speed(kind, teraflops, monkeypatch):
    running(monkeypatch, kind, count=8)
    assert peak_flops() == pytest.approx(8 * teraflops * 1e12)


@pytest.mark.parametrize(
    "kind",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA B200 MIG 1g.23gb",
        "Tesla V100-SXM2-16GB",
        "Tesla T4",
        "TPU v3",
        "TPU v4 lite",
        "NVIDIA H300",
        "cpu",
    ],
)
def test_an_unknown_device_has_no_flops_unless_given(kind, monkeypatch):
    running(monkeypatch, kind, count=8)
    assert peak_flops() is None
    assert peak_flops(362e12) == 8 * 362e12  # train.device_flops


def test_devices_of_a_cpu_share_its_cores_and_hosts_do_not(monkeypatch):
    running(monkeypatch, "cpu", "cpu", count=8)
    monkeypatch.setattr(metrics, "_timed_flops", lambda: 1e11)
    assert peak_flops() == 1e11
    monkeypatch.setattr(metrics, "_hosts", lambda: 2)
    assert peak_flops() == 2e11


def test_a_cuda_plugin_without_a_card_is_not_told(monkeypatch, caplog, tmp_path):
    compat.quiet()
    logger = logging.getLogger("jax._src.xla_bridge")
    logger.propagate = True
    told = "Jax plugin configuration error: Exception when calling jax_plugins.xla_cuda12"
    monkeypatch.setattr(compat, "_NVIDIA", tmp_path / "none")
    logger.error(told)
    assert not caplog.records
    logger.error("Jax plugin configuration error: Exception when calling libtpu")
    monkeypatch.setattr(compat, "_NVIDIA", tmp_path)
    logger.error(told)
    assert len(caplog.records) == 2
