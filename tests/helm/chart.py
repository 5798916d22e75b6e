#!/usr/bin/env python3
"""Checks the chart with the real helm: lint, goldens, strict validation, configurations, wrong values.

    chart.py --cohort target/release/cohort [--write]

--write replaces the goldens and the generated part of values.schema.json instead of comparing with them.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import kubernetes_validate
import yaml

HERE = pathlib.Path(__file__).resolve().parent
CHART = HERE.parent.parent / "helm" / "cohort"
KUBERNETES = ["1.29", "1.32"]
# Kinds of controllers that a cluster may have; their schemas do not come with Kubernetes.
CUSTOM = {"LeaderWorkerSet", "ServiceMonitor", "PodMonitor", "PrometheusRule", "ScaledObject", "Certificate"}
# Keys of the cluster file that the chart fills in, so values may not.
CHART_OWNED = [
    ("cluster",),
    ("model", "path"),
    ("router", "grpc_listen"),
    ("router", "http_listen"),
    ("router", "workers"),
    ("router", "weights"),
    ("router", "registration"),
    ("group", "routers"),
    ("group", "advertise"),
    ("group", "routers_ca"),
    ("group", "metrics_listen"),
    ("group", "rank_metrics_listen"),
    ("group", "hosts"),
    ("router", "tls"),
    ("router", "keys_file"),
    ("router", "jwt", "jwks_file"),
    ("group", "tls"),
    ("telemetry", "otlp_ca"),
]
# The committed names of metrics.
GOLDEN_METRICS = [
    HERE.parent.parent / "crates" / "worker" / "tests" / "golden" / "metrics.txt",
    HERE.parent.parent / "crates" / "router" / "tests" / "behaviour" / "golden" / "metrics.txt",
]


class Checks:
    def __init__(self, args):
        self.helm, self.cohort, self.write = args.helm, args.cohort, args.write
        self.failures, self.passed = [], 0

    def check(self, holds, complaint):
        if holds:
            self.passed += 1
        else:
            self.failures.append(complaint)

    def run(self, *command):
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)

    def template(self, *flags):
        return self.run(self.helm, "template", "demo", CHART, "--namespace", "serving", *flags)

    # ---- what is generated ----

    def same(self, path, text, what):
        """Compares with a committed file, or replaces it."""
        if self.write:
            path.write_text(text)
        committed = path.read_text() if path.exists() else ""
        name = path.relative_to(CHART.parent.parent)
        self.check(committed == text, f"{name} is not {what}; .ci/helm --write replaces it")

    def schema(self):
        """The part of the values' schema that is the cluster file's."""
        tree = json.loads(self.run(self.cohort, "config", "schema").stdout)
        for path in CHART_OWNED:
            inside = tree
            for name in path[:-1]:
                inside = inside["properties"][name]
            del inside["properties"][path[-1]]
        for name in ("$schema", "title"):
            tree.pop(name, None)
        # null takes a key of values.yaml out again.
        allow_null(tree)
        tree["type"] = "object"
        path = CHART / "values.schema.json"
        schema = json.loads(path.read_text())
        schema["properties"]["config"] = tree
        self.same(path, json.dumps(schema, indent=2) + "\n", "the schema of this version")

    # ---- rendered ----

    def values(self, path):
        name = path.stem
        linted = self.run(self.helm, "lint", "--strict", "--quiet", CHART, "-f", path)
        self.check(linted.returncode == 0, f"{name}: helm lint: {linted.stdout}{linted.stderr}")
        rendered = self.template("-f", path)
        if rendered.returncode != 0:
            return self.check(False, f"{name}: helm template: {rendered.stderr}")
        golden = HERE / "golden" / f"{name}.yaml"
        self.same(golden, rendered.stdout, "what the chart renders")
        objects = [document for document in yaml.safe_load_all(rendered.stdout) if document]
        for thing in objects:
            self.valid(name, thing)
        self.configs(name, objects)
        self.pods(name, objects)

    def valid(self, name, thing):
        label = f"{name}: {thing['kind']} {thing['metadata']['name']}"
        if thing["kind"] in CUSTOM:
            return
        for version in KUBERNETES:
            try:
                kubernetes_validate.validate(thing, version, strict=True)
                self.passed += 1
            except kubernetes_validate.ValidationError as error:
                self.failures.append(f"{label}: Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message}")

    def configs(self, name, objects):
        checked = 0
        for thing in objects:
            text = thing.get("data", {}).get("cluster.yaml") if thing["kind"] == "ConfigMap" else None
            if text is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                file = pathlib.Path(folder) / "cluster.yaml"
                file.write_text(text)
                said = self.run(self.cohort, "config", "check", f"--config={file}")
            self.check(said.returncode == 0, f"{name}: cohort config check: {said.stderr}")
            checked += 1
        self.check(checked == 1, f"{name}: {checked} cluster files")

    def pods(self, name, objects):
        for owner, template in templates(objects):
            spec = template["spec"]
            label = f"{name}: pod of {owner}"
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", **template["metadata"]}, "spec": spec}
            self.valid(label, pod)
            self.check("checksum/config" in template["metadata"]["annotations"], f"{label}: no checksum of the configuration")
            self.check(spec["securityContext"]["runAsNonRoot"] is True, f"{label}: may run as root")
            for container in spec["containers"] + spec.get("initContainers", []):
                locked = container["securityContext"]
                self.check(locked["readOnlyRootFilesystem"] and not locked["allowPrivilegeEscalation"], f"{label}: open container")
            main = spec["containers"][0]
            self.starts(label, main["args"])
            stop = main.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            self.check(spec["terminationGracePeriodSeconds"] >= stop + drain(objects, main["name"]), f"{label}: killed before it has drained")

    def starts(self, label, args):
        """The binary takes these arguments: all before --help are read first."""
        args = [re.sub(r"\$\(LWS_LEADER_ADDRESS\)", "leader.example", arg) for arg in args]
        args = [re.sub(r"\$\(LWS_WORKER_INDEX\)", "1", arg) for arg in args]
        args = [re.sub(r"\$\(POD_NAME\)", "pod-0", arg) for arg in args]
        said = self.run(self.cohort, *args, "--help")
        self.check(said.returncode == 0, f"{label}: cohort {' '.join(args)}: {said.stderr}")

    # ---- alerts and dashboards ----

    def metrics(self):
        """Alerts and dashboards ask only for metrics that are there; every alert is in the operations page."""
        known = set()
        for file in GOLDEN_METRICS:
            for line in file.read_text().splitlines():
                name, kind = line.split(" ")
                known |= {"counter": {f"{name}_total"}, "gauge": {name}, "histogram": {f"{name}_bucket", f"{name}_sum", f"{name}_count"}}[kind]
        rules = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"]
        alerts = [rule for group in rules for rule in group["rules"]]
        queries = [(rule["alert"], rule["expr"]) for rule in alerts]
        for file in sorted((CHART / "files").glob("dashboard-*.json")):
            for panel in json.loads(file.read_text())["panels"]:
                queries += [(f"{file.name}: {panel['title']}", target["expr"]) for target in panel["targets"]]
        for where, query in queries:
            asked = set(re.findall(r"\b(?:vllm:|cohort_|http_requests)\w+", query))
            self.check(asked and asked <= known, f"{where}: no process has {sorted(asked - known)}")
        page = (CHART.parent.parent / "docs" / "operations.md").read_text()
        for rule in alerts:
            self.check(f"`{rule['alert']}`" in page, f"docs/operations.md does not say what to do about {rule['alert']}")
        for name in (line.split(" ")[0] for file in GOLDEN_METRICS for line in file.read_text().splitlines()):
            self.check(f"`{name}`" in page, f"docs/operations.md does not explain {name}")

    # ---- refused ----

    def bad(self, case):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "values.yaml"
            file.write_text(yaml.safe_dump(case["values"]))
            said = self.template("-f", file)
        self.check(said.returncode != 0, f"{case['values']} was not refused")
        for part in case["says"]:
            self.check(part in said.stderr, f"{case['values']}: the refusal does not say `{part}`: {said.stderr}")


def allow_null(schema):
    """Every key may be null, which for helm means: as if it were not there."""
    for inner in schema.get("properties", {}).values():
        allow_null(inner)
        if "enum" in inner:
            inner["enum"].append(None)
            inner.pop("type", None)
        elif isinstance(inner.get("type"), str):
            inner["type"] = [inner["type"], "null"]


def templates(objects):
    """Every pod template, with the name of what it belongs to."""
    for thing in objects:
        owner = f"{thing['kind']} {thing['metadata']['name']}"
        if thing["kind"] in ("Deployment", "StatefulSet"):
            yield owner, thing["spec"]["template"]
        if thing["kind"] == "LeaderWorkerSet":
            inside = thing["spec"]["leaderWorkerTemplate"]
            yield f"{owner} leader", inside["leaderTemplate"]
            yield f"{owner} worker", inside["workerTemplate"]


def drain(objects, part):
    """How long the configuration lets a pod of this part go on."""
    config = next(yaml.safe_load(o["data"]["cluster.yaml"]) for o in objects if o["kind"] == "ConfigMap" and "cluster.yaml" in o["data"])
    section = config.get(part) or {}
    return (section.get("withdraw_grace_s") or 0) + (section.get("drain_grace_s") or 10)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--helm", default=shutil.which("helm") or "helm")
    parser.add_argument("--cohort", type=pathlib.Path, required=True)
    parser.add_argument("--write", action="store_true")
    checks = Checks(parser.parse_args())
    checks.schema()
    checks.metrics()
    sets = sorted((HERE / "values").glob("*.yaml"))
    for path in sets:
        checks.values(path)
    stale = {path.stem for path in (HERE / "golden").glob("*.yaml")} - {path.stem for path in sets}
    checks.check(not stale, f"goldens without values: {sorted(stale)}")
    bad = yaml.safe_load((HERE / "bad_values.yaml").read_text())
    for case in bad:
        checks.bad(case)
    for failure in checks.failures:
        print(failure, file=sys.stderr)
    print(f"{len(sets)} sets of values, {len(bad)} wrong ones: {checks.passed} checks passed, {len(checks.failures)} failed")
    return 1 if checks.failures else 0


if __name__ == "__main__":
    sys.exit(main())
