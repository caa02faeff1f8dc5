// The console: asks the gateway every few seconds, and hands what it says to the parts of the page.

import { Answers } from "./answers.js";
import { ApiError, ask, keyFromUser } from "./api.js";
import { byId, h } from "./dom.js";
import { Live } from "./live.js";
import { showRollout } from "./rollout.js";
import { modelOf, showLeaderboard, showTraffic } from "./versions.js";

const EVERY_MS = 5000;
const CHOSEN = "rayline-model";

const answers = new Answers();
const live = new Live();
let timer = null;
let isAsking = false;
let known = null; // what was shown last

async function refresh() {
  clearTimeout(timer);
  if (isAsking) return;
  isAsking = true;
  try {
    const [traffic, stats, watch] = await Promise.all([
      ask("traffic"),
      ask("stats").catch(orNull),
      ask("watch").catch(orNull),
    ]);
    known = { traffic, stats, watch };
    show();
    state("live", "Live");
  } catch (error) {
    const isAnswer = error instanceof ApiError;
    state("lost", isAnswer ? error.message : "The server does not answer; trying again.");
  } finally {
    isAsking = false;
    if (!document.hidden) timer = setTimeout(refresh, EVERY_MS);
  }
}

/** The page does without what is not there, but not without a key. */
function orNull(error) {
  if (error instanceof ApiError && error.status !== 401) return null;
  throw error;
}

function show() {
  const { traffic, stats, watch } = known;
  const model = modelOf(traffic, chosen(traffic));
  const judged = watch?.models?.[model.name];
  answers.show(model);
  showTraffic(traffic, model);
  showLeaderboard(traffic, model, stats, judged?.watch);
  live.showStats(stats, model.name);
  live.showWatch(judged?.watch);
  showRollout(judged?.rollout);
  showLinks(watch?.links ?? {});
  byId("main").setAttribute("aria-busy", "false");
}

function chosen(traffic) {
  const names = Object.keys(traffic.models).sort();
  const select = byId("model");
  const wanted = sessionStorage.getItem(CHOSEN) ?? traffic.default_model;
  const name = names.includes(wanted) ? wanted : traffic.default_model;
  const isSame = [...select.options].map((option) => option.value).join() === names.join();
  if (!isSame) select.replaceChildren(...names.map((value) => h("option", { value }, value)));
  select.value = name;
  byId("model-label").hidden = names.length < 2;
  return name;
}

function showLinks(links) {
  const nav = byId("links");
  const here = isLoopback(location.hostname);
  const usable = Object.entries(links).filter(([, url]) => here || !isLoopback(new URL(url).hostname));
  if (nav.childElementCount === 1 + usable.length) return;
  nav.replaceChildren(
    nav.firstElementChild,
    ...usable.map(([name, href]) => h("a", { href, target: "_blank", rel: "noopener" }, name)),
  );
}

const isLoopback = (host) => host === "localhost" || host === "[::1]" || host.startsWith("127.");

function state(kind, text) {
  const box = byId("state");
  if (box.className === `state ${kind}` && box.lastElementChild.textContent === text) return;
  box.className = `state ${kind}`;
  box.lastElementChild.textContent = text;
}

byId("model").onchange = (event) => {
  sessionStorage.setItem(CHOSEN, event.target.value);
  show();
};
byId("key").onclick = async () => {
  if (await keyFromUser()) refresh();
};
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh();
});
refresh();
