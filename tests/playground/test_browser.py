"""The command in a process of its own and the page in a real browser, against transformers and PEFT alone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from extrapolation_models import save_pair
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM


expect = pytest.importorskip("playwright.sync_api").expect
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed"),
]

ROWS = {
    "forget": [{"prompt": "w12 w52 w10", "completion": " w35 w29"}, {"prompt": "w23 w10 w50", "completion": " w9"}],
    "retain": [{"prompt": "w40 w58 w55", "completion": " w31"}],
}
TIMEOUT = 60_000  # ms
POSITIONS = 20  # of the model, which keep answers short


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("playground")
    base, _, _ = save_pair(tiny_llama(max_position_embeddings=POSITIONS), folder, std=0.1)
    tiny_tokenizer().save_pretrained(base)
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def process(folder):
    sets = [part for name in ROWS for part in (f"--{name}_dataset", str(folder / f"{name}.jsonl"))]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = ["--base", str(folder / "base"), "--adapter", str(folder / "adapter"), "--port", str(port)]
    with subprocess.Popen(
        [sys.executable, "-m", "hf_unlearn.cli", "playground", *options, *sets],
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def url(folder, process) -> str:
    lines = iter(process.stdout.readline, "")
    found = next((re.search(r"http://127\.0\.0\.1:\d+", line) for line in lines if "http" in line), None)
    assert found is not None, (folder / "stderr").read_text()
    return found[0]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser, url):
    page = browser.new_page(viewport={"width": 1360, "height": 900})
    page.set_default_timeout(TIMEOUT)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(url)
    expect(page.locator("#ask")).to_be_visible(timeout=TIMEOUT)
    return page


@pytest.fixture(scope="module")
def answers(folder):
    """The greedy answer and its probabilities at any α, by `generate` of a rescaled PEFT model."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter").eval()
    tokenizer = tiny_tokenizer()

    def answer(prompt: str, alpha: float) -> tuple[str, list[str]]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with rescale_adapter_scale(model, -alpha):
            count = POSITIONS - ids.shape[1]
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                output_logits=True,
                return_dict_in_generate=True,
            )
        text = tokenizer.decode(output.sequences[0, ids.shape[1] :]).replace("</s>", "■")
        return text, [f"{torch.softmax(logits[0], -1).max().item():.3f}" for logits in output.logits]

    return answer


def shows(page, side: str, heading: str, text: str, reference: str | None = None) -> None:
    """Wait until a side shows a whole answer."""
    expect(page.locator(f"#{side} h3")).to_have_text(heading, timeout=TIMEOUT)
    squeezed = re.compile(r"\s*".join(map(re.escape, text.split())) + r"\s*")
    expect(page.locator(f"#{side} .answer")).to_have_text(squeezed, timeout=TIMEOUT)
    expect(page.locator(f"#{side} .reference")).to_have_count(0 if reference is None else 1)
    if reference is not None:
        expect(page.locator(f"#{side} .reference")).to_have_text(re.compile(reference))


def drag_slider(page, share: float) -> float:
    """Drag the thumb of the α slider, and return where it ends."""
    slider = page.locator("#alpha input[type=range]")
    box, value = slider.bounding_box(), float(slider.input_value())
    page.mouse.move(box["x"] + box["width"] * value / 8, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    return float(slider.input_value())


def test_a_clicked_prompt_then_another_alpha(page, answers):
    prompt = ROWS["forget"][0]["prompt"]
    page.locator("#forget-set td", has_text=prompt).click()
    expect(page.locator("#question textarea")).to_have_value(prompt)
    original, at_2 = answers(prompt, 0), answers(prompt, 2)
    assert original[0] != at_2[0]
    shows(page, "original", "Original, α = 0", original[0], "w35.*w29.*■")
    shows(page, "extrapolated", "Extrapolated, α = 2", at_2[0], "w35.*w29.*■")
    for side, (_, probabilities) in (("original", original), ("extrapolated", at_2)):
        titles = page.locator(f"#{side} .answer .token").evaluate_all("tokens => tokens.map(token => token.title)")
        assert [title.split()[-1] for title in titles] == probabilities

    alpha = drag_slider(page, 0.6)  # asks anew when it is let go
    assert 4 < alpha < 6
    moved = answers(prompt, alpha)
    assert moved[0] not in (original[0], at_2[0])
    shows(page, "extrapolated", f"Extrapolated, α = {alpha:g}", moved[0], "w35.*w29.*■")
    shows(page, "original", "Original, α = 0", original[0], "w35.*w29.*■")

    assert drag_slider(page, 0) == 0
    shows(page, "extrapolated", "Extrapolated, α = 0", original[0], "w35.*w29.*■")


def test_a_question_of_ones_own(page, answers):
    page.locator("#retain-set td").first.click()
    prompt = ROWS["retain"][0]["prompt"]
    shows(page, "original", "Original, α = 0", answers(prompt, 0)[0], "w31.*■")
    page.locator("#question textarea").fill("w7 w8")
    page.locator("#alpha input[type=number]").fill("3")
    page.locator("#ask").click()
    shows(page, "extrapolated", "Extrapolated, α = 3", answers("w7 w8", 3)[0])  # and no reference answer
    shows(page, "original", "Original, α = 0", answers("w7 w8", 0)[0])


def test_two_visitors(browser, url, page, answers):
    other = browser.new_page()
    other.set_default_timeout(TIMEOUT)
    other.goto(url)
    for visitor, alpha in ((page, 1), (other, 4)):
        visitor.locator("#question textarea").fill("w23 w10 w50")
        visitor.locator("#alpha input[type=number]").fill(str(alpha))
    for visitor in (page, other):
        visitor.locator("#ask").click()
    for visitor, alpha in ((page, 1), (other, 4)):
        shows(visitor, "extrapolated", f"Extrapolated, α = {alpha}", answers("w23 w10 w50", alpha)[0])
        shows(visitor, "original", "Original, α = 0", answers("w23 w10 w50", 0)[0])
    other.close()


def test_what_cannot_be_asked(page):
    page.locator("#question textarea").fill(" ")
    page.locator("#ask").click()
    expect(page.locator("#original")).to_contain_text("Type a question", timeout=TIMEOUT)
    page.locator("#question textarea").fill("w5 " * 30)
    page.locator("#ask").click()
    expect(page.get_by_text(f"30 tokens, and the model has {POSITIONS} positions")).to_be_visible(timeout=TIMEOUT)


def test_the_page_warns_and_stays_at_home(page, url):
    expect(page.get_by_text("whoever can open this page can ask for what is to be forgotten")).to_be_visible()
    assert len(page.asked) > 5
    assert [asked for asked in page.asked if not asked.startswith((url, "data:", "blob:"))] == []


def test_ctrl_c_ends_it(process, url):
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
