"""Tells a Kubernetes RayService what is live, as a pod of its namespace that may do so.

Its operator sends serveConfigV2 to Serve again when it restarts or makes a new cluster, and what is
missing there goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests

from lib.errors import ServingError

API = "https://kubernetes.default.svc"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""What Kubernetes mounts into a pod of a service account."""
_TIMEOUT_S = 30
_WHY = {
    401: "the pod's token is not taken",
    403: "the pod's service account may not: apply deploy/kubernetes/base/access.yaml",
    404: "there is none of that name, or no KubeRay",
}


def patch(name: str, change: Mapping[str, Any], *, api: str = API, account: Path = ACCOUNT) -> None:
    """Merge a change into a RayService of this pod's namespace.

    Raises:
        ServingError: This is no pod with a service account, or Kubernetes refuses, or is not there.
    """
    try:
        # Read each time: Kubernetes changes the token every hour.
        token = (account / "token").read_text().strip()
        namespace = (account / "namespace").read_text().strip()
    except OSError as error:
        raise ServingError(
            f"RAYLINE_RAYSERVICE={name} is for a pod with a service account, and here is none "
            f"({error}); elsewhere unset it, and run `make rayservice` after each change"
        ) from error
    what = f"RayService {name} in namespace {namespace} can't be told what is live"
    path = f"apis/ray.io/v1/namespaces/{quote(namespace)}/rayservices/{quote(name, safe='')}"
    try:
        answer = requests.patch(
            f"{api}/{path}",
            params={"fieldManager": "rayline"},
            json=change,
            headers={
                "Authorization": f"Bearer {token}",
                "Content-Type": "application/merge-patch+json",
            },
            verify=str(account / "ca.crt"),
            timeout=_TIMEOUT_S,
        )
    except requests.RequestException as error:
        raise ServingError(f"{what}: {error}") from error
    if not answer.ok:
        why = _WHY.get(answer.status_code, "Kubernetes refused")
        raise ServingError(f"{what}: {why} ({answer.status_code} {answer.text[:500]})")
