// Rollouts to read, group by group: a prompt, its reference answer, and its responses side by side with shaded tokens.

const AT_ONCE = 6;
const anyOf = (test) => (group) => group.samples.some(test);
const rewardsOf = (group) => group.samples.map((sample) => sample.reward);
const FILTERS = {
  all: ["all groups", () => true],
  differ: ["rewards differ", (group) => new Set(rewardsOf(group)).size > 1],
  equal: ["rewards all equal", (group) => new Set(rewardsOf(group)).size === 1],
  wrong: ["no reward above 0", (group) => !rewardsOf(group).some((reward) => reward > 0)],
  clipped: ["with a clipped response", anyOf((sample) => sample.clipped === true)],
  truncated: ["with a truncated response", anyOf((sample) => sample.finish_reason === "length")],
};
// Of a response what it is sorted by; a group goes by its first one, and by its mean reward.
const SORTS = {
  saved: ["order drawn", null],
  reward: ["reward, low first", (sample) => sample.reward],
  ratio: ["|s_i − 1|, large first", (sample) => (sample.ratio === null ? null : -Math.abs(sample.ratio - 1))],
  length: ["length, long first", (sample) => -sample.length],
  shade: ["largest token shade first", (sample) => -Math.max(0, ...sizes(sample))],
};
let shownAtMost = AT_ONCE;

function buildReader() {
  const runs = [...DATA.runs.entries()].filter(([, run]) => run.rollouts.steps.length);
  if (!runs.length) return;
  byId("reader").hidden = false;
  fillSelect(byId("reader-run"), runs.map(([i, run]) => [i, run.label]));
  fillSelect(byId("reader-sort"), Object.entries(SORTS).map(([value, [text]]) => [value, text]));
  byId("pick-run").hidden = !MANY;
  byId("reader-run").addEventListener("change", pickRun);
  byId("reader-step").addEventListener("change", pickStep);
  for (const id of ["reader-filter", "reader-sort", "reader-shade"]) byId(id).addEventListener("change", showFirst);
  byId("samples").addEventListener("click", readOut);
  byId("more").addEventListener("click", () => { shownAtMost += AT_ONCE; showGroups(); });
  pickRun();
}

const readerRun = () => DATA.runs[Number(byId("reader-run").value)];
const readerStep = () => readerRun().rollouts.steps[Number(byId("reader-step").value)];
const readerSamples = () => readerStep().groups.flatMap((group) => group.samples);
const sizes = (sample) => (sample.shades[byId("reader-shade").value] || []).map((value) => Math.abs(value ?? 0));

function pickRun() {
  const { steps } = readerRun().rollouts;
  fillSelect(byId("reader-step"), steps.map((step, i) => [i, step.outer_step]));
  byId("reader-step").value = steps.length - 1;
  pickStep();
}

function pickStep() {
  const { groups } = readerStep();
  const shades = [...new Set(readerSamples().flatMap((sample) => Object.keys(sample.shades)))];
  fillSelect(byId("reader-shade"), shades.map((name) => [name, name]));
  byId("pick-shade").hidden = !shades.length;
  const counted = Object.entries(FILTERS).map(([value, [text, keep]]) => [value, `${text} (${groups.filter(keep).length})`]);
  fillSelect(byId("reader-filter"), counted);
  showFirst();
}

function showFirst() {
  shownAtMost = AT_ONCE;
  showGroups();
}

const sorted = (items, key) => items.map((item) => [key(item) ?? Infinity, item]).sort(([a], [b]) => a - b).map(([, item]) => item);

function chosenGroups() {
  const [, keep] = FILTERS[byId("reader-filter").value], [, key] = SORTS[byId("reader-sort").value];
  const groups = readerStep().groups.filter(keep);
  if (!key) return groups;
  const inside = groups.map((group) => ({ ...group, samples: sorted(group.samples, key) }));
  return sorted(inside, byId("reader-sort").value === "reward" ? meanReward : (group) => key(group.samples[0]));
}

const meanReward = (group) => mean(rewardsOf(group));

// One scale for all responses of the step: nine tokens of ten are inside it, or it is drawn by its outliers.
function shadeScale() {
  const all = readerSamples().flatMap(sizes).filter((size) => size > 0).sort((a, b) => a - b);
  return all.length ? all[Math.min(all.length - 1, Math.floor(all.length * 0.95))] : null;
}

function showGroups() {
  const groups = chosenGroups(), scale = shadeScale();
  byId("samples").replaceChildren(...groups.slice(0, shownAtMost).map((group) => groupCard(group, scale)));
  byId("more").hidden = groups.length <= shownAtMost;
  byId("more").textContent = `Show ${Math.min(AT_ONCE, groups.length - shownAtMost)} more of ${groups.length}`;
  showLegend(scale);
  byId("reader-note").textContent = readerNote(groups.length);
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
  const { groups, outer_step: step, file } = readerStep();
  return [
    `${count} of ${groups.length} saved groups of outer step ${step}, rollouts/${file}.`,
    steps ? `${steps} more outer steps lie in the run's rollouts directory.` : "",
    responses ? `${responses} responses were too much for this page and lie there too.` : "",
  ].filter(Boolean).join(" ");
}

const digits = (value, places) => (value === null ? "-" : value.toFixed(places));
const signed = (value, precision = 3) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toPrecision(precision)}`;

function groupCard(group, scale) {
  const card = element("article", "card group"), meta = element("div", "meta"), responses = element("div", "responses");
  const count = group.samples.length, of = Math.max(count, readerRun().rollouts.group_size ?? 0), average = meanReward(group);
  const facts = [
    ["prompt-id", group.prompt_id ?? "?"],
    ["", `${count === of ? "" : `${count} of `}${of} response${of === 1 ? "" : "s"}`],
    ["", average === null ? "" : `mean reward ${digits(average, 3)}`],
  ];
  meta.append(...facts.filter(([, text]) => text).map(([name, text]) => element("span", name, printable(text))));
  responses.append(...group.samples.map((sample) => sampleBox(sample, scale)));
  card.append(meta, foldedText("prompt", group.prompt));
  if (group.answer !== null) card.append(element("div", "quiet label", "reference answer"), foldedText("reference", group.answer));
  card.append(responses);
  return card;
}

function sampleBox(sample, scale) {
  const box = element("section", "sample"), meta = element("div", "meta");
  const sign = sample.advantage > 0 ? " above" : sample.advantage < 0 ? " below" : "";
  const facts = [
    ["number", `#${sample.sample ?? "?"}`],
    ["reward", `reward ${digits(sample.reward, 3)}`],
    ...Object.entries(sample.components ?? {}).map(([name, value]) => ["component", `${name} ${digits(value, 3)}`]),
    [`advantage${sign}`, `advantage ${sample.advantage === null ? "-" : signed(sample.advantage)}`],
    ["ratio", sample.ratio === null ? "" : `s_i ${sample.ratio.toFixed(6)}`],
    [sample.clipped ? "mark" : "", sample.clipped === null ? "" : sample.clipped ? "clipped" : "not clipped"],
    ["", sample.length === null ? "" : `${sample.length} tokens`],
    sample.finish_reason === "length" ? ["mark", "truncated"] : ["", `finish: ${sample.finish_reason ?? "?"}`],
  ];
  meta.append(...facts.filter(([, text]) => text).map(([name, text]) => element("span", name, printable(text))));
  box.append(meta, responseOf(sample, scale));
  return box;
}

// A finger has no hover: a tap on a token writes its value into the card.
function readOut(event) {
  const meta = event.target.closest(".sample")?.querySelector(".meta");
  if (!meta || !event.target.title) return;
  const shown = meta.querySelector(".read-out") || meta.appendChild(element("span", "read-out"));
  shown.textContent = event.target.title;
}

function responseOf(sample, scale) {
  const response = element("pre", "response"), values = sample.shades[byId("reader-shade").value];
  sample.tokens.forEach((token, i) => {
    if (sample.gap && i === sample.gap[0]) response.append(element("span", "gap", `\n… ${sample.gap[1]} tokens left out …\n`));
    response.append(tokenSpan(token, values ? values[i] : null, scale));
  });
  return response;
}

function tokenSpan(token, value, scale) {
  const span = element("span", "", printable(token).replaceAll("\n", "↵\n"));
  if (value === null || value === undefined) return span;
  const strength = scale ? Math.min(1, Math.abs(value) / scale) * 0.55 : 0;
  span.style.backgroundColor = `rgba(var(${value > 0 ? "--up" : "--down"}), ${strength.toFixed(3)})`;
  span.title = `${JSON.stringify(printable(token))}  ${signed(value)} nats`;
  return span;
}
