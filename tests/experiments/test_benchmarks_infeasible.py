"""The benchmark of limits out of reach, on a device of each kind of precisions."""

from __future__ import annotations

import pytest

from experiments.benchmarks.infeasible_limits import enumerated, tried
from hardware_profiles import load_device
from nas.costs import ProfiledDevice
from tests.nas import tiny


@pytest.mark.parametrize("name", ["adreno430", "stm32f746"])  # fp32 alone, int8 alone
def test_every_architecture_says_what_the_answers_say(name: str) -> None:
    found = enumerated(ProfiledDevice(load_device(name)), seed=0)
    assert found["runs"] and found["wrong"] == 0 and 0 < found["refused"] < found["right"] == 16


def test_just_beyond_is_refused_by_name_and_just_within_is_met() -> None:
    found = tried(tiny.space(precisions=("int8",)), ProfiledDevice(load_device("stm32f746")))
    assert found["runs"] and {"macs", "latency_ms@stm32f746", "sram_bytes@stm32f746"} <= set(found["figures"])
    for figure in found["figures"].values():
        assert figure["below_is_refused_by_name"] and figure["above_is_met"]
        assert 0 < figure["least"] < figure["most"]
