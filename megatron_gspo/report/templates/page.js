// The report's own state, and its beginning. common.js stands before this.

const MANY = DATA.runs.length > 1;
const visible = new Set(DATA.runs.keys());
const color = (run, curve) => hue(MANY ? run : curve);

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
