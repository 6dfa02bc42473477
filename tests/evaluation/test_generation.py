"""Batched answers against transformers' own greedy generation, prompt by prompt."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama, tiny_rows, tiny_tokenizer
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from hf_unlearn.evaluation import generate_answers


ARCHITECTURES = {
    "gpt2": {},  # absolute positions
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 5.0, "tie_word_embeddings": False},
    "phi": {},  # a head with a bias
    "mamba": {"state_size": 4, "time_step_rank": 4},  # a state, whose rows cannot be dropped
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
}
TOKENIZER = tiny_tokenizer()
ENDS = [2, *range(5, 64, 7)]  # many, so that rows end at various lengths, and most of them are ordinary words
PROMPTS = [row["prompt"] for row in tiny_rows(9, seed=5, longest=12)]


def build(architecture: str):
    if architecture == "llama":
        return tiny_llama().eval()
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    config = AutoConfig.for_model(
        architecture,
        **{"vocab_size": 64, "hidden_size": 64, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2},
        **sizes | ARCHITECTURES[architecture],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model


def expect(model, prompts: list[str], max_new_tokens: int, ends: list[int] | None = None) -> list[list[int]]:
    """What `generate` gives for each prompt alone."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=0, repetition_penalty=1.0
    )
    answers = []
    for prompt in prompts:
        ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers


def texts(answers: list[list[int]]) -> list[str]:
    return [text.strip() for text in TOKENIZER.batch_decode(answers, skip_special_tokens=True)]


@pytest.mark.parametrize("architecture", ["llama", *ARCHITECTURES])
def test_batches_equal_each_prompt_alone(architecture):
    model = build(architecture)
    expected = expect(model, PROMPTS, 9, ENDS)
    assert len({len(answer) for answer in expected}) >= 3  # rows end at different steps
    model.generation_config.eos_token_id = ENDS
    for batch_size in (1, 4, "auto"):
        result = generate_answers(model, PROMPTS, TOKENIZER, max_new_tokens=9, batch_size=batch_size)
        assert result == texts(expected)


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_penalties_of_the_model_are_left_out(architecture):
    model = build(architecture)
    expected = texts(expect(model, PROMPTS, 9, [2]))
    model.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=9.0)
    before = model.generation_config.to_dict()
    answers = generate_answers(model, PROMPTS, TOKENIZER, max_new_tokens=9)
    assert model.generation_config.to_dict() == before
    assert answers == expected


@pytest.mark.parametrize("architecture", ["llama", "mamba", "lfm2"])
def test_an_end_that_is_an_ordinary_word_is_not_repeated(architecture):
    """As padding it would be: rows with a state stay in the batch to the end."""
    model, tokenizer = build(architecture), tiny_tokenizer()
    tokenizer.eos_token = None
    expected = texts(expect(model, PROMPTS, 9, ENDS[1:]))
    model.generation_config.eos_token_id = ENDS[1:]
    assert generate_answers(model, PROMPTS, tokenizer, max_new_tokens=9) == expected


def test_rows_that_have_ended_leave_the_batch():
    model, sizes = build("llama"), []
    lengths = [len(answer) for answer in expect(model, PROMPTS, 9, ENDS)]
    model.generation_config.eos_token_id = ENDS
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    generate_answers(model, PROMPTS, TOKENIZER, max_new_tokens=9, batch_size=len(PROMPTS))
    assert sizes == [sum(length > step for length in lengths) for step in range(max(lengths))]


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
@pytest.mark.parametrize("max_new_tokens", [1, 6])
def test_answers_that_do_not_end_have_exactly_max_new_tokens(architecture, max_new_tokens):
    model, tokenizer = build(architecture), tiny_tokenizer()
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    words = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in expect(model, PROMPTS, max_new_tokens)]
    prompts = [prompt for prompt, answer in zip(PROMPTS, words, strict=True) if "<" not in answer]
    assert len(prompts) >= 4
    answers = generate_answers(model, prompts, tokenizer, max_new_tokens=max_new_tokens)
    assert [len(answer.split()) for answer in answers] == [max_new_tokens] * len(prompts)


def test_the_mode_of_the_model_comes_back_and_answers_are_without_dropout():
    model = tiny_llama(attention_dropout=0.5).train()
    assert generate_answers(model, PROMPTS, TOKENIZER, max_new_tokens=5) == texts(
        expect(build("llama"), PROMPTS, 5, [2])
    )
    assert model.training


def test_one_bos_and_the_generation_prompt():
    """Messages, the same rendered as text, and the variables of the template."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %} {{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %} {{ opening or 'w9' }}{% endif %}"
    )
    model, seen = build("llama"), []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(args[0].tolist()))
    messages = [{"role": "user", "content": "w5 w6"}]
    generate_answers(model, [messages, "<s> w5 w6 w9"], tokenizer, max_new_tokens=1)
    generate_answers(model, [messages], tokenizer, max_new_tokens=1, chat_template_kwargs={"opening": "w8"})
    assert seen == [[[1, 5, 6, 9]] * 2, [[1, 5, 6, 8]]]


def test_results_are_handed_on_by_row():
    model, seen = build("llama"), {}
    answers = generate_answers(
        model,
        PROMPTS,
        TOKENIZER,
        max_new_tokens=3,
        batch_size=2,
        on_results=lambda indices, texts: seen.update(zip(indices, texts, strict=True)),
    )
    assert [seen[index] for index in range(len(PROMPTS))] == answers
