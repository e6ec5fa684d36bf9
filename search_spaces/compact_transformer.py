"""Compact Convolutional Transformer (arXiv 2104.05704).

    tokenizer (convolution, relu, max pool, n times) + positions -> blocks -> norm -> sequence pooling -> classifier

Elastic: input resolution, embedding, depth; heads and MLP ratio of each block; precision of each
convolution and linear layer. The head size is fixed, so that fewer heads are the leading channels of the
query, key and value projections, and a smaller embedding is the leading features of a larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from search_spaces import layers as L
from search_spaces.family import (
    LARGEST_RESOLUTION,
    SMALLEST_RESOLUTION,
    SettingReader,
    deeper_than,
    precision_choice,
    square_input,
)
from search_spaces.layers import INPUT, PREV, Layer, Port, port
from search_spaces.precision import precision_of
from search_spaces.space import Choice, SearchSpace, Slot, Values

BLOCK_LINEARS = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.out",
    "mlp.expand",
    "mlp.reduce",
)


@dataclass(frozen=True, slots=True)
class _Tokenizer:
    channels: int
    widths: tuple[int, ...]  # of the convolutions before the last, whose width is the embedding
    pools: tuple[bool, ...]  # whether each convolution is followed by a 3x3 max pool of stride 2

    def grid(self, resolution: int) -> int:
        for pooled in self.pools:
            resolution = -(-resolution // 2) if pooled else resolution
        return resolution


def _linear(name: str, source: Port, features: int, values: Values) -> Layer:
    return L.linear(name, source, features, precision=precision_of(str(values[f"{name}.precision"])))


def _hidden(embedding: int, ratio: float) -> int:
    return round(embedding * ratio)


def _lower_tokenizer(tokenizer: _Tokenizer, values: Values) -> tuple[Layer, ...]:
    resolution, embedding = int(values["resolution"]), int(values["embedding"])
    tensor = Port(INPUT, (tokenizer.channels, resolution, resolution))
    made: list[Layer] = []
    for i, (width, pooled) in enumerate(zip((*tokenizer.widths, embedding), tokenizer.pools, strict=True)):
        name = f"tokenizer{i}"
        precision = precision_of(str(values[f"{name}.precision"]))
        made.append(L.conv2d(name, tensor, width, kernel=3, norm=False, activation="relu", precision=precision))
        if pooled:
            made.append(L.max_pool(f"{name}.pool", port(made[-1]), kernel=3, stride=2))
        tensor = port(made[-1])
    count = tensor.shape[1] * tensor.shape[2]
    flat = L.reshape("tokens.flatten", tensor, (embedding, count))
    tokens = L.permute("tokens", port(flat), (1, 0))
    positions = L.parameter("positions", (count, embedding))
    return (*made, flat, tokens, positions, L.add("tokens.add", port(tokens), port(positions)))


def _attention(name: str, source: Port, heads: int, head_size: int, values: Values) -> list[Layer]:
    """Multi-head self-attention: linear layers, matrix products and a softmax."""
    count, embedding = source.shape
    made: list[Layer] = []

    def projected(part: str, order: tuple[int, ...]) -> Port:
        flat = _linear(f"{name}.{part}", source, heads * head_size, values)
        split = L.reshape(f"{name}.{part}.split", port(flat), (count, heads, head_size))
        moved = L.permute(f"{name}.{part}.permute", port(split), order)
        made.extend((flat, split, moved))
        return port(moved)

    query = projected("query", (1, 0, 2))  # (heads, tokens, head size)
    key = projected("key", (1, 2, 0))  # (heads, head size, tokens)
    value = projected("value", (1, 0, 2))
    scores = L.matmul(f"{name}.scores", query, key, scale=head_size**-0.5)
    weights = L.softmax(f"{name}.softmax", port(scores))
    mixed = L.matmul(f"{name}.mix", port(weights), value)
    back = L.permute(f"{name}.permute", port(mixed), (1, 0, 2))
    joined = L.reshape(f"{name}.join", port(back), (count, heads * head_size))
    return [*made, scores, weights, mixed, back, joined, _linear(f"{name}.out", port(joined), embedding, values)]


def _lower_block(tokenizer: _Tokenizer, index: int, head_size: int, values: Values) -> tuple[Layer, ...]:
    if int(values["depth"]) <= index:
        return ()
    name, embedding = f"block{index}", int(values["embedding"])
    source = Port(PREV, (tokenizer.grid(int(values["resolution"])) ** 2, embedding))
    first_norm = L.layer_norm(f"{name}.attention.norm", source)
    attention = _attention(f"{name}.attention", port(first_norm), int(values[f"{name}.heads"]), head_size, values)
    first_add = L.add(f"{name}.attention.add", source, port(attention[-1]))
    second_norm = L.layer_norm(f"{name}.mlp.norm", port(first_add))
    width = _hidden(embedding, float(values[f"{name}.mlp_ratio"]))
    hidden = _linear(f"{name}.mlp.expand", port(second_norm), width, values)
    active = L.activation(f"{name}.mlp.activation", port(hidden), "gelu")
    reduced = _linear(f"{name}.mlp.reduce", port(active), embedding, values)
    second_add = L.add(f"{name}.mlp.add", port(first_add), port(reduced))
    return (first_norm, *attention, first_add, second_norm, hidden, active, reduced, second_add)


def _lower_head(tokenizer: _Tokenizer, classes: int, values: Values) -> tuple[Layer, ...]:
    """Sequence pooling: a softmax over the tokens weighs them into one vector."""
    count, embedding = tokenizer.grid(int(values["resolution"])) ** 2, int(values["embedding"])
    norm = L.layer_norm("norm", Port(PREV, (count, embedding)))
    score = _linear("sequence_pool.score", port(norm), 1, values)
    row = L.permute("sequence_pool.permute", port(score), (1, 0))
    weights = L.softmax("sequence_pool.softmax", port(row))
    pooled = L.matmul("sequence_pool.mix", port(weights), port(norm))
    flat = L.reshape("flatten", port(pooled), (embedding,))
    return (norm, score, row, weights, pooled, flat, _linear("classifier", port(flat), classes, values))


class CompactTransformer(SearchSpace):
    """Compact Convolutional Transformers for square images of 8 to 224 pixels.

    Args:
        resolutions: input sides, in pixels.
        channels: channels of the input image.
        classes: number of classes.
        embeddings: options for the features of a token.
        depths: options for the number of transformer blocks.
        heads: options for the attention heads of each block.
        head_size: features of one head.
        mlp_ratios: options for the hidden width of each block's MLP, as a multiple of the embedding.
        tokenizer_widths: widths of the convolutions before the last (whose width is the embedding).
        tokenizer_pools: whether each convolution of the tokenizer is followed by a max pool of stride 2.
        precisions: options for the precision of each layer with weights.

    Raises ValueError, saying which argument, for values no network can take.
    """

    def __init__(
        self,
        resolutions: Sequence[int] = (32,),
        channels: int = 3,
        classes: int = 10,
        embeddings: Sequence[int] = (64, 96, 128),
        depths: Sequence[int] = (1, 2, 3, 4),
        heads: Sequence[int] = (2, 4),
        head_size: int = 32,
        mlp_ratios: Sequence[float] = (1, 2),
        tokenizer_widths: Sequence[int] = (),
        tokenizer_pools: Sequence[bool] | None = None,
        precisions: Sequence[str] = ("fp32", "int8"),
    ) -> None:
        read = SettingReader("compact_transformer")
        resolutions = read.whole_options("resolutions", resolutions, SMALLEST_RESOLUTION, LARGEST_RESOLUTION)
        channels, classes = read.whole("channels", channels), read.whole("classes", classes, 2)
        embeddings = read.whole_options("embeddings", embeddings)
        depths = read.whole_options("depths", depths)
        heads, head_size = read.whole_options("heads", heads), read.whole("head_size", head_size)
        mlp_ratios = read.number_options("mlp_ratios", mlp_ratios, 0.01)
        widths = read.wholes("tokenizer_widths", tokenizer_widths)
        convolutions = len(widths) + 1
        pools = read.flags("tokenizer_pools", [True] * convolutions if tokenizer_pools is None else tokenizer_pools)
        precisions = read.precisions("precisions", precisions)
        if len(pools) != convolutions:
            read.refuse("tokenizer_pools", list(pools), f"{convolutions}, one for each convolution")
        if resolutions[0] < 2 ** sum(pools):
            read.refuse("resolutions", list(resolutions), f"at least {2 ** sum(pools)} pixels for {sum(pools)} pools")
        for embedding in embeddings:
            hidden = {_hidden(embedding, ratio) for ratio in mlp_ratios}
            if 0 in hidden or len(hidden) != len(mlp_ratios):
                expected = f"options that give {embedding} features different, positive whole multiples"
                read.refuse("mlp_ratios", list(mlp_ratios), expected)
        tokenizer = _Tokenizer(channels, widths, pools)

        own = [precision_choice(f"tokenizer{i}", precisions) for i in range(convolutions)]
        choices = [
            Choice("resolution", resolutions, "resolution"),
            Choice("embedding", embeddings, "width"),
            Choice("depth", depths, "depth"),
            *own,
        ]
        reads = ("resolution", "embedding", *(choice.name for choice in own))
        slots = [Slot("tokenizer", reads, partial(_lower_tokenizer, tokenizer))]
        for index in range(depths[-1]):
            name = f"block{index}"
            when = deeper_than(index, "depth", depths)
            own = [
                Choice(f"{name}.heads", heads, "heads", when),
                Choice(f"{name}.mlp_ratio", mlp_ratios, "expand", when),
                *(precision_choice(f"{name}.{part}", precisions, *when) for part in BLOCK_LINEARS),
            ]
            choices += own
            reads = ("resolution", "embedding", "depth", *(choice.name for choice in own))
            slots.append(Slot(name, reads, partial(_lower_block, tokenizer, index, head_size)))
        own = [precision_choice("sequence_pool.score", precisions), precision_choice("classifier", precisions)]
        choices += own
        reads = ("resolution", "embedding", *(choice.name for choice in own))
        slots.append(Slot("head", reads, partial(_lower_head, tokenizer, classes)))
        settings: dict[str, object] = {
            "resolutions": list(resolutions),
            "channels": channels,
            "classes": classes,
            "embeddings": list(embeddings),
            "depths": list(depths),
            "heads": list(heads),
            "head_size": head_size,
            "mlp_ratios": list(mlp_ratios),
            "tokenizer_widths": list(widths),
            "tokenizer_pools": list(pools),
            "precisions": list(precisions),
        }
        super().__init__("compact_transformer", settings, choices, slots, square_input(channels), classes)
