"use strict";

const DATA = JSON.parse(document.getElementById("payload").textContent);
// Okabe and Ito's colours, told apart with any kind of colour vision; lighter shades of them on dark.
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c6bb1"];
const DARK = ["#56b4e9", "#f0843c", "#35c49c", "#e09cc2", "#f0b93a", "#3d8fd1", "#a6a6a6", "#b39ddb"];
const DASHES = ["solid", "dot", "dash", "dashdot"];
const MANY = DATA.runs.length > 1;
const visible = new Set(DATA.runs.keys());
const dark = window.matchMedia("(prefers-color-scheme: dark)");

const byId = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// Plotly reads a little markup in names and hover texts; a run's name is text.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const hue = (i) => (dark.matches ? DARK : LIGHT)[i % LIGHT.length];
const color = (run, curve) => hue(MANY ? run : curve);
const fade = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

async function loadPlotly() {
  const packed = atob(byId("plotly").textContent.trim());
  const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

// The points of a metric: lines that lack it are left out, so that rare measurements still make a line.
function points(run, metric, transform = (value) => value) {
  const view = byId("view").value;
  const columns = DATA.runs[run][view];
  const place = columns[view === "outer" ? "outer_step" : "step"] || [];
  const x = [], y = [];
  (columns[metric] || []).forEach((value, i) => {
    if (value !== null) { x.push(place[i]); y.push(transform(value)); }
  });
  return { x, y };
}

function lineTraces(chart) {
  const traces = [];
  for (const run of visible) {
    chart.curves.forEach((curve, i) => {
      const transform = curve.magnitude ? Math.abs : (value) => value;
      const { x, y } = points(run, curve.metric, chart.log ? (v) => positive(transform(v)) : transform);
      if (!x.length) return;
      traces.push({
        x, y, name: plain(MANY ? `${DATA.runs[run].label} · ${curve.label}` : curve.label),
        mode: curve.markers || x.length === 1 ? "lines+markers" : "lines", legendgroup: curve.metric,
        showlegend: !MANY && chart.curves.length > 1,
        line: { color: color(run, i), width: 2, dash: MANY ? DASHES[i % DASHES.length] : "solid" },
      });
    });
  }
  return MANY && chart.curves.length > 1 ? traces.concat(legendKeys(chart.curves)) : traces;
}

const positive = (value) => (value > 0 ? value : null);

// With several runs, colour is the run and dash the curve: the legend explains dashes, and a click toggles a curve.
function legendKeys(curves) {
  return curves.map((curve, i) => ({
    x: [null], y: [null], name: curve.label, mode: "lines", legendgroup: curve.metric, hoverinfo: "skip",
    line: { color: css("--quiet"), width: 2, dash: DASHES[i % DASHES.length] },
  }));
}

function ratioTraces() {
  const traces = [];
  for (const run of visible) {
    const at = (metric) => points(run, metric, (value) => value - 1);
    const bands = MANY ? [["p05", "p95", 0.2]] : [["p01", "p99", 0.15], ["p05", "p95", 0.25]];
    const own = color(run, 0);
    for (const [low, high, alpha] of bands) {
      const share = low === "p01" ? "98% of sequences" : "90% of sequences";
      const edge = { mode: "lines", line: { width: 0, color: own }, legendgroup: `${run}${low}` };
      traces.push({ ...at(`ratio/${low}`), ...edge, name: low, showlegend: false });
      traces.push({
        ...at(`ratio/${high}`), ...edge, name: plain(MANY ? `${DATA.runs[run].label} · ${high}` : share),
        fill: "tonexty", fillcolor: fade(own, alpha), showlegend: !MANY,
      });
    }
    traces.push({
      ...at("ratio/p50"), mode: "lines", line: { color: own, width: 2 }, showlegend: !MANY,
      name: plain(MANY ? `${DATA.runs[run].label} · median` : "median"),
    });
    for (const sign of [1, -1]) {
      traces.push({
        ...points(run, "noise/abs_log_ratio_p99", (value) => sign * value), mode: "lines+markers",
        name: MANY ? plain(`${DATA.runs[run].label} · noise floor`) : "noise floor, p99", legendgroup: `${run}noise`,
        line: { color: MANY ? own : hue(4), dash: "dot", width: 1.5 }, marker: { size: 4 },
        showlegend: !MANY && sign === 1,
      });
    }
  }
  return traces.filter((trace) => trace.x.length);
}

function clipLines() {
  const ranges = new Map();
  for (const run of visible) {
    const clip = DATA.runs[run].clip;
    if (clip) ranges.set(clip.join(), clip);
  }
  return [...ranges.values()].flatMap(([low, high]) => [
    [-low, "clip_low"], [high, "clip_high"],
  ].map(([y, text]) => ({
    type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y,
    line: { color: css("--text"), width: 1, dash: "dash" },
    label: { text: `${text} ${Math.abs(y)}`, textposition: "end", font: { size: 11, color: css("--quiet") }, yanchor: y < 0 ? "top" : "bottom" },
  })));
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// Stacks of several runs cannot share an axis of steps: each run becomes one bar of medians.
function timeTraces(chart) {
  return chart.curves.map((curve, i) => {
    const look = { type: "bar", name: curve.label, marker: { color: hue(i), line: { width: 0 } } };
    if (MANY) {
      const shown = [...visible].map((run) => [run, outerValues(run, curve.metric)]).filter(([, values]) => values.length);
      return { ...look, x: shown.map(([run]) => plain(DATA.runs[run].label)), y: shown.map(([, values]) => median(values)) };
    }
    const columns = DATA.runs[0].outer;
    return { ...look, x: columns.outer_step, y: columns[curve.metric] || [] };
  });
}

const outerValues = (run, metric) => (DATA.runs[run].outer[metric] || []).filter((value) => value !== null);

function layout(chart) {
  const time = chart.kind === "time";
  const stepTitle = time ? (MANY ? "" : "outer step") : byId("view").value === "outer" ? "outer step" : "optimizer step";
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", uirevision: byId("view").value,
    font: { color: css("--text"), size: 12, family: "system-ui, sans-serif" },
    margin: { l: 10, r: 10, t: 8, b: 10 }, hovermode: time && MANY ? "closest" : "x unified",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { size: 11 } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 }, traceorder: "normal" },
    xaxis: { ...axis, title: { text: stepTitle, standoff: 6 }, zeroline: false },
    yaxis: {
      ...axis, title: { text: chart.unit, standoff: 6 }, type: chart.log ? "log" : "linear",
      exponentformat: "e", rangemode: chart.zero ? "tozero" : "normal",
    },
    shapes: chart.kind === "ratio" ? clipLines() : [], barmode: "stack", bargap: MANY ? 0.4 : 0.05,
  };
}

function draw() {
  const traces = { lines: lineTraces, ratio: ratioTraces, time: timeTraces };
  DATA.charts.forEach((chart, i) => {
    const options = { responsive: true, displaylogo: false, displayModeBar: false };
    Plotly.react(byId(`chart-${i}`), traces[chart.kind](chart), layout(chart), options);
  });
}

function buildCharts() {
  DATA.charts.forEach((chart, i) => {
    const card = element("section", "card");
    const plot = element("div", "plot");
    plot.id = `chart-${i}`;
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `${chart.title}, ${chart.unit}`);
    card.append(element("h3", "", chart.title));
    if (chart.note) card.append(element("p", "quiet", chart.note));
    card.append(plot);
    byId("charts").append(card);
  });
}

function paintSwatches() {
  document.querySelectorAll("[data-run] .swatch").forEach((swatch) => {
    swatch.style.display = "inline-block";
    swatch.style.background = color(Number(swatch.closest("[data-run]").dataset.run), 0);
  });
}

function buildRunToggles() {
  DATA.runs.forEach((run, i) => {
    const label = element("label");
    const box = element("input");
    box.type = "checkbox";
    box.checked = true;
    box.style.accentColor = color(i, 0);
    box.addEventListener("change", () => { visible[box.checked ? "add" : "delete"](i); draw(); });
    label.append(box, ` ${run.label}`);
    byId("visible").append(label);
  });
}

function fillSelect(select, options) {
  select.replaceChildren(...options.map(([value, text]) => {
    const option = element("option", "", text);
    option.value = value;
    return option;
  }));
}

function buildReader() {
  const runs = [...DATA.runs.entries()].filter(([, run]) => run.rollouts.length);
  if (!runs.length) return;
  byId("reader").hidden = false;
  fillSelect(byId("reader-run"), runs.map(([i, run]) => [i, run.label]));
  document.querySelector(".pick-run").hidden = !MANY;
  byId("reader-run").addEventListener("change", pickRun);
  byId("reader-step").addEventListener("change", pickStep);
  byId("reader-shade").addEventListener("change", showSamples);
  pickRun();
}

const readerRun = () => DATA.runs[Number(byId("reader-run").value)];
const readerSamples = () => readerRun().rollouts[Number(byId("reader-step").value)].samples;

function pickRun() {
  const groups = readerRun().rollouts;
  fillSelect(byId("reader-step"), groups.map((group, i) => [i, group.outer_step]));
  byId("reader-step").value = groups.length - 1;
  pickStep();
}

function pickStep() {
  const before = byId("reader-shade").value;
  const shades = [...new Set(readerSamples().flatMap((sample) => Object.keys(sample.shades)))];
  fillSelect(byId("reader-shade"), shades.map((name) => [name, `log π ${name}`]));
  if (shades.includes(before)) byId("reader-shade").value = before;
  document.querySelector(".pick-shade").hidden = !shades.length;
  showSamples();
}

function showSamples() {
  const shade = byId("reader-shade").value;
  const sizes = readerSamples().flatMap((sample) => (sample.shades[shade] || []).map((v) => Math.abs(v ?? 0))).sort((a, b) => a - b);
  const scale = sizes[Math.floor(sizes.length * 0.95)] || sizes.at(-1) || 1;
  const left = readerRun().rollouts_left_out;
  byId("reader-note").textContent = (sizes.length
    ? `Blue tokens are likelier under the first of the two policies, orange ones under the second; full colour at a log-ratio of ±${scale.toPrecision(2)}. ` : "")
    + (left ? `${left} more outer steps lie in the run's rollouts directory.` : "");
  byId("samples").replaceChildren(...readerSamples().map((sample) => sampleCard(sample, shade, scale)));
}

const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));

function sampleCard(sample, shade, scale) {
  const card = element("article", "card sample");
  const meta = element("div", "meta");
  const facts = [
    `${sample.prompt_id ?? "?"} / ${sample.sample ?? "?"}`, `reward ${number(sample.reward, 3)}`,
    `advantage ${number(sample.advantage, 3)}`, `s_i ${number(sample.ratio, 6)}`,
    sample.clipped === null ? "" : sample.clipped ? "clipped" : "not clipped",
    `${sample.tokens.length} tokens`, `finish: ${sample.finish_reason ?? "?"}`,
  ];
  meta.append(...facts.filter(Boolean).map((text) => element("span", "", text)));
  const response = element("pre", "response");
  const values = sample.shades[shade];
  sample.tokens.forEach((token, i) => response.append(tokenSpan(token, values ? values[i] : null, scale)));
  card.append(meta, element("pre", "prompt", sample.prompt ?? ""), response);
  return card;
}

function tokenSpan(token, value, scale) {
  const span = element("span", "", token.replaceAll("\n", "↵\n"));
  if (value === null || value === undefined) return span;
  const strength = Math.min(1, Math.abs(value) / scale) * 0.65;
  span.style.backgroundColor = `rgba(var(${value > 0 ? "--up" : "--down"}), ${strength.toFixed(3)})`;
  span.title = `${JSON.stringify(token)}  ${value > 0 ? "+" : ""}${value.toPrecision(3)}`;
  return span;
}

async function main() {
  buildReader();
  buildCharts();
  if (MANY) {
    paintSwatches();
    buildRunToggles();
  }
  if (!DATA.charts.length) {
    byId("message").textContent = "No metrics were written yet.";
    return;
  }
  if (typeof DecompressionStream === "undefined") {
    byId("message").textContent = "The curves need a browser of 2023 or later.";
    return;
  }
  await loadPlotly();
  byId("controls").hidden = false;
  byId("view").addEventListener("change", draw);
  dark.addEventListener("change", () => { if (MANY) paintSwatches(); draw(); });
  draw();
  byId("message").hidden = true;
  document.body.dataset.drawn = DATA.charts.length;
}

main();
