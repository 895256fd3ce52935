"""Sphinx: pages in Markdown, equations as MathML, and pages made at build time; nothing is loaded from elsewhere."""

import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

from orl import __version__, cli
from orl.report import run

DOCS = Path(__file__).parent
PROJECT, GENERATED = DOCS.parent, DOCS / "_generated"

project, author, copyright = "ORL", "The ORL workflow authors", "MIT license"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
default_role = "code"  # docstrings have single backticks
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "ORL"
html_static_path = ["_static"]
html_css_files = ["orl.css"]
html_show_copyright = html_copy_source = False

logging.getLogger("faiss").setLevel(logging.WARNING)  # it tells how it is loaded


# Equations


def inline_math(translator, node):
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_math(translator, node):
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


# Pages that are made


def drawing(graph):
    """The report's drawing of the rules, as SVG."""
    width, height = run.BOX
    lines = [f'<div class="dag" tabindex="0"><svg viewBox="-2 -2 {graph.width + 4} {graph.height + 4}" role="img">',
             f"<title>{graph.alt}</title>"]  # fmt: skip
    lines += [f'<path d="{curve}"/>' for curve in graph.curves]
    for x, y, rule, _ in graph.boxes:
        kind = ' class="training"' if rule in ("stage1", "stage3") else ""
        lines.append(f'<rect x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="6"{kind}/>')
        lines.append(f'<text x="{x + width / 2:g}" y="{y + 25:g}">{rule}</text>')
    return "\n".join([*lines, "</svg></div>"])


def jobs():
    """The rules of config/config.yaml, by Snakemake itself."""
    command = [sys.executable, "-m", "snakemake", "--nolock", "--forceall", "--dag", "dot"]
    with tempfile.NamedTemporaryFile("w", suffix=".dot") as file:
        subprocess.run(command, cwd=PROJECT, stdout=file, stderr=subprocess.PIPE, check=True)
        return drawing(run.graph(Path(file.name), []))


def commands():
    """The help of every command."""
    os.environ["COLUMNS"] = "98"  # as wide a terminal, whatever this one is
    pages, left = [], [cli.parser()]
    while left:
        parser = left.pop(0)
        inner = [
            one for action in parser._actions if isinstance(action.choices, dict) for one in action.choices.values()
        ]
        left = inner + left
        pages.append(f"## {parser.prog}\n\n```text\n{parser.format_help()}```\n")
    return "# Command line\n\n" + "\n".join(pages)


COPIES = {"README.md": "readme", "CONTRIBUTING.md": "contributing", "config/README.md": "settings"}


def linked(text, folder):
    """A page that lies in `folder` of the project, with links to the pages here instead of to the project's files."""

    def link(found):
        path, mark, anchor = found[2].partition("#")
        file = os.path.normpath(f"{folder}/{path}")
        if anchor.startswith("key-"):
            return f"[{found[1]}](#{anchor})"
        if file in COPIES:
            return f"[{found[1]}](/_generated/{COPIES[file]}.md{mark}{anchor})"
        if file.startswith("docs/"):
            return f"[{found[1]}](/{file.removeprefix('docs/')}{mark}{anchor})" if file.endswith(".md") else found[0]
        return f"{found[1]} (`{file}`)" if path and (PROJECT / file).exists() else found[0]

    return re.sub(r"\[([^]]+)\]\(([^)\s]+)\)", link, text)


def copied(file):
    """A page of the project. Keys of config/README.md get anchors: stage1.views.size is #key-stage1-views-size."""
    text = (PROJECT / file).read_text(encoding="utf-8")
    if file == "config/README.md":
        keys, mark, rest = text.partition("\nDefaults of other")
        name = re.compile(r"^\| `([\w.]+)`", re.M)
        text = name.sub(lambda key: f"| [`{key[1]}`]{{#key-{key[1].replace('.', '-')}}}", keys) + mark + rest
    return linked(text, str(Path(file).parent))


def read(app, page, source):
    """Pages in docs/ link to files of the project, so that they can be read there, too."""
    if not page.startswith("_generated"):
        source[0] = linked(source[0], f"docs/{Path(page).parent}")


def generate(app):
    GENERATED.mkdir(exist_ok=True)
    made = {
        "dag.html": jobs(),
        "commands.md": commands(),
        **{f"{name}.md": copied(file) for file, name in COPIES.items()},
    }
    for name, text in made.items():
        path = GENERATED / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # else all would be built again
            path.write_text(text, encoding="utf-8")


# Docstrings


def plain(app, what, name, of, options, lines):
    """Outside of backticks, docstrings mean their asterisks, bars and underscores."""
    for number in reversed(range(1, len(lines))):  # as in Markdown, a list needs no blank line above it
        if lines[number].startswith("- ") and lines[number - 1][:1].strip("- "):
            lines.insert(number, "")
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [re.sub(r"([*|]|_\b)", r"\\\1", part) for part in parts[::2]]
        lines[number] = "".join(parts)


def setup(app):
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("builder-inited", generate)
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", plain)
