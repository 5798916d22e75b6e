#!/usr/bin/env python3
"""Checks that the binary takes what the compose file and the systemd units start it with, and that systemd takes them.

    deploy.py --cohort target/release/cohort
"""

import argparse
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile

import yaml

DEPLOY = pathlib.Path(__file__).resolve().parent.parent.parent / "deploy"


def run(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def starts(cohort, args, what):
    """All arguments before --help are read first."""
    said = run(cohort, *args, "--help")
    return [] if said.returncode == 0 else [f"{what}: cohort {' '.join(args)}: {said.stderr}"]


def seconds(text):
    assert text.endswith("s"), text
    return float(text[:-1])


def compose(cohort):
    file = DEPLOY / "compose" / "compose.yaml"
    failures, every = [], yaml.safe_load(file.read_text())["services"]
    for name, service in every.items():
        for volume in service.get("volumes", []):
            host = volume.split(":")[0]
            if host.startswith(".") and not (file.parent / host).exists():
                failures.append(f"compose.yaml: {name} mounts {host}, which is not there")
    services = {name: service for name, service in every.items() if "COHORT_IMAGE" in service["image"]}
    said = run(cohort, "config", "check", f"--config={DEPLOY / 'compose' / 'cluster.yaml'}")
    if said.returncode != 0:
        failures.append(f"compose/cluster.yaml: {said.stderr}")
    config = yaml.safe_load((DEPLOY / "compose" / "cluster.yaml").read_text())
    for name, service in services.items():
        failures += starts(cohort, service["command"], f"compose.yaml: {name}")
        section = config[service["command"][0]]
        grace = section.get("withdraw_grace_s", 0) + section["drain_grace_s"]
        if seconds(service["stop_grace_period"]) <= grace:
            failures.append(f"compose.yaml: {name} is killed before it has drained")
        if not service["read_only"] or service["cap_drop"] != ["ALL"]:
            failures.append(f"compose.yaml: {name} is not locked down")
    # The router finds the groups by a name that all of them have.
    for name, service in services.items():
        aliases = service.get("networks", {}).get("default", {}).get("aliases", [])
        if name.startswith("group-") != (aliases == ["groups"]):
            failures.append(f"compose.yaml: {name} has the names {aliases}")
    if config["router"]["workers"] != ["dns+http://groups:50052"]:
        failures.append("compose/cluster.yaml: router.workers is not the name of the groups")
    scraped = yaml.safe_load((file.parent / "prometheus.yaml").read_text())["scrape_configs"]
    targets = {target for job in scraped for static in job["static_configs"] for target in static["targets"]}
    port = config["group"]["metrics_listen"].rsplit(":", 1)[1]
    expected = {f"{name}:{8080 if name == 'router' else port}" for name in services}
    if targets != expected:
        failures.append(f"compose/prometheus.yaml: scrapes {sorted(targets)}, not {sorted(expected)}")
    return failures + traces(file, every, config)


def traces(file, services, config):
    """Spans go to the collector, and from there to Jaeger."""
    endpoint = config["telemetry"]["otlp_endpoint"]
    collector = yaml.safe_load((file.parent / "collector.yaml").read_text())
    listens = collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rsplit(":", 1)[1]
    failures = []
    if endpoint != f"http://collector:{listens}" or "collector" not in services:
        failures.append(f"compose/cluster.yaml: telemetry.otlp_endpoint, {endpoint}, is not the collector's, port {listens}")
    to = collector["exporters"]["otlp"]["endpoint"].split(":")[0]
    if to not in services:
        failures.append(f"compose/collector.yaml: there is no {to}")
    used = {part for pipeline in collector["service"]["pipelines"].values() for parts in pipeline.values() for part in parts}
    known = {part for kind in ("receivers", "processors", "exporters") for part in collector[kind]}
    if used != known:
        failures.append(f"compose/collector.yaml: defines {sorted(known)} and uses {sorted(used)}")
    return failures


def rules():
    """Each alert is tried, fires when it should and, as far as promtool is on this machine, does not when it should not."""
    tests = pathlib.Path(__file__).resolve().parent / "alerts_test.yaml"
    tried = {}
    for test in yaml.safe_load(tests.read_text())["tests"]:
        for one in test["alert_rule_test"]:
            tried[one["alertname"]] = tried.get(one["alertname"], False) or bool(one["exp_alerts"])
    file = DEPLOY.parent / "helm" / "cohort" / "files" / "alerts.yaml"
    alerts = {rule["alert"] for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]}
    failures = [f"alerts_test.yaml: {name} never fires" for name in sorted(alerts) if not tried.get(name)]
    promtool = shutil.which("promtool")
    if promtool is None:
        print("promtool is not on this machine: the alerts are not tried")
        return failures
    for command in (("check", "rules", file), ("test", "rules", tests)):
        said = run(promtool, *command)
        if said.returncode != 0:
            failures.append(f"promtool {' '.join(command[:2])}: {said.stdout}{said.stderr}")
    return failures


def units(cohort):
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        copies = []
        for unit in sorted((DEPLOY / "systemd").glob("*.service")):
            text = unit.read_text()
            line = next(line for line in text.splitlines() if line.startswith("ExecStart="))
            program, *args = shlex.split(line.removeprefix("ExecStart=").replace("${LISTEN}", "0.0.0.0:50052"))
            failures += starts(cohort, args, unit.name)
            # systemd wants the program to be there.
            copy = pathlib.Path(folder) / unit.name.replace("@.", "@a.")
            copy.write_text(text.replace(program, str(cohort.resolve())))
            copies.append(copy)
        if not copies:
            failures.append("no systemd units")
        if shutil.which("systemd-analyze") is None:
            print("systemd-analyze is not on this machine: the units are not verified")
            return failures
        said = run("systemd-analyze", "verify", "--man=no", *copies)
        if said.returncode != 0 or said.stderr.strip():
            failures.append(f"systemd-analyze verify: {said.stderr}")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", type=pathlib.Path, required=True)
    cohort = parser.parse_args().cohort
    failures = compose(cohort) + rules() + units(cohort)
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"compose file, alerts and systemd units: {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
