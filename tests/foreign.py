"""A model folder as other people make them: Qwen's habits, in the small and at random."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from tests.conftest import lively
from undo.lm import disk

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
GENERATION = {"do_sample": False, "temperature": 0.6, "eos_token_id": [260, 258], "max_new_tokens": 77}  # Qwen's, too
TEXT = "The river is a body of water that flows to the sea. A castle is a building with walls and towers. "


def tokenizer_without_bos(texts: list[str] | None = None, size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE: <|endoftext|> ends a document and pads, nothing begins one; chat tokens are added."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 3, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(texts or [TEXT] * 3, trainer)
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def qwen(
    folder: Path, texts: list[str] | None = None, kind: type[PreTrainedConfig] = Qwen2Config, **changes: object
) -> PreTrainedModel:
    """Logits 20 wider than the tokenizer, an untied head, bf16 in several files, a generation config that transformers
    reads but would not write; of a Qwen-2, or another `kind`. The model as it was saved, in fp32."""
    tokenizer = tokenizer_without_bos(texts)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    values = {"vocab_size": len(tokenizer) + 20, "num_key_value_heads": 2, "max_position_embeddings": 512, **sizes}
    values |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None, **changes}
    model = lively(disk.fresh(kind(**values), 0)).bfloat16()
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=4) + "\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=3))  # nobody else writes it so
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model.to(torch.float32)
