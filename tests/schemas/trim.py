"""Makes the small schemas beside this from the published ones: see README.md for where those are.

    python -m tests.schemas.trim crd kuberay.json RayCluster,RayJob,RayService CRD.yaml …
    python -m tests.schemas.trim local kubernetes.json Deployment,Service,… _definitions.json

Left out: descriptions, status, and kinds that are not asked for. Added: unknown fields are errors,
as for `kubectl apply --validate=strict`. What is in it twice is written once.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]
_NOTES = {"description", "externalDocs", "default", "example", "title", "format", "$schema"}
_NAMES = {"properties", "definitions", "$defs"}
_MIN_SHARED_CHARS = 160


def trimmed(node: Any, *, names: bool = False) -> Any:
    """Return a schema without notes, in which objects take their own fields alone."""
    if isinstance(node, list):
        return [trimmed(item) for item in node]
    if not isinstance(node, dict):
        return node
    if names:
        return {key: trimmed(value) for key, value in node.items()}
    open_ended = node.get("x-kubernetes-preserve-unknown-fields")
    kept = {
        key: trimmed(value, names=key in _NAMES)
        for key, value in node.items()
        if key not in _NOTES and not key.startswith("x-kubernetes-")
    }
    if kept.get("properties") and "additionalProperties" not in kept and not open_ended:
        kept["additionalProperties"] = False
    return kept


def from_crds(paths: list[str], kinds: set[str]) -> Schema:
    """Return the newest version of each kind in files of CustomResourceDefinitions."""
    found: Schema = {}
    for path in paths:
        for document in yaml.load_all(Path(path).read_text(), yaml.CSafeLoader):
            spec = document["spec"]
            kind = spec["names"]["kind"]
            if kind not in kinds:
                continue
            for version in spec["versions"]:
                if not version.get("storage"):
                    continue
                schema = version["schema"]["openAPIV3Schema"]
                schema["properties"].pop("status", None)
                found[f"{spec['group']}/{version['name']}/{kind}"] = trimmed(schema)
    return found


def from_definitions(path: str, kinds: set[str]) -> tuple[Schema, Schema]:
    """Return Kubernetes' own kinds by group, version and name, and what they refer to."""
    definitions = json.loads(Path(path).read_text())["$defs"]
    roots: Schema = {}
    todo = []
    for name, schema in definitions.items():
        for told in schema.get("x-kubernetes-group-version-kind", []):
            if told["kind"] in kinds and name.endswith(f".{told['version']}.{told['kind']}"):
                schema["properties"].pop("status", None)
                group = told["group"] or "core"
                roots[f"{group}/{told['version']}/{told['kind']}"] = {"$ref": f"#/$defs/{name}"}
                todo.append(name)
    needed: Schema = {}
    while todo:
        name = todo.pop()
        if name not in needed:
            needed[name] = trimmed(definitions[name])
            text = json.dumps(needed[name]).replace("#/definitions/", "#/$defs/")
            needed[name] = json.loads(text)
            todo += [ref.removeprefix("#/$defs/") for ref in references(needed[name])]
    return roots, needed


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for item in node:
            yield from references(item)


def shared(definitions: Schema) -> Schema:
    """Return the definitions with every part that occurs again written once, as `s0`, `s1`, …"""
    counts: Counter[str] = Counter()

    def count(node: Any, names: bool = False) -> None:
        if isinstance(node, dict):
            text = json.dumps(node, sort_keys=True)
            if not names and len(text) >= _MIN_SHARED_CHARS:
                counts[text] += 1
                if counts[text] > 1:
                    return
            for key, value in node.items():
                count(value, names=not names and key in _NAMES)
        elif isinstance(node, list):
            for item in node:
                count(item)

    count(definitions, names=True)
    names_of = {text: f"s{i}" for i, text in enumerate(t for t, n in counts.items() if n > 1)}
    made: Schema = {}

    def replaced(node: Any, names: bool = False) -> Any:
        if isinstance(node, list):
            return [replaced(item) for item in node]
        if not isinstance(node, dict):
            return node
        name = None if names else names_of.get(json.dumps(node, sort_keys=True))
        if name is not None and name in made:
            return {"$ref": f"#/$defs/{name}"}
        if name is not None:
            made[name] = {}
        result = {k: replaced(v, names=not names and k in _NAMES) for k, v in node.items()}
        if name is None:
            return result
        made[name] = result
        return {"$ref": f"#/$defs/{name}"}

    return {**replaced(definitions, names=True), **made}


def main() -> None:
    """Trim and write."""
    how, target, kinds, *sources = sys.argv[1:]
    wanted = set(kinds.split(","))
    if how == "crd":
        definitions = from_crds(sources, wanted)
    else:
        roots, needed = from_definitions(sources[0], wanted)
        definitions = {**roots, **needed}
    path = Path(__file__).parent / target
    path.write_text(json.dumps({"$defs": shared(definitions)}, separators=(",", ":")) + "\n")
    print(f"{path}: {path.stat().st_size:,} bytes, {len(definitions)} definitions")


if __name__ == "__main__":
    main()
