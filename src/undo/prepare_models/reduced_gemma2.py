"""Reduced Gemma-2: the architecture of Table 1 at any size, seeded random initialisation, and what it costs."""

from typing import TYPE_CHECKING, Any, Final, Literal, Self

from pydantic import model_validator

from undo.config.schema import Count, Frozen, Positive
from undo.lm.shape import seen_twice

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Size = Literal["0.1B", "0.3B", "0.6B", "0.9B", "2B"]
SIZES: Final[dict[Size, dict[str, int]]] = {  # Table 1; of the authors' code; gemma-2-2b itself
    "0.1B": {"layers": 14, "hidden_size": 320, "intermediate_size": 1280, "head_dim": 128},
    "0.3B": {"layers": 14, "hidden_size": 768, "intermediate_size": 3072, "head_dim": 128},
    "0.6B": {"layers": 18, "hidden_size": 1024, "intermediate_size": 4096, "head_dim": 256},
    "0.9B": {"layers": 22, "hidden_size": 1280, "intermediate_size": 5120, "head_dim": 256},
    "2B": {"layers": 26, "hidden_size": 2304, "intermediate_size": 9216, "head_dim": 256},
}


class ReducedGemma2(Frozen):
    """A Gemma-2 of another size. What the paper does not say comes from gemma-2-2b, as in the authors' code.

    `size` sets the numbers of SIZES; keys given beside it win.
    """

    size: Size | None = None
    vocab_size: Count = 256_000
    hidden_size: Count
    intermediate_size: Count
    layers: Count = 14
    heads: Count = 8
    kv_heads: Count = 4
    head_dim: Count = 128
    query_scale: Count = 256  # attention scores are divided by its root (query_pre_attn_scalar)
    attention_softcap: Positive | None = 50.0
    final_softcap: Positive | None = 30.0
    sliding_window: Count = 4096  # in every other layer, from the first
    init_std: Positive = 0.02

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_size(cls, values: Any) -> Any:
        size = values.get("size") if isinstance(values, dict) else None
        return SIZES.get(size, {}) | values if size is not None else values

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        """What the library asks for, and would say when the model is built."""
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs")
        return self

    @property
    def body_parameters(self) -> int:
        """Everything but the embedding, which is tied to the head."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.layers * (attention + mlp + 4 * self.hidden_size) + self.hidden_size

    @property
    def parameters(self) -> int:
        return self.body_parameters + self.vocab_size * self.hidden_size

    def forward_flops(self, length: int) -> int:
        """FLOPs of one forward pass per token in rows of `length`: 2 per weight, and causal attention."""
        sliding = (self.layers + 1) // 2  # the first and every other
        seen = (self.layers - sliding) * length + sliding * seen_twice(length, self.sliding_window)
        return 2 * self.parameters + 2 * seen * self.heads * self.head_dim

    @property
    def head_flops(self) -> int:
        return 2 * self.vocab_size * self.hidden_size

    def first(self, layers: int) -> Self:
        """The first `layers` blocks, without the head."""
        return self.model_copy(update={"layers": layers, "vocab_size": 0})

    def build(self, seed: int) -> "PreTrainedModel":
        """A random initialisation from its own generator: the same on every machine, whatever was drawn before."""
        from transformers import Gemma2Config

        from undo.lm.disk import fresh

        config = Gemma2Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            query_pre_attn_scalar=self.query_scale,
            attn_logit_softcapping=self.attention_softcap,
            final_logit_softcapping=self.final_softcap,
            sliding_window=self.sliding_window,
            initializer_range=self.init_std,
            max_position_embeddings=max(8192, self.sliding_window),
        )
        return fresh(config, seed)
