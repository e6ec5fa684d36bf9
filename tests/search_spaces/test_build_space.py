from __future__ import annotations

import pytest

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
