"""MkDocs hooks: pages from Markdown files outside of docs/, and links to files of the repository.

The files stay where readers of the repository expect them. Links in them are relative to their folder; here they are
rewritten to pages of the site, and links to other files of the repository become code.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "trainers/README.md": "training.md",
    "fiftyone_plugin/README.md": "fiftyone.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `PAGES`."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links to files of the repository."""
    sources = {target: source for source, target in PAGES.items()}
    path = page.file.src_uri
    source = sources.get(path, posixpath.join("docs", path))

    def rewrite(match: re.Match) -> str:
        mark, text, target = match.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        name, _, anchor = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), name))
        if file in PAGES:
            linked = PAGES[file]
        elif file.startswith("docs/"):
            linked = file.removeprefix("docs/")
        elif (ROOT / file).exists():
            return text if text.startswith("`") else f"`{file}`"
        else:
            return match[0]  # MkDocs reports it
        linked = posixpath.relpath(linked, posixpath.dirname(path) or ".")
        return f"{mark}[{text}]({linked}{'#' + anchor if anchor else ''})"

    return _LINK.sub(rewrite, markdown)
