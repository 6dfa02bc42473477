"""Hooks of mkdocs: what pages need from outside docs/ becomes part of the site, so that no link leads out of it."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[2]
PAGES = {  # file of the repository: page of the site
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "recipes/README.md": "recipes/index.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
NOTEBOOKS = "notebooks/*.ipynb"
LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/ and the files that pages link to, and a page for each notebook."""
    sources = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    linked = {path for source in sources for path in _links_of(source) if not path.startswith(("docs/", ".."))}
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for path in sorted(path for path in linked - {*PAGES} if (ROOT / path).is_file()):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for path in sorted((ROOT / "docs").glob(NOTEBOOKS)):
        page = path.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        files.append(File.generated(config, page, content=notebook_markdown(path)))
    return files


def _links_of(source: str) -> set[str]:
    """Files that a page links to, from the root of the repository."""
    text = FENCE.sub("", (ROOT / source).read_text(encoding="utf-8"))
    targets = (match["target"] for match in LINK.finditer(text) if "://" not in match["target"])
    return {_from_root(source, target) for target in targets}


def _from_root(source: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ to where their targets are on the site."""
    uri = page.file.src_uri
    source = SOURCES.get(uri, f"docs/{uri}")

    def rewritten(match: re.Match) -> str:
        path = _from_root(source, match["target"])
        if "://" in match["target"] or (path.startswith("docs/") and uri not in SOURCES):
            return match[0]
        target = PAGES.get(path, path.removeprefix("docs/"))
        return f"{match['text']}({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{match['anchor'] or ''})"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)


def notebook_markdown(path: Path) -> str:
    """The cells of a notebook, without outputs, and a link to the notebook itself."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    parts = [
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    ]
    return "\n\n".join([parts[0], f"This page is a notebook: [{path.name}]({path.name}).", *parts[1:], ""])
