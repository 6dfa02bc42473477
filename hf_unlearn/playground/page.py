"""The page itself: the only module that needs gradio."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from html import escape
from importlib import resources
from typing import Any

from hf_unlearn.errors import UnlearningError
from hf_unlearn.playground.comparison import Comparison
from hf_unlearn.playground.prompts import KnownPrompt
from hf_unlearn.playground.tokens import Token, format_probability, legend_html, mean_probability, tokens_html


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr


PROMPTS_PER_PAGE = 6
WARNING = (
    "The loaded adapter is the one that <b>memorised</b> the forget set, and the left side is the original model: "
    "whoever can open this page can ask for what is to be forgotten."
)


def build_page(
    comparison: Comparison, prompts: dict[str, list[KnownPrompt]], *, alpha: float, max_alpha: float, title: str
) -> gr.Blocks:
    """
    Build the page.

    Args:
        comparison ([`Comparison`]): What answers.
        prompts (`dict[str, list[KnownPrompt]]`): Per set, its prompts to click on.
        alpha (`float`): α that the slider begins with.
        max_alpha (`float`): Largest α of the slider.
        title (`str`): What is loaded, in a line.
    """
    with gr.Blocks(title="hf_unlearn playground", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f'<h1>hf_unlearn playground</h1>{escape(title)}<p class="security-note">{WARNING}</p>')
        clicked = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                sets = {name: _prompt_list(name, known) for name, known in prompts.items() if known}
                with gr.Accordion("Generation", open=not sets):
                    max_new_tokens = gr.Slider(1, 512, value=64, step=1, label="Most new tokens")
                    temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0 is greedy)")
                    seed = gr.Number(0, precision=0, label="Seed")
            with gr.Column(scale=3, min_width=480):
                with gr.Row(equal_height=True):
                    question = gr.Textbox(label="Question", lines=2, max_lines=8, scale=6, elem_id="question")
                    with gr.Column(scale=1, min_width=110):
                        ask = gr.Button("Ask", variant="primary", elem_id="ask")
                        stop = gr.Button("Stop")
                slider = gr.Slider(0, max_alpha, value=alpha, step=0.025, label="α", elem_id="alpha", buttons=[])
                gr.HTML(f'<div class="legend">Probability of each token: {legend_html()}</div>')
                with gr.Row():
                    with gr.Column(min_width=300):
                        original = gr.HTML(_card("Original", None), elem_id="original")
                    with gr.Column(min_width=300):
                        extrapolated = gr.HTML(_card("Extrapolated", None), elem_id="extrapolated")

        run = {
            "fn": _answers(comparison, prompts),
            "inputs": [question, clicked, slider, max_new_tokens, temperature, seed],
            "outputs": [original, extrapolated],
            "show_progress": "minimal",
            "trigger_mode": "always_last",
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "api_visibility": "private",
        }
        running = [gr.on([ask.click, question.submit, slider.release], **run)]
        for name, samples in sets.items():
            chosen = samples.click(
                _choose(prompts[name], name), samples, [question, clicked], queue=False, api_visibility="private"
            )
            running.append(chosen.then(**run))
        stop.click(None, cancels=running, api_visibility="private")
    return page


def serve(page: gr.Blocks, host: str, port: int | None, share: bool, announce: Callable[[str], None]) -> None:
    """
    Serve a page until the process is interrupted.

    Args:
        page (`gradio.Blocks`): The page.
        host (`str`): Address to listen on.
        port (`int`, *optional*): Port to listen on; the first free one from 7860 on if not given.
        share (`bool`): Whether to open a public link through gradio's servers.
        announce (`Callable`): Gets a line with the address once the page can be opened.
    """
    css = (resources.files("hf_unlearn.playground") / "page.css").read_text(encoding="utf-8")
    try:
        _, local, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            css=css,
            theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
        )
        if share and not public:
            raise OSError("gradio could not open a public link. Leave --share out, or look at the network.")
        announce(f"Ctrl-C ends it. The page is at {local}{f' and, for everybody, at {public}' if public else ''}")
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def _prompt_list(name: str, prompts: list[KnownPrompt]) -> gr.Dataset:
    return gr.Dataset(
        label=f"{name.capitalize()}: click to ask",
        components=[gr.Textbox(visible=False)],
        headers=[""],
        samples=[[known.text] for known in prompts],
        type="index",
        layout="table",
        samples_per_page=PROMPTS_PER_PAGE,
        elem_id=name.replace(" ", "-"),
    )


def _choose(prompts: list[KnownPrompt], name: str) -> Callable[[int], tuple[str, Any]]:
    """Puts a prompt that was clicked on into the question box."""

    def choose(index: int) -> tuple[str, Any]:
        return prompts[index].text, (name, index)

    return choose


def _answers(
    comparison: Comparison, prompts: dict[str, list[KnownPrompt]]
) -> Callable[..., Iterator[tuple[str, str]]]:
    """Answers a question on both sides, which grow token by token."""

    def answers(
        question: str,
        clicked: tuple[str, int] | None,
        alpha: float,
        max_new_tokens: int,
        temperature: float,
        seed: int | None,
    ) -> Iterator[tuple[str, str]]:
        if not question.strip():
            yield _card("Original", None), _card("Extrapolated", None)
            return
        known = prompts[clicked[0]][clicked[1]] if clicked is not None else None
        if known is not None and known.text != question:
            known = None  # a question of the visitor's own by now
        prompt = known.prompt if known is not None else comparison.as_prompt(question)
        names = {"Original, α = 0": 0.0, f"Extrapolated, α = {alpha:g}": alpha}
        try:
            references = [
                _reference(known, comparison.score(prompt, known.completion, at)) if known and known.completion else ""
                for at in names.values()
            ]
            options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed or 0}
            for pair in comparison.compare(prompt, alpha, **options):
                yield tuple(map(_card, names, pair, references))
        except UnlearningError as error:
            raise gr.Error(str(error), title="Not answered") from error

    return answers


def _card(title: str, answer: list[Token] | None, reference: str = "") -> str:
    """The HTML of one side."""
    if answer is None:
        return (
            f'<div class="answer-card"><h3>{escape(title)}</h3>'
            '<p class="figures">Type a question, or click on a prompt.</p></div>'
        )
    return (
        f'<div class="answer-card"><h3>{escape(title)}</h3><p class="figures">{_figures(answer)}</p>'
        f'<div class="text answer">{tokens_html(answer)}</div>{reference}</div>'
    )


def _reference(known: KnownPrompt, tokens: list[Token]) -> str:
    """The HTML of a reference answer under one model."""
    return (
        f"<h4>Reference answer ({escape(known.where)})</h4>"
        f'<p class="figures reference-figures">{_figures(tokens)}</p>'
        f'<div class="text reference">{tokens_html(tokens)}</div>'
    )


def _figures(tokens: list[Token]) -> str:
    count = sum(token.count for token in tokens)
    probability = format_probability(mean_probability(tokens))
    return f"{count} {'token' if count == 1 else 'tokens'}, mean probability <b>{probability}</b>"
