"""GGUF files: how the converters are found and run, and what llama.cpp computes from the result."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from serving_adapters import peft_logits, save_forget_adapter
from serving_gguf import LLAMA_CPP, TOKENS, greedy, largest_error, llama_cpp, needs_converter, save_model

from hf_unlearn import UnlearningError
from hf_unlearn.serving import export_gguf, export_gguf_adapter
from hf_unlearn.serving.gguf import ADAPTER_CONVERTER, MODEL_CONVERTER


PROMPT = [1, 30, 20, 33, 27, 26, 40]
LENGTH = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("gguf") / "model")


def write_converter(folder: Path, code: str, name: str = MODEL_CONVERTER) -> Path:
    """A checkout whose converter does what `code` says; `out` is the file it is told to write."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"import sys\nout = sys.argv[sys.argv.index('--outfile') + 1]\n{code}\n")
    return folder


class TestConverter:
    @pytest.mark.parametrize("converter", [None, "."], ids=["none", "another-folder"])
    def test_how_to_get_it(self, model, tmp_path, monkeypatch, converter):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UnlearningError, match="--converter") as error:
            export_gguf(model, tmp_path / "out", converter)
        assert "git clone" in str(error.value) and "pip download" in str(error.value)

    def test_it_is_told_what_to_convert(self, model, tmp_path):
        code = "open(out, 'w').write('GGUF' + ' '.join(sys.argv[1:]))"
        path = export_gguf(model, tmp_path / "out", write_converter(tmp_path / "c", code), "bfloat16")
        words = path.read_text()[4:].split()
        assert words[0] == str(model) and words[words.index("--outtype") + 1] == "bf16"
        assert sorted(file.name for file in path.parent.iterdir()) == ["model.gguf", "unlearning.json"]

    def test_the_dtype_of_the_model_is_kept(self, tmp_path):
        tiny = save_model(tmp_path / "m")
        config = json.loads((tiny / "config.json").read_text())
        (tiny / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
        converter = write_converter(tmp_path / "c", "open(out, 'w').write('GGUF' + sys.argv[-1])")
        assert export_gguf(tiny, tmp_path / "out", converter).read_text() == "GGUFf16"
        record = json.loads((tmp_path / "out" / "unlearning.json").read_text())
        assert record["export"] == {"format": "gguf", "source": str(tiny), "dtype": "float16"}

    def test_its_last_lines_are_shown(self, model, tmp_path):
        code = "print('\\n'.join(f'line {n}' for n in range(90)))\nsys.exit('Model Foo is not supported')"
        with pytest.raises(UnlearningError, match="Model Foo is not supported") as error:
            export_gguf(model, tmp_path / "out", write_converter(tmp_path / "c", code))
        assert "exit code 1" in str(error.value) and "newer llama.cpp" in str(error.value)
        assert "line 89" in str(error.value) and "line 60" not in str(error.value)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    def test_a_missing_package_is_named(self, model, tmp_path):
        with pytest.raises(UnlearningError, match="`pip install nothing_like_it`"):
            export_gguf(model, tmp_path / "out", write_converter(tmp_path / "c", "import nothing_like_it.part"))

    @pytest.mark.parametrize("code", ["", "open(out, 'w').write('nothing')"], ids=["nothing", "no-gguf"])
    def test_a_converter_that_writes_no_gguf(self, model, tmp_path, code):
        with pytest.raises(UnlearningError, match="no GGUF file"):
            export_gguf(model, tmp_path / "out", write_converter(tmp_path / "c", code))

    def test_no_model(self, tmp_path):
        (tmp_path / "m").mkdir()
        with pytest.raises(UnlearningError, match=r"config\.json cannot be read"):
            export_gguf(tmp_path / "m", tmp_path / "out", write_converter(tmp_path / "c", ""))

    def test_the_adapter_has_one_scale(self, model, tmp_path):
        """The converter reads `lora_alpha` alone."""
        options = {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 9}}
        adapter = save_forget_adapter(model, tmp_path / "a", **options)
        code = "import shutil; shutil.copy(sys.argv[3] + '/adapter_config.json', out + '.json')\nopen(out, 'w').write('GGUF')"
        converter = write_converter(tmp_path / "c", code, ADAPTER_CONVERTER)
        path = export_gguf_adapter(adapter, model, tmp_path / "out", converter)
        config = json.loads(path.with_name("adapter.gguf.json").read_text())
        assert config["r"] == 9 and not config["use_rslora"]
        assert not config["alpha_pattern"] and not config["rank_pattern"]
        assert json.loads((path.parent / "unlearning.json").read_text())["kind"] == "forget-adapter"

    def test_a_memorising_adapter_is_refused(self, model, tmp_path):
        adapter = save_forget_adapter(model, tmp_path / "a", kind="adapter")
        converter = write_converter(tmp_path / "c", "", ADAPTER_CONVERTER)
        with pytest.raises(UnlearningError, match="no forget adapter"):
            export_gguf_adapter(adapter, model, tmp_path / "out", converter)

    def test_transposed_weights_are_refused(self, model, tmp_path):
        adapter = save_forget_adapter(model, tmp_path / "a")
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": True}))
        converter = write_converter(tmp_path / "c", "", ADAPTER_CONVERTER)
        with pytest.raises(UnlearningError, match=r"fan_in_fan_out.*--format gguf"):
            export_gguf_adapter(adapter, model, tmp_path / "out", converter)


@pytest.fixture(scope="module")
def base(model, tmp_path_factory) -> Path:
    """The GGUF file of the model."""
    return export_gguf(model, tmp_path_factory.mktemp("gguf") / "base", LLAMA_CPP)


def compare(server, wanted) -> None:
    """Compare greedy tokens and all log-probabilities with those of `wanted`, a function of the token ids."""
    tokens, logprobs = greedy(server, PROMPT, LENGTH, len(TOKENS))
    logits = wanted(torch.tensor([PROMPT + tokens]))
    assert tokens == logits[0, len(PROMPT) - 1 : -1].argmax(-1).tolist()
    assert {len(row) for row in logprobs} == {len(TOKENS)}
    assert largest_error(logits, PROMPT, logprobs) < 1e-4


@needs_converter
class TestLlamaCpp:
    def test_header(self, base):
        magic, version, tensors = struct.unpack("<4sIQ", base.read_bytes()[:16])
        assert (magic, version) == (b"GGUF", 3)
        assert tensors == 2 + 2 * 9  # embedding and last norm; two layers of seven matrices and two norms

    def test_model(self, model, base):
        compare(llama_cpp(base), lambda tokens: peft_logits(model, None, tokens))

    @pytest.mark.parametrize(
        "options",
        [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 2, "down_proj": 20}}],
        ids=["plain", "rslora-patterns"],
    )
    def test_adapter(self, model, base, tmp_path, options):
        adapter = save_forget_adapter(model, tmp_path / "a", **options)
        path = export_gguf_adapter(adapter, model, tmp_path / "out", LLAMA_CPP)
        server = llama_cpp(base, path)
        compare(server, lambda tokens: peft_logits(model, adapter, tokens))
        # A request can switch it off, which docs/serving.md warns of.
        tokens, logprobs = greedy(server, PROMPT, 1, len(TOKENS), lora=[{"id": 0, "scale": 0.0}])
        logits = peft_logits(model, None, torch.tensor([PROMPT + tokens]))
        assert largest_error(logits, PROMPT, logprobs) < 1e-4

    def test_a_model_it_does_not_know(self, model, tmp_path):
        unknown = save_model(tmp_path / "m")
        config = json.loads((unknown / "config.json").read_text())
        (unknown / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
        with pytest.raises(UnlearningError, match="NoSuchModel is not supported"):
            export_gguf(unknown, tmp_path / "out", LLAMA_CPP)
