"""What every space gets for free, checked against enumeration, networks and hand-written codes."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Iterator

import numpy as np
import pytest

from search_spaces import (
    Architecture,
    Choice,
    CompactTransformer,
    InvalidArchitecture,
    MobileNet,
    Network,
    SearchSpace,
    Slot,
    build_space,
)
from search_spaces import layers as L
from search_spaces.layers import INPUT, Port
from search_spaces.space import Values, size_text

MOBILENET = MobileNet(
    resolutions=(8, 12), widths=(8, 16), width_multipliers=(1, 2), depths=(1, 2), kernels=(3, 5), expansions=(1, 2),
    squeeze_excite=(False, True),
)  # fmt: skip
TRANSFORMER = CompactTransformer(resolutions=(8, 12), embeddings=(16, 24), depths=(1, 2, 3), heads=(1, 2), head_size=8)
SPACES = pytest.mark.parametrize("space", [MOBILENET, TRANSFORMER], ids=lambda space: space.family)


def toy(*choices: Choice) -> SearchSpace:
    """A space whose only layer is a parameter of one number; for what concerns choices alone."""
    return SearchSpace("toy", {}, choices, [Slot("p", (), lambda values: (L.parameter("p", (1,)),))], lambda _: (1,), 2)


def choice(name: str, options: int, *active_if: tuple[str, tuple[int, ...]]) -> Choice:
    return Choice(name, tuple(range(options)), "operator", active_if)


# enumeration: every code vector, kept where each choice whose conditions fail is at its first option


def every_code(space: SearchSpace) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(len(c.options)) for c in space.choices))


def enumerated(space: SearchSpace) -> set[tuple[int, ...]]:
    kept = set()
    for codes in every_code(space):
        active: dict[str, bool] = {}
        picked = {c.name: c.options[code] for c, code in zip(space.choices, codes, strict=True)}
        for c in space.choices:
            active[c.name] = all(active[parent] and picked[parent] in options for parent, options in c.active_if)
        if all(code == 0 or active[c.name] for c, code in zip(space.choices, codes, strict=True)):
            kept.add(codes)
    return kept


@pytest.mark.parametrize(
    "space",
    [
        MobileNet(resolutions=(8, 16), widths=(8,), width_multipliers=(1, 2), depths=(1, 2), kernels=(3, 5),
                  expansions=(1, 2), squeeze_excite=(False, True), precisions=("fp32",)),
        MobileNet(resolutions=(8,), widths=(8,), width_multipliers=(1,), depths=(1, 2), kernels=(3,),
                  expansions=(1, 2)),
        MobileNet(resolutions=(8,), widths=(8,), width_multipliers=(1,), depths=(1,), kernels=(3,), expansions=(1, 2),
                  squeeze_excite=(False, True)),
        CompactTransformer(embeddings=(8, 16), depths=(1, 3), heads=(1, 2), mlp_ratios=(1, 2), precisions=("fp32",)),
        CompactTransformer(embeddings=(8,), depths=(1,), heads=(1,), mlp_ratios=(1, 2)),
        CompactTransformer(embeddings=(8,), depths=(2, 3), heads=(1, 2), mlp_ratios=(1,), precisions=("int8",)),
    ],
    ids=lambda space: space.name,
)  # fmt: skip
def test_size_and_canonical_forms_are_those_of_enumeration(space: SearchSpace) -> None:
    expected = enumerated(space)
    assert space.size == len(expected)
    assert {space.from_codes(codes).codes for codes in every_code(space)} == expected


def test_size_and_canonical_forms_of_random_dependencies(rng: np.random.Generator) -> None:
    for _ in range(150):
        space = random_space(rng)
        assert space.size == len(enumerated(space)), space.choices
        assert {space.from_codes(codes).codes for codes in every_code(space)} == enumerated(space)


def test_size_of_the_default_mobilenet_by_hand() -> None:
    blocks = 2 * 2 * 2**3  # kernels, expansions, three precisions
    stage = blocks + blocks**2 + blocks**3  # one, two or three blocks
    widths = 2 * (2 * 2 * 3 * 3) * 3  # stem; 16, 24, 40 and 80 channels times 0.5, 0.75 and 1, rounded to 8s; head
    assert MobileNet().size == widths * stage**4 * 2**3  # precisions of stem, head and classifier


# canonical form


def fingerprint(network: Network) -> tuple[object, ...]:
    return (network.input_shape, network.layers)


@SPACES
def test_equal_exactly_when_the_layers_are(space: SearchSpace, rng: np.random.Generator) -> None:
    by_codes: dict[tuple[int, ...], int] = {}
    by_layers: dict[tuple[object, ...], tuple[int, ...]] = {}
    architecture = space.sample(rng)
    for _ in range(2_000):
        architecture = space.mutate(architecture, rng)
        layers = fingerprint(space.lower(architecture))
        assert by_layers.setdefault(layers, architecture.codes) == architecture.codes
        assert by_codes.setdefault(architecture.codes, hash(layers)) == hash(layers)
    assert len(by_codes) == len(by_layers) > 1_000


@SPACES
def test_a_choice_is_active_exactly_when_it_changes_the_network(space: SearchSpace, rng: np.random.Generator) -> None:
    for _ in range(15):
        architecture = space.sample(rng)
        layers = fingerprint(space.lower(architecture))
        for i, c in enumerate(space.choices):
            codes = list(architecture.codes)
            codes[i] = (codes[i] + 1) % len(c.options)
            other = space.from_codes(codes)
            assert space.is_active(c.name, architecture) == (fingerprint(space.lower(other)) != layers)
            if not space.is_active(c.name, architecture):
                assert architecture.codes[i] == 0 and other == architecture and architecture[c.name] == c.options[0]


def test_children_of_inactive_choices_are_inactive() -> None:
    space = toy(choice("a", 2), choice("b", 2, ("a", (1,))), choice("c", 3, ("b", (0,))))
    assert space.from_codes([0, 1, 2]).codes == space.from_codes([0, 0, 2]).codes == (0, 0, 0)
    assert space.from_codes([1, 0, 2]).codes == (1, 0, 2)
    assert space.from_codes([1, 1, 2]).codes == (1, 1, 0)


# text and codes


@SPACES
def test_text_and_codes_read_back(space: SearchSpace, rng: np.random.Generator) -> None:
    architectures = [space.smallest, space.largest, *(space.sample(rng) for _ in range(200))]
    for architecture in architectures:
        assert space.parse(str(architecture)) == architecture
        assert space.build(architecture.values) == architecture
        assert len(architecture.id) == 10 and int(architecture.id, 16) >= 0
    codes = space.encode(architectures)
    assert codes.dtype == np.int64 and codes.shape == (202, len(space.choices))
    assert [space.from_codes(row) for row in codes] == architectures
    assert len({a.id for a in architectures}) == len(set(architectures))


def test_text_by_hand() -> None:
    space = TRANSFORMER
    assert str(space.smallest) == "resolution=8" and space.parse("") == space.smallest
    architecture = space.parse(" depth=2 , block1.heads=2,block1.mlp.expand.precision=int8, ")
    assert str(architecture) == "resolution=8,depth=2,block1.heads=2,block1.mlp.expand.precision=int8"
    assert (architecture["depth"], architecture["block1.heads"], architecture["block0.heads"]) == (2, 2, 1)
    assert space.parse("block2.heads=2") == space.smallest  # inactive at depth 1
    excited = str(MOBILENET.parse("stage1.block0.squeeze_excite=True"))
    assert excited == f"resolution={MOBILENET.smallest['resolution']},stage1.block0.squeeze_excite=True"


def test_one_hot_by_hand() -> None:
    space = toy(choice("a", 2), choice("b", 3, ("a", (1,))))
    architectures = [space.from_codes([0, 0]), space.from_codes([1, 2])]
    assert space.one_hot(architectures).tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 1]]
    assert space.one_hot([]).shape == (0, 5)
    assert space.encode([]).shape == (0, 2)


# drawing and moving


@SPACES
def test_drawn_and_moved_architectures_are_canonical(space: SearchSpace, rng: np.random.Generator) -> None:
    a, b = space.sample(rng), space.sample(rng)
    for _ in range(300):
        mutant = space.mutate(a, rng)
        child = space.crossover(a, b, rng)
        assert mutant != a
        for architecture in (mutant, child):
            assert space.from_codes(architecture.codes) == architecture
        for i, code in enumerate(child.codes):
            assert code in (a.codes[i], b.codes[i], 0)
        a, b = mutant, child if child != mutant else space.sample(rng)


@SPACES
def test_neighbours_are_all_single_changes(space: SearchSpace, rng: np.random.Generator) -> None:
    architecture = space.sample(rng)
    found = list(space.neighbours(architecture))
    expected = sum(len(c.options) - 1 for c in space.choices if space.is_active(c.name, architecture))
    assert len(found) == len(set(found)) == expected
    assert architecture not in found
    for neighbour in found:
        changed = [i for i, (p, q) in enumerate(zip(architecture.codes, neighbour.codes, strict=True)) if p != q]
        assert space.is_active(space.choices[changed[0]].name, architecture)
        assert all(neighbour.codes[i] == 0 for i in changed[1:])  # those the change put out of action


def test_sampling_is_uniform_over_each_option(rng: np.random.Generator) -> None:
    space = toy(choice("a", 4), choice("b", 3, ("a", (3,))))
    codes = space.encode([space.sample(rng) for _ in range(4_000)])
    counts = np.bincount(codes[:, 0], minlength=4)
    assert np.all(abs(counts - 1_000) < 5 * np.sqrt(4_000 * 0.25 * 0.75))
    inner = np.bincount(codes[codes[:, 0] == 3, 1], minlength=3)
    assert np.all(abs(inner - inner.sum() / 3) < 5 * np.sqrt(inner.sum() * 2 / 9))


@SPACES
def test_same_seed_same_architectures(space: SearchSpace) -> None:
    def drawn(seed: int) -> list[Architecture]:
        rng = np.random.default_rng(seed)
        first, second = space.sample(rng), space.sample(rng)
        return [first, second, space.mutate(first, rng), space.crossover(first, second, rng)]

    assert drawn(5) == drawn(5) != drawn(6)


def test_a_space_of_one_architecture() -> None:
    space = toy(choice("a", 1))
    rng = np.random.default_rng(0)
    assert space.size == 1
    assert space.smallest == space.largest == space.sample(rng) == space.mutate(space.smallest, rng)
    assert list(space.neighbours(space.smallest)) == []


@SPACES
def test_with_precision_sets_every_active_gene(space: SearchSpace, rng: np.random.Generator) -> None:
    architecture = space.sample(rng)
    changed = space.with_precision(architecture, "int8")
    for c in space.choices:
        expected = "int8" if c.role == "precision" and space.is_active(c.name, architecture) else architecture[c.name]
        assert changed[c.name] == expected
    assert space.with_precision(changed, "fp32") == space.with_precision(architecture, "fp32")


# parts of a space


def test_all_lists_each_architecture_once_in_the_order_of_codes() -> None:
    space = toy(choice("a", 2), choice("b", 3, ("a", (1,))), choice("c", 2, ("b", (0, 2))), choice("d", 2))
    listed = [architecture.codes for architecture in space.all()]
    assert listed == sorted(enumerated(space)) and len(listed) == space.size == 12
    assert listed == [architecture.codes for architecture in space.all()]


def test_all_of_random_dependencies(rng: np.random.Generator) -> None:
    for _ in range(100):
        space = random_space(rng)
        assert [architecture.codes for architecture in space.all()] == sorted(enumerated(space))


def test_all_refuses_what_is_too_large_before_anything_is_listed() -> None:
    with pytest.raises(
        ValueError, match=r"architectures, too many to list \(at most 1,000,000\): restrict it, or sample"
    ):
        TRANSFORMER.all()
    thousand = [choice(name, 10) for name in "abc"]
    assert toy(*thousand, choice("d", 1_000)).all()
    with pytest.raises(ValueError, match=r"has 1e\+06 architectures"):
        toy(*thousand, choice("d", 1_001)).all()


def test_a_restricted_space_holds_exactly_the_architectures_that_keep_to_it(rng: np.random.Generator) -> None:
    for _ in range(150):
        space = random_space(rng)
        limits = {
            c.name: tuple(o for o in c.options if rng.random() < 0.6) or c.options[-1:]
            for c in space.choices
            if rng.random() < 0.5
        }
        part = space.restricted(limits)
        free = dict(zip((c.name for c in space.choices), (c.options for c in space.choices), strict=True)) | limits
        expected = {
            active_values(space, architecture)
            for architecture in space.all()
            if all(value in free[name] for name, value in active_values(space, architecture))
        }
        assert {active_values(part, architecture) for architecture in part.all()} == expected
        assert part.size == len(expected)


def random_space(rng: np.random.Generator) -> SearchSpace:
    choices: list[Choice] = []
    for i in range(int(rng.integers(1, 8))):
        parents = [c for c in choices if rng.random() < 0.35]
        conditions = [(c.name, tuple(o for o in c.options if rng.random() < 0.6)) for c in parents]
        choices.append(choice(f"c{i}", int(rng.integers(1, 4)), *conditions))  # type: ignore[arg-type]
    return toy(*choices)


def active_values(space: SearchSpace, architecture: Architecture) -> frozenset[tuple[str, object]]:
    return frozenset((n, v) for n, v in architecture.values.items() if space.is_active(n, architecture))


def test_a_restricted_space_by_hand() -> None:
    space = MOBILENET.restricted({"resolution": [12], "stage1.depth": [1], "stage2.block0.kernel": (5, 3)})
    assert space.settings["restrict"] == {"resolution": [12], "stage1.depth": [1]}  # two kernels of two: no limit
    assert [c.name for c in space.choices] == [c.name for c in MOBILENET.choices]
    assert space.choice("stage2.block0.kernel").options == (3, 5)  # in the order of the space, not of the request
    gone = space.choice("stage1.block1.kernel")
    assert gone.options == (3,) and not space.is_active(gone.name, space.largest)
    architecture = space.build({"stage2.depth": 2, "stage2.block1.kernel": 5})
    assert space.is_active("stage2.block1.kernel", architecture) and architecture["resolution"] == 12
    assert space.lower(architecture) == MOBILENET.lower(MOBILENET.build(architecture.values))
    assert isinstance(space, MobileNet) and space.classes == MOBILENET.classes
    with pytest.raises(InvalidArchitecture, match="an architecture of the space mobilenet-"):
        MOBILENET.lower(architecture)


@SPACES
def test_a_restricted_space_lowers_as_the_whole_does(space: SearchSpace, rng: np.random.Generator) -> None:
    for _ in range(30):
        limits = {c.name: rng.permutation(len(c.options))[:2] for c in space.choices if rng.random() < 0.3}
        part = space.restricted({name: [space.choice(name).options[i] for i in kept] for name, kept in limits.items()})
        architecture = part.sample(rng)
        assert part.lower(architecture) == space.lower(space.build(architecture.values))
        again = build_space(part.family, json.loads(json.dumps(part.settings)))
        assert (again.name, again.choices, again.settings) == (part.name, part.choices, part.settings)
        assert again.lower(architecture) == part.lower(architecture)


def test_restrictions_add_up() -> None:
    twice = TRANSFORMER.restricted({"depth": [1, 2], "embedding": [24]}).restricted({"depth": [2], "block1.heads": [2]})
    once = TRANSFORMER.restricted({"block1.heads": [2], "depth": [2], "embedding": [24]})
    assert twice.name == once.name and twice.settings == once.settings and twice.choices == once.choices
    assert TRANSFORMER.restricted({}).name == TRANSFORMER.name
    assert TRANSFORMER.restricted({"depth": [3, 2, 1]}).settings == TRANSFORMER.settings
    names = {TRANSFORMER.restricted({"depth": kept}).name for kept in ([1], [2], [3], [1, 2], [1, 3], [2, 3])}
    assert len(names) == 6 and TRANSFORMER.name not in names


def test_names_of_spaces_are_those_of_earlier_versions() -> None:
    assert MobileNet().name == "mobilenet-3a60b517"
    assert CompactTransformer().name == "compact_transformer-1314e845"
    assert MobileNet().restricted({"stage1.depth": [2]}).name == "mobilenet-752621e3"


@SPACES
def test_only_a_foreign_or_restricted_architecture(space: SearchSpace, rng: np.random.Generator) -> None:
    with pytest.raises(InvalidArchitecture, match="an architecture of the space"):
        space.only(MobileNet().smallest)
    part = space.restricted({"resolution": [12]})
    architecture = part.sample(rng)
    assert part.only(architecture).name == space.only(space.build(architecture.values)).name


def test_restrictions_that_leave_nothing_or_name_nothing() -> None:
    for limits, message in (
        ({"dept": [1]}, "no choice 'dept'; did you mean 'depth'"),
        ({"depth": [9]}, r"depth = 9 is not an option; options: \[1, 2, 3\]"),
        ({"depth": []}, r"depth: no option is left; keep one of \[1, 2, 3\]"),
        ({"depth": 2}, r"depth = 2: expected a list of options out of \[1, 2, 3\]"),
        ({"block0.heads": "12"}, "block0.heads = '12': expected a list"),
    ):
        with pytest.raises(InvalidArchitecture, match=message):
            TRANSFORMER.restricted(limits)  # type: ignore[arg-type]
    with pytest.raises(InvalidArchitecture, match=r"depth = 2 is not an option; options: \[1\]"):
        TRANSFORMER.restricted({"depth": [1]}).restricted({"depth": [2]})


# identity


@SPACES
def test_a_space_is_made_again_from_its_settings(space: SearchSpace, rng: np.random.Generator) -> None:
    again = build_space(space.family, json.loads(json.dumps(space.settings)))
    assert (again.name, again.choices, again.settings) == (space.name, space.choices, space.settings)
    architecture = space.sample(rng)
    assert again.lower(architecture) == space.lower(architecture)


@SPACES
def test_spaces_and_architectures_go_to_worker_processes(space: SearchSpace, rng: np.random.Generator) -> None:
    architecture = space.sample(rng)
    there, back = pickle.loads(pickle.dumps((space, architecture)))
    assert back == architecture and there.lower(back) == space.lower(architecture)


def test_settings_that_mean_the_same_make_the_same_space() -> None:
    plain = MobileNet(resolutions=(24, 32), expansions=(2, 4))
    assert MobileNet(resolutions=np.array([32, 24]), expansions=(4.0, 2.0)).name == plain.name  # type: ignore[arg-type]
    assert MobileNet(resolutions=(24, 40)).name != plain.name


def test_representation_names_the_space_and_counts() -> None:
    assert repr(toy(choice("a", 3))).endswith(": 1 choices, 3 architectures>")


def test_spaces_beyond_the_largest_float_are_counted_told_and_refused() -> None:
    space = toy(*(choice(f"c{i}", 10) for i in range(400)))
    assert space.size == 10**400
    assert repr(space).endswith(": 400 choices, 1.00e+400 architectures>")
    with pytest.raises(ValueError, match=r"has 1\.00e\+400 architectures, too many to list"):
        space.all()
    for size, text in ((0, "0"), (999, "999"), (12345, "1.23e+04"), (10**6, "1e+06"), (98765 * 10**5000, "9.88e+5004")):
        assert size_text(size) == text


def test_undeployed_takes_the_first_precision_and_nothing_else(rng: np.random.Generator) -> None:
    space = MobileNet(precisions=("int8", "fp32"), depths=(1, 2), widths=(8, 16))
    for _ in range(20):
        drawn = space.sample(rng)
        plain = space.undeployed(drawn)
        assert set(space.lower(plain).precisions.values()) == {"int8"}
        for one in space.choices:
            expected = "int8" if one.role == "precision" else drawn[one.name]
            assert plain[one.name] == expected
    assert space.undeployed(space.largest) == space.largest
    with pytest.raises(InvalidArchitecture, match="an architecture of the space"):
        space.undeployed(MobileNet().largest)


# refusals


def test_text_that_names_no_architecture() -> None:
    for text, message in (
        ("block0.head=2", "no choice 'block0.head'; did you mean 'block0.heads'?"),
        ("zzzzzz=2", "no choice 'zzzzzz'$"),
        ("depth=9", "depth = 9 is not an option; options: 1, 2, 3"),
        ("depth", "expected choice=value, got 'depth'"),
        ("depth=1,depth=2", "depth is given twice"),
        ("depth=", "depth =  is not an option"),
    ):
        with pytest.raises(InvalidArchitecture, match=message.replace("?", r"\?")):
            TRANSFORMER.parse(text)


def test_codes_that_name_no_architecture() -> None:
    space = toy(choice("a", 2), choice("b", 3))
    with pytest.raises(InvalidArchitecture, match="expected 2 codes, got 1"):
        space.from_codes([0])
    for bad in (-1, 3):
        with pytest.raises(InvalidArchitecture, match=f"b: code {bad} is not in 0..2"):
            space.from_codes([0, bad])
    with pytest.raises(TypeError):
        space.from_codes([0, 1.5])  # type: ignore[list-item]


def test_values_that_name_no_architecture() -> None:
    with pytest.raises(InvalidArchitecture, match=r"depth = 7 is not an option; options: \[1, 2, 3\]"):
        TRANSFORMER.build({"depth": 7})
    with pytest.raises(InvalidArchitecture, match="depth = True"):
        TRANSFORMER.build({"depth": True})
    with pytest.raises(InvalidArchitecture, match="did you mean 'depth'"):
        TRANSFORMER.build({"depths": 1})


def test_architectures_of_another_space() -> None:
    foreign = MobileNet().smallest
    rng = np.random.default_rng(0)
    for use in (
        lambda: TRANSFORMER.lower(foreign),
        lambda: TRANSFORMER.encode([foreign]),
        lambda: TRANSFORMER.one_hot([foreign]),
        lambda: TRANSFORMER.mutate(foreign, rng),
        lambda: TRANSFORMER.crossover(TRANSFORMER.smallest, foreign, rng),
        lambda: list(TRANSFORMER.neighbours(foreign)),
        lambda: TRANSFORMER.is_active("depth", foreign),
        lambda: TRANSFORMER.with_precision(foreign, "int8"),
    ):
        with pytest.raises(InvalidArchitecture, match="an architecture of the space mobilenet-"):
            use()


def test_choices_and_slots_that_make_no_space() -> None:
    with pytest.raises(ValueError, match="choice 'a' has no options"):
        choice("a", 0)
    with pytest.raises(ValueError, match="choice 'a' repeats an option"):
        Choice("a", (1, 1), "depth")
    with pytest.raises(ValueError, match="two choices share a name"):
        toy(choice("a", 2), choice("a", 2))
    with pytest.raises(ValueError, match=r"choice 'a' depends on \['b'\], which must come before it"):
        toy(choice("a", 2, ("b", (1,))), choice("b", 2))
    with pytest.raises(ValueError, match="a = 5 is not an option"):
        toy(choice("a", 2), choice("b", 2, ("a", (5,))))
    with pytest.raises(ValueError, match=r"slot 's' reads \['width'\], which are not choices"):
        SearchSpace("toy", {}, [choice("a", 2)], [Slot("s", ("width",), lambda values: ())], lambda _: (1,), 2)


def test_a_slot_sees_only_what_it_declares() -> None:
    def greedy(values: Values) -> tuple[L.Layer, ...]:
        return (L.linear("l", Port(INPUT, (4,)), int(values["b"])),)

    space = SearchSpace("toy", {}, [choice("a", 2), choice("b", 2)], [Slot("s", ("a",), greedy)], lambda _: (4,), 2)
    with pytest.raises(KeyError, match="b"):
        space.lower(space.smallest)
