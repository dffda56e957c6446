"""The style sheet of the report page: one accent colour, light and dark."""

__all__ = ["STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfbf9; --raised: #ffffff; --ink: #1c2128; --soft: #5f6873; --faint: #98a0a9; --rule: #e4e4df;
  --accent: #1f5f99; --tint: #e9f0f7; --empty: #efefec; --heat-0: #eef4fa; --heat-1: #174a7a;
  --heat-ink: #1c2128; --heat-ink-high: #ffffff; --bad: #a2572c;
  --run-0: #1f5f99; --run-1: #c4560f; --run-2: #0b7f5e; --run-3: #a8558a; --run-4: #8a6d00; --run-5: #5f6873;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --raised: #1a1e23; --ink: #e4e7ea; --soft: #a0a9b3; --faint: #6d7681; --rule: #2b3138;
    --accent: #7fb6ea; --tint: #1d2b39; --empty: #20242a; --heat-0: #1b2630; --heat-1: #8cc2f2;
    --heat-ink: #e4e7ea; --heat-ink-high: #0d1620; --bad: #e0996c;
    --run-0: #7fb6ea; --run-1: #f0965a; --run-2: #55c9a4; --run-3: #dd9cc4; --run-4: #d9bd55; --run-5: #a0a9b3;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 "Inter", system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
main { max-width: 60rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; letter-spacing: -0.02em; font-weight: 650;
  margin: 0.25rem 0 0.75rem; }
h1 span { color: var(--soft); font-weight: 400; }
h2 { font-size: 1.2rem; letter-spacing: -0.01em; font-weight: 620; margin: 0 0 0.35rem; }
h3 { font-size: 0.92rem; font-weight: 600; margin: 0 0 0.3rem; }
h3.run { margin-top: 1.7rem; }
section { margin-top: 3.25rem; }
p { margin: 0.35rem 0 1rem; max-width: 44rem; }
.eyebrow { color: var(--accent); font-size: 0.78rem; letter-spacing: 0.08em; text-transform: uppercase;
  font-weight: 600;
  margin: 0; }
.lead, .caption, .meta { color: var(--soft); font-size: 0.9rem; }
.meta { display: flex; flex-wrap: wrap; gap: 0.15rem 1.1rem; margin: 0; padding: 0; list-style: none; }
.note { border-left: 3px solid var(--accent); background: var(--tint); padding: 0.7rem 1rem; margin: 1.4rem 0 0;
  font-size: 0.9rem; max-width: none; border-radius: 0 6px 6px 0; }
.note p { margin: 0; max-width: none; } .note p + p { margin-top: 0.35rem; }
.scroll { overflow-x: auto; margin: 0.9rem 0 0; padding-bottom: 2px; }
table { border-collapse: collapse; font-size: 0.875rem; }
.key { display: flex; flex-wrap: wrap; gap: 0.3rem 1.3rem; margin: 0.7rem 0 0; padding: 0; list-style: none;
  font-size: 0.85rem; color: var(--soft); }
.key i { display: inline-block; width: 1.4rem; border-top: 3px solid var(--c); margin-right: 0.45rem;
  vertical-align: 0.25em; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.8rem, 1fr)); gap: 1.6rem 1.2rem;
  margin-top: 2.4rem; }
.tile { border-top: 2px solid var(--rule); padding-top: 0.7rem; }
.tile:first-child { border-color: var(--accent); }
.tile b { display: block; font-size: 1.95rem; line-height: 1.15; letter-spacing: -0.02em; font-weight: 620; }
.tile:first-child b { color: var(--accent); }
.tile b small { font-size: 0.95rem; font-weight: 400; color: var(--soft); letter-spacing: 0; }
.tile span { font-size: 0.85rem; color: var(--soft); }
.tile em { display: block; font-style: normal; font-size: 0.78rem; color: var(--soft); line-height: 1.45;
  margin-top: 0.2rem; }

.heat { border-collapse: separate; border-spacing: 3px; margin-left: -3px; }
.heat th { font-weight: 500; color: var(--soft); text-align: left; padding: 0.2rem 0.5rem 0.2rem 0; font-size: 0.82rem;
  white-space: nowrap; }
.heat thead th { text-align: center; vertical-align: bottom; padding: 0 0.2rem 0.3rem; white-space: normal;
  width: 5.4rem;
  min-width: 5.4rem; max-width: 5.4rem; line-height: 1.25; overflow-wrap: break-word; }
.heat thead th:first-child { width: auto; min-width: 0; max-width: none; }
.heat td { text-align: center; min-width: 4.6rem; height: 2.5rem; padding: 0 0.3rem; border-radius: 4px;
  background: var(--heat-0); background: color-mix(in oklab, var(--heat-1) calc(var(--v) * 100%), var(--heat-0));
  color: var(--heat-ink); }
.heat td.high { color: var(--heat-ink-high); }
.heat td.unseen, .heat td.none { background: var(--empty); color: var(--faint); }
.heat td.own { font-weight: 650; }
.heat td.mean { background: none; color: var(--ink); font-weight: 600; }
.heat td.base, .heat th.base { border-left: 0.8rem solid transparent; background-clip: padding-box; }
.scale { display: flex; align-items: center; gap: 0.55rem; margin-top: 0.6rem; font-size: 0.78rem; color: var(--soft);
  flex-wrap: wrap; }
.scale i { width: 7rem; height: 0.55rem; border-radius: 3px;
  background: linear-gradient(to right in oklab, var(--heat-0), var(--heat-1)); }
.scale u { width: 1.1rem; height: 0.55rem; border-radius: 3px; background: var(--empty); margin-left: 0.9rem; }

.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: 1.5rem 1.6rem;
  margin-top: 1.2rem; }
.panel h3 { display: flex; justify-content: space-between; gap: 0.8rem; align-items: baseline; }
.panel h3 span { font-weight: 400; color: var(--soft); font-size: 0.82rem; white-space: nowrap; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 11px/1 inherit; font-family: inherit; font-size: 11px; fill: var(--soft);
  font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .mark { stroke: var(--faint); stroke-width: 1; stroke-dasharray: 2 3; }
svg .shade { fill: var(--empty); opacity: 0.75; }
svg .line { fill: none; stroke: var(--c); stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
svg .before { fill: none; stroke: var(--faint); stroke-width: 1.4; stroke-dasharray: 3 3; }
svg .other { fill: none; stroke: var(--faint); stroke-width: 1; opacity: 0.45; }
svg .thin { stroke-width: 1.1; opacity: 0.4; }
svg .dash-1 { stroke-dasharray: 7 4; } svg .dash-2 { stroke-dasharray: 2 4; } svg .dash-3 { stroke-dasharray: 9 3 2 3; }
svg .dash-4 { stroke-dasharray: 12 5; } svg .dash-5 { stroke-dasharray: 4 2; }
svg .dot { fill: var(--c); } svg .ring { fill: var(--paper); stroke: var(--faint); stroke-width: 1.4; }
svg text.value { fill: var(--c); font-weight: 600; font-size: 12px; }
.wide svg { min-width: 34rem; }

.bars { display: grid; grid-template-columns: minmax(6rem, max-content) minmax(8rem, 1fr) max-content;
  gap: 0.55rem 1rem;
  align-items: center; font-size: 0.875rem; margin-top: 1rem; }
.bar { display: contents; }
.bar:has(.head) > div { color: var(--soft); font-size: 0.78rem; }
.bars .num { text-align: right; white-space: nowrap; }
.bars .num small { color: var(--soft); font-size: 0.82rem; }
.track { position: relative; height: 0.95rem; }
.track::before { content: ""; position: absolute; inset: calc(50% - 0.5px) 0 auto; border-top: 1px solid var(--rule); }
.track.full::before { content: none; }
.track b { position: absolute; top: 50%; height: 0.5rem; margin-top: -0.25rem; background: var(--c); border-radius: 3px;
  min-width: 2px; }
.track b.light { opacity: 0.38; }
.track .at, .track .from { position: absolute; top: 50%; width: 0.7rem; height: 0.7rem; margin: -0.35rem 0 0 -0.35rem;
  border-radius: 50%; background: var(--c); }
.track .from { background: var(--paper); border: 2px solid var(--c); }
.track b.span { opacity: 0.38; border-radius: 0; }
.group { display: grid; gap: 0.15rem; }

.data { width: 100%; }
.data th, .data td { padding: 0.5rem 0.7rem; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
.data th { font-weight: 500; color: var(--soft); font-size: 0.82rem; vertical-align: bottom; }
.data th:first-child, .data td:first-child { text-align: left; padding-left: 0; min-width: 6rem; }
.data td small { display: block; color: var(--soft); font-size: 0.76rem; }
.data td small { font-weight: 400; }
.data td.best { font-weight: 650; }
.data i { display: inline-block; width: 0.65rem; height: 0.65rem; border-radius: 50%; background: var(--c);
  margin-right: 0.5rem; }

.samples { display: grid; gap: 2rem; margin-top: 1.2rem; }
.sample { display: grid; grid-template-columns: 11rem minmax(0, 1fr); gap: 0.4rem 1.6rem; padding-top: 1.4rem;
  border-top: 1px solid var(--rule); }
.sample img { width: 100%; height: auto; max-height: 15rem; object-fit: contain; object-position: left top;
  border-radius: 6px; }
.sample .question { margin: 0.1rem 0 0.5rem; white-space: pre-wrap; }
.sample table { font-size: 0.85rem; }
.sample td, .sample th { padding: 0.22rem 1.2rem 0.22rem 0; text-align: left; vertical-align: top; font-weight: 400; }
.sample th { color: var(--soft); white-space: nowrap; }
.sample tr.gold td { font-weight: 620; color: var(--accent); }
.sample .wrong { color: var(--bad); } .sample td:last-child { color: var(--soft); white-space: nowrap;
  padding-right: 0; }
.tick { color: var(--accent); }

dl.formulas { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.5rem 1.4rem;
  font-size: 0.875rem; margin: 0.9rem 0 0; }
dl.formulas dt { font-weight: 550; } dl.formulas dd { margin: 0; }
dl.formulas small { color: var(--soft); display: block; font-size: 0.8rem; }
code { font: 0.92em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
details { border-top: 1px solid var(--rule); padding: 0.8rem 0; }
  details:last-of-type { border-bottom: 1px solid var(--rule); }
summary { cursor: pointer; font-size: 0.92rem; font-weight: 550; }
details table { margin-top: 0.6rem; } details td { padding: 0.16rem 1.4rem 0.16rem 0; vertical-align: top; }
details td:first-child { color: var(--soft); white-space: nowrap; }
footer { margin-top: 3.5rem; color: var(--faint); font-size: 0.8rem; }
@media (max-width: 40rem) {
  main { padding: 2rem 1.1rem 3rem; }
  section { margin-top: 2.6rem; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
  .sample { grid-template-columns: minmax(0, 1fr); } .sample img { max-width: 15rem; }
  .bars { grid-template-columns: minmax(0, 1fr); gap: 0.9rem; }
  .bar { display: grid; grid-template-columns: minmax(0, 1fr) max-content; gap: 0.2rem 1rem; align-items: start; }
  .bar .group { grid-row: 2; grid-column: 1 / -1; }
  .bar:has(.head) { display: none; }
  .wide svg { min-width: 43rem; }
  .heat td { min-width: 3.3rem; }
  .heat thead th { width: 3.9rem; min-width: 3.9rem; max-width: 3.9rem; font-size: 0.76rem; }
  .heat tbody th { white-space: normal; min-width: 5rem; line-height: 1.2; }
  dl.formulas { grid-template-columns: minmax(0, 1fr); gap: 0.1rem; } dl.formulas dd { margin-bottom: 0.7rem; }
}
@media print { :root { color-scheme: light; } section { break-inside: avoid; } }
"""
