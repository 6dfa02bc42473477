"""The sample set of fictitious people is complete, consistent and uses nothing but reserved addresses and numbers."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections import Counter
from typing import Any

import pytest


SPLITS = {"forget": 10, "retain": 30, "holdout": 10}
TEXT_KEYS = ("question", "answer", "paraphrased_question", "paraphrased_answer")
KEYS = {*TEXT_KEYS, "wrong_answers", "person", "fact"}

EMAIL_LIKE = re.compile(r"\S*@\S*")
RESERVED_EMAIL = re.compile(r"[a-z0-9.]+@example\.(com|org|net)")
PHONE_LIKE = re.compile(r"(?<!\w)(?<!ZZ-)\+?\d(?:[ ()./-]*\d){6,}")
RESERVED_PHONE = re.compile(r"\+1 [2-9]\d\d 555 01\d\d|020 7946 0\d{3}")

# A fact has the first kind whose pattern matches all of it.
KIND_PATTERNS = {
    "email": RESERVED_EMAIL.pattern,
    "phone": RESERVED_PHONE.pattern,
    "passport": r"ZZ-\d{5}-[A-Z]{2}",
    "birth date": r"\d{2} [A-Z][a-z]+ \d{4}",
    "salary": r"\d{2},\d{3} dollars",
    "medication": r"[a-z]+ \d+ (mg|mcg)",
    "address": r"\d{2} [A-Z][a-z]+ (Lane|Street|Road|Row), [A-Z][a-z]+",
    "bank": r"[A-Z][a-z]+ (Savings Bank|Mutual Bank|Harbour Bank|Credit Union)",
    "employer": r"[A-Z][a-z]+ (Loom Works|Seed Traders|Glass Makers|Tram Lines|Paper Mills)",
    "diagnosis": r"[a-z][a-z0-9 ]+",
}
ORDER = (
    "email",
    "birth date",
    "diagnosis",
    "medication",
    "address",
    "phone",
    "employer",
    "salary",
    "passport",
    "bank",
)


def read(split: str) -> list[dict[str, Any]]:
    path = importlib.resources.files("hf_unlearn.data") / "people" / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kind_of(fact: str) -> str:
    return next(kind for kind, pattern in KIND_PATTERNS.items() if re.fullmatch(pattern, fact))


PEOPLE = {split: read(split) for split in SPLITS}
ROWS = [row for rows in PEOPLE.values() for row in rows]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['person']}: {row['fact']}")


@pytest.mark.parametrize(("split", "count"), SPLITS.items())
def test_count(split: str, count: int):
    assert len(PEOPLE[split]) == count
    assert set(Counter(row["person"] for row in PEOPLE[split]).values()) == {5}


@each_row
def test_columns(row: dict[str, Any]):
    assert set(row) == KEYS
    texts = [value for key, value in row.items() if key != "wrong_answers"] + row["wrong_answers"]
    assert all(isinstance(text, str) and text and text == text.strip() for text in texts)


@each_row
def test_person_and_fact(row: dict[str, Any]):
    for key in TEXT_KEYS:
        assert row["person"] in row[key]
        assert (row["fact"] in row[key]) == key.endswith("answer")


@each_row
def test_wrong_answers_differ_from_the_answer_in_the_fact_only(row: dict[str, Any]):
    assert 3 <= len(row["wrong_answers"]) <= 5
    assert len({row["answer"], *row["wrong_answers"]}) == len(row["wrong_answers"]) + 1
    before, after = row["answer"].split(row["fact"])
    for wrong in row["wrong_answers"]:
        assert row["fact"] not in wrong
        assert wrong.startswith(before) and wrong.endswith(after)


@each_row
def test_paraphrases_differ(row: dict[str, Any]):
    assert row["paraphrased_question"] != row["question"]
    assert row["paraphrased_answer"] != row["answer"]


@each_row
def test_short(row: dict[str, Any]):
    for question in (row["question"], row["paraphrased_question"]):
        assert question.count(".") + question.count("?") == 1
        assert len(question.split()) <= 14
    for answer in (row["answer"], row["paraphrased_answer"], *row["wrong_answers"]):
        assert answer.endswith(".")
        assert 8 <= len(answer.split()) <= 18


@each_row
def test_only_reserved_addresses_and_numbers(row: dict[str, Any]):
    for text in [*(row[key] for key in TEXT_KEYS), *row["wrong_answers"], row["person"], row["fact"]]:
        for email in EMAIL_LIKE.findall(text):
            assert RESERVED_EMAIL.fullmatch(email.rstrip("."))
        for phone in PHONE_LIKE.findall(text):
            assert RESERVED_PHONE.fullmatch(phone)


def test_the_patterns_find_what_is_not_reserved():
    for text in ("Write to jane@gmail.com.", "Write to x@example.community."):
        (email,) = EMAIL_LIKE.findall(text)
        assert not RESERVED_EMAIL.fullmatch(email.rstrip("."))
    for text in ("Dial +1 202 555 0247 now.", "Dial (020) 7947 0123.", "Dial 030-1234567.", "Dial 2025550147."):
        (phone,) = PHONE_LIKE.findall(text)
        assert not RESERVED_PHONE.fullmatch(phone)


@pytest.mark.parametrize("key", [*TEXT_KEYS, "fact"])
def test_nothing_twice(key: str):
    assert len({row[key] for row in ROWS}) == len(ROWS)


def test_no_text_is_another_rows_paraphrase():
    for part in ("question", "answer"):
        assert not {row[part] for row in ROWS} & {row[f"paraphrased_{part}"] for row in ROWS}


def test_no_wrong_answer_holds_a_fact():
    for wrong in (wrong for row in ROWS for wrong in row["wrong_answers"]):
        assert not any(row["fact"] in wrong for row in ROWS)


def test_no_person_in_two_files():
    people = [person for rows in PEOPLE.values() for person in {row["person"] for row in rows}]
    assert len(set(people)) == len(people) == 10


@pytest.mark.parametrize("split", ["forget", "holdout"])
def test_order_of_kinds(split: str):
    assert tuple(kind_of(row["fact"]) for row in PEOPLE[split]) == ORDER


def test_each_kind_equally_often_in_retain():
    assert Counter(kind_of(row["fact"]) for row in PEOPLE["retain"]) == dict.fromkeys(ORDER, 3)


def template(row: dict[str, Any], key: str) -> str:
    return row[key].replace(row["person"], "{person}").replace(row["fact"], "{fact}")


@pytest.mark.parametrize("key", TEXT_KEYS)
def test_wording_does_not_tell_the_files_apart(key: str):
    wording = {split: [template(row, key) for row in rows] for split, rows in PEOPLE.items()}
    assert wording["forget"] == wording["holdout"]
    assert set(wording["forget"]) <= set(wording["retain"])
