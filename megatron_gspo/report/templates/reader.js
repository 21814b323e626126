// Rollouts to read: prompt, response with shaded tokens, and what became of it.

const AT_ONCE = 24;
const FILTERS = {
  all: ["all responses", () => true],
  clipped: ["clipped", (sample) => sample.clipped === true],
  unclipped: ["not clipped", (sample) => sample.clipped === false],
  truncated: ["truncated", (sample) => sample.finish_reason === "length"],
  wrong: ["reward 0", (sample) => sample.reward === 0],
  rewarded: ["reward above 0", (sample) => sample.reward > 0],
};
const SORTS = {
  saved: ["order saved", null],
  reward: ["reward, low first", (sample) => sample.reward],
  advantage: ["advantage, low first", (sample) => sample.advantage],
  ratio: ["|s_i − 1|, large first", (sample) => (sample.ratio === null ? null : -Math.abs(sample.ratio - 1))],
  length: ["length, long first", (sample) => -sample.length],
  shade: ["largest token shade first", (sample) => -Math.max(0, ...sizes(sample))],
};
let shownAtMost = AT_ONCE;

function buildReader() {
  const runs = [...DATA.runs.entries()].filter(([, run]) => run.rollouts.groups.length);
  if (!runs.length) return;
  byId("reader").hidden = false;
  fillSelect(byId("reader-run"), runs.map(([i, run]) => [i, run.label]));
  fillSelect(byId("reader-sort"), Object.entries(SORTS).map(([value, [text]]) => [value, text]));
  byId("pick-run").hidden = !MANY;
  byId("reader-run").addEventListener("change", pickRun);
  byId("reader-step").addEventListener("change", pickStep);
  for (const id of ["reader-filter", "reader-sort", "reader-shade"]) byId(id).addEventListener("change", showFirst);
  byId("samples").addEventListener("click", readOut);
  byId("more").addEventListener("click", () => { shownAtMost += AT_ONCE; showSamples(); });
  pickRun();
}

const readerRun = () => DATA.runs[Number(byId("reader-run").value)];
const readerSamples = () => readerRun().rollouts.groups[Number(byId("reader-step").value)].samples;
const sizes = (sample) => (sample.shades[byId("reader-shade").value] || []).map((value) => Math.abs(value ?? 0));

function pickRun() {
  const groups = readerRun().rollouts.groups;
  fillSelect(byId("reader-step"), groups.map((group, i) => [i, group.outer_step]));
  byId("reader-step").value = groups.length - 1;
  pickStep();
}

function pickStep() {
  const samples = readerSamples();
  const shades = [...new Set(samples.flatMap((sample) => Object.keys(sample.shades)))];
  fillSelect(byId("reader-shade"), shades.map((name) => [name, name]));
  byId("pick-shade").hidden = !shades.length;
  const counted = Object.entries(FILTERS).map(([value, [text, keep]]) => [value, `${text} (${samples.filter(keep).length})`]);
  fillSelect(byId("reader-filter"), counted);
  showFirst();
}

function showFirst() {
  shownAtMost = AT_ONCE;
  showSamples();
}

function chosenSamples() {
  const [, keep] = FILTERS[byId("reader-filter").value], [, key] = SORTS[byId("reader-sort").value];
  const samples = readerSamples().filter(keep);
  if (!key) return samples;
  const keyed = samples.map((sample) => [key(sample) ?? Infinity, sample]);
  return keyed.sort(([a], [b]) => a - b).map(([, sample]) => sample);
}

// One scale for all responses of the step: nine tokens of ten are inside it, or it is drawn by its outliers.
function shadeScale() {
  const all = readerSamples().flatMap(sizes).filter((size) => size > 0).sort((a, b) => a - b);
  return all.length ? all[Math.min(all.length - 1, Math.floor(all.length * 0.95))] : null;
}

function showSamples() {
  const samples = chosenSamples(), scale = shadeScale();
  byId("samples").replaceChildren(...samples.slice(0, shownAtMost).map((sample) => sampleCard(sample, scale)));
  byId("more").hidden = samples.length <= shownAtMost;
  byId("more").textContent = `Show ${Math.min(AT_ONCE, samples.length - shownAtMost)} more of ${samples.length}`;
  showLegend(scale);
  byId("reader-note").textContent = readerNote(samples.length);
}

function showLegend(scale) {
  const [upper, lower] = byId("reader-shade").value.split(" − ");
  byId("legend").hidden = !lower;
  byId("legend-low").textContent = scale === null ? "" : `−${scale.toPrecision(2)}`;
  byId("legend-high").textContent = scale === null ? "" : `+${scale.toPrecision(2)} nats`;
  byId("legend-text").textContent = scale === null ? "Every log-ratio is exactly 0."
    : `log π ${upper} − log π ${lower} of each token; point at one for its value. 5% lie outside the scale.`;
}

function readerNote(count) {
  const { steps_left_out: steps, responses_left_out: responses } = readerRun().rollouts;
  const total = readerSamples().length;
  return [
    `${count} of ${total} saved responses of this outer step.`,
    steps ? `${steps} more outer steps lie in the run's rollouts directory.` : "",
    responses ? `${responses} responses were too much for this page and lie there too.` : "",
  ].filter(Boolean).join(" ");
}

const digits = (value, places) => (value === null ? "-" : value.toFixed(places));
const signed = (value, precision = 3) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toPrecision(precision)}`;

function sampleCard(sample, scale) {
  const card = element("article", "card sample"), meta = element("div", "meta");
  const facts = [
    ["", `${sample.prompt_id ?? "?"} / ${sample.sample ?? "?"}`],
    ["reward", `reward ${digits(sample.reward, 3)}`],
    ["advantage", `advantage ${sample.advantage === null ? "-" : signed(sample.advantage)}`],
    ["ratio", sample.ratio === null ? "" : `s_i ${sample.ratio.toFixed(6)}`],
    [sample.clipped ? "mark" : "", sample.clipped === null ? "" : sample.clipped ? "clipped" : "not clipped"],
    ["", sample.length === null ? "" : `${sample.length} tokens`],
    sample.finish_reason === "length" ? ["mark", "truncated"] : ["", `finish: ${sample.finish_reason ?? "?"}`],
  ];
  meta.append(...facts.filter(([, text]) => text).map(([name, text]) => element("span", name, printable(text))));
  card.append(meta, promptOf(sample), responseOf(sample, scale));
  return card;
}

// A finger has no hover: a tap on a token writes its value into the card.
function readOut(event) {
  const meta = event.target.closest(".sample")?.querySelector(".meta");
  if (!meta || !event.target.title) return;
  const shown = meta.querySelector(".read-out") || meta.appendChild(element("span", "read-out"));
  shown.textContent = event.target.title;
}

function promptOf(sample) {
  const prompt = element("pre", "prompt", printable(sample.prompt ?? ""));
  if ((sample.prompt ?? "").length < 1500) return prompt;
  const details = element("details");
  details.append(element("summary", "quiet", `prompt, ${sample.prompt.length} characters`), prompt);
  return details;
}

function responseOf(sample, scale) {
  const response = element("pre", "response"), values = sample.shades[byId("reader-shade").value];
  sample.tokens.forEach((token, i) => {
    if (sample.gap && i === sample.gap[0]) response.append(element("span", "gap", `\n… ${sample.gap[1]} tokens left out …\n`));
    response.append(tokenSpan(token, values ? values[i] : null, scale));
  });
  return response;
}

// Control and direction characters would hide or reorder what is around them: they are shown by their numbers.
function printable(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    (character) => `⟨U+${character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

function tokenSpan(token, value, scale) {
  const span = element("span", "", printable(token).replaceAll("\n", "↵\n"));
  if (value === null || value === undefined) return span;
  const strength = scale ? Math.min(1, Math.abs(value) / scale) * 0.55 : 0;
  span.style.backgroundColor = `rgba(var(${value > 0 ? "--up" : "--down"}), ${strength.toFixed(3)})`;
  span.title = `${JSON.stringify(printable(token))}  ${signed(value)} nats`;
  return span;
}
