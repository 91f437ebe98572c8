"""What `make demo` runs, to its end: the promise of the README's first command."""

import json
import re
import subprocess
import sys

import pytest


@pytest.mark.long
def test_the_demo_trains_googlenet_to_97_percent_on_real_digits(repo_root, tmp_path):
    makefile = (repo_root / "Makefile").read_text()
    args = re.search(r"^DEMO_ARGS \?= (.*)$", makefile, re.MULTILINE)
    assert args is not None
    assert "$(BIN)/distbelief launch $(DEMO_ARGS)" in makefile
    command = [sys.executable, "-m", "distbelief", "launch", *args[1].split(), "--json"]
    ran = subprocess.run(
        [*command, "--run-dir", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert (result["exit"], result["engine"], result["shards"]) == ("done", "ray", 2)
    assert result["workers"] >= 2
    assert result["eval"]["top1"] >= 0.97
