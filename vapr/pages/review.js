"use strict";
// The review page. Everything from the data becomes text nodes; nothing is ever parsed as HTML.
(() => {
  const at = (id) => document.getElementById(id);
  const data = JSON.parse(at("data").textContent);
  const pairs = data.pairs;
  const WORDS = { keep: "rejected is wrong", drop: "rejected could be true", unsure: "unsure" };
  const COLOURS = { keep: "kept", drop: "dropped", unsure: "unsure" }; // classes of the page's style
  const NO_CATEGORY = "no category";

  const verdicts = new Map(); // id -> {verdict, note}
  const undone = []; // what undo takes back: lists of [id, what it was], newest last
  let list = []; // numbers of the pairs that fit the filters
  let place = 0; // in that list
  let unsaved = false; // something was decided since the last export

  // ---- small helpers

  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  const count = Estimate.count;
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const interval = (...of) => `${Estimate.wilson(...of).map((bound) => (100 * bound).toFixed(1)).join(" to ")} %`;
  const verdictOf = (pair) => verdicts.get(pair.id)?.verdict ?? "open";
  const current = () => pairs[list[place]];

  const say = (text) => (at("status").textContent = text);

  // ---- verdicts that outlive a reload

  const KEY = `vapr review ${data.page}`;
  let storage = null;
  try {
    storage = window.localStorage;
    storage.setItem(`${KEY} test`, "1");
    storage.removeItem(`${KEY} test`);
  } catch {
    storage = null;
  }

  function load() {
    try {
      const kept = JSON.parse(storage?.getItem(KEY) ?? "[]");
      verdicts.clear();
      for (const [id, entry] of kept) verdicts.set(id, entry);
    } catch {
      warn("What this browser had kept of this page cannot be read. Import your last export.");
    }
  }

  function save() {
    unsaved = true;
    try {
      storage?.setItem(KEY, JSON.stringify([...verdicts]));
    } catch {
      storage = null;
    }
    if (storage === null) warnNotKept();
  }

  function warn(text) {
    at("warning").textContent = text;
    at("warning").hidden = false;
  }

  function warnNotKept() {
    warn("This browser keeps nothing for this page: verdicts are lost when it is closed or reloaded. Export them before.");
  }

  // ---- the estimate

  function strata() {
    const found = new Map();
    for (const [name, size] of Object.entries(data.sizes)) found.set(name, { name, size, keep: 0, drop: 0, unsure: 0, open: 0 });
    for (const pair of pairs) found.get(pair.category)[verdictOf(pair)] += 1;
    for (const one of found.values()) {
      one.decided = one.keep + one.drop;
      one.share = one.keep / one.decided;
    }
    return [...found.values()];
  }

  function showEstimate() {
    const categories = strata();
    const sum = (key) => categories.reduce((total, one) => total + one[key], 0);
    const numbers = { kept: sum("keep"), dropped: sum("drop"), unsure: sum("unsure"), open: sum("open") };
    const counts = Object.entries(numbers).map(([name, number]) => `${count(number)} ${name}`).join(", ");
    for (const bar of at("progress").children) bar.style.width = `${(100 * numbers[bar.className]) / pairs.length}%`;
    at("progress").setAttribute("aria-label", counts);
    const target = `at least ${100 * Estimate.TARGET.share} % truly wrong, lower bound at least ${100 * Estimate.TARGET.low} %`;
    if (numbers.kept + numbers.dropped === 0) {
      at("headline").replaceChildren(`${counts}. Target: ${target}`);
      at("estimates").replaceChildren(...data.notes.map((note) => element("p", {}, note)));
      return;
    }
    const whole = Estimate.overall(categories);
    const shown = element("b", {}, `truly wrong ${percent(whole.share)}`);
    const meaning = ` (${interval(whole.share, whole.number)}): ${Estimate.inWords(whole)}`;
    at("headline").replaceChildren(`${counts} · `, shown, meaning);
    if (at("estimate").open) at("estimates").replaceChildren(...explained(categories, whole, target));
  }

  function explained(categories, whole, target) {
    const head = element("tr", {}, ...["category", "in the set", "kept", "dropped", "open", "truly wrong", "95 % interval"].map((name) => element("th", {}, name)));
    const rows = categories.map((one) => {
      const bounds = one.decided ? interval(one.share, Estimate.effective(one.decided, one.size)) : "";
      const cells = [one.name || NO_CATEGORY, count(one.size), one.keep, one.drop, one.open + one.unsure, one.decided ? percent(one.share) : "", bounds];
      return element("tr", {}, ...cells.map((cell) => element("td", {}, String(cell))));
    });
    const part = whole.covered < 1 ? ` Categories without a decision are not in it: it speaks for ${percent(whole.covered)} of the set.` : "";
    return [
      element("div", { className: "scroll" }, element("table", {}, head, ...rows)),
      element("p", {}, `Target: ${target}. Truly wrong is kept / (kept + dropped); unsure pairs are in neither.`),
      element("p", { className: "soft" }, `Overall, each category counts by its share of the whole set. Intervals are Wilson's (1927) at 95 %, overall at Kish's effective number of decisions, here ${whole.number === Infinity ? "without end, as every pair is decided" : whole.number.toFixed(1)}; both allow for how much of the set is decided (Cochran, 1977).${part}`),
      ...data.notes.map((note) => element("p", { className: "soft" }, note)),
    ];
  }

  // ---- one pair on the screen

  function texts(pieces) {
    return pieces.map(([text, changed]) => (changed ? element("mark", {}, text) : text));
  }

  function answer(side, pieces) {
    return element("div", { className: `answer ${side}` }, element("span", { className: "soft" }, side), ...texts(pieces));
  }

  function picture(image) {
    if (image.problem) return element("figure", {}, element("div", { className: "problem" }, image.problem), element("figcaption", {}, image.label));
    const shown = element("img", { alt: image.label || "the picture", src: at(`picture-${image.picture}`).textContent });
    const button = element("button", { title: `Enlarge ${image.file}` }, shown);
    button.addEventListener("click", () => {
      at("large-picture").src = shown.src;
      at("large").showModal();
    });
    return element("figure", {}, button, element("figcaption", {}, image.label));
  }

  function check(one) {
    const mark = one.passed === true ? "✓" : one.passed === false ? "✗" : "·";
    const colour = one.passed === true ? "kept" : one.passed === false ? "dropped" : "unsure";
    return element("li", { className: colour, title: one.note }, element("b", {}, mark), ` ${one.name}`, one.value && ` ${one.value}`, one.note && ` (${one.note})`);
  }

  function chips(pair) {
    const given = verdictOf(pair);
    const line = element("div", { className: "chips" });
    if (given !== "open") line.append(element("span", { className: COLOURS[given] }, WORDS[given]));
    line.append(element("span", {}, pair.category || NO_CATEGORY));
    if (pair.source) line.append(element("span", {}, pair.source));
    line.append(element("span", { className: "id" }, pair.id));
    return line;
  }

  function showPair() {
    const pair = current();
    at("review").hidden = !pair;
    for (const id of ["keep", "drop", "unsure"]) at(id).disabled = !pair;
    at("nothing").hidden = Boolean(pair);
    at("previous").disabled = place === 0;
    at("next").disabled = place >= list.length - 1;
    at("undo").disabled = undone.length === 0;
    at("place").textContent = list.length ? `Pair ${count(place + 1)} of ${count(list.length)}${list.length < pairs.length ? ` that fit (${count(pairs.length)} in all)` : ""}` : `0 of ${count(pairs.length)} pairs`;
    if (!pair) return;
    for (const verdict of ["keep", "drop", "unsure"]) at(verdict).setAttribute("aria-pressed", verdictOf(pair) === verdict);
    const context = pair.context.map((turn) => element("p", { className: "turn" }, element("b", {}, `${turn.role}: `), turn.text));
    const answers = [answer("chosen", pair.chosen), answer("rejected", pair.rejected)];
    const checks = pair.checks.length ? [element("ul", { className: "checks" }, ...pair.checks.map(check))] : [];
    at("pair").replaceChildren(chips(pair), ...context, element("p", { className: "question" }, pair.question), ...answers, ...checks);
    // Where a long answer has a box of its own to scroll in (on a phone), what changed is in sight.
    for (const one of answers) one.scrollTop = (one.querySelector("mark")?.offsetTop ?? 0) - one.clientHeight / 2;
    at("pictures").replaceChildren(...pair.images.map(picture));
    at("review").classList.toggle("text-only", pair.images.length === 0);
    at("note").value = verdicts.get(pair.id)?.note ?? "";
    showMore(pair);
  }

  function showMore(pair) {
    const open = at("more").querySelector("details")?.open ?? false; // as the last pair was left
    const files = pair.images.filter((image) => image.file).map((image) => ["picture", image.file]);
    const marks = ["marks", pair.exact ? "the row's edits, to the character" : "words that differ"];
    const rows = [...pair.facts, ...files, marks].map(([name, value]) => element("tr", {}, element("th", {}, name), element("td", {}, value)));
    at("more").replaceChildren(element("details", { open }, element("summary", {}, "Where it comes from"), element("table", {}, ...rows)));
  }

  function show() {
    showPair();
    showEstimate();
  }

  // ---- filters

  function fits(pair) {
    const [category, source, verdict] = ["category", "source", "verdict"].map((id) => at(id).value);
    if (category && (pair.category || NO_CATEGORY) !== category) return false;
    if (source && pair.source !== source) return false;
    if (verdict && verdictOf(pair) !== verdict) return false;
    const wanted = at("search").value.trim().toLowerCase();
    return !wanted || searched(pair).includes(wanted);
  }

  function searched(pair) {
    const pieces = [...pair.chosen, ...pair.rejected].map(([text]) => text).join("");
    const context = pair.context.map((turn) => turn.text).join("\n");
    return [pair.id, context, pair.question, pieces, verdicts.get(pair.id)?.note ?? ""].join("\n").toLowerCase();
  }

  // Lists the pairs that fit and goes to pair number `wanted`, or the next that fits.
  function refilter(wanted) {
    list = [...pairs.keys()].filter((number) => fits(pairs[number]));
    const next = list.findIndex((number) => number >= wanted);
    place = next === -1 ? Math.max(0, list.length - 1) : next;
    show();
  }

  function fillSelect(id, all, values) {
    const counts = new Map();
    for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
    const options = [...counts].sort(([a], [b]) => (a < b ? -1 : 1)).map(([value, number]) => element("option", { value }, `${value} (${count(number)})`));
    at(id).replaceChildren(element("option", { value: "" }, all), ...options);
    at(id).hidden = counts.size < 2;
  }

  function clearFilters() {
    const number = list[place] ?? 0;
    for (const id of ["category", "source", "verdict", "search"]) at(id).value = "";
    refilter(number);
  }

  // ---- what the reviewer does

  function go(step) {
    if (place + step < 0 || place + step >= list.length) return;
    place += step;
    say("");
    showPair();
    window.scrollTo(0, 0);
  }

  // Sets entries of the verdicts, [id, entry or undefined], and remembers what they were.
  function change(entries) {
    undone.push(entries.map(([id]) => [id, verdicts.get(id)]));
    for (const [id, entry] of entries) set(id, entry);
    save();
  }

  const set = (id, entry) => (entry === undefined ? verdicts.delete(id) : verdicts.set(id, entry));

  function decide(verdict) {
    const pair = current();
    if (!pair) return;
    const number = list[place];
    const next = list[place + 1];
    change([[pair.id, { ...verdicts.get(pair.id), verdict }]]);
    refilter(next ?? number);
    const open = list.filter((one) => verdictOf(pairs[one]) === "open").length;
    const end = open ? `${count(open)} before it are still open.` : "Export the verdicts when you are done.";
    say(`${pair.id}: ${WORDS[verdict]}.${next === undefined ? ` That was the last pair of this list. ${end}` : ""}`);
    if (next !== undefined) window.scrollTo(0, 0);
  }

  function undo() {
    const entries = undone.pop();
    if (!entries) return;
    for (const [id, entry] of entries) set(id, entry);
    save();
    const number = pairs.findIndex((pair) => pair.id === entries[0]?.[0]);
    refilter(Math.max(0, number));
    say(`${entries.length === 1 ? entries[0][0] : `${count(entries.length)} verdicts`}: taken back.`);
  }

  function takeNote() {
    const pair = current();
    const note = at("note").value.trim();
    const before = verdicts.get(pair?.id);
    if (!pair || note === (before?.note ?? "")) return;
    const { note: _, ...rest } = before ?? {};
    const entry = note ? { ...rest, note } : rest;
    change([[pair.id, Object.keys(entry).length ? entry : undefined]]);
    showPair();
  }

  function exportVerdicts() {
    const seen = new Set();
    const lines = [];
    let left = 0;
    for (const pair of pairs) {
      const { verdict, note } = verdicts.get(pair.id) ?? {};
      if (seen.has(pair.id) || (!verdict && !note)) continue;
      seen.add(pair.id);
      if (verdict !== "keep" && verdict !== "drop") left += 1;
      else lines.push(JSON.stringify({ id: pair.id, verdict, note, category: pair.category, page: data.page }) + "\n");
    }
    const url = URL.createObjectURL(new Blob(lines, { type: "application/x-ndjson" }));
    element("a", { href: url, download: "verdicts.jsonl" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
    unsaved = false;
    say(`${count(lines.length)} verdicts in verdicts.jsonl.${left ? ` ${count(left)} unsure or only noted pairs are not in it.` : ""}`);
  }

  async function importVerdicts(file) {
    const here = new Set(pairs.map((pair) => pair.id));
    const entries = new Map();
    let elsewhere = 0;
    for (const [number, line] of (await file.text()).replace(/^\uFEFF/, "").split("\n").entries()) {
      if (!line.trim()) continue;
      const row = parsed(line);
      if (typeof row?.id !== "string" || !["keep", "drop"].includes(row.verdict)) {
        say(`Nothing imported: line ${number + 1} of ${file.name} is no verdict.`);
        return;
      }
      const note = typeof row.note === "string" && row.note ? row.note : verdicts.get(row.id)?.note;
      if (here.has(row.id)) entries.set(row.id, { verdict: row.verdict, ...(note ? { note } : {}) });
      else elsewhere += 1;
    }
    const replaced = [...entries].filter(([id, entry]) => verdicts.get(id)?.verdict && verdicts.get(id).verdict !== entry.verdict).length;
    if (entries.size) change([...entries]);
    refilter(list[place] ?? 0);
    say(`${count(entries.size)} verdicts imported, ${count(replaced)} of them in place of others${elsewhere ? `; ${count(elsewhere)} are of pairs that are not on this page` : ""}.`);
  }

  function parsed(line) {
    try {
      return JSON.parse(line);
    } catch {
      return null;
    }
  }

  // ---- keys, clicks, start

  const VERDICT_KEYS = { k: "keep", d: "drop", s: "unsure" };
  const KEYS = {
    u: undo,
    j: () => go(1),
    ArrowRight: () => go(1),
    ArrowLeft: () => go(-1),
    n: () => at("note").focus(),
    "/": () => at("search").focus(),
    "?": () => at("keys").showModal(),
  };

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    const field = event.target instanceof Element && event.target.closest("input, select");
    if (field) {
      if (event.key === "Escape" || (event.key === "Enter" && field.localName === "input")) field.blur();
      return;
    }
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (!VERDICT_KEYS[key] && !KEYS[key]) return;
    event.preventDefault();
    if (KEYS[key]) KEYS[key]();
    else if (!event.repeat) decide(VERDICT_KEYS[key]); // a key held down is one verdict
  }

  document.addEventListener("keydown", pressed);
  for (const verdict of ["keep", "drop", "unsure"]) at(verdict).addEventListener("click", () => decide(verdict));
  for (const [id, action] of [["previous", () => go(-1)], ["next", () => go(1)], ["undo", undo], ["export", exportVerdicts], ["clear", clearFilters], ["help", KEYS["?"]]]) at(id).addEventListener("click", action);
  for (const id of ["large", "large-picture", "large-close"]) at(id).addEventListener("click", () => at("large").close());
  at("keys-close").addEventListener("click", () => at("keys").close());
  at("import").addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", async () => {
    if (at("file").files.length) await importVerdicts(at("file").files[0]);
    at("file").value = "";
  });
  at("note").addEventListener("change", takeNote);
  at("search").addEventListener("input", () => refilter(list[place] ?? 0));
  for (const id of ["category", "source", "verdict"]) {
    at(id).addEventListener("change", () => {
      at(id).blur(); // so that the next key is a verdict again
      refilter(list[place] ?? 0);
    });
  }
  at("estimate").addEventListener("toggle", showEstimate);
  window.addEventListener("beforeunload", (event) => {
    if (unsaved && storage === null) event.preventDefault();
  });
  window.addEventListener("storage", (event) => {
    if (event.key !== KEY) return; // this page in another tab
    load();
    refilter(list[place] ?? 0);
  });

  at("title").textContent = `Review: ${data.title}`;
  at("about").textContent = data.notes.join(" ");
  fillSelect("category", "every category", pairs.map((pair) => pair.category || NO_CATEGORY));
  fillSelect("source", "every source", pairs.map((pair) => pair.source).filter(Boolean));
  at("filters").open = window.innerWidth > 720;
  if (storage === null) warnNotKept();
  load();
  refilter(Math.max(0, pairs.findIndex((pair) => verdictOf(pair) === "open")));
})();
