"""`distbelief cluster`: bring machines up for runs, look at them, take them down again."""

import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distbelief.commands.run_argument import json_line
from distbelief.problem import Problem

if TYPE_CHECKING:
    from distbelief.cluster.document import Document
    from distbelief.cluster.inspection import Inspection
    from distbelief.cluster.plan import Plan

RAY_DASHBOARD = 8265
COLORS = {"error": "red", "unsafe": "red", "todo": "yellow", "warning": "yellow"}
_LINK = re.compile(r"http://127\.0\.0\.1:(\d+)(/\S*)")

file_argument = click.argument("file", type=click.Path(path_type=Path))
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
port = click.IntRange(1, 65535)


@click.group("cluster", short_help="Bring machines up for runs, and down again.")
def cluster_group() -> None:
    """Bring machines up for runs, look at them, take them down again.

    A FILE is one of Ray's cluster launcher; deploy/ray/ has some to start from. What is started
    there is started by `ray up`, over SSH or a cloud's interface.
    """


@cluster_group.command("check", short_help="Say what is wrong with files of a cluster.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--crd",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="A folder with KubeRay's CRDs: manifests are held against them too.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def check_command(files: tuple[Path, ...], crd: Path | None, as_json: bool) -> None:
    """Say what is wrong with FILES: of Ray's cluster launcher, or KubeRay's manifests.

    Nothing is started or asked over a network. Exit code 0 or 2; places to be filled in are no
    mistakes.

    \b
    Examples:
      distbelief cluster check deploy/ray/*.yaml
      distbelief cluster check deploy/kuberay/rayjob.yaml --crd kuberay/config/crd/bases
    """
    from distbelief.cluster.crd import Crds
    from distbelief.cluster.finding import REFUSED
    from distbelief.cluster.inspection import inspect

    try:
        crds = None if crd is None else Crds(crd)
    except ValueError as error:
        raise Problem(
            "DB-CLUSTER-009", str(error), fix="--crd: KubeRay's config/crd/bases"
        ) from error
    inspections = [inspect(file, crds) for file in files]
    findings = [finding for one in inspections for finding in one.findings]
    is_wrong = any(finding.level in REFUSED for finding in findings)
    if as_json:
        told = [dataclasses.asdict(finding) | {"where": finding.where} for finding in findings]
        click.echo(json_line("check", files=[str(file) for file in files], findings=told))
    else:
        for one in inspections:
            _show(one, with_crds=crds is not None)
    if is_wrong:
        sys.exit(2)


@cluster_group.command("up", short_help="Start the machines of a file.")
@file_argument
@yes_option
@click.option("--insecure", is_flag=True, help="Also where others could get in.")
def up_command(file: Path, yes: bool, insecure: bool) -> None:
    """Check FILE, show what it starts, ask, and start it with `ray up`.

    On a cluster that is up already it brings in what has changed; Ray starts anew, and ends what
    runs.

    \b
    Example:
      distbelief cluster up deploy/ray/onprem.yaml
    """
    from distbelief.cluster.plan import plan_of
    from distbelief.cluster.remote import run_ray
    from distbelief.cluster.token_file import ensure, token_file_of

    inspection = _inspect(file, asks_ray=True)
    _refuse(inspection, insecure=insecure)
    plan = plan_of(inspection.cluster)
    for line in plan.lines:
        click.echo(line)
    _ask(yes, f"Start {plan.name}?")
    token = token_file_of(inspection.cluster)
    if token is not None and ensure(token):
        click.echo(f"made {token}, the token of this cluster", err=True)
    run_ray("up", "-y", "--no-config-cache", str(file))
    _say_next(file, plan)


@cluster_group.command("down", short_help="End the machines of a file.")
@file_argument
@yes_option
def down_command(file: Path, yes: bool) -> None:
    """End all that `up` has started, and look that nothing is left.

    Machines of a cloud are deleted. On those of provider local every Ray is ended, and it is said
    of each whether a process of it is left.

    \b
    Example:
      distbelief cluster down deploy/ray/onprem.yaml
    """
    from distbelief.cluster.cluster_file import provider_of
    from distbelief.cluster.remote import hosts_of, run_ray, stop_all

    document = _inspect(file).cluster
    name = document.data.get("cluster_name")
    is_local = provider_of(document).get("type") == "local"
    what = f"Ray on {', '.join(hosts_of(document))}" if is_local else "all its machines"
    _ask(yes, f"End {name}: {what}, and what runs there?")
    failed: Problem | None = None
    try:
        run_ray("down", "-y", str(file))
    except Problem as problem:
        if not is_local:
            raise
        failed = problem  # the hosts are there all the same, and so may be what runs on them
    if not is_local:
        click.echo(f"{name} is down; your cloud's console shows what you still pay for")
        return
    reports = stop_all(document)
    for report in reports:
        click.echo(report.text)
    odd = [report.address for report in reports if not report.is_clean]
    if odd:
        raise Problem(
            "DB-CLUSTER-006",
            f"something may be left on {', '.join(odd)}",
            fix="look there, `distbelief cluster ssh FILE --host ADDRESS`: ray stop --force",
        )
    if failed is not None:
        click.echo(f"ray down itself failed: {failed.what}", err=True)


@cluster_group.command("status", short_help="Say which machines are there and how busy they are.")
@file_argument
def status_command(file: Path) -> None:
    """Print what `ray status` says on the head: nodes, resources, what is waited for.

    \b
    Example:
      distbelief cluster status deploy/ray/onprem.yaml
    """
    from distbelief.cluster.cluster_file import TOKEN_MODE
    from distbelief.cluster.remote import ask_head

    document = _inspect(file).cluster
    click.echo(ask_head(document, file, f"{TOKEN_MODE} ray status").strip())


@cluster_group.command("dashboard", short_help="Bring a dashboard here through SSH.")
@file_argument
@click.argument("run", required=False)
@click.option("--port", "remote_port", type=port, metavar="N", help="The port on the head.")
@click.option("--local-port", type=port, metavar="N", help="Here; by default the same.")
def dashboard_command(
    file: Path, run: str | None, remote_port: int | None, local_port: int | None
) -> None:
    """Bring a dashboard of the cluster to this machine's loopback, until Ctrl-C.

    Without RUN and --port it is Ray's. With RUN, its folder as it is called on the head, it is that
    of a run which goes on there; with --port whatever listens on that port of the head's loopback.

    \b
    Examples:
      distbelief cluster dashboard deploy/ray/onprem.yaml
      distbelief cluster dashboard deploy/ray/onprem.yaml runs/20261130-081500-7f3a
    """
    from distbelief.cluster.remote import forward, run_until_interrupted, see_free

    document = _inspect(file).cluster
    rest = "/"
    if run is not None:
        remote_port, rest = _link_of(document, file, run)
    there = remote_port or RAY_DASHBOARD
    here = local_port or there
    see_free(here)
    command = forward(document, file, there, here)
    click.echo(f"http://127.0.0.1:{here}{rest}")
    if run is None and there == RAY_DASHBOARD:
        click.echo("it asks for the token in ~/.ray/auth_token", err=True)
    click.echo("Ctrl-C ends it", err=True)
    run_until_interrupted(command)


@cluster_group.command("ssh", short_help="Log in to the head, or run a command on it.")
@file_argument
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--host", metavar="ADDRESS", help="Of provider local: another host.")
def login_command(file: Path, command: tuple[str, ...], host: str | None) -> None:
    """Log in to the head as FILE says; with COMMAND run that there, in a login shell.

    \b
    Examples:
      distbelief cluster ssh deploy/ray/aws.yaml
      distbelief cluster ssh deploy/ray/aws.yaml -- distbelief runs ls
    """
    from distbelief.cluster.remote import environment

    words = _login(file, command, host)
    sys.exit(subprocess.run(words, env=environment(), check=False).returncode)


def _login(file: Path, command: Sequence[str], host: str | None) -> list[str]:
    from distbelief.cluster.cluster_file import provider_of
    from distbelief.cluster.remote import hosts_of, login_shell, ray_command, ssh_command

    document = _inspect(file).cluster
    if provider_of(document).get("type") == "local":
        hosts = hosts_of(document)
        if host is not None and host not in hosts:
            raise click.BadParameter(f"{host} is none of {', '.join(hosts)}", param_hint="--host")
        shell = [login_shell(shlex.join(command))] if command else []
        return ssh_command(document, host or hosts[0], *shell)
    if host is not None:
        raise click.BadParameter("only of provider local", param_hint="--host")
    if command:
        return ray_command("exec", "--no-config-cache", str(file), shlex.join(command))
    return ray_command("attach", "--no-config-cache", str(file))


def _link_of(document: "Document", file: Path, run: str) -> tuple[int, str]:
    """Port and path of the dashboard of a run that goes on on the head."""
    from distbelief.cluster.remote import ask_head

    # `timeout`: of a run that has ended the command serves until it is ended.
    command = f"timeout 30 distbelief dashboard {shlex.quote(run)}"
    match = _LINK.search(ask_head(document, file, command))
    if match is None:
        raise Problem(
            "DB-CLUSTER-005", f"the head knows no link of {run}", fix="distbelief cluster ssh FILE"
        )
    return int(match[1]), match[2]


def _inspect(file: Path, *, asks_ray: bool = False) -> "Inspection":
    """Of a file that can be started. Raises: Problem of one that is not Ray's, or not YAML."""
    from distbelief.cluster.cluster_file import provider_of
    from distbelief.cluster.inspection import inspect

    inspection = inspect(file, asks_ray=asks_ray)
    if inspection.kind == "kuberay":
        raise Problem(
            "DB-CLUSTER-003",
            f"{file} is for Kubernetes, whose own command starts it",
            fix=f"kubectl apply -f {file}",
        )
    if not inspection.documents or not provider_of(inspection.cluster):
        _refuse(inspection, insecure=True)
    return inspection


def _refuse(inspection: "Inspection", *, insecure: bool) -> None:
    """Raises: Problem if the file is not to be started."""
    found = [*inspection.of("error", "todo"), *([] if insecure else inspection.of("unsafe"))]
    if found:
        raise Problem(
            "DB-CLUSTER-001",
            f"{inspection.file} is not ready to be started",
            "\n".join(finding.text for finding in found),
            "mend these; `distbelief cluster check` looks again"
            + ("" if inspection.of("error", "todo") else ". To do it all the same: --insecure"),
        )
    for finding in inspection.of("unsafe", "warning"):
        click.echo(finding.text, err=True)


def _show(inspection: "Inspection", *, with_crds: bool) -> None:
    from distbelief.cluster.finding import REFUSED
    from distbelief.cluster.plan import plan_of, plan_of_manifest

    for finding in inspection.findings:
        place, level, rest = finding.text.split(": ", 2)
        click.echo(f"{place}: {click.style(level, fg=COLORS[level])}: {rest}")
    wrong, places = len(inspection.of(*REFUSED)), len(inspection.of("todo"))
    told = f"{wrong} mistake{'' if wrong == 1 else 's'}" if wrong else "no mistakes"
    told += f", {places} place{'' if places == 1 else 's'} to fill in" if places else ""
    if inspection.kind == "kuberay" and not with_crds:
        told += "; without --crd only our own checks"
    click.echo(f"{inspection.file}: {told}")
    if wrong:
        return
    plans = (
        [plan_of(inspection.cluster)]
        if inspection.kind == "ray"
        else [plan for one in inspection.documents if (plan := plan_of_manifest(one))]
    )
    for plan in plans:
        for line in plan.lines:
            click.echo(f"  {line}")


def _ask(yes: bool, question: str) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise Problem(
            "DB-CLUSTER-004",
            f"nobody can be asked: {question} There is no terminal",
            fix="if you are sure: --yes",
        )
    click.confirm(question, abort=True)


def _say_next(file: Path, plan: "Plan") -> None:
    click.echo(
        f"\nthe head of {plan.name} is up; the others follow within a minute or two\n"
        f"  distbelief cluster status {file}      which are there\n"
        f"  distbelief cluster ssh {file}         there: distbelief launch --address auto ...\n"
        f"  distbelief cluster dashboard {file}   Ray's dashboard, here\n"
        f"  distbelief cluster down {file}        end it all"
    )
