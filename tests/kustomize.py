"""What `kubectl kustomize` makes of our overlays, for the fields that they use and no others."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
_FIELDS = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
_NOT_NAMESPACED = {"Namespace"}


def build(folder: Path) -> list[Manifest]:
    """Return the manifests of a kustomization; raise ValueError for what this does not know."""
    config = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(config) - _FIELDS:
        raise ValueError(f"{folder}: {sorted(unknown)} is not known here")
    manifests: list[Manifest] = []
    for name in config["resources"]:
        path = folder / name
        manifests += build(path) if path.is_dir() else load(path)
    if namespace := config.get("namespace"):
        for manifest in manifests:
            if manifest["kind"] not in _NOT_NAMESPACED:
                manifest["metadata"]["namespace"] = namespace
    for patch in config.get("patches", []):
        _patch(folder, patch, manifests)
    for image in config.get("images", []):
        found = sum(_rename(manifest, image) for manifest in manifests)
        if not found:
            raise ValueError(f"{folder}: nothing has the image {image['name']}")
    return manifests


def load(path: Path) -> list[Manifest]:
    """Return the manifests of a file; each stands for itself, whatever YAML shared among them."""
    return [json.loads(json.dumps(m)) for m in yaml.safe_load_all(path.read_text()) if m]


def _patch(folder: Path, patch: dict[str, Any], manifests: list[Manifest]) -> None:
    text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text()
    wanted = patch["target"]
    targets = [
        manifest
        for manifest in manifests
        if manifest["kind"] == wanted["kind"] and manifest["metadata"]["name"] == wanted["name"]
    ]
    if not targets:
        raise ValueError(f"{folder}: a patch has no target {wanted}")
    for target in targets:
        for operation in yaml.safe_load(text):
            _apply(target, operation)


def _apply(target: Manifest, operation: dict[str, Any]) -> None:
    """Do one operation of a JSON patch (RFC 6902); raise LookupError if its path is not there."""
    parent, key = _find(target, operation["path"])
    value = operation.get("value")
    if operation["op"] == "copy":
        holder, name = _find(target, operation["from"])
        value = holder[name]
    elif operation["op"] == "replace":
        parent[key]  # noqa: B018 - replacing what is not there is an error
        parent[key] = copy.deepcopy(value)
        return
    elif operation["op"] != "add":
        raise ValueError(f"{operation['op']} is not known here")
    if isinstance(parent, list):
        if key > len(parent):
            raise IndexError(operation["path"])
        parent.insert(key, copy.deepcopy(value))
    else:
        parent[key] = copy.deepcopy(value)


def _find(target: Any, path: str) -> tuple[Any, Any]:
    words = [word.replace("~1", "/").replace("~0", "~") for word in path.split("/")[1:]]
    for word in words[:-1]:
        target = target[int(word)] if isinstance(target, list) else target[word]
    last: Any = int(words[-1]) if isinstance(target, list) else words[-1]
    return target, last


def _rename(node: Any, image: dict[str, str]) -> int:
    """Set the image of every container that has this one; return how many there were."""
    found = 0
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                for container in value:
                    if container.get("image") == image["name"]:
                        container["image"] = f"{image['newName']}:{image['newTag']}"
                        found += 1
            found += _rename(value, image)
    elif isinstance(node, list):
        found += sum(_rename(item, image) for item in node)
    return found
