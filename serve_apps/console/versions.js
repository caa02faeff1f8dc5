// The traffic split and the leaderboard: who answers how much, and how well.

import { ago, byId, colourOf, count, h, isNumber, ms, onChange, percent, short } from "./dom.js";

/** One model of GET /traffic as the page uses it. */
export function modelOf(traffic, name) {
  const split = traffic.models[name];
  const total = Object.values(split.weights).reduce((sum, weight) => sum + weight, 0);
  const versions = Object.keys(split.bundles)
    .map(Number)
    .sort((a, b) => a - b)
    .map((version) => ({
      version,
      share: (split.weights[version] ?? 0) / (total || 1),
      shadow: split.shadows?.[version] ?? 0,
      role: roleOf(split, version),
    }));
  const about = traffic.versions?.[`${name}/${split.champion}`] ?? {};
  const classNames = (about.class_names ?? []).map(String);
  const shape = about.shape ?? [28, 28, 1];
  // Digits and letters are drawn; anything else has to be a picture.
  const isAll = (pattern) => classNames.length > 0 && classNames.every((name) => pattern.test(name));
  const isDrawable = shape[2] === 1 && isAll(/^[\p{L}\p{N}]$/u);
  const title = isDrawable ? `Draw a ${isAll(/^\d$/) ? "digit" : "character"}` : "Upload a picture";
  return { name, versions, classNames, shape, fill: about.fill, isDrawable, title };
}

function roleOf(split, version) {
  if (version === split.champion) return "champion";
  if (version === split.previous_champion) return "previous";
  if (split.weights[version]) return "challenger";
  return split.shadows?.[version] ? "shadow" : "idle";
}

export const showTraffic = onChange((traffic, model) => {
  const split = traffic.models[model.name];
  const parts = model.versions.filter(({ share }) => share > 0).sort((a, b) => b.share - a.share);
  byId("split").replaceChildren(
    ...parts.map(({ version, share }) =>
      h(
        "span",
        {
          class: colourOf(version),
          style: { flexGrow: String(share) },
          title: `Version ${version}: ${percent(share)}`,
        },
        h("b", {}, `v${version}`),
        h("i", {}, ` · ${percent(share)}`),
      ),
    ),
  );
  const words = parts.map(({ version, share }) => `version ${version} ${percent(share)}`).join(", ");
  byId("split").setAttribute("aria-label", `Traffic split: ${words}`);
  const { generation, who, why, when } = traffic;
  const by = [who && `by ${who}`, why && `“${why}”`, ago(when)].filter(Boolean);
  byId("policy").textContent = `Policy ${generation} ${by.join(", ")}`;
  const pins = Object.entries(split.pins ?? {}).map(([key, version]) => `${key} → version ${version}`);
  byId("pins").textContent = pins.length ? `Pinned routing keys: ${pins.join(", ")}` : "";
});

export const showLeaderboard = onChange((traffic, model, stats, watch) => {
  const rows = model.versions
    .map((version) => ({ ...version, ...facts(traffic, model.name, version, stats, watch) }))
    .sort((a, b) => (b.test ?? -1) - (a.test ?? -1));
  const heads = [
    ["", "Rank"], ["Version"], ["Role"], ["Traffic"], ["Test", "Accuracy on the test set"],
    ["Live", "Accuracy by true labels"], ["Requests", "Of the last 15 minutes"], ["p50"], ["p99"],
    ["Errors", "Answers 5xx of the last 15 minutes"], ["Shadow"],
  ];
  const head = heads.map(([name, title]) =>
    h(
      "th",
      { scope: "col", role: "columnheader", title },
      name || h("span", { class: "unseen" }, title),
    ),
  );
  byId("versions").replaceChildren(
    h(
      "table",
      { role: "table", "aria-label": "Leaderboard: versions by accuracy on the test set" },
      h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, head)),
      h("tbody", { role: "rowgroup" }, rows.map(row)),
    ),
  );
});

function facts(traffic, name, { version, shadow }, stats, watch) {
  const key = `${name}/${version}`;
  const seen = stats?.versions?.[key];
  const statuses = Object.entries(seen?.statuses ?? {});
  const sum = (list) => list.reduce((total, [, number]) => total + number, 0);
  return {
    test: traffic.versions?.[key]?.test_accuracy,
    live: watch?.versions?.[version],
    requests: sum(statuses),
    errors: sum(statuses.filter(([status]) => status >= 500)),
    p50: seen?.overall?.p50_ms,
    p99: seen?.overall?.p99_ms,
    compared: traffic.shadows?.[key],
    shadow,
  };
}

function row(version, index) {
  const cell = (label, ...content) => h("td", { role: "cell", "data-label": label }, ...content);
  return h(
    "tr",
    { role: "row", class: colourOf(version.version) },
    cell("Rank", String(index + 1)),
    h(
      "th",
      { role: "rowheader", scope: "row" },
      h("span", { class: "key", "aria-hidden": "true" }),
      `Version ${version.version}`,
    ),
    cell("Role", h("span", { class: `badge ${version.role}` }, version.role)),
    cell("Traffic", version.share ? percent(version.share) : "–"),
    cell("Test", percent(version.test, 2)),
    cell("Live", live(version.live)),
    cell("Requests", count(version.requests)),
    cell("p50", ms(version.p50)),
    cell("p99", ms(version.p99)),
    cell("Errors", version.errors ? h("strong", { class: "bad" }, count(version.errors)) : "0"),
    cell("Shadow", shadow(version)),
  );
}

function live(judged) {
  const { accuracy, low, high, labels, confidence } = judged ?? {};
  if (!isNumber(accuracy)) {
    const sure = isNumber(confidence) ? h("small", {}, `no labels, confidence ${percent(confidence)}`) : null;
    return h("span", {}, "–", sure);
  }
  const range = isNumber(low) && isNumber(high) ? `${(100 * low).toFixed(1)}–${percent(high)}` : "";
  const of = isNumber(labels) ? `${count(labels)} labels` : "";
  const small = [range, of].filter(Boolean).join(", ");
  return h("span", { title: "With a 95 % interval" }, percent(accuracy), h("small", {}, small));
}

function shadow({ shadow: share, compared }) {
  if (!share && !compared?.compared) return "–";
  const agreed = compared?.compared
    ? `${percent(compared.agreed / compared.compared)} of ${count(compared.compared)} agree`
    : "nothing compared yet";
  return h("span", {}, share ? `${short(share)} %` : "off", h("small", {}, agreed));
}
