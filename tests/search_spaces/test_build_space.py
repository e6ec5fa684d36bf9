from __future__ import annotations

import pytest
import yaml

from search_spaces import CompactTransformer, MobileNet, UnknownSpace, build_space


def test_families_by_name() -> None:
    assert isinstance(build_space("mobilenet", {"classes": 3}), MobileNet)
    assert isinstance(build_space("compact_transformer", {}), CompactTransformer)


def test_unknown_family_and_setting_name_the_nearest() -> None:
    with pytest.raises(UnknownSpace, match="unknown space 'mobilnet'; did you mean 'mobilenet'"):
        build_space("mobilnet", {})
    with pytest.raises(LookupError, match="unknown space 'zzz'; known: mobilenet, compact_transformer"):
        build_space("zzz", {})
    with pytest.raises(ValueError, match="space mobilenet: unknown setting 'kernel'; did you mean 'kernels'"):
        build_space("mobilenet", {"kernel": [3]})
    with pytest.raises(ValueError, match="unknown setting 'self'"):
        build_space("mobilenet", {"self": 1})


@pytest.mark.parametrize("restrict", [["depth"], {1: [2]}, "depth", None])
def test_a_restriction_is_a_mapping_of_choices(restrict: object) -> None:
    with pytest.raises(ValueError, match=r"space compact_transformer: restrict = .* the options to keep, by choice"):
        build_space("compact_transformer", {"restrict": restrict})


def test_a_restriction_as_an_experiment_states_it() -> None:
    settings = yaml.safe_load("{depths: [1, 2], restrict: {stage1.depth: [2], head.precision: [int8]}}")
    space = build_space("mobilenet", settings)
    assert space.choice("stage1.depth").options == (2,) and space.choice("stage2.depth").options == (1, 2)
    assert space.choice("head.precision").options == ("int8",)
    with pytest.raises(ValueError, match=r"no choice 'stage9\.depth'"):
        build_space("mobilenet", {"restrict": {"stage9.depth": [1]}})
    with pytest.raises(ValueError, match="unknown setting 'restricts'; did you mean 'restrict'"):
        build_space("mobilenet", {"restricts": {}})
