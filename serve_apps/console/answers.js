// One picture to every live version: answers side by side, and the true label back.

import { ask } from "./api.js";
import { byId, colourOf, h, ms, percent } from "./dom.js";
import { Pad } from "./pad.js";

const PAUSE_MS = 450; // after a stroke, before the versions are asked
const MAX_BARS = 10;
const MAX_BUTTONS = 20;

/** The part of the page that asks and corrects. */
export class Answers {
  constructor() {
    this.pad = new Pad(byId("canvas"), (what) => this.#stroked(what));
    this.model = null;
    this.round = 0; // answers to older pictures come too late
    this.given = new Map(); // version → its answer to the picture in view
    byId("ask").onclick = () => this.#askAll();
    byId("clear").onclick = () => this.clear();
    byId("upload").onclick = () => byId("file").click();
    byId("file").onchange = (event) => this.#upload(event.target.files[0]);
    const board = byId("board");
    board.ondragover = (event) => event.preventDefault();
    board.ondrop = (event) => {
      event.preventDefault();
      this.#upload(event.dataTransfer.files[0]);
    };
  }

  /** Show a model: its versions, its classes, and samples of its data. */
  show(model) {
    if (JSON.stringify(this.model) === JSON.stringify(model)) return;
    const isSame = this.model?.name === model.name && `${this.model.shape}` === `${model.shape}`;
    this.model = model;
    if (!isSame) {
      this.pad.fit(model.shape, model.fill);
      byId("canvas").hidden = !model.isDrawable;
      byId("board").classList.toggle("light", (model.fill?.[0] ?? 0) > 127);
      byId("ask-title").textContent = model.title;
      this.clear();
      this.#showClasses();
      this.#showSamples();
    }
    this.#drawCards();
  }

  clear() {
    this.round += 1;
    clearTimeout(this.timer);
    this.pad.clear();
    this.#picture(null);
    this.given.clear();
    byId("file").value = "";
    byId("problem").textContent = "";
    byId("seen").hidden = true;
    byId("hint").hidden = false;
    byId("hint").textContent = this.model?.isDrawable
      ? "Draw here"
      : "Drop a picture here, upload one, or pick a sample";
    for (const id of ["ask", "clear"]) byId(id).disabled = true;
    this.#allowTruth(false);
    if (this.model) this.#drawCards();
  }

  #stroked(what) {
    clearTimeout(this.timer);
    if (what === "start") {
      byId("hint").hidden = true;
      for (const id of ["ask", "clear"]) byId(id).disabled = false;
    } else {
      this.timer = setTimeout(() => this.#askAll(), PAUSE_MS);
    }
  }

  async #upload(file) {
    if (!file) return;
    try {
      // What the gateway does not decode, the browser may.
      const isTaken = ["image/png", "image/jpeg"].includes(file.type);
      this.#pick(isTaken ? file : await toPng(await createImageBitmap(file)));
    } catch {
      byId("problem").textContent = `${file.name} is no picture that this browser can read.`;
    }
  }

  /** Take a picture that was not drawn, and ask at once. */
  #pick(blob) {
    this.clear();
    this.#picture(blob);
    byId("hint").hidden = true;
    for (const id of ["ask", "clear"]) byId(id).disabled = false;
    this.#askAll();
  }

  #picture(blob) {
    const image = byId("picture");
    if (image.src) URL.revokeObjectURL(image.src);
    image.removeAttribute("src");
    this.blob = blob;
    image.hidden = !blob;
    if (blob) image.src = URL.createObjectURL(blob);
  }

  async #askAll() {
    clearTimeout(this.timer);
    const round = (this.round += 1);
    const { name, versions } = this.model;
    const body = this.blob ?? (await this.#drawing());
    if (round !== this.round) return;
    byId("problem").textContent = "";
    this.#allowTruth(false);
    this.given.clear();
    byId("answers").setAttribute("aria-busy", "true");
    await Promise.all(
      versions.map(async ({ version }) => {
        const answer = await askOne(name, version, body);
        if (round !== this.round) return;
        this.given.set(version, answer);
        this.#drawCards();
      }),
    );
    if (round !== this.round) return;
    byId("answers").setAttribute("aria-busy", "false");
    this.#allowTruth([...this.given.values()].some((answer) => answer.request_id));
  }

  async #drawing() {
    const small = byId("small");
    this.pad.render(small);
    byId("seen").hidden = false;
    return new Promise((resolve) => small.toBlob(resolve, "image/png"));
  }

  #drawCards() {
    const names = this.model.classNames;
    const cards = this.model.versions.map((version) =>
      card(version, names, this.given.get(version.version), this.truth),
    );
    byId("answers").replaceChildren(...cards);
  }

  #showClasses() {
    const names = this.model.classNames;
    const box = byId("classes");
    if (names.length <= MAX_BUTTONS) {
      const buttons = names.map((name) => {
        const onclick = () => this.#tell(name);
        return h("button", { type: "button", "aria-pressed": "false", onclick }, name);
      });
      box.replaceChildren(...buttons);
      return;
    }
    const select = h("select", { "aria-label": "Class" }, names.map((name) => h("option", {}, name)));
    const tell = () => this.#tell(select.value);
    box.replaceChildren(select, h("button", { type: "button", onclick: tell }, "Send"));
  }

  async #showSamples() {
    const { name } = this.model;
    const box = byId("samples");
    box.replaceChildren();
    box.hidden = false;
    // The page is whole without them.
    const asked = ask(`samples/${encodeURIComponent(name)}`);
    const { samples } = await asked.catch(() => ({ samples: [] }));
    if (this.model.name !== name) return;
    box.hidden = !samples.length;
    const buttons = samples.map(({ label, png }) => {
      const pick = async () => this.#pick(fromBase64(png));
      return h(
        "button",
        { type: "button", onclick: pick, title: `A test image of ${label}` },
        h("img", { src: `data:image/png;base64,${png}`, alt: `Sample of ${label}` }),
      );
    });
    box.replaceChildren(...buttons);
  }

  #allowTruth(isAllowed) {
    this.truth = null;
    byId("truth").disabled = !isAllowed;
    byId("truth-note").textContent = "Your answer is kept as the true label of this picture.";
    for (const button of byId("classes").querySelectorAll("[aria-pressed]")) {
      button.setAttribute("aria-pressed", "false");
    }
  }

  /** Send the true label for the answer of every version. */
  async #tell(label) {
    const round = this.round;
    const answers = [...this.given.values()].filter((answer) => answer.request_id);
    const sent = answers.map(({ request_id, model }) =>
      ask("feedback", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ request_id, model, label }),
      }),
    );
    const failed = (await Promise.allSettled(sent)).find(({ status }) => status === "rejected");
    if (round !== this.round) return;
    if (failed) {
      byId("truth-note").textContent = `Not stored: ${failed.reason.message}`;
      return;
    }
    this.truth = label;
    const right = answers.filter((answer) => answer.label === label).length;
    byId("truth-note").textContent =
      `Stored: it is ${label}. ${right} of ${answers.length} ` +
      `${answers.length === 1 ? "version was" : "versions were"} right.`;
    for (const button of byId("classes").querySelectorAll("[aria-pressed]")) {
      button.setAttribute("aria-pressed", String(button.textContent === label));
    }
    this.#drawCards();
  }
}

async function askOne(model, version, body) {
  const start = performance.now();
  try {
    const answer = await ask(`predict/${encodeURIComponent(model)}`, {
      method: "POST",
      headers: { "Content-Type": body.type, "X-Model-Version": String(version) },
      body,
    });
    return { ...answer, ms: performance.now() - start };
  } catch (error) {
    return { error: error.message };
  }
}

function card({ version, role }, names, answer, truth) {
  const isRight = truth && answer?.label ? answer.label === truth : null;
  const verdict = { true: "right", false: "wrong" }[isRight] ?? "";
  const best = answer?.probabilities ? Math.max(...answer.probabilities) : null;
  return h(
    "article",
    { class: `answer ${colourOf(version)} ${verdict}`, "aria-label": `Version ${version}` },
    h("header", {}, h("h3", {}, `Version ${version}`), h("span", { class: "badge" }, role)),
    answer?.error
      ? h("p", { class: "problem" }, answer.error)
      : h(
          "p",
          { class: "verdict" },
          h("strong", {}, answer?.label ?? "–"),
          h("span", {}, best === null ? "" : percent(best), h("br"), ms(answer?.ms)),
          verdict ? h("em", {}, verdict === "right" ? "✓ right" : "✗ wrong") : null,
        ),
    bars(names, answer?.probabilities),
  );
}

/** The classes with the highest probabilities; in their own order if there are few. */
function bars(names, probabilities) {
  let rows = names.map((name, index) => ({ name, share: probabilities?.[index] ?? 0 }));
  const best = rows.reduce((most, row) => (row.share > most.share ? row : most), rows[0]);
  if (rows.length > MAX_BARS) rows = rows.sort((a, b) => b.share - a.share).slice(0, MAX_BARS);
  return h(
    "ul",
    { class: "bars" },
    rows.map((row) =>
      h(
        "li",
        { class: probabilities && row === best ? "best" : "" },
        h("span", { class: "name", title: row.name }, row.name),
        h(
          "span",
          { class: "track", "aria-hidden": "true" },
          h("span", { class: "fill", style: { width: `${100 * row.share}%` } }),
        ),
        h("span", { class: "value" }, probabilities ? percent(row.share) : ""),
      ),
    ),
  );
}

function toPng(bitmap) {
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

function fromBase64(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}
