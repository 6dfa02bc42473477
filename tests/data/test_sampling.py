"""Retain rows sampled from a model: their distribution, their determinism, what is dropped and what is cached."""

from __future__ import annotations

import json
import logging
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
import scipy.stats
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from hf_unlearn import UnlearningError, load_rows
from hf_unlearn.data.overlap import ForgetOverlap, words_of
from hf_unlearn.data.sampling import (
    Sampling,
    draw_tokens,
    instructions,
    planned_retain_set,
    sample_retain_set,
    write_rows,
)


SCRIPT = Path(__file__).parents[1] / "distributed" / "sample_tiny.py"
BOS, EOS = 1, 2


def chat_tokenizer():
    """Says the number of letters of the question, as the tiny vocabulary knows no other words."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "<s>{% for message in messages %} w{{ message.content | length % 60 + 4 }}{% endfor %}"
        "{% if add_generation_prompt %} w9{% endif %}"
    )
    return tokenizer


def sample(folder, model=None, tokenizer=None, **options) -> Dataset:
    options = {"num_rows": 12, "max_new_tokens": 8, "cache_dir": folder, "progress": False} | options
    return sample_retain_set(model or tiny_llama(), tokenizer or tiny_tokenizer(), **options)


def texts(rows: Dataset) -> list[str]:
    return [row["text"] if "text" in row else row["completion"][0]["content"] for row in rows]


def p_value(observed: Counter, probabilities: torch.Tensor, keep: range) -> float:
    """Chi-square of token counts against a distribution, both restricted to the tokens of `keep`."""
    total = sum(observed[token] for token in keep)
    expected = (probabilities[keep].double() / probabilities[keep].double().sum() * total).tolist()
    rare = [index for index, count in enumerate(expected) if count < 5]
    counts = [observed[token] for token in keep]

    def pooled(values: list[float]) -> list[float]:
        rest = sum(values[index] for index in rare)
        return [value for index, value in enumerate(values) if index not in rare] + ([rest] if rest else [])

    return scipy.stats.chisquare(pooled(counts), pooled(expected)).pvalue


class TestDrawing:
    LOGITS = torch.tensor([0.5, 0.0, 0.3, 0.2]).log()

    @pytest.mark.parametrize(
        ("uniform", "token"), [(0.0, 0), (0.49, 0), (0.51, 2), (0.79, 2), (0.81, 3), (1 - 2**-40, 3)]
    )
    def test_cumulative_distribution_by_hand(self, uniform, token):
        assert draw_tokens(self.LOGITS[None], torch.tensor([uniform], dtype=torch.float64), 1.0, 1.0).item() == token

    @pytest.mark.parametrize(("uniform", "token"), [(0.62, 0), (0.63, 2), (0.999, 2)])
    def test_top_p_by_hand(self, uniform, token):
        """0.5 is short of 0.6, so the second likeliest joins: 0.5 / 0.8 = 0.625."""
        assert draw_tokens(self.LOGITS[None], torch.tensor([uniform], dtype=torch.float64), 1.0, 0.6).item() == token

    @pytest.mark.parametrize(("uniform", "token"), [(0.65, 0), (0.66, 2), (0.89, 2), (0.90, 3)])
    def test_temperature_by_hand(self, uniform, token):
        """At 1/2 the probabilities are squared: 25, 9 and 4 of 38."""
        assert draw_tokens(self.LOGITS[None], torch.tensor([uniform], dtype=torch.float64), 0.5, 1.0).item() == token

    def test_rows_are_independent(self):
        logits = torch.stack([self.LOGITS, self.LOGITS.flip(0)])
        assert draw_tokens(logits, torch.tensor([0.1, 0.1]), 1.0, 1.0).tolist() == [0, 0]
        assert draw_tokens(logits, torch.tensor([0.9, 0.9]), 1.0, 1.0).tolist() == [3, 3]


class TestDistribution:
    @pytest.mark.parametrize("temperature", [1.0, 1.6])
    def test_first_tokens_are_those_of_the_models_softmax(self, tmp_path, temperature):
        model = tiny_llama()
        rows = sample(tmp_path, model, num_rows=4000, max_new_tokens=1, temperature=temperature)
        observed = Counter(int(text[1:]) for text in texts(rows))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[BOS]])).logits[0, -1]
        assert p_value(observed, torch.softmax(logits / temperature, -1), range(4, 64)) > 1e-3
        other = torch.softmax(logits / (2.6 - temperature), -1)
        assert p_value(observed, other, range(4, 64)) < 1e-9  # the test can tell

    def test_second_tokens_depend_on_the_first(self, tmp_path):
        model = tiny_llama()
        rows = sample(tmp_path, model, num_rows=6000, max_new_tokens=2)
        pairs = Counter(tuple(int(word[1:]) for word in text.split()) for text in texts(rows))
        first = Counter(pair[0] for pair in pairs.elements()).most_common(1)[0][0]
        observed = Counter({pair[1]: count for pair, count in pairs.items() if pair[0] == first and len(pair) == 2})
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[BOS, first]])).logits[0, -1]
        assert sum(observed.values()) > 300
        assert p_value(observed, torch.softmax(logits, -1), range(4, 64)) > 1e-3

    def test_without_bos_and_eos_the_first_token_is_of_the_unigram(self, tmp_path):
        tokenizer = tiny_tokenizer()
        tokenizer.bos_token = tokenizer.eos_token = None
        model = tiny_llama()
        rows = sample(tmp_path, model, tokenizer, num_rows=4000, max_new_tokens=1)
        # A start that is a special token is not in the text, so these are left out on both sides.
        observed = Counter(int(text.split()[0][1:]) for text in texts(rows) if len(text.split()) == 2)
        with torch.no_grad():
            logits = model(input_ids=torch.arange(64)[:, None]).logits[:, -1]
        distributions = torch.softmax(logits, -1)
        followed = distributions[:, 4:].sum(1)  # by an ordinary word
        assert p_value(observed, distributions.mean(0) * followed, range(4, 64)) > 1e-3

    @pytest.mark.parametrize("architecture", ["llama", "mamba"])
    def test_cold_samples_are_the_greedy_answers(self, tmp_path, architecture):
        model = tiny_llama()
        if architecture == "mamba":
            torch.manual_seed(0)
            sizes = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
            config = AutoConfig.for_model("mamba", vocab_size=64, eos_token_id=2, initializer_range=0.2, **sizes)
            model = AutoModelForCausalLM.from_config(config).eval()
        tokenizer = chat_tokenizer()
        rows = sample(tmp_path, model, tokenizer, temperature=1e-4, num_rows=6)
        assert len(rows) >= 3
        for row in rows:
            ids = torch.tensor([tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]])
            output = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=EOS, pad_token_id=0)
            answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            assert row["completion"] == [{"role": "assistant", "content": answer.strip()}]


class TestDeterminism:
    @pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), chat_tokenizer()], ids=["text", "chat"])
    def test_whatever_the_batch_size(self, tmp_path, tokenizer):
        results = [
            texts(sample(tmp_path / str(size), tokenizer=tokenizer, num_rows=23, batch_size=size))
            for size in (1, 7, "auto")
        ]
        assert results[0] == results[1] == results[2]
        assert len(set(results[0])) > 15

    def test_more_rows_begin_with_the_same(self, tmp_path):
        few, many = (texts(sample(tmp_path, num_rows=number)) for number in (10, 30))
        assert many[: len(few)] == few

    def test_another_seed_gives_others(self, tmp_path):
        rows = [sample(tmp_path, tokenizer=chat_tokenizer(), seed=seed) for seed in (0, 1)]
        assert rows[0]["prompt"][:] != rows[1]["prompt"][:]
        assert texts(rows[0]) != texts(rows[1])

    def test_two_processes_give_what_one_gives(self, interpreters, tmp_path):
        interpreters.launch(SCRIPT, tmp_path)
        facts = [json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in range(2)]
        assert [fact["processes"] for fact in facts] == [2, 2]
        expected = sample(tmp_path / "one", num_rows=9).to_list()
        assert facts[0]["rows"] == facts[1]["rows"] == expected
        assert 0 < facts[0]["decoded"] < 9  # each process its share
        assert facts[0]["decoded"] + facts[1]["decoded"] >= 9
        assert facts[0]["again"] == facts[1]["again"] == expected
        assert facts[0]["decoded_again"] == facts[1]["decoded_again"] == 0


class TestReference:
    def test_the_adapter_is_off(self, tmp_path):
        model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        assert texts(sample(tmp_path / "a", model)) == texts(sample(tmp_path / "b"))

    def test_no_dropout_and_the_mode_comes_back(self, tmp_path):
        model = tiny_llama(attention_dropout=0.5).train()
        assert texts(sample(tmp_path / "a", model)) == texts(sample(tmp_path / "b"))
        assert model.training

    def test_texts_end_where_the_models_positions_do(self, tmp_path):
        rows = sample(tmp_path, num_rows=60, max_new_tokens=128)
        assert max(len(text.split()) for text in texts(rows)) == 63  # and BOS
        with pytest.raises(UnlearningError, match="has 2 positions"):
            sample(tmp_path, tiny_llama(max_position_embeddings=2), chat_tokenizer())

    def test_sharded_weights_are_refused(self, tmp_path):
        model = tiny_llama()
        next(model.parameters()).ds_id = 0
        with pytest.raises(UnlearningError, match="ZeRO-3.*hf-unlearn sample"):
            sample(tmp_path, model)


class TestWhatIsKept:
    def test_rows_that_overlap_the_forget_set_are_dropped_and_counted(self, tmp_path, caplog):
        everything = sample(tmp_path, num_rows=30)
        secret = next(text for text in texts(everything) if len(text.split()) == 8)
        forget = [{"prompt": "", "completion": " ".join(secret.split()[2:7])}]
        caplog.clear()
        rows = sample(tmp_path, num_rows=30, forget=forget)
        assert texts(rows) == [text for text in texts(everything) if text != secret]
        assert "1 that overlap the forget set" in caplog.text
        kept = [path.read_text() for path in tmp_path.glob("*.json")]
        assert sum(secret in text for text in kept) == 1  # in the file without a forget set only

    def test_loops_and_nothing_are_dropped_and_counted(self, tmp_path, caplog):
        """A cold model of this kind runs into loops."""
        rows = sample(tmp_path, temperature=1e-4, num_rows=40, max_new_tokens=40, tokenizer=chat_tokenizer())
        assert 0 < len(rows) < 40
        assert "that are no language" in caplog.text
        assert f"{len(rows)} of 40" in caplog.text

    def test_where_none_is_left(self, tmp_path):
        model = tiny_llama()
        model.generation_config.eos_token_id = list(range(64))
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": [f"w{index}" for index in range(4, 64)]})
        with pytest.raises(UnlearningError, match="None of the 12 rows.*12 without an answer"):
            sample(tmp_path, model, tokenizer)
        assert not list(tmp_path.iterdir())


class TestCache:
    def test_a_second_call_reads_the_rows(self, tmp_path, caplog):
        first = sample(tmp_path)
        (file,) = tmp_path.iterdir()
        model = tiny_llama()
        model.register_forward_pre_hook(lambda *args: pytest.fail("the model ran"))
        model.model.register_forward_pre_hook(lambda *args: pytest.fail("the model ran"))
        caplog.clear()
        assert sample(tmp_path, model).to_list() == first.to_list()
        assert f"read from {file}" in caplog.text
        assert load_rows(file).to_list() == first.to_list()

    def test_anything_that_changes_the_rows_has_a_file_of_its_own(self, tmp_path):
        changed = tiny_llama()
        changed.model.layers[1].mlp.down_proj.weight.data[3] += 0.5
        other = chat_tokenizer()
        other.chat_template += " "
        variants = [
            {},
            {"model": changed},
            {"model": tiny_llama(rope_theta=100.0)},
            {"tokenizer": chat_tokenizer()},
            {"tokenizer": other},
            {"num_rows": 13},
            {"temperature": 1.1},
            {"top_p": 0.9},
            {"max_new_tokens": 7},
            {"seed": 1},
            {"forget": [{"prompt": "w1", "completion": "w2 w3 w4"}]},
        ]
        for number, variant in enumerate(variants, start=1):
            sample(tmp_path, **variant)
            assert len(list(tmp_path.iterdir())) == number, variant
        sample(tmp_path, batch_size=3)
        assert len(list(tmp_path.iterdir())) == len(variants)

    def test_a_damaged_file_is_written_anew(self, tmp_path, caplog):
        first = sample(tmp_path)
        (file,) = tmp_path.iterdir()
        whole = file.read_text()
        file.write_text(whole[:-5])
        assert sample(tmp_path).to_list() == first.to_list()
        assert "damaged" in caplog.text
        assert [path.read_text() for path in tmp_path.iterdir()] == [whole]

    def test_a_run_that_fails_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(self, target):
            raise OSError("no")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="no"):
            sample(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_its_place(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
        sample(None)
        assert len(list((tmp_path / "hf_unlearn" / "retain").iterdir())) == 1


class TestInstructions:
    def test_they_are_many_and_different(self):
        lines = instructions()
        assert len(lines) >= 120
        assert len({" ".join(words_of(line)) for line in lines}) == len(lines)
        assert all(line.strip() == line and line for line in lines)

    @pytest.mark.parametrize("split", ["forget", "retain", "holdout"])
    def test_none_touches_the_sample_sets(self, split):
        rows = load_rows(f"people/{split}")
        asked = {" ".join(words_of(row["question"])) for row in rows}
        names = {word for row in rows for word in words_of(row["person"])}
        overlap = ForgetOverlap({"prompt": "", "completion": f"{row['question']} {row['answer']}"} for row in rows)
        for line in instructions():
            assert " ".join(words_of(line)) not in asked
            assert names.isdisjoint(words_of(line)), line
            assert not overlap.has({"prompt": "", "completion": line}), line

    def test_they_come_with_the_package(self):
        assert (resources.files("hf_unlearn.data") / "instructions.txt").is_file()

    def test_all_are_asked_before_one_is_asked_again(self):
        count = len(instructions())
        asked = [prompt[0]["content"] for prompt in Sampling(num_rows=count + 5).prompts()]
        assert sorted(asked[:count]) == sorted(instructions())
        assert asked[count:] == asked[:5]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_rows", 0),
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ],
)
def test_options_that_make_no_sense(tmp_path, option, value):
    with pytest.raises(UnlearningError, match=option):
        sample(tmp_path, **{option: value})


def test_planned_rows_are_as_large_as_rows_can_get():
    chat = planned_retain_set(chat_tokenizer(), Sampling(num_rows=3, max_new_tokens=10), None)
    assert [len(ids) for ids in chat["input_ids"]] == [3 + 10 + 1] * 3  # BOS, question, w9; EOS
    assert [sum(label != -100 for label in labels) for labels in chat["labels"]] == [11] * 3
    cut = planned_retain_set(tiny_tokenizer(), Sampling(num_rows=2, max_new_tokens=10), 6)
    assert [len(ids) for ids in cut["input_ids"]] == [6, 6]


def test_rows_are_written_as_lines(tmp_path):
    rows = Dataset.from_list([{"text": "naïve \u2028 line"}, {"text": 'quote " here'}])
    write_rows(tmp_path / "new" / "rows.jsonl", rows)
    assert load_rows(tmp_path / "new" / "rows.jsonl").to_list() == rows.to_list()
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.fixture(autouse=True)
def logs(caplog):
    caplog.set_level(logging.WARNING)
