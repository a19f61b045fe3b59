// The studio page: a user interface for the HTTP API. No build step, no library.
//
// When it is opened, it generates images and an interpolation (?n=16&seed=7), unless the query has
// run=text. It also generates text if the query has run=text or run=1: ?prompt=ROMEO:&seed=7&run=1.

import { getJson } from "./api.js";
import { byId, showError } from "./dom.js";
import * as images from "./images.js";
import { showModels } from "./models.js";
import { fillForms } from "./query.js";
import { watchStatus } from "./status.js";
import * as text from "./text.js";

const PANELS = { gpt: { id: "text", script: text }, gan: { id: "images", script: images } };

/** Shows the panel of each kind of model that is served. */
function showPanels(models) {
  for (const { kind, model } of models) {
    const { id, script } = PANELS[kind];
    script.configure(model);
    byId(id).hidden = false;
    byId(id).classList.toggle("single", models.length === 1);
  }
}

async function start() {
  text.addListeners();
  images.addListeners();
  try {
    const { data: models } = await getJson("v1/models");
    showModels(models);
    watchStatus();
    showPanels(models);
    const query = new URLSearchParams(location.search);
    fillForms(query);
    const kinds = models.map(({ kind }) => kind);
    const run = query.get("run");
    if (kinds.includes("gpt") && ["1", "text"].includes(run)) text.generate();
    if (kinds.includes("gan") && run !== "text") {
      await images.generate();
      await images.interpolate();
    }
  } catch (error) {
    showError(error);
  }
}

start();
