from __future__ import annotations

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from word_tokenizer import CHAT_TEMPLATE, ids, word_tokenizer

from hf_unlearn.data import encode_pair, encode_prompt, to_prompt_completion, tokenize_rows
from hf_unlearn.errors import UnlearningError


USER = {"role": "user", "content": "who is Ada"}
SYSTEM = {"role": "system", "content": "be brief"}
ANSWER = {"role": "assistant", "content": "a poet"}


def check(encoded: dict, before: str, answer: str, num_cut: int = 0) -> None:
    assert encoded == {
        "input_ids": ids(before) + ids(answer),
        "labels": [-100] * len(ids(before)) + ids(answer),
        "num_cut": num_cut,
    }


class TestText:
    def test_bos_once_and_eos_last(self, tokenizer):
        check(encode_pair("who is Ada", " a poet", tokenizer), "<s> who is Ada", "a poet </s>")

    def test_prompt_is_the_start_of_the_pair(self, tokenizer):
        assert encode_prompt("who is Ada", tokenizer) == ids("<s> who is Ada")

    def test_eos_in_the_text_is_not_doubled(self, tokenizer):
        check(encode_pair("who is Ada", " a poet </s>", tokenizer), "<s> who is Ada", "a poet </s>")

    def test_bos_in_the_text_is_not_doubled(self, tokenizer):
        check(encode_pair("<s> who is Ada", " a poet", tokenizer), "<s> who is Ada", "a poet </s>")
        assert encode_prompt("<s> who is Ada", tokenizer) == ids("<s> who is Ada")

    def test_tokenizer_that_adds_nothing(self):
        check(encode_pair("who is", " Ada", word_tokenizer(adds="$A")), "who is", "Ada </s>")

    @pytest.mark.parametrize("prompt", ["who is", "<s> who is"])
    def test_tokenizer_that_adds_eos_itself(self, prompt):
        tokenizer = word_tokenizer(adds="<s> $A </s>")
        check(encode_pair(prompt, " Ada", tokenizer), "<s> who is", "Ada </s>")
        assert encode_prompt(prompt, tokenizer) == ids("<s> who is")

    def test_pad_that_is_eos_is_scored(self):
        check(encode_pair("who is", " Ada", word_tokenizer(pad="</s>")), "<s> who is", "Ada </s>")

    def test_bos_that_is_eos(self):
        tokenizer = word_tokenizer(adds="</s> $A", bos="</s>")
        check(encode_pair("who is", " Ada", tokenizer), "</s> who is", "Ada </s>")
        check(encode_pair("", "Ada", tokenizer), "</s>", "Ada </s>")

    def test_no_eos(self):
        check(encode_pair("who is", " Ada", word_tokenizer(eos=None)), "<s> who is", "Ada")

    def test_whole_text(self, tokenizer):
        check(encode_pair("", "Ada is a poet", tokenizer), "<s>", "Ada is a poet </s>")

    def test_first_position_is_never_scored(self):
        check(encode_pair("", "Ada is", word_tokenizer(adds="$A")), "Ada", "is </s>")

    @pytest.mark.parametrize("completion", ["", "  \n"])
    def test_empty_answer(self, tokenizer, completion):
        check(encode_pair("who is Ada", completion, tokenizer), "<s> who is Ada", "")
        check(encode_pair("who is Ada", completion, tokenizer, max_length=2), "<s> who", "")

    def test_nothing_at_all(self):
        check(encode_pair("", "", word_tokenizer(adds="$A")), "", "")


class TestTruncation:
    @pytest.mark.parametrize(
        ("max_length", "before", "answer", "num_cut"),
        [
            (None, "<s> who is Ada", "a poet </s>", 0),
            (7, "<s> who is Ada", "a poet </s>", 0),
            (6, "<s> who is Ada", "a poet", 1),
            (5, "<s> who is Ada", "a", 2),
            (4, "<s> who is Ada", "", 3),
            (2, "<s> who", "", 3),
        ],
    )
    def test_start_is_kept(self, tokenizer, max_length, before, answer, num_cut):
        check(encode_pair("who is Ada", " a poet", tokenizer, max_length), before, answer, num_cut)


class TestMergesAcrossTheBoundary:
    @pytest.fixture
    def bpe(self) -> PreTrainedTokenizerFast:
        vocabulary = {"</s>": 0, "a": 1, "b": 2, "c": 3, "d": 4, "bc": 5, "ab": 6}
        backend = Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "b")]))
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")

    def test_merged_token_belongs_to_the_answer(self, bpe):
        assert encode_prompt("da", bpe) == [4, 1]
        assert encode_prompt("db", bpe) == [4, 2]
        assert encode_pair("db", "cd", bpe) == {"input_ids": [4, 5, 4, 0], "labels": [-100, 5, 4, 0], "num_cut": 0}

    def test_merge_that_changes_tokens_before_the_boundary(self, bpe):
        assert encode_prompt("dab", bpe) == [4, 6]
        pair = encode_pair("dab", "c", bpe)
        assert pair == {"input_ids": [4, 1, 5, 0], "labels": [-100, 1, 5, 0], "num_cut": 0}

    def test_merge_at_position_0_is_not_scored(self, bpe):
        assert encode_pair("b", "cd", bpe) == {"input_ids": [5, 4, 0], "labels": [-100, 4, 0], "num_cut": 0}


def test_unicode_is_split_into_bytes_and_scored_whole():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"</s>": 0} | {char: index for index, char in enumerate(alphabet, 1)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    pair = encode_pair("é", " 雪🙂", tokenizer)
    assert pair["labels"][:2] == [-100, -100]
    assert len(pair["labels"]) == 2 + 1 + 3 + 4 + 1
    assert tokenizer.decode(pair["labels"][2:-1]) == " 雪🙂"


class TestChat:
    def test_ends_at_eos_not_at_the_line_break_after_it(self, chat_tokenizer):
        pair = encode_pair([USER], [ANSWER], chat_tokenizer)
        check(pair, "<s> <|user|> who is Ada </s> <nl> <|assistant|>", "a poet </s>")
        assert encode_prompt([USER], chat_tokenizer) == pair["input_ids"][: -len(ids("a poet </s>"))]

    def test_system_prompt(self, chat_tokenizer):
        before = "<s> <|system|> be brief </s> <nl> <|user|> who is Ada </s> <nl> <|assistant|>"
        check(encode_pair([SYSTEM, USER], [ANSWER], chat_tokenizer), before, "a poet </s>")

    def test_earlier_turns_are_prompt(self, chat_tokenizer):
        turn = "<|user|> who is Ada </s> <nl> <|assistant|>"
        pair = encode_pair([USER, ANSWER, USER], [ANSWER], chat_tokenizer)
        check(pair, f"<s> {turn} a poet </s> <nl> {turn}", "a poet </s>")

    def test_empty_answer(self, chat_tokenizer):
        pair = encode_pair([USER], [{"role": "assistant", "content": " "}], chat_tokenizer)
        check(pair, "<s> <|user|> who is Ada </s> <nl> <|assistant|>", "")

    def test_cut(self, chat_tokenizer):
        pair = encode_pair([USER], [ANSWER], chat_tokenizer, max_length=9)
        check(pair, "<s> <|user|> who is Ada </s> <nl> <|assistant|>", "a", num_cut=2)

    def test_text_in_the_generation_prompt_only(self):
        template = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think></think>{% endif %}")
        tokenizer = word_tokenizer(chat=template)
        before = "<s> <|user|> who is Ada </s> <nl> <|assistant|>"
        assert encode_prompt([USER], tokenizer) == ids(f"{before} <think> </think>")
        check(encode_pair([USER], [ANSWER], tokenizer), before, "a poet </s>")

    def test_text_in_the_full_conversation_only(self):
        template = CHAT_TEMPLATE.replace(
            "<|{{ message.role }}|>",
            "<|{{ message.role }}|>{% if message.role == 'assistant' %}<think></think>{% endif %}",
        )
        pair = encode_pair([USER], [ANSWER], word_tokenizer(chat=template))
        check(pair, "<s> <|user|> who is Ada </s> <nl> <|assistant|>", "<think> </think> a poet </s>")

    def test_template_that_ends_turns_otherwise_is_kept(self):
        tokenizer = word_tokenizer(chat=CHAT_TEMPLATE.replace("</s>", " ?"))
        check(
            encode_pair([USER], [ANSWER], tokenizer), "<s> <|user|> who is Ada ? <nl> <|assistant|>", "a poet ? <nl>"
        )


class TestRows:
    def test_columns_are_added(self, tokenizer):
        rows = datasets.Dataset.from_list(
            [{"question": "who is Ada", "answer": "a poet", "paraphrased_answer": "poet"}]
        )
        rows = to_prompt_completion(rows, name="forget set", chat=False)
        encoded = tokenize_rows(rows, tokenizer, 9, name="forget set")
        assert encoded.column_names == [
            *["prompt", "completion", "row", "paraphrased_completion"],
            *["input_ids", "labels", "num_cut"],
        ]
        row = encoded[0]
        check(
            {key: row[key] for key in ("input_ids", "labels", "num_cut")},
            "<s> Question: who is Ada Answer:",
            "a poet </s>",
        )

    def test_empty_sequences_keep_their_type(self):
        rows = datasets.Dataset.from_list([{"prompt": "", "completion": "", "row": 0}])
        encoded = tokenize_rows(rows, word_tokenizer(adds="$A"), None)
        assert encoded.features["labels"] == datasets.List(datasets.Value("int64"))

    def test_processes_agree(self, chat_tokenizer):
        rows = datasets.Dataset.from_list([{"question": "who is Ada", "answer": "a poet"}] * 3)
        rows = to_prompt_completion(rows, name="forget set", chat=True)
        one, two = (tokenize_rows(rows, chat_tokenizer, 8, num_proc=num_proc) for num_proc in (None, 2))
        assert one.to_list() == two.to_list()

    def test_template_that_refuses(self):
        template = "{{ raise_exception('no system role') if messages[0].role == 'system' }}"
        rows = datasets.Dataset.from_list([{"prompt": [SYSTEM, USER], "completion": [ANSWER], "row": 4}])
        with pytest.raises(UnlearningError, match=r"retain set, row 4: .*no system role"):
            tokenize_rows(rows, word_tokenizer(chat=template), None, name="retain set")
