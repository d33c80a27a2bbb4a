"""For tests that prepare data: lines of text, a folder of documents, and a `say` that remembers."""

from __future__ import annotations

from pathlib import Path

LINES = "".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(200))


class Said(list):
    """A `say` that remembers: (text, done, total)."""

    def __call__(self, text, done=0, total=0):
        self.append((text, done, total))

    def texts(self):
        return [text for text, _, _ in self]


def write_documents(folder: Path) -> Path:
    """Sixty of them, each longer than the one before."""
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text(f"document {i}\n" + LINES[: 100 * i + 10])
    return folder
