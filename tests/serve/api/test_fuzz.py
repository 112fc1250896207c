"""Fuzz the server from its own OpenAPI document: no answer is a 500, none hangs.

SCHEMATHESIS names the command of an environment that has it; skipped without one. FUZZ_EXAMPLES
sets the examples of each route.
"""

import os
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.slow
COMMAND = os.environ.get("SCHEMATHESIS") or shutil.which("schemathesis")
EXAMPLES = os.environ.get("FUZZ_EXAMPLES", "25")
# Not: positive_data_acceptance, as the document does not know the limits of the model.
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_headers_conformance", "response_schema_conformance"),
    *("unsupported_method", "allow_header_conformance"),
)
SECONDS = 60  # in which every answer must come


def test_every_answer_is_as_the_document_says(live, tmp_path):
    if COMMAND is None:
        pytest.skip("no schemathesis; name one in SCHEMATHESIS")
    done = subprocess.run(
        [
            *(COMMAND, "run", f"http://127.0.0.1:{live.port}/openapi.json"),
            *("--checks", ",".join(CHECKS), "--max-examples", EXAMPLES),
            *("--request-timeout", str(SECONDS), "--seed", "1", "--no-color"),
            *("--phases", "examples,coverage,fuzzing", "--generation-database", "none"),
            "--continue-on-failure",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    # It was not answered with errors alone.
    numbers = live.ask("GET", "/metrics")[2].decode()
    assert 'route="/v1/completions",status="200"' in numbers
