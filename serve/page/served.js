// What is served: each model's lineage, metrics and sample, and, where the server tells it, its replicas, latency and other versions.

import { answer } from "./api.js";
import { $, element, sentence } from "./page.js";

const LIVE_EVERY_MS = 5000;
const LIVE = {
  gpt: { deployment: "Text", latency: "text_first_token", name: "first token" },
  gan: { deployment: "Pictures", latency: "picture", name: "pictures" },
};
const difference = new Intl.NumberFormat("en", { signDisplay: "always", maximumFractionDigits: 4 });
const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });

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
  if (model.sample) box.append(sample(`v1/models/${encodeURIComponent(id)}/sample`, `${id}/${version}`, kind));
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

const shown = (value) => (typeof value === "number" ? number.format(value) : String(value));

function facts(list, entries) {
  list.replaceChildren(...entries.flatMap(([term, detail]) => [element("dt", { textContent: term }), element("dd", { textContent: detail })]));
  return list;
}

function sample(address, name, kind) {
  const figure = element("figure", {}, element("figcaption", { textContent: `A sample of ${name}, made at its export` }));
  if (kind === "gan") {
    const image = element("img", { src: address, alt: `Pictures that ${name} made at its export`, loading: "lazy" });
    image.addEventListener("error", () => image.replaceWith(element("p", { textContent: `No sample of ${name} came: try again in a moment.` })));
    figure.append(image);
  } else {
    const text = element("pre", { tabIndex: 0, role: "region", ariaLabel: `Text that ${name} wrote at its export` });
    const fill = async (response) => (text.textContent = await response.text());
    fetch(address).then(answer).then(fill).catch(({ message }) => text.replaceWith(element("p", { textContent: sentence(message) })));
    figure.append(text);
  }
  return figure;
}

// ---- versions

/** The registry's versions of a model side by side, asked for once the list is opened. */
function versions({ id, version }) {
  const place = `v1/models/${encodeURIComponent(id)}/versions`;
  const [status, rows] = [element("p", { className: "hint", role: "status" }), element("div")];
  const box = element("details", { className: "versions" }, element("summary", { textContent: `All versions of ${id}` }), rows, status);
  const show = (one) => {
    box.querySelector("figure")?.remove();
    box.append(sample(`${place}/${one.version}/sample`, `${id}/${one.version}`, one.kind));
    status.textContent = `The sample of version ${one.version} is shown below.`;
  };
  box.addEventListener("toggle", async () => {
    if (!box.open) return;
    status.textContent = "Asking the registry";
    try {
      const { data } = await fetch(place).then(answer).then((response) => response.json());
      Object.assign(rows, { className: "rows", tabIndex: 0, role: "region", ariaLabel: `Versions of ${id}` });
      rows.replaceChildren(table(data, version, show));
      status.textContent = `${data.length} in the registry.`;
    } catch (error) {
      status.textContent = sentence(error.message);
    }
  });
  return box;
}

/** How a graph's weights are held, and what that cost on held-out text. */
function weights(quantization) {
  if (!quantization) return "fp32";
  const { bits_per_byte, bits_per_byte_fp32, weights } = quantization;
  return `${weights}, ${difference.format(bits_per_byte - bits_per_byte_fp32)} bits a byte`;
}

function table(found, served, show) {
  const judged = (name) => name.startsWith("heldout_") && !/_(floor|samples)$/.test(name); // what tells versions apart
  const metrics = [...new Set(found.flatMap(({ metrics }) => Object.keys(metrics).filter(judged)))];
  const titles = ["version", "sample", "weights", ...metrics.map((name) => name.slice("heldout_".length).replaceAll("_", " ")), "run", "made"];
  const head = element("tr", {}, ...titles.map((title) => element("th", { scope: "col", textContent: title })));
  const rows = found.map((one) => {
    const marks = [one.version === served && "served", ...one.aliases].filter(Boolean).join(", ");
    const cells = [
      weights(one.quantization),
      ...metrics.map((name) => (name in one.metrics ? shown(one.metrics[name]) : "")),
      `${one.run.name}, step ${one.run.step}`,
      new Date(one.created * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }),
    ];
    const button = element("button", { type: "button", textContent: "Show", ariaLabel: `Show the sample of version ${one.version}` });
    button.addEventListener("click", () => show(one));
    return element(
      "tr",
      { className: one.version === served ? "served" : "" },
      element("th", { scope: "row" }, `${one.version} `, element("small", { textContent: marks })),
      element("td", {}, ...(one.sample ? [button] : [])),
      ...cells.map((textContent) => element("td", { textContent })),
    );
  });
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
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
    if (typeof taken?.p50 === "number") entries.push([name, `${number.format(taken.p50)} ms (p50), ${number.format(taken.p99)} ms (p99)`]);
    const list = facts(box.querySelector(".live"), entries);
    list.hidden = entries.length === 0;
  }
}
