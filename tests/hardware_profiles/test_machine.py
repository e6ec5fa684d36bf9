"""Oracles: /proc/cpuinfo texts written by hand, and onnxruntime's own arithmetic on adversarial data."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from hardware_profiles.machine import Machine, int8_weight_limit, this_machine
from hardware_profiles.onnx_writer import random_weights, write_onnx
from search_spaces import INT8, Network
from search_spaces.layers import Port, conv2d, linear, port, reshape

X86 = Machine("cpu", "x86_64", frozenset({"avx2"}), 4, 8, "3.11", "1.32", "2.0")


def test_reads_names_cores_and_flags(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    block = (
        "processor : {}\nmodel name\t: Example 9000 @ 2.0GHz\nphysical id : 0\ncore id\t: {}\nflags : sse2 avx_vnni\n"
    )
    cpuinfo.write_text("\n".join(block.format(i, i // 2) for i in range(4)))
    machine = this_machine(cpuinfo)
    assert machine.cpu == "Example 9000 @ 2.0GHz"
    assert machine.physical_cores == 2  # four processors, two to a core
    assert machine.flags == {"sse2", "avx_vnni"}
    assert machine.has_vnni
    assert machine.onnxruntime == onnxruntime.__version__
    assert machine.numpy == np.__version__
    assert machine.python == platform.python_version()


def test_cores_of_two_sockets_have_the_same_numbers(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    block = "processor : {}\nphysical id : {}\ncore id\t: {}\n"
    cpuinfo.write_text("\n".join(block.format(i, i // 2, i % 2) for i in range(4)))
    assert this_machine(cpuinfo).physical_cores == 4


def test_the_version_of_the_runtime_is_that_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "9.8")  # with onnxruntime-gpu there is no package onnxruntime
    assert this_machine().onnxruntime == "9.8"


def test_reads_arm_and_survives_a_system_without_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nFeatures : fp asimd asimddp\n")
    assert "asimddp" in this_machine(cpuinfo).flags
    machine = this_machine(tmp_path / "absent")
    assert machine.flags == frozenset()
    assert machine.physical_cores == machine.logical_cores == os.cpu_count()
    assert machine.cpu


@pytest.mark.parametrize(
    "machine, limit",
    [
        (X86, 63),
        (replace(X86, architecture="AMD64", flags=frozenset()), 63),
        (replace(X86, flags=frozenset({"avx512f"})), 63),
        (replace(X86, flags=frozenset({"avx512f", "avx512_vnni"})), 127),
        (replace(X86, flags=frozenset({"avx_vnni"})), 127),
        (replace(X86, architecture="aarch64", flags=frozenset()), 127),
        (replace(X86, architecture="arm64", flags=frozenset()), 127),
    ],
)
def test_weight_limit(machine: Machine, limit: int) -> None:
    assert int8_weight_limit(machine) == limit


@pytest.mark.parametrize(
    "machine, block",
    [
        (X86, 8),
        (replace(X86, architecture="AMD64", flags=frozenset({"avx2", "avx512f"})), 16),
        (replace(X86, flags=frozenset()), None),
        (replace(X86, architecture="aarch64", flags=frozenset({"asimd"})), None),
    ],
)
def test_channel_block(machine: Machine, block: int | None) -> None:
    assert machine.channel_block == block


def test_onnxruntime_fills_channels_up_to_the_block_of_this_machine(tmp_path: Path) -> None:
    """Oracle: the weights that onnxruntime itself lays out for its blocked convolution."""
    block = this_machine().channel_block
    if block is None:
        pytest.skip("how many channels this machine computes at once is not known")
    source = Port("input", (36, 4, 4))
    network = Network(source.shape, (conv2d("a", source, 68, kernel=1, norm=False),))
    weights = random_weights(network, np.random.default_rng(0))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the file is for this machine only
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    model = write_onnx(network, weights).SerializeToString()
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    shapes = {tuple(each.dims) for each in onnx.load(tmp_path / "optimized.onnx").graph.initializer}
    assert (-(-68 // block) * block, -(-36 // block) * block, 1, 1) in shapes, shapes


def _sum_of_ones(kind: str, limit: int) -> tuple[float, float]:
    """All inputs and weights one, hence at the end of their integer ranges: (what comes out, what should)."""
    side = 4
    if kind == "linear":
        network = Network((64,), (linear("a", Port("input", (64,)), 32, precision=INT8),))
        expected = 64.0
    else:
        kernel = {"pointwise": 1, "dense": 3}[kind]
        source = Port("input", (64, side, side))
        conv = conv2d("a", source, 32, kernel=kernel, norm=False, precision=INT8)
        expected = 64.0 * kernel**2
        network = Network(source.shape, (conv, reshape("flat", port(conv), (32 * side**2,))))
    shapes = network.by_name["a"].parameter_shapes
    weights = {"a": {"weight": np.ones(shapes["weight"], np.float32), "bias": np.zeros(shapes["bias"], np.float32)}}
    ranges = {"input": (0.0, 1.0), "a": (0.0, expected)}
    model = write_onnx(network, weights, ranges, weight_limit=limit).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return float(session.run(None, {"input": np.ones((1, *network.input_shape), np.float32)})[0].max()), expected


@pytest.mark.parametrize("kind", ["linear", "pointwise", "dense"])
def test_kernels_are_exact_at_the_limit_of_this_machine(kind: str) -> None:
    found, expected = _sum_of_ones(kind, int8_weight_limit())
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(int8_weight_limit() == 127, reason="only x86 without VNNI saturates")
def test_kernels_saturate_beyond_it() -> None:
    found, expected = _sum_of_ones("linear", 127)
    assert found < 0.6 * expected
