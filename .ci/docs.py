"""Build the site from the notebooks into _docs/, as nbdev_docs does, but never install anything.

Quarto renders it where it is on PATH, otherwise the stand-in beside this file. nbdev caches by time, and would keep
pages of a package that has changed since: each build starts from nothing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

HERE = Path(__file__).resolve().parent
SECTIONS = {
    "core": "Foundations",
    "runs": "Runs",
    "data": "Data",
    "models": "Models",
    "train": "Training",
    "bundle": "Bundles",
    "serve": "Service",
    "monitor": "Monitoring",
    "cloud": "Cloud",
    "cli": "Command line",
}


def sidebar(notebooks):
    """Run notebooks first, then the library floor by floor; a number is what tells a library notebook."""
    groups = {"Run notebooks": []}
    for name in sorted(p.name for p in notebooks):
        numbered = re.match(r"\d+\w*?_(\w+)", name)
        if name != "index.ipynb":
            area = SECTIONS.get(numbered[1], "Foundations") if numbered else "Run notebooks"
            groups.setdefault(area, []).append(name)
    sections = [{"section": title, "contents": pages} for title, pages in groups.items() if pages]
    return {"website": {"sidebar": {"contents": ["index.ipynb", *sections]}}}


def page_names(processed):
    """The name Quarto gives a page where it is not the notebook's own: 00_core.html -> core.html."""
    names = {}
    for path in processed.rglob("*.ipynb"):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        if wanted := re.search(r"^output-file: (\S+)$", first, re.M):
            names[f"{path.stem}.html"] = wanted[1]
    return {old: new for old, new in names.items() if old != new}


def rename_pages(site, names):
    """Do what the stand-in leaves undone: `output-file`, in file names, links and the search index."""
    if not names:
        return
    for old, new in names.items():
        for page in site.rglob(old):
            page.rename(page.with_name(new))
    known = re.compile("|".join(rf"(?<![\w.-]){re.escape(old)}" for old in names))
    for path in site.rglob("*"):
        if path.suffix in {".html", ".json", ".xml", ".txt"} and "site_libs" not in path.parts:
            text = path.read_text(encoding="utf-8")
            path.write_text(known.sub(lambda m: names[m.group()], text), encoding="utf-8")


def stage(nbs, folder):
    """A copy of the notebooks in which types imported for annotations only are there: show_doc looks them up."""
    shutil.copytree(nbs, folder, ignore=shutil.ignore_patterns(".*", "_proc", "__pycache__"))
    for path in folder.rglob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace('"if TYPE_CHECKING:', '"if True:'), encoding="utf-8")
    return folder


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
    listed = yaml.safe_dump(sidebar(nbs.glob("[!_.]*.ipynb")), sort_keys=False)
    (nbs / "sidebar.yml").write_text(listed, encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        proc_nbs(stage(nbs, Path(scratch).resolve() / "nbs"), n_workers=2)
    subprocess.run(["quarto", "render", "--no-cache"], cwd=processed, check=True)
    if str(HERE) in bins:
        rename_pages(processed / site.name, page_names(processed))
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(processed / site.name, site)
    print(f"{len(list(site.rglob('*.html')))} pages in {site.name}/; open {site.name}/index.html")


if __name__ == "__main__":
    main()
