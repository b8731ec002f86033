"""Requests that schemathesis draws from our OpenAPI document: no 5xx, no crash, and answers match the document.

`VATTENTION_SCHEMA_EXAMPLES=1000 python -m pytest tests/server/test_schema.py` is the longer form: so many requests an
endpoint, where the short one sends the few below.
"""

import os
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from support.server_process import PATIENCE, Server

EXAMPLES = int(os.environ.get("VATTENTION_SCHEMA_EXAMPLES", "12"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


OPERATIONS = (
    *("POST /v1/completions", "POST /v1/chat/completions", "POST /v1/responses", "POST /v1/embeddings"),
    *("POST /tokenize", "POST /detokenize", "GET /v1/models", "GET /v1/models/{model}"),
    *("GET /health", "GET /ready", "GET /version"),
)


@pytest.fixture(scope="session")
def operations(shared_server: Server) -> dict[str, Any]:
    """What the document of a running server lists."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{shared_server.port}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return {operation.label: operation for operation in found}


def test_every_endpoint_is_asked(operations: dict[str, Any]) -> None:
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_what_the_document_allows(label: str, operations: dict[str, Any], shared_server: Server) -> None:
    asking(operations[label], GenerationMode.POSITIVE, shared_server)


# That of embeddings has no body to speak of, and what only reads has nothing to forbid.
@pytest.mark.parametrize("label", [label for label in OPERATIONS if label.startswith("POST ") and "embed" not in label])
def test_what_it_forbids(label: str, operations: dict[str, Any], shared_server: Server) -> None:
    asking(operations[label], GenerationMode.NEGATIVE, shared_server)


@pytest.mark.parametrize(
    ("label", "body"),
    [
        ("POST /v1/completions", {"prompt": "Hello", "max_tokens": 2}),
        ("POST /v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}),
        ("POST /v1/responses", {"input": "Hello", "max_output_tokens": 2}),
    ],
)
def test_an_answer_in_events_is_in_the_document(label: str, body: dict[str, Any], operations: dict[str, Any]) -> None:
    """What is drawn asks for a valid one too seldom for the shorter form."""
    case = operations[label].Case(body={**body, "stream": True}, media_type="application/json")
    response = case.call(timeout=PATIENCE)
    assert response.status_code == 200
    assert response.headers["content-type"] == ["text/event-stream; charset=utf-8"]
    case.validate_response(response, checks=CHECKS)


def asking(operation: Any, mode: GenerationMode, server: Server) -> None:
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    def ask(case: Any) -> None:
        response = case.call(timeout=PATIENCE)
        case.validate_response(response, checks=CHECKS)
        assert server.process.poll() is None

    ask()


def test_nothing_of_that_was_a_bug(shared_server: Server) -> None:
    assert not shared_server.events("internal error")
    assert "Traceback" not in shared_server.log
    status, _, _ = shared_server.ask("/v1/completions", {"model": "tiny", "prompt": "Hello", "max_tokens": 2})
    assert status == 200
