"""The guided sampler's codes of a space are its architectures, and what it knows of them is what lowering tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest

from nas.candidates import Costs
from nas.costs import ProfiledDevice, at_most, maximize, minimize
from nas.guided_sampler import CLAIM
from nas.samplers import LIBRARY, SAMPLERS, LegalCodes, guided_sampler
from search_spaces import Architecture
from tests.nas import tiny


@pytest.fixture
def costs(tmp_path: Path) -> Costs:
    """A device of int8 alone, so that the first option of each precision is not legal."""
    kinds = ("conv2d", "linear", "pool", "add", "reshape")
    precisions = {"source": "made up", "value": {kind: ["int8"] for kind in kinds}}
    device = ProfiledDevice(tiny.device(tmp_path, precisions=precisions))
    space = tiny.space(precisions=("fp32", "int8"))
    macs = sorted(space.lower(space.sample(np.random.default_rng(i))).macs for i in range(40))
    wanted = [maximize("accuracy"), minimize("latency_ms", device), minimize("model_bytes")]
    return Costs(space, wanted, [at_most("macs", macs[20])], {"toy": device})


def drawn(legal: LegalCodes, count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(len(d.choices), size=count) for d in legal.distributions.values()], axis=1)


def built(costs: Costs, legal: LegalCodes, row: np.ndarray) -> Architecture:
    chosen = {name: d.choices[code] for code, (name, d) in zip(row, legal.distributions.items(), strict=True)}
    return costs.space.build({name: chosen.get(name, options[0]) for name, options in costs.options.items()})


def test_codes_are_the_architectures_that_their_options_build(costs: Costs) -> None:
    legal = LegalCodes(costs)
    codes = drawn(legal, 300)
    architectures = [built(costs, legal, row) for row in codes]
    assert [costs.space.from_codes(row) for row in legal.of_space(codes)] == architectures
    canonical = legal.canonical(codes)
    assert [built(costs, legal, row) for row in canonical] == architectures
    assert len({row.tobytes() for row in canonical}) == len(set(architectures)) < 300
    assert np.array_equal(legal.canonical(canonical), canonical)


def test_what_is_known_without_running_is_what_lowering_tells(costs: Costs) -> None:
    legal = LegalCodes(costs)
    codes = drawn(legal, 50)
    figures = [costs.figures(costs.space.lower(built(costs, legal, row))) for row in codes]
    for key in ("latency_ms@toy", "model_bytes"):
        np.testing.assert_allclose(legal.figure(key)(codes), [each[key].value for each in figures], rtol=1e-12)
    assert not costs.is_looked_up("accuracy") and costs.is_looked_up("latency_ms@toy")


def test_proposals_are_within_the_limits_and_new(costs: Costs) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = guided_sampler(costs, seed=0, startup=8, asynchronous=False)
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=sampler)
    space, found = costs.space, []
    for _ in range(40):
        trial = study.ask()
        values = {n: trial.suggest_categorical(n, o) if len(o) > 1 else o[0] for n, o in costs.options.items()}
        architecture = space.build(values)  # type: ignore[arg-type]
        network = space.lower(architecture)
        assert network.macs <= costs.limits[0].value
        found.append(architecture)
        figures = costs.figures(network)
        study.tell(
            trial, [tiny.formula(architecture, "val_search"), figures["latency_ms@toy"].value, network.model_bytes]
        )
    assert len(set(found)) == 40


def test_a_guided_sampler_is_told_what_a_search_knows(costs: Costs) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = guided_sampler(costs, seed=0, startup=8, asynchronous=False)
    codes = drawn(LegalCodes(costs), 20)
    figures = costs.of_codes(LegalCodes(costs).of_space(codes))
    assert set(sampler._exact) == {1, 2}  # not the accuracy
    np.testing.assert_array_equal(sampler._exact[1](codes), figures["latency_ms@toy"])
    np.testing.assert_array_equal(sampler._exact[2](codes), figures["model_bytes"])
    eight = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=sampler)
    eight.add_trials([optuna.trial.create_trial(values=[0.0, 0.0, 0.0]) for _ in range(9)])
    assert [sampler.generation_start(eight, number) for number in (7, 8)] == [0, 8]
    for asynchronous in (False, True):
        sampler = guided_sampler(costs, seed=0, startup=8, asynchronous=asynchronous)
        study = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=sampler)
        trial = study.ask()
        trial.suggest_categorical(*next((name, d.choices) for name, d in LegalCodes(costs).distributions.items()))
        assert (CLAIM in study.trials[0].system_attrs) == asynchronous


@pytest.mark.parametrize("name", LIBRARY)
def test_each_sampler_of_the_library_is_made_by_its_name(name: str) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=LIBRARY[name](0, 6))
    study.optimize(
        lambda trial: (trial.suggest_categorical("a", (1, 2, 3)), trial.suggest_categorical("b", (1, 2))), 10
    )
    assert len(study.trials) == 10
    assert set(SAMPLERS) == {"guided", *LIBRARY}
    if name in ("nsga2", "nsga3"):
        generations = [next(iter(trial.system_attrs.values())) for trial in study.trials]
        assert generations == [number // 6 for number in range(10)]
    elif name != "random":
        assert vars(study.sampler)["_n_startup_trials"] == 6


@pytest.mark.parametrize("name", ["nsga2", "nsga3"])
def test_parents_are_in_one_order_when_selected_and_when_read_back(name: str) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=LIBRARY[name](0, 8))
    study.optimize(lambda t: (t.suggest_int("a", 0, 30), -t.params["a"] * t.suggest_int("b", 0, 9)), 16)
    told = []
    for _ in range(2):
        sampler = LIBRARY[name](0, 8)
        assert isinstance(sampler, optuna.samplers.NSGAIISampler | optuna.samplers.NSGAIIISampler)
        told.append([trial.number for trial in sampler.get_parent_population(study, 2)])
    assert told[0] == told[1] == sorted(told[0]) and len(told[0]) == 8
