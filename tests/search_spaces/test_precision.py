from __future__ import annotations

import pytest

from search_spaces import FP32, INT8, precision_of


def test_known_precisions() -> None:
    assert (FP32.weight_bits, FP32.activation_bits, FP32.is_quantized, str(FP32)) == (32, 32, False, "fp32")
    assert (INT8.weight_bits, INT8.activation_bits, INT8.is_quantized, str(INT8)) == (8, 8, True, "int8")
    assert precision_of("int8") is INT8


def test_unknown_precision_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown precision 'int7'; known: fp32, int8"):
        precision_of("int7")
