// Curves: from the payload to Plotly's traces.

const AXES = {
  outer_step: { view: "outer", title: "outer step" },
  step: { view: "steps", title: "optimizer step" },
  hours: { view: "outer", title: "hours of work" },
};
const DASHES = ["solid", "dot", "dash", "dashdot"];
const CHARTS = DATA.sections.flatMap((section) => section.charts);
const axis = () => AXES[byId("axis").value];
const named = (run, text) => plain(MANY ? `${DATA.runs[run].label} · ${text}` : text);

// The points of a metric; lines that lack it are no gap, so that rare measurements still make a line.
function points(run, metric, transform = (value) => value) {
  const view = DATA.runs[run][axis().view];
  const place = view[byId("axis").value] || [];
  const { y = [], rows = [...y.keys()] } = view.series[metric] || {};
  return { x: rows.map((row) => place[row]), y: y.map(transform) };
}

function isThinned(run, metric) {
  return Boolean(DATA.runs[run][axis().view].series[metric]?.thinned);
}

function smoothed(y, width) {
  return y.map((_, i) => {
    const window = y.slice(Math.max(0, i - width + 1), i + 1);
    return window.reduce((sum, value) => sum + value, 0) / window.length;
  });
}

const positive = (value) => (value > 0 ? value : null);

// A smoothed curve lies over its raw points, which stay to be seen.
function lineTraces(chart) {
  const width = Number(byId("smooth").value);
  const traces = [];
  for (const run of visible) {
    chart.curves.forEach((curve, i) => {
      const { x, y } = points(run, curve.metric, curve.magnitude ? Math.abs : undefined);
      if (!x.length) return;
      const shown = (values) => (chart.log ? values.map(positive) : values);
      const own = color(run, i);
      const look = {
        x, legendgroup: curve.metric, mode: curve.markers || x.length < 40 ? "lines+markers" : "lines", marker: { size: 4 },
        line: { color: own, width: x.length < 400 ? 2 : 1, dash: MANY ? DASHES[i % DASHES.length] : "solid" }, name: named(run, curve.label),
        showlegend: !MANY && chart.curves.length > 1,
      };
      if (width === 1 || curve.markers || isThinned(run, curve.metric)) {
        traces.push({ ...look, y: shown(y) });
      } else {
        const faint = { mode: "lines", line: { color: fade(own, 0.3), width: 1 }, showlegend: false };
        traces.push({ ...look, ...faint, y: shown(y) });
        traces.push({ ...look, mode: "lines", y: shown(smoothed(y, width)), name: named(run, `${curve.label}, mean of ${width}`) });
      }
    });
  }
  return MANY && chart.curves.length > 1 ? traces.concat(legendKeys(chart.curves)) : traces;
}

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
    const own = color(run, 0), alone = at("ratio/p50").x.length === 1;
    for (const [low, high, alpha] of bands) {
      const edge = { mode: alone ? "markers" : "lines", line: { width: 0, color: own }, marker: { color: own, size: 5 } };
      traces.push({ ...at(`ratio/${low}`), ...edge, name: named(run, low), showlegend: false });
      traces.push({
        ...at(`ratio/${high}`), ...edge, name: named(run, high), fill: "tonexty", fillcolor: fade(own, alpha),
        showlegend: false,
      });
    }
    const center = { mode: alone ? "markers" : "lines", line: { color: own, width: 2 } };
    traces.push({ ...at("ratio/p50"), ...center, showlegend: false, name: named(run, "median") });
    for (const sign of [1, -1]) {
      traces.push({
        ...points(run, "noise/abs_log_ratio_p99", (value) => sign * value), mode: "lines+markers", marker: { size: 4 },
        name: named(run, `${sign < 0 ? "−" : ""}noise floor, p99`), showlegend: false,
        line: { color: MANY ? own : hue(4), dash: "dot", width: 1.5 },
      });
    }
  }
  return [...traces.filter((trace) => trace.x.length), ...ratioKeys()];
}

// What a band, a dash and a dot mean; as traces without points, for the hover names quantiles.
function ratioKeys() {
  const own = MANY ? css("--quiet") : hue(0);
  const key = (name, line) => ({ x: [null], y: [null], name, mode: "lines", line, hoverinfo: "skip" });
  const keys = [key("median", { color: own, width: 2 }), key(MANY ? "90% of sequences" : "90%", { color: fade(own, 0.4), width: 10 })];
  if (!MANY) keys.push(key("98% of sequences", { color: fade(own, 0.15), width: 10 }));
  if ([...visible].some((run) => points(run, "noise/abs_log_ratio_p99").x.length)) {
    keys.push(key("noise floor, p99", { color: MANY ? own : hue(4), dash: "dot", width: 1.5 }));
  }
  if (clipRanges().length) keys.push(key("clip range", CLIP_LINE()));
  return keys;
}

// The axis holds the clip range and most steps; one wild step would press all else flat. A double click shows all.
function ratioRange() {
  const sizes = [...visible].flatMap((run) => ["p05", "p95", "p01", "p99"].flatMap((q) => points(run, `ratio/${q}`).y))
    .map((value) => Math.abs(value - 1)).sort((a, b) => a - b);
  const most = 1.5 * (sizes[Math.floor(sizes.length * 0.9)] || 0);
  const edge = Math.max(most, 2 * Math.max(0, ...clipRanges().flat()));
  return sizes.length && sizes.at(-1) > 1.5 * edge ? [-edge, edge] : null;
}

function ratioNote() {
  const runs = [...visible].map((run) => DATA.runs[run]).filter((run) => run.clip);
  const names = clipRanges().length > 1 ? runs : runs.slice(0, 1);
  const ranges = names.map(({ label, clip: [low, high] }) => `Clip range${names.length > 1 ? ` of ${label}` : ""} −${low} … +${high}.`);
  return [...ranges, ratioRange() ? "Some steps reach beyond the axis: double-click it to see them." : ""].filter(Boolean).join(" ");
}

// Stacks of several runs cannot share an axis of steps: each run becomes one bar of means.
function timeTraces(chart) {
  return chart.curves.map((curve, i) => {
    const look = { type: "bar", name: curve.label, marker: { color: hue(i), line: { width: 0 } } };
    if (MANY) {
      const known = [...visible].map((run) => [run, mean(DATA.runs[run].bars.parts[curve.metric])]).filter(([, y]) => y !== null);
      return { ...look, x: known.map(([run]) => plain(DATA.runs[run].label)), y: known.map(([, y]) => y) };
    }
    const bars = DATA.runs[0].bars;
    return { ...look, x: bars.outer_step, y: bars.parts[curve.metric], width: bars.every - 0.05, offset: -0.475 };
  });
}

function mean(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

const CLIP_LINE = () => ({ color: css("--text"), width: 1, dash: "dash" });

function clipRanges() {
  const ranges = [...visible].map((run) => DATA.runs[run].clip).filter(Boolean);
  return [...new Map(ranges.map((range) => [range.join(), range])).values()];
}

// Ranges that differ between runs have their runs' colours.
const clipLines = () => [...visible].filter((run) => DATA.runs[run].clip).flatMap((run) => {
  const [low, high] = DATA.runs[run].clip, line = CLIP_LINE();
  if (clipRanges().length > 1) line.color = color(run, 0);
  return [-low, high].map((y) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line }));
});

// After what a run was taken up again, in the unit of the axis.
function resumeLines() {
  return [...visible].flatMap((run) => DATA.runs[run].resumed.map((place) => {
    const { outer_step: steps, hours } = DATA.runs[run].outer;
    const x = byId("axis").value === "hours" ? (hours || [])[steps.indexOf(place.outer_step)] : place[byId("axis").value];
    return {
      type: "line", yref: "paper", y0: 0, y1: 1, x0: x, x1: x, line: { color: color(run, 0), width: 1, dash: "dashdot" },
      label: {
        text: "resumed", textangle: 0, textposition: "start", xanchor: "left", yanchor: "bottom",
        font: { size: 10, color: css("--quiet") },
      },
    };
  })).filter((shape) => shape.x0 !== undefined);
}

function layout(chart) {
  const time = chart.kind === "time";
  return {
    ...plotLook(), uirevision: byId("axis").value, hovermode: time && MANY ? "closest" : "x unified",
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 }, traceorder: "normal" },
    xaxis: {
      ...axisLook(time ? (MANY ? "" : "outer step") : axis().title), zeroline: false,
      ...(time && MANY ? {} : stepAxis(time ? "outer_step" : byId("axis").value)),
    },
    yaxis: {
      ...axisLook(chart.unit), type: chart.log ? "log" : "linear", exponentformat: "e",
      rangemode: chart.zero ? "tozero" : "normal", ...(chart.log ? logTicks(drawnValues(chart)) : {}),
      ...(chart.kind === "ratio" && ratioRange() ? { range: ratioRange() } : {}),
    },
    shapes: [...(chart.kind === "ratio" ? clipLines() : []), ...(time ? [] : resumeLines())],
    barmode: "stack", bargap: 0.4,
  };
}

const drawnValues = (chart) => [...visible].flatMap((run) => chart.curves.flatMap(({ metric }) => points(run, metric).y));

// One range for all charts, so that what happened at one time stands in one column.
function stepAxis(name) {
  const places = [...visible].flatMap((run) => Object.values(AXES).map(({ view }) => DATA.runs[run][view][name] || []));
  const low = Math.min(...places.map((place) => place[0] ?? Infinity));
  const high = Math.max(...places.map((place) => place.at(-1) ?? -Infinity));
  if (!(low <= high)) return {};
  if (name === "hours") return { range: [0, high * 1.02 || 1] };
  const margin = Math.max(0.6, (high - low) * 0.02);
  return { range: [low - margin, high + margin], tickformat: "d", ...(high - low < 8 ? { dtick: 1 } : {}) };
}

const TRACES = { lines: lineTraces, ratio: ratioTraces, time: timeTraces };

// A chart that is folded away has no size to be drawn in: it is when it is unfolded.
function draw(index) {
  const chart = CHARTS[index], plot = byId(`chart-${index}`);
  if (plot.closest("details:not([open])")) return;
  Plotly.react(plot, TRACES[chart.kind](chart), layout(chart), PLOT_OPTIONS);
}

// Texts first: they decide how high a chart is.
function drawAll() {
  if (byId("ratio-note")) byId("ratio-note").textContent = ratioNote();
  CHARTS.forEach((_, index) => draw(index));
  byId("axis-note").textContent = axisNote();
}

function axisNote() {
  const notes = {
    outer_step: "An outer step's value is the mean over its mini-batches; of s_i, of what is measured once, the last.",
    step: "",
    hours: "Hours are the sum of the time split; evaluations and pauses are not in it.",
  };
  const thinned = [...visible].some((run) => Object.keys(DATA.metrics).some((metric) => isThinned(run, metric)))
    ? "Long curves keep the smallest and the largest value of each stretch, and are not smoothed; metrics.jsonl has all." : "";
  return [notes[byId("axis").value], thinned].filter(Boolean).join(" ");
}

function buildCharts() {
  let index = 0;
  for (const section of DATA.sections) {
    const cards = section.charts.map((chart) => [chart, chartCard(chart, index++)]);
    const of = (flat) => cards.filter(([chart]) => chart.flat === flat);
    byId("charts").append(element("h2", "", section.question));
    if (of(false).length) byId("charts").append(gridOf(of(false)));
    if (of(true).length) byId("charts").append(foldedCharts(of(true)));
  }
  buildControls();
}

function gridOf(cards) {
  const grid = element("div", "grid");
  grid.append(...cards.map(([, card]) => card));
  return grid;
}

// What is 0 all along takes one line, which says what it is.
function foldedCharts(cards) {
  const details = element("details", "flat"), names = cards.map(([chart]) => chart.title).join(" · ");
  details.append(element("summary", "quiet", `0 at every step: ${names}`), gridOf(cards));
  details.addEventListener("toggle", () => { if (details.open && window.Plotly) drawAll(); });
  return details;
}

function chartCard(chart, index) {
  const every = DATA.runs[0].bars.every;
  const means = MANY ? "Mean over the outer steps of each run." : every > 1 ? `Each bar is the mean of ${every} outer steps.` : "";
  const note = chart.kind === "time" ? means : chart.note;
  const ranges = element("p", "quiet");
  ranges.id = "ratio-note";
  const notes = [note && element("p", "quiet", note), chart.kind === "ratio" && ranges];
  return plotCard(`chart-${index}`, chart.title, chart.unit, notes, chart.curves.map(({ metric }) => metric));
}

function buildControls() {
  const known = { hours: DATA.runs.some((run) => run.outer.hours) };
  const texts = { outer_step: "outer step", step: "optimizer step", hours: "hours" };
  fillSelect(byId("axis"), Object.entries(texts).filter(([name]) => known[name] ?? true));
  byId("controls").hidden = false;
  byId("axis").addEventListener("change", drawAll);
  byId("smooth").addEventListener("change", drawAll);
  dark.addEventListener("change", () => { if (MANY) paintSwatches(); drawAll(); });
  if (MANY) buildRunToggles();
}

function buildRunToggles() {
  DATA.runs.forEach((run, i) => {
    const label = element("label"), box = element("input"), swatch = element("i", "swatch");
    label.dataset.run = i;
    box.type = "checkbox";
    box.checked = true;
    box.addEventListener("change", () => { visible[box.checked ? "add" : "delete"](i); drawAll(); });
    label.append(box, swatch, run.label);
    byId("visible").append(label);
  });
  paintSwatches();
}

function paintSwatches() {
  document.querySelectorAll("[data-run] .swatch").forEach((swatch) => {
    swatch.style.background = color(Number(swatch.closest("[data-run]").dataset.run), 0);
  });
}
