r"""Conversations in, (ids, loss_mask) out, where what is trained is right by construction.

    python data/chat.py chats.jsonl --show_mask --template chatml --tokenizer out/pretrain/data --limit 3

A template is a row of strings (TEMPLATES). From it the Jinja text is made that Hugging Face's `apply_chat_template`
takes, and `render` renders that same text, with marks around what is trained:

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n Hello!<|im_end|> \n
                                                            ~~~~~~~~~~~~~~~~ trained

At marks and special tokens it is cut into segments. Every segment is tokenized apart and its ids all get the segment's
mask. So no token lies across the border of prompt and answer, the prompt at inference (`render_prompt`) has the very
ids that it had in training, and nothing is searched for in ids afterwards. Trained is what the assistant says, its tool
calls too, and the token that ends its turn, without which a model never learns to stop. Only the template puts special
tokens in: what a user types, or a tool returns, is text, "<|im_end|>" too.

Hugging Face tokenizes the whole string at once. That gives the same ids, for at each of our borders there is a special
token or a line end, where tokenizers cut anyway, unless contents hold special tokens, or white space at their ends.
(But GPT-2's pattern, which looks ahead over white space, sees llama3's two line ends in another way.)

The template "jinja" is the tokenizer's own chat_template, whatever it is: see `_own_spans`.

Order of the file: templates; their Jinja text; conversation to ids; the command. Files are read by data/chat_files.py.
"""

import argparse
import datetime
import functools
import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

OWN = "jinja"  # the template that is the tokenizer's own chat_template
QUOTE, BEGIN, END, PROBE = "\ufdd0\ufdd1\ufdd2\ufdd3"  # noncharacters, for use in here: no text holds them


# ---- templates

class Tools(NamedTuple):
    """Jinja text of what has to do with tools. It sees `tools`, `message`, `content`, `loop` and `now`."""
    call: str                # what the assistant says when it calls: message.tool_calls, its arguments as objects
    result: str              # a message of role "tool"
    system: str = ""         # the system's turn that tells the tools, put first: content is the system message, or ""
    user: str = ""           # before a user's turn, or changing its content
    late: bool = False       # tools, and the system message with them, belong to the user's newest turn
    forgets: bool = False    # calls and results before that turn are left out
    parses: bool = False     # a result that is JSON text stands there as JSON


class Template(NamedTuple):
    """{content} is the message's text; {bos} and {eos} are the tokenizer's own tokens, nothing where it has none.

    {gap} stands before an answer that follows plain text. The published text has a blank there, and the models made for
    it use sentencepiece, which puts a blank before every text it is given: a gap of nothing gives their tokens. A
    byte-level BPE would join a blank to the answer's first word, across the border: there the gap is a line end."""
    user: str                     # {system} in it: the system message is part of the user's first turn
    opening: str                  # what comes before the assistant's text: the end of a prompt
    end: str                      # the token that ends the assistant's turn
    system: str = "{content}"
    start: str = ""               # of the conversation
    after: str = ""               # follows the end token, not trained
    tokens: tuple[str, ...] = ()  # special tokens by name, which a tokenizer may lack
    default: str = ""             # system message of a conversation that has none
    default_with_input: str = ""  # the same, if the user's first message has an "input"
    tools: Tools | None = None


QWEN_TOOLS = Tools(  # as Qwen 2.5 and 3 have them
    system=r"""
{{- '<|im_start|>system\n' ~ (content ~ '\n\n' if content else '') ~ '# Tools\n\nYou may call one or more functions to '
    ~ 'assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n' }}
{{- '<tools>' }}{%- for tool in tools %}{{- '\n' ~ (tool | tojson) }}{%- endfor %}{{- '\n</tools>\n\n' }}
{{- 'For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML '
    ~ 'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}""",
    call=r"""
{{- content or '' }}
{%- for call in message.tool_calls %}
{{- ('\n' if content or not loop.first else '') ~ '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": '
    ~ (call.function.arguments | tojson) ~ '}\n</tool_call>' }}
{%- endfor %}""",
    result=r"""
{{- '' if loop.previtem and loop.previtem.role == 'tool' else '<|im_start|>user' }}
{{- '\n<tool_response>\n' ~ (content if content is string else content | tojson) ~ '\n</tool_response>' }}
{{- '' if loop.nextitem and loop.nextitem.role == 'tool' else '<|im_end|>\n' }}""")

LLAMA3 = "<|start_header_id|>%s<|end_header_id|>\n\n"
LLAMA3_TOOLS = Tools(  # as Llama 3.1 has them; these dates its template writes by default
    system=r"""
{{- '<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\nCutting Knowledge Date: December 2023\n'
    ~ 'Today Date: 26 Jul 2024\n\n' ~ content ~ '<|eot_id|>' }}""",
    user=r"""
{%- if tools and not now.told %}{%- set now.told = true %}{%- set content %}
{{- 'Given the following functions, please respond with a JSON for a function call with its proper arguments that best '
    ~ 'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument '
    ~ 'name and its value}.Do not use variables.\n\n' }}
{%- for tool in tools %}{{- (tool | tojson(indent=4)) ~ '\n\n' }}{%- endfor %}{{- content }}
{%- endset %}{%- endif %}""",
    call=r"""
{%- if content or message.tool_calls | length > 1 %}
{{- raise_exception('template llama3 takes one tool call at a time, and no text beside it') }}
{%- endif %}
{%- for call in message.tool_calls %}
{{- '{"name": "' ~ call.function.name ~ '", "parameters": ' ~ (call.function.arguments | tojson) ~ '}' }}
{%- endfor %}""",
    result=r"""
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' ~ (content | tojson) ~ '<|eot_id|>' }}""")

MISTRAL_TOOLS = Tools(late=True, parses=True,  # as mistral-common has them since its version 3
    user=r"""
{%- if tools and loop.index0 == now.last %}
{{- '[AVAILABLE_TOOLS]' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}
{%- endif %}""",
    call=r"""
{%- if content %}{{- raise_exception('template mistral takes no text beside a tool call') }}{%- endif %}
{{- '[TOOL_CALLS][' }}
{%- for call in message.tool_calls %}
{{- (', ' if not loop.first else '') ~ '{"name": ' ~ (call.function.name | tojson) ~ ', "arguments": '
    ~ (call.function.arguments | tojson) ~ (', "id": ' ~ (call.id | tojson) if call.id else '') ~ '}' }}
{%- endfor %}{{- ']' }}""",
    result=r"""
{{- '[TOOL_RESULTS]{"content": ' ~ (content | tojson) ~ ', "call_id": ' ~ (message.tool_call_id | tojson)
    ~ '}[/TOOL_RESULTS]' }}""")
MISTRAL_V2_TOOLS = MISTRAL_TOOLS._replace(forgets=True,  # calls without ids, results in one list
    call=MISTRAL_TOOLS.call.replace(r"""(', "id": ' ~ (call.id | tojson) if call.id else '')""", "''"),
    result=r"""
{{- ', ' if loop.previtem and loop.previtem.role == 'tool' else '[TOOL_RESULTS][' }}
{{- '{"name": ' ~ (message.name | tojson) ~ ', "content": ' ~ (content | tojson) ~ '}' }}
{{- '' if loop.nextitem and loop.nextitem.role == 'tool' else '][/TOOL_RESULTS]' }}""")

TEMPLATES = {
    "chatml": Template(  # OpenAI's; Qwen's without its default system message
        system="<|im_start|>system\n{content}<|im_end|>\n", user="<|im_start|>user\n{content}<|im_end|>\n",
        opening="<|im_start|>assistant\n", end="<|im_end|>", after="\n", tokens=("<|im_start|>", "<|im_end|>"),
        tools=QWEN_TOOLS),
    "llama2": Template(  # without Meta's blank before the end token: untrained, it would keep the model from ending
        system="<<SYS>>\n{content}\n<</SYS>>\n\n", user="{bos}[INST] {system}{content} [/INST]", opening="{gap}",
        end="{eos}"),
    "llama3": Template(
        start="<|begin_of_text|>", system=LLAMA3 % "system" + "{content}<|eot_id|>",
        user=LLAMA3 % "user" + "{content}<|eot_id|>", opening=LLAMA3 % "assistant", end="<|eot_id|>",
        tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), tools=LLAMA3_TOOLS),
    # v3 (sentencepiece) and Tekken (BPE), which differ by sentencepiece's blanks only. Mistral's own code moves the
    # system text to the newest user turn at each request; here it stays in the first, so that all answers see it,
    # unless there are tools, which must go with the newest.
    "mistral": Template(
        start="{bos}", system="{content}\n\n", user="[INST]{system}{content}[/INST]", opening="", end="{eos}",
        tokens=("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
                "[/TOOL_RESULTS]"), tools=MISTRAL_TOOLS),
    "vicuna": Template(  # FastChat's v1.1
        start="{bos}", system="{content} ", user="{system}USER: {content}", opening=" ASSISTANT:{gap}", end="{eos}",
        default="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
                "detailed, and polite answers to the user's questions."),
    "alpaca": Template(  # Stanford's; further turns as in FastChat
        start="{bos}", user="{system}\n\n### Instruction:\n{content}", opening="\n\n### Response:\n", end="{eos}",
        default="Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.",
        default_with_input="Below is an instruction that describes a task, paired with an input that provides further "
                           "context. Write a response that appropriately completes the request."),
}
TEMPLATES["mistral_v2"] = TEMPLATES["mistral"]._replace(tools=MISTRAL_V2_TOOLS)
MISTRAL_V1 = TEMPLATES["mistral"]._replace(  # in the first version the markers are text, as in Llama 2
    user="[INST] {system}{content} [/INST]", opening="{gap}", tokens=(), tools=None)


def template_tokens(template: str) -> tuple[str, ...]:
    """Names of the special tokens that the template needs besides the tokenizer's own beginning and end."""
    return () if template == OWN else _row(template).tokens


def prepare_tokenizer(tokenizer, template: str) -> list[str]:
    """Add to `tokenizer` the special tokens that the template needs, and set its `chat_template`, in place.

    Returns the names added: the model's embedding must then grow to `tokenizer.vocab_size`, and the user be told.
    ValueError: the tokenizer has no end token, or lacks tokens and can take no more (sentencepiece)."""
    missing = [name for name in template_tokens(template) if name not in tokenizer.special_tokens]
    if template == "mistral" and "[INST]" in missing and _puts_blank(tokenizer):
        missing = []  # Mistral's v1
    tokenizer.add_special_tokens(missing)
    stop_ids(tokenizer, template)  # raises if there is no end token
    if template != OWN:
        tokenizer.chat_template = None if _puts_blank(tokenizer) else jinja_template(template)
    return missing


def stop_ids(tokenizer, template: str = "chatml") -> set[int]:
    """Ids that end the assistant's turn: the template's end token, and the end of a document."""
    if template == OWN:  # the first special token behind an answer
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        text = _rendered(tokenizer.chat_template or "", probe, tokenizer, None, False).rpartition(PROBE)[2]
        found = [part.text for part in _cut(text, tokenizer, tokenizer.special_tokens) if part.special]
        ends = {_special_id(name, tokenizer) for name in found[:1]}
    else:
        ends = {_special_id(_row(template, tokenizer).end, tokenizer)}
    if not (ends := (ends | {tokenizer.eos_token_id}) - {None}):
        raise ValueError(f"template {template!r} ends turns with the tokenizer's end token, and it has none")
    return ends


def template_of(tokenizer) -> str | None:
    """The template that `prepare_tokenizer` prepared the tokenizer for, known by its Jinja text; "jinja" if that text
    is another; None if there is none."""
    known = (name for name in TEMPLATES if tokenizer.chat_template == jinja_template(name))
    return next(known, OWN if tokenizer.chat_template else None)


# ---- their Jinja text

SKELETON = r"""
{%- set now = namespace(system=<default>, own=false, told=false, last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set now.last = loop.index0 %}{%- endif %}{%- endfor %}
{{- <start> }}
{%- for message in messages %}
{%- set content = message.content %}
{%- if tools and loop.first %}
{%- set content = content if message.role == 'system' else '' %}
<tools.system>
{%- set content = message.content %}
{%- endif %}
{%- if message.role == 'assistant' and (<keeps> or not message.tool_calls) %}
{{- <opening> }}<begin>
{%- if message.tool_calls %}
<tools.call>
{%- else %}
{{- content }}
{%- endif %}
{{- <end> }}<finish>
{{- <after> }}
{%- elif message.role == 'user' %}
<tools.user><with_input>
{%- set system = <system> if now.system and <now> else '' %}
{{- <user> }}
{%- if <now> %}{%- set now.system = '' %}{%- endif %}
{%- elif message.role == 'system' %}
<system_turn>
{%- elif message.role == 'tool' and <keeps> %}
<tools.result>
{%- elif message.role not in ['assistant', 'tool'] %}
{{- raise_exception('unknown role ' ~ message.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- <opening> }}{%- endif %}"""
WITH_INPUT = r"""
{%- if message.input %}
{%- set content = content[:-(message.input | length)] ~ "### Input:\n" ~ message.input %}
{%- if now.system and not now.own %}{%- set now.system = <other> %}{%- endif %}
{%- endif %}"""
KEEP_SYSTEM = r"""
{%- set now.system = now.system ~ '\n\n' ~ content if now.own and now.system else content %}{%- set now.own = true %}"""
SYSTEM_TURN = """{%- if not (tools and loop.first) %}{{- <system> }}{%- endif %}"""
NO_TOOLS = "{{- raise_exception('this template has no form for tools') }}"


def jinja_template(template: str) -> str:
    """The `chat_template` of tokenizer_config.json: with it, and a BPE tokenizer, `apply_chat_template(messages)` gives
    `render`'s ids, and with add_generation_prompt=True `render_prompt`'s. (It takes the arguments of tool calls as
    objects; Mistral's, results that are JSON as well.)"""
    return _jinja(_row(template))


@functools.lru_cache(32)
def _jinja(row: Template, marks: bool = False) -> str:
    """`marks`: for `segments`, with marks around what is trained, and the gap that the tokenizer at hand needs."""
    names = {"{bos}": "bos_token", "{eos}": "eos_token", "{content}": "content", "{system}": "system",
             "{said}": "now.system", "{gap}": "gap" if marks else json.dumps("\n")}

    def join(field: str) -> str:  # "{bos}[INST] {content}" -> bos_token ~ "[INST] " ~ content
        parts = [part for part in re.split("({bos}|{eos}|{content}|{system}|{said}|{gap})", field) if part]
        return " ~ ".join(names.get(part, json.dumps(part)) for part in parts) or "''"

    within, tools = "{system}" in row.user, row.tools or Tools(call=NO_TOOLS, result=NO_TOOLS, system=NO_TOOLS)
    fill = {"default": json.dumps(row.default), "start": join(row.start), "opening": join(row.opening),
            "end": join(row.end), "after": join(row.after), "user": join(row.user),
            "system": "(%s)" % join(row.system.replace("{content}", "{said}")),
            "system_turn": KEEP_SYSTEM if within else SYSTEM_TURN.replace("<system>", join(row.system)),
            "with_input": row.default_with_input and WITH_INPUT.replace("<other>", json.dumps(row.default_with_input)),
            "now": "(not tools or loop.index0 == now.last)" if tools.late else "true",
            "keeps": "loop.index0 > now.last" if tools.forgets else "true",
            "begin": "{{- mark(loop.index0) }}" * marks, "finish": ("{{- '%s' }}" % END) * marks}
    fill |= {f"tools.{name}": text for name, text in tools._asdict().items()}
    return re.sub(r"\n+", "\n", re.sub("<([a-z_.]+)>", lambda slot: fill[slot[1]], SKELETON)).strip()


def _row(template: str, tokenizer=None) -> Template:
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r} (known: {', '.join(TEMPLATES)}; {OWN}, the tokenizer's own)")
    v1 = template == "mistral" and tokenizer is not None and "[INST]" not in tokenizer.special_tokens
    return MISTRAL_V1 if v1 else TEMPLATES[template]


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: how a template says, to transformers too, what the assistant speaks."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return BEGIN + caller() + END


@functools.lru_cache(8)
def _compiled(text: str) -> jinja2.Template:
    """As transformers compiles chat templates."""
    def refuse(message: str):
        raise jinja2.TemplateError(message)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=[_Generation, "jinja2.ext.loopcontrols"])
    jinja.filters["tojson"] = lambda x, indent=None, ensure_ascii=False, **how: json.dumps(
        x, indent=indent, ensure_ascii=ensure_ascii, **how)
    jinja.globals["raise_exception"] = refuse
    jinja.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return jinja.from_string(text)


# ---- conversation -> segments -> ids

class Segment(NamedTuple):
    text: str             # plain text; or a special token's name
    special: bool = False
    trained: bool = False


def segments(messages: list[dict], tokenizer, template: str = "chatml", tools: list | None = None, *,
             train_from: int = 0, prompt: bool = False) -> list[Segment]:
    """The conversation cut into segments; with `prompt`, the opening of the assistant's next turn follows."""
    check_messages(messages)
    if template == OWN:
        text = _own_text(messages, tokenizer, tools, train_from, prompt)
        return _cut(text, tokenizer, tokenizer.special_tokens)
    row = _row(template, tokenizer)
    for name in row.tokens:
        _special_id(name, tokenizer)
    if not row.tools and (tools or any(m.get("tool_calls") or m["role"] == "tool" for m in messages)):
        raise ValueError(f"template {template!r} has no form for tools")
    for message, following in zip(messages, [*messages[1:], {"role": None}]):
        if "{system}" in row.user and message["role"] == "system" and following["role"] not in ("system", "user"):
            raise ValueError(f"template {template!r} knows system messages only right before the user's")
    text = _rendered(_jinja(row, marks=True), messages, tokenizer, tools, prompt, parses=row.tools and row.tools.parses,
                     gap="" if _puts_blank(tokenizer) else "\n", mark=lambda i: BEGIN if i >= train_from else "")
    return _cut(text, tokenizer, [*row.tokens, *_ends(tokenizer).values()])


def _rendered(jinja: str, messages: list[dict], tokenizer, tools, prompt: bool, parses=False, **more) -> str:
    """The Jinja text rendered, where QUOTE is in every special token's name that contents hold: there it is text."""
    names = "|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True)))

    def quoted(value):
        if isinstance(value, str):
            if not value.isascii() and re.search(f"[{QUOTE}-{PROBE}]", value) and value != PROBE:
                raise ValueError("a text holds one of the noncharacters U+FDD0 to U+FDD3, which serve as marks here")
            return re.sub(names, lambda name: name[0][0] + QUOTE + name[0][1:], value) if names else value
        if isinstance(value, dict):
            return {key: quoted(inner) for key, inner in value.items()}
        return [quoted(inner) for inner in value] if isinstance(value, list) else value

    prepared = [message if message["role"] in ("system", "user") else _objects(message, parses) for message in messages]
    try:
        return _compiled(jinja).render(messages=quoted(prepared), tools=quoted(tools) or None,
                                       add_generation_prompt=prompt, **_ends(tokenizer), **more)
    except (jinja2.TemplateError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"the chat template does not render this conversation: {error}") from None


def _objects(message: dict, parses: bool) -> dict:
    """A message whose tool calls have their arguments as objects (OpenAI has JSON text), and, if `parses`, whose result
    is one, where it is JSON."""
    def parsed(value):
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError:
            return value

    calls = [call["function"] | {"arguments": parsed(call["function"].get("arguments"))}
             for call in message.get("tool_calls") or ()]
    if wrong := [call["arguments"] for call in calls if not isinstance(call["arguments"], dict)]:
        raise ValueError(f"the arguments of a tool call must be a JSON object, not {str(wrong[0])[:60]!r}")
    if calls:
        calls = {"tool_calls": [old | {"function": new} for old, new in zip(message["tool_calls"], calls)]}
    result = {"content": parsed(message["content"])} if message["role"] == "tool" and parses else {}
    return message | dict(calls) | result


def _own_text(messages: list[dict], tokenizer, tools: list | None, train_from: int, prompt: bool) -> str:
    """The tokenizer's own template rendered, with marks around what is trained: what {% generation %} blocks hold, and
    a token right behind that ends the turn. In a template without them: what follows the prompt, rendered up to each
    answer, to the next token that ends a turn; ValueError if the whole does not begin with that prompt."""
    if not tokenizer.chat_template:
        raise ValueError(f"template {OWN!r} is the tokenizer's own chat_template, and it has none")

    def text(until: int, prompt: bool = False) -> str:
        return _rendered(tokenizer.chat_template, messages[:until], tokenizer, tools, prompt)

    whole = text(len(messages), prompt)
    if prompt:
        return whole.replace(BEGIN, "")
    names, ends = {i: name for name, i in tokenizer.special_tokens.items()}, stop_ids(tokenizer, OWN)
    stops = re.compile("|".join(re.escape(names[i]) for i in sorted(ends) if i in names) or "(?!)")
    if BEGIN in whole:
        whole = whole.replace(BEGIN, "", text(train_from).count(BEGIN) if train_from else 0)
        return re.sub(f"{END}({stops.pattern})", rf"\1{END}", whole)
    parts, at = [], 0
    for index in range(train_from, len(messages)):
        if messages[index]["role"] == "assistant":
            begin = len(before := text(index, prompt=True))
            stop = stops.search(whole, begin)
            if not whole.startswith(before) or begin < at or not stop:
                raise ValueError(f"message {index}: the chat template does not tell where this answer stands, for what "
                                 "comes before it is rendered otherwise alone: mark answers in it by {% generation %}, "
                                 "or choose another --template")
            parts += [whole[at:begin], BEGIN, whole[begin:stop.end()], END]
            at = stop.end()
    return "".join(parts) + whole[at:]


def _cut(text: str, tokenizer, names) -> list[Segment]:
    """Cut a rendered text at marks and at special tokens (with the white space that goes with them)."""
    flags, found, trained = getattr(tokenizer, "flags", {}), [], False
    names = sorted({name for name in names if name}, key=len, reverse=True)
    special = "|".join(r"\s*" * ("lstrip" in flags.get(name, ())) + re.escape(name)
                       + r"\s*" * ("rstrip" in flags.get(name, ())) for name in names)
    for part in re.split(f"([{BEGIN}{END}]|{special or BEGIN})", text):
        if part in (BEGIN, END):
            trained = part == BEGIN
        elif part in names or part.strip() in names:
            found.append(Segment(part if part in names else part.strip(), True, trained))
        elif part:
            found.append(Segment(part.replace(QUOTE, ""), False, trained))
    return found


def _ids(found: list[Segment], tokenizer, together: bool) -> tuple[list[int], list[int]]:
    """`together`: the ids of a stretch between special tokens are those of the whole, as in Hugging Face, unless a
    token would lie across a border of what is trained."""
    ids: list[int] = []
    mask: list[int] = []
    stretch, begin = "", 0  # the plain text since the last special token, and where its ids begin
    for text, special, trained in found:
        if special:
            new, stretch, begin = [_special_id(text, tokenizer)], "", len(ids) + 1
        else:
            new, stretch = _plain(text, tokenizer, not ids), stretch + text
            whole = _plain(stretch, tokenizer, begin == 0) if together and stretch != text else []
            new = whole[len(ids) - begin:] if whole[:len(ids) - begin] == ids[begin:] and whole else new
        ids += new
        mask += [int(trained)] * len(new)
    return ids, mask


def _plain(text: str, tokenizer, first: bool) -> list[int]:
    """Ids of plain text; text of special tokens stays text. A tokenizer that puts a blank before the conversation only
    is shown that this is not its beginning."""
    if first or getattr(tokenizer, "prefix", "") != "first":
        return tokenizer.encode(text)
    before = next(name for name in tokenizer.special_tokens if not tokenizer.flags.get(name))
    return tokenizer.encode(before + text, [before])[1:]


def _puts_blank(tokenizer) -> bool:
    """Whether the tokenizer itself puts a blank before each text, as sentencepiece models mostly do."""
    return tokenizer.decode_bytes(_plain("a", tokenizer, False) * 2) == b"a a"


def _ends(tokenizer) -> dict[str, str]:
    """The names that templates know as bos_token, eos_token and pad_token, of those that the tokenizer has."""
    names = {i: name for name, i in (tokenizer.special_tokens | tokenizer.added_tokens).items()}
    ends = {end: getattr(tokenizer, f"{end}_id") for end in ("bos_token", "eos_token", "pad_token")}
    return {end: names[i] for end, i in ends.items() if i in names}


def _special_id(name: str, tokenizer) -> int | None:
    """Id of a special token; None for a {bos} or {eos} that the tokenizer has not."""
    if name in ("{bos}", "{eos}"):
        return tokenizer.bos_token_id if name == "{bos}" else tokenizer.eos_token_id
    if (i := tokenizer.special_tokens.get(name, tokenizer.added_tokens.get(name))) is None:
        raise ValueError(f"the tokenizer has no special token {name}, which the template needs: add it "
                         "(prepare_tokenizer), and rows to the model's embedding")
    return i


def render(messages: list[dict], tokenizer, template: str = "chatml", tools: list | None = None, *,
           train_from: int = 0) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and its loss mask, two lists of one length; mask 1: this token is to be predicted.

    messages     [{"role": "system" | "user" | "assistant" | "tool", "content": str}, ...]; an assistant's may have
                 "tool_calls", [{"id", "function": {"name", "arguments"}}], a tool's "tool_call_id" and "name"
    tools        definitions, as OpenAI has them: [{"type": "function", "function": {"name", "description", ...}}, ...]
    train_from   assistant messages before this index are not trained: in preference pairs, those of the prompt
    ValueError   empty conversation, unknown role, the assistant never speaks, a token that the tokenizer has not, tools
                 in a template without a form for them
    """
    check_messages(messages, train_from)
    stop_ids(tokenizer, template)  # raises if there is no end token to train
    found = segments(messages, tokenizer, template, tools, train_from=train_from)
    return _ids(found, tokenizer, together=template == OWN)


def render_prompt(messages: list[dict], tokenizer, template: str = "chatml", tools: list | None = None) -> list[int]:
    """Ids of a conversation up to where the assistant begins to speak: exactly those that `render` puts before its
    next answer. (In Mistral's, tools and the system text beside them move to each new turn of the user's.)"""
    return _ids(segments(messages, tokenizer, template, tools, prompt=True), tokenizer, together=template == OWN)[0]


def truncate(ids: list[int], mask: list[int], max_length: int) -> tuple[list[int], list[int]] | None:
    """At most `max_length` tokens of a conversation, with something to train on among them; None if there is nothing.

    The end is cut off. If that leaves no trained token (a prompt as long as the window), instead the beginning is, and
    what follows the last trained token: the last answer stays, or its end. A trained token counts from the second
    place on, for nothing predicts the first. No end token is put where an answer was cut: it has not ended. The caller
    counts the rows that came back shorter, and the None."""
    if len(ids) > max_length and not any(mask[1:max_length]):
        end = max((i + 1 for i, trained in enumerate(mask) if trained), default=0)
        ids, mask = ids[max(end - max_length, 0):end], mask[max(end - max_length, 0):end]
    ids, mask = ids[:max_length], mask[:max_length]
    return (ids, mask) if any(mask[1:]) else None


def check_messages(messages: list[dict], train_from: int | None = None) -> None:
    """ValueError: no messages, an unknown role, no text; with `train_from`, no assistant from there on."""
    if not messages:
        raise ValueError("an empty conversation")
    for message in messages:
        role, content = message["role"], message.get("content")
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"unknown role {role!r} (known: system, user, assistant, tool)")
        calls = role == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not (role == "tool" and content is not None or calls and content is None):
            raise ValueError("the content of a message must be text, not "
                             + ("nothing" if content is None else type(content).__name__))
    if train_from is not None and all(message["role"] != "assistant" for message in messages[train_from:]):
        raise ValueError("the assistant never speaks: nothing to train on")


# ---- the command

def show(ids: list[int], mask: list[int], tokenizer, colour: bool) -> str:
    """The conversation as text, special tokens by name, what is trained in green or [[between brackets]]."""
    name_of = {i: name for name, i in tokenizer.special_tokens.items()}
    parts, begin = [], 0
    for i in range(1, len(ids) + 1):
        if i < len(ids) and mask[i] == mask[begin] and not {ids[i], ids[begin]} & name_of.keys():
            continue  # the run goes on: only whole runs decode, a token may be half a character
        text = name_of.get(ids[begin]) or tokenizer.decode(ids[begin:i])
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text)  # data must not steer the terminal
        trained = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
        parts.append(text.join(trained) if mask[begin] else text)
        begin = i
    return "".join(parts).replace("\033[0m\033[32m" if colour else "]][[", "")


def __getattr__(name: str):  # from data.chat import read_chats
    if name in ("Chat", "Preference", "read_chats", "read_preferences"):
        from data import chat_files
        return getattr(chat_files, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main():
    from data.chat_files import read_chats
    from data.tokenizer import BPETokenizer, load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="files or folders of conversations")
    parser.add_argument("--show_mask", action="store_true", help="print the conversations, what is trained in green")
    parser.add_argument("--template", default="chatml", choices=[*TEMPLATES, OWN])
    parser.add_argument("--tokenizer", help="a tokenizer's file or folder (default: one token per byte)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N conversations (0: all)")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else BPETokenizer.train([], 257)
    if added := prepare_tokenizer(tokenizer, args.template):
        print(f"tokenizer: without {' '.join(added)}, added for this display")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    conversations = tokens = trained = longest = 0
    for name, messages, tools in itertools.islice(read_chats(args.files), args.limit or None):
        ids, mask = render(messages, tokenizer, args.template, tools)
        if args.show_mask:
            print(f"---- {name}: {len(ids)} tokens, {sum(mask)} trained", show(ids, mask, tokenizer, colour), sep="\n")
        conversations, tokens, trained = conversations + 1, tokens + len(ids), trained + sum(mask)
        longest = max(longest, len(ids))
    print(f"{conversations:,} conversations, {tokens:,} tokens, {trained:,} trained "
          f"({trained / max(tokens, 1):.0%}), the longest {longest:,}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only data/ would be on it
    from cli import run

    run(main)
