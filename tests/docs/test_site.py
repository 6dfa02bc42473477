"""The site: it builds strictly, needs no network to read, and its references are those of the code."""

from __future__ import annotations

import functools
import re
import shutil
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import command_reference
import pytest
from docstrings import to_markdown
from snippets import ROOT

import hf_unlearn
import hf_unlearn.evaluation
import hf_unlearn.extrapolation
import hf_unlearn.requests


pytest.importorskip("mkdocs", reason="mkdocs is not installed")

from mkdocs.commands.build import build
from mkdocs.config import load_config


DESCRIBED = re.compile(r"^::: ([\w.]+)\.(\w+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as by `mkdocs build --strict`: a warning ends it."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


class TestSite:
    def test_every_page_is_there(self, site):
        pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
        for page in [*pages, Path("overview.md"), Path("recipes/index.md"), Path("notebooks/quickstart.md")]:
            assert (site / page.with_suffix(".html")).is_file(), page

    def test_nothing_is_fetched_from_elsewhere(self, site):
        for page in site.rglob("*.html"):
            text = page.read_text(encoding="utf-8")
            for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", text):
                assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), f"{tag} of {page.name}"

    def test_links_out_of_docs_stay_on_the_site(self, site):
        hardware = (site / "hardware.html").read_text(encoding="utf-8")
        assert 'href="recipes/custom/train_8b.yaml"' in hardware
        recipe = (site / "recipes" / "custom" / "train_8b.yaml").read_bytes()
        assert recipe == (ROOT / "recipes" / "custom" / "train_8b.yaml").read_bytes()
        assert 'href="../data.html#row-shapes"' in (site / "recipes" / "index.html").read_text(encoding="utf-8")
        assert 'href="method.html"' in (site / "overview.html").read_text(encoding="utf-8")

    @pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on the PATH")
    def test_the_search_finds_a_page_in_a_browser(self, site):
        sync_api = pytest.importorskip("playwright.sync_api")
        handler = functools.partial(_Quiet, directory=str(site))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_api.sync_playwright() as playwright:
            Thread(target=server.serve_forever, daemon=True).start()
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page()
            requested = []
            page.on("request", lambda request: requested.append(request.url))
            home = f"http://127.0.0.1:{server.server_port}/"
            page.goto(f"{home}index.html?q=ledger")
            links = page.locator("a.md-search-result__link[href*='requests.html']")
            sync_api.expect(links.first).to_be_visible(timeout=60_000)
            browser.close()
            server.shutdown()
        assert all(url.startswith((home, "data:", "blob:")) for url in requested), requested


class _Quiet(SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, format: str, *args: object) -> None:
        pass


class TestReference:
    def test_commands_are_those_of_the_parsers(self):
        written = command_reference.PAGE.read_text(encoding="utf-8")
        assert written == command_reference.reference(), "run python docs/tools/command_reference.py"

    def test_every_public_name_is_described(self):
        page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
        described = {name for _, name in DESCRIBED.findall(page)}
        for module in (hf_unlearn, hf_unlearn.evaluation, hf_unlearn.extrapolation, hf_unlearn.requests):
            values = {name for name in module.__all__ if callable(getattr(module, name))}
            assert values - described == set(), module.__name__

    def test_names_are_where_the_page_says(self, site):
        page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
        html = (site / "reference" / "python.html").read_text(encoding="utf-8")
        for module, name in DESCRIBED.findall(page):
            assert f'id="{module}.{name}"' in html, name

    def test_docstrings_become_lists(self):
        docstring = """
        Do it, see [`Trainer`].

        Args:
            alpha, beta (`float`, *optional*, defaults to `1.0`):
                Strength,
                above 0.
            rows (`list`): Rows.

            > Others are those of [`Config`]

        Returns:
            `dict`: what was done.

        Example:

        ```python
        do(1)
        ```
        """
        assert to_markdown(docstring) == (
            "Do it, see `Trainer`.\n\n**Arguments**\n\n"
            "- **`alpha, beta`** (`float`, *optional*, defaults to `1.0`): Strength, above 0.\n"
            "- **`rows`** (`list`): Rows.\n\nOthers are those of `Config`.\n\n"
            "**Returns**\n\n`dict`: what was done.\n\n**Example**\n\n```python\ndo(1)\n```"
        )
