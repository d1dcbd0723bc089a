"""Build the site from the notebooks into _docs/, as nbdev_docs does, but never install anything.

Quarto renders it where it is on PATH, otherwise the stand-in beside this file. nbdev caches by time, and would keep
pages of a package that has changed since: each build starts from nothing.
nbdev writes the address of the published site into cross references, the repository of the last export into source
links, and nothing useful for a click command: pages are asked for beside each other, the settings are read anew, and a
command is shown as its `--help` is. A reader's browser asks nothing of anybody else: the themes' fonts are left out.
"""

import importlib
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from html import escape, unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import yaml
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

HERE = Path(__file__).resolve().parent
COMMANDS = "cli"  # the module whose click commands are shown as their help
FLOORS = tomllib.loads((HERE / "floors.toml").read_text(encoding="utf-8"))


def sidebar(nbs):
    """Run notebooks first, then the library floor by floor, each below a page of its own."""
    runs = sorted(p.name for p in nbs.glob("[!_.]*.ipynb") if p.name != "index.ipynb")
    sections = [{"section": "Run notebooks", "contents": runs}]
    for name, floor in FLOORS.items():
        pages = [f"{name}/{p.name}" for p in sorted((nbs / name).glob("[0-9]*.ipynb"))]
        sections.append({"section": floor["title"], "href": f"{name}/index.ipynb", "contents": pages})
    return {"website": {"sidebar": {"contents": ["index.ipynb", *sections]}}}


def floor_page(folder, floor):
    """A notebook that says what a floor owns and what each of its notebooks is."""
    rows = []
    for path in sorted(folder.glob("[0-9]*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title, about = (re.search(rf"^{mark} (.+)$", first, re.M)[1] for mark in "#>")
        rows.append(f"| [{title}]({path.name}) | {about} |")
    text = "\n".join(["| notebook | what it is |", "|---|---|", *rows])
    title = markdown(f"# {floor['title']}\n\n> {floor['owns']}", "title")
    return {"cells": [title, markdown(text, "modules")], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def page_names(processed):
    """The name Quarto gives a page where it is not the notebook's own: 00_core.html -> core.html, in each folder."""
    names = {}
    for path in processed.rglob("*.ipynb"):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        if (wanted := re.search(r"^output-file: (\S+)$", first, re.M)) and wanted[1] != f"{path.stem}.html":
            folder = path.parent.relative_to(processed)
            names[(folder / path.stem).as_posix() + ".html"] = wanted[1]
    return names


def rename_pages(site, names):
    """Do what the stand-in leaves undone: `output-file`, in file names, links and the search index."""
    stems = {Path(old).name: new for old, new in names.items()}
    assert all(stems[Path(old).name] == new for old, new in names.items()), "one file name, two pages' names"
    for old, new in names.items():
        (site / old).rename((site / old).with_name(new))
    if not names:
        return
    known = re.compile("|".join(rf"(?<![\w.-]){re.escape(old)}" for old in stems))
    for path in site.rglob("*"):
        if path.suffix in {".html", ".json", ".xml", ".txt"} and "site_libs" not in path.parts:
            text = path.read_text(encoding="utf-8")
            path.write_text(known.sub(lambda m: stems[m.group()], text), encoding="utf-8")


def stage(nbs, folder):
    """A copy of the notebooks in which types imported for annotations only are there: show_doc looks them up."""
    shutil.copytree(nbs, folder, ignore=shutil.ignore_patterns(".*", "_proc", "__pycache__"))
    for name, floor in FLOORS.items():
        (folder / name / "index.ipynb").write_text(json.dumps(floor_page(folder / name, floor)), encoding="utf-8")
    for path in folder.rglob("*.ipynb"):
        text = path.read_text(encoding="utf-8").replace('"if TYPE_CHECKING:', '"if True:')
        if re.search(rf"#\| ?default_exp {COMMANDS}\b", text):
            text = json.dumps(show_commands(json.loads(text), importlib.import_module(f"project.{COMMANDS}")))
        path.write_text(text, encoding="utf-8")
    return folder


def walk(command, words):
    """Every command below one, itself first: the words that call it, and the command."""
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, f"{words} {name}")


def show_commands(notebook, module):
    """The notebook with each command's help below the cell that defines it, and a list of all below the title."""
    symbols = {id(value): name for name, value in vars(module).items() if isinstance(value, click.Command)}
    commands = {symbols[id(command)]: (words, command) for words, command in walk(module.app, "project")}
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        defined = [name for name in re.findall(r"^def (\w+)\(", source, re.M) if name in commands]
        if defined and cell["cell_type"] == "code":
            cell = {**cell, "source": f"#| include: false\n{source}"}
        cells += [cell, *(markdown(command_page(*commands[name], name), name) for name in defined)]
    rows = [
        f"| [`{words}`](#{name}) | {command.get_short_help_str(120)} |" for name, (words, command) in commands.items()
    ]
    cells.insert(
        1, markdown("\n".join(["## Every command", "", "| command | what it does |", "|---|---|", *rows]), "all")
    )
    return {**notebook, "cells": cells}


def markdown(text, name):
    """A cell of Markdown."""
    return {"cell_type": "markdown", "id": f"shown-{name}", "metadata": {}, "source": text}


def command_page(words, command, symbol):
    """A command as Markdown: how it is called, what it does, its options, examples."""
    context = click.Context(command, info_name=words)
    what = (command.help or "").replace("\b\n", "").strip()
    lines = [
        f"### `{words}` {{#{symbol}}}",
        "",
        f"    {' '.join([words, *command.collect_usage_pieces(context)])}",
        "",
        what,
    ]
    options = [record for p in command.get_params(context) if (record := p.get_help_record(context))]
    cells = [tuple(" ".join(text.split()).replace("|", "\\|") for text in record) for record in options]
    lines += ["", "| option | what it does |", "|---|---|", *(f"| `{names}` | {text} |" for names, text in cells)]
    if command.epilog:
        lines += ["", "Examples:", "", *(f"    {line.strip()}" for line in command.epilog.splitlines()[2:])]
    return "\n".join(lines)


def settle_links(text, written, config, folder="."):
    """A processed notebook's text: pages of the same site, the repository of settings.ini, no links within code."""
    site = re.escape(f"{written['doc_host']}{written['doc_baseurl']}")
    page = re.compile(rf"{site}/([\w./-]+\.html)(?:#_[^)\s\"\\]*)?")  # a page shows no private name
    text = page.sub(lambda m: posixpath.relpath(m[1], folder), text)
    source = f"{written['git_url']}/blob/{written['branch']}/"
    return text.replace(source, f"{config.git_url}/blob/{config.branch}/")


def plain_fences(source):
    """Markdown without links inside its blocks of code, where they would be read as they are written."""
    fences = re.compile(r"^```.*?^```", re.M | re.S)
    return fences.sub(lambda m: re.sub(r"\[(`[^`\n]+`)\]\([^)\s]+\)", r"\1", m[0]), source)


def settle(processed, config):
    """Mend what nbdev has written into the processed notebooks."""
    written = importlib.import_module("project._modidx").d["settings"]
    for path in processed.rglob("*.ipynb"):
        folder = path.parent.relative_to(processed).as_posix()
        notebook = json.loads(settle_links(path.read_text(encoding="utf-8"), written, config, folder))
        for cell in notebook["cells"]:
            cell["source"] = (
                plain_fences("".join(cell["source"])) if cell["cell_type"] == "markdown" else cell["source"]
            )
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                data.update({k: plain_fences("".join(v)) for k, v in data.items() if k == "text/markdown"})
                if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):  # not every renderer takes it
                    image = "".join(data.pop("image/png")).replace("\n", "")
                    data["text/html"] = f'<img src="data:image/png;base64,{image}" alt="{escape(alt)}">'
        path.write_text(json.dumps(notebook), encoding="utf-8")


def stay_here(site):
    """Leave out of the stylesheets what they would fetch from elsewhere: the fonts of a theme."""
    address = r"(?:https?:)?//"  # with semicolons in it: where it ends is said by its brackets or quotes
    shapes = (rf"url\(\s*\"{address}[^\"]*\"\s*\)", rf"url\(\s*{address}[^)]*\)", rf"\"{address}[^\"]*\"")
    shapes += tuple(shape.replace('"', "'") for shape in shapes if '"' in shape)
    fetched = re.compile(rf"@import\s*(?:{'|'.join(shapes)})[^;]*;", re.I)
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        if fetched.search(text):
            path.write_text(fetched.sub("", text), encoding="utf-8")


def broken_links(site):
    """Links to pages, files and places in pages that are not there: (file, link)."""
    pages = {path.resolve(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    places = {path: set(re.findall(r"\s(?:id|name)=[\"']([^\"']+)", text)) for path, text in pages.items()}
    found = []
    for path, text in pages.items():
        for link in map(unescape, re.findall(r"<\w[^>]*?\s(?:href|src)=[\"']([^\"']+)", text)):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            there = target.is_file() and (not parts.fragment or unquote(parts.fragment) in places.get(target, set()))
            if not there:
                found.append((path.name, link))
    return found


def asked_elsewhere(site):
    """What the pages would load from other hosts: (file, address); links that a person follows are none of it."""
    loads = re.compile(r"<(?!a\b)\w+\b[^>]*?\s(?:src|href|poster|data)=[\"']((?:https?:)?//[^\"']+)", re.I)
    styles = re.compile(r"(?:@import\s*[\"']?|url\(\s*[\"']?)((?:https?:)?//[^\"')\s;]+)", re.I)
    kinds = {".html": [loads, styles], ".css": [styles]}
    found = []
    for path in sorted(p for p in site.rglob("*") if p.suffix in kinds):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".html":  # what is shown as text is no request
            text = re.sub(r"<(pre|code)\b.*?</\1>", "", text, flags=re.S)
            text = re.sub(r"<link\b[^>]*rel=[\"']?(?:canonical|alternate|next|prev)[^>]*>", "", text)
        found += [(path.name, m[1]) for pattern in kinds[path.suffix] for m in pattern.finditer(text)]
    return found


def main():
    """Write the settings, process the notebooks, render, and put the result in place."""
    config = get_config()
    top, nbs = config.config_path, config.nbs_path
    processed, site = top / "_proc", top / config.doc_path.name
    shutil.rmtree(processed, ignore_errors=True)
    bins = [str(Path(sys.executable).parent), *([] if shutil.which("quarto") else [str(HERE)])]
    os.environ["PATH"] = os.pathsep.join([*bins, os.environ["PATH"]])
    print(f"rendering with {shutil.which('quarto')}", flush=True)
    refresh_quarto_yml()
    listed = yaml.safe_dump(sidebar(nbs), sort_keys=False)
    (nbs / "sidebar.yml").write_text(listed, encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        proc_nbs(stage(nbs, Path(scratch).resolve() / "nbs"), n_workers=2)
    settle(processed, config)
    subprocess.run(["quarto", "render", "--no-cache"], cwd=processed, check=True)
    if str(HERE) in bins:
        rename_pages(processed / site.name, page_names(processed))
    stay_here(processed / site.name)
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(processed / site.name, site)
    for name, link in broken_links(site):
        print(f"{name} links to {link}, which is not there", file=sys.stderr)
    for name, address in asked_elsewhere(site):
        print(f"{name} asks for {address}: a reader's browser tells that host", file=sys.stderr)
    print(f"{len(list(site.rglob('*.html')))} pages in {site.name}/; open {site.name}/index.html")


if __name__ == "__main__":
    main()
