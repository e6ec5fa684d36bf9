"""What every family of spaces must keep; a new one is tested by its line in `FAMILIES`."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from nas import Supernet
from search_spaces import (
    FAMILIES,
    PRECISIONS,
    Architecture,
    CostTable,
    InvalidArchitecture,
    Layer,
    Network,
    Precision,
    SearchSpace,
    build_space,
)
from search_spaces.layers import Shape
from search_spaces.space import Value

# Small instances that show each choice of a family; a family without an entry is tested with its own defaults.
SMALL: dict[str, dict[str, object]] = {
    "mobilenet": {
        "resolutions": [8, 13],
        "widths": [8, 16],
        "width_multipliers": [1, 1.5, 2],
        "depths": [1, 2, 3],
        "kernels": [3, 5],
        "expansions": [1, 2, 4],
        "squeeze_excite": [False, True],
        "nonlinearity": "hardswish",
    },
    "compact_transformer": {
        "resolutions": [8, 13],
        "embeddings": [16, 24],
        "depths": [1, 2, 3],
        "head_size": 8,
        "tokenizer_widths": [12],
    },
}


# Besides: settings that change how a family is put together, and spaces cut from another.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "mobilenet, coupled": ("mobilenet", {"coupled": True}),
    "mobilenet, coupled from expansion 2": ("mobilenet", {"coupled": True, "expansions": [2, 3, 4]}),
    "mobilenet, patches": ("mobilenet", {"squeeze_excite": [False], "patches": [1, 2, 3]}),
    "mobilenet, restricted": (
        "mobilenet",
        {
            "restrict": {
                "resolution": [13],
                "stage1.depth": [1, 3],
                "stage1.block0.expansion": [1],
                "stage2.depth": [1],
                "stage2.block0.squeeze_excite": [True],
                "stage2.block1.squeeze_excite": [True],
            }
        },
    ),
    "compact_transformer, restricted": (
        "compact_transformer",
        {
            "restrict": {
                "embedding": [16],
                "depth": [2],
                "block0.heads": [4],
            }
        },
    ),
}


@pytest.fixture(params=sorted([*FAMILIES, *VARIANTS]), scope="module")
def space(request: pytest.FixtureRequest) -> SearchSpace:
    family, changed = VARIANTS.get(request.param, (request.param, {}))
    return build_space(family, SMALL.get(family, {}) | changed)


def parameter_shapes(network: Network) -> dict[str, Shape]:
    return {
        f"{layer.name}:{name}": shape
        for layer in network.layers
        for name, shape in layer.parameter_shapes.items()
    }  # fmt: skip


def test_slots_read_only_what_they_declare_and_leave_no_choice_unread(
    space: SearchSpace, rng: np.random.Generator
) -> None:
    read = {name for slot in space.slots for name in slot.reads}
    assert read == {choice.name for choice in space.choices}
    for _ in range(100):
        values = space.sample(rng).values
        for slot in space.slots:
            slot.build({name: values[name] for name in slot.reads})  # KeyError where it reads more


def test_slots_change_with_nothing_else(space: SearchSpace, rng: np.random.Generator) -> None:
    for _ in range(100):
        a, b = space.sample(rng).values, space.sample(rng).values
        for slot in space.slots:
            mixed = {**b, **{name: a[name] for name in slot.reads}}
            assert slot.build(mixed) == slot.build(a) == slot.lower(mixed)


def test_costs_are_sums_over_slots(space: SearchSpace, rng: np.random.Generator) -> None:
    """MACs, bytes and layers by precision from tables, for codes of which not all are canonical."""

    def costs(layers: Sequence[Layer], _: Precision) -> tuple[int, int, int]:
        integers = sum(layer.precision.is_quantized for layer in layers)
        return sum(layer.macs for layer in layers), sum(layer.weight_bytes for layer in layers), integers

    codes = np.stack([rng.integers(len(choice.options), size=100) for choice in space.choices], axis=1)
    networks = [space.lower(space.from_codes(row)) for row in codes]
    integers = [sum(layer.precision.is_quantized for layer in network.layers) for network in networks]
    expected = [[n.macs, n.model_bytes, count] for n, count in zip(networks, integers, strict=True)]
    assert CostTable(space, costs, 3, np.int64).costs(codes).tolist() == expected


def test_canonical_codes_of_many_are_those_of_each(space: SearchSpace, rng: np.random.Generator) -> None:
    codes = np.stack([rng.integers(len(choice.options), size=200) for choice in space.choices], axis=1)
    before = codes.copy()
    expected = [space.from_codes(row).codes for row in codes]
    assert list(map(tuple, space.canonical_codes(codes).tolist())) == expected
    np.testing.assert_array_equal(codes, before)
    assert space.canonical_codes(codes[:0]).shape == (0, len(space.choices))


def test_canonical_codes_refuse_what_from_codes_refuses(space: SearchSpace) -> None:
    codes = space.encode([space.smallest, space.largest])
    codes[1, -1] = len(space.choices[-1].options)
    with pytest.raises(InvalidArchitecture, match=space.choices[-1].name):
        space.canonical_codes(codes)
    with pytest.raises(InvalidArchitecture, match="shape"):
        space.canonical_codes(codes[:, 1:])


def test_layer_names_are_unique_and_belong_to_one_slot(space: SearchSpace, rng: np.random.Generator) -> None:
    owner: dict[str, str] = {}
    kind: dict[str, str] = {}
    for _ in range(200):
        values = space.sample(rng).values
        names = [(slot.name, layer) for slot in space.slots for layer in slot.lower(values)]
        assert len({layer.name for _, layer in names}) == len(names)
        for slot_name, layer in names:
            assert owner.setdefault(layer.name, slot_name) == slot_name
            assert kind.setdefault(layer.name, layer.kind) == layer.kind
    assert len({slot.name for slot in space.slots}) == len(space.slots)


def test_occurrences_show_every_parameter_at_its_largest(space: SearchSpace, rng: np.random.Generator) -> None:
    largest: dict[str, Shape] = {}
    for network in space.occurrences():
        for name, shape in parameter_shapes(network).items():
            largest[name] = tuple(map(max, largest.get(name, shape), shape))
    shown = [parameter_shapes(network) for network in space.occurrences()]
    for _ in range(300):
        for name, shape in parameter_shapes(space.lower(space.sample(rng))).items():
            assert all(side <= most for side, most in zip(shape, largest[name], strict=True)), name
    for name, shape in largest.items():
        assert any(found.get(name) == shape for found in shown), f"no single network shows {name} at {shape}"


def test_the_space_of_one_architecture_lowers_to_its_very_layers(space: SearchSpace, rng: np.random.Generator) -> None:
    names = set()
    for _ in range(40):
        architecture = space.sample(rng)
        alone = space.only(architecture)
        assert alone.size == 1 and [*alone.all()] == [alone.smallest] == [alone.largest] == [alone.sample(rng)]
        network = space.lower(architecture)
        assert alone.lower(alone.smallest) == network
        assert [*alone.occurrences()] == [network, network]
        assert alone.smallest.values == {**alone.smallest.values, **space_values(space, architecture)}
        again = build_space(alone.family, json.loads(json.dumps(alone.settings)))
        assert (again.name, again.choices, again.settings) == (alone.name, alone.choices, alone.settings)
        names.add((alone.name, architecture))
    assert len({name for name, _ in names}) == len(names)  # one name, one architecture


def test_the_supernet_of_one_architecture_holds_its_parameters_and_no_more(
    space: SearchSpace, rng: np.random.Generator
) -> None:
    for _ in range(5):
        architecture = space.sample(rng)
        supernet = Supernet(space.only(architecture))
        held = sum(p.numel() for p in supernet.parameters())
        network = space.lower(architecture)
        norms = sum(layer.out_shape[0] for layer in network.layers if layer.norm)
        assert held == network.params + norms  # a folded norm is a bias, an unfolded one a scale and a shift


def space_values(space: SearchSpace, architecture: Architecture) -> dict[str, Value]:
    """The values of the active choices."""
    return {name: value for name, value in architecture.values.items() if space.is_active(name, architecture)}


def test_precision_changes_no_shape_and_no_count(space: SearchSpace, rng: np.random.Generator) -> None:
    for _ in range(30):
        architecture = space.sample(rng)
        network = space.lower(architecture)
        for precision in PRECISIONS:
            other = space.lower(space.with_precision(architecture, precision))
            assert [(a.name, a.inputs, a.in_shapes, a.out_shape) for a in network.layers] == [
                (b.name, b.inputs, b.in_shapes, b.out_shape) for b in other.layers
            ]
            assert (network.macs, network.params) == (other.macs, other.params)


def test_each_layer_with_weights_has_its_own_precision_gene(space: SearchSpace, rng: np.random.Generator) -> None:
    genes = {choice.name for choice in space.choices if choice.role == "precision"}
    for _ in range(50):
        architecture = space.sample(rng)
        expected = {name: architecture[name] for name in genes if space.is_active(name, architecture)}
        network = space.lower(architecture)
        weighted = [layer for layer in network.layers if layer.kind in ("conv2d", "linear")]
        assert {f"{layer.name}.precision": layer.precision.name for layer in weighted} == expected


def test_all_int8_means_int8_weights_only(space: SearchSpace, rng: np.random.Generator) -> None:
    network = space.lower(space.with_precision(space.sample(rng), "int8"))
    assert set(network.precisions.values()) == {"int8"}
    assert all(layer.precision.name == "int8" for layer in network.layers if "weight" in layer.parameter_shapes)
    fp32 = space.lower(space.with_precision(space.sample(rng), "fp32"))
    assert fp32.int8_macs_share == 0 < network.int8_macs_share


def test_smallest_and_largest_bound_the_space(space: SearchSpace, rng: np.random.Generator) -> None:
    small, large = space.lower(space.smallest), space.lower(space.largest)
    for _ in range(300):
        network = space.lower(space.sample(rng))
        assert small.macs <= network.macs <= large.macs
        assert small.params <= network.params <= large.params


@pytest.mark.parametrize("resolution", [8, 9, 15, 32, 47, 64, 99, 224])
@pytest.mark.parametrize(("channels", "classes"), [(1, 2), (2, 10), (4, 100)])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_images_of_any_size_channels_and_classes(family: str, resolution: int, channels: int, classes: int) -> None:
    space = build_space(family, {"resolutions": [resolution], "channels": channels, "classes": classes})
    for architecture in (space.smallest, space.largest):
        network = space.lower(architecture)
        assert network.input_shape == (channels, resolution, resolution)
        assert network.output.out_shape == (classes,)
        assert network.macs > 0 < network.params
