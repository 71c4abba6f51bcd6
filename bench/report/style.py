"""How the report looks: on paper, on a phone, on a wide screen, by day and by night."""

from __future__ import annotations

# Okabe and Ito's colours, told apart with any colour vision; by night lighter, so that they stand out as much.
_LIGHT = ("#0072b2", "#c44e00", "#00805c", "#a8548a", "#2c8fc4", "#9c6b00")
_DARK = ("#5cb3ea", "#ff9252", "#3fcfa0", "#e69cc8", "#9bd8ff", "#f2b84b")


def _series(colors: tuple[str, ...]) -> str:
    return " ".join(f"--series-{number}: {color};" for number, color in enumerate(colors))


_DAY = f"""
  --paper: #ffffff; --card: #f5f7f9; --ink: #17202a; --quiet: #55626f; --line: #d5dce3; --grid: #dfe5ea;
  --accent: #005f99; --good: #00694a; --lightness: 40%;
  {_series(_LIGHT)}"""
_NIGHT = f"""
  --paper: #12161b; --card: #1b2128; --ink: #e7ecf1; --quiet: #a3b0bd; --line: #333d48; --grid: #2a333d;
  --accent: #7cc4ff; --good: #4fd1a5; --lightness: 70%;
  {_series(_DARK)}"""

CSS = f"""
:root {{ color-scheme: light; {_DAY} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {_NIGHT} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }}
body {{ margin: 0 auto; padding: 1.25rem 1rem 4rem; max-width: 72rem; overflow-wrap: break-word;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif; }}
h1 {{ margin: .5rem 0 0; font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2; letter-spacing: -.01em;
  overflow-wrap: anywhere; }}
h2 {{ margin: 0 0 .75rem; font-size: 1.35rem; line-height: 1.25; }}
h3 {{ margin: 1.75rem 0 .5rem; font-size: 1.05rem; overflow-wrap: anywhere; }}
section {{ margin-top: 2.5rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }}
a {{ color: var(--accent); }}
:focus-visible {{ outline: 2px solid var(--accent); outline-offset: 2px; }}
.lead {{ margin: .35rem 0 0; color: var(--quiet); }}
.note {{ max-width: 46rem; margin: .5rem 0; color: var(--quiet); font-size: .92rem; }}
nav {{ display: flex; flex-wrap: wrap; gap: .4rem; margin-top: 1.1rem; }}
nav a {{ padding: .2rem .7rem; border: 1px solid var(--line); border-radius: 2rem; font-size: .88rem;
  text-decoration: none; }}
nav a:hover {{ border-color: var(--accent); }}

.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 10rem), 1fr)); gap: .75rem; }}
.tile {{ padding: .8rem 1rem; border-radius: .6rem; background: var(--card); border: 1px solid var(--line); }}
.tile b {{ display: block; font-size: 1.65rem; line-height: 1.2; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }}
.tile span {{ display: block; color: var(--quiet); font-size: .86rem; line-height: 1.35; }}
.tile .what {{ color: var(--ink); font-weight: 600; }}

.pipeline {{ list-style: none; display: grid; margin: 1.25rem 0 0; padding: 0; gap: 1.5rem; }}
.pipeline li {{ position: relative; display: grid; grid-template-columns: 6.5rem 1fr; padding: .55rem .9rem;
  border: 1px solid var(--line); border-left: 3px solid var(--accent); border-radius: .6rem; line-height: 1.4;
  font-size: .86rem; overflow-wrap: anywhere; }}
.pipeline b {{ grid-row: 1 / span 9; font-size: .95rem; line-height: 1.3; }}
.pipeline span {{ grid-column: 2; color: var(--quiet); }}
.pipeline li + li::before {{ content: "\\2193"; position: absolute; top: -1.45rem; left: 1.2rem;
  color: var(--quiet); }}
@media (min-width: 60rem) {{
  .pipeline {{ grid-template-columns: repeat(6, 1fr); }}
  .pipeline li {{ display: block; padding: .7rem .8rem; border: 1px solid var(--line);
    border-top: 3px solid var(--accent); }}
  .pipeline b, .pipeline span {{ display: block; }}
  .pipeline li + li::before {{ content: "\\2192"; top: .6rem; left: -1.35rem; width: 1.2rem; text-align: center; }}
}}

.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.25rem; }}
.charts > * {{ min-width: 0; }}
figure {{ margin: 1rem 0; min-width: 0; }}
.charts figure {{ margin: 0; }}
figcaption {{ color: var(--quiet); font-size: .88rem; line-height: 1.4; }}
svg {{ display: block; width: 100%; max-width: 31rem; height: auto; color: var(--ink); }}
svg * {{ stroke-linejoin: round; stroke-linecap: butt; }}
svg text {{ font-family: inherit; font-variant-numeric: tabular-nums; }}

.wide {{ overflow-x: auto; margin: .9rem 0; }}
table {{ border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; padding-bottom: .35rem; color: var(--quiet); position: sticky; left: 0; }}
th, td {{ padding: .3rem .7rem; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--line);
  white-space: nowrap; }}
th {{ font-weight: 600; }}
thead th {{ color: var(--quiet); font-weight: 500; vertical-align: bottom; border-bottom-color: var(--quiet); }}
thead th.number {{ white-space: normal; min-width: 4.5rem; }}
tbody th[scope=row] {{ position: sticky; left: 0; background: var(--paper); white-space: normal;
  max-width: 40vw; }}
.number {{ text-align: right; }}
.ours {{ color: var(--good); font-weight: 700; }}
.prose td {{ white-space: normal; min-width: 12rem; }}

.confusion {{ font-size: .8rem; }}
.confusion td {{ min-width: 2.3rem; padding: .3rem; text-align: center; border: 1px solid var(--line); }}
.confusion thead th {{ text-align: center; }}
.confusion td.right {{ background: color-mix(in srgb, var(--series-0) calc(var(--share) * 45%), transparent); }}
.confusion td.wrong {{
  background: color-mix(in srgb, var(--series-1) calc(15% + var(--share) * 55%), transparent); }}
.confusion td.none {{ color: var(--quiet); }}

.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19.5rem), 1fr)); gap: .9rem; }}
.card {{ padding: .7rem .8rem; border: 1px solid var(--line); border-radius: .6rem; background: var(--card);
  break-inside: avoid; }}
.card h4 {{ margin: 0 0 .45rem; font-size: .9rem; overflow-wrap: anywhere; }}
.row {{ display: flex; gap: .45rem; }}
.row figure {{ flex: 1 1 0; margin: 0; }}
.row img {{ display: block; width: 100%; height: auto; background: #000; image-rendering: pixelated;
  border-radius: .25rem; }}
.row figcaption {{ margin-top: .25rem; font-size: .76rem; line-height: 1.3; overflow-wrap: anywhere; }}
.row figcaption b, .row figcaption span {{ display: block; }}
.row figcaption b {{ color: var(--ink); font-weight: 600; }}
.miss {{ color: var(--series-1); font-weight: 600; }}

pre {{ margin: .4rem 0; padding: .6rem .8rem; overflow-x: auto; background: var(--card); font-size: .84rem;
  border: 1px solid var(--line); border-radius: .4rem; }}
code {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
details {{ margin: .7rem 0; }}
summary {{ cursor: pointer; color: var(--accent); }}

@media print {{
  @page {{ margin: 14mm; }}
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  nav {{ display: none; }}
  section {{ margin-top: 1.2rem; padding-top: .8rem; }}
  h2, h3, caption {{ break-after: avoid; }}
  figure, tr, .tile, .pipeline li, pre {{ break-inside: avoid; }}
  .wide, pre {{ overflow: visible; }}
  pre, pre code {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
  table {{ font-size: 7pt; }}
  th, td, thead th.number, .prose td {{ min-width: 0; padding: .15rem .25rem; white-space: normal;
    overflow-wrap: anywhere; }}
  tbody th[scope=row] {{ position: static; max-width: none; }}
  .confusion td, .card, .tile, td {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
  details::details-content {{ content-visibility: visible; display: block; }}
}}
"""
