// A model's versions in the registry as a table, and the sample that each version's export wrote.

import { checkResponse, getJson } from "./api.js";
import { capitalize, createElement, formatTime, formatValue } from "./dom.js";

const EVALUATION_PREFIX = "heldout_";

const differenceFormat = new Intl.NumberFormat("en", {
  signDisplay: "always",
  maximumFractionDigits: 4,
});

/**
 * Returns a figure of a version's sample and the promise of its content.
 *
 * If the request fails, the figure shows the error and the promise rejects.
 */
export function createSample(path, name, kind) {
  const textContent = `Sample of ${name}, generated at export`;
  const figure = createElement("figure", {}, createElement("figcaption", { textContent }));
  const load = async () => {
    const response = await checkResponse(await fetch(path));
    const createContent = kind === "gan" ? createImageSample : createTextSample;
    figure.append(await createContent(response, name));
  };
  const loaded = load();
  loaded.catch((error) => {
    figure.append(createElement("p", { textContent: capitalize(error.message) }));
  });
  return { figure, loaded };
}

async function createImageSample(response, name) {
  const src = await readDataUrl(await response.blob());
  return createElement("img", { src, alt: `Images that ${name} generated at export` });
}

async function createTextSample(response, name) {
  return createElement("pre", {
    tabIndex: 0,
    role: "region",
    ariaLabel: `Text that ${name} generated at export`,
    textContent: await response.text(),
  });
}

/** Returns a disclosure with all versions of a model, which are requested when it opens. */
export function createVersions({ id, version: servedVersion }) {
  const path = `v1/models/${encodeURIComponent(id)}/versions`;
  const status = createElement("p", { className: "hint", role: "status" });
  const table = createElement("div");
  const summary = createElement("summary", { textContent: `All versions of ${id}` });
  const box = createElement("details", { className: "versions" }, summary, table, status);

  const showSample = async ({ version, kind }) => {
    box.querySelector("figure")?.remove();
    const sample = createSample(`${path}/${version}/sample`, `${id}/${version}`, kind);
    box.append(sample.figure);
    status.textContent = `Loading the sample of version ${version}`;
    const outcome = await sample.loaded.then(
      () => `The sample of version ${version} is shown below.`,
      (error) => capitalize(error.message),
    );
    // If another sample was requested meanwhile, its status stays.
    if (sample.figure.isConnected) status.textContent = outcome;
  };

  box.addEventListener("toggle", async () => {
    if (!box.open) return;
    status.textContent = "Loading the versions";
    try {
      const { data } = await getJson(path);
      const ariaLabel = `Versions of ${id}`;
      Object.assign(table, { className: "table", tabIndex: 0, role: "region", ariaLabel });
      table.replaceChildren(createTable(data, servedVersion, showSample));
      const count = data.length === 1 ? "1 version" : `${data.length} versions`;
      status.textContent = `${count} in the registry.`;
    } catch (error) {
      status.textContent = capitalize(error.message);
    }
  });
  return box;
}

function createTable(versions, servedVersion, showSample) {
  const metrics = evaluationMetrics(versions);
  const metricTitles = metrics.map((name) =>
    name.slice(EVALUATION_PREFIX.length).replaceAll("_", " "),
  );
  const titles = ["version", "sample", "weights", ...metricTitles, "run", "created"];
  const header = createElement(
    "tr",
    {},
    ...titles.map((textContent) => createElement("th", { scope: "col", textContent })),
  );
  const rows = versions.map((version) => createRow(version, servedVersion, metrics, showSample));
  return createElement(
    "table",
    {},
    createElement("thead", {}, header),
    createElement("tbody", {}, ...rows),
  );
}

/** Returns the names of the metrics that compare versions: evaluated on held-out data. */
function evaluationMetrics(versions) {
  const names = new Set(versions.flatMap(({ metrics }) => Object.keys(metrics)));
  return [...names].filter(
    (name) => name.startsWith(EVALUATION_PREFIX) && !/_(baseline|samples)$/.test(name),
  );
}

function createRow(version, servedVersion, metrics, showSample) {
  const isServed = version.version === servedVersion;
  const labels = [...(isServed ? ["served"] : []), ...version.aliases].join(", ");
  const small = createElement("small", { textContent: labels });
  const cells = [
    describeWeights(version.quantization),
    ...metrics.map((name) => (name in version.metrics ? formatValue(version.metrics[name]) : "")),
    `${version.run.name}, step ${version.run.step}`,
    formatTime(version.created),
  ];
  return createElement(
    "tr",
    { className: isServed ? "served" : "" },
    createElement("th", { scope: "row" }, `${version.version} `, small),
    createElement("td", {}, ...(version.sample ? [createSampleButton(version, showSample)] : [])),
    ...cells.map((textContent) => createElement("td", { textContent })),
  );
}

function createSampleButton(version, showSample) {
  const button = createElement("button", {
    type: "button",
    textContent: "Show",
    ariaLabel: `Show the sample of version ${version.version}`,
  });
  button.addEventListener("click", () => showSample(version));
  return button;
}

/** Describes how a graph's weights are stored, and what quantization costs on held-out text. */
function describeWeights(quantization) {
  if (!quantization) return "fp32";
  const { bits_per_byte, bits_per_byte_fp32, weights } = quantization;
  const difference = differenceFormat.format(bits_per_byte - bits_per_byte_fp32);
  return `${weights}, ${difference} bits per byte`;
}

function readDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
