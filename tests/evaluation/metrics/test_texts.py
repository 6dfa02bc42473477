"""Metrics of generated answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_unlearn.evaluation.metrics import exact_match, is_degenerate, is_refusal, rouge, rouge_l_recall


TOFU = Path(__file__).parents[4] / "shared" / "data" / "tofu"
needs_tofu = pytest.mark.skipif(not TOFU.is_dir(), reason="needs the TOFU sets")

LOOP = "The author was born in Lima. "
GOOD_ANSWERS = [
    "Knightsbridge",
    "Iselin Bergstrøm's birthplace",
    "Basil Mahfouz Al-Kuwaiti",
    "1958",
    "1,000,000,000,000",
    "C++",
    "H2O",
    "$1,000.00",
    "New York, New York",
    "LGBTQ+",
    "McDonald's, YouTube and JavaScript",
    "Krzysztof Kieślowski, Szczecin",
    "Die Rechtsschutzversicherung übernimmt die Kosten.",
    "Donaudampfschifffahrtsgesellschaftskapitän",
    "https://example.com/a/b/c",
    "日本の首都は東京です。",
    "北京是中华人民共和国的首都，也是全国的政治中心。",
    "서울은 대한민국의 수도이며 IT기업이 많다.",
    "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "हिन्दी भारत की राजभाषा है।",
    "Москва является столицей России.",
    "القاهرة هي عاصمة مصر.",
]


# ---- ROUGE ----


def test_rouge():
    # reference: 5 words; longest common subsequence "the cat sat mat" after stemming; 6 words predicted
    scores = rouge("the cats sat on mat", "the cat sat by the mat")
    assert scores.rouge_l_recall == pytest.approx(4 / 5)
    assert scores.rouge_l_f1 == pytest.approx(2 * 4 / (5 + 6))
    assert rouge("a b c d", "d c b a") == (1.0, 0.25, 0.25)
    assert rouge_l_recall("blue", "red") == 0.0
    assert rouge("blue", "") == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("reference", "prediction", "recall"),
    [
        ("Москва — столица России", "Столица России — Москва", 2 / 3),
        ("東京は日本の首都", "東京は首都", 5 / 8),
        ("กขคง", "กค", 0.5),  # Thai: one token per character
        ("हिन्दी भारत", "हिन्दी", 0.5),  # vowel signs belong to their words
        ("القاهرة عاصمة مصر", "القاهرة", 1 / 3),
        ("서울은 수도이다", "서울은", 0.5),
        ("Η Αθήνα", "η ΑΘΉΝΑ", 1.0),  # case does not count
        ("ＡＢ東", "AB東", 1.0),  # full-width letters
    ],
)
def test_rouge_of_other_scripts_is_not_0(reference, prediction, recall):
    assert rouge_l_recall(reference, reference) == 1.0
    assert rouge_l_recall(reference, prediction) == pytest.approx(recall)


def test_mostly_latin_text_has_the_scores_of_the_field():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    for reference, prediction in [
        ("Žižek était à Genève où il écrivait", "Zizek écrivait à Genève"),
        ("The word 東京 means Tokyo, running capitals", "run capital 東京"),
        ("1958", "In 1958."),
        ("", "anything"),
    ]:
        plain = scorer.score(reference, prediction)
        expected = plain["rouge1"].recall, plain["rougeL"].recall, plain["rougeL"].fmeasure
        assert rouge(reference, prediction) == expected


# ---- Exact match ----


@pytest.mark.parametrize(
    ("reference", "prediction", "match"),
    [
        ("The Eiffel Tower", "eiffel  tower.", 1),
        ("A cat, an owl", "cat owl", 1),
        ("theatre", "atre", 0),
        ("Paris", "Paris, France", 0),
        ("«Война и мир»", "война и мир", 1),
        ("", "", 1),
    ],
)
def test_exact_match(reference, prediction, match):
    assert exact_match(reference, prediction) == match


# ---- Refusals ----


@pytest.mark.parametrize(
    "answer",
    [
        "I don't know.",
        "I’m sorry, but I don’t know who that is.",
        "I apologize, but I cannot provide information on that.",
        "I'm not familiar with this author.",
        "As an AI language model, I do not have access to that.",
        "Sorry, I can't help with that.",
        "I was unable to find any record of this person.",
        "Unfortunately, there is no information on this.",
        "There is no information about this author.",
        "No information.",
        "Not sure.",
        "I won't discuss that.",
        "That's a good question, but I don't have the answer.",
    ],
)
def test_refusals(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "The author is not known for poetry.",
        "I Know Why the Caged Bird Sings",
        "I, Robot is by Isaac Asimov.",
        "My favourite book is not long.",
        "That is not correct: the capital is Paris.",
        "No, he has not published any sequel.",
        "There is no publicly available information about Isabel's marital status.",
        "Her memoir tells of her childhood in Lima, of the years in exile, and of the day on which she said: “Enough! I "
        "don't know any more.”",  # not at its beginning
    ],
)
def test_answers_are_no_refusals(answer):
    assert not is_refusal(answer)


@needs_tofu
def test_refusals_of_tofu():
    lines = [line for line in (TOFU / "idontknow.jsonl").read_text().splitlines() if line]
    assert [line for line in lines if not is_refusal(line)] == []
    for name in ("full", "holdout10", "real_authors", "world_facts"):
        answers = [row["answer"] for row in json.loads((TOFU / f"{name}.json").read_text())]
        assert [answer for answer in answers if is_refusal(answer)] == []


# ---- Degenerate answers ----


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n",
        "the the the",
        "The book was published in 1990 and and and and and and",
        LOOP * 3,
        "She wrote four novels and two plays, all of them set in the mountains. " + LOOP * 4,
        "asdkjh qwlkej",
        "asdkjh qwlkej zxcmnb poiwer hgfdsk",
        "utherfordicznaOPCIONALMENTEhetic наtegrstva mit_ORIGINusarstaden zyńSTwoEnglishFRAncOIS",
        "a" * 60,
        "�������",
        "!!!!!!!!!!!!!!!!",
        "{ } ( ) ; ; = > < / / * *",
        "我我我我我我",
        "我不知道" * 4,
        "1 1 1 1 1 1",
    ],
)
def test_degenerate_answers(answer):
    assert is_degenerate(answer)


@pytest.mark.parametrize("answer", [*GOOD_ANSWERS, LOOP, LOOP * 2, "cut off within a character �"])
def test_answers_are_not_degenerate(answer):
    assert not is_degenerate(answer)


@needs_tofu
def test_no_answer_of_tofu_is_degenerate():
    for name in ("full", "holdout10", "real_authors", "world_facts"):
        rows = json.loads((TOFU / f"{name}.json").read_text())
        texts = [row[column] for row in rows for column in ("question", "answer")]
        assert [text for text in texts if is_degenerate(text)] == []
