// What is served: each model's lineage, metrics and sample, its other versions, and, where the server tells it, its replicas and latency.

import { $, element, shown } from "./dom.js";
import { sample, versions } from "./versions.js";

const LIVE_EVERY_MS = 5000;
const LIVE = {
  gpt: { deployment: "Text", latency: "text_first_token", name: "first token" },
  gan: { deployment: "Pictures", latency: "picture", name: "pictures" },
};

export function offer(models) {
  $("chips").replaceChildren(...models.map(({ id, version }) => element("li", { textContent: `${id}/${version}` })));
  $("served").replaceChildren(...models.map(card));
  watch();
}

// ---- cards

function card(model) {
  const { id, version, kind, run, dataset, created, metrics } = model;
  const when = new Date(created * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  const about = `${shape(model)}. Run ${run.name}, step ${run.step}, data ${dataset.name}; ${when}.`;
  const box = element(
    "article",
    { className: "card" },
    element("h3", {}, id, element("span", { textContent: `version ${version}` })),
    element("p", { textContent: about }),
    element("dl", { className: "live", hidden: true }),
    facts(element("dl"), told(metrics)),
  );
  box.dataset.kind = kind;
  if (model.sample) box.append(sample(`v1/models/${encodeURIComponent(id)}/sample`, `${id}/${version}`, kind).figure);
  box.append(versions(model));
  return box;
}

function shape({ kind, model }) {
  if (kind === "gpt") return `GPT of ${model.layers} layers, context ${model.context}, ${model.vocab_size} tokens`;
  const classes = model.num_classes ? `, ${model.num_classes} classes` : "";
  return `DCGAN of ${model.image_size} × ${model.image_size} pixels${classes}`;
}

/** Metrics by name; beside one of generated pictures what real ones come to. */
function told(metrics) {
  const names = Object.keys(metrics).filter((name) => !name.endsWith("_floor"));
  return names.map((name) => {
    const floor = metrics[`${name}_floor`];
    return [name.replaceAll("_", " "), floor === undefined ? shown(metrics[name]) : `${shown(metrics[name])} (real: ${shown(floor)})`];
  });
}

function facts(list, entries) {
  list.replaceChildren(...entries.flatMap(([term, detail]) => [element("dt", { textContent: term }), element("dd", { textContent: detail })]));
  return list;
}

// ---- replicas and latency

/** Asks for them while the page is looked at; a server that does not know them is not asked again. */
async function watch() {
  const response = document.hidden ? null : await fetch("status").catch(() => null);
  if (response?.status === 404) return;
  if (response?.ok) tell(await response.json());
  setTimeout(watch, LIVE_EVERY_MS);
}

function tell({ deployments, latency_ms }) {
  for (const box of $("served").children) {
    const { deployment, latency, name } = LIVE[box.dataset.kind];
    const entries = [];
    const [state, taken] = [deployments?.[deployment], latency_ms?.[latency]];
    if (state) entries.push(["replicas", `${state.replicas}${state.target > state.replicas ? ` of ${state.target}` : ""}, ${state.status.toLowerCase().replaceAll("_", " ")}`]);
    if (typeof taken?.p50 === "number") entries.push([name, `${shown(taken.p50)} ms (p50), ${shown(taken.p99)} ms (p99)`]);
    const list = facts(box.querySelector(".live"), entries);
    list.hidden = entries.length === 0;
  }
}
