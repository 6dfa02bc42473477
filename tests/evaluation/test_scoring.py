"""Every scored value against plain logits in fp64: one answer at a time, no padding, no cache."""

from __future__ import annotations

import copy
import random
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, models, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_unlearn.evaluation import encode_answers, score_answers
from hf_unlearn.extrapolation.live import extrapolated


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
ARCHITECTURES = {  # each differs in what padding or a shared prefix could break
    "llama": {},
    "gpt2": {},  # absolute positions
    "bloom": {},  # positions from the attention mask alone
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 3.0},
    "phi": {},  # a head with a bias
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},  # a state beside attention
}
TOKENIZER = tiny_tokenizer()
BOS, EOS = 1, 2


def build(architecture: str, seed: int = 0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **SIZES | ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(config).eval()
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model


def draw_rows(counts, seed: int = 3) -> list[tuple[str, list[str]]]:
    """A prompt with EOS tokens within, and as many answers as each count says; the first answer is one word."""
    generator = random.Random(seed)

    def words(shortest: int, longest: int) -> str:
        return " ".join(f"w{generator.randrange(4, 64)}" for _ in range(generator.randint(shortest, longest)))

    return [
        (f"{words(1, 14)} </s> {words(1, 3)}", [" " + words(1, 9 if index else 1) for index in range(count)])
        for count in counts
    ]


ROWS = draw_rows([1, 3, 3, 2, 1, 3])


@torch.no_grad()
def alone(model, ids: list[int], num_scored: int) -> torch.Tensor:
    """Log-probabilities in fp64 at the positions that predict the last tokens, shape (num_scored, V)."""
    logits = copy.deepcopy(model).double()(torch.tensor([ids])).logits[0, -num_scored - 1 : -1]
    return logits.log_softmax(-1)


def each_answer(rows):
    """Place of each answer, its ids in full, and its scored tokens with EOS, by hand."""
    for index, (prompt, answers) in enumerate(rows):
        for number, answer in enumerate(answers):
            target = [*(int(word[1:]) for word in answer.split()), EOS]
            before = [EOS if word == "</s>" else int(word[1:]) for word in prompt.split()]
            yield index, number, before + target, target


def encode(rows, tokenizer=TOKENIZER):
    return [encode_answers(prompt, answers, tokenizer) for prompt, answers in rows]


def check(model, rows, scores) -> None:
    for index, number, ids, target in each_answer(rows):
        expected = alone(model, ids, len(target))
        result = scores[index][number]
        assert result.log_probs.dtype == np.float32
        np.testing.assert_allclose(result.log_probs, expected[range(len(target)), target].numpy(), atol=1e-5)
        assert result.is_top1.tolist() == [
            best == token for best, token in zip(expected.argmax(-1).tolist(), target, strict=True)
        ]
        assert result.num_ends == 1
        assert result.without_end(result.log_probs).tolist() == result.log_probs[:-1].tolist()


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_score_as_each_alone(architecture, batch_size):
    model = build(architecture)
    check(model, ROWS, score_answers(model, encode(ROWS), TOKENIZER, batch_size=batch_size))


def test_a_prompt_is_computed_once():
    model, computed = tiny_llama(), []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: computed.append(args[0].numel()))
    rows = [("w5 " * 20, [" w6 w7"] * 5)]
    score_answers(model, encode(rows), TOKENIZER)
    assert sum(computed) == 20 + 5 * 3


def test_what_all_prompts_begin_with_is_computed_once():
    model, computed = tiny_llama(), []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: computed.append(args[0].numel()))
    turn = "w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 "
    rows = [(f"{turn}w{index}", [" w6 w7"]) for index in range(20, 24)]
    scores = score_answers(model, encode(rows), TOKENIZER)
    assert sum(computed) == 10 + 4 * (1 + 3)
    check(model, rows, scores)


def test_pad_that_is_eos_hides_no_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_llama(pad_token_id=EOS)
    check(model, ROWS, score_answers(model, encode(ROWS, tokenizer), tokenizer, batch_size=4))


def test_the_mode_of_the_model_comes_back():
    model = tiny_llama(attention_dropout=0.5).train()
    scores = score_answers(model, encode(ROWS[:2]), TOKENIZER)
    assert model.training
    check(model.eval(), ROWS[:2], scores)


def test_log_probabilities_of_a_bf16_model_are_taken_in_fp32():
    model = tiny_llama().bfloat16().eval()
    rows = [(prompt, answers[:1]) for prompt, answers in ROWS]
    scores = score_answers(model, encode(rows), TOKENIZER, batch_size=1, moments=True)
    for index, _, ids, target in each_answer(rows):
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -len(target) - 1 : -1]
        expected = (hidden.double() @ model.lm_head.weight.double().T).log_softmax(-1)
        result = scores[index][0]
        assert {array.dtype for array in (result.log_probs, result.mean, result.std)} == {np.dtype("float32")}
        np.testing.assert_allclose(result.log_probs, expected[range(len(target)), target].detach().numpy(), atol=1e-5)
        np.testing.assert_allclose(result.mean, (expected.exp() * expected).sum(-1).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "phi"])
def test_moments(architecture):
    model = build(architecture)
    scores = score_answers(model, encode(ROWS), TOKENIZER, moments=True)
    for index, number, ids, target in each_answer(ROWS):
        if number > 0:  # taken of the first answer of a prompt
            assert scores[index][number].mean is None
            continue
        log_probs = alone(model, ids, len(target))
        mean = (log_probs.exp() * log_probs).sum(-1, keepdim=True)
        variance = (log_probs.exp() * (log_probs - mean) ** 2).sum(-1)
        np.testing.assert_allclose(scores[index][number].mean, mean[:, 0].numpy(), atol=1e-5)
        np.testing.assert_allclose(scores[index][number].std, variance.sqrt().numpy(), atol=1e-5)


class TestKL:
    def check(self, model, reference, scores) -> None:
        largest = 0.0
        for index, number, ids, target in each_answer(ROWS):
            if number > 0:  # measured on the first answer of a prompt
                assert scores[index][number].kl is None
                continue
            log_probs, before = (alone(one, ids, len(target)) for one in (model, reference))
            expected = (before.exp() * (before - log_probs)).sum(-1).numpy()
            np.testing.assert_allclose(scores[index][number].kl, expected, atol=1e-5)
            largest = max(largest, expected.max())
        assert largest > 0.1

    def test_of_an_extrapolated_adapter_to_its_base(self):
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
        torch.manual_seed(7)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        merged = tiny_llama().double()
        for name, module in merged.named_modules():
            if name.endswith(("q_proj", "up_proj")):
                lora = model.get_submodule(f"base_model.model.{name}")
                product = lora.lora_B["default"].weight.double() @ lora.lora_A["default"].weight.double()
                module.weight.data -= 1.5 * (8 / 4) * product

        @contextmanager
        def reference():
            with extrapolated(model, 0.0):
                yield model

        with extrapolated(model, 1.5):
            scores = score_answers(model, encode(ROWS), TOKENIZER, batch_size=4, reference=reference)
        self.check(merged, tiny_llama(), scores)
        check(merged, ROWS, scores)

    @pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "phi"])
    def test_to_a_model_with_another_head(self, architecture):
        model, reference = tiny_llama(tie_word_embeddings=False), build(architecture, seed=1)
        scores = score_answers(model, encode(ROWS), TOKENIZER, reference=lambda: nullcontext(reference))
        self.check(model, reference, scores)


class TestEncoding:
    def test_one_token_answers_leave_the_prompt_as_the_prefix(self):
        encoded = encode_answers("w5 w6", [" w7", " w8 w9"], TOKENIZER)
        assert (encoded.prefix, encoded.rests, encoded.skipped) == ([5, 6], [[7, EOS], [8, 9, EOS]], [0, 0])
        assert encoded.num_tokens == 2 + 2 + 3

    def test_an_empty_prompt_with_several_answers(self):
        model, answers = tiny_llama(), ["w5 w6 w7", "w5 w8", "w9 w6 w7 w8"]
        (scores,) = score_answers(model, [encode_answers("", answers, TOKENIZER)], TOKENIZER)
        for answer, result in zip(answers, scores, strict=True):
            ids = [*(int(word[1:]) for word in answer.split()), EOS]  # nothing predicts the first of them
            expected = alone(model, ids, len(ids) - 1)[range(len(ids) - 1), ids[1:]]
            np.testing.assert_allclose(result.log_probs, expected.numpy(), atol=1e-5)

    def test_tokens_that_merge_across_the_boundary_belong_to_the_answer(self):
        vocabulary = {"x": 5, "a": 6, "b": 7, "c": 8, "ab": 9, "</s>": 2}
        backend = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
        encoded = encode_answers("xa", ["b", "cb"], tokenizer)
        assert (encoded.prefix, encoded.rests, encoded.skipped) == ([5], [[9, 2], [6, 8, 7, 2]], [0, 1])
        model = tiny_llama()
        ((merged, plain),) = score_answers(model, [encoded], tokenizer)
        np.testing.assert_allclose(merged.log_probs, alone(model, [5, 9, 2], 2)[range(2), [9, 2]], atol=1e-5)
        expected = alone(model, [5, 6, 8, 7, 2], 3)[range(3), [8, 7, 2]]
        np.testing.assert_allclose(plain.log_probs, expected, atol=1e-5)

    @pytest.mark.parametrize("prompt", ["w5 w6", "<s> w5 w6", [{"role": "user", "content": "w5 w6"}]])
    def test_one_bos(self, prompt):
        """A rendered chat template brings its BOS along, and the tokenizer adds one to all text."""
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
        tokenizer.chat_template = (
            "{{ bos_token }}{% for message in messages %} {{ message.content }}"
            "{% if message.role == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
        )
        answer = " w7" if isinstance(prompt, str) else [{"role": "assistant", "content": "w7"}]
        encoded = encode_answers(prompt, [answer], tokenizer)
        assert encoded.prefix + encoded.rests[0] == [BOS, 5, 6, 7, EOS]
        assert len(encoded.rests[0]) - encoded.skipped[0] == 2
