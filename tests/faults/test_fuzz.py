"""Every reader on random input: it succeeds, or refuses in a sentence that names what it read; nothing else is raised."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_adapters import save_random
from tiny import tiny_llama, tiny_tokenizer

from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.cli.train_options import LoraModelConfig, TrainArguments
from hf_unlearn.data import encode_set, load_rows
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.logs import read_log
from hf_unlearn.extrapolation import LoraAdapter, SafetensorsCheckpoint, verify_fingerprint_files
from hf_unlearn.requests import Ledger
from hf_unlearn.trainer import ExtrapolationConfig


WORDS = st.one_of(
    st.sampled_from(["", " ", "w5", "w6 w7", "None", "nan", "\ud800", "\x00", "</s>"]), st.text(max_size=8)
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    WORDS,
    st.sampled_from([0, 1, 2, 16, "1", 1e400]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)
DEEP = "[" * 2000
LONG_NUMBER = "[" + "1" * 4400 + "]"


def fuzz(examples: int) -> Callable:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=checks,
        phases=[Phase.explicit, Phase.generate],  # shrinking a failure would take minutes
    )


def read_or_refused(read: Callable[[], object], *names: str) -> bool:
    """Whether it was read; otherwise the refusal must be a sentence that holds one of the names."""
    try:
        read()
    except UnlearningError as error:
        message = str(error)
        assert message.rstrip().endswith("."), message
        assert len(message.split()) > 4, message
        assert any(name in message for name in names), message
        return False
    return True


# ---- Rows ----

COLUMNS = st.sampled_from(
    [
        "prompt",
        "completion",
        "messages",
        "conversations",
        "question",
        "answer",
        "instruction",
        "input",
        "output",
        "text",
        "row",
        "input_ids",
        "paraphrased_question",
        "paraphrased_answer",
        "wrong_answers",
        "perturbed_answer",
        "",
    ]
)
SHAPES = st.sampled_from(
    [
        ("prompt", "completion"),
        ("messages",),
        ("conversations",),
        ("question", "answer"),
        ("instruction", "output"),
        ("text",),
        ("question", "answer", "wrong_answers", "paraphrased_question"),
    ]
)
MESSAGES = st.lists(
    st.one_of(
        st.none(),
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "", None]), "content": WORDS}),
        st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "robot", None]), "value": SCALARS}),
    ),
    max_size=3,
)
CELLS = st.one_of(WORDS, WORDS, MESSAGES, VALUES)
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}w4{% endif %}"


@st.composite
def rows(draw) -> list:
    """Rows that all have the columns of one shape, and seldom what no row is."""
    shape = draw(SHAPES)
    row = st.fixed_dictionaries(dict.fromkeys(shape, CELLS), optional={"input": CELLS, "": VALUES})
    other = st.one_of(VALUES, st.dictionaries(COLUMNS, CELLS, max_size=4))
    return draw(st.one_of(st.lists(row, min_size=1, max_size=3), st.lists(row | other, max_size=3)))


@pytest.fixture(scope="module")
def tokenizers():
    plain, chat = tiny_tokenizer(), tiny_tokenizer()
    chat.chat_template = CHAT
    return plain, chat


@fuzz(150)
@given(rows=rows(), chat=st.booleans(), in_file=st.booleans())
def test_rows(rows, chat, in_file, tokenizers, tmp_path):
    source = rows
    if in_file:
        source = tmp_path / "rows.json"
        source.write_text(json.dumps(rows))
    read_or_refused(
        lambda: encode_set(load_rows(source, name="forget set"), tokenizers[chat], 12, name="forget set"), "forget set"
    )


def test_rows_of_both_kinds_are_read_or_refused(tokenizers):
    """Empty cells fit text and messages alike, so a set may become both."""
    message = [{"role": "user", "content": "w5"}], [{"role": "assistant", "content": "w6"}]
    rows = [{"prompt": None, "completion": None}, {"prompt": message[0], "completion": message[1]}]
    assert not read_or_refused(lambda: encode_set(load_rows(rows), tokenizers[1], 12), "dataset, row 1")


TEXT = st.one_of(
    st.text(max_size=30),
    st.text(alphabet='[]{}",:01.eE-\\u d8"\n\r\ta', max_size=40),
    VALUES.map(json.dumps),
    st.lists(VALUES, max_size=3).map(lambda values: "\n".join(map(json.dumps, values))),
    st.lists(st.lists(WORDS, max_size=3), max_size=3).map(lambda cells: as_csv(cells)),
    st.sampled_from(
        [DEEP, LONG_NUMBER, '[{"text": ' + DEEP + "}]", "NaN", "[NaN]", '[{"text": 1e999}]', '{"data": 0}']
    ),
)


def as_csv(rows: list[list[str]]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows([["prompt", "completion"], *rows])
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
@fuzz(60)
@given(content=st.one_of(st.binary(max_size=20), TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_bytes_of_rows(content, suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(content)
    if suffix == "parquet" and content[:4] == b"PAR1":
        return
    read_or_refused(lambda: load_rows(str(path), name="retain set"), "retain set")


# ---- Options ----

OPTIONS = st.sampled_from(
    [
        "model_name_or_path",
        "learning_rate",
        "alpha",
        "output_dir",
        "rounds",
        "retain_kl_weight",
        "lora_r",
        "method",
        "lora_target_modules",
        "max_steps",
        "overwrite",
        "eval_strategy",
        "seed",
        "report_to",
        "forget_dataset",
        "env",
        "model_init_kwargs",
        "gradient_checkpointing",
        "optim",
        "max_length",
        "config",
        "no_such_option",
        "1",
    ]
)
YAML = st.one_of(
    st.binary(max_size=20),
    st.dictionaries(OPTIONS, VALUES, max_size=3).map(lambda options: yaml.safe_dump(options).encode()),
    st.sampled_from(
        ["!!python/object/apply:os.system [true]", "- a", "a: &a [*a]", "1: 2", "? [a]\n: b", "env: {a=b: 1}"]
    ).map(str.encode),
)


@fuzz(120)
@given(content=YAML)
def test_options(content, tmp_path, capsys, monkeypatch):
    path = tmp_path / "train.yaml"
    path.write_bytes(content)
    monkeypatch.setattr("os.environ", dict(__import__("os").environ))  # `env` sets variables
    parser = CommandParser("train", [TrainArguments, ExtrapolationConfig, LoraModelConfig], "", "")

    def parse() -> None:
        try:
            parser.parse(["--config", str(path), "--use_cpu", "--output_dir", "out"])
        except SystemExit:  # of argparse, with a line that names the option
            assert "error: argument --" in capsys.readouterr().err

    read_or_refused(parse, "onfig file", "`", "=", "--", "is not a valid")


# ---- Adapters ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(folder / "base")
    adapter = save_random(folder / "adapter", seed=0).folder
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(weights[:8], "little")
    return SimpleNamespace(
        base=folder / "base",
        adapter=adapter,
        config=json.loads((adapter / "adapter_config.json").read_text()),
        header=json.loads(weights[8 : 8 + length]),
        content=weights[8 + length :],
    )


def with_file(saved: SimpleNamespace, folder: Path, name: str, content: bytes) -> Path:
    """The adapter with one file replaced."""
    shutil.copytree(saved.adapter, folder / "adapter", dirs_exist_ok=True)
    (folder / "adapter" / name).write_bytes(content)
    return folder / "adapter"


CONFIG_KEYS = st.sampled_from(
    [
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "fan_in_fan_out",
        "use_rslora",
        "peft_type",
        "task_type",
        "bias",
        "base_model_name_or_path",
        "modules_to_save",
        "layers_to_transform",
        "init_lora_weights",
        "use_dora",
        "revision",
        "auto_mapping",
        "lora_dropout",
        "exclude_modules",
        "runtime_config",
        "peft_version",
        "unknown",
    ]
)
PATTERNS = st.dictionaries(st.sampled_from(["(", "q_proj", ".*", "[", ""]), SCALARS, max_size=2)


@fuzz(150)
@given(changes=st.dictionaries(CONFIG_KEYS, VALUES | PATTERNS, min_size=1, max_size=2))
def test_configurations_of_adapters(changes, saved, tmp_path):
    folder = with_file(saved, tmp_path, "adapter_config.json", json.dumps(saved.config | changes).encode())
    read_or_refused(lambda: load_and_use(folder), "adapter_config.json", "adapter_model.safetensors", "`")


@fuzz(25)
@given(content=st.binary(max_size=20) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_bytes_of_configurations(content, saved, tmp_path):
    folder = with_file(saved, tmp_path, "adapter_config.json", content)
    read_or_refused(lambda: load_and_use(folder), "adapter_config.json", "`peft_config`", "Train with LoRA")


def load_and_use(folder: Path) -> None:
    adapter = LoraAdapter.load(folder)
    for module in adapter.modules:
        adapter.delta(module)


ENTRY_CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "F8_E5M2", "BF16", "nonsense", None, 7, ["F32"]]),
        "shape": st.one_of(st.lists(st.integers(-2, 70) | SCALARS, max_size=3), VALUES),
        "data_offsets": st.one_of(st.lists(st.integers(-9, 10**7) | SCALARS, max_size=3), VALUES),
    },
)


@fuzz(150)
@given(
    changes=ENTRY_CHANGES,
    at=st.integers(0, 3),
    metadata=VALUES,
    name=st.none() | WORDS,
    cut=st.sampled_from([0, 0, 1]),
)
def test_headers_of_weights(changes, at, metadata, name, cut, saved, tmp_path):
    header = json.loads(json.dumps(saved.header))
    tensor = list(header)[at]
    header[tensor] |= changes
    header["__metadata__"] = metadata
    if name is not None:
        header[name] = header.pop(tensor)
    encoded = json.dumps(header).encode()
    content = len(encoded).to_bytes(8, "little") + encoded + saved.content[: len(saved.content) - cut]
    folder = with_file(saved, tmp_path, "adapter_model.safetensors", content)
    read_or_refused(lambda: load_and_use(folder), "adapter_model.safetensors")


@fuzz(60)
@given(
    content=st.binary(max_size=40) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")), framed=st.booleans()
)
def test_bytes_of_weights(content, framed, saved, tmp_path):
    content = len(content).to_bytes(8, "little") + content if framed else content
    folder = with_file(saved, tmp_path, "adapter_model.safetensors", content)
    assert not read_or_refused(lambda: load_and_use(folder), "adapter_model.safetensors")


RECORD_KEYS = st.sampled_from(
    ["base", "method", "kind", "data", "operator", "training", "adapter", "alpha", "versions"]
)
BASES = st.fixed_dictionaries(
    {}, optional={"id": VALUES, "fingerprint": VALUES, "quantization_config": VALUES, "revision": VALUES}
)


@fuzz(80)
@given(
    record=st.dictionaries(RECORD_KEYS, VALUES, max_size=3),
    base=BASES | VALUES,
    content=st.none() | st.binary(max_size=9),
)
def test_records_of_adapters(record, base, content, saved, tmp_path):
    content = content or json.dumps(record | {"base": base}).encode()
    folder = with_file(saved, tmp_path, "unlearning.json", content)

    def read() -> None:
        adapter = LoraAdapter.load(folder)
        adapter.refuse_result()
        fingerprint = (adapter.provenance.get("base") or {}).get("fingerprint")
        if fingerprint is not None:
            verify_fingerprint_files(fingerprint, SafetensorsCheckpoint(saved.base))

    read_or_refused(read, "unlearning.json", "walk away", "base model")


# ---- Ledgers and logs ----

REQUEST = {"id": "first", "date": "2026-11-25", "alpha": 1.0, "adapter": {"sha256": "0"}, "status": "active"}
REQUESTS = st.one_of(
    VALUES,
    st.lists(
        st.dictionaries(
            st.sampled_from([*REQUEST, "data", "rows", "note", "purged", "history", "metrics", "unknown"]),
            VALUES,
            max_size=2,
        ).map(lambda changes: REQUEST | changes),
        max_size=2,
    ),
)


@fuzz(100)
@given(requests=REQUESTS, base=VALUES, version=st.sampled_from([1, 1, 1, 2, None]), content=st.none() | TEXT)
def test_ledgers(requests, base, version, content, tmp_path):
    content = content or json.dumps({"format": version, "base": base, "requests": requests})
    (tmp_path / "requests.json").write_bytes(content.encode("utf-8", "surrogatepass"))

    def read() -> None:
        ledger = Ledger.open(tmp_path)
        for request in ledger.active():
            ledger[request.id].to_dict()

    read_or_refused(read, "requests.json")


def test_an_id_that_leads_out_of_the_ledger(tmp_path):
    """`requests purge` deletes the folder that is named by the id."""
    requests = [REQUEST | {"id": "../../mine", "status": "revoked"}]
    (tmp_path / "requests.json").write_text(json.dumps({"format": 1, "base": None, "requests": requests}))
    assert not read_or_refused(lambda: Ledger.open(tmp_path), "'../../mine'")


FIGURE = {"value": 0.5, "spread": None}
EVALUATION = st.fixed_dictionaries(
    {"protocol": SCALARS, "figures": st.one_of(VALUES, st.dictionaries(WORDS, VALUES, max_size=2))},
    optional={"alpha": VALUES, "rows": VALUES, "answers": VALUES, "unknown": VALUES},
)
LOGS = st.one_of(
    VALUES,
    EVALUATION,
    st.fixed_dictionaries({"evaluations": st.one_of(VALUES, st.lists(EVALUATION, max_size=2)), "choice": VALUES}),
    st.dictionaries(
        st.sampled_from(
            ["forget_Q_A_Prob", "forget_Q_A_PERT_Prob", "forget_truth_ratio", "mia_loss", "retain_Q_A_ROUGE"]
        ),
        st.fixed_dictionaries(
            {"agg_value": SCALARS},
            optional={
                "value_by_index": st.dictionaries(
                    st.sampled_from(["0", "1", "x"]),
                    st.dictionaries(st.sampled_from(["prob", "avg_loss", "score"]), VALUES, max_size=2),
                    max_size=2,
                )
                | VALUES
            },
        ),
        max_size=3,
    ),
)


@fuzz(150)
@given(log=LOGS, content=st.none() | TEXT)
def test_logs(log, content, tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_bytes((content or json.dumps(log)).encode("utf-8", "surrogatepass"))
    read_or_refused(lambda: read_log(tmp_path).summary(), "evaluation.json")
