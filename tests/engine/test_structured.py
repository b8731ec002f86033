"""Answers that must have a form: schemas, regular expressions, grammars, choices."""

import copy
import json
import pickle
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import tokenizers
from support.models import engine_for, loaded, prompts_of, run, tiny_model
from support.schemas import nearly_schemas, schemas, valid
from vattention.engine import grammar as grammar_module
from vattention.engine.constraint import Constraint
from vattention.engine.engine import Engine
from vattention.engine.grammar import Grammars
from vattention.engine.loading import LoadedModel
from vattention.engine.regex_size import regex_size
from vattention.engine.request import Chunk, Request
from vattention.engine.sampling_params import SamplingParams
from vattention.engine.structured import StructuredOutput
from vattention.errors import InvalidRequest, VAttentionError

pytest.importorskip("llguidance")

KINDS = {"bytes": tokenizers.byte_level, "fallback": tokenizers.byte_fallback}
VOCABULARY = 300
"""More than any of the tokenizers has: a model's vocabulary is often padded."""

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return loaded(tiny_model(vocab_size=VOCABULARY), KINDS[request.param]())


@pytest.fixture(scope="module")
def by_bytes() -> LoadedModel:
    return loaded(tiny_model(vocab_size=VOCABULARY), tokenizers.byte_level())


def engine_of(model: LoadedModel, **options: Any) -> Engine:
    tokenizer = model.tokenizer
    return engine_for(model, tokenizer=tokenizer, **{"eos_token_ids": [tokenizer.eos_token_id], **options})


def asks(structured: StructuredOutput, **more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.5, "max_tokens": 200, "seed": 1, "structured": structured, **more})


def text_of(engine: Engine, request: Request) -> str:
    return engine.output(request).outputs[request.sample].text


def answer(engine: Engine, params: SamplingParams, prompt: Sequence[int] = (1, 2, 3)) -> Request:
    return run(engine, [prompt], params)[0]


# -- what may be asked for --------------------------------------------------------------------------------------------


def test_one_form_at_a_time() -> None:
    for none in ({}, {"json_object": False}, {"compact": True}):
        with pytest.raises(InvalidRequest, match="exactly one"):
            StructuredOutput(**none)
    with pytest.raises(InvalidRequest, match=r"exactly one.*'regex', 'choice'"):
        StructuredOutput(regex="a", choice=["b"])
    with pytest.raises(InvalidRequest, match="compact is about JSON"):
        StructuredOutput(regex="a", compact=True)


@pytest.mark.parametrize(
    ("form", "error", "says"),
    [
        ({"json_schema": 3}, TypeError, "mapping or JSON text"),
        ({"json_schema": "{"}, InvalidRequest, "not JSON"),
        ({"json_schema": "[1]"}, InvalidRequest, "JSON object"),
        ({"json_schema": {"const": float("nan")}}, InvalidRequest, "not JSON"),
        ({"json_schema": {"const": {1, 2}}}, TypeError, "serializable"),
        ({"json_schema": "[" * 100_000}, InvalidRequest, "too deep"),
        ({"json_schema": '{"not":' * 101 + "{}" + "}" * 101}, InvalidRequest, "too deep"),
        ({"json_schema": {"type": "integer", "multipleOf": 999_983}}, InvalidRequest, "multipleOf"),
        ({"json_schema": {"multipleOf": 10**20 + 1}}, InvalidRequest, "multipleOf"),
        ({"json_schema": '{"multipleOf": 1e999}'}, InvalidRequest, "not JSON"),
        ({"json_schema": '{"const": NaN}'}, InvalidRequest, "not JSON"),
        ({"json_schema": {"properties": {"a": {"pattern": "(a{1000}){1000}"}}}}, InvalidRequest, "too large"),
        ({"json_schema": {"anyOf": [{"patternProperties": {"a{60000}": {}}}]}}, InvalidRequest, "too large"),
        ({"json_schema": {"properties": {f"p{i}": {} for i in range(1001)}}}, InvalidRequest, "1000 properties"),
        ({"json_schema": {"description": "x" * 300_000}}, InvalidRequest, "262144 are the most"),
        ({"json_object": 1}, TypeError, "bool"),
        ({"json_object": True, "compact": 1}, TypeError, "bool"),
        ({"regex": 3}, TypeError, "str"),
        ({"regex": "a\ud800"}, InvalidRequest, "not Unicode"),
        ({"regex": "((a|b|c){500}){500}"}, InvalidRequest, "too large"),
        ({"grammar": "start: \ud800"}, InvalidRequest, "not Unicode"),
        ({"choice": "abc"}, TypeError, "sequence of strings"),
        ({"choice": [1]}, TypeError, "str"),
        ({"choice": []}, InvalidRequest, "at least one"),
        ({"choice": ["a", ""]}, InvalidRequest, "empty"),
    ],
)
def test_refused_before_anything_reads_it(form: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        StructuredOutput(**form)


def test_kept_as_values_that_do_not_change() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"b": {}, "a": {}}}
    form = StructuredOutput(json_schema=schema)
    schema["type"] = "array"
    assert form == StructuredOutput(json_schema='{"type": "object", "properties": {"b": {}, "a": {}}}')
    params = SamplingParams(structured=form)
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    assert hash(params.structured) == hash(form)
    with pytest.raises(TypeError, match="StructuredOutput"):
        SamplingParams(structured={"regex": "a"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("regex", "size"),
    [
        ("", 0),
        ("abc", 3),
        ("(a{10}b){5}", 55),
        (r"[^]a{9}]{3,7}\{2{4}", 7 + 2 + 3),
        ("a{3}{4}", 12),
        ("(a{1000}){1000}", 1_000_000),
        ("((a|b|c){500}){500}", 1_250_000),
        ("a{99999999999}", 10**9),
        ("a{2,}", 2),
        ("(((", 0),
        (")){5}[", 2 + 4 + 1),
        ("[[a]b]{4}", 4),
    ],
)
def test_size_of_regular_expressions(regex: str, size: int) -> None:
    assert regex_size(regex) == size


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab(){}[]^\\,0123456789*+?|"))
def test_size_of_anything(regex: str) -> None:
    assert 0 <= regex_size(regex) <= 10**9


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"json_schema": {"type": "strin"}}, "strin"),
        ({"json_schema": {"type": "string", "pattern": "(?=a)"}}, "look-around"),
        ({"json_schema": {"type": "string", "format": "nonesuch"}}, "nonesuch"),
        ({"json_schema": {"$ref": "http://example.org/x"}}, "example.org"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
        ({"json_schema": {"$ref": "#"}}, "."),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"grammar": 'begin: "a"'}, "start"),
        ({"grammar": 'start: "a" !!'}, "lexer error"),
        ({"grammar": 'start: start "a"'}, "no token"),
        ({"grammar": "start: A\nA: " + " & ".join(f"/(.|\\n)*a.{{{i}}}/" for i in range(2, 14))}, "fuel"),
    ],
)
def test_refused_by_check(by_bytes: LoadedModel, form: dict[str, Any], says: str) -> None:
    engine = engine_of(by_bytes)
    with pytest.raises(InvalidRequest, match=f"(?s){says}") as refused:
        engine.check([1], asks(StructuredOutput(**form)))
    assert "%" not in str(refused.value), "nothing of how we write it"
    assert engine.unfinished == 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=nearly_schemas())
def test_whatever_calls_itself_a_schema(by_bytes: LoadedModel, schema: dict[str, Any]) -> None:
    """It is refused, or there is a token that may come first."""
    tokenizer = by_bytes.tokenizer
    grammars = Grammars(tokenizer, VOCABULARY, [tokenizer.eos_token_id])
    with suppress(InvalidRequest):
        grammar = grammars.read(StructuredOutput(json_schema=schema))
        assert Constraint(grammar, [tokenizer.eos_token_id], 0).allowed([]).any()


def test_models_that_cannot(by_bytes: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    params = asks(StructuredOutput(regex="a"))
    with pytest.raises(InvalidRequest, match="without"):
        engine_for(by_bytes).check([1], params)
    with pytest.raises(InvalidRequest, match=r"tokenizer: .*WordPiece"):
        engine_for(by_bytes, tokenizer=tokenizers.word_piece()).check([1], params)
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(InvalidRequest, match=r"vattention\[server\]"):
        engine_of(by_bytes).check([1], params)


# -- what comes -------------------------------------------------------------------------------------------------------

_OUTSIDE = re.compile(r'"(?:[^"\\]|\\.)*"')


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(several=st.lists(st.tuples(schemas(), st.booleans()), min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_every_finished_answer_is_of_its_schema(
    model: LoadedModel, several: list[tuple[dict[str, Any], bool]], seed: int
) -> None:
    engine = engine_of(model, max_num_seqs=8)
    params = [
        asks(StructuredOutput(json_schema=schema, compact=compact), seed=seed, top_p=0.95 if i % 2 else 1.0)
        for i, (schema, compact) in enumerate(several)
    ]
    # Beside them somebody who wants nothing of the kind.
    requests = run(engine, [(i, 2, 3) for i in range(len(params) + 1)], [*params, SamplingParams(max_tokens=20)])
    for request, (schema, compact) in zip(requests, several, strict=False):
        text = text_of(engine, request)
        outside = _OUTSIDE.sub('""', text)
        assert not re.search(r"[ \t\r\n]" if compact else r"[ ]{2}|[\t\r\n]", outside), text
        if request.finish_reason == "stop":
            assert valid(json.loads(text), schema), (text, schema)
        else:
            assert len(request.output_token_ids) == 200


REGEXES = [
    r"\d{3}-[a-f]+",
    r"(yes|no|maybe)( !){0,3}",
    r"[A-Z][a-z]{0,9}\.",
    r"é+世?",
    r"(a|b)*c",
    r"x{20,30}\n",
    r"a?",
]


def test_every_finished_answer_matches_its_regular_expression(model: LoadedModel) -> None:
    engine = engine_of(model, max_num_seqs=16)
    params = [asks(StructuredOutput(regex=regex), seed=seed) for regex in REGEXES for seed in range(5)]
    requests = run(engine, [(1, 2, 3)] * len(params), params)
    stopped = 0
    for request in requests:
        regex = request.params.structured.regex  # type: ignore[union-attr]
        if request.finish_reason == "stop":
            stopped += 1
            assert re.fullmatch(regex, text_of(engine, request)), text_of(engine, request)
    assert stopped > len(requests) / 2


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=1))
def test_choices_are_taken_word_for_word(by_bytes: LoadedModel, choice: list[str]) -> None:
    engine = engine_of(by_bytes)
    request = answer(engine, asks(StructuredOutput(choice=choice)))
    assert (request.finish_reason, text_of(engine, request) in choice) == ("stop", True)


def test_other_forms(model: LoadedModel) -> None:
    engine = engine_of(model, max_num_seqs=8)
    nested = 'start: "(" start ")" | "."'
    one, two = run(
        engine,
        [(1, 2, 3)] * 2,
        [asks(StructuredOutput(grammar=nested), logit_bias={}), asks(StructuredOutput(json_object=True), seed=5)],
    )
    assert re.fullmatch(r"(\(*)\.(\)*)", text_of(engine, one))
    assert text_of(engine, one).count("(") == text_of(engine, one).count(")")
    assert two.finish_reason == "length" or isinstance(json.loads(text_of(engine, two)), dict)


def test_the_most_likely_token_that_may_come(by_bytes: LoadedModel) -> None:
    """Temperature 0, teacher-forced over the logits of the pass; log-probabilities are those of the model."""
    engine = engine_of(by_bytes)
    request = answer(engine, asks(StructuredOutput(regex="[a-z]{12}"), temperature=0, logprobs=2))
    letters = [
        token for token in range(len(by_bytes.tokenizer)) if re.fullmatch("[a-z]+", by_bytes.tokenizer.decode([token]))
    ]
    logits = engine._runner.of(request.request_id)  # type: ignore[attr-defined]
    length = 0
    for row, token, entry in zip(logits, request.output_token_ids, request.logprobs, strict=True):
        fits = [t for t in letters if length + len(by_bytes.tokenizer.decode([t])) <= 12]
        assert token == max(fits, key=lambda t: float(row[t]))
        assert entry[token].logprob == pytest.approx(float(row.log_softmax(-1)[token]), abs=1e-5)
        assert int(row.argmax()) in entry, "what the model would rather have said is told"
        length += len(by_bytes.tokenizer.decode([token]))
    assert length == 12


def test_bias_and_penalties_go_before_the_form(by_bytes: LoadedModel) -> None:
    (a, b, c) = (tokenizers.spell(by_bytes.tokenizer, letter)[0] for letter in "abc")
    engine = engine_of(by_bytes, max_num_seqs=8)
    form = StructuredOutput(regex="[abc]{30}")
    liked, one_left, penalised = run(
        engine,
        [(1, 2, 3)] * 3,
        [
            asks(form, logit_bias={a: 100.0}),
            asks(StructuredOutput(regex="b{9}"), logit_bias={b: -100.0, a: 100.0}),
            asks(form, temperature=0, logit_bias={a: 50.0, b: 50.0, c: 50.0}, frequency_penalty=2.0),
        ],
    )
    assert (text_of(engine, liked), text_of(engine, one_left)) == ("a" * 30, "b" * 9)
    assert {text_of(engine, penalised).count(letter) for letter in "abc"} <= set(range(5, 16))


# -- where it ends ----------------------------------------------------------------------------------------------------


def test_the_end(by_bytes: LoadedModel) -> None:
    """End tokens come where the text may end and nowhere else; a text that is whole ends without one."""
    eos = by_bytes.tokenizer.eos_token_id
    x, dot = (tokenizers.spell(by_bytes.tokenizer, char)[0] for char in "x.")
    engine = engine_of(by_bytes, max_num_seqs=16)
    likes_eos = {eos: 100.0}
    # The regular expression, what else is asked for; text, finish_reason, stop_reason, whether an end token is there.
    cases: list[tuple[str, dict[str, Any], str, str | None, int | str | None, bool]] = [
        ("x{3}", {"logit_bias": likes_eos}, "xxx", "stop", None, False),
        ("x{3,9}", {"logit_bias": likes_eos}, "xxx", "stop", None, True),
        ("x*", {"logit_bias": likes_eos}, "", "stop", None, True),
        ("x*", {"min_tokens": 4, "logit_bias": likes_eos}, "xxxx", "stop", None, True),
        ("x{2}", {"min_tokens": 4}, "xx", "stop", None, False),
        ("x{2,9}", {"ignore_eos": True, "logit_bias": likes_eos}, "x" * 9, "stop", None, False),
        ("x*", {"ignore_eos": True, "max_tokens": 7}, "x" * 7, "length", None, False),
        ("x{9}", {"max_tokens": 4}, "xxxx", "length", None, False),
        ("x{4}", {"max_tokens": 4}, "xxxx", "stop", None, False),
        ("x{3,9}", {"stop_token_ids": [7], "logit_bias": {7: 100.0}}, "xxx", "stop", 7, True),
        ("x{4}[.]x{4}", {"stop_token_ids": [dot]}, "xxxx", "stop", dot, True),
        ("x{4}[.]x{2}", {"stop_token_ids": [dot], "min_tokens": 6}, "xxxx", "stop", dot, True),
        ("x{4}ab", {"stop": ["xxa"], "logit_bias": {x: 9.0}}, "xx", "stop", "xxa", False),
        ("ab", {"stop": ["b"], "include_stop_str_in_output": True}, "ab", "stop", "b", False),
        ("x{3}", {"include_stop_str_in_output": True}, "xxx", "stop", None, False),
    ]
    params = [
        SamplingParams(**{"max_tokens": 50, "seed": 3, "structured": StructuredOutput(regex=case[0]), **case[1]})
        for case in cases
    ]
    requests = run(engine, [(1, 2, 3)] * len(params), params)
    for request, case in zip(requests, cases, strict=True):
        ended = request.output_token_ids[-1] in request.ends
        assert (text_of(engine, request), request.finish_reason, request.stop_reason, ended) == case[2:], case[0]


def test_a_model_without_end_tokens(by_bytes: LoadedModel) -> None:
    engine = engine_of(by_bytes, eos_token_ids=())
    whole, open_ended = run(
        engine, [(1,), (2,)], [asks(StructuredOutput(regex="[ab]{5}")), asks(StructuredOutput(regex="[ab]+"))]
    )
    assert (whole.finish_reason, open_ended.finish_reason) == ("stop", "length")
    assert re.fullmatch("[ab]+", text_of(engine, open_ended))


# -- the same in any company ------------------------------------------------------------------------------------------

PROMPTS = prompts_of(1, 40, 17, 64, 65, 100, 5, 33, vocab_size=VOCABULARY)
ASKED: list[dict[str, Any]] = [
    {"structured": StructuredOutput(json_schema=PERSON)},
    {"structured": StructuredOutput(json_schema=PERSON), "n": 3, "top_p": 0.95},
    {"structured": StructuredOutput(regex="[a-z ]{10,60}"), "repetition_penalty": 1.3},
    {},
    {"structured": StructuredOutput(json_object=True), "top_k": 20},
    {"structured": StructuredOutput(regex="[0-9]+"), "n": 2, "frequency_penalty": 0.5},
    {"structured": StructuredOutput(json_schema=PERSON, compact=True), "logprobs": 2},
    {"structured": StructuredOutput(json_schema=PERSON), "temperature": 0},
]
PARAMS = [SamplingParams(**{"temperature": 1.2, "max_tokens": 40, "seed": i, **asked}) for i, asked in enumerate(ASKED)]


def said(engine: Engine) -> list[Any]:
    requests = run(engine, PROMPTS, PARAMS)
    assert engine._cache.stats().live_slots == 0
    return [[(s.output_token_ids, s.finish_reason, s.stop_reason) for s in request.family] for request in requests]


@pytest.fixture(scope="module")
def alone(by_bytes: LoadedModel) -> list[Any]:
    return said(engine_of(by_bytes, max_num_seqs=1, max_num_batched_tokens=512))


def test_alone_each_sample_is_its_own(alone: list[Any]) -> None:
    assert len({tuple(tokens) for tokens, *_ in alone[1]}) == 3
    assert {reason for family in alone for _, reason, _ in family} == {"stop", "length"}


@pytest.mark.parametrize(("slots", "rows"), [(2, 7), (16, 16), (16, 512)])
def test_batches_and_chunks(by_bytes: LoadedModel, alone: list[Any], slots: int, rows: int) -> None:
    assert said(engine_of(by_bytes, max_num_seqs=slots, max_num_batched_tokens=rows)) == alone


def test_preemption(by_bytes: LoadedModel, alone: list[Any]) -> None:
    engine = engine_of(by_bytes, max_num_seqs=12, memory=6 * 6 * 4096, page_size=4096, max_num_batched_tokens=40)
    assert said(engine) == alone
    assert engine.scheduler.preemptions > 0, "no pressure, no test"


class Failing:
    """A runner whose every third pass of several requests fails after it has computed."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.passes, self.failures = runner, 0, 0

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        logits = self.runner.forward(chunks)
        self.passes += 1
        if self.passes % 3 == 0 and len(chunks) > 1:
            self.failures += 1
            raise RuntimeError("on purpose")
        return logits


def test_passes_that_are_computed_again(by_bytes: LoadedModel, alone: list[Any]) -> None:
    engine = engine_of(by_bytes, max_num_seqs=8)
    failing = Failing(engine._runner)
    engine._runner = failing  # type: ignore[assignment]
    assert said(engine) == alone
    assert failing.failures > 3


def test_one_that_becomes_too_complex_fails_alone(by_bytes: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "_LIMITS", {**grammar_module._LIMITS, "max_lexer_states": 60})
    engine = engine_of(by_bytes)
    costly = engine.add_request((1, 2), asks(StructuredOutput(regex="(.*a.{12}b)|(.*c.{12}d)"), ignore_eos=True))
    others = [engine.add_request((1, 2, 3), asks(StructuredOutput(regex="[ab]{30}"), seed=i)) for i in range(2)]
    while engine.unfinished:
        engine.step()
    assert costly.finish_reason == "error"
    assert isinstance(costly.error, VAttentionError)
    assert "states" in str(costly.error)
    assert [other.finish_reason for other in others] == ["stop", "stop"]


def test_forms_are_read_once(by_bytes: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(by_bytes)
    reads: list[StructuredOutput] = []
    read = engine._grammars._read
    monkeypatch.setattr(engine._grammars, "_read", lambda form: reads.append(form) or read(form))
    monkeypatch.setattr(grammar_module, "_KEPT", 2)
    forms = [StructuredOutput(regex=f"x{{{i}}}") for i in (1, 2, 3)]
    for form in (*forms[:2], *forms[:2], forms[0], forms[2], forms[0], forms[1]):
        answer(engine, asks(form))
    assert reads == [*forms, forms[1]]
