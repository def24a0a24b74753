// Theme, print, and what happens on each event.
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

$("limit").addEventListener("input", () => ask(scale().at(Number($("limit").value)), state.type, "slider"));
$("limit-text").addEventListener("input", () => {
  const typed = $("limit-text").value.trim().toLowerCase();
  ask(typed === "inf" ? Infinity : Number(typed), state.type, "text");
});
for (const radio of document.querySelectorAll('input[name="type"]')) {
  radio.addEventListener("change", () => { ask(asked(), radio.value, "type"); drawHeat(); drawHistogram(); });
}
for (const radio of document.querySelectorAll('input[name="question"]')) {
  radio.addEventListener("change", () => { state.question = radio.value; ask(asked(), state.type, "question"); });
}
$("reset").addEventListener("click", () => { showPlan(); later(); drawHeat(); drawHistogram(); });
for (const button of document.querySelectorAll("button[data-rule]")) button.addEventListener("click", () => filterByRule(button));
$("all-rules").addEventListener("click", () => showRule(null));
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
