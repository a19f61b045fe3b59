// The query of the page's address: it holds the last request, so that a copied link repeats it.

import { byId } from "./dom.js";

const INPUT_IDS = {
  prompt: "prompt",
  temperature: "temperature",
  max_tokens: "max_tokens",
  top_k: "top_k",
  top_p: "top_p",
  repetition_penalty: "repetition_penalty",
  stop: "stop-string",
  text_seed: "text-seed",
  n: "n",
  label: "label",
  truncation: "truncation",
  image_seed: "image-seed",
  from: "from",
  to: "to",
};
const MORE_CONTROLS = ["top_p", "repetition_penalty", "stop"];

/** Writes values to the address; an undefined or empty value is removed from it. */
export function saveToQuery(values) {
  const query = new URLSearchParams(location.search);
  query.delete("run");
  for (const [name, value] of Object.entries(values)) {
    if (value === undefined || value === "") query.delete(name);
    else query.set(name, value);
  }
  history.replaceState(null, "", `?${query}`);
}

/** Fills the forms with the values of a query. */
export function fillForms(query) {
  if (query.has("seed")) {
    byId("text-seed").value = query.get("seed");
    byId("image-seed").value = query.get("seed");
  }
  for (const [name, id] of Object.entries(INPUT_IDS)) {
    if (query.has(name)) byId(id).value = query.get(name);
  }
  // A setting that applies must be visible.
  if (MORE_CONTROLS.some((name) => query.has(name))) byId("more-controls").open = true;
  for (const slider of document.querySelectorAll("input[type=range]")) {
    slider.dispatchEvent(new Event("input"));
  }
}
