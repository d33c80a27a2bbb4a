"""The repository itself: nothing at the top that does not belong there, no traces of one machine, and
documentation whose every code block does what it says.

```python blocks of a file run in order, in one namespace and a folder of their own; a `# prints:` comment is
followed by the very lines the block prints. ```console and ```sh blocks hold commands, which run if they are
quick (QUICK below); any other block says why not right above it: `<!-- not run: why -->`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TOP = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "pyproject.toml",
}
TOP |= {"benchmarks", "csrc", "docs", "entrenar", "examples", "fuzz", "setup.py", "tests"}


def tracked() -> list[str]:
    """Files git knows, or would add; without git (an unpacked sdist), every file that is not a build's."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def test_the_top_level_holds_only_what_it_should():
    assert {name.split("/")[0] for name in tracked()} <= TOP


# A person's own folder. Written in pieces, so that this file does not hold one.
MACHINE = re.compile("/" + r"(home|Users)/\w+/|(?<!\w)/" + "root/")


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    found = []
    for name in tracked():
        with contextlib.suppress(UnicodeDecodeError):
            lines = (ROOT / name).read_text().splitlines()
            found += [
                f"{name}:{i}: {line.strip()[:80]}" for i, line in enumerate(lines, 1) if MACHINE.search(line)
            ]
    assert not found, "\n".join(found)


def test_a_path_of_a_machine_would_be_found():
    assert MACHINE.search("see /" + "home/ada/entrenar") and not MACHINE.search("a/homework/b")


def test_no_large_or_binary_file_is_tracked():
    large = [name for name in tracked() if (ROOT / name).stat().st_size > 400_000]
    assert not large


def test_c_lines_are_at_most_120_columns():
    """Ruff checks the lines of Python."""
    long = [
        f"{name}:{i}"
        for name in tracked()
        if name.startswith("csrc/") and name.endswith((".h", ".c", ".inc"))
        for i, line in enumerate((ROOT / name).read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert not long


# Documentation


@dataclass(frozen=True)
class Block:
    file: str
    line: int
    language: str
    text: str
    not_run: str | None  # the reason, from the comment above

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


FENCE = re.compile(
    r"(?:^<!-- not run: (?P<why>.+?) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


def blocks_of(name: str, text: str) -> list[Block]:
    return [
        Block(name, text.count("\n", 0, match.start("text")), match["language"], match["text"], match["why"])
        for match in FENCE.finditer(text)
    ]


def documents() -> list[str]:
    return [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
        if path.exists()
    ]


BLOCKS = {name: blocks_of(name, (ROOT / name).read_text()) for name in documents()}
PYTHON_FILES = [
    name for name, blocks in BLOCKS.items() if any(b.language == "python" and not b.not_run for b in blocks)
]
SHELL = [
    block
    for blocks in BLOCKS.values()
    for block in blocks
    if block.language in ("console", "sh", "bash", "shell")
]

# A command that runs here: the whole line, which finishes within seconds.
QUICK = re.compile(
    r"^(make|make help|python -m entrenar\.examples\.train --help|python -c .+|python examples/\S+\.py)$"
)


def run_python(blocks: list[Block], folder: Path) -> None:
    """The blocks of one file, in order, in one namespace; what each prints must be what it says it prints."""
    names: dict = {"__name__": "__main__"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in blocks:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * block.line + block.text, block.file, "exec"), names)
            want = promised(block.text)
            if want is not None:
                assert printed.getvalue().splitlines() == want, f"{block.place} prints:\n{printed.getvalue()}"
    finally:
        os.chdir(before)


def promised(text: str) -> list[str] | None:
    """What `# prints: one line` promises, or the comment lines below a bare `# prints:`; None where nothing does."""
    lines, found, below = [], False, False
    for line in text.splitlines():
        if line.startswith("# prints:"):
            rest = line.removeprefix("# prints:").strip()
            found, below = True, not rest
            lines += [rest] if rest else []
        elif below and line.startswith("#"):
            lines.append(line.removeprefix("#").removeprefix(" "))
        else:
            below = False
    return lines if found else None


def test_a_wrong_promise_is_found(tmp_path):
    good = "```python\nprint(1)\n# prints: 1\nprint('a')\nprint('b')\n# prints:\n# a\n# b\n```\n"
    run_python(blocks_of("good.md", good), tmp_path)
    with pytest.raises(AssertionError, match="bad.md:1 prints"):
        run_python(blocks_of("bad.md", "```python\nprint(1)\n# prints: 2\n```\n"), tmp_path)


def commands(text: str) -> list[str]:
    """The lines that start with `$ `; where none does, all lines. Comments stand after two spaces and a #."""
    lines = [line.split("  #")[0].strip() for line in text.splitlines() if line.strip() and line[0] != "#"]
    return [line[2:] for line in lines if line.startswith("$ ")] or lines


@pytest.mark.parametrize("name", PYTHON_FILES)
def test_every_python_block_runs_and_prints_what_it_says(name, tmp_path):
    """In an empty folder but for examples/, as if the reader stood in the checkout."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run_python([b for b in BLOCKS[name] if b.language == "python" and not b.not_run], tmp_path)


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_every_command_runs_or_says_why_not(block):
    if block.not_run:
        pytest.skip(f"not run: {block.not_run}")
    for command in commands(block.text):
        assert QUICK.match(command), (
            f"{block.place}: {command!r} is not among what runs here; write <!-- not run: why -->"
        )
        words = shlex.split(command)
        words[0] = sys.executable if words[0] == "python" else words[0]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{block.place}: {command}\n{done.stderr}"


def test_the_documentation_has_blocks_to_run():
    if not (ROOT / "README.md").exists():
        pytest.skip("no README yet")
    assert "README.md" in PYTHON_FILES, "the README shows a program"
    assert sum(len(blocks) for blocks in BLOCKS.values()) >= 10


def test_links_between_documents_lead_somewhere():
    broken = []
    for name in documents():
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text()):
            if "://" not in target and not (ROOT / name).parent.joinpath(target).exists():
                broken.append(f"{name}: {target}")
    assert not broken


# The checker itself

EXAMPLE = """
Text.

```python
x = 3
```

<!-- not run: it takes an hour -->
```console
$ make everything
```

```python
print(x + 1)
print("two words")
# prints:
# 4
# two words
```
"""


def test_blocks_are_found_with_their_lines_and_reasons():
    assert commands("$ make x  # why\nits output\n$ make y\n") == ["make x", "make y"]
    assert commands("# only\nmake x\n") == ["make x"]
    first, second, third = blocks_of("a.md", EXAMPLE)
    assert (first.language, first.text, first.line, first.not_run) == ("python", "x = 3\n", 4, None)
    assert (second.language, second.not_run) == ("console", "it takes an hour")
    assert promised(third.text) == ["4", "two words"]


def test_a_wrong_output_is_found(tmp_path):
    run_python([b for b in blocks_of("a.md", EXAMPLE) if b.language == "python"], tmp_path)
    with pytest.raises(AssertionError, match="prints"):
        run_python(
            [b for b in blocks_of("a.md", EXAMPLE.replace("# 4", "# 5")) if b.language == "python"], tmp_path
        )
    with pytest.raises(NameError):
        run_python(blocks_of("a.md", EXAMPLE)[2:], tmp_path)
