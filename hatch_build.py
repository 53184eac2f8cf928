"""What the wheel and the sdist say of themselves: URLs, and the README with links that work where it stands alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")  # to a file of the repository
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def absolute(text: str, repository: str) -> str:
    """Markdown whose links and pictures of the repository's files name the repository."""

    def there(match: re.Match[str]) -> str:
        kind = "raw" if match[1].endswith((".svg", ".png")) else "blob"  # a picture itself, or a page about a file
        return f"]({repository}/{kind}/HEAD/{match[1]})"

    parts = _FENCED.split(text)
    parts[::2] = (_LINK.sub(there, part) for part in parts[::2])  # code stays as it is
    return "".join(parts)


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        repository = self.config["repository"]
        metadata["urls"] = {
            "Repository": repository,
            "Documentation": f"{repository}/blob/HEAD/docs/architecture.md",
            "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
            "Issues": f"{repository}/issues",
        }
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, repository)}
