"use strict";

// What every page has: its data, colours, elements, and the look of a plot.

const DATA = JSON.parse(document.getElementById("payload").textContent);
// Okabe and Ito's colours, told apart with any kind of colour vision; lighter shades of them on dark.
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c6bb1"];
const DARK = ["#56b4e9", "#f0843c", "#35c49c", "#e09cc2", "#f0b93a", "#3d8fd1", "#a6a6a6", "#b39ddb"];
const dark = window.matchMedia("(prefers-color-scheme: dark)");

const byId = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const hue = (i) => (dark.matches ? DARK : LIGHT)[i % LIGHT.length];
// Plotly reads a little markup in names and hover texts; a name is text.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const fade = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// Options by [value, text]; keeps what was chosen while it is still there.
function fillSelect(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => {
    const option = element("option", "", text);
    option.value = value;
    return option;
  }));
  if (options.some(([value]) => String(value) === before)) select.value = before;
}

async function loadPlotly() {
  const packed = atob(byId("plotly").textContent.trim());
  const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

const PLOT_OPTIONS = { responsive: true, displaylogo: false, displayModeBar: false };

function plotLook() {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--text"), size: 12, family: "system-ui, sans-serif" },
    margin: { l: 10, r: 10, t: 8, b: 10 },
    hoverlabel: { namelength: -1, bgcolor: css("--card"), bordercolor: css("--line"), font: { size: 11, color: css("--text") } },
  };
}

function axisLook(title) {
  return {
    gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true,
    title: { standoff: 6, font: { size: 11, color: css("--quiet") }, text: title },
  };
}

// 1, 2 and 5 times powers of ten over a decade or two, the powers alone over more.
function logTicks(values) {
  const sizes = values.map(Math.abs).filter(Boolean);
  const decades = sizes.length ? Math.log10(Math.max(...sizes) / Math.min(...sizes)) : 0;
  return { tickformat: "~g", ...(0 < decades && decades < 1 ? {} : decades < 2 ? { dtick: "D2" } : decades < 8 ? { dtick: 1 } : {}) };
}

// A chart's card: its title, the notes under it, an empty plot and, folded, what its metrics mean.
function plotCard(id, title, unit, notes, metrics) {
  const card = element("section", "card chart"), plot = element("div", "plot");
  plot.id = id;
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `${title}, ${unit}`);
  card.append(element("h3", "", title), ...notes.filter(Boolean), plot);
  const rows = new Set(metrics.map(rowOf).filter((row) => DATA.metrics[row]));  // layers, say, share one
  if (rows.size) card.append(explanation(rows));
  return card;
}

// The name that a recorded metric has in docs/metrics.md, as report/metrics.py has it.
const rowOf = (metric) => metric.replace(/layer_\d+$/, "layer_NN").replace(/^source\/[^/]+\//, "source/NAME/")
  .replace(/^eval\/[^/]+\//, "eval/SUITE/").replace(/^reward\/component\/.*/, "reward/component/NAME");

// What docs/metrics.md says of its rows.
function explanation(rows) {
  const details = element("details", "about quiet"), list = element("dl");
  details.append(element("summary", "", "what this is"), list);
  const text = (markdown) => markdown.replaceAll("`", "");
  for (const metric of rows) {
    const [unit, meaning, lookFor] = DATA.metrics[metric];
    list.append(element("dt", "", `${metric} (${unit === "1" ? "no unit" : unit})`), element("dd", "", text(meaning)));
    if (lookFor) list.append(element("dd", "", text(lookFor)));
  }
  return details;
}

// A prompt or a reference answer; a long one is folded.
function foldedText(name, text) {
  const shown = element("pre", name, printable(text ?? ""));
  if ((text ?? "").length < 1500) return shown;
  const details = element("details");
  details.append(element("summary", "quiet", `${name}, ${text.length} characters`), shown);
  return details;
}

// Control and direction characters would hide or reorder what is around them: they are shown by their numbers.
function printable(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    (character) => `⟨U+${character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}
