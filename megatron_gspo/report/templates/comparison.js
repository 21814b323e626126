// The comparison's page: arms on and off, and its kinds of charts. common.js stands before this.

const DASHES = { off: "solid", r2: "dash", r3: "dot" };
const CHARTS = DATA.sections.flatMap((section) => section.charts);
const visible = new Set(DATA.arms.keys());
const label = (arm) => plain(DATA.arms[arm].name);
const dash = (arm) => DASHES[DATA.arms[arm].replay] || "dashdot";
const shown = (items) => items.filter(({ arm }) => visible.has(arm));
const digits = (value) => Number(value.toPrecision(4)).toString().replace("-", "−");
const around = (low, high) => (low === null ? "" : ` (${digits(low)} to ${digits(high)})`);

// Curves over outer steps, mini-batches or layers: a band over seeds under each arm's mean.
function bandTraces(chart) {
  const mode = byId("bands").value, curves = shown(chart.curves), floor = logFloor(chart, mode);
  const under = curves.flatMap((curve) => (mode === "seeds" ? seedTraces(curve, floor) : bandOf(curve, mode, floor)));
  return [...under, ...curves.map((curve) => meanTrace(curve, mode, chart))];
}

function bandOf({ arm, x, n, low, high, min, max }, mode, floor) {
  const [from, to] = mode === "interval" ? [low, high] : [min, max];
  if (!from || n < 2 || from.some((value) => value === null)) return [];
  const edge = { x, mode: "lines", line: { width: 0, color: hue(arm) }, hoverinfo: "skip", showlegend: false, name: label(arm) };
  const above = (values) => (floor ? values.map((value) => Math.max(value, floor)) : values);
  return [{ ...edge, y: above(from) }, { ...edge, y: above(to), fill: "tonexty", fillcolor: fade(hue(arm), 0.13) }];
}

function seedTraces({ arm, x, seeds }, floor) {
  return Object.values(seeds || {}).map((y) => ({
    x, y: floor ? y.map((value) => (value > 0 ? value : null)) : y, mode: "lines", line: { width: 1, color: fade(hue(arm), 0.35) }, hoverinfo: "skip",
    showlegend: false, name: label(arm),
  }));
}

function meanTrace({ arm, x, y, n, low, high, min, max }, mode, chart) {
  const [from, to] = mode === "interval" ? [low, high] : [min, max];
  const texts = y.map((value, i) => `${digits(value)}${from && n > 1 ? around(from[i], to[i]) : ""}`);
  return {
    x, y: chart.log ? y.map((value) => (value > 0 ? value : null)) : y, customdata: texts, hovertemplate: "%{customdata}", name: label(arm),
    mode: x.length < 25 ? "lines+markers" : "lines", marker: { size: 5 }, line: { color: hue(arm), width: 2, dash: dash(arm) }, showlegend: false,
  };
}

// On a log axis a band that reaches 0 ends here, below every mean; below every seed where seeds are drawn. An interval
// around few seeds may reach far below both, and would leave the curves a strip at the top.
function logFloor(chart, mode) {
  if (!chart.log) return null;
  const values = chart.curves.flatMap(({ y, min }) => [...y, ...((mode !== "interval" && min) || [])]).filter((value) => value > 0);
  return values.length ? Math.min(...values) / 2 : null;
}

// A row an arm: a point a seed, and under them the mean with its interval.
function dotTraces(chart) {
  return shown(chart.groups).flatMap(({ arm, points, value, low, high }, place) => [
    {
      x: points.map(([x]) => x), y: points.map((_, i) => 0.1 - place + (points.length > 1 ? (i / (points.length - 1)) * 0.25 : 0)), mode: "markers",
      marker: { size: 6, color: fade(hue(arm), 0.55) }, text: points.map(([x, text]) => `${label(arm)}, ${plain(text)}: ${digits(x)}`),
      hovertemplate: "%{text}<extra></extra>", showlegend: false, name: label(arm),
    },
    {
      x: [value], y: [-place - 0.18], mode: "markers", marker: { size: 10, symbol: "diamond", color: hue(arm) }, ...bars(value, low, high, arm),
      text: [`${label(arm)}: ${digits(value)}${around(low, high)}`], hovertemplate: "%{text}<extra></extra>", showlegend: false, name: label(arm),
    },
  ]);
}

function bars(value, low, high, arm) {
  if (low === null) return {};
  return { error_x: { type: "data", symmetric: false, array: [high - value], arrayminus: [value - low], color: hue(arm), thickness: 2, width: 5 } };
}

const forestRows = (chart) => chart.rows.filter(({ arms }) => arms.every((arm) => visible.has(arm)));

// A row a contrast, from above; filled where a difference was shown.
function forestTraces(chart) {
  return forestRows(chart).map(({ label: name, arms: [arm], value, low, high, text, shown: filled }, place) => ({
    x: [value], y: [-place], mode: "markers", marker: { size: 10, symbol: filled ? "circle" : "circle-open", color: hue(arm), line: { width: 2, color: hue(arm) } },
    ...bars(value, low, high, arm), text: [`${plain(name)}<br>${plain(text)}${low === null ? "" : `<br>95% interval ${digits(low)} to ${digits(high)}`}`],
    hovertemplate: "%{text}<extra></extra>", showlegend: false, name: plain(name),
  }));
}

// Quantiles of s_i - 1: a thin bar, a thick one, a dot.
function quantileTraces(chart) {
  return shown(chart.groups).flatMap(({ arm, p01, p05, p50, p95, p99 }, place) => {
    const bar = (x, width) => ({ x, y: x.map(() => -place), mode: "lines", line: { color: hue(arm), width }, hoverinfo: "skip", showlegend: false, name: label(arm) });
    const texts = [[p01, "1%"], [p05, "5%"], [p50, "median"], [p95, "95%"], [p99, "99%"]];
    return [bar([p01, p99], 2), bar([p05, p95], 8), {
      x: texts.map(([x]) => x), y: texts.map(() => -place), mode: "markers", marker: {
        color: [0, 0, 1, 0, 0].map((center) => (center ? css("--card") : hue(arm))), size: [5, 5, 11, 5, 5], line: { color: hue(arm), width: 2 },
      },
      text: texts.map(([x, name]) => `${label(arm)}, ${name}: ${digits(x)}`), hovertemplate: "%{text}<extra></extra>", showlegend: false, name: label(arm),
    }];
  });
}

function clipShapes(chart) {
  return shown(chart.groups).flatMap(({ clip }, place) => (clip ? [-clip[0], clip[1]] : []).map((x) => ({
    type: "line", x0: x, x1: x, y0: -place - 0.38, y1: -place + 0.38, line: { color: css("--text"), width: 1.5, dash: "dash" },
  })));
}

// A row an arm, from above.
function armRows(groups) {
  const arms = shown(groups).map(({ arm }) => arm);
  return { ...axisLook(""), zeroline: false, showgrid: false, range: [0.5 - Math.max(1, arms.length), 0.5], tickvals: arms.map((_, place) => -place), ticktext: arms.map(label) };
}

const LAYOUTS = {
  bands: (chart) => ({
    hovermode: "x unified", xaxis: { ...axisLook(chart.xtitle), zeroline: false, ...wholeTicks(chart) },
    yaxis: { ...axisLook(chart.unit), ...valueAxis(chart, chart.curves.flatMap(({ y }) => y)), ...limits(chart) },
  }),
  dots: (chart) => ({ hovermode: "closest", yaxis: armRows(chart.groups), xaxis: { ...axisLook(chart.unit), zeroline: false } }),
  quantiles: (chart) => ({
    hovermode: "closest", yaxis: armRows(chart.groups), xaxis: { ...axisLook(chart.unit), exponentformat: "e" }, shapes: clipShapes(chart),
  }),
  forest: (chart) => ({
    hovermode: "closest", margin: { l: 14, r: 14, t: 8, b: 10 },
    xaxis: { ...axisLook(chart.unit), ...valueAxis(chart, forestValues(chart)), range: forestRange(chart), zeroline: false },
    yaxis: { range: [0.45 - Math.max(1, forestRows(chart).length), 0.85], visible: false, fixedrange: true },
    shapes: [{ type: "line", yref: "paper", y0: 0, y1: 1, x0: chart.reference, x1: chart.reference, layer: "below", line: { color: css("--quiet"), width: 1.5 } }],
    annotations: forestRows(chart).map(({ label: name }, place) => ({
      text: plain(name), xref: "paper", x: 0, xanchor: "left", y: -place, yshift: 16, showarrow: false, bgcolor: css("--card"), borderpad: 1, font: { size: 11, color: css("--text") },
    })),
  }),
};
const forestValues = (chart) => [chart.reference, ...chart.rows.flatMap(({ value, low, high }) => [value, low, high])].filter((value) => value !== null);

// All rows and the reference, whichever arms are on: a row keeps its place.
function forestRange(chart) {
  const values = forestValues(chart).map((value) => (chart.log ? Math.log10(value) : value));
  const low = Math.min(...values), high = Math.max(...values), margin = 0.06 * (high - low) || 0.1;
  return [low - margin, high + margin];
}

const wholeTicks = ({ curves }) => (Math.max(...curves.map(({ x }) => x.at(-1) - x[0])) < 9 ? { dtick: 1 } : { tickformat: "d" });

function valueAxis({ log, zero }, values) {
  if (!log) return { rangemode: zero ? "tozero" : "normal", exponentformat: "e" };
  return { type: "log", exponentformat: "e", ...logTicks(values.filter((value) => value > 0)) };
}

// What is drawn is never negative, unless it is a reward with another range, and shares end at 1: a band that goes on
// there says nothing.
function limits({ log, zero, share, signed }) {
  return log || signed ? {} : { autorangeoptions: { clipmin: zero ? 0 : -0.02, ...(share ? { clipmax: 1.02 } : {}) } };
}

const TRACES = { bands: bandTraces, dots: dotTraces, forest: forestTraces, quantiles: quantileTraces };

function drawAll() {
  CHARTS.forEach((chart, index) => {
    Plotly.react(byId(`chart-${index}`), TRACES[chart.kind](chart), { ...plotLook(), ...LAYOUTS[chart.kind](chart) }, PLOT_OPTIONS);
  });
}

function buildCharts() {
  let index = 0;
  for (const { question, charts } of DATA.sections) {
    const grid = element("div", "grid");
    for (const chart of charts) {
      grid.append(plotCard(`chart-${index}`, chart.title, chart.unit, [chart.note && element("p", "quiet", chart.note)], chart.metrics));
      const rows = chart.rows || chart.groups;
      if (rows) grid.lastChild.querySelector(".plot").style.minHeight = `${60 + 46 * Math.max(3, rows.length)}px`;
      index += 1;
    }
    byId("charts").append(element("h2", "", question), grid);
  }
}

function buildControls() {
  DATA.arms.forEach(({ name }, arm) => {
    const button = element("button"), swatch = element("i", "swatch");
    swatch.dataset.arm = arm;
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    button.append(swatch, name);
    button.addEventListener("click", () => toggle(arm, button));
    byId("visible").append(button);
  });
  byId("bands").addEventListener("change", drawAll);
  dark.addEventListener("change", () => { paintSwatches(); drawAll(); });
  byId("controls").hidden = false;
}

function toggle(arm, button) {
  visible[visible.has(arm) ? "delete" : "add"](arm);
  button.setAttribute("aria-pressed", String(visible.has(arm)));
  drawAll();
}

// As the curve is drawn: its colour, its dashes.
function paintSwatches() {
  document.querySelectorAll("[data-arm]").forEach((swatch) => {
    const arm = Number(swatch.dataset.arm), gaps = { solid: [14, 0], dash: [5, 3], dot: [2, 2] }[dash(arm)] || [8, 2];
    swatch.style.background = `repeating-linear-gradient(to right, ${hue(arm)} 0 ${gaps[0]}px, transparent ${gaps[0]}px ${gaps[0] + gaps[1]}px)`;
  });
}

async function main() {
  paintSwatches();
  if (!CHARTS.length) {
    byId("message").textContent = "No cell has finished yet.";
  } else if (typeof DecompressionStream === "undefined") {
    byId("message").textContent = "The curves need a browser of 2023 or later.";
  } else {
    byId("message").textContent = "Drawing the curves.";
    buildCharts();
    buildControls();
    await loadPlotly();
    paintSwatches();
    drawAll();
    byId("message").hidden = true;
  }
  document.body.dataset.state = "done";
}

document.addEventListener("DOMContentLoaded", main);
