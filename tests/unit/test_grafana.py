"""Provisioning, against a fake that behaves as Grafana's documented API does."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lib.errors import ConfigError, WatchError
from lib.watch.dashboards import CLUSTER, DASHBOARDS, DRIFT
from lib.watch.grafana import CREATED, UNCHANGED, UPDATED, GrafanaSettings, provision
from lib.watch.panels import DATASOURCE_NAME, DATASOURCE_UID, FOLDER_UID, render
from tests.fake_grafana import LOGIN, TOKEN, FakeGrafana, serve

PROMETHEUS = "http://prometheus:9090"


@pytest.fixture
def grafana() -> Iterator[FakeGrafana]:
    fake = FakeGrafana()
    server = serve(fake)
    yield fake
    server.shutdown()
    server.server_close()


def settings(grafana: FakeGrafana, **changes: object) -> GrafanaSettings:
    made = GrafanaSettings(url=grafana.url, prometheus_url=PROMETHEUS, token=TOKEN)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_the_first_run_makes_all_of_it_and_the_second_changes_nothing(
    grafana: FakeGrafana,
) -> None:
    first = provision(settings(grafana))
    assert (first["datasource"], first["folder"]) == (CREATED, CREATED)
    assert first["dashboards"] == {dashboard.uid: CREATED for dashboard in DASHBOARDS}
    assert grafana.datasources[DATASOURCE_UID]["url"] == PROMETHEUS
    assert {kept["meta"]["folderUid"] for kept in grafana.dashboards.values()} == {FOLDER_UID}
    num_writes = len(grafana.writes)
    assert num_writes == 2 + len(DASHBOARDS)
    second = provision(settings(grafana))
    assert {second["datasource"], second["folder"], *second["dashboards"].values()} == {UNCHANGED}
    assert len(grafana.writes) == num_writes


def test_a_login_and_an_address_with_a_path_do_as_well() -> None:
    fake = FakeGrafana(prefix="/tools/grafana")
    server = serve(fake)
    try:
        made = provision(settings(fake, token=None, login=LOGIN), dashboards=[CLUSTER])
    finally:
        server.shutdown()
        server.server_close()
    assert made["dashboards"] == {CLUSTER.uid: CREATED}


def test_what_has_changed_is_updated_and_the_rest_left_alone(grafana: FakeGrafana) -> None:
    provision(settings(grafana))
    changed = replace(CLUSTER, description="another")
    again = provision(
        settings(grafana, prometheus_url="http://other:9090"), dashboards=[changed, DRIFT]
    )
    assert again["datasource"] == UPDATED
    assert again["dashboards"] == {CLUSTER.uid: UPDATED, DRIFT.uid: UNCHANGED}
    kept = grafana.dashboards[CLUSTER.uid]["dashboard"]
    assert (kept["description"], kept["version"]) == ("another", 2)
    # What others set on the data source stays.
    grafana.datasources[DATASOURCE_UID]["jsonData"]["manageAlerts"] = False
    provision(settings(grafana), dashboards=[])
    assert grafana.datasources[DATASOURCE_UID]["jsonData"]["manageAlerts"] is False
    assert grafana.datasources[DATASOURCE_UID]["url"] == PROMETHEUS


def test_what_a_person_changed_in_grafana_stays(grafana: FakeGrafana) -> None:
    provision(settings(grafana))
    edited = {**grafana.dashboards[DRIFT.uid]["dashboard"], "panels": []}
    grafana.save(edited, FOLDER_UID)
    assert provision(settings(grafana))["dashboards"][DRIFT.uid] == UNCHANGED
    assert grafana.dashboards[DRIFT.uid]["dashboard"]["panels"] == []


def test_a_login_that_grafana_does_not_know_says_what_to_set(grafana: FakeGrafana) -> None:
    with pytest.raises(WatchError, match="401 Invalid API key.*check GRAFANA_TOKEN") as caught:
        provision(settings(grafana, token="glsa_wrong"))
    assert "glsa_wrong" not in str(caught.value)
    assert grafana.writes == []


def test_a_login_that_may_not_write_says_which_role_it_needs(grafana: FakeGrafana) -> None:
    grafana.role = "Viewer"
    with pytest.raises(WatchError, match="403.*role Admin"):
        provision(settings(grafana))


def test_a_name_that_something_else_has_is_a_conflict_with_what_to_do(
    grafana: FakeGrafana,
) -> None:
    grafana.datasources["theirs"] = {"uid": "theirs", "name": DATASOURCE_NAME}
    with pytest.raises(WatchError, match="same name already exists.*rename or delete"):
        provision(settings(grafana))
    grafana.datasources.clear()
    grafana.save({**render(CLUSTER), "uid": "copied-by-hand"}, FOLDER_UID)
    with pytest.raises(WatchError, match="same name in the folder.*rename or delete"):
        provision(settings(grafana))


def test_two_that_provision_at_once_both_end_well(grafana: FakeGrafana) -> None:
    def meanwhile() -> None:
        grafana.before_write.clear()
        provision(settings(grafana))

    grafana.before_write.append(meanwhile)
    assert provision(settings(grafana))["datasource"] == UNCHANGED
    assert set(grafana.dashboards) == {dashboard.uid for dashboard in DASHBOARDS}


def test_a_change_by_someone_else_in_between_is_not_run_over(grafana: FakeGrafana) -> None:
    provision(settings(grafana))
    changed = replace(CLUSTER, description="another")

    def edit() -> None:
        grafana.save(grafana.dashboards[CLUSTER.uid]["dashboard"], FOLDER_UID)

    grafana.before_write.append(edit)
    assert provision(settings(grafana), dashboards=[changed])["dashboards"] == {
        CLUSTER.uid: UPDATED
    }
    # Version 2 is theirs, and was read before it was replaced.
    assert grafana.dashboards[CLUSTER.uid]["dashboard"]["version"] == 3
    grafana.before_write += [edit, edit]
    with pytest.raises(WatchError, match="changed by someone else"):
        provision(settings(grafana), dashboards=[CLUSTER])


def test_what_comes_from_grafana_s_own_files_is_told(grafana: FakeGrafana) -> None:
    grafana.save({"uid": CLUSTER.uid, "title": "Ray's"}, "ray", provisioned=True)
    with pytest.raises(WatchError, match="provisioned dashboard.*provisioning files"):
        provision(settings(grafana))


def test_a_grafana_that_fails_for_a_moment_is_asked_again(grafana: FakeGrafana) -> None:
    pauses_s: list[float] = []
    grafana.failures += [(503, '{"message": "database is locked"}'), (502, "<html>bad</html>")]
    provision(settings(grafana), sleep=pauses_s.append)
    assert len(pauses_s) == 2
    assert len(grafana.dashboards) == len(DASHBOARDS)


def test_a_grafana_that_keeps_failing_says_so(grafana: FakeGrafana) -> None:
    grafana.failures += [(500, '{"message": "database is locked"}')] * 4
    with pytest.raises(WatchError, match="500: database is locked; look at its log"):
        provision(settings(grafana), sleep=lambda _: None)


@pytest.mark.parametrize(
    "answer",
    [
        (200, "<html>a login page</html>"),
        (502, "<html>no message from upstream</html>"),
        (404, "<html>nothing here</html>"),
        (301, "https://elsewhere.example/api/datasources"),
    ],
)
def test_what_is_not_grafana_s_api_is_told(grafana: FakeGrafana, answer: tuple[int, str]) -> None:
    grafana.failures += [answer] * 20
    with pytest.raises(WatchError, match=r"is GRAFANA_URL right"):
        provision(settings(grafana), sleep=lambda _: None)


def test_nobody_there_is_told() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    fake = FakeGrafana(url=url)
    with pytest.raises(WatchError, match="does not answer.*is GRAFANA_URL right"):
        provision(settings(fake))


@pytest.mark.parametrize(
    ("env", "match"),
    [
        ({}, "GRAFANA_URL is not set"),
        ({"GRAFANA_URL": "grafana:3000"}, "no address such as"),
        ({"GRAFANA_URL": "http://admin:secret@grafana"}, "variables of their own"),
        ({"GRAFANA_URL": "http://grafana"}, "GRAFANA_PROMETHEUS_URL is not set"),
        ({"GRAFANA_URL": "http://g", "GRAFANA_PROMETHEUS_URL": "http://p"}, "set GRAFANA_TOKEN"),
    ],
)
def test_a_missing_setting_is_named(env: dict[str, str], match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        GrafanaSettings.from_env(env)
    assert "secret" not in str(caught.value)


def test_secrets_come_from_the_environment_and_are_not_shown() -> None:
    env = {
        "GRAFANA_URL": "https://grafana.example/",
        "RAYLINE_PROMETHEUS_URL": PROMETHEUS,
        "GRAFANA_TOKEN": "glsa_secret",
    }
    made = GrafanaSettings.from_env(env)
    assert (made.url, made.prometheus_url) == ("https://grafana.example", PROMETHEUS)
    assert (made.token, made.login) == ("glsa_secret", None)
    assert "glsa_secret" not in repr(made)
    del env["GRAFANA_TOKEN"]
    env |= {"GRAFANA_USER": "admin", "GRAFANA_PASSWORD": "s3cret"}
    assert GrafanaSettings.from_env(env).login == ("admin", "s3cret")
    assert "s3cret" not in repr(GrafanaSettings.from_env(env))
