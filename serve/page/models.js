// A card for each served model: its architecture, training run, metrics, sample and versions.

import { byId, createElement, fillList, formatTime, formatValue } from "./dom.js";
import { createSample, createVersions } from "./versions.js";

export function showModels(models) {
  const names = models.map(({ id, version }) => `${id}/${version}`);
  byId("model-chips").replaceChildren(
    ...names.map((textContent) => createElement("li", { textContent })),
  );
  byId("models").replaceChildren(...models.map(createCard));
}

function createCard(model) {
  const { id, version, kind, run, dataset, created, metrics } = model;
  const time = formatTime(created);
  const origin = `Run ${run.name}, step ${run.step}, dataset ${dataset.name}, ${time}.`;
  const metricList = createElement("dl");
  fillList(metricList, describeMetrics(metrics));
  const card = createElement(
    "article",
    { className: "card" },
    createElement("h3", {}, id, createElement("span", { textContent: `version ${version}` })),
    createElement("p", { textContent: `${describeArchitecture(model)}. ${origin}` }),
    createElement("dl", { className: "status", hidden: true }),
    metricList,
  );
  card.dataset.kind = kind;
  if (model.sample) {
    const path = `v1/models/${encodeURIComponent(id)}/sample`;
    card.append(createSample(path, `${id}/${version}`, kind).figure);
  }
  card.append(createVersions(model));
  return card;
}

function describeArchitecture({ kind, model }) {
  if (kind === "gpt") {
    return `GPT, ${model.layers} layers, context ${model.context}, vocabulary ${model.vocab_size}`;
  }
  const classes = model.num_classes ? `, ${model.num_classes} classes` : "";
  return `DCGAN, ${model.image_size} × ${model.image_size} pixels${classes}`;
}

/** Returns the metrics as [name, value] pairs, with a metric's baseline in brackets. */
function describeMetrics(metrics) {
  const names = Object.keys(metrics).filter((name) => !name.endsWith("_baseline"));
  return names.map((name) => {
    const value = formatValue(metrics[name]);
    const baseline = metrics[`${name}_baseline`];
    const suffix = baseline === undefined ? "" : ` (baseline: ${formatValue(baseline)})`;
    return [name.replaceAll("_", " "), value + suffix];
  });
}
