"""Chat templates are limited in time and memory, and otherwise render as in jinja2."""

import signal

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_smolvlm.errors import CheckpointError, PromptError
from mlx_smolvlm.prompt import sandbox
from mlx_smolvlm.prompt.template import ChatTemplate

QUESTION = "{{ messages[0].content[0].text }}"
DOUBLING = (
    "{% set n = namespace(x=START) %}{% for i in range(60) %}{% set n.x = NEXT %}{% endfor %}"
)

# Templates that would take hours or gigabytes, and the error that stops each.
ENDLESS = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "any conv",
    "{% for a in range(99999) %}{% for b in range(99999) if b is none %}{% endfor %}{% endfor %}":
        "any conv",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}":
        "any conv",
    "{% for a in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}": "recursion",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}": "recursion",
    "{% for i in range(99999) %}" + "x" * 50000 + "{% endfor %}": "any conv",
    "{{ 'a' * 10**10 }}": "any conv",
    "{{ 10**10 * 'a' }}": "any conv",
    "{{ ([1] * 10**10) | length }}": "any conv",
    "{{ 'a' | center(10**9) }}": "No filter named 'center'",
    "{{ 'a'.center(10**9) }}": "'center' of 'str' object is unsafe",
    "{{ 'a'.zfill(10**9) }}": "'zfill' of 'str' object is unsafe",
    "{{ ['a'] | map('center', 10**9) | list }}": "No filter named 'center'",
    "{% set f = 'a' | attr('ljust') %}{{ f(10**9) }}": "'ljust' of 'str' object is unsafe",
    "{{ 'a\n' | indent(10**9) }}": "indents by 1000000000",
    "{% filter indent(10**9) %}a\nb{% endfilter %}": "indents by 1000000000",
    "{{ {'a': 1} | tojson(indent=10**9) }}": "indents by 1000000000",
    "{{ '%1000000000d' % 1 }}": "formats texts with %",
    "{{ '%1000000000d' | format(1) }}": "No filter named 'format'",
    "{{ '{:1000000000}'.format(1) }}": "'format' of 'str' object is unsafe",
    "{{ [1] | batch(10**9, 1) | list }}": "No filter named 'batch'",
    "{{ 1.5 | round(10**9, 'ceil') }}": "No filter named 'round'",
    "{{ (10**10)**(10**10) }}": "integer of more than 1024 bits",
    "{{ (1).to_bytes(10**10) }}": "'to_bytes' of 'int' object is unsafe",
    DOUBLING.replace("START", "3").replace("NEXT", "n.x * n.x"): "integer of more than 1024 bits",
    DOUBLING.replace("START", "'ab'").replace("NEXT", "n.x ~ n.x"): "any conv",
    DOUBLING.replace("START", "'ab'").replace("NEXT", "n.x + n.x"): "any conv",
    DOUBLING.replace("START", "[1]").replace("NEXT", "[n.x, n.x]") + "{{ n.x }}": "any conv",
    DOUBLING.replace("START", "(1,)").replace("NEXT", "(n.x, n.x)") + "{{ {n.x: 1} }}": "any conv",
    DOUBLING.replace("START", "{}").replace("NEXT", "{1: n.x, 2: n.x}") + "{{ n.x }}": "any conv",
    DOUBLING.replace("START", "{}").replace("NEXT", "{1: [n.x.items(), n.x.items()]}")
    + "{{ n.x }}": "any conv",
    "{{ ('a' * 1000).replace('a', 'b' * 100000) }}": "too long",
    "{{ ('a' * 9000) | replace('a', 'b' * 9000) }}": "too long",
    "{{ ('b' * 90000).join(range(9000) | map('string')) }}": "too long",
    "{{ ('a' * 300000).rfind('b' + 'a' * 150000) }}": "too long",
    "{{ ('a' * 300000) | trim('b' * 150000 ~ 'a') }}": "too long",
    "{% set s = 'a' * 90000 %}" + "".join(f"{{% set a{i} = s[1:] %}}" for i in range(99)):
        "any conv",
    "{{ " + "[" * 9999 + "]" * 9999 + " }}": "recursion",
    "x" * 2**17: "at most 131,072 are allowed",
}  # fmt: skip


@pytest.fixture(autouse=True)
def alarm():
    """Stop a test that hangs; none takes a twentieth of this time."""

    def stop(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 20)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.parametrize(("template", "match"), ENDLESS.items(), ids=range(len(ENDLESS)))
def test_what_would_not_end_is_stopped(template, match):
    with pytest.raises(CheckpointError, match=match):
        ChatTemplate(QUESTION + template)


def test_time_is_bounded_too(monkeypatch):
    monkeypatch.setattr(sandbox, "ROOM", 2**50)
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 0.05)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(CheckpointError, match=r"computes for more than 0\.05 s"):
        ChatTemplate(QUESTION + loops)


def test_an_interrupt_is_heard(monkeypatch):
    monkeypatch.setattr(sandbox, "ROOM", 2**50)
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1e9)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KeyboardInterrupt):
        ChatTemplate(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        )


def test_a_template_may_run_away_on_some_messages_only():
    template = ChatTemplate(QUESTION + "{% if messages[1:] %}{{ 'a' * 10**9 }}{% endif %}")
    message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    assert template.render([message], True) == "a"
    with pytest.raises(PromptError, match="refuses the messages: stopped, since it computes"):
        template.render([message, message], True)


def test_long_conversations_are_not_stopped():
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{% for i in m.content %}{{ i.text }}"
        "{% endfor %}{% endif %}{{ loop.index ~ '/' ~ (messages | length) }}{% endfor %}"
    )
    messages = [{"role": "user", "content": [{"type": "text", "text": "é" * 200}]}] * 500
    text = ChatTemplate(source).render(messages, True)
    assert text.endswith("é500/500")
    long = [{"role": "user", "content": [{"type": "text", "text": "a" * 10**7}]}]
    assert len(ChatTemplate(source).render(long, True)) == 10**7 + 3


@pytest.mark.parametrize("template", ["{{ '\\ud800' }}", "{% set x = '\\udc00' %}{{ x }}"])
def test_half_a_character_is_refused(template):
    with pytest.raises(CheckpointError, match="surrogates not allowed"):
        ChatTemplate(QUESTION + template)


def test_a_long_message_of_a_template_is_cut():
    with pytest.raises(CheckpointError) as error:
        ChatTemplate("{{ raise_exception('no ' * 1000) }}")
    assert len(str(error.value)) < 600


# Features that real templates use; the expected texts are those of plain jinja2.
ORDINARY = [
    "{%- for m in messages %}\n  {{- m.role | capitalize }}: {{ m['content'] | trim }}\n"
    "{% endfor %}",
    "{{ messages[::-1] | map(attribute='role') | join(', ') }}{{ messages[1:] | length }}",
    "{% set ns = namespace(n=0, last=none) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if loop.last %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{{ ns.n }}{{ ns.last }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 7 % 3 }}{{ 2 ** 5 }}",
    "{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | first }}",
    "{{ 'a<think>b</think> c'.split('</think>')[-1].lstrip() ~ 'x'.upper() ~ ('yy' * 3) }}",
    "{% macro show(m, pad='-') %}{{ pad * 2 }}{{ m.content[:3] }}"
    "{{ caller() if caller }}{% endmacro %}"
    "{{ show(messages[0]) }}{% call show(messages[1], pad='+') %}!{% endcall %}",
    "{% set text %}{% for k, v in {'b': 1, 'a': [1, 2.5, none, true]} | dictsort %}{{ k }}={{ v }};"
    "{% endfor %}{% endset %}{{ text | replace(';', ' ') | trim }}",
    "{{ 'a\nb' | indent(2) }}{{ 'a\nb' | indent(2, true) }}{{ ('x', 'y') + ('z',) }}"
    "{{ [1] + [2] }}",
    "{{ (messages[0].role == 'user') != (1 % 2 == 0) }}{{ 1 if none else 2 }}{{ tools or 'no' }}",
    "{{ messages[0] is mapping }}{{ 'a' is string }}{{ x is defined }}{{ x | default('d') }}"
    "{{ 'ab' in 'cabd' }}{{ 3 // 2 }}{{ 3 / 2 }}{{ -3 }}{{ [3, 1, 2] | sort }}{{ [1, 2] | max }}",
    "{% for i in range(6) if i % 2 %}{{ loop.cycle('a', 'b') }}{{ i }}{{ loop.length }}"
    "{% if i == 3 %}{% continue %}{% endif %}.{% else %}none{% endfor %}",
    "{%- for i in [1, [2, [3]]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}",
    "{{ 'x' | upper | list }}{{ {'a': 1}.items() | list }}{{ {'a': 1}.get('b', 2) }}"
    "{{ '5' | int + 1 }}",
    "{% filter upper %}a{{ 1 }}b{% endfilter %}{{ 'A B' | title | lower | wordcount }}"
    "{{ 'a~' }}{# c #}",
    "  {% if true %}\n    kept\n  {% endif %}\n{{- ' tight ' -}}\n  end"
    "{% raw %}{{ x }}{% endraw %}",
]  # fmt: skip


@pytest.mark.parametrize("source", ORDINARY)
def test_ordinary_templates_render_as_in_plain_jinja2(source):
    values = {
        "messages": [
            {"role": "user", "content": " Hello <b> "},
            {"role": "assistant", "content": "Hi\né"},
            {"role": "user", "content": "Bye"},
        ],
        "tools": None,
    }
    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    template = sandbox.BoundedEnvironment().read(source)
    assert sandbox.render(template, values) == plain.from_string(source).render(values)
