"""report.html: one file that works offline. In: records, events, configuration and the figure. Out: the page's text."""

import re
from html import escape
from typing import Any

from jepa_fast.config import Config, flatten
from jepa_fast.data.readers.generated import SETS
from jepa_fast.monitor.phase import PHASE
from jepa_fast.report.figure import COLOURS
from jepa_fast.report.logs import Record, last_of, left_out, values
from jepa_fast.report.verdict import verdict

CLAIMS = """<h2>What is measured beside what is claimed</h2>
<ul>
<li><b>The collapse phase</b> is the paper's (section 4.1): the loss improves, and the features are no better than random
ones. Here it begins when the loss has fallen to half of its start, and ends at the first of two looks in a row at which
the better encoder's probe is above the untrained encoder's by two standard errors. The loss minimum marks neither.</li>
<li><b>The skill</b> measures the paper's main assumption, that the predictor can converge to a trivial solution: at 0 it is
no better than a constant or than a copy of what it sees, whatever the loss.</li>
<li><b>The probability</b> is an estimate from signals that need no labels. Where there are probes, they decide, and the
estimate is only shown.</li>
<li><b>The discrepancy C</b> decides nothing here. It is small before the first step, when both encoders are equal, whatever
the features are worth.</li>
<li><b>The bound γ</b> (theorem 4.2, proposition 4.4) is an upper bound for one layer. It cannot show that the discrepancy is
small, so nothing is decided by it.</li>
<li><b>Corollary 4.3</b> says that a larger decay β reduces the discrepancy. The identity behind it,
θ<sub>t</sub> − θ̄<sub>t</sub> = βΔ<sub>t</sub> − (1−β) Σ β<sup>t−l</sup> Δ<sub>l</sub>, gives the opposite for weights
that move steadily: 0 at β = 0 and all of ‖Δ<sub>t</sub>‖ at β = 1. The drift is measured: compare runs.</li>
</ul>"""

CSS = f""":root{{{"".join(f"--{name}:{light};" for name, (light, _) in COLOURS.items())}color-scheme:light dark}}
@media(prefers-color-scheme:dark){{:root{{{"".join(f"--{name}:{dark};" for name, (_, dark) in COLOURS.items())}}}}}
body{{background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif;max-width:46rem;margin:0 auto;padding:2rem 1rem}}
h1{{font-size:1.5rem;margin:0}}h2{{font-size:1.1rem;margin:2.5rem 0 .5rem}}.quiet{{color:var(--muted);margin:.2rem 0}}
.verdict{{font-size:1.1rem;border-left:4px solid var(--orange);padding-left:1rem;margin:1.5rem 0}}details{{margin-top:2.5rem}}
.wide{{overflow-x:auto}}.card{{background:#fff;padding:.5rem;border-radius:6px}}svg{{width:100%;min-width:30rem;height:auto}}svg text{{font-family:system-ui,sans-serif!important}}
table{{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}}th{{color:var(--muted)}}
td,th{{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--rule);font-weight:400}}"""

NUMBERS = {
    "loss": "training loss", "probe/target": "probe, target encoder", "probe/context": "probe, context encoder",
    "probe/untrained": "probe, untrained encoder", "skill/smooth": "predictor's skill",
    "phase/useful/context": "probability useful, context encoder", "phase/useful/target": "probability useful, target encoder",
    "readout/context": "readout, context encoder", "readout": "readout, target encoder",
    "readout/untrained": "readout, untrained encoder", "position_share": "targets' variance between positions",
    "discrepancy/visible": "discrepancy, visible tokens", "discrepancy/full": "discrepancy, whole inputs",
    "discrepancy/relative": "visible / spread", "spread": "instance spread", "drift/total": "drift ‖θ − θ̄‖",
    "rankme": "RankMe, target encoder", "lidar": "LiDAR, target encoder", "bound/gamma": "bound γ",
    "bound/measured": "what γ bounds", "images_per_s": "samples per second",
    "time/data_wait": "seconds a step waited for data",
}  # fmt: skip


Section = tuple[str, str, str]  # heading, what to read there, drawing


def page(
    name: str, records: list[Record], events: list[Record], svg: str, sections: list[Section], config: Config | None,
    trouble: str,
) -> str:  # fmt: skip
    """The report of run `name`: `svg` is the glance, `sections` what lies behind it. `trouble` says why `config` is None."""
    told, description = [e for e in events if "evidence" in e], _description(config)
    facts = [_fact(event) for event in told]
    settings = list(flatten(config).items()) if config else []
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(name)}</title><style>{CSS}</style></head><body>
<h1>{escape(name)}</h1><p class="quiet">{escape(description)}</p><p class="quiet">{_progress(records, config)}</p>
<p class="verdict">{escape(verdict(records, told, description))}</p>
<div class="wide">{inline(svg, 0)}</div>
<h2>Events</h2>{_table(("step", "event", "called at", "confidence", "evidence"), facts, "None so far.")}
<p class="quiet">Each says what was known when it was called. The confidence of a fact is the chance that it is no accident of
noise; of what is suspected it is the probability of it.</p>
<h2>Key numbers</h2>{_table(("", "start", "lowest (step)", "highest (step)", "at loss minimum", "end"), _numbers(records, told), "None yet.")}
{"".join(_section(number, *section) for number, section in enumerate(sections, start=1))}
{CLAIMS}
<h2>Skipped steps, bad samples, resumes</h2>{_table(("step", "event", "details"), _incidents(events)[-50:], "None.")}
<p class="quiet">{escape(_more(events))}</p>
<details><summary>Settings</summary>{_table(("field", "value"), settings, trouble)}</details>
</body></html>
"""


def comparison(title: str, svg: str, rows: list[Record], claims: list[str]) -> str:
    """Several runs beside each other: figure, table, claims."""
    head = tuple(rows[0]) if rows else ()
    body = [tuple(f"{v:.4g}" if isinstance(v, float) else v for v in row.values()) for row in rows]
    said = "".join(f"<li>{escape(line)}</li>" for line in claims)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(title)}</title><style>{CSS}body{{max-width:64rem}}</style></head><body>
<h1>{escape(title)}</h1>
<div class="wide card">{inline(svg, 0, themed=False)}</div>
<h2>Numbers</h2>{_table(head, body, "None yet.")}
{f"<h2>What the paper claims, and what was measured</h2><ul>{said}</ul>" if said else ""}
</body></html>
"""


def inline(svg: str, number: int, themed: bool = True) -> str:
    """A drawing as part of a page: names of its own, and (themed) the page's colours, so that it follows light and dark."""
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="d{number}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#d{number}-", svg)
    if themed:
        for colour, (light, _) in COLOURS.items():
            svg = svg.replace(light, f"var(--{colour})")
    return svg


def _section(number: int, heading: str, says: str, svg: str) -> str:
    quiet = f'<p class="quiet">{escape(says)}</p>' if says else ""
    return f'<h2>{escape(heading)}</h2>{quiet}<div class="wide">{inline(svg, number)}</div>\n'


def _description(config: Config | None) -> str:
    if config is None:
        return ""
    data = config.data
    made = SETS[data.embedded].description if not data.path and data.embedded in SETS else ""
    return f"{config.preset}: {made or f'data of {data.path}'}"


def _progress(records: list[Record], config: Config | None) -> str:
    step = int(records[-1]["step"]) if records else 0
    if config and not config.train.steps:
        return f"Step {step:,} of {config.train.epochs:g} epochs."
    steps = config.train.steps if config else 0
    return f"Step {step:,} of {steps:,}: in progress, or stopped." if step < steps else f"{step:,} steps."


def _fact(event: Record) -> tuple[Any, ...]:
    """A row of the table of events."""
    when = f"{event['step']:,}"
    if event["kind"] == PHASE:
        when += f" to {event['end']:,}" if event.get("end") is not None else ", not over"
    return (
        when,
        event["kind"].replace("_", " "),
        f"{event['called_at']:,}",
        event["confidence"],
        "; ".join(event["evidence"]),
    )


def _numbers(records: list[Record], events: list[Record]) -> list[Any]:
    bottom, rows = last_of("loss_minimum", events), []
    for key, name in NUMBERS.items():
        if points := values(records, key):
            low, high = (extreme(points, key=lambda point: point[1]) for extreme in (min, max))
            there = f"{min(points, key=lambda p: abs(p[0] - bottom['step']))[1]:.3g}" if bottom else ""
            reached = (f"{value:.3g} ({step:,})" for step, value in (low, high))
            rows.append((name, f"{points[0][1]:.3g}", *reached, there, f"{points[-1][1]:.3g}"))
    return rows


def _incidents(events: list[Record]) -> list[Any]:
    """Events that are no phase event."""
    rows = []
    for event in (e for e in events if "evidence" not in e):
        details = ", ".join(f"{key}: {value}" for key, value in event.items() if key not in ("kind", "step"))
        rows.append((f"{event['step']:,}", event["kind"].replace("_", " "), details))
    return rows


def _more(events: list[Record]) -> str:
    """What the table of the last 50 does not show."""
    count = len(_incidents(events))
    said = [left_out(events), f"of {count} entries the last 50 are shown" if count > 50 else ""]
    return "; ".join(filter(None, said))


def _table(head: tuple[str, ...], rows: list[Any], empty: str) -> str:
    if not rows:
        return f"<p>{escape(empty)}</p>"
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>\n{body}</table></div>'
