"""CompactTransformer against a torch module written here by hand from arXiv 2104.05704, and its refusals."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from search_spaces import CompactTransformer


class EncoderBlock(nn.Module):
    def __init__(self, features: int, heads: int, head_size: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, head_size
        self.first, self.second = nn.LayerNorm(features), nn.LayerNorm(features)
        self.query, self.key, self.value = (nn.Linear(features, heads * head_size) for _ in range(3))
        self.out = nn.Linear(heads * head_size, features)
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, features))

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.first(tokens)
        query, key, value = (
            part(normed).unflatten(-1, (self.heads, self.head_size)).transpose(0, 1)
            for part in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(1, 2) * self.head_size**-0.5).softmax(-1)
        tokens = tokens + self.out((weights @ value).transpose(0, 1).flatten(1))
        return tokens + self.mlp(self.second(tokens))


class Reference(nn.Module):
    """One image at a time, tokens as rows."""

    def __init__(
        self, plan: Mapping[str, object], channels: int, classes: int, widths: tuple[int, ...], head_size: int
    ) -> None:
        super().__init__()
        features = int(str(plan["embedding"]))
        tokenizer: list[nn.Module] = []
        for width in (*widths, features):
            tokenizer += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
            channels = width
        self.tokenizer = nn.Sequential(*tokenizer)
        side = int(str(plan["resolution"]))
        for _ in range(len(widths) + 1):
            side = (side + 1) // 2
        self.positions = nn.Parameter(torch.zeros(side * side, features))
        self.blocks = nn.Sequential(
            *(
                EncoderBlock(
                    features,
                    int(str(plan[f"block{i}.heads"])),
                    head_size,
                    round(features * float(str(plan[f"block{i}.mlp_ratio"]))),
                )
                for i in range(int(str(plan["depth"])))
            )
        )
        self.norm, self.score = nn.LayerNorm(features), nn.Linear(features, 1)
        self.classifier = nn.Linear(features, classes)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.tokenizer(image)[0].flatten(1).T + self.positions
        tokens = self.norm(self.blocks(tokens))
        return self.classifier((self.score(tokens).T.softmax(-1) @ tokens)[0])


@pytest.mark.parametrize(
    ("resolutions", "channels", "classes", "widths", "head_size"),
    [((8,), 1, 10, (), 16), ((24, 33), 3, 4, (12,), 8), ((32,), 4, 100, (6, 10), 32)],
)
def test_parameters_and_macs_are_those_of_a_torch_module(
    resolutions: tuple[int, ...],
    channels: int,
    classes: int,
    widths: tuple[int, ...],
    head_size: int,
    rng: np.random.Generator,
) -> None:
    space = CompactTransformer(
        resolutions=resolutions,
        channels=channels,
        classes=classes,
        embeddings=(24, 40),
        depths=(1, 2, 3),
        heads=(1, 2, 3),
        head_size=head_size,
        mlp_ratios=(0.5, 1, 2.5),
        tokenizer_widths=widths,
    )
    for architecture in (space.smallest, space.largest, *(space.sample(rng) for _ in range(3))):
        network = space.lower(architecture)
        module = Reference(architecture.values, channels, classes, widths, head_size)
        shapes = sorted(tuple(parameter.shape) for parameter in module.parameters())
        assert sorted(shape for layer in network.layers for shape in layer.parameter_shapes.values()) == shapes
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            out = module(torch.zeros(1, *network.input_shape))
        assert network.macs == counter.get_total_flops() / 2
        assert network.output.out_shape == tuple(out.shape)


def test_attention_is_never_quantized_but_its_linears_are() -> None:
    space = CompactTransformer(depths=(1,), precisions=("int8",))
    network = space.lower(space.largest)
    fp32 = {layer.kind for layer in network.layers if not layer.precision.is_quantized}
    assert fp32 == {"norm", "matmul", "softmax", "activation", "parameter", "add", "reshape", "permute"}
    rearranged = [layer for layer in network.layers if layer.kind in ("reshape", "permute")]
    assert {layer.name for layer in rearranged if not layer.precision.is_quantized} == {
        "block0.attention.permute", "block0.attention.join", "flatten",
    }  # fmt: skip


def test_pools_can_be_left_out() -> None:
    space = CompactTransformer(resolutions=(16,), tokenizer_widths=(8,), tokenizer_pools=(False, True))
    assert space.lower(space.smallest).by_name["positions"].out_shape == (64, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolutions": (7,)}, "resolutions = 7: expected a number from 8 to 224"),
        ({"resolutions": (8,), "tokenizer_widths": (8, 8, 8)}, "expected at least 16 pixels for 4 pools"),
        ({"channels": 1.5}, "channels = 1.5: expected a whole number of at least 1"),
        ({"classes": 1}, "classes = 1"),
        ({"embeddings": ()}, "embeddings = .*at least one option"),
        ({"depths": (0,)}, "depths = 0"),
        ({"heads": (2, 2)}, "heads = .*no option twice"),
        ({"head_size": 0}, "head_size = 0"),
        ({"mlp_ratios": (1, 1.001)}, "mlp_ratios = .*64 features different"),
        ({"tokenizer_widths": (0,)}, "tokenizer_widths = 0"),
        ({"tokenizer_pools": (True, True)}, "tokenizer_pools = .*expected 1, one for each convolution"),
        ({"tokenizer_pools": (1,)}, "tokenizer_pools = .*true or false each"),
        ({"precisions": ()}, "precisions = .*at least one option"),
        ({"precisions": (8,)}, "precisions = 8: expected one of fp32, int8"),
    ],
)
def test_settings_no_network_can_take(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        CompactTransformer(**settings)  # type: ignore[arg-type]
    assert str(refusal.value).startswith("space compact_transformer: ")
