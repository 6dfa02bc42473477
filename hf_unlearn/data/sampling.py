"""
A retain set where there is none: text sampled from the reference model itself.

Every row has a random stream of its own, keyed by the seed and the number of the row, and takes one number of it for
each token. So the batch size and the number of processes change nothing but rounding.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.data.formats import Messages
from hf_unlearn.data.overlap import ForgetOverlap
from hf_unlearn.data.sample_cache import SampleCache, write_atomically
from hf_unlearn.data.tokenization import encode_prompt
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.batching import BatchSize, process_state, run_in_batches
from hf_unlearn.evaluation.forward import Backbone, end_token_ids
from hf_unlearn.evaluation.generation import MAX_TOKENS, decode
from hf_unlearn.evaluation.metrics import is_degenerate
from hf_unlearn.extrapolation.live import is_sharded
from hf_unlearn.extrapolation.sharded import failing_together


logger = logging.getLogger(__name__)

NUM_ROWS = 200
MAX_NEW_TOKENS = 128
UNIGRAM_CONTEXTS = 1024  # tokens after which next-token distributions are averaged

SHARDED = (
    "Retain rows cannot be sampled while the weights are sharded over processes (ZeRO-3, FSDP2). Sample first in one "
    "process, `hf-unlearn sample --model_name_or_path MODEL --forget_dataset FORGET --output_file retain.jsonl`, and "
    "pass that file as the retain set."
)


@dataclass(frozen=True)
class Sampling:
    """
    How retain rows are sampled.

    Args:
        num_rows (`int`, *optional*, defaults to `200`): Rows to sample; fewer are left where some are dropped.
        temperature (`float`, *optional*, defaults to `1.0`): Temperature of the softmax.
        top_p (`float`, *optional*, defaults to `1.0`): Mass of the likeliest tokens that are sampled from.
        max_new_tokens (`int`, *optional*, defaults to `128`): Most tokens of an answer or text.
        seed (`int`, *optional*, defaults to `0`): Seed of the prompts' order and of the answers.
    """

    num_rows: int = NUM_ROWS
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_rows", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UnlearningError(f"`{name}` is {getattr(self, name)}; sampling retain rows needs 1 or more.")
        if not 0 < self.temperature < float("inf"):
            raise UnlearningError(f"`temperature` is {self.temperature}; use a finite number above 0.")
        if not 0 < self.top_p <= 1:
            raise UnlearningError(
                f"`top_p` is {self.top_p}; use a number above 0 and up to 1, which leaves nothing out."
            )

    def prompts(self) -> list[Messages]:
        """The instructions of a chat model's rows, in the order of the seed; they begin anew where they are used up."""
        texts = instructions()
        random.Random(self.seed).shuffle(texts)
        return [[{"role": "user", "content": texts[row % len(texts)]}] for row in range(self.num_rows)]

    def uniforms(self, row: int, count: int) -> list[float]:
        """The random numbers of a row, in [0, 1)."""
        stream = random.Random(f"{self.seed}:{row}")
        return [stream.random() for _ in range(count)]


def instructions() -> list[str]:
    """The general instructions that chat models are asked."""
    return (resources.files("hf_unlearn.data") / "instructions.txt").read_text(encoding="utf-8").splitlines()


def sample_retain_set(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_rows: int = NUM_ROWS,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
    forget: Iterable[Mapping[str, Any]] | None = None,
    batch_size: BatchSize = "auto",
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> datasets.Dataset:
    """
    Sample retain rows from the reference: the model without its adapter, if it carries one.

    A tokenizer with a chat template gives `prompt` and `completion` in messages: general instructions of this package
    and sampled answers. Without one the rows are `text`, sampled from BOS, from EOS where there is no BOS, and where
    there is neither from a first token of the model's unigram distribution: the mean of its next-token distributions
    after up to 1,024 single tokens, evenly spaced over the vocabulary.

    Rows without an answer, rows that are no language ([`~hf_unlearn.evaluation.metrics.is_degenerate`]) and rows that
    overlap the forget set ([`~hf_unlearn.data.overlap.ForgetOverlap`]) are dropped and counted. What is left is cached,
    keyed by the weights, the tokenizer, the options and the forget set. Under `accelerate launch` each process samples
    a share, and all get all rows.

    Args:
        model (`PreTrainedModel` or [`~peft.PeftModel`]):
            A causal LM with whole weights.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        num_rows, temperature, top_p, max_new_tokens, seed (*optional*):
            As in [`Sampling`].
        forget (rows with `prompt` and `completion`, *optional*):
            The forget set, e.g. of [`~hf_unlearn.data.to_prompt_completion`].
        batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Rows in a batch.
        cache_dir (`str` or `Path`, *optional*):
            Where rows are kept; `$HF_HOME/hf_unlearn/retain` if not given.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `datasets.Dataset`
    """
    sampling = Sampling(num_rows, temperature, top_p, max_new_tokens, seed)
    if is_sharded(model):
        raise UnlearningError(SHARDED)
    forget = [{"prompt": row["prompt"], "completion": row["completion"]} for row in forget or []]
    is_main = process_state().is_main_process
    cache = rows = None
    with failing_together():
        if is_main:
            cache = SampleCache(cache_dir, model, tokenizer, (sampling, instructions(), forget))
            rows = cache.read()
    rows = broadcast_object_list([rows])[0]
    if rows is None:
        sampled = _sample(model, tokenizer, sampling, batch_size, progress)
        with failing_together():
            if is_main:
                rows = _keep(sampled, forget)
                cache.write(rows)
        rows = broadcast_object_list([rows])[0]
    return datasets.Dataset.from_list(rows)


def planned_retain_set(
    tokenizer: PreTrainedTokenizerBase, sampling: Sampling, max_length: int | None
) -> datasets.Dataset:
    """
    A tokenised set as large as sampled rows can get, to plan with before there are any.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the model.
        sampling ([`Sampling`]): How the rows will be sampled.
        max_length (`int`, *optional*): Longest sequence.
    """
    prompts = sampling.prompts() if tokenizer.chat_template is not None else [""] * sampling.num_rows
    rows = []
    for number, prompt in enumerate(prompts):
        start = encode_prompt(prompt, tokenizer)[:max_length]
        count = sampling.max_new_tokens + 1  # and EOS
        answer = [0] * (count if max_length is None else min(count, max_length - len(start)))
        completion = [{"role": "assistant", "content": str(number)}] if prompt else str(number)
        rows.append(
            {"prompt": prompt, "completion": completion, "row": number, "num_cut": 0}
            | {"input_ids": start + answer, "labels": [-100] * len(start) + answer}
        )
    return datasets.Dataset.from_list(rows)


def write_rows(file: Path, rows: datasets.Dataset) -> None:
    """Write rows as JSON Lines; the file appears once it is whole."""
    write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def draw_tokens(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """
    Sample tokens by inverting the cumulative distribution.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`): Next-token logits.
        uniforms (`torch.Tensor` of shape `(N,)`): A number in [0, 1) for each row.
        temperature (`float`): Temperature.
        top_p (`float`): Sample from the fewest tokens, by falling probability, that have this mass together.

    Returns:
        `torch.Tensor` of shape `(N,)`
    """
    precise = torch.float32 if logits.device.type == "mps" else torch.float64  # which MPS lacks
    probabilities = torch.softmax(logits.to(precise) / temperature, -1)
    if top_p < 1:
        falling, order = probabilities.sort(dim=-1, descending=True, stable=True)
        falling = falling.where(falling.cumsum(-1) - falling < top_p, 0.0)
        probabilities = torch.zeros_like(falling).scatter(-1, order, falling)
    cumulative = probabilities.cumsum(-1)
    targets = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


# ---- Sampling ----


@torch.no_grad()
def _sample(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    batch_size: BatchSize,
    progress: bool,
) -> list[dict[str, Any]]:
    """All rows, also those without use."""
    if process_state().is_main_process:
        logger.warning(f"{sampling.num_rows} retain rows are being sampled from the reference model.")
    backbone = Backbone(model)
    ends = end_token_ids(backbone.lm, tokenizer)
    uniforms = [sampling.uniforms(row, sampling.max_new_tokens + 1) for row in range(sampling.num_rows)]
    chat = tokenizer.chat_template is not None
    with _as_reference(model):
        prompts = sampling.prompts() if chat else _starts(backbone, tokenizer, [numbers[0] for numbers in uniforms])
        encoded = [_encode_prompt(prompt, tokenizer) if chat else prompt for prompt in prompts]
        longest = max(map(len, encoded))
        count = _room_for(backbone.lm, longest, sampling.max_new_tokens)

        def run(rows: list[int]) -> list[list[int]]:
            def choose(logits: torch.Tensor, positions: list[int], step: int) -> torch.Tensor:
                numbers = torch.tensor(
                    [uniforms[rows[position]][step + 1] for position in positions], dtype=torch.float64
                )
                return draw_tokens(logits, numbers, sampling.temperature, sampling.top_p)

            return decode(backbone, [encoded[row] for row in rows], count, ends, choose)

        answers = run_in_batches(
            [longest + count] * sampling.num_rows,
            run,
            batch_size=batch_size,
            max_tokens=MAX_TOKENS,
            progress="Sampling retain rows" if progress else None,
        )
    if chat:
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [
            {"prompt": prompt, "completion": [{"role": "assistant", "content": text.strip()}]}
            for prompt, text in zip(prompts, texts, strict=True)
        ]
    whole = [start + answer for start, answer in zip(prompts, answers, strict=True)]
    return [{"text": text} for text in tokenizer.batch_decode(whole, skip_special_tokens=True)]


@contextmanager
def _as_reference(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """The model in evaluation mode and with its adapter off, for the time of the context."""
    was_training = model.training
    model.eval()
    try:
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                yield
        else:
            yield
    finally:
        model.train(was_training)


def _encode_prompt(prompt: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Templates that open a turn with reasoning know this variable; the others do not read it.
    return encode_prompt(prompt, tokenizer, {"enable_thinking": False})


def _starts(backbone: Backbone, tokenizer: PreTrainedTokenizerBase, uniforms: list[float]) -> list[list[int]]:
    """The token that each text begins with."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is not None:
        return [[start]] * len(uniforms)
    vocabulary = min(len(tokenizer), backbone.lm.get_input_embeddings().num_embeddings)
    contexts = torch.linspace(0, vocabulary - 1, min(vocabulary, UNIGRAM_CONTEXTS)).long()[:, None]
    contexts = contexts.to(backbone.device)
    unigram = 0.0
    for part in contexts.split(64):
        logits = backbone.head.logits(backbone.hidden_states(part, torch.ones_like(part))[:, -1])
        unigram = unigram + torch.softmax(logits.float(), -1).sum(0)
    numbers = torch.tensor(uniforms, dtype=torch.float64)
    return draw_tokens(unigram.log().expand(len(numbers), -1), numbers, 1.0, 1.0)[:, None].tolist()


def _room_for(lm: PreTrainedModel, longest_prompt: int, max_new_tokens: int) -> int:
    """New tokens that the model's positions leave room for."""
    positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return max_new_tokens
    if positions <= longest_prompt:
        raise UnlearningError(
            f"The model has {positions} positions, and the longest instruction takes {longest_prompt} tokens, so no "
            "answer can be sampled. Pass a retain set."
        )
    return min(max_new_tokens, positions - longest_prompt)


# ---- What is kept ----


def _keep(rows: list[dict[str, Any]], forget: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out rows without use and those that overlap the forget set, and say how many."""
    overlap = ForgetOverlap(forget)
    kept, dropped = [], Counter()
    for row in rows:
        text = row["text"] if "text" in row else row["completion"][0]["content"]
        if not text.strip():
            dropped["without an answer"] += 1
        elif is_degenerate(text):
            dropped["that are no language"] += 1
        elif overlap.has({"prompt": "", "completion": text} if "text" in row else row):
            dropped["that overlap the forget set"] += 1
        else:
            kept.append(row)
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not kept:
        raise UnlearningError(
            f"None of the {len(rows)} rows sampled from the model can be held: {counts}. Pass a retain set, or sample "
            "more rows or at another temperature."
        )
    if dropped:
        logger.warning(f"{len(kept)} of {len(rows)} sampled rows are kept; dropped: {counts}.")
    return kept
