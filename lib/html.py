"""Elements of an HTML page: tables, pictures, verdicts, and curves as SVG.

Text is escaped unless `tag` made it, so that the name of a folder cannot become part of the page.
"""
import base64
import itertools
import math
from html import escape

STYLE = """
body { margin: auto; padding: 16px; max-width: 1200px; font: 15px system-ui, sans-serif;
  overflow-wrap: anywhere }
p { margin: 4px 0 } img { display: block; max-width: 100% } div { overflow-x: auto }
td, th { padding: 3px 14px 3px 0; min-width: 64px; font-size: 13px; text-align: left }
.ok { color: #1f8a40 } .watch { color: #b86e00 } .bad { color: #d9363e }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)) }
figure { margin: 8px } figcaption span { margin-right: 12px; font-size: 13px }
text { fill: currentColor; font-size: 11px } line { stroke: #8885 }
path { fill: none; stroke: currentColor; stroke-width: 2; stroke-linecap: round }
.c0 { color: #2f7ed8 } .c1 { color: #e4761b } .c2 { color: #22a06b } .c3 { color: #b04bc9 }
.c4 { color: #8b7a1e } .c5 { color: #d6336c } .c6 { color: #14a3b8 } .c7 { color: #7a6ff0 }
"""

VOID = ("img", "meta", "br")  # elements without an end tag
WIDTH, HEIGHT = 400, 220  # of a figure with curves
LEFT, RIGHT, TOP, BOTTOM = 46, 22, 8, 22  # its margins, for the numbers at the axes


class Html(str):
    """Text that is HTML already."""


def tag(name, /, *inside, **attributes):
    """Html of an element. The attribute class_ stands for class, a_b for a-b."""
    words = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
                    for key, value in attributes.items())
    body = "".join(x if isinstance(x, Html) else escape(show(x)) for x in inside)
    return Html(f"<{name}{words}>" + ("" if name in VOID else f"{body}</{name}>"))


def show(value):
    """Text of a number or a setting."""
    if value is None or value != value:
        return "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {show(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows, head=()):
    """Table of rows of cells; scrolls sideways if it is too wide."""
    lines = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return tag("div", tag("table", tag("tr", *(tag("th", cell) for cell in head)), *lines))


def leaves(tree, path=()):
    """Yield (names joined by commas, value) of a nested dict; a dict of single values is one."""
    for name, value in tree.items():
        inside = value.values() if isinstance(value, dict) else ()
        if any(isinstance(v, (dict, list, tuple)) for v in inside):
            yield from leaves(value, (*path, name))
        else:
            yield ", ".join((*path, name)), value


def image(path, text):
    """Embedded picture of a PNG file; empty Html if it is not there."""
    if not path.is_file():
        return Html("")
    source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return tag("figure", tag("figcaption", text), tag("img", src=source, alt=text))


def page(title, sections):
    """Bytes of a whole page of {heading: Html}."""
    head = tag("head", tag("meta", charset="utf-8"), tag("title", title),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("style", Html(STYLE)))
    parts = [part for heading, body in sections.items() for part in (tag("h2", heading), body)]
    text = tag("html", head, tag("body", tag("h1", title), *parts), lang="en")
    return f"<!DOCTYPE html>\n{text}".encode("utf-8", "backslashreplace")  # a name may not be UTF-8


def draw(title, curves):
    """Figure of {label: [(x, y)]} with x >= 0, where a y that is not finite is a gap; empty Html if
    none is finite."""
    finite = [point for points in curves.values() for point in points if math.isfinite(point[1])]
    if not finite:
        return Html("")
    xs, ys = zip(*finite, strict=True)
    last = max(xs) or 1
    low, height = min(ys), max(ys) - min(ys) or 1

    def across(x):
        return round(LEFT + x / last * (WIDTH - LEFT - RIGHT), 1)

    def down(y):
        return round(HEIGHT - BOTTOM - (y - low) / height * (HEIGHT - TOP - BOTTOM), 1)

    parts, legend = [], [tag("b", title), tag("br")]
    for part in (0, 0.25, 0.5, 0.75, 1):
        x, y = part * last, low + part * height
        parts += [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=down(y), y2=down(y)),
                  tag("text", f"{y:.3g}", x=LEFT - 4, y=down(y) + 4, text_anchor="end"),
                  tag("text", f"{x:.0f}", x=across(x), y=HEIGHT - 6, text_anchor="middle")]
    for i, (label, points) in enumerate(curves.items()):
        path = ""
        for is_curve, part in itertools.groupby(points, lambda point: math.isfinite(point[1])):
            if is_curve:  # h0 makes a point between two gaps a dot
                path += "M" + "L".join(f"{across(x)} {down(y)}" for x, y in part) + "h0"
        if points:
            parts.append(tag("path", tag("title", label), d=path, class_=f"c{i % 8}"))
            legend.append(tag("span", f"━ {label} {show(points[-1][1])}", class_=f"c{i % 8}"))
    svg = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    return tag("figure", tag("figcaption", *legend), svg)
