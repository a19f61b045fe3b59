// A model's versions in the registry, side by side, and what each of them made at its export.

import { answer } from "./api.js";
import { element, sentence, shown } from "./dom.js";

const difference = new Intl.NumberFormat("en", { signDisplay: "always", maximumFractionDigits: 4 });

/** What a version made at its export: the figure, and a promise of it that fails as the server does, once the figure has said so. */
export function sample(address, name, kind) {
  const figure = element("figure", {}, element("figcaption", { textContent: `A sample of ${name}, made at its export` }));
  const fill = async (response) => {
    if (kind === "gan") figure.append(element("img", { src: await dataUrl(await response.blob()), alt: `Pictures that ${name} made at its export` }));
    else figure.append(element("pre", { tabIndex: 0, role: "region", ariaLabel: `Text that ${name} wrote at its export`, textContent: await response.text() }));
  };
  const filled = fetch(address).then(answer).then(fill);
  filled.catch((error) => figure.append(element("p", { textContent: sentence(error.message) })));
  return { figure, filled };
}

/** Versions, asked for once the list is opened. */
export function versions({ id, version }) {
  const place = `v1/models/${encodeURIComponent(id)}/versions`;
  const [status, rows] = [element("p", { className: "hint", role: "status" }), element("div")];
  const box = element("details", { className: "versions" }, element("summary", { textContent: `All versions of ${id}` }), rows, status);
  const show = async (one) => {
    box.querySelector("figure")?.remove();
    const { figure, filled } = sample(`${place}/${one.version}/sample`, `${id}/${one.version}`, one.kind);
    box.append(figure);
    status.textContent = `Asking for the sample of version ${one.version}`;
    const outcome = await filled.then(() => `The sample of version ${one.version} is shown below.`, (error) => sentence(error.message));
    if (figure.isConnected) status.textContent = outcome; // no other was asked for meanwhile
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

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
