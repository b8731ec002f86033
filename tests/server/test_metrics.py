"""`/metrics`, against what clients saw."""

import asyncio
import json
import re
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from support.models import loaded, prompts_of, tiny_model
from vattention import AsyncLLM, SamplingParams
from vattention.engine.loading import LoadedModel
from vattention.server.metrics import add_metrics

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(tiny_model())


def open_llm(model: LoadedModel, **options: Any) -> AsyncLLM:
    usual = {"max_num_seqs": 4, "kv_cache_memory": "4MiB", "max_model_len": 256, "compile": False}
    return AsyncLLM(model, **{**usual, **options})


def new_app(llm: AsyncLLM) -> FastAPI:
    app = FastAPI()

    @app.get("/items/{item}")
    async def item(item: str) -> dict[str, str]:
        return {"item": item}

    add_metrics(app, llm, model_name="tiny")
    return app


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def scrape(client: httpx.AsyncClient) -> Samples:
    response = await client.get("/metrics")
    assert response.status_code == 200
    return {
        (sample.name, frozenset((k, v) for k, v in sample.labels.items() if k != "model_name")): sample.value
        for family in parse(response.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples["vattention:" + name, frozenset(labels.items())]


async def read(llm: AsyncLLM, prompt: Any, params: SamplingParams) -> Any:
    outputs = [output async for output in llm.generate({"prompt_token_ids": list(prompt)}, params)]
    return outputs[-1]


def params(tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1, **more)


def test_counters_add_up_to_what_clients_saw(model):
    async def main() -> None:
        async with open_llm(model) as llm, client_of(new_app(llm)) as client:
            wanted = [params(3), params(9), params(1), params(6, n=3), params(4)]
            prompts = prompts_of(10, 20, 7, 100, 3)
            outputs = await asyncio.gather(*map(read, [llm] * 5, prompts, wanted))
            samples = await scrape(client)
            tokens = [len(choice.token_ids) for output in outputs for choice in output.outputs]
            assert value(samples, "generation_tokens_total") == sum(tokens) == 35
            assert value(samples, "prompt_tokens_total") == 140
            assert value(samples, "request_success_total", finished_reason="length") == len(tokens)
            assert value(samples, "request_success_total", finished_reason="abort") == 0
            for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
                assert value(samples, name + "_count") == len(outputs)
                assert value(samples, name + "_bucket", le="+Inf") == len(outputs)
            assert value(samples, "inter_token_latency_seconds_count") == sum(tokens) - len(tokens)
            assert value(samples, "request_generation_tokens_sum") == sum(tokens)
            assert value(samples, "request_generation_tokens_bucket", le="5.0") == sum(n <= 5 for n in tokens)
            first = sum(output.metrics.time_to_first_token for output in outputs)
            assert value(samples, "time_to_first_token_seconds_sum") == pytest.approx(first)
            assert value(samples, "num_requests_running") == value(samples, "num_requests_waiting") == 0
            assert value(samples, "kv_cache_needed_bytes") == value(samples, "kv_cache_usage_perc") == 0

    asyncio.run(main())


def test_memory_and_who_runs_are_those_of_the_engine(model):
    async def main() -> None:
        async with open_llm(model, max_num_seqs=2, page_size=4096) as llm, client_of(new_app(llm)) as client:
            endless = SamplingParams(max_tokens=None, ignore_eos=True, seed=1, n=2)
            prompt = {"prompt_token_ids": list(prompts_of(100)[0])}
            async with aclosing(llm.generate(prompt, endless)) as one, aclosing(llm.generate(prompt, endless)) as two:
                await anext(one)
                waiting = asyncio.ensure_future(anext(two))
                await asyncio.sleep(0)
                while value(samples := await scrape(client), "num_requests_waiting") != 1:
                    pass
                assert value(samples, "num_requests_running") == value(samples, "kv_cache_live_slots") == 2
                needed, mapped = (value(samples, f"kv_cache_{name}_bytes") for name in ("needed", "mapped"))
                assert mapped - needed == value(samples, "kv_cache_wasted_bytes") >= 0
                assert value(samples, "kv_cache_shared_bytes") > 0
                assert 0 < value(samples, "kv_cache_usage_perc") < 1
                assert 0 < value(samples, "mappings") < value(samples, "mappings_limit")
                assert value(samples, "driver_calls_total", verb="map") > 0
                assert value(samples, "driver_seconds_total") > 0
                waiting.cancel()
                await asyncio.wait([waiting])
            samples = await scrape(client)
            assert value(samples, "kv_cache_live_slots") == 0
            assert value(samples, "request_success_total", finished_reason="abort") >= 2

    asyncio.run(main())


def test_http_requests_are_counted_by_route_and_never_by_what_a_client_made_up(model):
    async def main() -> None:
        async with open_llm(model) as llm, client_of(new_app(llm)) as client:
            for path in ("/items/1", "/items/2", "/made/up", "/made/up/too"):
                await client.get(path)
            await client.request("BREW", "/items/1")
            samples = await scrape(client)
            assert value(samples, "http_requests_total", method="GET", route="/items/{item}", status="200") == 2
            assert value(samples, "http_requests_total", method="GET", route="other", status="404") == 2
            routes = {dict(labels)["route"] for name, labels in samples if name == "vattention:http_requests_total"}
            methods = {dict(labels)["method"] for name, labels in samples if name == "vattention:http_requests_total"}
            assert routes == {"/items/{item}", "other"}
            assert methods == {"GET", "other"}
            samples = await scrape(client)
            assert value(samples, "http_requests_total", method="GET", route="/metrics", status="200") == 1

    asyncio.run(main())


def test_both_formats_parse_and_all_metrics_of_the_engine_name_the_model(model):
    async def main() -> None:
        async with open_llm(model) as llm, client_of(new_app(llm)) as client:
            await read(llm, (1, 2, 3), params(2))
            plain = await client.get("/metrics")
            assert plain.headers["content-type"].startswith("text/plain")
            openmetrics = await client.get(
                "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
            )
            assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
            names = {family.name for family in parse(plain.text)}
            assert names <= {family.name for family in parse_openmetrics(openmetrics.text)} | {"process_cpu_seconds"}
            for family in parse(plain.text):
                if family.name.startswith("vattention:") and "http" not in family.name:
                    assert family.documentation
                    assert all(sample.labels["model_name"] == "tiny" for sample in family.samples)

    asyncio.run(main())


def test_two_applications_do_not_mix(model):
    async def main() -> None:
        async with (
            open_llm(model) as one,
            open_llm(model) as two,
            client_of(new_app(one)) as first,
            client_of(new_app(two)) as second,
        ):
            await read(one, (1, 2, 3), params(2))
            assert value(await scrape(first), "generation_tokens_total") == 2
            assert value(await scrape(second), "generation_tokens_total") == 0

    asyncio.run(main())


def test_an_engine_that_has_stopped_is_seen(model):
    async def main() -> None:
        async with open_llm(model) as llm, client_of(new_app(llm)) as client:
            assert value(await scrape(client), "engine_up") == 1
            await asyncio.to_thread(llm.close)
            samples = await scrape(client)
            assert value(samples, "engine_up") == 0
            assert ("vattention:num_requests_running", frozenset()) not in samples
            assert value(samples, "http_requests_total", method="GET", route="/metrics", status="200") == 1

    asyncio.run(main())


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(model) -> set[str]:
    """The names of all samples of a server that has done something."""

    async def main() -> set[str]:
        async with open_llm(model) as llm, client_of(new_app(llm)) as client:
            await client.get("/items/1")
            await read(llm, (1, 2, 3), params(2))
            return {name for name, _ in await scrape(client)}

    return asyncio.run(main())


def test_every_query_of_the_grafana_dashboard_asks_for_a_metric_there_is(exported):
    dashboard = json.loads((ROOT / "deploy/grafana/vattention.json").read_text("utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"\bvattention:\w+", query)}
    assert len(panels) >= 10
    assert all("vattention:" in query for query in queries)
    assert asked <= exported, f"not exported: {sorted(asked - exported)}"
    labels = {label for query in queries for label in re.findall(r"(?:by \(|[{,]\s*)(\w+)\s*(?:=|\))", query)}
    assert labels <= {"model_name", "le", "finished_reason", "route", "status", "method", "verb", "kind", "state"}


def test_the_guide_names_every_metric_and_no_other(exported):
    guide = (ROOT / "docs/server.md").read_text("utf-8").partition("### Metrics")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in guide.splitlines() if line.startswith("| `")]
    named = {re.sub(r"{.*", "", name) for row in rows for name in re.findall(r"`([^`]+)`", row)}
    ours = {name.removeprefix("vattention:") for name in exported if name.startswith("vattention:")}
    assert named == {re.sub(r"_(bucket|sum|count)$", "", name) for name in ours if not name.endswith("_created")}


def test_a_server_counts_what_its_clients_are_told(tiny_server):
    def told() -> dict[str, int]:
        usages = [
            httpx.post(
                f"{tiny_server}/v1/completions",
                json={"model": "tiny", "prompt": "Once upon a time", "max_tokens": 4, "n": n, "seed": 1},
                timeout=60,
            ).json()["usage"]
            for n in (1, 2)
        ]
        return {name: sum(usage[name] for usage in usages) for name in ("prompt_tokens", "completion_tokens")}

    def counted() -> dict[str, float]:
        samples = {
            (sample.name, sample.labels.get("route"), sample.labels.get("status")): sample.value
            for family in parse(httpx.get(f"{tiny_server}/metrics").text)
            for sample in family.samples
        }
        return {
            "prompt_tokens": samples["vattention:prompt_tokens_total", None, None],
            "completion_tokens": samples["vattention:generation_tokens_total", None, None],
            "answers": samples.get(("vattention:http_requests_total", "/v1/completions", "200"), 0),
        }

    before = counted()
    answers = told()
    assert answers["completion_tokens"] > 0
    after = counted()
    assert {name: after[name] - before[name] for name in before} == {**answers, "answers": 2}
