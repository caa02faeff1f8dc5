"""The report: one file that needs no other, with all there is and without what is not."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib.train.experiment import MINIMIZE, Objective
from lib.watch.report import plots
from lib.watch.report.page import grid, lineage_of, render
from lib.watch.scorecard import score
from tests.dossiers import full_dossier

FULL = full_dossier()
BARE = replace(
    FULL, evaluation=None, trials=(), versions=(), manifests=(), policies=(), watch={}, rollouts=(),
    retrains=(), requests={}, files=frozenset(), ci="", samples={},
)  # fmt: skip
PICTURES = (plots.data, plots.search, plots.confusion, plots.classes, plots.gap, plots.drift,
            plots.quality, plots.shares)  # fmt: skip


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attributes)
        self.links += [values[n] or "" for n in ("src", "href", "xlink:href") if n in values]
        if values.get("id"):
            self.ids.add(str(values["id"]))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def html() -> str:
    return render(FULL, score(FULL))


def test_the_page_needs_nothing_from_outside(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "@import" not in html
    assert not re.search(r"url\((?!#|\"#)", html)
    linked = {link[1:] for link in page.links if link.startswith("#")}
    assert linked <= page.ids


def test_the_page_says_what_is_known(html: str) -> None:
    text = " ".join(" ".join(Page(html).words).split())
    for words in (
        "digits, version 4",
        "ML Test Score is 5",
        "Prediction quality has not regressed",
        "To do: check who can read the storage root",
        "canary-1",
        "the candidate is better than the champion",
        "version 3",
        "48,213, 3 failed",
        "groups, of column scanner",
    ):
        assert words in text
    assert html.count("<svg") == len(PICTURES) + 2


def test_the_best_trials_are_those_by_the_objective_of_the_sweep() -> None:
    numbers = [(0.99, 0.3), (1.0, 0.2), (0.98, 0.1), (1.0, 0.4), (0.97, 0.05)]
    trials = [
        {
            "run_id": f"trial{n}",
            "status": "FAILED" if n == 4 else "FINISHED",
            "params": {"depth": str(n)},
            "metrics": {"val_accuracy": accuracy, "val_loss": loss},
        }
        for n, (accuracy, loss) in enumerate(numbers)
    ]
    loss = Objective(metric="val_loss", goal=MINIMIZE)
    for changes, order in (({}, [1, 3, 0, 2]), ({"objective": loss}, [2, 1, 0, 3])):
        dossier = replace(FULL, trials=trials, **changes)
        html = render(dossier, score(dossier))
        assert re.findall(r"<code>trial(\d)</code>", html) == [str(n) for n in order]
        assert ('<th class="number">val_loss</th>' in html) == bool(changes)
    picture = plots.search(replace(FULL, trials=trials, objective=loss))
    assert "validation loss" in str(picture)


def test_without_evidence_the_page_says_so() -> None:
    html = render(BARE, score(BARE))
    text = " ".join(Page(html).words)
    for words in (
        "manifest is gone",
        "The monitor has tested no window",
        "no labelled live requests",
        "The prediction log has no answers",
        "This version never answered callers",
    ):
        assert words.lower() in text.lower()
    assert all(draw(BARE) is None for draw in PICTURES)
    # The sections' bars and the lineage.
    assert html.count("<svg") == 2


def test_names_and_reasons_of_others_are_no_markup() -> None:
    evil = "<script>alert(1)</script>"
    policies = [{**made, "why": evil, "who": evil} for made in FULL.policies]
    evaluation = {**(FULL.evaluation or {})}
    evaluation["class_names"] = [evil, *evaluation["class_names"][1:]]
    evaluation["per_class_accuracy"] = {evil: 0.5}
    retrains = [{**made, "reason": evil} for made in FULL.retrains]
    dossier = replace(FULL, model=evil, policies=policies, evaluation=evaluation, retrains=retrains)
    html = render(dossier, score(dossier))
    assert "script" not in Page(html).tags


def test_the_same_evidence_gives_the_same_page(html: str) -> None:
    assert render(FULL, score(FULL)) == html


def test_a_version_of_no_retrain_has_a_lineage_too() -> None:
    graph = lineage_of(replace(FULL, retrains=()))
    assert [node.kind for node in graph.nodes] == [
        "data set", "data set", "sweep", "run", "version", "rollout",
    ]  # fmt: skip
    assert len(graph.edges) == 5


@pytest.mark.parametrize(("shape", "mode"), [((4, 6, 1), 1), ((4, 6, 3), 3)])
def test_samples_are_grey_or_colour(shape: tuple[int, int, int], mode: int) -> None:
    image = bytes(range(4 * 6 * mode))
    samples: dict[str, Any] = {"shape": shape, "train": [[image], [image, image], []]}
    url = grid(replace(FULL, samples=samples), "train")
    assert url is not None
    assert url.startswith("data:image/png;base64,")
    assert grid(replace(FULL, samples=samples), "live") is None


def test_many_classes_and_long_names_are_drawn() -> None:
    names = [f"a rather long name of class {number}" for number in range(120)]
    manifest = {
        **FULL.manifests[0],
        "class_names": names,
        "counts": {"train": [5] * 120, "val": [1] * 120, "test": [1] * 120},
    }
    confusion = [[int(row == column) for column in range(120)] for row in range(120)]
    evaluation = {
        "class_names": names,
        "confusion": confusion,
        "accuracy": 1.0,
        "macro_accuracy": 1.0,
        "per_class_accuracy": dict.fromkeys(names, 1.0),
    }
    dossier = replace(FULL, manifests=[manifest], evaluation=evaluation)
    for draw in (plots.data, plots.confusion, plots.classes):
        assert draw(dossier)


def test_without_a_place_the_page_lies_in_the_line_s_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.report import main

    found = SimpleNamespace(model="digits", version=3)
    card = SimpleNamespace(score=1.0, meaning="", to_json=dict)
    monkeypatch.setattr("lib.watch.collect.collect", lambda *_, **__: found)
    monkeypatch.setattr("lib.watch.scorecard.score", lambda _: card)
    monkeypatch.setattr("lib.watch.report.page.render", lambda *_: "page")
    for name in ("RAYLINE_HOME", "RAYLINE_STORAGE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match="0"):
        main(["3"])
    assert (tmp_path / "home/reports/digits-v3.html").read_text() == "page"
