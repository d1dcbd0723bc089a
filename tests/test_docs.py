"""The site that .ci/docs.py builds with the stand-in: its links, what it asks for, how it looks at two widths."""

import functools
import http.server
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from html import unescape
from pathlib import Path

import click
import pytest
from browser import Browser, find_chromium
from pytest_notebooks import ROOT
from test_repository import checkout
from test_tooling import load

from project import cli

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the stand-in is found on PATH by its first line")
DOCS = load(ROOT / ".ci" / "docs.py")
COMMANDS = {words: command for words, command in DOCS.walk(cli.app, "project") if not isinstance(command, click.Group)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site of a copy of this checkout, whose settings name another repository than the last export did."""
    copy = checkout(tmp_path_factory.mktemp("site") / "copy")
    (copy / ".ci" / "quarto").chmod(0o755)  # what `checkout` copies is contents
    settings = (copy / "settings.ini").read_text(encoding="utf-8")
    for name, value in {"user": "somebody-else", "branch": "trunk"}.items():
        settings, changed = re.subn(rf"^{name} = .*$", f"{name} = {value}", settings, flags=re.M)
        assert changed == 1
    (copy / "settings.ini").write_text(settings, encoding="utf-8")
    paths = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "quarto").exists()]
    env = {**os.environ, "PATH": os.pathsep.join(paths)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, ".ci/docs.py"], cwd=copy, env=env, **pipes) as build:
        try:
            _, said = build.communicate(timeout=1800)  # far above the minute that it takes
        except BaseException:
            os.killpg(build.pid, signal.SIGKILL)  # its own session: its workers are in it, and nobody else
            raise
    assert build.returncode == 0, said[-4000:]
    assert said == "", "the build has nothing to complain about"
    return copy / "_docs"


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served on loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    """A real one."""
    if not find_chromium():
        pytest.skip("no Chromium here")
    with Browser() as started:
        yield started


def read(site, name):
    """A page's text."""
    return (site / name).read_text(encoding="utf-8")


def test_every_link_is_there(site):
    assert len(list(site.rglob("*.html"))) > 50
    assert DOCS.broken_links(site) == []


def test_links_between_pages_stay_on_the_site(site):
    hosts = {m for p in site.rglob("*.html") for m in re.findall(r'href="https?://([^/"]+)', p.read_text("utf-8"))}
    assert "github.com" in hosts and not {h for h in hosts if h.endswith(".github.io")}
    assert re.search(r'href="receipt\.html#\w+', read(site, "runs/compare.html"))  # of its own floor
    assert re.search(r'href="\.\./\w+/\w+\.html#\w+', read(site, "bundle/manifest.html"))  # of another one


def test_each_floor_has_a_section_and_a_page(site):
    """The sidebar leads to a floor's page, which says what it owns and lists each of its notebooks."""
    front = read(site, "index.html")
    for name, floor in DOCS.FLOORS.items():
        page = read(site, f"{name}/index.html")
        assert f'href="{name}/index.html"' in front.replace('href="./', 'href="') and unescape(floor["title"]) in front
        assert floor["owns"].split(":")[0].replace("`", "") in unescape(re.sub(r"<[^>]+>", "", page))
        for path in (ROOT / "nbs" / name).glob("[0-9]*.ipynb"):
            assert f'href="{path.stem.partition("_")[2]}.html"' in page, path.name
    assert re.search(r'<img[^>]+alt="\d+ floors, from the ground up', front)


def test_figures_have_their_words(site):
    """An alternative text of a figure's output is in the page, whatever the renderer does with it."""
    for name in ("index", "train", "evaluate"):
        told = [
            output["metadata"]["image/png"]["alt"]
            for cell in json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
            for output in cell.get("outputs", [])
            if "alt" in output.get("metadata", {}).get("image/png", {})
        ]
        page = unescape(read(site, f"{name}.html"))
        assert told and all(f'alt="{text}"' in page for text in told)


def test_links_to_the_source_follow_the_settings(site):
    blobs = {
        m for p in site.rglob("*.html") for m in re.findall(r"github\.com/([^\"]+?)/project/", p.read_text("utf-8"))
    }
    assert blobs == {"somebody-else/mlops-notebooks/blob/trunk"}
    issues = set(re.findall(r"https://github\.com/([\w-]+)/[\w-]+/issues/new", read(site, "cli/cli.html")))
    assert issues == {"somebody-else"}


def test_no_links_are_written_out_in_code(site):
    for path in site.rglob("*.html"):
        shown = re.findall(r"<pre\b.*?</pre>", path.read_text(encoding="utf-8"), re.S)
        assert not [s for s in shown if re.search(r"`\]\([\w.-]+\.html", re.sub(r"<[^>]+>", "", s))], path.name


def test_pages_ask_for_nothing_from_elsewhere(site):
    assert DOCS.asked_elsewhere(site) == []
    assert "@font-face" not in read(site, "site_libs/themes/cosmo.min.css") or "//fonts." not in read(
        site, "site_libs/themes/cosmo.min.css"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.css", "@import url(https://fonts.example/css2?family=A:wght@300;400&display=swap);b{color:red}"),
        ("b.css", '@import "//fonts.example/a;b.css" screen;b{color:red}'),
        ("c.css", "@import url('https://fonts.example/x.css');b{color:red}"),
    ],
)
def test_imports_of_fonts_are_taken_out_whole(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert DOCS.asked_elsewhere(tmp_path)
    DOCS.stay_here(tmp_path)
    assert (tmp_path / name).read_text(encoding="utf-8") == "b{color:red}"


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/a.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/a.css">',
        '<img alt="" src="http://pictures.example/a.png">',
        "<style>@font-face { src: url(https://fonts.example/a.woff2) }</style>",
    ],
)
def test_what_is_asked_elsewhere_is_found(tmp_path, text):
    (tmp_path / "a.html").write_text(f'<a href="https://example.org">a link is none</a>{text}', encoding="utf-8")
    (name, asked), *more = DOCS.asked_elsewhere(tmp_path)
    assert name == "a.html" and "example/" in asked and not more


def test_links_that_are_not_there_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#y"></a><a href="c.html"></a><img src="data:x/y;,">', "utf-8")
    (tmp_path / "b.html").write_text('<p id="x"></p><a href="#x"></a><a href="a.html"></a>', encoding="utf-8")
    assert DOCS.broken_links(tmp_path) == [("a.html", "b.html#y"), ("a.html", "c.html")]


@pytest.mark.parametrize("words", COMMANDS)
def test_page_of_commands_has_each_with_options_and_examples(site, words):
    page, command = read(site, "cli/cli.html"), COMMANDS[words]
    assert f"<code>{words}</code>" in page
    plain = re.sub(r"<[^>]+>", "", page)
    for option in [p for p in command.params if isinstance(p, click.Option)]:
        assert option.opts[-1] in plain
    assert command.epilog, f"give {words} an example in _EXAMPLES of cli/10_cli.ipynb"
    assert "Command.__call__" not in plain


@pytest.mark.parametrize("words", COMMANDS)
def test_examples_are_understood_by_the_command(words):
    command = COMMANDS[words]
    lines = [line.strip() for line in (command.epilog or "").splitlines()[2:]]
    assert lines
    for line in lines:
        args = shlex.split(line.removeprefix('eval "$(').removesuffix(')"'))
        assert args[: len(words.split())] == words.split()
        context = click.Context(command, info_name=words)
        given, rest, _ = command.make_parser(context).parse_args(args[len(words.split()) :])
        assert not rest, f"{line}: {rest} is too much"
        missing = [p.name for p in command.params if p.required and not given.get(p.name)]
        assert not missing, f"{line}: {missing} is missing"


@pytest.mark.parametrize(("width", "phone"), [(1280, False), (390, True)])
def test_tables_fit(browser, address, site, width, phone):
    over = """JSON.stringify([...document.querySelectorAll('main table')].filter((t) => {
        for (let e = t; e.tagName !== 'MAIN'; e = e.parentElement) if (e.scrollWidth > e.clientWidth + 1) return true;
        return t.getBoundingClientRect().right > innerWidth + 1;
    }).map((t) => t.innerText.slice(0, 60)))"""
    tab = browser.open(f"{address}/index.html", width=width, phone=phone)
    try:
        for path in sorted(site.rglob("*.html")):
            tab.go(f"{address}/{path.relative_to(site).as_posix()}")
            assert json.loads(tab.run(over)) == [], path.name
            assert tab.run("document.documentElement.scrollWidth") <= width, path.name
        assert [url for url in tab.requests if not url.startswith((address, "data:"))] == []
    finally:
        tab.close()


CONTRAST = """((e) => {
    const rgb = (s) => (s.match(/[\\d.]+/g) || []).map(Number);
    const back = (n) => { for (; n; n = n.parentElement) { const c = rgb(getComputedStyle(n).backgroundColor);
        if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
    const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92
        : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(back(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05); })"""


@pytest.mark.parametrize(("width", "phone"), [(1280, False), (390, True)])
def test_search_can_be_read(browser, address, width, phone):
    tab = browser.open(f"{address}/index.html", width=width, phone=phone)
    try:
        if phone:
            tab.run("document.querySelector('.navbar-toggler').click()")
        tab.run("document.querySelector('.smalldocs-search input').focus()")
        tab.press("receipt")
        tab.until("document.querySelector('.smalldocs-search-results.show .search-result mark')")
        for part in ("input", ".search-result-title", ".search-result-section", ".search-result-text", "mark"):
            found = tab.run(f"{CONTRAST}(document.querySelector('.smalldocs-search {part}'))")
            assert found >= 4.5, f"{part}: contrast {found:.1f}, WCAG wants 4.5"
        assert tab.run("document.querySelector('.smalldocs-search-results').getBoundingClientRect().right") <= width
    finally:
        tab.close()
