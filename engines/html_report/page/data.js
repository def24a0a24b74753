// The page of a range report, in parts that are put together in this order: data, decisions, charts, table, events.
// It decides nothing: whether a node is low is one comparison, of the data_max or the budget asked for with the one at
// which the node flips, which was computed when the plan was made.
const $ = (id) => document.getElementById(id);
const data = await unpack($("payload").textContent);
const { types, nodes, tensors, plan } = data;
for (const columns of [tensors, nodes]) { // texts that repeat come coded
  for (const [key, column] of Object.entries(columns)) if (column && column.texts) columns[key] = column.of.map((i) => column.texts[i]);
}
addNodesWithoutTensors();
const position = new Map(nodes.name.map((name, i) => [name, i]));
const owner = tensors.node.map((name) => position.get(name) ?? -1); // the node that made a tensor, if any did
const isWeight = tensors.node.map((_, t) => ["parameter", "buffer", "constant"].includes(tensors.kind[t]));
const isMeasured = tensors.node.map((_, t) => tensors.kind[t] !== "none");
const flips = Object.fromEntries(Object.keys(types).map((type) => [type, nodes[type].map(number)]));
const budgets = Object.fromEntries(Object.keys(types).map((type) => [type, nodes[`budget_${type}`].map(number)]));
const state = {
  type: plan ? plan.type : "float16",
  question: "data_max", // or "budget": which of the two limits the slider moves
  budget: null,
  limit: plan && plan.data_max !== null ? number(plan.data_max) : 512,
  asked: false, // whether the slider or the switch was moved: until then nodes have the plan's own precision
  chosen: new Set(), sort: "absmax", down: true, shown: 100, selected: 0, weights: false, rule: null,
};

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64.trim()), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}
function number(value) { return value === "inf" ? Infinity : value; }
function addNodesWithoutTensors() { // integers, indices, checks: they have a row, and nothing was measured
  const measured = new Set(tensors.node);
  nodes.name.forEach((name, node) => {
    if (measured.has(name)) return;
    for (const column of Object.values(tensors)) column.push(null);
    const last = tensors.node.length - 1;
    for (const count of ["output", "nan", "posinf", "neginf", "zeros", "masked"]) tensors[count][last] = 0;
    Object.assign(tensors.node, { [last]: name });
    for (const [key, value] of Object.entries({ kind: "none", op: nodes.op[node], module: nodes.module[node], source: "", shape: "" })) tensors[key][last] = value;
  });
}
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
function percent(part, whole) { // never 0% of something, nor 100% of less than all
  if (!whole) return "-";
  const share = (100 * part) / whole;
  if (share > 0 && share < 0.1) return "<0.1%";
  if (share < 100 && share > 99.9) return ">99.9%";
  return `${share.toFixed(1)}%`;
}
function atLeast(value) { // five digits, rounded up: typed as data_max, it is a limit that the number is within
  if (value === Infinity || value === 0) return short(value);
  const text = Number(value.toPrecision(5));
  const step = 10 ** (Math.floor(Math.log10(value)) - 4);
  return String(Number((text < value ? text + step : text).toPrecision(5)));
}
function atMost(value) { // five digits, rounded down: typed as a budget, the node is still low
  if (value === Infinity || value === 0) return short(value);
  const text = Number(value.toPrecision(5));
  const step = 10 ** (Math.floor(Math.log10(value)) - 4);
  return String(Number((text > value ? text - step : text).toPrecision(5)));
}
const nonfinite = (t) => tensors.nan[t] + tensors.posinf[t] + tensors.neginf[t];
// Of a rescaled program the numbers are true values; limits are of what is stored, 2^-k of them.
const exponent = (t) => (tensors.exponent ? tensors.exponent[t] || 0 : 0);
const kept = (column) => (tensors.exponent ? column.map((value, t) => (value === null ? null : value * 2 ** -exponent(t))) : column);
const stored = Object.fromEntries(["smallest", "absmax", "band_low", "band_high"].map((key) => [key, kept(tensors[key])]));
const asStored = tensors.exponent ? ", as stored" : "";
const headroom = (t) => (stored.absmax[t] ? types[state.type].max / stored.absmax[t] : null);
const isOver = (t) => !isWeight[t] && (nonfinite(t) > 0 || (stored.absmax[t] !== null && stored.absmax[t] > types[state.type].max));
