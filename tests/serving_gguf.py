"""A tiny model that llama.cpp's converter knows, and llama.cpp itself where it is installed."""

from __future__ import annotations

import os
import string
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


TOKENS = ["<unk>", "<s>", "</s>", "▁", *string.ascii_letters]
# The converters are files of llama.cpp's repository: name a checkout to run them.
LLAMA_CPP = os.environ.get("LLAMA_CPP")
needs_converter = pytest.mark.skipif(LLAMA_CPP is None, reason="LLAMA_CPP names no checkout of llama.cpp")


def save_model(folder: Path, **options) -> Path:
    """A random Llama with a BPE tokenizer of one letter a token."""
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=len(TOKENS), **options).save_pretrained(folder)
    return folder


def llama_cpp(path: Path, adapter: Path | None = None, context: int = 64):
    """A llama.cpp server in this process, without a port, in fp32 throughout."""
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = context, 1, False, -1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(parameters)


def greedy(server, prompt: list[int], length: int, top: int, **options) -> tuple[list[int], list[dict[int, float]]]:
    """
    Greedy tokens of a llama.cpp server, and the log-probabilities of the likeliest tokens at each of them.

    Args:
        server: The server.
        prompt (list of `int`): Token ids.
        length (`int`): Number of tokens to generate.
        top (`int`): Number of log-probabilities.
    """
    request = {"prompt": prompt, "max_tokens": length, "temperature": 0.0, "logprobs": top, "ignore_eos": True}
    content = server.handle_completions(request | options)["choices"][0]["logprobs"]["content"]
    logprobs = [{entry["id"]: entry["logprob"] for entry in token["top_logprobs"]} for token in content]
    return [token["id"] for token in content], logprobs


def largest_error(logits: torch.Tensor, prompt: list[int], logprobs: list[dict[int, float]]) -> float:
    """
    Largest difference of the log-probabilities of llama.cpp from ours.

    Args:
        logits (`torch.Tensor` of shape `(1, length, vocab_size)`): Ours, for prompt and generated tokens.
        prompt (list of `int`): Token ids.
        logprobs (list of `dict`): As [`greedy`] gives them.
    """
    ours = logits[0].double().log_softmax(-1)[len(prompt) - 1 :]
    return max(abs(value - ours[i][token]) for i, row in enumerate(logprobs) for token, value in row.items()).item()
