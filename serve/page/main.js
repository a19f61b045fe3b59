// The studio: the same API that /docs describes, called from a page. No build step, no library.
//
// A query runs the page at once: ?prompt=ROMEO:&seed=7&run=text, ?n=16&seed=7&run=pictures, or run=1 for both.

import { answer } from "./api.js";
import { $, complain, recall } from "./dom.js";
import * as pictures from "./images.js";
import * as served from "./models.js";
import * as text from "./text.js";

function offer(models) {
  served.offer(models);
  for (const { kind, model } of models) {
    const [panel, its] = kind === "gpt" ? [$("text"), text] : [$("pictures"), pictures];
    its.offer(model);
    panel.hidden = false;
    panel.classList.toggle("alone", models.length === 1);
  }
}

async function start() {
  text.listen();
  pictures.listen();
  try {
    const models = (await (await answer(await fetch("v1/models"))).json()).data;
    offer(models);
    const query = new URLSearchParams(location.search);
    recall(query);
    const kinds = models.map(({ kind }) => kind);
    if (kinds.includes("gpt") && ["1", "text"].includes(query.get("run"))) text.write();
    if (kinds.includes("gan") && query.get("run") !== "text") {
      await pictures.draw();
      await pictures.interpolate();
    }
  } catch (error) {
    complain(error);
  }
}

start();
