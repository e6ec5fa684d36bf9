"""Options of training: what they may be, and what they become."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nas.augmentation import Augmentation
from nas.train_settings import TrainSettings


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0), ("steps", 0), ("steps", -3), ("batch_size", -1), ("micro_batches", 0), ("learning_rate", 0.0),
        ("learning_rate", math.nan), ("weight_decay", -0.1), ("crop_padding", -1), ("momentum", 1.0),
        ("momentum", -0.1), ("label_smoothing", 1.0), ("warmup", 1.5), ("warmup", -0.1), ("warmup", math.nan),
        ("evaluate_every", 0), ("patience", 0), ("architectures", 1), ("architectures", 161), ("sampled", -1),
        ("delay", 1.0), ("delay", -0.1), ("attend", "all"), ("strategy", "none"),
        ("optimizer", "lion"), ("arithmetic", "fp8"), ("distillation", "none"), ("temperature", 0.0),
        ("drop_path", 1.0), ("drop_path", -0.1), ("gradient_noise", -1.0), ("average", 1.0), ("average", -0.5),
        ("checkpoint_segments", 0), ("erasing", 1.5), ("mixup", -1.0), ("cutmix", math.inf),
        ("class_weights", {"a": 0}), ("class_weights", {"a": -1.0}), ("class_weights", {"a": math.inf}),
        ("class_weights", {"a": math.nan}), ("class_weights", {"a": True}), ("class_weights", {"a": "2"}),
    ],
)  # fmt: skip
def test_bad_settings(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"train\.{option} = .*; expected"):
        TrainSettings(**{option: value})


def test_the_ramp_ends_with_the_delay() -> None:
    with pytest.raises(ValueError, match=r"train\.ramp = 0\.6; expected a share of the steps, from 0 to train\.delay"):
        TrainSettings(strategy="delayed", ramp=0.6)
    assert TrainSettings(delay=0.0).ramp == 0.02  # which nothing reads


@pytest.mark.parametrize("other", [{"bias_loss": True}, {"drop_path": 0.1}, {"checkpoint_segments": 2}])
def test_what_cannot_be_compiled(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"train\.compile = True; expected false together with {next(iter(other))}"):
        TrainSettings(compile=True, **other)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1}, {"warmup": 0.0}, {"warmup": 1.0}, {"delay": 0.0, "ramp": 0.0}, {"delay": 0.02}, {"sampled": 0},
        {"momentum": 0.0}, {"average": 0.999}, {"architectures": 160}, {"class_weights": {"a": 3}}, {"erasing": 1.0},
    ],
)  # fmt: skip
def test_settings_at_the_edge(options: dict[str, Any]) -> None:
    settings = TrainSettings(**options)
    assert all(getattr(settings, name) == value for name, value in options.items())


def test_every_option_is_explained() -> None:
    text = f"{TrainSettings.__doc__}{TrainSettings.__mro__[1].__doc__}"
    known = {
        "epochs",
        "batch_size",
        "optimizer",
        "learning_rate",
        "momentum",
        "weight_decay",
        "label_smoothing",
        "flip",
    }
    fields = set(TrainSettings.__dataclass_fields__)
    assert {name for name in fields if f"{name}:" not in text and f"{name}, " not in text} <= known


def test_what_settings_become() -> None:
    settings = TrainSettings(batch_size=20, micro_batches=3, flip=True, crop_padding=2, mixup=0.5, cutmix=1.0)
    assert settings.images_a_step == 60
    assert settings.augmentation == Augmentation(flip=True, crop_padding=2, mixup=0.5, cutmix=1.0)
    assert TrainSettings().augmentation == Augmentation()
