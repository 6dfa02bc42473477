"""What is kept between evaluations, and what must not be found."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn.data import load_rows
from hf_unlearn.evaluation import Evaluator, ResultCache, custom_protocol, evaluator
from hf_unlearn.evaluation.cache import content_key, decode_scores, encode_scores, model_key
from hf_unlearn.evaluation.scoring import AnswerScores


def tiny_adapter():
    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()


class TestModelKey:
    def test_the_same_weights_have_the_same_key(self):
        assert model_key(tiny_llama()) == model_key(tiny_llama())
        assert model_key(tiny_llama(rms_norm_eps=1e-5)) != model_key(tiny_llama())  # a setting, no weight

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_single_weight_changes_it(self, dtype):
        model, changed = tiny_llama().to(dtype), tiny_llama().to(dtype)
        weight = changed.model.layers[1].mlp.down_proj.weight.data
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(1.0, dtype=dtype))
        assert model_key(changed) != model_key(model)

    def test_a_sign_or_two_weights_that_change_places_change_it(self):
        keys = {model_key(tiny_llama())}
        for change in (lambda weight: weight.neg(), lambda weight: weight.flip(0)):
            model = tiny_llama()
            model.model.norm.weight.data = change(torch.arange(64.0))
            keys.add(model_key(model))
        assert len(keys) == 3

    def test_the_dtype_changes_it(self):
        assert model_key(tiny_llama().double()) != model_key(tiny_llama())

    def test_the_scale_and_the_switch_of_an_adapter_change_it(self):
        model = tiny_adapter()
        keys = {model_key(model)}
        layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
        layer.scaling["default"] *= -1
        keys.add(model_key(model))
        model.disable_adapter_layers()
        keys.add(model_key(model))
        assert len(keys) == 3


def test_every_part_of_a_key_counts():
    keys = [content_key("model", 1.0, [1, 2], [[3]]), content_key("model", 1.0, [1], [[2, 3]])]
    keys += [content_key("model", None, [1, 2], [[3]]), content_key("other", 1.0, [1, 2], [[3]])]
    assert len(set(keys)) == 4


def test_scores_come_back_to_the_last_bit():
    values = np.array([-0.1, -1e-45, -np.inf, np.nan, np.float32(-1 / 3)], dtype=np.float32)
    first = AnswerScores(values, values > -1, True, mean=values * 3, std=values, kl=values / 7)
    second = AnswerScores(values[:0], values[:0] > 0, False)
    for score, back in zip([first, second], decode_scores(encode_scores([first, second])), strict=True):
        for field in dataclasses.fields(AnswerScores):
            before, after = getattr(score, field.name), getattr(back, field.name)
            if isinstance(before, np.ndarray):
                assert after.dtype == before.dtype
                assert after.tobytes() == before.tobytes()
            else:
                assert after == before


RESULTS = {"a": "日本\u2028語 é\n", "b": [{"log_probs": "AAAA"}], "c": "\x85 last 語"}


def test_results_are_there_again(tmp_path):
    cache = ResultCache(tmp_path / "deep" / "cache")
    cache.put(RESULTS)
    cache.remember({"d": 1})
    assert [cache.get(key) for key in "abcd"] == [*RESULTS.values(), 1]
    again = ResultCache(tmp_path / "deep" / "cache")
    assert [again.get(key) for key in "abcd"] == [*RESULTS.values(), None]


def test_a_file_cut_anywhere_loses_the_cut_line_only(tmp_path):
    ResultCache(tmp_path).put(RESULTS)
    (file,) = tmp_path.glob("*.jsonl")
    content = file.read_bytes()
    ends = [position for position, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == 3
    for length in range(len(content)):
        file.write_bytes(content[:length])
        cache = ResultCache(tmp_path)
        kept = [cache.get(key) is not None for key in "abc"]
        assert kept == [length >= end for end in ends]
        cache.put({"new": length})
        cache = ResultCache(tmp_path)
        assert cache.get("new") == length
        assert [cache.get(key) is not None for key in "abc"] == kept


class TestEvaluation:
    """An evaluator with a cache, and how many rows it computes."""

    @pytest.fixture(autouse=True)
    def computed(self, monkeypatch):
        counts = {"scored": 0, "answered": 0}

        def count(name, kind):
            original = getattr(evaluator, name)

            def counting(model, rows, *args, **kwargs):
                counts[kind] += len(rows)
                return original(model, rows, *args, **kwargs)

            monkeypatch.setattr(evaluator, name, counting)

        count("score_answers", "scored")
        count("generate_answers", "answered")
        return counts

    def run(self, folder, model=None, alpha=None, max_new_tokens=3, **changes):
        rows = {name: changes.get(name, tiny_rows(5, seed)) for seed, name in enumerate(("forget", "retain"))}
        protocol = custom_protocol(
            {name: load_rows(content) for name, content in rows.items()}, chat=False, max_new_tokens=max_new_tokens
        )
        cache = ResultCache(folder) if folder is not None else None
        model = model if model is not None else tiny_llama()
        return Evaluator(
            model, tiny_tokenizer(), protocol, batch_size=2, cache=cache, progress=False, **changes.get("options", {})
        ).evaluate(alpha)

    def test_a_second_run_computes_nothing_and_gives_the_same_to_the_last_bit(self, tmp_path, computed):
        plain = self.run(None)
        first = self.run(tmp_path)
        assert computed == {"scored": 20, "answered": 20}
        second = self.run(tmp_path)
        assert computed == {"scored": 20, "answered": 20}
        assert second == first == plain

    def test_an_interrupted_run_goes_on(self, tmp_path, computed):
        model, passes = tiny_llama(), []

        def interrupt(module, args, output):
            passes.append(args)
            if len(passes) == 8:  # 3 batches of forget rows (prompts, then answers) and a first token of an answer
                raise KeyboardInterrupt

        handle = model.model.embed_tokens.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path, model)
        handle.remove()
        computed.update(scored=0, answered=0)
        resumed = self.run(tmp_path, model)
        assert computed == {"scored": 5, "answered": 10}
        assert resumed == self.run(None)

    def test_an_interruption_between_batches_of_a_set_keeps_those_done(self, tmp_path, computed):
        model, passes = tiny_llama(), []
        handle = model.model.embed_tokens.register_forward_hook(
            lambda module, args, output: passes.append(args) if len(passes) < 4 else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            self.run(tmp_path, model)
        handle.remove()
        computed.update(scored=0, answered=0)
        assert self.run(tmp_path, model) == self.run(None)
        assert computed["scored"] == 10 - 4 + 10

    def test_other_rows_are_computed_and_the_rest_is_not(self, tmp_path, computed):
        self.run(tmp_path)
        rows = tiny_rows(5, 0)
        rows[1]["completion"] += " w9"
        rows[2]["prompt"] += " w9"
        computed.update(scored=0, answered=0)
        changed = self.run(tmp_path, forget=rows)
        assert computed == {"scored": 2, "answered": 1}  # an answer does not depend on the right one
        plain = self.run(None, forget=rows)
        assert changed.answers == plain.answers
        assert changed.rows["forget"]["loss"] == pytest.approx(plain.rows["forget"]["loss"], abs=1e-5)

    def test_other_max_new_tokens(self, tmp_path, computed):
        self.run(tmp_path)
        computed.update(scored=0, answered=0)
        self.run(tmp_path, max_new_tokens=4)
        assert computed == {"scored": 0, "answered": 10}

    def test_other_weights(self, tmp_path, computed):
        self.run(tmp_path)
        model = tiny_llama()
        model.model.norm.weight.data[0] += 1e-3
        computed.update(scored=0, answered=0)
        self.run(tmp_path, model)
        assert computed == {"scored": 10, "answered": 10}

    def test_other_ends_of_an_answer(self, tmp_path, computed):
        self.run(tmp_path)
        model = tiny_llama()
        model.generation_config.eos_token_id = [2, 9]
        computed.update(scored=0, answered=0)
        self.run(tmp_path, model)
        assert computed == {"scored": 0, "answered": 10}

    def test_another_alpha(self, tmp_path, computed):
        torch.manual_seed(0)
        model = tiny_adapter()
        for number, alpha in enumerate((0.0, 1.0, 1.0001, None), start=1):
            self.run(tmp_path, model, alpha)
            assert computed == {"scored": 10 * number, "answered": 10 * number}
        self.run(tmp_path, model, 1.0)
        assert computed == {"scored": 40, "answered": 40}

    def test_another_reference_of_the_kl(self, tmp_path, computed):
        for number, seed in enumerate((1, 2), start=1):
            self.run(tmp_path, options={"reference_model": tiny_llama(seed)})
            # the KL is that of the retain set only
            assert computed["scored"] == (10 if number == 1 else 15)
        self.run(tmp_path, options={"reference_model": tiny_llama(2)})
        assert computed["scored"] == 15
