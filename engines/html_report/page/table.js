// The table of tensors: searched, filtered by rule, sorted; nodes chosen for nodes_to_exclude.
const rule = (t) => (owner[t] < 0 ? "" : state.asked && precision(owner[t]) === "low" ? "" : nodes.rule[owner[t]]);
const flip = (t) => (owner[t] < 0 || nodes.precision[owner[t]] === "kept" ? undefined : flips[state.type][owner[t]]);
const budget = (t) => (owner[t] < 0 || nodes.precision[owner[t]] === "kept" ? undefined : budgets[state.type][owner[t]]);
const COLUMNS = [ // key, heading, value to sort by, how it is shown, class
  ["node", "node", name, name, "wide"],
  ["module", "module", (t) => tensors.module[t], (t) => tensors.module[t], "wide"],
  ["op", "operator", (t) => tensors.op[t], (t) => tensors.op[t].replace(/^aten\./, "").replace(/\.default$/, ""), "wide"],
  ["type", "type", typeOf, typeOf, ""],
  ["rule", "rule", rule, rule, "wide"],
  ["absmax", "largest", (t) => (nonfinite(t) ? Infinity : tensors.absmax[t]), (t) => short(tensors.absmax[t]), "number"],
  ["smallest", "smallest", (t) => tensors.smallest[t], (t) => short(tensors.smallest[t]), "number"],
  ["stored", "stored as", exponent, (t) => (exponent(t) ? `2^${-exponent(t)} x` : ""), "number"],
  ["headroom", "headroom", headroom, (t) => (tensors.absmax[t] ? `${headroom(t).toPrecision(headroom(t) < 100 ? 2 : 3) / 1}x` : ""), "number"],
  ["nonfinite", "NaN, Inf", nonfinite, (t) => (nonfinite(t) ? String(nonfinite(t)) : ""), "number"],
  ["flip", "low from data_max", (t) => flip(t) ?? Infinity, (t) => (flip(t) === undefined ? "" : flip(t) === null ? "never" : atLeast(flip(t))), "number"],
  ["budget", "low to budget, dB", (t) => budget(t) ?? -Infinity, (t) => (budget(t) === undefined ? "" : budget(t) === null ? "never" : atMost(budget(t))), "number"],
  ["reason", "reason", whyOf, whyOf, "widest"],
].filter(([key]) => (plan || !["rule", "flip", "reason", "budget"].includes(key)) && (plan?.budgets || key !== "budget") && (tensors.exponent || key !== "stored"));

function found() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const all = tensors.node.map((_, t) => t).filter((t) => {
    if (state.rule !== null && (owner[t] < 0 || nodes.precision[owner[t]] !== state.rule.precision || nodes.rule[owner[t]] !== state.rule.rule)) return false;
    if (!words.length) return true;
    const where = [name(t), tensors.module[t], tensors.op[t], tensors.kind[t], typeOf(t), rule(t), whyOf(t)].join(" ").toLowerCase();
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
    } else cell(row, label, shown(t), ["absmax", "headroom", "nonfinite"].includes(key) && isOver(t) ? `${className} bad` : className);
  }
  return row;
}
function showRows() {
  const all = found();
  const filter = state.rule ? ` with rule ${state.rule.rule || "none"}` : "";
  $("found").textContent = `${all.length} of ${tensors.node.length} tensors${filter}`;
  $("all-rules").hidden = state.rule === null;
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

function filterByRule(button) { // once more shows all again
  const asked = { precision: button.dataset.precision, rule: button.dataset.rule };
  const again = state.rule && state.rule.rule === asked.rule && state.rule.precision === asked.precision;
  showRule(again ? null : asked);
  if (!again) $("h-table").scrollIntoView({ behavior: "smooth" });
}
function showRule(rule_) {
  Object.assign(state, { rule: rule_, shown: 100 });
  for (const button of document.querySelectorAll("button[data-rule]")) {
    button.setAttribute("aria-pressed", String(Boolean(rule_) && button.dataset.rule === rule_.rule && button.dataset.precision === rule_.precision));
  }
  showRows();
}
