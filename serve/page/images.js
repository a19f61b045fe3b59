// The pictures panel: a grid of a seed's pictures, and the way from one seed's picture to another's.

import { post } from "./api.js";
import { $, complain, element, remember, seedOf } from "./dom.js";

const STEPS = 21; // of an interpolation: 5 % each
let way = []; // the pictures of the interpolation that is shown

// ---- the grid

export async function draw(event) {
  event?.preventDefault();
  if (!$("picture-form").reportValidity()) return;
  if (event) complain(null);
  const request = { n: Number($("n").value), seed: seedOf($("picture-seed")), ...choices() };
  remember({ n: request.n, picture_seed: request.seed, label: request.label, truncation: request.truncation });
  await during($("draw"), async () => {
    const started = performance.now();
    const images = await (await post("v1/images/generations", request)).json();
    await hang(images, Math.round(performance.now() - started));
  });
}

/** What both forms have in common: the class, and where the latents are cut off. */
function choices() {
  const truncation = $("truncation").value === $("truncation").max ? undefined : $("truncation").valueAsNumber;
  return { label: $("label").value || undefined, truncation };
}

/** Does some work, but not twice at a time, and shows what went wrong. Its button keeps the focus, which `disabled` would take. */
async function during(button, work) {
  if (button.ariaDisabled === "true") return;
  button.ariaDisabled = "true";
  try {
    await work();
  } catch (error) {
    complain(error);
  } finally {
    button.ariaDisabled = "false";
  }
}

async function hang({ data, seed, model }, milliseconds) {
  const columns = Math.ceil(Math.sqrt(data.length));
  const name = `${model.replace("/", "-")}-seed${seed}`;
  $("grid").style.setProperty("--columns", columns);
  $("grid").classList.toggle("dense", columns > 4);
  $("grid").replaceChildren(...data.map((picture, index) => frame(picture, `${name}-${index}.png`)));
  $("picture-status").textContent = `${data.length} of seed ${seed} by ${model}, ${milliseconds} ms. Choose a picture to download it.`;
  $("picture-status").dataset.seed = seed;
  $("next").disabled = false;
  Object.assign($("download"), { href: await sheet(data, columns), download: `${name}.png`, hidden: data.length < 2 });
}

function frame({ b64_json, label }, filename) {
  const image = element("img", { src: png(b64_json), alt: label ?? "Picture" });
  const link = element("a", { href: image.src, download: filename, title: `${image.alt}: download ${filename}` }, image);
  if (label) link.append(element("span", { textContent: label, ariaHidden: "true" })); // the picture's name says it already
  return element("li", {}, link);
}

const png = (b64_json) => `data:image/png;base64,${b64_json}`;

/** All pictures as one file, row by row: its address. */
async function sheet(data, columns) {
  const images = data.map(({ b64_json }) => element("img", { src: png(b64_json) }));
  await Promise.all(images.map((image) => image.decode()));
  const side = images[0].naturalWidth;
  const canvas = element("canvas", { width: side * columns, height: side * Math.ceil(images.length / columns) });
  const context = canvas.getContext("2d");
  images.forEach((image, index) => context.drawImage(image, side * (index % columns), side * Math.floor(index / columns)));
  return canvas.toDataURL("image/png");
}

// ---- the interpolation

export async function interpolate(event) {
  event?.preventDefault();
  if (!$("interpolation-form").reportValidity()) return;
  const [seed, to_seed] = [$("from").valueAsNumber, $("to").valueAsNumber];
  if (event) complain(null);
  const request = { seed, to_seed, steps: STEPS, ...choices() };
  remember({ from: seed, to: to_seed, label: request.label, truncation: request.truncation });
  await during($("interpolate"), async () => {
    const { data, model } = await (await post("v1/images/interpolations", request)).json();
    const name = `${model.replace("/", "-")}-seed${seed}-to-${to_seed}`;
    way = data.map((picture, step) => ({ ...picture, filename: `${name}-${step}.png` }));
    Object.assign($("download-strip"), { href: await sheet(data, data.length), download: `${name}.png` });
    const shown = data.filter((_, step) => step % 2 === 0); // large enough to be recognised below the slider
    $("strip").src = await sheet(shown, shown.length);
    [$("first-seed").textContent, $("last-seed").textContent] = [`seed ${seed}`, `seed ${to_seed}`];
    $("way").hidden = false;
    go();
    $("interpolation-status").textContent = `${data.length} pictures from seed ${seed} to seed ${to_seed}${data[0].label ? `, ${data[0].label}` : ""}.`;
  });
}

/** Shows the picture that the slider stands at. */
function go() {
  const { b64_json, filename } = way[$("position").valueAsNumber];
  const place = `${Math.round((100 * $("position").valueAsNumber) / (STEPS - 1))} %`;
  const from = `${place} of the way from ${$("first-seed").textContent} to ${$("last-seed").textContent}`;
  $("position-value").textContent = place;
  $("position").setAttribute("aria-valuetext", from);
  Object.assign($("here"), { src: png(b64_json), alt: `Picture at ${from}` });
  Object.assign($("download-here"), { href: png(b64_json), download: filename });
}

// ---- the panel

export function listen() {
  $("position").max = STEPS - 1;
  $("picture-form").addEventListener("submit", draw);
  $("interpolation-form").addEventListener("submit", interpolate);
  $("position").addEventListener("input", () => way.length && go());
  $("next").addEventListener("click", (event) => {
    $("picture-seed").value = Number($("picture-status").dataset.seed) + 1;
    draw(event);
  });
  $("truncation").addEventListener("input", () => {
    const shown = choices().truncation?.toFixed(1) ?? "off";
    $("truncation-value").textContent = shown;
    $("truncation").setAttribute("aria-valuetext", shown);
  });
}

export function offer({ num_classes, class_names }) {
  if (!num_classes) return;
  $("label").replaceChildren(new Option("all in turn", ""), ...class_names.map((name) => new Option(name, name)));
  $("label-field").hidden = false;
}
