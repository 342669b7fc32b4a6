"use strict";
// Filters of the questions on the page of vapr eval --compare. Without this script all of them are shown.
(() => {
  const at = (id) => document.getElementById(id);
  const { kinds, totals } = JSON.parse(at("data").textContent);
  const items = [...document.querySelectorAll("#questions > article")].map((article) => ({
    article,
    set: article.dataset.set,
    kinds: article.dataset.kinds.split("|"),
    text: article.textContent.toLowerCase(),
  }));
  const radios = [...document.querySelectorAll("input[name=kind]")];
  const count = (number) => number.toLocaleString("en");

  const chosen = () => ({
    set: at("set").value,
    model: at("model").value,
    kind: radios.find((radio) => radio.checked).value,
    words: at("search").value.trim().toLowerCase(),
  });

  function fits(item, { set, model, kind, words }) {
    if (set && item.set !== set) return false;
    if (kind && !(model === "" ? item.kinds.includes(kind) : item.kinds[model] === kind)) return false;
    return item.text.includes(words);
  }

  // How many questions of a kind there are in all, drawn or not; with several models, how often one changed so.
  function total(kind, { set, model }) {
    let sum = 0;
    for (const [name, models] of Object.entries(totals)) {
      if (set && name !== set) continue;
      models.forEach((numbers, n) => (sum += model === "" || Number(model) === n ? numbers[kind] : 0));
    }
    return sum;
  }

  function refilter() {
    const wanted = chosen();
    let shown = 0;
    for (const item of items) {
      const fit = fits(item, wanted);
      item.article.hidden = !fit;
      shown += fit;
    }
    for (const place of document.querySelectorAll("[data-total]")) place.textContent = count(total(place.dataset.total, wanted));
    at("status").textContent = `${count(shown)} of ${count(items.length)} questions on this page.`;
  }

  function go(step) {
    const visible = items.map((item) => item.article).filter((article) => !article.hidden);
    const here = visible.indexOf(document.activeElement?.closest("article"));
    const next = visible[here < 0 ? (step > 0 ? 0 : visible.length - 1) : here + step];
    next?.focus({ preventScroll: true });
    next?.scrollIntoView({ block: "start" });
  }

  function choose(number) {
    radios[number].checked = true;
    refilter();
  }

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const field = event.target instanceof Element && event.target.closest("input[type=search], select");
    if (field) {
      if (event.key === "Escape" || (event.key === "Enter" && field.localName === "input")) field.blur();
      return;
    }
    const digit = /^\d$/.test(event.key) && Number(event.key) <= kinds.length;
    if (!digit && !["j", "k", "/"].includes(event.key)) return;
    event.preventDefault();
    if (digit) choose(Number(event.key));
    else if (event.key === "/") at("search").focus();
    else go(event.key === "j" ? 1 : -1);
  }

  document.addEventListener("keydown", pressed);
  for (const radio of radios) radio.addEventListener("change", refilter);
  for (const id of ["set", "model"]) at(id).addEventListener("change", refilter);
  at("search").addEventListener("input", refilter);
  at("filters").hidden = items.length === 0;
  refilter();
})();
