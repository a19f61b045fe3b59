// Helpers that all panels share: elements, error messages, number formats and seeds.

export const byId = (id) => document.getElementById(id);

/** Creates an element with properties and children. */
export function createElement(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** Fills a definition list with [term, detail] pairs. */
export function fillList(list, entries) {
  const children = entries.flatMap(([term, detail]) => [
    createElement("dt", { textContent: term }),
    createElement("dd", { textContent: detail }),
  ]);
  list.replaceChildren(...children);
}

/** Shows an error's message above the panels. */
export function showError(error) {
  byId("notice").textContent = capitalize(error.message);
  byId("notice").hidden = false;
}

export function clearError() {
  byId("notice").hidden = true;
}

export const capitalize = (text) => text[0].toUpperCase() + text.slice(1);

const numberFormat = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });

/** Formats numbers with four significant digits, and other values as strings. */
export const formatValue = (value) =>
  typeof value === "number" ? numberFormat.format(value) : String(value);

/** Formats seconds since the epoch as a local date and time. */
export const formatTime = (seconds) =>
  new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

/** Returns the seed in an input, or a random one if the input is empty. */
export function readSeed(input) {
  return input.value === "" ? Math.floor(Math.random() * 2 ** 31) : input.valueAsNumber;
}
