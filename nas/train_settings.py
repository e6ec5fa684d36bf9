"""How a supernet is trained: every option, its default, and what values it may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nas.augmentation import Augmentation
from nas.losses import DISTILLATIONS
from nas.strategies import StrategySettings

ARITHMETICS = ("fp32", "fp32_channels_last", "bf16_channels_last")


@dataclass(frozen=True)
class TrainSettings(StrategySettings):
    """How a supernet is trained; the options of the strategy are those of `StrategySettings`.

    steps: optimizer steps; by default as many as `epochs` passes over the training images take.
    distillation, temperature: the loss against a teacher, where the strategy has one.
    arithmetic: fp32, fp32_channels_last, bf16_channels_last, or auto, which times a few steps of each; name one
        where the same seed must give the same weights.
    crop_padding: pixels of reflected border from which random crops are taken.
    erasing: probability of random erasing (arXiv 1708.04896). mixup, cutmix: parameter of their Beta distribution
        (arXiv 1710.09412, 1905.04899). 0 leaves each out.
    class_weights: by class name, above 1 where a false negative of the class costs more; others count 1.
    bias_loss: weight images by the variance of their features (arXiv 2107.11170).
    drop_path: probability, at the end of training, that a residual branch is dropped (arXiv 1707.07012); not in the
        passes that a teacher's logits guide, whose networks underfit already.
    gradient_noise: eta of noise with variance eta / (1 + step)^0.55 (arXiv 1511.06807).
    average: decay of an exponential moving average of the weights, which is what is evaluated and kept; 0 for none.
    kernel_transforms: smaller kernels are learned transformations of larger ones (arXiv 1908.09791).
    checkpoint_segments: activations are kept at the ends of this many segments of the network, and recomputed.
    compile: whether torch.compile compiles the largest and the smallest network, which most strategies train at every
        step; not together with bias_loss, drop_path or checkpoint_segments.
    evaluate_every: epochs between evaluations of the smallest, the middle and the largest subnet.
    patience: evaluations in a row at chance, of a subnet that was better, that count as a collapse.
    """

    epochs: int = 20
    steps: int | None = None
    batch_size: int = 64
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    distillation: str = "soft_cross_entropy"
    temperature: float = 1.0
    flip: bool = False
    crop_padding: int = 0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    class_weights: Mapping[str, float] = field(default_factory=dict)
    bias_loss: bool = False
    drop_path: float = 0.0
    gradient_noise: float = 0.0
    average: float = 0.0
    kernel_transforms: bool = False
    checkpoint_segments: int = 1
    arithmetic: str = "auto"
    compile: bool = False
    evaluate_every: int = 1
    patience: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._known("optimizer", ("sgd", "adamw"))
        self._known("arithmetic", ("auto", *ARITHMETICS))
        self._known("distillation", tuple(DISTILLATIONS))
        for name in ("epochs", "batch_size", "evaluate_every", "learning_rate", "temperature", "patience"):
            self._check(name, getattr(self, name) > 0, "more than 0")
        self._check("steps", self.steps is None or self.steps > 0, "more than 0")
        self._check("checkpoint_segments", self.checkpoint_segments > 0, "more than 0")
        for name in ("weight_decay", "gradient_noise"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("momentum", "label_smoothing", "drop_path", "average"):
            self._check(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        weights = self.class_weights.values()
        valid = all(isinstance(w, int | float) and not isinstance(w, bool) and 0 < w < float("inf") for w in weights)
        self._check("class_weights", valid, "a number more than 0 for each class named")
        together = [name for name in ("bias_loss", "drop_path") if getattr(self, name)]
        together += ["checkpoint_segments"] if self.checkpoint_segments > 1 else []
        self._check("compile", not (self.compile and together), f"false together with {' and '.join(together)}")
        _ = self.augmentation  # which refuses what it cannot do

    def _known(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"train.{name} = {getattr(self, name)!r}; expected {', '.join(known)}")

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(self.flip, self.crop_padding, self.erasing, self.mixup, self.cutmix)

    @property
    def images_a_step(self) -> int:
        return self.batch_size * self.micro_batches
