"""The pieces of an HTML page: elements, tables, pictures, and curves as SVG.

What is put into an element is escaped unless it was made by `tag`: a name from a folder cannot
become a part of the page. Nothing refers to another file.
"""
import base64
import html
import itertools
import math

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2126; --faint: #8885; --soft: #8881;
  --ok: #1a7f37; --watch: #b86e00; --bad: #cf222e }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #dfe3e8; --ok: #3fb950;
  --watch: #d99a2b; --bad: #f5635c } }
body { margin: 0 auto; padding: 16px; max-width: 1200px; background: var(--paper);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 24px; margin: 0 0 8px } h2 { font-size: 19px; margin: 32px 0 8px }
h3 { font-size: 15px; margin: 20px 0 4px } p { margin: 4px 0 } code { font-size: 13px }
img { display: block; max-width: 100%; height: auto; margin: 4px 0 }
figure { margin: 0; min-width: 0; display: flex; flex-direction: column;
  justify-content: space-between } svg { display: block; width: 100%; height: auto }
figcaption span { margin-right: 12px; white-space: nowrap; font-size: 13px }
.grid { display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)) }
.scroll { overflow-x: auto } .pairs td { overflow-wrap: anywhere; white-space: normal }
td:first-child { white-space: nowrap }
@media (max-width: 600px) { td:first-child { white-space: normal; overflow-wrap: anywhere;
  min-width: 84px } }
summary { cursor: pointer; margin: 8px 0 }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; min-width: 60px;
  border-bottom: 1px solid var(--faint); overflow-wrap: normal }
ul { list-style: none; padding: 0; margin: 8px 0 } li { margin: 10px 0 }
.badge { color: var(--paper); border-radius: 4px; padding: 1px 7px; font-size: 12px;
  font-weight: 700 }
.badge.ok { background: var(--ok) } .badge.watch { background: var(--watch) }
.badge.bad { background: var(--bad) } td.watch { color: var(--watch) } td.bad { color: var(--bad) }
.zone { opacity: .13 } .zone.ok { fill: var(--ok) } .zone.watch { fill: var(--watch) }
.zone.bad { fill: var(--bad) } .axis { stroke: var(--faint) }
.mark { stroke: var(--ink); stroke-dasharray: 2 3; opacity: .7 } text { fill: var(--ink);
  font-size: 11px } .curve { fill: none; stroke: currentColor; stroke-width: 1.6;
  stroke-linecap: round; stroke-linejoin: round } .dashed { stroke-dasharray: 4 4 }
.dots { stroke-width: 6; stroke-dasharray: none }
.c0 { color: #2f7ed8 } .c1 { color: #e4761b } .c2 { color: #22a06b } .c3 { color: #b04bc9 }
.c4 { color: #8b7a1e } .c5 { color: #d6336c } .c6 { color: #14a3b8 } .c7 { color: #7a6ff0 }
"""

VOID = ("img", "meta", "br")  # elements without an end
# No network and no script, even if a name were not escaped.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Text that is HTML already."""


def tag(name, /, *inside, **attributes):
    """Html of an element; an attribute class_ is its class, a_b is a-b."""
    words = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
                    for key, value in attributes.items())
    body = "".join(x if isinstance(x, Html) else html.escape(show(x)) for x in inside)
    return Html(f"<{name}{words}>" + ("" if name in VOID else f"{body}</{name}>"))


def show(value):
    """A number or a setting as text."""
    if value is None or value != value:
        return "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows, head=()):
    """Rows of cells under headings, in a box that scrolls by itself where it is too wide; without
    headings, names and values that are wrapped. A cell that is a `td` already stays one."""
    lines = [tag("tr", *(tag("th", x) for x in head))] if head else []
    for row in rows:
        cells = [x if isinstance(x, Html) and x.startswith("<td") else tag("td", x) for x in row]
        lines.append(tag("tr", *cells))
    return tag("div", tag("table", *lines), class_="scroll" if head else "pairs")


def nested_table(groups):
    """A table of {group: {row: {name: number}}}, a column for each name."""
    names = dict.fromkeys(n for rows in groups.values() for row in rows.values() for n in row)
    rows = [[group, row, *(values.get(name, "") for name in names)]
            for group, rows in groups.items() for row, values in rows.items()]
    return table(rows, ["", "", *names])


def side_by_side(columns, only_different=False):
    """A table of {heading: {name: cell}}, a row for each name."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name) for column in columns.values())] for name in names]
    rows = [row for row in rows if not only_different or any(cell != row[1] for cell in row[2:])]
    return table(rows, ["", *columns])


def badge(level):
    """A coloured OK, WATCH, BAD, PASS or FAIL."""
    colour = {"pass": "ok", "fail": "bad"}.get(level, level)
    return tag("span", level.upper(), class_=f"badge {colour}")


def verdict_list(verdicts):
    """metrics.Verdicts: the bad ones and what to do, those to watch, the others behind a click."""
    items = {level: [] for level in ("bad", "watch", "ok")}
    for v in verdicts:
        advice = "" if v.level == "ok" else tag("p", v.advice)
        items[v.level].append(tag("li", badge(v.level), " ", tag("code", v.metric), " ",
                                  tag("b", v.value), tag("p", v.meaning), advice))
    fine = tag("summary", badge("ok"), f" {len(items['ok'])} of {len(verdicts)}")
    return tag("div", tag("ul", *items["bad"], *items["watch"]),
               tag("details", fine, tag("ul", *items["ok"])))


def picture(path, text):
    """A PNG file as part of the page; its text alone where it cannot be read."""
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError as e:
        return tag("p", f"{text}: {e.strerror}")
    return tag("img", src=f"data:image/png;base64,{data}", alt=text, title=text)


def page(title, *sections):
    """Bytes of a whole page."""
    head = tag("head", tag("meta", charset="utf-8"),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
               tag("title", title), tag("style", Html(STYLE)))
    text = "<!DOCTYPE html>\n" + tag("html", head, tag("body", *sections), lang="en")
    return text.encode("utf-8", "backslashreplace")  # a folder's name may be no UTF-8


# --- curves -------------------------------------------------------------------------------------

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22  # margins, for the numbers at the axes


def thin(points, most=400):
    """At most about so many points: of each stretch the lowest and the highest, so that spikes
    stay."""
    if len(points) <= most:
        return points
    kept = []
    for i in range(most // 2):
        part = points[i * len(points) // (most // 2):(i + 1) * len(points) // (most // 2)]
        finite = [p for p in part if math.isfinite(p[1])]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else ()
        kept += sorted(ends) or part[:1]
    return kept


def ticks(low, high, log):
    """A few round numbers from low to high; log: these are exponents of 10."""
    if log:
        factors = (1, 2, 5) if high - low < 2 else (1,)
        marks = [factor * 10.0**exponent for factor in factors
                 for exponent in range(math.floor(low), math.ceil(high) + 1)]
        marks = sorted(mark for mark in marks if low <= math.log10(mark) <= high)
        if len(marks) > 1:
            return marks[::math.ceil(len(marks) / 6)]
        low, high = 10**low, 10**high
    step = 10.0 ** math.floor(math.log10(high - low))
    step *= next(part for part in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (step * part) <= 5)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def zones(low, high, unscale, level_at):
    """[(level, from, to)] of 80 bands between low and high, those of one level joined."""
    edges = [low + (high - low) * i / 80 for i in range(81)]
    bands = [(level_at(unscale((a + b) / 2)), a, b) for a, b in itertools.pairwise(edges)]
    groups = [list(group) for _, group in itertools.groupby(bands, key=lambda band: band[0])]
    return [(group[0][0], group[0][1], group[-1][2]) for group in groups if group[0][0]]


def draw(title, curves, log=False, level_at=None, mark=None, dashed=(), x_names=None):
    """A figure of {label: [(x, y)]}, x from 0 on; a y that is not finite is a gap.

    log: of the y axis. level_at(y): the verdict that shades the height y, or None. mark: (x, text)
    of a vertical line. dashed: labels. x_names: those of x = 0, 1, ... Nothing without a number.
    """
    def drawable(y):
        return math.isfinite(y) and (y > 0 or not log)

    curves = {label: thin(points) for label, points in curves.items()}
    found = [(x, y) for points in curves.values() for x, y in points if drawable(y)]
    if not found:
        return Html("")
    scale, unscale = (math.log10, lambda v: 10**v) if log else (float, float)
    last = max(x for x, _ in found) or 1
    low, high = scale(min(y for _, y in found)), scale(max(y for _, y in found))
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    low, high = low - margin, high + margin

    def across(x):
        return round(LEFT + x / last * (WIDTH - LEFT - RIGHT), 1)

    def down(scaled):
        return round(HEIGHT - BOTTOM - (scaled - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = []
    for level, start, end in zones(low, high, unscale, level_at) if level_at else ():
        parts.append(tag("rect", tag("title", level), x=LEFT, width=WIDTH - LEFT - RIGHT,
                         y=down(end), height=round(down(start) - down(end), 1),
                         class_=f"zone {level}"))
    for y in ticks(low, high, log):
        at = down(scale(y))
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="axis"))
        parts.append(tag("text", f"{y:.4g}", x=LEFT - 4, y=at + 4, text_anchor="end"))
    names = enumerate(x_names) if x_names else ((x, f"{x:g}") for x in ticks(0, last, False))
    for x, name in names:
        anchor = "end" if across(x) > WIDTH - 30 else "middle"
        parts.append(tag("text", name, x=across(x), y=HEIGHT - 6, text_anchor=anchor))
    if mark:
        x, text = mark
        right = across(x) > WIDTH / 2
        parts.append(tag("line", x1=across(x), x2=across(x), y1=TOP, y2=HEIGHT - BOTTOM,
                         class_="mark"))
        parts.append(tag("text", text, x=across(x) + (-4 if right else 4), y=TOP + 10,
                         text_anchor="end" if right else "start"))
    legend = [tag("b", title), tag("br")]
    for i, (label, points) in enumerate(curves.items()):
        if not points:  # but its colour is taken, so that a run has the same in all figures
            continue
        words, pen = [], "M"
        for x, y in points:
            if drawable(y):  # h0: a point between two gaps is a dot
                words.append(f"{pen}{across(x)} {down(scale(y))}{'h0' if pen == 'M' else ''}")
            pen = "L" if drawable(y) else "M"
        style = f"c{i % 8} dashed" if label in dashed else f"c{i % 8}"
        dots = "" if any(word[0] == "L" for word in words) else " dots"  # else too thin to be seen
        parts.append(tag("path", tag("title", label), d="".join(words),
                         class_=f"curve {style}{dots}"))
        line = tag("b", "┄ " if label in dashed else "━ ", class_=style)
        legend.append(tag("span", line, f"{label} {show(points[-1][1])}"))
    svg = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    return tag("figure", tag("figcaption", *legend), svg)
