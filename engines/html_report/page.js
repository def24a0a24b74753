// The page of a range report. It decides nothing: whether a node is low is one comparison, of the data_max asked for
// with the data_max at which the node flips, which was computed when the plan was made.
"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);
  const data = await unpack($("payload").textContent);
  const { types, nodes, tensors, plan } = data;
  const position = new Map(nodes.name.map((name, i) => [name, i]));
  const owner = tensors.node.map((name) => position.get(name) ?? -1); // the node that made a tensor, if any did
  const isWeight = tensors.node.map((_, t) => ["parameter", "buffer", "constant"].includes(text(tensors.kind, t)));
  const flips = Object.fromEntries(Object.keys(types).map((type) => [type, nodes[type].map(number)]));
  const state = {
    type: plan ? plan.type : "float16",
    limit: plan && plan.data_max !== null ? number(plan.data_max) : 512,
    asked: false, // whether the slider or the switch was moved: until then nodes have the plan's own precision
    chosen: new Set(), sort: "absmax", down: true, shown: 100, selected: 0, weights: false,
  };

  async function unpack(base64) {
    const bytes = Uint8Array.from(atob(base64.trim()), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  }
  function number(value) { return value === "inf" ? Infinity : value; }
  function text(column, i) { return column.texts[column.of[i]]; }
  function escape(value) { // plotly reads tags and entities in its labels
    return String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }
  function wrapped(value, width = 70) { // a hover label does not break lines by itself, nor long words
    const lines = [];
    let line = "";
    for (const word of String(value).split(" ")) {
      for (let rest = word; rest !== ""; rest = rest.slice(width)) {
        const part = rest.slice(0, width);
        if (line && line.length + part.length + 1 > width) { lines.push(line); line = ""; }
        line = line ? `${line} ${part}` : part;
      }
    }
    return [...lines, line].map(escape).join("<br>");
  }
  function short(value) {
    if (value === null || value === undefined) return "";
    if (value === Infinity) return "inf";
    const size = Math.abs(value);
    if (value === 0 || (size >= 1e-3 && size < 1e5)) return String(Number(value.toPrecision(4)));
    return value.toExponential(2).replace("e+", "e");
  }
  const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}%` : "-");
  const nonfinite = (t) => tensors.nan[t] + tensors.posinf[t] + tensors.neginf[t];
  const headroom = (t) => (tensors.absmax[t] === null ? 0 : 65504 / tensors.absmax[t]);

  // -- decisions -----------------------------------------------------------------------------------------------

  function precision(node) {
    if (nodes.precision[node] === "kept" || !state.asked) return nodes.precision[node];
    const flip = flips[state.type][node];
    return flip !== null && state.limit >= flip ? "low" : "high";
  }
  function kindOf(t) {
    if (isWeight[t]) return "weight";
    if (text(tensors.kind, t) === "input") return "input";
    return owner[t] < 0 ? "kept" : precision(owner[t]);
  }
  function showDecisions() {
    let low = 0, high = 0, workLow = 0, work = 0;
    const toLow = [], toHigh = [];
    nodes.name.forEach((name, node) => {
      if (nodes.precision[node] === "kept") return;
      const now = precision(node);
      work += nodes.work[node];
      if (now === "low") { low += 1; workLow += nodes.work[node]; } else high += 1;
      if (now !== nodes.precision[node]) (now === "low" ? toLow : toHigh).push(name);
    });
    $("nodes-low").textContent = low;
    $("nodes-high").textContent = high;
    $("nodes-share").textContent = percent(low, low + high);
    $("work-share").textContent = percent(workLow, work);
    $("flips-low").textContent = told(toLow, "to low precision");
    $("flips-high").textContent = told(toHigh, "to their exported type");
  }
  function told(names, where) {
    if (!names.length) return "";
    const more = names.length > 40 ? ` and ${names.length - 40} more` : "";
    return `${names.length} flip ${where}: ${names.slice(0, 40).join(", ")}${more}`;
  }

  // -- the slider: positions are powers of two, the last one is no limit ----------------------------------------

  const LAST = 400;
  const finite = Object.values(flips).flat().filter((flip) => flip !== null && flip > 0 && flip < Infinity);
  const bottom = Math.max(-12, Math.floor(Math.log2(Math.min(1, ...finite))));
  const top = Math.ceil(Math.log2(Math.max(65536, ...finite))) + 1;
  const limitAt = (place) => (place >= LAST ? Infinity : Number((2 ** (bottom + ((top - bottom) * place) / LAST)).toPrecision(3)));
  const placeOf = (limit) =>
    limit === Infinity ? LAST : Math.max(0, Math.min(LAST - 1, Math.round((LAST * (Math.log2(limit) - bottom)) / (top - bottom))));

  function ask(limit, type, from) {
    if (!(limit > 0)) { $("limit-text").setAttribute("aria-invalid", "true"); return; }
    $("limit-text").removeAttribute("aria-invalid");
    Object.assign(state, { limit, type, asked: true });
    if (from !== "slider") $("limit").value = placeOf(limit);
    if (from !== "text") $("limit-text").value = limit === Infinity ? "inf" : String(limit);
    later();
  }
  let waiting = false;
  function later() { // at most one drawing a frame, however fast the slider moves
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; showDecisions(); drawNetwork(); showRows(); });
  }
  function showPlan() {
    if (!plan) return;
    state.type = plan.type;
    state.limit = plan.data_max === null ? 512 : number(plan.data_max);
    state.asked = false;
    $("limit").value = placeOf(state.limit);
    $("limit-text").value = state.limit === Infinity ? "inf" : String(state.limit);
    document.querySelector(`input[name="type"][value="${state.type}"]`).checked = true;
  }

  // -- charts --------------------------------------------------------------------------------------------------

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const KINDS = {
    low: ["low precision", "circle"], high: ["exported type", "diamond"], kept: ["kept", "square-open"],
    input: ["input", "x"], weight: ["weight", "triangle-up"],
  };
  const narrow = () => $("network").clientWidth < 600;
  function layout(more) {
    const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
    return {
      paper_bgcolor: css("--back"), plot_bgcolor: css("--back"), font: { color: css("--text"), size: 12 },
      margin: { l: 56, r: 12, t: 8, b: 40 }, hoverlabel: { align: "left", font: { size: 12 } },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      ...more, xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
    };
  }
  const order = () => tensors.node.map((_, t) => t).filter((t) => state.weights || !isWeight[t]);
  const name = (t) => (tensors.output[t] ? `${tensors.node[t]} [${tensors.output[t]}]` : tensors.node[t]);

  function hover(t) {
    const lines = [`<b>${wrapped(name(t), 60)}</b>`, wrapped(`${text(tensors.op, t)} ${text(tensors.module, t)}`, 60)];
    if (text(tensors.source, t)) lines.push(wrapped(text(tensors.source, t), 60));
    lines.push(`min ${short(tensors.min[t])}, max ${short(tensors.max[t])}, smallest ${short(tensors.smallest[t])}, rms ${short(tensors.rms[t])}`);
    if (nonfinite(t)) lines.push(`${nonfinite(t)} NaN or Inf`);
    if (owner[t] >= 0) lines.push(wrapped(whyOf(t), 60));
    return lines.join("<br>");
  }
  function whyOf(t) {
    const node = owner[t];
    if (node < 0) return "";
    const now = precision(node);
    if (!state.asked || now === nodes.precision[node]) return `${nodes.precision[node]}: ${nodes.reason[node]}`;
    return `${now} at data_max ${short(state.limit)}; the plan has it ${nodes.precision[node]}: ${nodes.reason[node]}`;
  }
  function segments(of, low, high) {
    const xs = [], ys = [];
    of.forEach(([x, t]) => {
      if (low[t] && high[t]) { xs.push(x, x, null); ys.push(low[t], high[t], null); }
    });
    return { x: xs, y: ys, mode: "lines", hoverinfo: "skip", showlegend: false };
  }
  function drawNetwork() {
    const places = order().map((t, x) => [x, t]);
    const traces = [], dense = places.length > 400;
    for (const [kind, [label, symbol]] of Object.entries(KINDS)) {
      const of = places.filter(([, t]) => kindOf(t) === kind);
      if (!of.length) continue;
      const color = css(`--${kind}`), line = { color };
      traces.push({ ...segments(of, tensors.smallest, tensors.absmax), line: { ...line, width: dense ? 0.5 : 1 }, opacity: 0.6, legendgroup: kind });
      traces.push({ ...segments(of, tensors.band_low, tensors.band_high), line: { ...line, width: dense ? 1 : 3 }, legendgroup: kind });
      const seen = of.filter(([, t]) => tensors.absmax[t] !== null && tensors.absmax[t] > 0);
      traces.push({
        x: seen.map(([x]) => x), y: seen.map(([, t]) => tensors.absmax[t]), customdata: seen.map(([, t]) => t),
        text: seen.map(([, t]) => hover(t)), hovertemplate: "%{text}<extra></extra>", mode: "markers", name: label,
        legendgroup: kind, marker: { color, symbol, size: dense ? 4 : 8 },
      });
    }
    const { max, tiny, label } = types[state.type];
    const lines = [[max, `largest ${label}, ${max < 1e6 ? max : short(max)}`, "dash"], [tiny, `smallest normal ${label}, ${short(tiny)}`, "dot"]];
    if (state.limit < Infinity) lines.push([state.limit, `data_max ${short(state.limit)}`, "solid"]);
    Plotly.react("network", traces, layout({
      xaxis: { title: { text: "tensors, from input to output" }, showticklabels: false, showgrid: false, zeroline: false, range: [-1, places.length] },
      yaxis: { type: "log", exponentformat: "power", dtick: narrow() ? 4 : 2, title: { text: narrow() ? "" : "magnitude" } },
      shapes: lines.map(([y, , dash]) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: css("--text"), width: 1, dash } })),
      annotations: lines.map(([y, words]) => ({
        xref: "paper", x: 1, xanchor: "right", y: Math.log10(y), yanchor: "bottom", text: words, showarrow: false,
        font: { size: 11 }, bgcolor: css("--back"), opacity: 0.85,
      })),
      uirevision: `${state.weights}`, hovermode: "closest",
    }), config);
  }
  function drawHeat() {
    const of = order();
    const spans = of.map((t) => tensors.bins[t]).filter((bins) => bins && bins.length);
    if (!spans.length) { $("heat").textContent = "These ranges were measured without histograms."; return; }
    const first = Math.min(...spans.map((bins) => bins[0]), -16);
    const last = Math.max(...spans.map((bins) => bins[0] + bins.length - 2), 17);
    const z = Array.from({ length: last - first + 1 }, () => new Array(of.length).fill(null));
    of.forEach((t, x) => {
      const bins = tensors.bins[t] || [];
      const whole = tensors.elements[t] - nonfinite(t);
      bins.slice(1).forEach((count, i) => { if (count) z[bins[0] + i - first][x] = Math.log10(count / whole); });
    });
    const { max, tiny, label } = types[state.type];
    const edges = [[Math.log2(max), `${label} overflows`], [Math.log2(tiny) - 0.5, `${label} loses bits`]];
    Plotly.react("heat", [{
      type: "heatmap", z, x0: 0, dx: 1, y: z.map((_, i) => first + i), zmin: -6, zmax: 0, colorscale: "Cividis", hoverongaps: false,
      hoverinfo: "none",
      colorbar: { title: { text: narrow() ? "" : "share" }, tickvals: [-6, -4, -2, 0], ticktext: ["1e-6", "1e-4", "1%", "all"], thickness: 12, len: 0.9 },
    }], layout({
      xaxis: { title: { text: "tensors, from input to output" }, showticklabels: false, range: [-1, of.length], showgrid: false, zeroline: false, ticks: "" },
      yaxis: { title: { text: narrow() ? "" : "power of two" }, showgrid: false },
      shapes: edges.map(([y]) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: css("--high"), width: 2, dash: "dash" } })),
      annotations: edges.map(([y, words]) => ({
        xref: "paper", x: 0, xanchor: "left", y, yanchor: y > 0 ? "bottom" : "top", text: words, showarrow: false,
        font: { size: 11 }, bgcolor: css("--back"), opacity: 0.85,
      })),
      uirevision: `${state.weights}`,
    }), config);
  }
  function drawHistogram() {
    const t = state.selected;
    if (t >= tensors.node.length) return;
    $("chosen").value = name(t);
    const shape = text(tensors.shape, t);
    $("told").textContent = [
      `${text(tensors.kind, t)} ${text(tensors.op, t)}`, text(tensors.module, t), text(tensors.source, t), shape && `shape ${shape}`,
      `min ${short(tensors.min[t])}, max ${short(tensors.max[t])}, mean ${short(tensors.mean[t])}, rms ${short(tensors.rms[t])}`,
      `${tensors.zeros[t]} zeros, ${nonfinite(t)} NaN or Inf${tensors.masked[t] ? `, ${tensors.masked[t]} mask values` : ""}`,
      tensors.absmax_batch[t] === null ? "" : `largest in batch ${tensors.absmax_batch[t]}`, whyOf(t),
    ].filter(Boolean).join(" \u00b7 ");
    const bins = tensors.bins[t];
    if (!bins || !bins.length) { Plotly.purge("histogram"); $("histogram").textContent = bins ? "It has no nonzero value." : "Measured without a histogram."; return; }
    if (!$("histogram").querySelector(".plot-container")) $("histogram").textContent = "";
    const { max, tiny, label } = types[state.type];
    const bounds = [Math.log2(tiny), Math.log2(max)];
    const zones = [[`below the smallest normal ${label}`, "--weight", "/"], [`within ${label}`, "--low", ""], [`beyond ${label}, or next to it`, "--high", "x"]];
    const zoneOf = (e) => (e < bounds[0] ? 0 : e + 1 > bounds[1] + 1e-9 && e + 1 > Math.ceil(bounds[1]) ? 2 : 1);
    const counts = bins.slice(1).map((count, i) => [bins[0] + i, count]);
    Plotly.react("histogram", zones.map(([label_, color, pattern], zone) => {
      const of = counts.filter(([e]) => zoneOf(e) === zone);
      return {
        type: "bar", name: label_, x: of.map(([e]) => e + 0.5), y: of.map(([, count]) => count), showlegend: of.length > 0, width: 0.9,
        marker: { color: css(color), pattern: { shape: pattern, fgcolor: css("--back"), solidity: 0.3 } },
        text: of.map(([e, count]) => `2^${e} to 2^${e + 1}: ${count} values`), hovertemplate: "%{text}<extra></extra>", textposition: "none",
      };
    }), layout({
      barmode: "overlay", bargap: 0,
      xaxis: { title: { text: "power of two of the magnitude" } },
      yaxis: { type: "log", title: { text: narrow() ? "" : "values" }, dtick: 1, exponentformat: "power" },
    }), config);
  }
  function select(t) { state.selected = t; drawHistogram(); }
  function drawAll() { drawNetwork(); drawHeat(); drawHistogram(); }

  // -- the table -----------------------------------------------------------------------------------------------

  const rule = (t) => (owner[t] < 0 ? "" : state.asked && precision(owner[t]) === "low" ? "" : text(nodes.rule, owner[t]));
  const flip = (t) => (owner[t] < 0 || nodes.precision[owner[t]] === "kept" ? undefined : flips[state.type][owner[t]]);
  const COLUMNS = [ // key, heading, value to sort by, how it is shown, class
    ["node", "node", name, name, "wide"],
    ["module", "module", (t) => text(tensors.module, t), (t) => text(tensors.module, t), "wide"],
    ["op", "operator", (t) => text(tensors.op, t), (t) => text(tensors.op, t).replace(/^aten\./, ""), "wide"],
    ["type", "type", kindOf, kindOf, ""],
    ["rule", "rule", rule, rule, "wide"],
    ["absmax", "largest", (t) => (nonfinite(t) ? Infinity : tensors.absmax[t]), (t) => short(tensors.absmax[t]), "number"],
    ["smallest", "smallest", (t) => tensors.smallest[t], (t) => short(tensors.smallest[t]), "number"],
    ["headroom", "headroom", headroom, (t) => (tensors.absmax[t] ? `${short(headroom(t))}x` : ""), "number"],
    ["nonfinite", "NaN, Inf", nonfinite, (t) => (nonfinite(t) ? String(nonfinite(t)) : ""), "number"],
    ["flip", "low from data_max", (t) => flip(t) ?? Infinity, (t) => (flip(t) === undefined ? "" : flip(t) === null ? "never" : short(flip(t))), "number"],
    ["reason", "reason", whyOf, whyOf, "widest"],
  ].filter(([key]) => plan || !["rule", "flip", "reason"].includes(key));

  function found() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const all = tensors.node.map((_, t) => t).filter((t) => {
      if (!words.length) return true;
      const where = [name(t), text(tensors.module, t), text(tensors.op, t), text(tensors.kind, t), kindOf(t), rule(t), whyOf(t)].join(" ").toLowerCase();
      return words.every((word) => where.includes(word));
    });
    const value = COLUMNS.find(([key]) => key === state.sort)[2];
    const sign = state.down ? -1 : 1;
    const keys = new Map(all.map((t) => [t, value(t)]));
    const none = (v) => v === null || v === undefined || v === "";
    return all.sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      if (none(x) || none(y)) return none(x) - none(y) || a - b; // nothing stands last either way
      return (x < y ? -sign : x > y ? sign : 0) || a - b;
    });
  }
  function cell(row, label, value, className) {
    const td = row.insertCell();
    td.dataset.label = label;
    if (className) td.className = className;
    if (typeof value === "string") td.textContent = value; else td.append(value);
    return td;
  }
  function tableRow(t) {
    const row = document.createElement("tr");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = state.chosen.has(tensors.node[t]);
    box.disabled = owner[t] < 0 || nodes.precision[owner[t]] === "kept";
    box.setAttribute("aria-label", `choose ${name(t)}`);
    box.addEventListener("change", () => { choose([t], box.checked); });
    cell(row, "choose", box, "");
    for (const [key, label, , shown, className] of COLUMNS) {
      if (key === "node") {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = name(t);
        button.title = "show its histogram";
        button.addEventListener("click", () => { select(t); $("h-histogram").scrollIntoView({ behavior: "smooth" }); });
        cell(row, label, button, className);
      } else cell(row, label, shown(t), className);
    }
    return row;
  }
  function showRows() {
    const all = found();
    $("found").textContent = `${all.length} of ${tensors.node.length} tensors`;
    $("rows").tBodies[0].replaceChildren(...all.slice(0, state.shown).map(tableRow));
    $("more").hidden = all.length <= state.shown;
    $("more").textContent = `Show ${Math.min(500, all.length - state.shown)} more of ${all.length - state.shown}`;
  }
  function showHeadings() {
    const row = $("rows").tHead.rows[0];
    row.replaceChildren(document.createElement("th"), ...COLUMNS.map(([key, label, , , className]) => {
      const th = document.createElement("th"), button = document.createElement("button");
      th.scope = "col";
      if (className === "number") th.className = "number";
      th.setAttribute("aria-sort", state.sort !== key ? "none" : state.down ? "descending" : "ascending");
      button.type = "button";
      button.dataset.key = key;
      button.textContent = label + (state.sort !== key ? "" : state.down ? " \u25bc" : " \u25b2");
      button.addEventListener("click", () => {
        const again = state.sort === key;
        Object.assign(state, { sort: key, down: again ? !state.down : className === "number" });
        showHeadings();
        row.querySelector(`button[data-key="${key}"]`).focus();
        showRows();
      });
      th.append(button);
      return th;
    }));
    row.cells[0].textContent = "";
    row.cells[0].setAttribute("aria-label", "choose");
  }
  function choose(list, on) {
    for (const t of list) if (owner[t] >= 0 && nodes.precision[owner[t]] !== "kept") state.chosen[on ? "add" : "delete"](tensors.node[t]);
    $("copy").disabled = !state.chosen.size;
    $("copy").textContent = state.chosen.size ? `Copy ${state.chosen.size} chosen as nodes_to_exclude` : "Copy chosen as nodes_to_exclude";
  }
  async function copy() { // regexes that match these names whole, as a list that Python and JSON both read
    const patterns = nodes.name.filter((node) => state.chosen.has(node)).map((node) => `^${node.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}$`);
    const area = $("copied");
    area.value = JSON.stringify(patterns).replaceAll('","', '", "');
    area.hidden = false;
    area.select();
    try { await navigator.clipboard.writeText(area.value); } catch { document.execCommand("copy"); }
  }

  // -- theme, print, events --------------------------------------------------------------------------------------

  const dark = matchMedia("(prefers-color-scheme: dark)");
  function setTheme(isDark) {
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    $("theme").textContent = isDark ? "Light" : "Dark";
    if (window.Plotly && $("network").classList.contains("js-plotly-plot")) drawAll();
  }
  function printing(on) {
    for (const id of ["network", "heat", "histogram"]) {
      if ($(id).classList.contains("js-plotly-plot")) Plotly.relayout(id, on ? { width: 680, autosize: false } : { width: null, autosize: true });
    }
  }
  let before = null;
  window.addEventListener("beforeprint", () => { before = document.documentElement.dataset.theme; setTheme(false); printing(true); });
  window.addEventListener("afterprint", () => { printing(false); setTheme(before === "dark"); });
  dark.addEventListener("change", () => setTheme(dark.matches));
  $("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));

  $("limit").addEventListener("input", () => ask(limitAt(Number($("limit").value)), state.type, "slider"));
  $("limit-text").addEventListener("input", () => {
    const asked = $("limit-text").value.trim().toLowerCase();
    ask(asked === "inf" ? Infinity : Number(asked), state.type, "text");
  });
  for (const radio of document.querySelectorAll('input[name="type"]')) {
    radio.addEventListener("change", () => { ask(state.limit, radio.value, "type"); drawHeat(); drawHistogram(); });
  }
  $("reset").addEventListener("click", () => { showPlan(); later(); drawHeat(); drawHistogram(); });
  $("weights").addEventListener("change", () => { state.weights = $("weights").checked; drawNetwork(); drawHeat(); });
  $("search").addEventListener("input", () => { state.shown = 100; showRows(); });
  $("more").addEventListener("click", () => { state.shown += 500; showRows(); });
  $("copy").addEventListener("click", copy);
  $("choose-found").addEventListener("click", () => { choose(found(), true); showRows(); });
  $("choose-none").addEventListener("click", () => { state.chosen.clear(); choose([], false); showRows(); });
  $("chosen").addEventListener("change", () => {
    const t = tensors.node.findIndex((_, i) => name(i) === $("chosen").value);
    if (t >= 0) select(t);
  });

  setTheme(dark.matches);
  showPlan();
  showHeadings();
  showRows();
  showDecisions();
  state.selected = found()[0] ?? 0;
  $("tensors").replaceChildren(...tensors.node.map((_, t) => Object.assign(document.createElement("option"), { value: name(t) })));
  drawAll();
  $("network").on("plotly_click", (event) => { const t = event.points[0].customdata; if (t !== undefined) select(t); });
  $("heat").on?.("plotly_hover", (event) => {
    const { x, y, z } = event.points[0], t = order()[Math.round(x)];
    $("heat-told").textContent = `${name(t)}: ${(100 * 10 ** z).toPrecision(3)}% between 2^${y} and 2^${y + 1}`;
  });
  $("heat").on?.("plotly_click", (event) => { select(order()[Math.round(event.points[0].x)]); });
  for (const [from, to] of [["network", "heat"], ["heat", "network"]]) { // zoom both together
    $(from).on?.("plotly_relayout", (change) => {
      const range = change["xaxis.range[0]"] !== undefined ? [change["xaxis.range[0]"], change["xaxis.range[1]"]] : change["xaxis.autorange"] ? [-1, order().length] : null;
      if (!range || !$(to).layout) return;
      const now = $(to).layout.xaxis.range;
      if (Math.abs(now[0] - range[0]) + Math.abs(now[1] - range[1]) > 1e-6) Plotly.relayout(to, { "xaxis.range": range });
    });
  }
  document.documentElement.dataset.ready = "yes";
})();
