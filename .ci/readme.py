"""README.md from nbs/index.ipynb, the same bytes on every machine: `readme.py [FILE]`. Needs nothing but nbformat.

Prose stays as it is, with links made relative to the top. A code cell becomes a fenced block followed by what it
printed or showed; `#| hide` leaves a cell out, `#| echo: false` only its source. A figure is written to nbs/images/.
"""

import base64
import posixpath
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Written from nbs/index.ipynb by `make notebooks`; edit that. -->\n\n"


def relink(text, folder="nbs"):
    """Markdown whose relative links, written for a file in `folder`, hold for a file at the top."""

    def moved(match):
        before, target, after = match.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:|[#/]", target, re.I):
            return match.group()
        return before + posixpath.normpath(posixpath.join(folder, target)) + after

    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)  # fenced blocks are left alone
    link = r"(\]\(|<img[^>]*?src=\"|<a[^>]*?href=\")([^\s)\"]+)([)\"\s])"
    return "".join(part if part.startswith("```") else re.sub(link, moved, part) for part in parts)


def shown(output, name):
    """One output as markdown."""
    if output.output_type == "stream":
        return f"```text\n{output.text.rstrip()}\n```" if output.name == "stdout" else ""
    if output.output_type == "error":
        raise SystemExit(f"index.ipynb shows an error, {output.ename}: {output.evalue}. Mend it and run it again.")
    data = output.data
    if "text/markdown" in data:
        return relink(data["text/markdown"].strip())
    if "image/png" in data:
        image = ROOT / "nbs" / "images" / f"{name}.png"
        content = base64.b64decode(data["image/png"])
        if not image.exists() or image.read_bytes() != content:
            image.parent.mkdir(exist_ok=True)
            image.write_bytes(content)
        alt = output.metadata.get("image/png", {}).get("alt") or name
        return f"![{alt}](nbs/images/{name}.png)"
    return f"```text\n{data['text/plain'].rstrip()}\n```" if "text/plain" in data else ""


def cell_markdown(cell):
    """One cell as markdown; empty for what the README leaves out."""
    lines = cell.source.strip().split("\n")
    directives = {line[2:].strip() for line in lines if line.startswith("#|")}
    if "hide" in directives or "include: false" in directives or cell.cell_type == "raw":
        return ""
    if cell.cell_type == "markdown":
        return relink(cell.source.strip())
    code = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    source = f"```python\n{code}\n```" if code and "echo: false" not in directives else ""
    outputs = [shown(output, f"index-{cell.id}-{i}") for i, output in enumerate(cell.outputs)]
    return "\n\n".join(part for part in (source, *outputs) if part)


def readme():
    """The whole text."""
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    cells = [cell_markdown(cell) for cell in notebook.cells]
    return NOTE + "\n\n".join(text for text in cells if text) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "README.md"
    target.write_text(readme(), encoding="utf-8", newline="\n")
