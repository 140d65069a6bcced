"""A byte-level tokenizer trained on the spot, a text with paragraphs, and a tiny random model that reads them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.data.text import FileText
from compress.models.load import LoadedModel

NOUNS = "stone river light winter morning garden window paper silver quiet meadow letter island answer table"


def story(sentences: int = 1500) -> str:
    """A text without digits in which no two sentences of 40 in a row are the same, in paragraphs of five."""
    words = NOUNS.split()
    made = [
        f"The {words[i % 15]} of the {words[(i // 15) % 15]} was near the {words[(i * 7 + i // 40) % 15]}."
        for i in range(sentences)
    ]
    return "\n\n".join(" ".join(made[i : i + 5]) for i in range(0, sentences, 5)) + "\n"


def story_in(folder: Path) -> FileText:
    """That text as a file of a folder."""
    path = folder / "story.txt"
    path.write_text(story(), encoding="utf-8")
    return FileText(path=str(path))


@functools.cache
def byte_tokenizer(begin: bool = False) -> Any:
    """Byte-level BPE with 512 tokens; with `begin` it puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([story(400)], trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def byte_model(seed: int = 0, context: int = 2048) -> LlamaForCausalLM:
    """A random Llama over the tokens of `byte_tokenizer`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(byte_tokenizer()),
        max_position_embeddings=context,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: Any = LlamaForCausalLM(config)
    return model.float().eval()


def byte_loaded(seed: int = 0, context: int = 2048) -> LoadedModel:
    """Model and tokenizer as `load_model` returns them."""
    return LoadedModel(byte_model(seed, context), byte_tokenizer(), "tiny/bytes")
