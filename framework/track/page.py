"""The frame and the style of report.html: one column on a phone, more on a desk, light or dark."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{
  --ground: #f6f5f1; --card: #ffffff; --ink: #1d2321; --faint: #66706b; --rule: #e3e1d9;
  --good: #1a7f4b; --bad: #b3382c; --open: #9a6700;
  --line-0: #1f7a4d; --line-1: #d2691e; --line-2: #3867b7; --line-3: #8a4fb5;
  --line-4: #b8860b; --line-5: #0f8b8d; --line-6: #c2406b; --line-7: #6b7280;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --ground: #131715; --card: #1b211e; --ink: #e6ebe7; --faint: #94a09a; --rule: #2c3430;
    --good: #57c08a; --bad: #f0877c; --open: #e0b050;
    --line-0: #57c08a; --line-1: #f0965a; --line-2: #7aa5f0; --line-3: #c08ce6;
    --line-4: #e0b84a; --line-5: #4fc3c5; --line-6: #ef7fa3; --line-7: #a3adb5;
  }}
}}
* {{ box-sizing: border-box; }}
body {{
  margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 82rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}}
header {{ border-bottom: 1px solid var(--rule); padding-bottom: 1rem; }}
h1 {{ margin: 0; font-size: 1.8rem; letter-spacing: -.02em; overflow-wrap: anywhere; }}
h1 em {{
  font: 600 .8rem/1.6 system-ui, sans-serif; letter-spacing: .02em; vertical-align: middle;
  padding: .1rem .6rem; margin-left: .4rem; border: 1px solid currentColor; border-radius: 1rem;
  white-space: nowrap;
}}
header p {{ margin: .3rem 0 0; color: var(--faint); overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .8rem; }}
.good {{ --mood: var(--good); }} .bad {{ --mood: var(--bad); }} .open {{ --mood: var(--open); }}
em.good, em.bad, em.open {{ color: var(--mood); }}
.tiles {{
  display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr));
  margin-top: 1.4rem;
}}
.tile, figure, article, .sheet {{
  background: var(--card); border: 1px solid var(--rule); border-radius: .7rem;
  margin: 0; padding: .8rem 1rem;
}}
.tile {{ border-top: 3px solid var(--mood, var(--rule)); display: flex; flex-direction: column; }}
.tile span, .tile small, small {{ color: var(--faint); font-size: .82rem; overflow-wrap: anywhere; }}
.tile b {{
  font-size: 1.5rem; line-height: 1.35; letter-spacing: -.02em; font-variant-numeric: tabular-nums;
}}
.tile i {{ color: var(--faint); font-weight: 400; font-size: 1rem; font-style: normal; }}
.charts {{
  display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr));
}}
figure {{ padding: .8rem .8rem .4rem; }}
figcaption {{ font-weight: 600; font-size: .95rem; }}
figcaption small {{ font-weight: 400; }}
svg {{ width: 100%; height: auto; display: block; margin-top: .3rem; }}
svg text {{ fill: var(--faint); font: 11.5px system-ui, sans-serif; font-variant-numeric: tabular-nums; }}
.grid {{ stroke: var(--rule); }}
.mark {{ stroke: var(--faint); stroke-dasharray: 3 3; }}
path {{ fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }}
path.raw {{ opacity: .28; stroke-width: 1.2; }}
.hit {{ fill: transparent; }} .hit:hover {{ fill: var(--ink); fill-opacity: .2; }}
ul {{ list-style: none; margin: 0; padding: 0; }}
.legend {{ display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .82rem; color: var(--faint); }}
.legend i, .key {{
  display: inline-block; width: .7rem; height: .7rem; border-radius: .2rem; margin-right: .35rem;
}}
.samples {{ display: grid; gap: .8rem; }}
article p {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
.prompt {{
  color: var(--faint); border-left: 3px solid var(--rule); padding-left: .7rem; max-height: 14rem;
  overflow: auto;
}}
.answers {{
  display: grid; gap: .6rem 1.2rem; margin-top: .7rem;
  grid-template-columns: repeat(auto-fit, minmax(min(14rem, 100%), 1fr));
}}
.answers div {{ max-height: 18rem; overflow: auto; }}
.answers span {{
  display: block; color: var(--faint); font-size: .78rem; text-transform: uppercase;
  letter-spacing: .06em;
}}
.answers .after span {{ color: var(--good); font-weight: 600; }}
.bar {{
  display: flex; height: 1.1rem; border-radius: .5rem; overflow: hidden; gap: 2px; margin-bottom: .8rem;
}}
table {{
  border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; max-width: 44rem;
  font-size: .92rem;
}}
td, th {{
  text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--rule); font-weight: 400;
}}
th {{ color: var(--faint); font-size: .82rem; }}
td:first-child, th:first-child {{ text-align: left; padding-left: 0; overflow-wrap: anywhere; }}
table.wide {{ max-width: none; }}
.wide td, .wide th {{ white-space: nowrap; overflow-wrap: normal; }}
.samples > * {{ min-width: 0; }}
.events li {{ padding: .15rem 0; overflow-wrap: anywhere; }}
.events b {{
  display: inline-block; min-width: 6rem; font-weight: 600; color: var(--faint); font-size: .85rem;
}}
summary {{ cursor: pointer; color: var(--faint); }}
pre {{
  margin: .6rem 0; overflow-x: auto; font: .82rem/1.45 ui-monospace, SFMono-Regular, Menlo, monospace;
}}
article > pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
article h2 {{ margin-top: 0; }}
.scroll {{ overflow-x: auto; }}
.pictures figure.wide {{ grid-column: 1 / -1; }}
.axis {{ stroke: var(--faint); }}
.pictures .wide text {{ paint-order: stroke; stroke: var(--card); stroke-width: 4px; }}
svg text.name {{ fill: var(--ink); font-weight: 600; }}
path.best {{ stroke-width: 3; }} path.run {{ stroke-width: 1.6; }}
path.run:hover {{ stroke-opacity: 1 !important; stroke-width: 3; }}
path.front {{ stroke: var(--good); stroke-dasharray: 4 4; stroke-width: 1.4; }}
circle.best {{ fill: var(--good); }} circle.run {{ fill: var(--line-2); fill-opacity: .55; }}
tr.best td {{ color: var(--good); font-weight: 600; }}
.words td:not(:first-child), .words th:not(:first-child) {{ text-align: left; white-space: normal; }}
a {{ color: inherit; }}
@media print {{ body {{ max-width: none; }} figure, article {{ break-inside: avoid; }} }}
</style>
</head>
<body>
<header><h1>{title} <em class="{mood}">{status}</em></h1><p>{about}</p></header>
<main>{body}</main>
</body>
</html>
"""

CONFIGURATION = """<details class="sheet"><summary>every key, resolved</summary><pre>{text}</pre></details>"""
