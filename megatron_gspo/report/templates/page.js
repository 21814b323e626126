"use strict";

const DATA = JSON.parse(document.getElementById("payload").textContent);
// Okabe and Ito's colours, told apart with any kind of colour vision; lighter shades of them on dark.
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c6bb1"];
const DARK = ["#56b4e9", "#f0843c", "#35c49c", "#e09cc2", "#f0b93a", "#3d8fd1", "#a6a6a6", "#b39ddb"];
const MANY = DATA.runs.length > 1;
const visible = new Set(DATA.runs.keys());
const dark = window.matchMedia("(prefers-color-scheme: dark)");

const byId = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const hue = (i) => (dark.matches ? DARK : LIGHT)[i % LIGHT.length];
const color = (run, curve) => hue(MANY ? run : curve);
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

async function main() {
  buildReader();
  if (MANY) paintSwatches();
  if (!DATA.sections.length) {
    byId("message").textContent = "No metrics were written yet.";
  } else if (typeof DecompressionStream === "undefined") {
    byId("message").textContent = "The curves need a browser of 2023 or later.";
  } else {
    byId("message").textContent = "Drawing the curves.";
    buildCharts();
    await loadPlotly();
    drawAll();
    byId("message").hidden = true;
  }
  document.body.dataset.state = "done";
}

// The other scripts stand behind this one.
document.addEventListener("DOMContentLoaded", main);
