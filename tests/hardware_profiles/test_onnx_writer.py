"""Oracle: every layer recomputed by torch's functions in double precision, from definitions written here.

A float model is compared at its logits. A quantized one is compared layer by layer: the integers that
onnxruntime computed are read out, each layer is recomputed from those of its inputs (so that errors do not add
up), and the result may differ by one step where a rounding is nearly a tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from hardware_profiles.machine import int8_weight_limit
from hardware_profiles.onnx_writer import (
    INTEGER_OPERATORS,
    integer_kernels,
    random_ranges,
    random_weights,
    write_onnx,
)
from search_spaces import INT8, KINDS, CompactTransformer, MobileNet, Network
from search_spaces.layers import (
    Layer,
    Port,
    activation,
    add,
    assemble,
    average_pool,
    conv2d,
    global_average_pool,
    layer_norm,
    linear,
    matmul,
    max_pool,
    multiply,
    parameter,
    permute,
    port,
    reshape,
    softmax,
)
from search_spaces.space import SearchSpace

SPACES: dict[str, SearchSpace] = {
    "relu6, same padding": MobileNet(resolutions=(9, 16), depths=(1, 2), kernels=(3, 5), padding="same"),
    "hardswish, squeeze-excite": MobileNet(
        resolutions=(12,), depths=(1, 2), nonlinearity="hardswish", squeeze_excite=(False, True), channels=1
    ),
    "relu, no expansion": MobileNet(resolutions=(8,), depths=(1, 2), expansions=(1, 2), nonlinearity="relu"),
    "transformer": CompactTransformer(resolutions=(8, 16), depths=(1, 2), embeddings=(32, 64), tokenizer_widths=(8,)),
}

ACTIVATIONS = {
    "": lambda x: x,
    "relu": torch.relu,
    "relu6": lambda x: x.clamp(0, 6),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "hardsigmoid": lambda x: (x / 6 + 0.5).clamp(0, 1),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other on networks this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _compute(layer: Layer, inputs: list[torch.Tensor], weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """A layer by definition; inputs and result have the batch first."""
    x = inputs[0] if inputs else torch.empty(0)
    top, left, bottom, right = layer.padding
    if layer.kind == "conv2d":
        padded = F.pad(x, (left, right, top, bottom))
        x = F.conv2d(padded, weights["weight"], weights["bias"], stride=layer.stride, groups=layer.groups)
    elif layer.kind == "linear":
        x = x @ weights["weight"].T + weights["bias"]
    elif layer.kind == "matmul":
        x = (x @ inputs[1]) * dict(layer.attributes)["scale"]
    elif layer.kind == "norm":
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights["scale"] + weights["bias"]
    elif layer.kind == "softmax":
        x = (x - x.amax(-1, keepdim=True)).exp()
        x = x / x.sum(-1, keepdim=True)
    elif layer.kind == "parameter":
        x = weights["value"][None]
    elif layer.kind == "pool" and dict(layer.attributes)["mode"] == "max":
        x = F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-torch.inf), layer.kernel, layer.stride)
    elif layer.kind == "pool" and dict(layer.attributes)["mode"] == "average":
        holes = F.pad(torch.ones_like(x), (left, right, top, bottom))  # a mean is a sum over a count of real pixels
        sums = F.avg_pool2d(F.pad(x, (left, right, top, bottom)), layer.kernel, layer.stride)
        x = sums / F.avg_pool2d(holes, layer.kernel, layer.stride)
    elif layer.kind == "pool":
        x = x.mean((2, 3), keepdim=True)
    elif layer.kind == "add":
        x = x + inputs[1]
    elif layer.kind == "multiply":
        x = x * inputs[1]
    elif layer.kind == "reshape":
        x = x.reshape(-1, *layer.out_shape)
    elif layer.kind == "permute":
        x = x.permute(0, *(axis + 1 for axis in dict(layer.attributes)["order"]))
    else:
        assert layer.kind == "activation", f"the oracle does not know the kind {layer.kind!r}"
    return ACTIVATIONS[layer.activation](x)


def _doubles(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array).double() for name, array in arrays.items()}


def _float_logits(network: Network, weights: dict[str, dict[str, np.ndarray]], images: np.ndarray) -> np.ndarray:
    values = {"input": torch.from_numpy(images).double()}
    for layer in network.layers:
        inputs = [values[name] for name in layer.inputs]
        values[layer.name] = _compute(layer, inputs, _doubles(weights.get(layer.name, {})))
    return values[network.output.name].numpy()


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _images(network: Network, rng: np.random.Generator, batch: int = 3) -> np.ndarray:
    return rng.normal(0, 1.5, (batch, *network.input_shape)).astype(np.float32)


# networks ---------------------------------------------------------------------------------------------------


def _every_kind(*, quantized: bool) -> Network:
    """All kinds in one network, and those that may be quantized without weights on integers if `quantized`."""
    own = {"precision": INT8} if quantized else {}
    stem = conv2d("stem", Port("input", (3, 9, 7)), 8, kernel=3, stride=2, padding="same", activation="relu6", **own)
    pool = max_pool("pool", port(stem), kernel=3, stride=2)
    grouped = conv2d("grouped", port(pool), 8, kernel=3, groups=2, norm=False, **own)
    total = add("add", port(pool), port(grouped))
    smooth = average_pool("smooth", port(total), kernel=3, stride=1)
    mean = global_average_pool("mean", port(smooth))
    gate = conv2d("gate", port(mean), 8, activation="relu", norm=False, **own)
    gated = multiply("multiply", port(total), port(gate))
    count = gated.out_shape[1] * gated.out_shape[2]
    flat = reshape("flat", port(gated), (8, count))
    tokens = permute("tokens", port(flat), (1, 0))
    hidden = linear("hidden", port(tokens), 6, activation="relu", **own)
    positions = parameter("positions", (count, 6))
    placed = add("placed", port(hidden), port(positions))
    norm = layer_norm("norm", port(placed))
    swish = activation("swish", port(norm), "hardswish")
    gelu = activation("gelu", port(swish), "gelu")
    sigmoid = activation("sigmoid", port(gelu), "hardsigmoid")
    clipped = activation("clipped", activation_source := port(sigmoid), "relu6")
    halved = activation("halved", activation_source, "relu")
    turned = permute("turned", port(halved), (1, 0))
    scores = matmul("scores", port(clipped), port(turned), scale=0.3)
    weights = softmax("softmax", port(scores))
    mixed = matmul("mixed", port(weights), port(norm))
    rows = reshape("rows", port(mixed), (count * 6,))
    out = linear("out", port(rows), 5, **own)
    layers = (stem, pool, grouped, total, smooth, mean, gate, gated, flat, tokens, hidden, positions, placed, norm)
    layers += (swish, gelu, sigmoid, clipped, halved, turned, scores, weights, mixed, rows, out)
    return assemble((3, 9, 7), [layers])


def _random_networks(space: SearchSpace, count: int, rng: np.random.Generator) -> list[Network]:
    architectures = [space.sample(rng) for _ in range(count)]
    architectures[0] = space.with_precision(architectures[0], "int8")
    return [space.lower(architecture) for architecture in architectures]


def test_every_kind_is_covered() -> None:
    covered = {layer.kind for layer in _every_kind(quantized=True).layers}
    assert not set(KINDS) - covered, f"kinds without a test (and maybe without an ONNX form): {set(KINDS) - covered}"


# floats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_float_models_compute_what_torch_does(name: str, rng: np.random.Generator) -> None:
    space = SPACES[name]
    for _ in range(4):
        network = space.lower(space.with_precision(space.sample(rng), "fp32"))
        _compare_floats(network, rng)


def test_float_model_of_every_kind(rng: np.random.Generator) -> None:
    _compare_floats(_every_kind(quantized=False), rng)


def _compare_floats(network: Network, rng: np.random.Generator) -> None:
    weights, images = random_weights(network, rng), _images(network, rng)
    model = write_onnx(network, weights)
    onnx.checker.check_model(model, full_check=True)
    logits = _session(model).run(None, {"input": images})[0]
    expected = _float_logits(network, weights, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


# integers ---------------------------------------------------------------------------------------------------


def _parameters(name: str, ranges: dict[str, tuple[float, float]], network: Network) -> tuple[float, int]:
    """Scale and zero point of a tensor by the definition of the contract; rearrangements ask their input."""
    layer = network.by_name.get(name)
    moves = ("reshape", "permute")
    if layer is not None and layer.precision is INT8 and (layer.kind in moves or ("mode", "max") in layer.attributes):
        return _parameters(layer.inputs[0], ranges, network)
    low, high = ranges[name]
    if layer is not None and layer.activation:
        low = 0.0
    if layer is not None and layer.activation == "relu6":
        high = min(high, 6.0)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32((high - low) / 255))
    return scale, int(np.rint(-low / scale))


def _quantized_parameters(
    layer: Layer, arrays: dict[str, np.ndarray], input_scale: float, limit: int
) -> dict[str, torch.Tensor]:
    weight, bias = arrays["weight"].copy(), arrays["bias"].astype(np.float64)
    for channel in range(len(weight)):
        step = np.abs(weight[channel]).max() / np.float32(limit)
        weight[channel] = np.rint(weight[channel] / step) * step
        unit = float(np.float32(input_scale) * step)
        bias[channel] = np.rint(bias[channel] / unit) * unit
    return _doubles({"weight": weight, "bias": bias})


def _compare_integers(network: Network, rng: np.random.Generator) -> None:
    limit = int8_weight_limit()
    weights, images = random_weights(network, rng), _images(network, rng)
    ranges = {name: (low * rng.uniform(0.5, 2), high * rng.uniform(0.5, 2))
              for name, (low, high) in random_ranges(network).items()}  # fmt: skip
    model = write_onnx(network, weights, ranges, weight_limit=limit)
    onnx.checker.check_model(model, full_check=True)
    logits = _session(model).run(None, {"input": images})[0]
    found = _intermediate(model, network, images)
    assert np.abs(found["logits"] - logits).max() <= 0.05 * np.ptp(logits), "reading tensors out changed the model"
    values = {"input": torch.from_numpy(images).double()}
    steps, wrong = 0, 0
    for layer in network.layers:
        is_output = layer is network.output
        inputs = []
        for name in layer.inputs:
            value = values[name]
            if layer.has_weights and layer.precision is INT8 and not _integer(name, network):
                scale, zero = _parameters(name, ranges, network)
                value = ((value / scale).round() + zero).clamp(0, 255).sub(zero) * scale
            inputs.append(value)
        parameters = _doubles(weights.get(layer.name, {}))
        if layer.has_weights and layer.precision is INT8:
            input_scale, _ = _parameters(layer.inputs[0], ranges, network)
            parameters = _quantized_parameters(layer, weights[layer.name], input_scale, limit)
        expected = _compute(layer, inputs, parameters).numpy()
        if layer.precision is INT8 and not is_output:
            scale, zero = _parameters(layer.name, ranges, network)
            integers = found[f"{layer.name}/quantized"].astype(np.int64)
            error = np.abs(integers - np.clip(np.rint(expected / scale) + zero, 0, 255))
            assert error.max() <= 1, f"{layer.name}: off by {error.max()} steps"
            steps, wrong = steps + error.size, wrong + int((error > 0).sum())
            values[layer.name] = torch.from_numpy((integers - zero) * scale).double()
        else:
            floats = found.get("logits" if is_output else f"{layer.name}/output", expected)  # parameters: as given
            np.testing.assert_allclose(
                floats,
                np.broadcast_to(expected, floats.shape),
                rtol=1e-4,
                atol=1e-4 * np.abs(expected).max(),
                err_msg=layer.name,
            )
            values[layer.name] = torch.from_numpy(floats).double()
    assert wrong <= 0.01 * max(steps, 100), f"{wrong} of {steps} integers differ from the exact rounding"


def _integer(name: str, network: Network) -> bool:
    return name != "input" and network.by_name[name].precision is INT8


def _intermediate(model: onnx.ModelProto, network: Network, images: np.ndarray) -> dict[str, np.ndarray]:
    """The integers of every layer that has them, the floats of every other."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    for layer in network.layers[:-1]:
        if layer.kind == "parameter":
            continue
        form, dtype = ("quantized", onnx.TensorProto.UINT8) if layer.precision is INT8 else ("output", 1)
        shown.graph.output.append(onnx.helper.make_tensor_value_info(f"{layer.name}/{form}", dtype, None))
    session = _session(shown)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input": images}), strict=True))


@pytest.mark.parametrize("name", SPACES)
def test_mixed_models_compute_the_integers_of_the_contract(name: str, rng: np.random.Generator) -> None:
    for network in _random_networks(SPACES[name], 3, rng):
        _compare_integers(network, rng)


def test_integer_model_of_every_kind(rng: np.random.Generator) -> None:
    _compare_integers(_every_kind(quantized=True), rng)


@pytest.mark.parametrize("name", SPACES)
def test_every_quantized_layer_is_an_integer_kernel(name: str, rng: np.random.Generator) -> None:
    for network in _random_networks(SPACES[name], 6, rng):
        model = write_onnx(network, random_weights(network, rng), random_ranges(network))
        kernels = integer_kernels(model.SerializeToString(), network)
        assert set(kernels.values()) <= INTEGER_OPERATORS, kernels
        assert {n for n, p in network.precisions.items() if p == "int8"} <= set(kernels)


@pytest.mark.parametrize("name", SPACES)
def test_no_float_layer_is_an_integer_kernel(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """onnxruntime quantizes float convolutions between integer ones by itself if it is let."""
    for network in _random_networks(SPACES[name], 6, rng):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        model = write_onnx(network, random_weights(network, rng), random_ranges(network))
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
        for kind, operator in (("conv2d", "QLinearConv"), ("linear", "QGemm")):
            expected = sum(layer.kind == kind and layer.precision is INT8 for layer in network.layers)
            assert operators.count(operator) == expected


def test_kernels_of_every_kind(tmp_path: Path, rng: np.random.Generator) -> None:
    network = _every_kind(quantized=True)
    path = tmp_path / "model.onnx"
    onnx.save(write_onnx(network, random_weights(network, rng), random_ranges(network)), path)
    assert integer_kernels(path, network) == {
        "stem": "QLinearConv",
        "grouped": "QLinearConv",
        "add": "QLinearAdd",
        "smooth": "QLinearAveragePool",
        "mean": "QLinearGlobalAveragePool",
        "gate": "QLinearConv",
        "multiply": "QLinearMul",
        "hidden": "QGemm",
        "out": "QGemm",
    }


def test_a_layer_that_is_no_integer_kernel_is_found_out(rng: np.random.Generator) -> None:
    conv = conv2d("only", Port("input", (3, 8, 8)), 4, precision=INT8)  # the output stays float: nothing to fuse into
    network = Network((3, 8, 8), (conv,))
    model = write_onnx(network, random_weights(network, rng), random_ranges(network)).SerializeToString()
    assert integer_kernels(model, network) == {"only": "Conv"}
    network = _every_kind(quantized=True)
    floats = _every_kind(quantized=False)
    model = write_onnx(floats, random_weights(floats, rng)).SerializeToString()
    kernels = integer_kernels(model, network)  # a model that is not what the network says
    assert not set(kernels.values()) & INTEGER_OPERATORS


# the file ---------------------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_bytes() -> None:
    def written() -> bytes:
        network = _every_kind(quantized=True)
        weights = random_weights(network, np.random.default_rng(3))
        metadata = {"b": "2", "a": "1"}
        return write_onnx(network, weights, random_ranges(network), metadata=metadata).SerializeToString()

    assert written() == written()


@pytest.mark.parametrize("quantized", [False, True])
def test_the_batch_is_free(quantized: bool, rng: np.random.Generator) -> None:
    network = _every_kind(quantized=quantized)
    session = _session(write_onnx(network, random_weights(network, rng), random_ranges(network)))
    images = _images(network, rng, batch=5)
    together = session.run(["logits"], {"input": images})[0]
    one_by_one = [session.run(["logits"], {"input": image[None]})[0] for image in images]
    np.testing.assert_allclose(together, np.concatenate(one_by_one), rtol=1e-4, atol=1e-5)
    assert session.get_inputs()[0].shape == ["batch", 3, 9, 7]
    assert session.get_outputs()[0].shape == ["batch", 5]


def test_metadata_is_in_the_file(rng: np.random.Generator) -> None:
    network = _every_kind(quantized=False)
    model = write_onnx(network, random_weights(network, rng), metadata={"space": "x"})
    assert {entry.key: entry.value for entry in model.metadata_props} == {"space": "x"}


def test_integer_weights_stay_within_the_limit(rng: np.random.Generator) -> None:
    network = _every_kind(quantized=True)
    model = write_onnx(network, random_weights(network, rng), random_ranges(network), weight_limit=63)
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
    stored = {layer.name: constants[f"{layer.name}/weight"] for layer in network.layers if layer.has_weights}
    assert all(weight.dtype == np.int8 and np.abs(weight).max() == 63 for weight in stored.values())
    assert all(constants[f"{name}/bias"].dtype == np.int32 for name in stored)


def test_missing_and_misshapen_arguments_name_the_layer(rng: np.random.Generator) -> None:
    network = _every_kind(quantized=True)
    weights, ranges = random_weights(network, rng), random_ranges(network)
    with pytest.raises(ValueError, match="no range for the quantized tensor 'input'"):
        write_onnx(network, weights)
    with pytest.raises(ValueError, match="'grouped'"):
        write_onnx(network, weights, {name: r for name, r in ranges.items() if name != "grouped"})
    with pytest.raises(ValueError, match=r"layer 'gate': expected weight of shape .* got nothing"):
        write_onnx(network, {**weights, "gate": {}}, ranges)
    with pytest.raises(ValueError, match="layer 'out': expected bias of shape"):
        write_onnx(network, {**weights, "out": {**weights["out"], "bias": np.zeros(3)}}, ranges)
    with pytest.raises(ValueError, match="layer 'out': the bias of channel 0"):
        huge = {"weight": weights["out"]["weight"] * 1e-9, "bias": np.full(5, 1e9, np.float32)}
        write_onnx(network, {**weights, "out": huge}, ranges)


def test_random_weights_keep_the_variance(rng: np.random.Generator) -> None:
    network = Network((400,), (linear("a", Port("input", (400,)), 300),))
    weights = random_weights(network, rng)["a"]
    assert weights["weight"].dtype == np.float32
    assert weights["weight"].std() == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert random_weights(network, np.random.default_rng(1))["a"]["bias"].std() == pytest.approx(0.1, rel=0.2)


def test_a_fused_activation_of_the_output_is_kept(rng: np.random.Generator) -> None:
    for own in ({}, {"precision": INT8}):
        layer = linear("a", Port("input", (16,)), 8, activation="relu6", **own)
        network = Network((16,), (layer,))
        weights = {"a": {"weight": np.eye(8, 16, dtype=np.float32), "bias": np.zeros(8, np.float32)}}
        model = write_onnx(network, weights, {"input": (-10.0, 10.0)})
        images = np.linspace(-9, 9, 32, dtype=np.float32).reshape(2, 16)
        logits = _session(model).run(None, {"input": images})[0]
        np.testing.assert_allclose(logits, images[:, :8].clip(0, 6), atol=0.05)


def test_a_network_may_end_in_a_rearrangement_of_integers(rng: np.random.Generator) -> None:
    conv = conv2d("a", Port("input", (3, 6, 6)), 4, kernel=3, activation="relu", precision=INT8)
    pool = max_pool("pool", port(conv), kernel=3, stride=2)
    for layers in ((conv, pool), (conv, pool, reshape("flat", port(pool), (36,)))):
        network = assemble((3, 6, 6), [layers])
        assert network.output.precision is INT8
        _compare_integers(network, rng)


def test_patches_leave_the_model_as_it_is(rng: np.random.Generator) -> None:
    """How a device schedules a network is told beside the model."""
    space = MobileNet(patches=(1, 2), precisions=("int8",))
    whole, patched = (space.lower(space.build({"patches": count})) for count in (1, 2))
    assert patched.patch_stage
    weights = random_weights(whole, rng)
    made = [write_onnx(network, weights, random_ranges(network)).graph for network in (whole, patched)]
    assert list(made[0].node) == list(made[1].node) and list(made[0].initializer) == list(made[1].initializer)
