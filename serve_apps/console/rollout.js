// The rollout of a candidate: how far it is, and what each gate says.

import { ago, byId, count, h, isNumber, onChange, short } from "./dom.js";

const CANARIES = [1, 5, 25, 50, 100].map((percent) => `canary-${percent}`);
const STAGES = ["replay", "shadow", ...CANARIES];
const GOOD = ["pass", "passed", "promoted"];
const WARN = ["paused", "held"];
const BAD = ["breach", "withdrawing", "rolled_back", "aborted"];

export const showRollout = onChange((rollout) => {
  const status = word(rollout?.status);
  byId("rollout-state").replaceChildren(status ? badge(status) : "");
  byId("rollout").replaceChildren(...(rollout ? parts(rollout) : nothing()));
});

function nothing() {
  return [
    h(
      "p",
      { class: "muted" },
      "No version is being rolled out. ",
      h("code", {}, "python -m jobs.rollout VERSION"),
      " takes one from replayed requests to all of the traffic, a step at a time, and back by itself.",
    ),
  ];
}

function parts(rollout) {
  const { candidate, champion, since, reason, weight } = rollout;
  const who = [
    candidate !== undefined && `Version ${candidate}`,
    champion !== undefined && `against version ${champion}`,
    isNumber(weight) && `with ${short(weight)} % of the traffic`,
    since && `· this step began ${ago(since)}`,
  ];
  return [
    h("p", {}, who.filter(Boolean).join(" ")),
    steps(rollout),
    reason ? h("p", { class: "reason" }, String(reason)) : null,
    gates(rollout.gates ?? []),
    past(rollout.history ?? []),
  ].filter(Boolean);
}

function steps({ stage, stages, status }) {
  const names = (Array.isArray(stages) && stages.length ? stages : STAGES).map(String);
  const now = names.indexOf(word(stage));
  const isOver = word(status) === "promoted";
  const items = names.map((name, index) => {
    const state = isOver || index < now ? "done" : index === now ? kind(word(status)) || "now" : "";
    const current = index === now && !isOver ? "step" : null;
    return h("li", { class: state, "aria-current": current }, words(name));
  });
  const list = h("ol", { class: "steps" }, items);
  if (now >= 0 || !stage || isOver) return list;
  return h("div", {}, list, h("p", { class: "muted" }, `Step: ${words(String(stage))}`));
}

function gates(list) {
  if (!list.length) return null;
  const rows = list.map((gate) =>
    h(
      "li",
      {},
      badge(word(gate.verdict) || "wait"),
      h("span", { class: "gate" }, words(String(gate.name ?? "gate"))),
      h("span", { class: "muted" }, [
        isNumber(gate.value) && short(gate.value),
        isNumber(gate.champion) && `champion ${short(gate.champion)}`,
        isNumber(gate.limit) && `limit ${short(gate.limit)}`,
        isNumber(gate.samples) && `${count(gate.samples)} samples`,
        gate.reason && String(gate.reason),
      ].filter(Boolean).join(" · ")),
    ),
  );
  return h("ul", { class: "gates", "aria-label": "Gates of this step" }, rows);
}

function past(list) {
  if (!list.length) return null;
  const rows = list.toReversed().map(({ time, stage, status, reason }) =>
    h(
      "li",
      {},
      h("span", { class: "muted" }, time ? ago(time) : ""),
      [words(word(stage)), words(word(status)), reason].filter(Boolean).join(" · "),
    ),
  );
  const summary = h("summary", {}, `History (${list.length})`);
  return h("details", {}, summary, h("ul", { class: "past" }, rows));
}

const word = (value) => (value === undefined || value === null ? "" : String(value).toLowerCase());

const words = (name) =>
  name.replace(/^canary[-_ ]?(\d+)$/, "$1 %").replaceAll("_", " ");

function kind(status) {
  if (GOOD.includes(status)) return "good";
  if (WARN.includes(status)) return "warn";
  return BAD.includes(status) ? "bad" : "";
}

const badge = (status) => h("span", { class: `badge ${kind(status)}` }, words(status));
