// Which type each node has at the data_max or the budget asked for, and the slider that asks.
function precision(node) {
  if (nodes.precision[node] === "kept" || !state.asked) return nodes.precision[node];
  const flip = (isBudget() ? budgets : flips)[state.type][node];
  return flip !== null && (isBudget() ? state.budget <= flip : state.limit >= flip) ? "low" : "high";
}
function typeName(precision_) { return { low: types[state.type].label, high: "fp32" }[precision_] ?? precision_; }
function typeOf(t) {
  const kind = kindOf(t);
  return kind === "weight" || kind === "input" ? kind : typeName(kind);
}
function kindOf(t) {
  if (isWeight[t]) return "weight";
  if (tensors.kind[t] === "input") return "input";
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
  $("flips-low").textContent = told(toLow, `to ${types[state.type].label}`);
  $("flips-high").textContent = told(toHigh, "to fp32");
}
function told(names, where) {
  if (!names.length) return "";
  const more = names.length > 40 ? ` and ${names.length - 40} more` : "";
  return `${names.length} flip ${where}: ${names.slice(0, 40).join(", ")}${more}`;
}

// -- the slider: for data_max its positions are powers of two, the last one is no limit; for a budget they are decibels

const LAST = 400, MOST_DB = 120;
const isBudget = () => state.question === "budget";
const finite = Object.values(flips).flat().filter((flip) => flip !== null && flip > 0 && flip < Infinity);
const bottom = Math.max(-12, Math.floor(Math.log2(Math.min(1, ...finite))));
const top = Math.ceil(Math.log2(Math.max(65536, ...finite))) + 1;
const scales = {
  data_max: {
    at: (place) => (place >= LAST ? Infinity : Number((2 ** (bottom + ((top - bottom) * place) / LAST)).toPrecision(3))),
    place: (limit) =>
      limit === Infinity ? LAST : Math.max(0, Math.min(LAST - 1, Math.round((LAST * (Math.log2(limit) - bottom)) / (top - bottom)))),
    words: "data_max", isGood: (limit) => limit > 0, rule: "data_max is a number above 0, or inf",
  },
  budget: {
    at: (place) => Math.max(0.5, Math.round((2 * MOST_DB * place) / LAST) / 2),
    place: (decibels) => Math.max(0, Math.min(LAST, Math.round((LAST * decibels) / MOST_DB))),
    words: "budget, dB", isGood: (decibels) => decibels > 0 && decibels < Infinity, rule: "a budget is a number of dB above 0",
  },
};
const scale = () => scales[state.question];
const asked = () => (isBudget() ? state.budget : state.limit);
const askedWords = () => (isBudget() ? `a budget of ${short(state.budget)} dB` : `data_max ${short(state.limit)}`);

function ask(value, type, from) {
  const isBad = !scale().isGood(value);
  $("limit-text").toggleAttribute("aria-invalid", false);
  if (isBad) $("limit-text").setAttribute("aria-invalid", "true");
  $("limit-problem").textContent = isBad ? `${scale().rule}; it stays ${short(asked())}` : "";
  if (isBad) return;
  Object.assign(state, { [isBudget() ? "budget" : "limit"]: value, type, asked: true });
  showLimit(from);
  later();
}
function showLimit(from) {
  $("limit-label").textContent = scale().words;
  $("limit-text").setAttribute("aria-label", `${scale().words} as a number${isBudget() ? "" : ", or inf"}`);
  if (from !== "slider") $("limit").value = scale().place(asked());
  if (from !== "text") $("limit-text").value = asked() === Infinity ? "inf" : String(asked());
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
  state.budget = plan.min_sqnr_db === null ? types[plan.type].budget : number(plan.min_sqnr_db);
  state.question = plan.budgets && plan.data_max === null ? "budget" : "data_max";
  state.asked = false;
  showLimit("plan");
  document.querySelector(`input[name="type"][value="${state.type}"]`).checked = true;
  const question = document.querySelector(`input[name="question"][value="${state.question}"]`);
  if (question) question.checked = true;
}
