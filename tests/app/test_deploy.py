"""What lies in deploy/ beside files of clusters: read, as nothing here can run it."""

import re
from importlib.resources import files

import pytest
import yaml


@pytest.fixture(scope="module")
def dockerfile(repo_root) -> list[str]:
    """Its instructions, one a line."""
    text = (repo_root / "deploy/docker/Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_image_runs_as_nobody_special(dockerfile):
    users = [line.split()[1] for line in dockerfile if line.startswith("USER ")]
    assert users == ["1000:1000"]
    last = max(i for i, line in enumerate(dockerfile) if line.startswith("FROM "))
    assert any(line.startswith("USER ") for line in dockerfile[last:])


def test_the_image_copies_what_there_is_and_all_that_is_a_package(repo_root, dockerfile):
    copied = {
        name
        for line in dockerfile
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    assert all((repo_root / name).exists() for name in copied)
    assert {"distbelief", "model", "param_server", "workers", "constraints.txt"} <= copied
    ignored = (repo_root / "deploy/docker/Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied


def test_the_image_has_versions_of_its_own(dockerfile):
    text = "\n".join(dockerfile)
    assert ":latest" not in text
    assert "-c constraints.txt" in text
    assert 'pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"' in text


def test_the_files_for_prometheus_and_grafana_ask_the_loopback(repo_root):
    told = yaml.safe_load((repo_root / "deploy/prometheus/prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in told["scrape_configs"]}
    assert jobs["distbelief"]["static_configs"] == [{"targets": ["127.0.0.1:8787"]}]
    assert "credentials_file" in jobs["distbelief"]["authorization"]
    assert jobs["ray"]["http_sd_configs"][0]["url"].startswith("http://127.0.0.1:8265/")
    (rules,) = told["rule_files"]
    assert (files("distbelief.monitor") / "observability" / rules).is_file()
    sources = yaml.safe_load((repo_root / "deploy/grafana/datasource.yaml").read_text())
    assert sources["datasources"][0]["url"] == "http://127.0.0.1:9090"
    boards = yaml.safe_load((repo_root / "deploy/grafana/dashboards.yaml").read_text())
    assert boards["providers"][0]["type"] == "file"


def test_the_readme_names_every_file(repo_root):
    text = (repo_root / "deploy/README.md").read_text()
    for path in (repo_root / "deploy").rglob("*.*"):
        name = path.relative_to(repo_root / "deploy")
        if path.suffix in (".yaml", ".yml"):
            assert str(name) in text or f"{name.parts[0]}/`" in text, name
