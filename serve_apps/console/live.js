// The four charts: requests and latency from /stats, accuracy and drift from /watch.

import { Chart } from "./charts.js";
import { byId, colourOf, isNumber, percent, seconds, short } from "./dom.js";

const ALARM_P = 0.01;

/** The charts of one model. */
export class Live {
  constructor() {
    this.rate = new Chart(byId("chart-rate"), {
      title: "Requests", unit: "per second", format: short,
      empty: "No requests in the last 15 minutes.",
    });
    this.latency = new Chart(byId("chart-latency"), {
      title: "Latency", unit: "ms, p50 and p99 (dashed)", format: short,
      empty: "No requests in the last 15 minutes.",
    });
    this.accuracy = new Chart(byId("chart-accuracy"), {
      title: "Accuracy, live", unit: "from true labels", format: (share) => percent(share), top: 1,
      empty: "No true labels judged yet: correct an answer above, and run jobs.monitor.",
    });
    this.drift = new Chart(byId("chart-drift"), {
      title: "Drift", unit: "distance from the training data", format: short,
      empty: "Not judged yet: run jobs.monitor.",
    });
  }

  /** Draw the traffic of the versions of a model. */
  showStats(stats, model) {
    const times = stats?.times ?? [];
    const found = Object.entries(stats?.versions ?? {})
      .filter(([key]) => key.startsWith(`${model}/`))
      .map(([key, version]) => ({ number: key.slice(model.length + 1), version }))
      .sort((a, b) => a.number - b.number);
    const gateways = stats?.gateways ?? 0;
    const who = gateways ? `per second, ${gateways} ${gateways === 1 ? "gateway" : "gateways"}` : null;
    const rates = found.map(({ number, version }) => line(number, version.requests_per_s));
    this.rate.update(times, rates, who);
    this.latency.update(
      times,
      found.flatMap(({ number, version }) => [
        { ...line(number, version.p50_ms), label: `v${number} p50` },
        { ...line(number, version.p99_ms), label: `v${number} p99`, isDashed: true },
      ]),
    );
  }

  /** Draw what jobs/monitor judged; `watch` is its document or null. */
  showWatch(watch) {
    const points = (watch?.history ?? (watch ? [watch] : []))
      .map((point) => ({ ...point, at: seconds(point?.time) }))
      .filter(({ at }) => at !== null)
      .sort((a, b) => a.at - b.at);
    const times = points.map(({ at }) => at);
    const numbers = [...new Set(points.flatMap(({ versions }) => Object.keys(versions ?? {})))];
    numbers.sort((a, b) => a - b);
    const lines = numbers.map((number) => {
      const of = (field) => points.map(({ versions }) => known(versions?.[number]?.[field]));
      const accuracy = of("accuracy");
      const or = (list) => list.map((value, index) => value ?? accuracy[index]);
      return { ...line(number, accuracy), low: or(of("low")), high: or(of("high")) };
    });
    // One judgement is a point: give it a little room to stand in.
    const room = times.length === 1 ? [times[0] - 60, times[0]] : times;
    const pad = (list) => (times.length === 1 ? [null, ...list] : list);
    const padded = lines.map((one) => {
      return { ...one, values: pad(one.values), low: pad(one.low), high: pad(one.high) };
    });
    this.accuracy.update(room, padded);
    const scores = points.map(({ drift }) => known(drift?.score));
    const first = room.length - times.length;
    const alarms = points.flatMap(({ drift }, index) => (isAlarm(drift) ? [first + index] : []));
    const drift = { label: "score", colour: "drift", values: pad(scores), marks: alarms };
    this.drift.update(room, [drift], driftNote(watch?.drift));
  }
}

const line = (number, values) => ({ label: `v${number}`, colour: colourOf(number), values });

const known = (value) => (isNumber(value) ? value : null);

const isAlarm = (drift) =>
  drift?.alarm ?? (isNumber(drift?.p_value) ? drift.p_value < ALARM_P : false);

function driftNote(drift) {
  if (!drift) return null;
  const p = isNumber(drift.p_value) ? `p = ${short(drift.p_value)}` : "";
  if (!isAlarm(drift)) return `as the training data${p && ` (${p})`}`;
  const moved = (drift.moved ?? []).slice(0, 3).map(String).join(", ");
  return `moved away${p && ` (${p})`}${moved && `: ${moved}`}`;
}
