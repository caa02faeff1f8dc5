// Requests to the gateway, with the API key of this tab where one is asked for.

import { byId } from "./dom.js";

const STORED = "rayline-key";
let waiting = null; // one question to the user, whoever else needs a key meanwhile
let isDeclined = false; // then only the button asks again

/** What the gateway said no with. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Ask a path; returns the answer's JSON. Asks the user for a key when one is needed. */
export async function ask(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(STORED);
    const headers = { ...options.headers, ...(key ? { "X-API-Key": key } : {}) };
    const response = await fetch(path, { ...options, headers, cache: "no-store" });
    if (response.status !== 401) return read(response);
    if (sessionStorage.getItem(STORED) !== key) continue; // typed in meanwhile
    const isGiven = !isDeclined && (await keyFromUser(key !== null));
    if (!isGiven) throw new ApiError(401, "An API key is needed: use the button above.");
  }
}

async function read(response) {
  let content;
  try {
    content = await response.json();
  } catch {
    throw new ApiError(response.status, `The server answered ${response.status}.`);
  }
  if (response.ok) return content;
  throw new ApiError(response.status, content.error ?? `The server answered ${response.status}.`);
}

/** Open the dialog; resolves to whether there is a key now. */
export function keyFromUser(wasRefused = false) {
  if (wasRefused) sessionStorage.removeItem(STORED);
  if (waiting) return waiting;
  byId("key-problem").textContent = wasRefused ? "That key is not valid here." : "";
  waiting = new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const end = (given) => {
      waiting = null;
      isDeclined = !given;
      byId("key").hidden = given;
      dialog.close();
      resolve(given);
    };
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      const input = byId("key-input");
      // Header values are Latin-1; a key is plain ASCII.
      const key = input.value.replace(/[^\x21-\x7e]/g, "");
      input.value = "";
      if (key) sessionStorage.setItem(STORED, key);
      end(Boolean(key));
    };
    byId("key-cancel").onclick = () => end(false);
    dialog.oncancel = (event) => {
      event.preventDefault();
      end(false);
    };
    dialog.showModal();
  });
  return waiting;
}
