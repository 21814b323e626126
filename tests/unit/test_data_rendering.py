"""Chat templates in a process of their own: the same texts as transformers', and an end for those without one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_gspo.data import load_prompts, load_tokenizer, rendering
from megatron_gspo.data.rendering import Renderer, StoppedError, bind, render
from megatron_gspo.data.tokenizer import Tokenizer
from megatron_gspo.errors import DataError
from tests.unit import published

pytestmark = pytest.mark.timeout(300)
USER = [{"role": "user", "content": "6x7?"}]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    USER,
    [
        {"role": "system", "content": "Be \u00e9 brief."},
        *USER,
        {"role": "assistant", "content": "<think>\nx\n</think>\n42"},
    ],
    [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1.5}}}]},
        {"role": "tool", "content": "42", "name": "f"},
    ],
]
FEATURES = {
    "generation": (
        "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ m.content }}{% endgeneration %}"
        "{{ x }}{% endfor %}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% else %}{{ m.role }}{% continue %}{% endif %}"
        "{% endfor %}"
    ),
    "json": (
        "{{ messages | tojson }}{{ messages | tojson(indent=2, ensure_ascii=true, sort_keys=true) }}"
        "{{ '\u00e9<' | tojson(separators=(',', ':')) }}"
    ),
    "blocks are trimmed": "{% if true %}\n  a\n  {% if true %}\n b{% endif %}\n{% endif %}\n{{ 1 }}\n\n",
    "unset": "{{ tools is none }}{{ documents }}{{ nothing }}{{ nothing is defined }}{{ (tools or []) | length }}",
    "ours": "{{ add_generation_prompt }}{{ bos_token }}{{ strftime_now('%Y') }}{{ flag }}",
    "types": "{{ messages }}{{ messages[0].items() | list }}{{ messages[0].missing }}{{ 7 // 2 }}{{ [1, 2][::-1] }}",
    "namespace": "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}",
    "macros": "{% macro f(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    "refusal": "{{ raise_exception('no such role: ' + messages[0].role) }}",
    "immutable": "{{ messages.append(1) }}",
    "escape": "{{ ''.__class__.__mro__ }}",
    "syntax": "{% for m in %}",
}


def theirs(source: str, messages: list[dict[str, Any]], variables: dict[str, Any], generation_prompt: bool) -> str:
    """What transformers renders in this process; an error as its text."""
    try:
        made, _ = render_jinja_template(
            [messages], chat_template=source, add_generation_prompt=generation_prompt, **variables
        )
    except Exception as error:
        return f"refused: {error}"
    return str(made[0])


def ours(source: str, messages: list[dict[str, Any]], variables: dict[str, Any], generation_prompt: bool) -> str:
    try:
        bound = bind(source, {"tools": None, "documents": None} | variables)
        return render(bound, messages, generation_prompt=generation_prompt)
    except DataError as error:
        return f"refused: {error}"


PUBLISHED = {name: family.template for name, family in published.FAMILIES.items() if family.template}


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("source", [*FEATURES.values(), *PUBLISHED.values()], ids=[*FEATURES, *PUBLISHED])
def test_a_template_writes_what_transformers_writes_and_refuses_in_the_same_words(
    source: str, generation_prompt: bool
) -> None:
    variables = {"bos_token": "<s>", "eos_token": "</s>", "flag": [1, {"a": None}], "enable_thinking": False}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "number"}}}}
    for more in ({}, {"tools": [tool]}):
        for messages in CONVERSATIONS:
            expected = theirs(source, messages, variables | more, generation_prompt)
            assert ours(source, messages, variables | more, generation_prompt) == expected


# ------------------------------------------------------------------------------------------------- without an end


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Renderer]:
    """A renderer that gives a prompt half a second of processor time."""
    renderer = Renderer(0.5)
    monkeypatch.setattr(rendering, "shared_renderer", lambda: renderer)
    yield renderer
    renderer.close()


TIME = r"takes more than 0\.5 s of processor time for one prompt"
MEMORY = rf"needs more than 512 MiB of memory for one prompt|{TIME}"
"""To fill it takes time, too."""
LONG = rf"writes \d+ characters for one prompt, more than 16777216|{MEMORY}"
DOUBLES = "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
ENDLESS = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": TIME,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}": TIME,
    "{{ 7 ** (10 ** 8) }}": TIME,
    "{{ 'a' * 10 ** 10 }}": MEMORY,
    DOUBLES + "{{ n.x | length }}": MEMORY,
    "{{ 'a' | center(10 ** 9) | center(2 * 10 ** 9) }}": MEMORY,
    "{{ '%0999999999d' % 1 ~ '{:>999999999}'.format(1) }}": MEMORY,
    "{% set n = namespace(x=[0]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}": MEMORY,
    "{{ 'a' * 10 ** 8 }}": LONG,
    "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}": LONG,
}


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_without_an_end_is_stopped_by_the_limit_that_it_passes(impatient: Renderer, source: str) -> None:
    begin = time.monotonic()
    with pytest.raises(StoppedError, match=ENDLESS[source]):
        render(bind(source, {}), USER, generation_prompt=True)
    assert time.monotonic() - begin < 60
    assert render(bind("{{ messages[0].content }}", {}), USER, generation_prompt=True) == "6x7?"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
        "{{ '9' * 5000 | int }}",
    ],
    ids=["a range", "recursion", "brackets", "digits"],
)
def test_what_jinja_itself_bounds_is_a_refusal_of_one_line(impatient: Renderer, source: str) -> None:
    try:
        text = render(bind(source, {}), USER, generation_prompt=True)
    except DataError as error:
        text = str(error)
    assert len(text) <= 5000


def with_template(directory: Path, template: str) -> Tokenizer:
    published.write(directory, "Qwen3")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(template)
    return load_tokenizer(directory)


LOOPS_FOR_ONE = (
    "{% for m in messages %}{{ m.content }}{% if 'go' in m.content %}{% for i in range(99999) %}{% for j in "
    "range(99999) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_template_that_was_stopped_is_named_with_its_file_and_not_asked_again(
    impatient: Renderer, tmp_path: Path, skip_bad: bool
) -> None:
    tokenizer = with_template(tmp_path, LOOPS_FOR_ONE)
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "go", *map(str, range(50)))))
    begin = time.process_time(), time.monotonic()
    words = rf"chat_template\.jinja: the chat template {TIME}: it is not used; mend it there"
    if skip_bad:
        found = load_prompts(path, tokenizer=tokenizer, skip_bad=True)
        assert len(found) == 1 and len(found.problems) == 51 and "chat_template.jinja" in found.problems[-1]
    else:
        with pytest.raises(DataError, match=rf"p\.jsonl, line 2: .*{words}"):
            load_prompts(path, tokenizer=tokenizer)
    assert time.monotonic() - begin[1] < 60  # one prompt's time, and not that of fifty


def test_a_template_that_loops_for_every_prompt_ends_loading_in_one_line(impatient: Renderer, tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, LOOPS_FOR_ONE.replace("'go'", "''"))
    assert tokenizer.turn_end is None
    with pytest.raises(DataError, match=rf"chat_template\.jinja: the chat template {TIME}"):
        tokenizer.render("a", True)


def test_a_template_that_is_read_for_its_variables_is_bounded_too(impatient: Renderer, tmp_path: Path) -> None:
    with_template(tmp_path, "{{ messages[0].content }}{{ 7 ** (10 ** 8) }}")
    with pytest.raises(DataError, match=rf"chat_template\.jinja: the chat template {TIME}"):
        load_tokenizer(tmp_path, template_variables={"enable_thinking": True})


# --------------------------------------------------------------------------------------------------- the process


def test_the_names_that_a_template_reads_are_told_before_and_after_it_was_rendered() -> None:
    bound = bind("{% set x = 1 %}{{ x }}{{ messages[0].content }}{{ flag }}{% if tools %}{% endif %}", {})
    for _ in range(2):
        assert rendering.names_read(bound) == {"messages", "flag", "tools"}
        assert render(bound, USER, generation_prompt=True) == "16x7?"


def test_threads_get_each_their_own_texts_and_long_ones_pass_both_ways() -> None:
    bound, found = bind("{{ messages[0].content }}", {}), {}

    def ask(number: int) -> None:
        for length in (1, 10**6, 3):
            messages = [{"role": "user", "content": f"{number}" * length}]
            found[number, length] = render(bound, messages, generation_prompt=True)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(number, length): f"{number}" * length for number in range(4) for length in (1, 10**6, 3)}


def test_a_worker_that_somebody_ended_is_an_error_of_that_prompt_and_the_next_has_another() -> None:
    renderer = Renderer()
    bound = bind("{{ messages[0].content }}", {})
    body = rendering.pickle.dumps((USER, True))
    assert renderer.ask(bound, body) == "6x7?"
    assert renderer._process is not None
    os.kill(renderer._process.pid, signal.SIGTERM)
    renderer._process.wait()
    with pytest.raises(StoppedError, match=r"ended the process in which it ran \(status -15\)"):
        renderer.ask(bound, body)
    assert renderer.ask(bound, body) == "6x7?"
    renderer.close()


def test_the_process_ends_with_the_one_that_started_it_however_that_ends_idle_or_in_a_loop() -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    script = (
        "import threading, time\n"
        "from megatron_gspo.data import rendering as r\n"
        "both = r.Renderer(1.0), r.Renderer(1.0)\n"
        "body = r.pickle.dumps(([{}], True))\n"
        "for one in both: one.ask(r.bind('x', {}), body)\n"
        "print(*[one._process.pid for one in both], flush=True)\n"
        f"both[1].ask(r.bind({loop!r}, {{}}), body)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [Path("/proc") / pid / "exe" for pid in parent.stdout.readline().split()]
        parent.kill()
    deadline = time.monotonic() + 120
    while any(map(os.path.exists, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(map(os.path.exists, workers))
