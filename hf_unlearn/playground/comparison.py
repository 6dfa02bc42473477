"""The original model and the extrapolated one on the same question, token by token."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest

import torch
from jinja2.exceptions import TemplateError
from peft import PeftModel
from transformers import DynamicCache, PreTrainedTokenizerBase

from hf_unlearn.data.formats import Messages
from hf_unlearn.data.sampling import draw_tokens
from hf_unlearn.data.tokenization import encode_prompt
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.forward import Backbone, end_token_ids, keeps_state
from hf_unlearn.evaluation.scoring import encode_answers, score_answers
from hf_unlearn.extrapolation import extrapolated
from hf_unlearn.playground.tokens import Token, spell


Answers = tuple[list[Token], list[Token]]  # of the original and of the extrapolated model


class Comparison:
    """
    One model with its live adapter, asked at any α. Between two tokens the adapter is back at its trained scale, and a
    lock is held for each, so several visitors may ask at once.

    Args:
        model (`peft.PeftModel`): The base model with its memorising adapter.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.backbone = Backbone(model)
        self.ends = end_token_ids(self.backbone.lm, tokenizer)
        self.positions = getattr(self.backbone.lm.config.get_text_config(), "max_position_embeddings", None)
        self._lock = threading.Lock()
        self._original: tuple[tuple, list[Token]] | None = None  # the last original answer, and to what

    def as_prompt(self, question: str) -> str | Messages:
        """A question as a prompt: a chat message where the tokenizer has a chat template, else the text as it is."""
        return question if self.tokenizer.chat_template is None else [{"role": "user", "content": question}]

    def compare(
        self,
        prompt: str | Messages,
        alpha: float,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[Answers]:
        """
        Answer with the original and the extrapolated model, a token of each at a time.

        Args:
            prompt (`str` or messages): What is asked.
            alpha (`float`): The extrapolation factor, 0 or above.
            max_new_tokens (`int`, *optional*, defaults to `128`): Most tokens of an answer.
            temperature (`float`, *optional*, defaults to `0.0`): Temperature of sampling; 0 is greedy decoding.
            seed (`int`, *optional*, defaults to `0`): Seed of sampling. Both models draw with the same random numbers.

        Yields:
            `tuple` of two `list[Token]`: both answers so far. The lists grow in place.
        """
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        key = (str(prompt), *options.values())
        known = self._original[1] if self._original is not None and self._original[0] == key else None
        answers: Answers = ([], [])
        streams = (
            self.answer(prompt, 0, **options) if known is None else known,
            self.answer(prompt, alpha, **options),
        )
        for step in zip_longest(*streams):
            for answer, token in zip(answers, step, strict=True):
                if token is not None:
                    answer.append(token)
            yield answers
        self._original = key, answers[0]

    def answer(
        self,
        prompt: str | Messages,
        alpha: float,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[Token]:
        """The answer at one α, token by token; the arguments are those of [`~Comparison.compare`]."""
        ids = self._encode(prompt)
        if self.positions is not None:
            max_new_tokens = min(max_new_tokens, self.positions - len(ids))
        return spell(self._continue(ids, alpha, max_new_tokens, temperature, seed), self.tokenizer, self.ends)

    def score(self, prompt: str | Messages, completion: str | Messages, alpha: float) -> list[Token]:
        """
        A given answer with the probability of each of its tokens, EOS included.

        Args:
            prompt (`str` or messages): What is asked.
            completion (`str` or messages): The answer.
            alpha (`float`): The extrapolation factor, 0 or above.
        """
        self._encode(prompt)  # refuses one that leaves no room
        with _template_errors():
            encoded = encode_answers(prompt, [completion], self.tokenizer, self.positions)
        with self._lock, extrapolated(self.model, alpha):
            ((scores,),) = score_answers(self.model, [encoded], self.tokenizer)
        ids = encoded.rests[0][encoded.skipped[0] :]
        probabilities = torch.from_numpy(scores.log_probs).exp().tolist()
        return list(spell(zip(ids, probabilities, strict=True), self.tokenizer, self.ends))

    def _continue(
        self, ids: list[int], alpha: float, max_new_tokens: int, temperature: float, seed: int
    ) -> Iterator[tuple[int, float]]:
        """Ids and probabilities of the tokens of an answer, up to one that ends it."""
        numbers = random.Random(seed)
        cache = None if keeps_state(self.backbone.lm) else DynamicCache(config=self.backbone.lm.config)
        sequence = torch.tensor([ids], device=self.backbone.device)
        fed = 0
        for _ in range(max_new_tokens):
            with self._lock, torch.no_grad(), extrapolated(self.model, alpha):
                hidden = self.backbone.hidden_states(sequence[:, fed:], torch.ones_like(sequence), cache)
                logits = self.backbone.head.logits(hidden[:, -1])
            if temperature:
                number = torch.tensor([numbers.random()], dtype=torch.float64)
                token = draw_tokens(logits, number, temperature, top_p=1.0)
            else:
                token = logits.argmax(-1)
            yield token.item(), torch.softmax(logits, -1)[0, token].item()
            if token.item() in self.ends:
                return
            fed = sequence.shape[1] if cache is not None else 0  # models with a state read all of it anew
            sequence = torch.cat([sequence, token[:, None]], dim=1)

    def _encode(self, prompt: str | Messages) -> list[int]:
        """Tokens of a prompt that leaves room for an answer."""
        with _template_errors():
            ids = encode_prompt(prompt, self.tokenizer)
        if not ids:
            raise UnlearningError("The question has no tokens. Write one.")
        if self.positions is not None and len(ids) >= self.positions:
            raise UnlearningError(
                f"The question has {len(ids)} tokens, and the model has {self.positions} positions. Shorten it."
            )
        return ids


@contextmanager
def _template_errors() -> Iterator[None]:
    try:
        yield
    except TemplateError as error:
        raise UnlearningError(f"The tokenizer's chat template refuses the conversation: {error}.") from error
