// The three charts: the network, the heat map, one tensor's histogram.
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
const SYMBOLS = { low: "circle", high: "diamond", kept: "square-open", input: "x", weight: "triangle-up" };
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
const order = () => tensors.node.map((_, t) => t).filter((t) => isMeasured[t] && (state.weights || !isWeight[t]));
const name = (t) => (tensors.output[t] ? `${tensors.node[t]} [${tensors.output[t]}]` : tensors.node[t]);

function hover(t) {
  const lines = [`<b>${wrapped(name(t), 60)}</b>`, wrapped(`${tensors.op[t]} ${tensors.module[t]}`, 60)];
  if (tensors.source[t]) lines.push(wrapped(tensors.source[t], 60));
  lines.push(`min ${short(tensors.min[t])}, max ${short(tensors.max[t])}, smallest ${short(tensors.smallest[t])}, rms ${short(tensors.rms[t])}`);
  if (exponent(t)) lines.push(`stored as 2^${-exponent(t)} of itself`);
  if (nonfinite(t)) lines.push(`${nonfinite(t)} NaN or Inf`);
  if (owner[t] >= 0) lines.push(wrapped(whyOf(t), 60));
  return lines.join("<br>");
}
function whyOf(t) {
  const node = owner[t];
  if (node < 0) return "";
  const now = precision(node);
  const planned = nodes.precision[node] === "low" && plan ? types[plan.type].label : typeName(nodes.precision[node]);
  if (!state.asked || now === nodes.precision[node]) return `${planned}: ${nodes.reason[node]}`;
  return `${typeName(now)} at ${askedWords()}; the plan has it in ${planned}: ${nodes.reason[node]}`;
}
function segments(of, low, high) {
  const xs = [], ys = [];
  of.forEach(([x, t]) => {
    if (low[t] && high[t]) { xs.push(x, x, null); ys.push(low[t], high[t], null); }
  });
  return { x: xs, y: ys, mode: "lines", hoverinfo: "skip", showlegend: false };
}
function limits() { // [magnitude, words, dash, colour] of the lines to hold the tensors against
  const { max, tiny, label } = types[state.type];
  const lines = [[max, `${label} max ${max < 1e6 ? max : short(max)}`, "dash", "--bad"], [tiny, `${label} min ${short(tiny)}`, "dot", "--text"]];
  if (plan && !isBudget() && state.limit < Infinity) lines.push([state.limit, `data_max ${short(state.limit)}`, "solid", "--text"]);
  return lines;
}
function magnitudeRange(places, lines) { // powers of ten: the data, and each line that is not far away from them
  const seen = places.flatMap(([, t]) => [stored.smallest[t], stored.absmax[t]]).filter((value) => value > 0).map(Math.log10);
  let [low, high] = seen.length ? [Math.min(...seen), Math.max(...seen)] : [-5, 5];
  for (const [y] of lines) {
    const at = Math.log10(y);
    if (at > low - 12 && at < high + 12) { low = Math.min(low, at); high = Math.max(high, at); }
  }
  return [low - 0.5, high + 0.5];
}
function moduleBands(of) { // runs of neighbours within one module, at the depth that gives the most names that fit
  const path = (t) => (tensors.module[t] || "").split(".");
  let best = [];
  for (let depth = 1; depth <= 6; depth += 1) {
    const runs = [];
    of.forEach((t, x) => {
      const label = path(t).slice(0, depth).join(".");
      const last = runs[runs.length - 1];
      if (last && last.label === label) last.to = x; else runs.push({ label, from: x, to: x });
    });
    if (runs.length > 24 || (best.length && runs.length === best.length)) break;
    best = runs;
  }
  return best.some((run) => run.label) ? best : [];
}
function bandShapes(bands) {
  return bands.map(({ from, to }, i) => ({
    type: "rect", xref: "x", yref: "paper", x0: from - 0.5, x1: to + 0.5, y0: -0.06, y1: 0, line: { width: 0 },
    fillcolor: css(i % 2 ? "--line" : "--card"), layer: "below",
  }));
}
function bandLabels(bands, count) {
  const width = $("network").clientWidth - 200;
  return bands.filter(({ label, from, to }) => label && (width * (to - from + 1)) / count > 7 * tail(label).length).map(({ label, from, to }) => ({
    xref: "x", yref: "paper", x: (from + to) / 2, y: -0.06, yanchor: "bottom", text: escape(tail(label)), showarrow: false, font: { size: 10 },
  }));
}
function tail(label) { return label.split(".").slice(-2).join("."); }
function lineLabels(lines, place, [bottom, top]) { // beside the chart, so that they cover no data
  const size = narrow() ? 10 : 11, height = (narrow() ? 4.2 : 1.5) * size; // of a label, in pixels
  const pixels = ($("network").clientHeight - 100) / (top - bottom);
  let free = -Infinity; // labels that would meet are moved apart, upwards
  return lines.map(([y, words]) => [place(y), words]).sort(([a], [b]) => a - b).map(([y, words]) => {
    const at = Math.max(y * pixels, free);
    free = at + height;
    return {
      xref: "paper", x: 1, xanchor: "left", y, yshift: at - y * pixels, yanchor: "middle", align: "left", showarrow: false, font: { size },
      text: narrow() ? words.split(" ").join("<br>") : words,
    };
  });
}
const rightMargin = () => (narrow() ? 72 : 130);
function drawNetwork() {
  const places = order().map((t, x) => [x, t]);
  const traces = [], dense = places.length > 400;
  for (const [kind, symbol] of Object.entries(SYMBOLS)) {
    const of = places.filter(([, t]) => kindOf(t) === kind);
    if (!of.length) continue;
    const color = css(`--${kind}`), line = { color };
    traces.push({ ...segments(of, stored.smallest, stored.absmax), line: { ...line, width: dense ? 0.5 : 1 }, opacity: 0.6, legendgroup: kind });
    traces.push({ ...segments(of, stored.band_low, stored.band_high), line: { ...line, width: dense ? 1 : 3 }, legendgroup: kind });
    const seen = of.filter(([, t]) => stored.absmax[t] !== null && stored.absmax[t] > 0);
    traces.push({
      x: seen.map(([x]) => x), y: seen.map(([, t]) => stored.absmax[t]), customdata: seen.map(([, t]) => t),
      text: seen.map(([, t]) => hover(t)), hovertemplate: "%{text}<extra></extra>", mode: "markers", name: typeName(kind),
      legendgroup: kind, marker: { color: seen.map(([, t]) => (isOver(t) ? css("--bad") : color)), symbol, size: dense ? 4 : 8 },
    });
  }
  const lines = limits().filter(([y]) => y > 0);
  const bands = moduleBands(places.map(([, t]) => t)), range = magnitudeRange(places, lines);
  Plotly.react("network", traces, layout({
    margin: { l: 56, r: rightMargin(), t: 8, b: 48 },
    xaxis: { title: { text: "tensors, from input to output", standoff: 24 }, showticklabels: false, showgrid: false, zeroline: false, range: [-1, places.length] },
    yaxis: { type: "log", exponentformat: "power", dtick: narrow() ? 4 : 2, title: { text: narrow() ? "" : `magnitude${asStored}` }, range },
    shapes: [...bandShapes(bands), ...lines.map(([y, , dash, color]) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: css(color), width: 1, dash } }))],
    annotations: [...bandLabels(bands, places.length), ...lineLabels(lines, Math.log10, range)],
    uirevision: `${state.weights}`, hovermode: "closest",
  }), config);
}
function drawHeat() {
  const of = order();
  const moved = (t) => { const bins = tensors.bins[t]; return bins && bins.length ? [bins[0] - exponent(t), ...bins.slice(1)] : bins; };
  const spans = of.map(moved).filter((bins) => bins && bins.length);
  if (!spans.length) { $("heat").textContent = "These ranges were measured without histograms."; return; }
  const { max, tiny, label } = types[state.type];
  const near = [Math.floor(Math.log2(tiny)) - 2, Math.ceil(Math.log2(max)) + 1].filter((e) => Math.abs(e) < 40);
  const first = Math.min(...spans.map((bins) => bins[0]), ...near);
  const last = Math.max(...spans.map((bins) => bins[0] + bins.length - 2), ...near);
  const z = Array.from({ length: last - first + 1 }, () => new Array(of.length).fill(null));
  of.forEach((t, x) => {
    const bins = moved(t) || [];
    const whole = tensors.elements[t] - nonfinite(t);
    bins.slice(1).forEach((count, i) => { if (count) z[bins[0] + i - first][x] = Math.log10(count / whole); });
  });
  const edges = [[Math.log2(max), `${label} overflows`], [Math.log2(tiny) - 0.5, `${label} loses bits`]].filter(([y]) => y >= first && y <= last);
  Plotly.react("heat", [{
    type: "heatmap", z, x0: 0, dx: 1, y: z.map((_, i) => first + i), zmin: -6, zmax: 0, colorscale: "Cividis", hoverongaps: false,
    hoverinfo: "none",
    colorbar: {
      orientation: "h", y: -0.12, yanchor: "top", thickness: 10, len: 0.6, title: { text: "share of the tensor's values", side: "top" },
      tickvals: [-6, -4, -2, 0], ticktext: ["1e-6", "1e-4", "1%", "all"],
    },
  }], layout({
    xaxis: { title: { text: "tensors, from input to output", standoff: 8 }, showticklabels: false, range: [-1, of.length], showgrid: false, zeroline: false, ticks: "" },
    yaxis: { title: { text: narrow() ? "" : `power of two${asStored}` }, showgrid: false },
    margin: { l: 56, r: rightMargin(), t: 8, b: 100 },
    shapes: edges.map(([y]) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: css(y > 0 ? "--bad" : "--high"), width: 2, dash: "dash" } })),
    annotations: lineLabels(edges, (y) => y, [first, last]),
    uirevision: `${state.weights}`,
  }), config);
}
function drawHistogram() {
  const t = state.selected;
  if (t >= tensors.node.length) return;
  if (!isMeasured[t]) {
    $("chosen").value = name(t);
    $("told").textContent = `${tensors.op[t]} \u00b7 it has no floating-point tensor \u00b7 ${whyOf(t)}`;
    Plotly.purge("histogram");
    $("histogram").textContent = "";
    return;
  }
  $("chosen").value = name(t);
  const shape = tensors.shape[t];
  $("told").textContent = [
    `${tensors.kind[t]} ${tensors.op[t]}`, tensors.module[t], tensors.source[t], shape && `shape ${shape}`,
    `min ${short(tensors.min[t])}, max ${short(tensors.max[t])}, mean ${short(tensors.mean[t])}, rms ${short(tensors.rms[t])}`,
    `${tensors.zeros[t]} zeros, ${nonfinite(t)} NaN or Inf${tensors.masked[t] ? `, ${tensors.masked[t]} mask values` : ""}`,
    exponent(t) ? `stored as 2^${-exponent(t)} of itself` : "",
    tensors.absmax_batch[t] === null ? "" : `largest in batch ${tensors.absmax_batch[t]}`, whyOf(t),
  ].filter(Boolean).join(" \u00b7 ");
  const bins = tensors.bins[t];
  if (!bins || !bins.length) { Plotly.purge("histogram"); $("histogram").textContent = bins ? "It has no nonzero value." : "Measured without a histogram."; return; }
  if (!$("histogram").querySelector(".plot-container")) $("histogram").textContent = "";
  const { max, tiny, label } = types[state.type];
  const bounds = [Math.log2(tiny) + exponent(t), Math.log2(max) + exponent(t)];
  const zones = [[`below the smallest normal ${label}`, "--weight", "/"], [`within ${label}`, "--low", ""], [`beyond ${label}, or next to it`, "--bad", "x"]];
  const zoneOf = (e) => (e < bounds[0] ? 0 : e + 1 > bounds[1] + 1e-9 && e + 1 > Math.ceil(bounds[1]) ? 2 : 1);
  const counts = bins.slice(1).map((count, i) => [bins[0] + i, count]);
  Plotly.react("histogram", zones.map(([label_, color, pattern], zone) => {
    const of = counts.filter(([e]) => zoneOf(e) === zone);
    return {
      type: "bar", name: label_, x: of.map(([e]) => e + 0.5), y: of.map(([, count]) => count), showlegend: of.length > 0, width: 0.9,
      marker: { color: css(color), pattern: { shape: pattern, fillmode: "overlay", fgcolor: css("--back"), fgopacity: 0.6, solidity: 0.25 } },
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
