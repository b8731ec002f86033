"""The front door, on a real model: SmolLM2-135M-Instruct in float32 against transformers' own generate."""

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from support.models import as_transformers, demo_model, greedy, loaded, tiny_model
from vattention import LLM, KVCache, RequestOutput, SamplingParams
from vattention.engine.loading import LoadedModel
from vattention.engine.opening import LLMOptions, open_engine
from vattention.errors import ConfigError, InvalidRequest, UnsupportedModel

# Ragged on purpose: one token, a line, several chunks of 64.
TEXTS = [
    "The",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a village by the sea, there lived a girl who could talk to the wind. " * 8,
    "1 2 3 4 5 6 7 8 9 10 11 12 13",
    "Water boils at one hundred degrees. Ice melts at zero. Iron melts far above both. Lead melts below iron, and" * 2,
]
TOKENS = 10
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return demo_model()


@pytest.fixture(scope="module")
def expected(demo: LoadedModel) -> list[tuple[int, ...]]:
    with as_transformers(demo.model) as model:
        model.generation_config.eos_token_id = None
        try:
            return [greedy(model, demo.tokenizer(text).input_ids, TOKENS) for text in TEXTS]
        finally:
            model.generation_config.eos_token_id = 2


def tokens(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in outputs]


def small(model: LoadedModel, **options: Any) -> LLM:
    return LLM(model, **{"max_model_len": 512, "kv_cache_memory": "64MiB", **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 1, "guard": True},
        {"max_num_batched_tokens": 64, "poison": True, "guard": True},
        {"max_num_batched_tokens": 64, "head_major": True, "poison": True, "kv_cache_memory": "256MiB"},
        {
            "max_num_batched_tokens": 64,
            "layers_per_stream": 30,
            "kv_together": True,
            "poison": True,
            "page_size": "2MiB",
        },
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_transformers(
    demo: LoadedModel, expected: list[tuple[int, ...]], options: dict[str, Any]
) -> None:
    """SmolLM2's closest two logits on such prompts are 4 times further apart than float32 noise: no ties here."""
    with small(demo, **options) as llm:
        outputs = llm.generate(TEXTS, GREEDY, use_tqdm=False)
        assert tokens(outputs) == expected
        for output, text in zip(outputs, TEXTS, strict=True):
            assert output.prompt == text
            assert output.prompt_token_ids == tuple(demo.tokenizer(text).input_ids)
            assert output.finished
            assert output.outputs[0].finish_reason == "length"
            assert output.outputs[0].text == demo.tokenizer.decode(output.outputs[0].token_ids)
        assert llm.stats().live_slots == 0
        assert llm.stats().needed == 0


def test_four_times_the_budget(demo: LoadedModel) -> None:
    """24 requests under a quarter of the memory they need: the same tokens, and everything given back."""
    prompts = [{"prompt_token_ids": [100 + i, *range(200, 200 + i)]} for i in range(24)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    total = sum(1 + i + 8 for i in range(24))
    with small(demo, max_num_seqs=24, max_model_len=64) as llm:
        unlimited = tokens(llm.generate(prompts, params, use_tqdm=False))
        assert llm.engine.scheduler.preemptions == 0
        per_token = llm.engine._cache.layout.bytes_per_token
    budget = total * per_token // 4
    options: dict[str, Any] = {"max_num_seqs": 24, "max_model_len": 64, "page_size": 4096, "poison": True}
    with small(demo, kv_cache_memory=budget, **options) as llm:
        assert tokens(llm.generate(prompts, params, use_tqdm=False)) == unlimited
        assert llm.engine.scheduler.preemptions > 0, "no pressure, no test"
        stats = llm.stats()
        assert (stats.live_slots, stats.needed, stats.mapped) == (0, 0, 0)
        assert stats.created <= budget
        llm.engine._cache.trim()
        assert llm.stats().created == 0


def test_it_says_something_sensible(demo: LoadedModel) -> None:
    prompt = demo.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    with small(demo) as llm:
        llm.warmup()
        (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].token_ids[-1] == 2
    assert "<|im_end|>" not in output.outputs[0].text


# -- the door itself, on a small random model ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(demo: LoadedModel) -> LoadedModel:
    return loaded(tiny_model(vocab_size=demo.geometry.vocab_size, hidden_size=24), demo.tokenizer)


@pytest.fixture
def llm(tiny: LoadedModel) -> Iterator[LLM]:
    with LLM(tiny, max_num_seqs=4, kv_cache_memory="4MiB", max_model_len=128) as llm:
        yield llm


SHORT = SamplingParams(temperature=0, max_tokens=3)


def test_every_form_of_a_prompt(llm: LLM) -> None:
    ids = llm.tokenizer("Hello").input_ids  # type: ignore[misc]
    forms: list[Any] = [
        "Hello",
        {"prompt": "Hello"},
        {"prompt_token_ids": ids},
        {"prompt_token_ids": torch.tensor(ids)},
    ]
    outputs = llm.generate(forms, SHORT, use_tqdm=False)
    assert len(set(tokens(outputs))) == 1
    assert [output.prompt for output in outputs] == ["Hello", "Hello", None, None]
    assert len({output.request_id for output in outputs}) == 4
    assert tokens(llm.generate("Hello", SHORT, use_tqdm=False)) == tokens(outputs)[:1]
    assert tokens(llm.generate({"prompt": "Hello"}, SHORT, use_tqdm=False)) == tokens(outputs)[:1]
    assert llm.generate([], SHORT) == []


def test_chat_is_generate_with_the_template(llm: LLM) -> None:
    one = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    two = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}, one[1]]
    tokenizer: Any = llm.tokenizer
    for conversations in ([one], [one, two]):
        ids = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in conversations]
        expected = llm.generate([{"prompt_token_ids": i} for i in ids], SHORT, use_tqdm=False)
        given: Any = conversations if len(conversations) > 1 else one
        got = llm.chat(given, SHORT, use_tqdm=False)
        assert [output.prompt_token_ids for output in got] == [tuple(i) for i in ids]
        assert tokens(got) == tokens(expected)
        assert [output.prompt for output in got] == [tokenizer.decode(i) for i in ids]
    (own,) = llm.chat(one, SHORT, use_tqdm=False, chat_template="{{ messages[1].content }}{{ more }}", more="!")
    assert own.prompt == "Hello!"
    (bare,) = llm.chat(one, SHORT, use_tqdm=False, add_generation_prompt=False)
    assert expected[0].prompt_token_ids[: len(bare.prompt_token_ids)] == bare.prompt_token_ids


@pytest.mark.parametrize(
    ("messages", "error", "problem"),
    [
        ("Hello", TypeError, "sequence of dictionaries"),
        (5, TypeError, "sequence of dictionaries"),
        ([], InvalidRequest, "at least one message"),
        (["Hello"], TypeError, "sequence of dictionaries"),
        ([{"role": "user"}, "Hello"], TypeError, "message 1"),
        ([{"content": "Hello"}], InvalidRequest, 'no "role"'),
        ([[{"role": "user", "content": "Hello"}], []], InvalidRequest, "conversation 1: .* at least one"),
    ],
)
def test_what_is_no_conversation(llm: LLM, messages: Any, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        llm.chat(messages, SHORT)
    assert llm.engine.unfinished == 0


def test_chat_without_a_template_says_so(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(InvalidRequest, match="refuses these messages: not you"):
        llm.chat(messages, SHORT, chat_template="{{ raise_exception('not you') }}")
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        llm.chat(messages, SHORT, chat_template="{% broken")
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    with pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat(messages, SHORT)
    with (
        LLM(loaded(tiny_model()), kv_cache_memory="4MiB") as bare,
        pytest.raises(InvalidRequest, match="without a tokenizer"),
    ):
        bare.chat(messages, SHORT)


def test_several_samples_and_everything_about_them(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=5, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    (output,) = llm.generate("Hello world", params, use_tqdm=False)
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert len({answer.token_ids for answer in output.outputs}) == 3
    for answer in output.outputs:
        assert answer.text == llm.tokenizer.decode(answer.token_ids, skip_special_tokens=True)  # type: ignore[union-attr]
        assert answer.logprobs is not None
        for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
            assert entry[token].decoded_token == llm.tokenizer.decode([token])  # type: ignore[union-attr]
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert [len(times) for times in output.metrics.token_times] == [5, 5, 5]
    assert llm.stats().live_slots == 0


def test_results_come_in_the_order_of_prompts(llm: LLM) -> None:
    prompts = [{"prompt_token_ids": [i]} for i in range(10)]
    params = [SamplingParams(temperature=0, max_tokens=10 - i) for i in range(10)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [(i,) for i in range(10)]
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(10, 0, -1))


def test_defaults_of_sampling_are_reproducible(tiny: LoadedModel) -> None:
    texts = []
    for seed in (0, 0, 1):
        with LLM(tiny, kv_cache_memory="4MiB", max_model_len=128, seed=seed) as llm:
            llm.warmup()
            texts.append(tokens(llm.generate(["Hello", "Hello"], use_tqdm=False)))
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]
    assert len(texts[0][0]) == 16


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("", InvalidRequest, "empty"),
        ({"prompt_token_ids": []}, InvalidRequest, "empty"),
        ({"prompt_token_ids": [10**6]}, InvalidRequest, "token id"),
        ({"prompt_token_ids": [-1]}, InvalidRequest, "token id"),
        ({"prompt_token_ids": ["1"]}, TypeError, "token id"),
        ({"prompt_token_ids": 5}, TypeError, "sequence"),
        ({"prompt_token_ids": [1] * 128}, InvalidRequest, "max_model_len"),
        ({"prompt": 5}, TypeError, "not int"),
        ({"prompt": "a", "prompt_token_ids": [1]}, InvalidRequest, "one key"),
        ({"text": "a"}, InvalidRequest, "one key"),
        ({}, InvalidRequest, "one key"),
        ([1, 2, 3], TypeError, "prompt_token_ids"),
        (None, TypeError, "NoneType"),
        (b"bytes", TypeError, "bytes"),
    ],
)
def test_a_bad_prompt_in_a_list_stops_everything_before_it_starts(
    llm: LLM, bad: Any, error: type[Exception], message: str
) -> None:
    before = dict(llm.stats().driver_calls)
    with pytest.raises(error, match=message) as caught:
        llm.generate(["fine", bad], SHORT, use_tqdm=False)
    assert str(caught.value).startswith("prompt 1: ")
    assert llm.engine.unfinished == 0
    assert llm.stats().driver_calls == before
    assert len(llm.generate("fine", SHORT, use_tqdm=False)) == 1


def test_arguments_that_do_not_go_together(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="2 prompts and 1 sampling_params"):
        llm.generate(["a", "b"], [SHORT])
    with pytest.raises(TypeError, match="SamplingParams"):
        llm.generate("a", {"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="SamplingParams"):
        llm.generate("a", [{"temperature": 0}])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="prompts"):
        llm.generate(5)  # type: ignore[arg-type]


def test_an_interrupt_frees_everything(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens(llm.generate(["a", "b"], SHORT, use_tqdm=False))
    runner, passes = llm.engine._runner, 0
    forward = runner.forward

    def interrupted(chunks: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise KeyboardInterrupt
        return forward(chunks)

    with monkeypatch.context() as patched:
        patched.setattr(runner, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([*"abcdefgh"], SHORT, use_tqdm=False)
    assert llm.engine.unfinished == 0
    assert llm.stats().live_slots == 0
    assert tokens(llm.generate(["a", "b"], SHORT, use_tqdm=False)) == expected


def test_the_progress_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], SHORT)
    assert "2/2" in capsys.readouterr().err
    llm.generate(["a", "b"], SHORT, use_tqdm=False)
    assert capsys.readouterr() == ("", "")


def test_a_line_at_start_about_memory_and_one_about_the_layout(
    tiny: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    with LLM(tiny, max_num_seqs=4, kv_cache_memory="4MiB", max_model_len=128) as llm:
        capacity = llm.engine._cache.capacity()
        assert (llm.layout.layout.name, llm.layout.page_size) == ("token-major", llm.engine._cache.pool.page_size)
        chosen = str(llm.layout)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 2
    assert err.splitlines()[1] == f"vattention: {chosen}"
    for part in ("of weights (float32)", "4 x 128 tokens", "4 MiB physical budget", f"{capacity} tokens fit"):
        assert part in err
    with pytest.raises(InvalidRequest, match="closed"):
        llm.stats()


def test_defaults_fit_the_machine(tiny: LoadedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with LLM(tiny) as llm:
            stats = llm.stats()
            assert 0 < stats.budget <= stats.reserved
            assert stats.created == 0
            assert llm.engine._cache.layout.max_model_len == 256
            assert llm.engine._cache.capacity() >= 256


def test_more_than_the_budget_holds_is_a_warning_and_ends_with_length(tiny: LoadedModel) -> None:
    with pytest.warns(UserWarning, match="more than the KV budget holds"):
        llm = LLM(tiny, kv_cache_memory=6 * 2 * 4096, page_size=4096)
    with llm:
        capacity = llm.engine._cache.capacity()
        assert 0 < capacity < 256
        (output,) = llm.generate(
            {"prompt_token_ids": [1, 2]},
            SamplingParams(temperature=0, max_tokens=None, ignore_eos=True),
            use_tqdm=False,
        )
        assert output.outputs[0].finish_reason == "length"
        assert len(output.outputs[0].token_ids) == capacity + 1 - 2
        with pytest.raises(InvalidRequest, match="raise kv_cache_memory"):
            llm.generate({"prompt_token_ids": [1] * capacity})


def test_a_model_without_tokenizer_serves_token_ids() -> None:
    with LLM(loaded(tiny_model()), kv_cache_memory="4MiB") as llm:
        assert llm.tokenizer is None
        (output,) = llm.generate({"prompt_token_ids": [1, 2, 3]}, SHORT, use_tqdm=False)
        assert output.outputs[0].text == ""
        assert len(output.outputs[0].token_ids) == 3
        with pytest.raises(InvalidRequest, match="pass prompt_token_ids"):
            llm.generate("text")


def test_two_engines_share_weights_and_nothing_else(tiny: LoadedModel) -> None:
    """What attention needs travels with each pass: there is no global state to mix up."""
    params = SamplingParams(temperature=0, max_tokens=6)
    with (
        LLM(tiny, kv_cache_memory="4MiB", max_model_len=128) as one,
        LLM(tiny, kv_cache_memory="4MiB", max_model_len=64, head_major=True, layers_per_stream=None) as two,
    ):
        alone = tokens(one.generate(["a", "b c"], params, use_tqdm=False))
        requests = [(llm, llm.engine.add_request([5, 6, 7], params)) for llm in (one, two)]
        while any(llm.engine.unfinished for llm, _ in requests):
            for llm, _ in requests:
                llm.engine.step()
        assert requests[0][1].output_token_ids == requests[1][1].output_token_ids
        assert tokens(two.generate(["a", "b c"], params, use_tqdm=False)) == alone


def test_use_after_close(tiny: LoadedModel) -> None:
    llm = LLM(tiny, kv_cache_memory="4MiB", max_model_len=128)
    llm.close()
    llm.close()
    for use in (lambda: llm.generate("a"), lambda: llm.chat([]), llm.warmup, llm.stats, lambda: llm.engine):
        with pytest.raises(InvalidRequest, match="closed"):
            use()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "static"}, '"virtual" or "paged"'),
        ({"block_size": 16}, "block_size is for"),
        ({"cache": "paged", "block_size": 0}, "block_size"),
        ({"cache": "paged", "page_size": 4096}, "page_size mean"),
        ({"cache": "paged", "head_major": True, "guard": True}, "head_major, guard mean"),
        ({"cache": "paged", "layers_per_stream": None, "kv_together": True}, "layers_per_stream, kv_together mean"),
        ({"cache": "paged", "kv_cache_memory": 100}, "less than a block"),
        ({"enable_prefix_caching": True}, "not built yet"),
        ({"device": "cuda:99"}, "has no CUDA|no GPU|GPUs"),
        ({"dtype": "int4"}, "dtype"),
        ({"dtype": "bfloat16"}, "was loaded in"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"max_model_len": 257}, "256 positions"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": 17, "max_num_batched_tokens": 16}, "max_num_batched_tokens"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
        ({"kv_cache_memory": 0}, "kv_cache_memory"),
        ({"kv_cache_memory": "lots"}, "kv_cache_memory"),
        ({"page_size": -1}, "page_size"),
        ({"page_size": 1000}, "page"),
        ({"seed": -1}, "seed"),
        ({"layers_per_stream": 0}, "layers_per_stream"),
        ({"expected_tokens": 0}, "expected_tokens"),
        ({"cache": "paged", "expected_tokens": 9}, "expected_tokens mean"),
    ],
)
def test_options_that_cannot_work(tiny: LoadedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(tiny, **options)


def test_options_are_told_to_type_checkers_as_they_are() -> None:
    told = LLMOptions.__annotations__
    taken = {name: kind.annotation for name, kind in inspect.signature(open_engine).parameters.items()}
    assert taken.pop("model")
    assert {name: getattr(kind, "__forward_arg__", kind) for name, kind in told.items()} == taken


def test_a_start_that_fails_late_gives_the_cache_back(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[KVCache] = []

    def fails(runner: object, cache: KVCache, **options: object) -> None:
        opened.append(cache)
        raise ConfigError("late")

    monkeypatch.setattr("vattention.engine.opening.Engine", fails)
    with pytest.raises(ConfigError, match="late"):
        LLM(tiny, kv_cache_memory="4MiB")
    assert opened[0].closed


@pytest.mark.parametrize("name", ["max_model_len", "max_num_seqs", "max_num_batched_tokens", "seed"])
def test_options_of_the_wrong_type(tiny: LoadedModel, name: str) -> None:
    for value in (1.5, "8", True):
        with pytest.raises(TypeError, match=name):
            LLM(tiny, **{name: value})  # type: ignore[arg-type]


def test_a_shared_model_is_judged_again_for_its_window() -> None:
    model = loaded(tiny_model("qwen2_moe", sliding_window=100))
    with pytest.raises(UnsupportedModel, match="pass max_model_len=100"):
        LLM(model)
    with LLM(model, max_model_len=100, kv_cache_memory="4MiB") as llm:
        (output,) = llm.generate(
            {"prompt_token_ids": [5]}, SamplingParams(temperature=0, max_tokens=None), use_tqdm=False
        )
        assert len(output.outputs[0].token_ids) == 99


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_small_chunks_need_no_other_option(tiny: LoadedModel, rows: int) -> None:
    prompts = [{"prompt_token_ids": list(range(5, 5 + length))} for length in (1, 4, 9)]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(tiny) as llm:
        whole = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    with LLM(tiny, max_num_batched_tokens=rows) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == whole


def test_half_a_surrogate_pair_is_refused(llm: LLM) -> None:
    for ask in (lambda: llm.generate("a\ud800"), lambda: llm.chat([{"role": "user", "content": "a\ud800"}])):
        with pytest.raises(InvalidRequest, match="the text is not Unicode"):
            ask()
