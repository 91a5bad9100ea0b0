"""What a model's shape says about its cost, before there is a model."""

from typing import Any, NamedTuple, Protocol, Self

from undo.config.schema import Count, Frozen


class Shape(Protocol):
    """A causal language model in numbers: what training it takes in arithmetic and in memory follows from them."""

    @property
    def layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...

    @property
    def body_parameters(self) -> int:
        """Everything but the embedding and the head."""
        ...

    @property
    def parameters(self) -> int:
        """All of them, a matrix that is both embedding and head once."""
        ...

    def forward_flops(self, length: int) -> int:
        """FLOPs of one forward pass per token in rows of `length`: 2 per weight, and causal attention."""
        ...

    @property
    def head_flops(self) -> int:
        """FLOPs of the head per token, forward: 2 per weight."""
        ...

    def first(self, layers: int) -> Self:
        """The first `layers` blocks, without the head."""
        ...


class CountedShape(Frozen):
    """The Shape of any model, its parameters counted instead of derived. `undo.models` makes them."""

    layers: Count
    hidden_size: Count
    intermediate_size: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    vocab_size: int
    block_parameters: Count  # of one block
    other_parameters: int = 0  # outside of blocks, embedding and head: the final norm, learned positions
    head_parameters: int
    embedding_parameters: int = 0  # 0: tied to the head
    window: Count | None = None  # of the sliding layers
    sliding_layers: int = 0

    @property
    def body_parameters(self) -> int:
        return self.layers * self.block_parameters + self.other_parameters

    @property
    def parameters(self) -> int:
        return self.body_parameters + self.head_parameters + self.embedding_parameters

    def forward_flops(self, length: int) -> int:
        weights = self.body_parameters + self.head_parameters  # an embedding that is no head is looked up
        full = self.layers - self.sliding_layers
        seen = full * length + self.sliding_layers * seen_twice(length, self.window)
        return 2 * weights + 2 * seen * self.heads * self.head_dim

    @property
    def head_flops(self) -> int:
        return 2 * self.head_parameters

    def first(self, layers: int) -> Self:
        sliding = min(self.sliding_layers, layers)
        update = {"layers": layers, "sliding_layers": sliding, "vocab_size": 0, "head_parameters": 0}
        return self.model_copy(update=update | {"embedding_parameters": 0})


class Attention(NamedTuple):
    """What attention costs, of a transformers config."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    slides: tuple[bool, ...]  # of each layer, whether it sees the window alone

    @classmethod
    def of(cls, config: Any, layers: int) -> Self:
        """Of the first `layers`."""
        heads, kinds = config.num_attention_heads, getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        slides = [True] * layers if kinds is None else [kind == "sliding_attention" for kind in kinds[:layers]]
        return cls(
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            window=window,
            slides=tuple(window is not None and slide for slide in slides),
        )


def seen_twice(length: int, window: int | None) -> int:
    """Twice the keys that a query of a row of `length` sees on average, causally and not beyond the window."""
    if window is None or window >= length:
        return length
    return 2 * window - window * window // length
