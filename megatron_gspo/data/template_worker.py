"""The process in which chat templates run: see ``rendering``. Run as a file; it imports Jinja and nothing of ours.

A request is two pickles of the parent's, each behind its length: what a template is and gets (kept), and one prompt.
An answer is a letter, a length and UTF-8. The kernel ends the process when a request has taken its processor time.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import struct
import sys
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEXT, REFUSED, MEMORY, LONG = b"t", b"r", b"m", b"l"
LENGTH = struct.Struct("<Q")
LONGEST_WORDS = 1000
"""Characters of a refusal."""


class Generation(jinja2.ext.Extension):
    """``{% generation %}``, which marks what the assistant says, as transformers has it: its content is written."""

    tags = {"generation"}  # noqa: RUF012  as Jinja has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block that marks generated text."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return str(caller())


def environment() -> jinja2.Environment:
    """As transformers makes it (``utils.chat_template_utils``); a test compares the two over many templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return made


def answer(jinja: jinja2.Environment, known: dict[bytes, Any], head: bytes, body: bytes) -> str:
    """The text of one prompt, or the names that a template reads."""
    if not body:
        source, _ = pickle.loads(head)
        return json.dumps(sorted(jinja2.meta.find_undeclared_variables(jinja.parse(source))))
    if head not in known:
        source, variables = pickle.loads(head)
        known[head] = jinja.from_string(source), variables
    template, variables = known[head]
    messages, generation_prompt = pickle.loads(body)
    return str(template.render(messages=messages, add_generation_prompt=generation_prompt, **variables))


def serve(requests: BinaryIO, replies: BinaryIO, limit_s: float, most_characters: int) -> None:
    """Answers until the parent closes its end."""
    jinja, known = environment(), dict[bytes, Any]()
    while length := requests.read(LENGTH.size):
        head = requests.read(*LENGTH.unpack(length))
        body = requests.read(*LENGTH.unpack(requests.read(LENGTH.size)))
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            kind, text = TEXT, answer(jinja, known, head, body)
        except MemoryError:
            kind, text = MEMORY, ""
        except Exception as error:  # whatever a template raises
            kind, text = REFUSED, f"{error}"[:LONGEST_WORDS] or type(error).__name__
        if len(text) > most_characters:
            kind, text = LONG, str(len(text))
        signal.setitimer(signal.ITIMER_PROF, 0)
        said = text.encode("utf-8", "surrogatepass")
        replies.write(kind + LENGTH.pack(len(said)) + said)
        replies.flush()


def main(limit_s: float, memory_bytes: int, most_characters: int) -> None:
    """Renders what standard input asks for until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle; it closes our input
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    serve(sys.stdin.buffer, sys.stdout.buffer, limit_s, most_characters)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
