// What all panels share: elements, the notice, seeds, and the address that holds what was asked for.

export const $ = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** Shows an error's sentence above the panels; null takes the last one away. */
export function complain(error) {
  $("notice").hidden = error === null;
  if (error) $("notice").textContent = sentence(error.message);
}

const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
export const shown = (value) => (typeof value === "number" ? number.format(value) : String(value));

export const sentence = (message) => message[0].toUpperCase() + message.slice(1);

/** The seed in an input, or any where it is empty. */
export function seedOf(input) {
  return input.value === "" ? Math.floor(Math.random() * 2 ** 31) : input.valueAsNumber;
}

const FIELDS = {
  prompt: "prompt",
  temperature: "temperature",
  max_tokens: "max_tokens",
  top_k: "top_k",
  top_p: "top_p",
  repetition_penalty: "repetition_penalty",
  stop: "stop-at",
  text_seed: "text-seed",
  n: "n",
  label: "label",
  truncation: "truncation",
  picture_seed: "picture-seed",
  from: "from",
  to: "to",
};

/** Keeps what was asked for in the address, so that it can be sent to somebody. */
export function remember(values) {
  const query = new URLSearchParams(location.search);
  query.delete("run");
  for (const [name, value] of Object.entries(values)) {
    if (value === undefined || value === "") query.delete(name);
    else query.set(name, value);
  }
  history.replaceState(null, "", `?${query}`);
}

/** Fills the forms with what an address holds. */
export function recall(query) {
  for (const [name, id] of Object.entries(FIELDS)) if (query.has(name)) $(id).value = query.get(name);
  if (query.has("seed")) $("text-seed").value = $("picture-seed").value = query.get("seed");
  $("more").open ||= ["top_p", "repetition_penalty", "stop"].some((name) => query.has(name)); // what is in force is to be seen
  for (const slider of document.querySelectorAll("input[type=range]")) slider.dispatchEvent(new Event("input"));
}
