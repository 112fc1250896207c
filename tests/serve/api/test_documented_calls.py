"""Every curl line of docs/serving.md is answered as the page says."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "serving.md"


def _commands() -> list[str]:
    """Return the curl commands of the page's bash blocks, each as one line."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.startswith("curl ")]


@pytest.mark.slow
@pytest.mark.parametrize("command", _commands())
def test_a_call_of_the_page_is_answered(served, command):
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    command = command.replace("127.0.0.1:8000", f"127.0.0.1:{served.port}")
    done = subprocess.run(
        command + " -sS --fail-with-body", shell=True, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "stream" in command:
        assert done.stdout.endswith("data: [DONE]\n\n")
    else:
        assert "error" not in json.loads(done.stdout)


def test_the_page_has_calls():
    paths = {re.search(r":8000(/\S*)", command)[1] for command in _commands()}
    assert {"/v1/completions", "/v1/chat/completions", "/v1/rank", "/v1/rerank"} <= paths
