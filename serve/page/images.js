// The images panel: a grid of generated images, and the interpolation between two seeds.

import { post } from "./api.js";
import { byId, clearError, createElement, readSeed, showError } from "./dom.js";
import { saveToQuery } from "./query.js";

const INTERPOLATION_STEPS = 21; // 5% each

let interpolationImages = []; // [{ b64_json, label, filename }], one per step

export function configure({ num_classes, class_names }) {
  if (!num_classes) return;
  const options = class_names.map((name) => new Option(name, name));
  byId("label").replaceChildren(new Option("all in turn", ""), ...options);
  byId("label-field").hidden = false;
}

// ---- the grid

export async function generate(event) {
  event?.preventDefault();
  if (!byId("image-form").reportValidity()) return;
  if (event) clearError();
  const seed = readSeed(byId("image-seed"));
  const request = { n: Number(byId("n").value), seed, ...readSharedSettings() };
  const { n, label, truncation } = request;
  saveToQuery({ n, image_seed: seed, label, truncation });
  await runOnce(byId("generate-images"), async () => {
    const startTime = performance.now();
    const response = await (await post("v1/images/generations", request)).json();
    await showImages(response, Math.round(performance.now() - startTime));
  });
}

/** Returns the class and the truncation, which apply to both forms. */
function readSharedSettings() {
  const slider = byId("truncation");
  const truncation = slider.value === slider.max ? undefined : slider.valueAsNumber;
  return { label: byId("label").value || undefined, truncation };
}

/**
 * Runs an action unless the button's previous one is still running, and shows its error.
 *
 * The button is marked with `aria-disabled`, since `disabled` would take its keyboard focus.
 */
async function runOnce(button, action) {
  if (button.ariaDisabled === "true") return;
  button.ariaDisabled = "true";
  try {
    await action();
  } catch (error) {
    showError(error);
  } finally {
    button.ariaDisabled = "false";
  }
}

async function showImages({ data, seed, model }, milliseconds) {
  const columns = Math.ceil(Math.sqrt(data.length));
  const name = `${model.replace("/", "-")}-seed${seed}`;
  const items = data.map((image, index) => createGridItem(image, `${name}-${index}.png`));
  const grid = byId("image-grid");
  grid.style.setProperty("--columns", columns);
  grid.classList.toggle("dense", columns > 4);
  grid.replaceChildren(...items);
  const count = data.length === 1 ? "1 image" : `${data.length} images`;
  const summary = `${count} of seed ${seed} from ${model} in ${milliseconds} ms.`;
  const status = byId("image-status");
  status.textContent = `${summary} Select one to download.`;
  status.dataset.seed = seed;
  byId("next-seed").disabled = false;
  const download = byId("download-all");
  download.href = await createContactSheet(data, columns);
  download.download = `${name}.png`;
  download.hidden = data.length < 2;
}

function createGridItem({ b64_json, label }, filename) {
  const image = createElement("img", { src: pngUrl(b64_json), alt: label ?? "Image" });
  const title = `${image.alt}: download ${filename}`;
  const link = createElement("a", { href: image.src, download: filename, title }, image);
  if (label) {
    // Hidden from screen readers, which read the image's alternative text.
    link.append(createElement("span", { textContent: label, ariaHidden: "true" }));
  }
  return createElement("li", {}, link);
}

const pngUrl = (b64_json) => `data:image/png;base64,${b64_json}`;

/** Draws square images row by row into one PNG. Returns its data URL. */
async function createContactSheet(data, columns) {
  const images = data.map(({ b64_json }) => createElement("img", { src: pngUrl(b64_json) }));
  await Promise.all(images.map((image) => image.decode()));
  const side = images[0].naturalWidth;
  const rows = Math.ceil(images.length / columns);
  const canvas = createElement("canvas", { width: side * columns, height: side * rows });
  const context = canvas.getContext("2d");
  for (const [index, image] of images.entries()) {
    context.drawImage(image, side * (index % columns), side * Math.floor(index / columns));
  }
  return canvas.toDataURL("image/png");
}

// ---- the interpolation

export async function interpolate(event) {
  event?.preventDefault();
  if (!byId("interpolation-form").reportValidity()) return;
  if (event) clearError();
  const from = byId("from").valueAsNumber;
  const to = byId("to").valueAsNumber;
  const settings = readSharedSettings();
  const request = { seed: from, to_seed: to, steps: INTERPOLATION_STEPS, ...settings };
  saveToQuery({ from, to, ...settings });
  await runOnce(byId("interpolate"), async () => {
    const response = await (await post("v1/images/interpolations", request)).json();
    await showInterpolation(response, from, to);
  });
}

async function showInterpolation({ data, model }, from, to) {
  const name = `${model.replace("/", "-")}-seed${from}-to-${to}`;
  interpolationImages = data.map((image, step) => ({ ...image, filename: `${name}-${step}.png` }));
  byId("download-strip").href = await createContactSheet(data, data.length);
  byId("download-strip").download = `${name}.png`;
  // Every second image, so that each is large enough to recognize below the slider.
  const stripImages = data.filter((_, step) => step % 2 === 0);
  byId("strip").src = await createContactSheet(stripImages, stripImages.length);
  byId("first-seed").textContent = `seed ${from}`;
  byId("last-seed").textContent = `seed ${to}`;
  byId("interpolation").hidden = false;
  showSelectedStep();
  const label = data[0].label ? `, ${data[0].label}` : "";
  byId("interpolation-status").textContent =
    `${data.length} images from seed ${from} to seed ${to}${label}.`;
}

/** Shows the image at the slider's position. */
function showSelectedStep() {
  const slider = byId("position");
  const step = slider.valueAsNumber;
  const { b64_json, filename } = interpolationImages[step];
  const percent = `${Math.round((100 * step) / (INTERPOLATION_STEPS - 1))}%`;
  const [first, last] = [byId("first-seed").textContent, byId("last-seed").textContent];
  const description = `${percent} of the way from ${first} to ${last}`;
  byId("position-value").textContent = percent;
  slider.setAttribute("aria-valuetext", description);
  const url = pngUrl(b64_json);
  Object.assign(byId("step-image"), { src: url, alt: `Image at ${description}` });
  Object.assign(byId("download-step"), { href: url, download: filename });
}

export function addListeners() {
  byId("position").max = INTERPOLATION_STEPS - 1;
  byId("image-form").addEventListener("submit", generate);
  byId("interpolation-form").addEventListener("submit", interpolate);
  byId("position").addEventListener("input", () => {
    if (interpolationImages.length > 0) showSelectedStep();
  });
  byId("next-seed").addEventListener("click", (event) => {
    byId("image-seed").value = Number(byId("image-status").dataset.seed) + 1;
    generate(event);
  });
  byId("truncation").addEventListener("input", () => {
    const text = readSharedSettings().truncation?.toFixed(1) ?? "off";
    byId("truncation-value").textContent = text;
    byId("truncation").setAttribute("aria-valuetext", text);
  });
}
