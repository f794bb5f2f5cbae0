"""Makes the site of the repository's own pages: a hook that mkdocs.yml names; `make docs` builds the site.

The pages are plain Markdown with links to files of the repository, as code hosts show it. For the site, every file
that a page links is added: another page as it is, source code as a page with numbered lines, a picture as a picture.
Formulas become MathML, which browsers show without a script, so the site loads nothing from elsewhere.
"""

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
HOME = {"README.md": "index.md", "README.zh-CN.md": "index.zh-CN.md"}
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
SHOWN_AS_THEY_ARE = (".md", ".png", ".ipynb")


def place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return HOME.get(path) or (path if path.endswith(SHOWN_AS_THEY_ARE) else f"source/{path}.md")


def linked(path: str) -> list[str]:
    """The files of the repository that one of its pages links."""
    prose = CODE.sub("", (ROOT / path).read_text(encoding="utf-8"))
    targets = [match[1] for match in LINK.finditer(prose) if ":" not in match[1]]
    return [posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) for target in targets]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what the pages link, and what that links."""
    waiting = [*HOME, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith("docs/"):
            files.append(added(path, config))
        if path.endswith(".md"):
            new = [target for target in dict.fromkeys(linked(path)) if target not in seen]
            waiting += [target for target in new if target.endswith(".md") or not target.startswith("docs/")]
            seen.update(new)
    return files


def added(path: str, config: MkDocsConfig) -> File:
    """A file of the repository as one of the site; one that is no page or picture as a page of numbered lines."""
    if path.endswith(SHOWN_AS_THEY_ARE):
        return File.generated(config, place(path), abs_src_path=str(ROOT / path))
    language = "python" if path.endswith(".py") else "text"
    text = (ROOT / path).read_text(encoding="utf-8").rstrip()
    return File.generated(config, place(path), content=f'# {path}\n\n~~~~ {{.{language} linenums="1"}}\n{text}\n~~~~\n')


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links of the site."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown
    own = {there: path for path, there in HOME.items()}.get(here)
    own = own or (here if page.file.generated_by else f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        if ":" in match[1]:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(own), match[1]))
        anchor = re.sub(r"^#L(?=\d+$)", "?L", match[2] or "")  # a line is no heading that mkdocs could check
        return posixpath.relpath(place(path), posixpath.dirname(here)) + anchor

    parts = CODE.split(markdown)  # prose and code in turn
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn TeX into MathML, and links to lines into their anchors."""
    content = re.sub(r'(?<=\.html)\?L(?=\d+")', "#__codelineno-0-", content)
    tex = r'<span class="arithmatex">\\\((.*?)\\\)</span>'
    return re.sub(tex, lambda match: convert(html.unescape(match[1])), content, flags=re.DOTALL)


def on_page_context(context: dict[str, Any], *, page: Page, config: MkDocsConfig, nav: object) -> None:
    """The words around a Chinese page are Chinese."""
    config.theme["language"] = "zh" if page.file.src_uri.endswith(".zh-CN.md") else "en"


class Paragraphs(Extension):
    """In docstrings, the text of each argument, of what is returned and of what is raised begins a line of its own."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        """Called by mkdocstrings for each object that it reads."""
        if obj.docstring is not None:
            begins = r"\n(?=[a-z_]\w*(?:, [a-z_*]\w*)*: |Returns? |Raises |Yields )"
            obj.docstring.value = re.sub(begins, "\n\n", obj.docstring.value)
