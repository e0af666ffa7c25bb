"""How the report looks, in light and dark and on paper."""

STYLE = """
:root { --page:#f6f5f2; --card:#fffefb; --ink:#1c1b19; --soft:#66635d; --line:#e2dfd8; --accent:#2a6fc9;
  --track:#e9e6df;
  --right:#1d7a3c; --wrong:#b3261e; --shade:0 1px 2px rgb(40 35 20/.06), 0 6px 20px rgb(40 35 20/.05) }
@media (prefers-color-scheme: dark) { :root { --page:#141413; --card:#1e1e1c; --ink:#efede8; --soft:#a39f97;
  --line:#34332f;
  --accent:#6aa6f0; --track:#33322e; --right:#6ccf8c; --wrong:#ff8a80; --shade:none } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink);
  font:16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width:1180px; margin:0 auto; padding:56px 24px 80px }
h1 { font-size:2.3rem; line-height:1.15; letter-spacing:-.02em; margin:0 0 .5rem; text-wrap:balance }
h2 { font-size:1.3rem; letter-spacing:-.01em; margin:0 0 .6rem }
h4 { margin:.9rem 0 .2rem; font-size:.78rem; font-weight:500; color:var(--soft) }
section { margin-top:52px }
.flow { margin:0; color:var(--soft) } .flow b { font-weight:500; color:var(--ink) }
.note { color:var(--soft); max-width:72ch; margin:0 0 1.1rem; font-size:.94rem }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(190px, 1fr)); gap:16px; margin-top:34px }
.tile, .panel, article, .scroll { background:var(--card); border:1px solid var(--line); border-radius:12px;
  box-shadow:var(--shade) }
.tile { padding:16px 20px; display:flex; flex-direction:column }
.tile span, .tile small { color:var(--soft); font-size:.86rem } .tile strong { font-size:2.1rem; line-height:1.3;
  font-weight:600 }
.panels { display:grid; grid-template-columns:repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap:20px }
.panel { margin:0; padding:18px 20px 12px; max-width:760px } figcaption { font-weight:600 }
svg { display:block; width:100%; height:auto } svg text { font-size:12px; fill:var(--soft);
  font-variant-numeric:tabular-nums }
.grid { stroke:var(--line) } polyline { fill:none; stroke:var(--accent); stroke-width:2; stroke-linejoin:round }
polyline.raw { opacity:.28; stroke-width:1.2 } .end { fill:var(--accent); stroke:var(--card); stroke-width:2 }
.scroll { overflow-x:auto } table { border-collapse:collapse; width:100%; font-size:.93rem }
th, td { text-align:left; padding:9px 16px; border-bottom:1px solid var(--line); font-weight:400;
  vertical-align:middle }
thead th { color:var(--soft); font-size:.84rem; padding-block:7px } thead th[colspan] { color:var(--ink);
  font-weight:600 }
tbody tr:last-child > * { border-bottom:0 } .total > * { font-weight:600; white-space:nowrap }
.number { text-align:right; white-space:nowrap; font-variant-numeric:tabular-nums } .score { display:flex;
  align-items:center; gap:12px }
.score span { white-space:nowrap; font-variant-numeric:tabular-nums; min-width:4.2em; text-align:right }
.bar { position:relative; flex:1; min-width:90px; height:10px; border-radius:5px; background:var(--track) }
.bar b { display:block; height:100%; border-radius:5px; background:var(--accent) }
.bar i { position:absolute; top:-4px; bottom:-4px; width:4px; margin-left:-2px; background:var(--ink);
  border:1px solid var(--card) }
.gallery { display:grid; grid-template-columns:repeat(auto-fill, minmax(240px, 1fr)); gap:20px }
article { overflow:hidden; display:flex; flex-direction:column; padding-bottom:14px }
.pictures { display:flex; background:#0d0d0c } .pictures img { flex:1; min-width:0; width:100%; aspect-ratio:1;
  object-fit:contain }
.top { display:flex; justify-content:space-between; align-items:center; gap:8px; padding:12px 16px 0; font-size:.82rem }
.chip { color:var(--soft); border:1px solid var(--line); border-radius:99px; padding:1px 9px; overflow-wrap:anywhere }
.status { font-weight:600; white-space:nowrap } .right .status { color:var(--right) }
.wrong .status { color:var(--wrong) }
article.wrong { border-style:dashed; border-color:var(--wrong) }
article p { margin:8px 16px 10px; font-weight:500; line-height:1.4; overflow-wrap:anywhere }
dl { display:grid; grid-template-columns:auto 1fr; gap:2px 12px; margin:auto 16px 0; font-size:.92rem }
dt { color:var(--soft) } dd { margin:0; overflow-wrap:anywhere }
.wrong dd.answer { text-decoration:underline wavy var(--wrong) 1px }
dd.blanked, em { color:var(--soft) } code { font:.88em/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  overflow-wrap:anywhere }
.stages td, .stages th { vertical-align:top } .stages tbody th { font-weight:600 }
details { margin-top:16px } summary { cursor:pointer; color:var(--soft); margin-bottom:12px }
.fields th { font:.84em ui-monospace, "SF Mono", Menlo, Consolas, monospace; color:var(--soft); width:1%;
  white-space:nowrap }
.fields td { font:.84em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap:anywhere }
  .fields :is(th, td) { padding-block:4px }
@media print { body { background:none } section { break-inside:avoid } }
"""
