"""What the page shows against brute force: the extrapolated weights written out in fp64, and transformers alone."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from extrapolation_models import add_adapter
from peft.tuners.lora.layer import LoraLayer
from tiny import VOCABULARY, tiny_llama, tiny_tokenizer
from transformers import MambaConfig, MambaForCausalLM

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.metrics.probability import probability
from hf_unlearn.playground import Comparison
from hf_unlearn.playground.tokens import mean_probability


PROMPT = "w12 w52 w10"
IDS = [12, 52, 10]  # the tiny tokenizer adds no BOS
SCALING = 8 / 4  # `lora_alpha` over `r` of `add_adapter`


def tiny_mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return MambaForCausalLM(MambaConfig(**sizes, **tokens)).eval()


MODELS = {"llama": (tiny_llama, {}), "mamba": (tiny_mamba, {"target_modules": ["in_proj"]})}


def compared(name: str = "llama") -> Comparison:
    build, options = MODELS[name]
    return Comparison(add_adapter(build(), std=0.1, **options), tiny_tokenizer())


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compared()


def theta_for(name: str, alpha: float) -> torch.nn.Module:
    """θ_ref − α·s·B·A, written into the weights of a model without an adapter, in fp64."""
    build, options = MODELS[name]
    factors = dict(add_adapter(build(), std=0.1, **options).named_parameters())
    model = build().double().eval()
    with torch.no_grad():
        for key, a in factors.items():
            if "lora_A" in key:
                b = factors[key.replace("lora_A", "lora_B")]
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
                model.get_submodule(module).weight -= alpha * SCALING * b.double() @ a.double()
    return model


@torch.no_grad()
def next_probabilities(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Probabilities after each position, from one full forward pass; shape `(T, V)`."""
    return torch.softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0], -1)


def ids_of(tokens) -> list[int]:
    return tiny_tokenizer().convert_tokens_to_ids([token.text.strip() for token in tokens])


class TestAnswer:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("alpha", [0, 0.5, 3])
    def test_tokens_and_probabilities(self, name, alpha):
        answer = list(compared(name).answer(PROMPT, alpha, max_new_tokens=12))
        ids = ids_of(answer)
        wanted = next_probabilities(theta_for(name, alpha), IDS + ids)[len(IDS) - 1 : -1]
        assert ids == wanted.argmax(-1).tolist()
        assert len(ids) == 12 or ids[-1] == 2
        assert [token.probability for token in answer] == pytest.approx(wanted.amax(-1).tolist(), rel=1e-4)

    def test_alpha_changes_the_answer(self, comparison):
        answers = {alpha: ids_of(comparison.answer(PROMPT, alpha, max_new_tokens=12)) for alpha in (0, 0.5, 3)}
        assert len({tuple(ids) for ids in answers.values()}) == 3

    def test_alpha_0_is_the_base_bit_for_bit(self, comparison):
        base = tiny_llama().eval()
        options = {"do_sample": False, "max_new_tokens": 20, "output_logits": True, "return_dict_in_generate": True}
        output = base.generate(torch.tensor([IDS]), attention_mask=torch.ones(1, 3), **options)
        wanted = [torch.softmax(logits[0], -1).max().item() for logits in output.logits]
        answer = list(comparison.answer(PROMPT, 0, max_new_tokens=20))
        assert ids_of(answer) == output.sequences[0, 3:].tolist()
        assert [token.probability for token in answer] == wanted

    def test_an_end_token_ends_it(self):
        comparison = compared()
        ids = ids_of(comparison.answer(PROMPT, 0, max_new_tokens=12))
        comparison.ends = [ids[3]]
        answer = list(comparison.answer(PROMPT, 0, max_new_tokens=12))
        assert ids_of(answer) == ids[: ids.index(ids[3]) + 1]
        assert [token.is_end for token in answer] == [False] * (len(answer) - 1) + [True]

    def test_sampling_inverts_the_distribution(self, comparison):
        answer = list(comparison.answer(PROMPT, 1.5, max_new_tokens=12, temperature=0.7, seed=5))
        ids, numbers = ids_of(answer), random.Random(5)
        wanted = next_probabilities(theta_for("llama", 1.5), IDS + ids)[len(IDS) - 1 : -1]
        for token, probabilities, shown in zip(ids, wanted, answer, strict=True):
            heated = probabilities ** (1 / 0.7)
            cumulative = (heated / heated.sum()).cumsum(0)
            number = numbers.random()
            assert cumulative[token] > number - 1e-5
            assert token == 0 or cumulative[token - 1] < number + 1e-5
            assert shown.probability == pytest.approx(probabilities[token].item(), rel=1e-4)  # at temperature 1
        other = ids_of(comparison.answer(PROMPT, 1.5, max_new_tokens=12, temperature=0.7, seed=6))
        assert other != ids

    def test_positions_bound_it(self, comparison):
        comparison.ends, ends = [], comparison.ends
        try:
            assert len(list(comparison.answer(PROMPT, 0, max_new_tokens=500))) == 64 - 3
        finally:
            comparison.ends = ends


class TestScore:
    def test_each_token_of_the_reference_answer(self, comparison):
        for alpha in (0, 2):
            scored = comparison.score(PROMPT, " w35 w29", alpha)
            wanted = next_probabilities(theta_for("llama", alpha), [*IDS, 35, 29])[2:]
            wanted = [wanted[position, token].item() for position, token in enumerate([35, 29, 2])]
            assert [token.text.strip() for token in scored[:-1]] == ["w35", "w29"]
            assert [token.is_end for token in scored] == [False, False, True]
            assert [token.probability for token in scored] == pytest.approx(wanted, rel=1e-4)
            log_probs = torch.tensor(wanted).log().tolist()
            assert mean_probability(scored) == pytest.approx(probability(log_probs), rel=1e-4)


class TestVisitors:
    def test_they_do_not_mix_their_alpha(self, comparison):
        alphas = [0, 0.5, 2, 4]
        alone = [list(comparison.answer(PROMPT, alpha, max_new_tokens=12)) for alpha in alphas]
        streams = [comparison.answer(PROMPT, alpha, max_new_tokens=12) for alpha in alphas]
        assert [next(stream) for stream in streams] == [answer[0] for answer in alone]  # all of them are half-way now
        with ThreadPoolExecutor(len(alphas)) as pool:
            assert list(pool.map(list, streams)) == [answer[1:] for answer in alone]

    def test_one_who_leaves_leaves_nothing_behind(self, comparison):
        def scales():
            return {layer.scaling["default"] for layer in comparison.model.modules() if isinstance(layer, LoraLayer)}

        stream = comparison.answer(PROMPT, 3, max_new_tokens=12)
        next(stream)
        assert scales() == {SCALING}
        stream.close()
        assert not comparison._lock.locked()
        assert torch.is_grad_enabled()


class TestCompare:
    def test_both_answers_grow_together(self, comparison):
        lengths = [tuple(map(len, pair)) for pair in comparison.compare(PROMPT, 2, max_new_tokens=10)]
        original, extrapolated = (list(comparison.answer(PROMPT, at, max_new_tokens=10)) for at in (0, 2))
        steps = range(1, max(len(original), len(extrapolated)) + 1)
        assert lengths == [(min(n, len(original)), min(n, len(extrapolated))) for n in steps]

    def test_the_original_answer_is_kept_for_the_next_alpha(self):
        comparison = compared()
        *_, (original, first) = comparison.compare(PROMPT, 2, max_new_tokens=10)
        with torch.no_grad():  # were the base asked again, its answer would be another one
            comparison.backbone.lm.get_input_embeddings().weight.copy_(tiny_llama(seed=9).lm_head.weight)
        *_, (again, second) = comparison.compare(PROMPT, 2, max_new_tokens=10)
        assert again == original
        assert second != first

    @pytest.mark.parametrize(
        "other", [{"prompt": "w7 w8"}, {"max_new_tokens": 5}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 3}]
    )
    def test_but_not_for_another_question(self, comparison, other):
        for _ in comparison.compare(PROMPT, 2, max_new_tokens=10):
            pass
        asked = {"prompt": PROMPT, "max_new_tokens": 10} | other
        *_, (original, _) = comparison.compare(alpha=2, **asked)
        assert original == list(comparison.answer(alpha=0, **asked))

    def test_a_question_of_chat_models_is_a_message(self, comparison):
        assert comparison.as_prompt("w7") == "w7"
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
        chat = Comparison(comparison.model, tokenizer)
        prompt = chat.as_prompt(PROMPT)
        assert prompt == [{"role": "user", "content": PROMPT}]
        assert list(chat.answer(prompt, 1, max_new_tokens=5)) == list(comparison.answer(PROMPT, 1, max_new_tokens=5))


class TestRefused:
    def test_a_question_that_is_too_long(self, comparison):
        for ask in (comparison.answer, lambda prompt, alpha: comparison.score(prompt, " w5", alpha)):
            with pytest.raises(UnlearningError, match="64 tokens, and the model has 64 positions"):
                ask(" ".join(["w5"] * 64), 1)

    def test_a_question_without_tokens(self, comparison):
        with pytest.raises(UnlearningError, match="no tokens"):
            comparison.answer("", 1)

    def test_a_conversation_that_the_template_refuses(self, comparison):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
        chat = Comparison(comparison.model, tokenizer)
        for ask in (chat.answer, lambda prompt, alpha: chat.score(prompt, [], alpha)):
            with pytest.raises(UnlearningError, match="no system turn"):
                ask([{"role": "system", "content": "w5"}], 1)

    def test_a_negative_alpha(self, comparison):
        with pytest.raises(UnlearningError, match="memorise more"):
            list(comparison.answer(PROMPT, -1))
