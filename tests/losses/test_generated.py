"""What a GPU would do for the losses: passes over the logits, kernels, memory. Its code is generated, and not run."""

import pytest
import torch

pytest.importorskip("triton", reason="inductor generates Triton code for a GPU")
if not torch.backends.cuda.is_built():
    pytest.skip("this torch knows no CUDA", allow_module_level=True)

import generated

from undo.lm import memory
from undo.prepare_models.reduced_gemma2 import ReducedGemma2

TOKENS = 2097 + 300  # of 256,000 words: a chunk, and another, for which kernels are compiled again
SHAPE = ReducedGemma2(size="0.1B")


@pytest.fixture(scope="module")
def counts():
    with generated.pretended():
        return {kind: generated.count(kind, tokens=TOKENS) for kind in ("ce", "uniform", "kl")}


@pytest.mark.parametrize(("kind", "passes", "kernels"), [("ce", 4.5, 2), ("uniform", 4.5, 2), ("kl", 7.5, 3)])
def test_logits_are_read_and_written_no_more_than_needed(counts, kind, passes, kernels):
    """A writing for each model's products, and a reading for its log-sum-exp; a reading of all for the gradient, half a
    pass to write it in bf16, and two halves for the products with it. A kernel each: nothing else touches logits.
    """
    got = counts[kind]
    assert got.passes == pytest.approx(passes)
    assert got.others == 0
    assert len(got.launches) == 2 * kernels
    assert sum(len(launch.stores) for launch in got.launches) == 2  # the gradient alone


def test_the_heads_gradient_is_added_to_in_place(counts):
    """Written for the first chunk, read and written for the second; the head is read once, to be cast."""
    assert counts["ce"].heads == pytest.approx((1 + 2 + 1) * SHAPE.hidden_size / TOKENS)


@pytest.mark.parametrize("kind", ["ce", "uniform", "kl"])
def test_memory_is_modelled_as_it_is_held(counts, kind):
    """Beside the gradients, which are counted elsewhere; the logits of a chunk, their gradient, the heads' casts."""
    gradients = 4 * SHAPE.hidden_size * (TOKENS + SHAPE.vocab_size)
    said = memory._loss(SHAPE, [SHAPE] if kind == "kl" else [], TOKENS, mixed=True, device="cuda")
    assert counts[kind].held - gradients == pytest.approx(said, rel=0.01)
