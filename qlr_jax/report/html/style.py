"""The page's style sheet: one column on a phone, two on a desk, light or dark as the reader's system has it."""

import re

# Bits per weight, few to many: on a light page from pale to deep, on a dark page from deep to pale, so few bits recede on both.
RAMP = ("#cde2fb", "#9ec5f4", "#6da7ec", "#3987e5", "#256abf", "#184f95", "#0d366b")
PALE = 4  # so many of them carry dark letters

_LIGHT = """
  --page: #f6f6f4; --card: #fcfcfb; --ink: #161615; --soft: #5c5b57; --line: #dddcd6; --grid: #e9e8e3; --note: #fdf1d8;
  --original: #6e6d68; --allocated: #2a6fd0; --uniform: #c2500f; --rank0: #12805a;
  --attention: #2a6fd0; --mlp: #12805a; --other: #8a6d1f; --mlp2: #0c5f43; --other2: #654f14; --rest: #8b8a84; --on: #ffffff;
"""
_DARK = """
  --page: #121211; --card: #1b1b1a; --ink: #f2f1ec; --soft: #b3b1a9; --line: #3a3936; --grid: #2b2a28; --note: #3b3117;
  --original: #a8a69f; --allocated: #6da7ec; --uniform: #f0905a; --rank0: #4cc296;
  --attention: #6da7ec; --mlp: #4cc296; --other: #d3b04c; --mlp2: #86dcbc; --other2: #e6cf8c; --rest: #a8a69f; --on: #121211;
"""


def _ramp(colours: tuple[str, ...]) -> str:
    return "\n".join(
        f"  --step{at}: {colour}; --letters{at}: {'#0b0b0b' if RAMP.index(colour) < PALE else '#ffffff'};"
        for at, colour in enumerate(colours)
    )


# Name -> colour on a light page, for drawings that leave the page.
LIGHT = dict(re.findall(r"--(\w+): (#\w+);", _LIGHT + _ramp(RAMP)))


SVG_RULES = """
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--soft); }
svg text.label { fill: var(--ink); font-weight: 600; stroke: var(--card); stroke-width: 3px; paint-order: stroke; }
.grid { stroke: var(--grid); } .axis { stroke: var(--line); } .curve { fill: none; stroke: var(--soft); stroke-width: 2; }
.mark { stroke: var(--card); stroke-width: 1.5; }
"""

_RULES = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 8px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 0 0 2px; }
p { margin: 6px 0 12px; max-width: 74ch; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px;
  margin: 16px 0; min-width: 0; }
.soft, figcaption, small { color: var(--soft); font-size: .875rem; overflow-wrap: break-word; }
.note { background: var(--note); border-radius: 6px; padding: 8px 12px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 16px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; min-width: 0; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.25; font-weight: 650; }
.tile span { display: block; color: var(--soft); font-size: .84rem; line-height: 1.35; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; margin: 16px 0; }
.pair > section { margin: 0; } .pair > div { min-width: 0; } .pair > div > section:first-child { margin-top: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 8px; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
thead th { vertical-align: bottom; white-space: normal; line-height: 1.25; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.chosen td { font-weight: 650; }
.tag { border: 1px solid currentColor; border-radius: 99px; font-size: .72rem; font-weight: 500; padding: 0 7px;
  margin-left: 6px; white-space: nowrap; }
.meter { display: block; width: 64px; margin: 2px 0 0 auto; }
.meter i { display: block; height: 4px; border-radius: 2px; margin-left: auto; }
#cost td:last-child { width: 60%; } #cost .meter { width: 100%; margin: 0; } #cost .meter i { height: 8px; margin-left: 0; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
.stack { display: flex; gap: 2px; height: 34px; margin: 2px 0 12px; }
.stack i { display: block; min-width: 1px; border-radius: 3px; overflow: hidden; color: var(--on);
  font-style: normal; font-weight: 600; font-size: 12px; line-height: 34px; text-align: center; white-space: nowrap; }
.fit { position: relative; height: 34px; margin: 4px 0 14px; }
.fit i, .key { print-color-adjust: exact; }
.fit i { position: absolute; top: 0; bottom: 0; overflow: hidden; border-right: 2px solid var(--card); border-radius: 3px;
  color: var(--on); font-style: normal; font-weight: 600; font-size: 12px; line-height: 34px; text-align: center;
  white-space: nowrap; }
.fit b { position: absolute; top: -5px; bottom: -5px; border-left: 2px dashed var(--ink); }
.weights { background: var(--attention); }
.cache { background: repeating-linear-gradient(135deg, var(--mlp) 0 7px, var(--mlp2) 7px 10px); }
.work { background: repeating-linear-gradient(90deg, var(--other) 0 5px, var(--other2) 5px 7px); }
.fit i.free { border: 1px dashed var(--soft); color: var(--soft); line-height: 32px; } .key.free { border: 1px dashed var(--soft); }
.heat { width: min(100%, 680px); table-layout: fixed; border-collapse: separate; border-spacing: 2px; }
.heat td { border: 0; border-radius: 4px; padding: 4px 2px; text-align: center; font-size: .8rem;
  line-height: 1.2; white-space: normal; }
.heat th { text-align: center; padding: 2px 4px; border: 0; }
.heat th:first-child { width: 44px; text-align: right; }
.heat td span { display: inline-block; font-weight: 650; }
.ramp { display: flex; align-items: center; gap: 8px; margin: 4px 0 12px; font-size: .84rem; color: var(--soft); flex-wrap: wrap; }
.ramp div { display: flex; } .ramp i { width: 26px; height: 13px; }
figure { margin: 10px 0 0; } svg { display: block; width: 100%; height: auto; max-width: 520px; }
pre { overflow-x: auto; background: var(--page); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px;
  font-size: .82rem; line-height: 1.45;   white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--soft); }
details .scroll { max-height: 480px; overflow: auto; }
h3 { font-size: .95rem; margin: 14px 0 4px; }
@media (max-width: 720px) {
  main { padding: 12px 10px 40px; } section { padding: 14px 12px; }
  .tiles { grid-template-columns: repeat(2, 1fr); gap: 8px; } .tile { padding: 10px 12px; } .tile b { font-size: 1.3rem; }
  .tile:last-child:nth-child(odd) { grid-column: span 2; }
  .pair { grid-template-columns: minmax(0, 1fr); }
  table { font-size: .8rem; } th, td { padding: 5px 5px; }
  .tag { display: block; width: max-content; margin: 1px 0 0; }
  #quality td:nth-child(-n+2), #adapted td:first-child { white-space: normal; }
  #quality table, #size table { font-size: .75rem; } #quality th, #quality td { padding: 5px 3px; }
  #quality small { font-size: .72rem; }
  .meter { width: 38px; }
  .heat { width: 100%; } .heat td { font-size: .72rem; padding: 4px 0; }
  .heat th { padding: 2px 0; } .heat th:first-child { width: 34px; padding: 0 2px 0 0; }
}
@media print { section { break-inside: avoid; } details .scroll { max-height: none; } }
"""

CSS = (
    ":root { color-scheme: light dark;"
    + _LIGHT
    + _ramp(RAMP)
    + "\n}\n@media (prefers-color-scheme: dark) { :root {"
    + _DARK
    + _ramp(RAMP[::-1])
    + "\n} }\n"
    + "\n".join(f".s{at} {{ background: var(--step{at}); color: var(--letters{at}); }}" for at in range(len(RAMP)))
    + SVG_RULES
    + _RULES
)
