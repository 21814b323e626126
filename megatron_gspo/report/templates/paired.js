// Problems of two evaluations to read: a prompt, its reference, and the answers of both to the same seed side by side.

const AT_ONCE = 8;
let TEXTS = [], shownAtMost = AT_ONCE;
const full = (reward) => reward === 1;
const graded = (side) => side.filter(([reward]) => reward !== null);
const share = (side) => (graded(side).length ? graded(side).filter(([reward]) => full(reward)).length / graded(side).length : null);
const shares = (problem) => problem.sides.map(share);
const both = (test) => (problem) => { const [a, b] = shares(problem); return a !== null && b !== null && test(a, b); };
const CHOICES = {
  all: ["all problems", () => true],
  first: ["A better", both((a, b) => a > b)],
  second: ["B better", both((a, b) => b > a)],
  right: ["both always right", both((a, b) => a === 1 && b === 1)],
  wrong: ["both always wrong", both((a, b) => a === 0 && b === 0)],
  mixed: ["right and wrong answers of one policy", (problem) => shares(problem).some((part) => part > 0 && part < 1)],
  truncated: ["with a truncated response", (problem) => problem.sides.flat().some((verdict) => verdict[2] === "length")],
  ungraded: ["with a response that was not graded", (problem) => problem.sides.flat().some(([reward]) => reward === null)],
};
const ORDERS = {
  file: ["order of the file", null],
  difference: ["difference, large first", ([a, b]) => -Math.abs((b ?? 0) - (a ?? 0))],
  hard: ["hard first", ([a, b]) => (a ?? 0) + (b ?? 0)],
};

async function unpack(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent.trim()), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    byId("message").textContent = "Reading the answers needs a browser of 2023 or later.";
    document.body.dataset.state = "done";
    return;
  }
  TEXTS = await unpack("texts");
  byId("message").hidden = true;
  byId("reader").hidden = false;
  fillSelect(byId("suite"), DATA.suites.map((suite, i) => [i, suite.title]));
  fillSelect(byId("sort"), Object.entries(ORDERS).map(([value, [text]]) => [value, text]));
  byId("suite").addEventListener("change", pickSuite);
  for (const id of ["filter", "sort"]) byId(id).addEventListener("change", showFirst);
  byId("find").addEventListener("input", showFirst);
  byId("more").addEventListener("click", () => { shownAtMost += AT_ONCE; show(); });
  pickSuite();
  document.body.dataset.state = "done";
}

const chosen = () => Number(byId("suite").value);

function pickSuite() {
  const { problems } = DATA.suites[chosen()];
  fillSelect(byId("filter"), Object.entries(CHOICES).map(([value, [text, keep]]) => [value, `${text} (${problems.filter(keep).length})`]));
  showFirst();
}

function showFirst() {
  shownAtMost = AT_ONCE;
  show();
}

function found() {
  const { problems } = DATA.suites[chosen()], texts = TEXTS[chosen()];
  const words = byId("find").value.toLowerCase(), [, keep] = CHOICES[byId("filter").value], [, key] = ORDERS[byId("sort").value];
  const kept = problems.map((problem, i) => [problem, texts[i]])
    .filter(([problem, [prompt]]) => keep(problem) && (!words || `${problem.id}\n${prompt}`.toLowerCase().includes(words)));
  return key ? kept.map((one) => [key(shares(one[0])), one]).sort(([a], [b]) => a - b).map(([, one]) => one) : kept;
}

function show() {
  const kept = found();
  byId("problems").replaceChildren(...kept.slice(0, shownAtMost).map(([problem, texts]) => problemCard(problem, texts)));
  byId("more").hidden = kept.length <= shownAtMost;
  byId("more").textContent = `Show ${Math.min(AT_ONCE, kept.length - shownAtMost)} more of ${kept.length}`;
  byId("note").textContent = `${kept.length} of ${DATA.suites[chosen()].problems.length} problems.`;
}

function problemCard(problem, [prompt, answer, ...responses]) {
  const card = element("article", "card group"), meta = element("div", "meta"), columns = element("div", "responses");
  const text = (part) => (part === null ? "not graded" : `${(100 * part).toFixed(0)}% right`);
  const [a, b] = shares(problem);
  for (const [name, words] of [["prompt-id", problem.id], ["", `A ${text(a)}`], ["", `B ${text(b)}`]]) meta.append(element("span", name, printable(words)));
  card.append(meta, foldedText("prompt", prompt));
  if (answer) card.append(element("div", "quiet label", "reference answer"), foldedText("reference", answer));
  const sides = problem.sides.map((verdicts, side) => sideBox("AB"[side], verdicts, responses[side], (sample) => choose(sample)));
  const choose = (sample) => sides.forEach((side) => side.choose(sample));
  columns.append(...sides.map((side) => side.box));
  card.append(columns);
  choose(0);
  return card;
}

const word = ([reward]) => (reward === null ? "not graded" : full(reward) ? "right" : reward > 0 ? `reward ${reward.toFixed(3)}` : "wrong");

function sideBox(name, verdicts, texts, choose) {
  const box = element("section", "sample"), chips = element("div", "chips"), meta = element("div", "meta"), shown = element("pre", "response");
  const buttons = verdicts.map((verdict, sample) => {
    const button = element("button", full(verdict[0]) ? "right" : "wrong", full(verdict[0]) ? "✓" : verdict[0] === null ? "?" : "✗");
    button.title = `${name}, response ${sample}: ${word(verdict)}`;
    button.addEventListener("click", () => choose(sample));
    return button;
  });
  if (buttons.length > 1) chips.append(...buttons);
  box.append(chips, meta, shown);
  return { box, choose(sample) {
    const verdict = verdicts[sample];
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === sample)));
    meta.replaceChildren(element("span", "number", `${name} #${sample}`));
    shown.textContent = "";
    if (!verdict) return;
    const [reward, tokens, finish, why] = verdict;
    meta.append(element("span", full(reward) ? "above" : "below", word(verdict)), element("span", "", `${tokens ?? "?"} tokens`),
      element("span", finish === "length" ? "mark" : "", finish === "length" ? "truncated" : `finish: ${finish ?? "?"}`));
    if (why) meta.append(element("span", "mark", printable(why)));
    shown.textContent = printable(texts[sample]);
  } };
}

start();
