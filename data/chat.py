r"""Conversations in, (ids, loss_mask) out, where what is trained is right by construction.

    python data/chat.py chats.jsonl --show_mask --template chatml --tokenizer out/pretrain/data --limit 3

A conversation becomes a list of segments, each a stretch of text or one special token, each trained or not:

    <|im_start|>  user\nHi  <|im_end|>  \n  <|im_start|>  assistant\n  Hello!  <|im_end|>  \n
                                                                       ~~~~~~~~~~~~~~~~~~ trained

Every segment is tokenized apart and its ids all get the segment's mask. So no token lies across the border of prompt
and answer, the prompt at inference (`render_prompt`) has the very ids that it had in training, and nothing is searched
for in ids afterwards. Trained is the assistant's text and the token that ends its turn, without which a model never
learns to stop. Only the template puts special tokens in: what a user types is text, "<|im_end|>" too.

A template is a row of strings (TEMPLATES), and the Jinja text for Hugging Face's `apply_chat_template` is made from the
same row. Hugging Face tokenizes the whole string at once. That gives the same ids, for at each of our borders there is
a special token or a line end, where tokenizers cut anyway, unless contents hold special tokens, or white space at their
ends. (But GPT-2's pattern, which looks ahead over white space, sees llama3's two line ends in another way.)

Order of the file: templates; conversation to ids; rows of files to conversations; the command.
"""

import argparse
import gzip
import itertools
import json
import os
import re
import sys
import zlib
from pathlib import Path
from typing import Iterator, NamedTuple

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "chatgpt": "assistant"}  # as files name them -> as we do
ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


# ---- templates

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


LLAMA3 = "<|start_header_id|>%s<|end_header_id|>\n\n"

TEMPLATES = {
    "chatml": Template(  # OpenAI's; Qwen's without its default system message
        system="<|im_start|>system\n{content}<|im_end|>\n", user="<|im_start|>user\n{content}<|im_end|>\n",
        opening="<|im_start|>assistant\n", end="<|im_end|>", after="\n", tokens=("<|im_start|>", "<|im_end|>")),
    "llama2": Template(  # without Meta's blank before the end token: untrained, it would keep the model from ending
        system="<<SYS>>\n{content}\n<</SYS>>\n\n", user="{bos}[INST] {system}{content} [/INST]", opening="{gap}",
        end="{eos}"),
    "llama3": Template(
        start="<|begin_of_text|>", system=LLAMA3 % "system" + "{content}<|eot_id|>",
        user=LLAMA3 % "user" + "{content}<|eot_id|>", opening=LLAMA3 % "assistant", end="<|eot_id|>",
        tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    # v3 (sentencepiece) and Tekken (BPE), which differ by sentencepiece's blanks only. Mistral's own code moves the
    # system text to the newest user turn at each request; here it stays in the first, so that all answers see it.
    "mistral": Template(
        start="{bos}", system="{content}\n\n", user="[INST]{system}{content}[/INST]", opening="", end="{eos}",
        tokens=("[INST]", "[/INST]")),
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
MISTRAL_V1 = TEMPLATES["mistral"]._replace(  # in the first version the markers are text, as in Llama 2
    user="[INST] {system}{content} [/INST]", opening="{gap}", tokens=())


def template_tokens(template: str) -> tuple[str, ...]:
    """Names of the special tokens that the template needs besides the tokenizer's own beginning and end."""
    return _row(template).tokens


def prepare_tokenizer(tokenizer, template: str) -> list[str]:
    """Add to `tokenizer` the special tokens that the template needs, and set its `chat_template`, in place.

    Returns the names added: the model's embedding must then grow to `tokenizer.vocab_size`, and the user be told.
    ValueError: the tokenizer has no end token, or lacks tokens and can take no more (sentencepiece)."""
    missing = [name for name in template_tokens(template) if name not in tokenizer.special_tokens]
    if template == "mistral" and _puts_blank(tokenizer):
        missing = []  # Mistral's v1
    tokenizer.add_special_tokens(missing)
    stop_ids(tokenizer, template)  # raises if there is no end token
    tokenizer.chat_template = None if _puts_blank(tokenizer) else jinja_template(template)
    return missing


def stop_ids(tokenizer, template: str = "chatml") -> set[int]:
    """Ids that end the assistant's turn: the template's end token, and the end of a document."""
    ends = {_special_id(_row(template, tokenizer).end, tokenizer), tokenizer.eos_token_id} - {None}
    if not ends:
        raise ValueError(f"template {template!r} ends turns with the tokenizer's end token, and it has none")
    return ends


def template_of(tokenizer) -> str | None:
    """The template that `prepare_tokenizer` prepared the tokenizer for, known by its Jinja text; else None."""
    return next((name for name in TEMPLATES if tokenizer.chat_template == jinja_template(name)), None)


def jinja_template(template: str) -> str:
    """The `chat_template` of tokenizer_config.json: with it, and a BPE tokenizer, `apply_chat_template(messages)` gives
    `render`'s ids, and with add_generation_prompt=True `render_prompt`'s."""
    row = _row(template)
    names = {"{bos}": "bos_token", "{eos}": "eos_token", "{content}": "content", "{system}": "now.system"}

    def join(field: str) -> str:  # "{bos}[INST] {content}" -> bos_token ~ "[INST] " ~ content
        return " ~ ".join(names.get(part, json.dumps(part)) for part in _split(field.replace("{gap}", "\n"))) or "''"

    default = join(row.system.replace("{content}", row.default) if row.default else "")
    with_input = [
        '{%- if message.input %}',
        '{%- set content = content[:-(message.input | length)] ~ "### Input:\\n" ~ message.input %}',
        f'{{%- if now.system == {default} %}}',
        f'{{%- set now.system = {json.dumps(row.default_with_input)} %}}{{%- endif %}}',
        '{%- endif %}'] if row.default_with_input else []
    return "\n".join([
        f"{{%- set now = namespace(system={default}) %}}{{{{- {join(row.start)} }}}}",
        "{%- for message in messages %}{%- set content = message.content %}",
        "{%- if message.role == 'assistant' %}",
        f"{{{{- {join(row.opening + '{content}' + row.end + row.after)} }}}}",
        "{%- elif message.role == 'user' %}", *with_input,
        f"{{{{- {join(row.user)} }}}}{{%- set now.system = '' %}}",
        "{%- elif message.role == 'system' %}",
        f"{{%- set now.system = {join(row.system)} %}}" if "{system}" in row.user else f"{{{{- {join(row.system)} }}}}",
        "{%- else %}{{- raise_exception('unknown role ' ~ message.role) }}{%- endif %}",
        "{%- endfor %}",
        f"{{%- if add_generation_prompt %}}{{{{- {join(row.opening)} }}}}{{%- endif %}}"])


def _row(template: str, tokenizer=None) -> Template:
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r} (known: {', '.join(TEMPLATES)})")
    v1 = template == "mistral" and tokenizer is not None and "[INST]" not in tokenizer.special_tokens
    return MISTRAL_V1 if v1 else TEMPLATES[template]


def _split(field: str, tokens: tuple[str, ...] = ()) -> list[str]:
    """A template's field, cut at its special tokens and placeholders, which stay as parts."""
    names = "|".join(map(re.escape, (*tokens, "{bos}", "{eos}", "{content}", "{system}", "{gap}")))
    return [part for part in re.split(f"({names})", field) if part]


def _puts_blank(tokenizer) -> bool:
    """Whether the tokenizer itself puts a blank before each text, as sentencepiece models mostly do."""
    return tokenizer.decode_bytes(tokenizer.encode("a") * 2) == b"a a"


def _special_id(name: str, tokenizer) -> int | None:
    """Id of a special token; None for a {bos} or {eos} that the tokenizer has not."""
    if name in ("{bos}", "{eos}"):
        return tokenizer.bos_token_id if name == "{bos}" else tokenizer.eos_token_id
    if name not in tokenizer.special_tokens:
        raise ValueError(f"the tokenizer has no special token {name}, which the template needs: add it "
                         "(prepare_tokenizer), and rows to the model's embedding")
    return tokenizer.special_tokens[name]


# ---- conversation -> segments -> ids

class Segment(NamedTuple):
    text: str             # plain text; or a special token's name, {bos} or {eos}
    special: bool = False
    trained: bool = False


def segments(messages: list[dict], tokenizer, template: str = "chatml", *, train_from: int = 0,
             prompt: bool = False) -> list[Segment]:
    """The conversation cut into segments; with `prompt`, the opening of the assistant's next turn follows."""
    row, gap = _row(template, tokenizer), "" if _puts_blank(tokenizer) else "\n"
    found: list[Segment] = []

    def put(field: str, content: str = "", system: str = "") -> None:
        filled = {"{content}": content, "{system}": system and row.system.replace("{content}", system), "{gap}": gap}
        for part in _split(field, row.tokens):
            if part in row.tokens or part in ("{bos}", "{eos}"):
                found.append(Segment(part, special=True))
            elif found and not found[-1].special:  # plain text goes on: one text to the tokenizer
                found.append(Segment(found.pop().text + filled.get(part, part)))
            else:
                found.append(Segment(filled.get(part, part)))

    check_messages(messages)
    system = row.default  # what the user's next turn has to carry
    put(row.start)
    for index, (message, content) in enumerate((message, message["content"]) for message in messages):
        if message["role"] == "assistant":
            put(row.opening)
            trained = index >= train_from
            found += [Segment(content, trained=trained), Segment(row.end, special=True, trained=trained)]
            put(row.after)
        elif message["role"] == "user":
            if row.default_with_input and message.get("input"):
                content = content[:-len(message["input"])] + "### Input:\n" + message["input"]
                system = row.default_with_input if system == row.default else system
            put(row.user, content, system)
            system = ""
        elif "{system}" not in row.user:
            put(row.system, content)
        elif [m["role"] for m in messages[index:index + 2]] == ["system", "user"]:
            system = content
        else:
            raise ValueError(f"template {template!r} knows system messages only right before the user's")
    if prompt:
        put(row.opening)
    return found


def _ids(found: list[Segment], tokenizer) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    mask: list[int] = []
    for text, special, trained in found:
        new = [_special_id(text, tokenizer)] if special else tokenizer.encode(text)  # text of special tokens stays text
        new = [i for i in new if i is not None]
        ids += new
        mask += [int(trained)] * len(new)
    return ids, mask


def render(messages: list[dict], tokenizer, template: str = "chatml", tools: list | None = None, *,
           train_from: int = 0) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and its loss mask, two lists of one length; mask 1: this token is to be predicted.

    messages     [{"role": "system" | "user" | "assistant", "content": str}, ...]
    train_from   assistant messages before this index are not trained: in preference pairs, those of the prompt
    ValueError   empty conversation, unknown role, the assistant never speaks, a token that the tokenizer has not, tools
    """
    if tools:
        raise ValueError("tools: no template here renders tool definitions")
    check_messages(messages, train_from)
    stop_ids(tokenizer, template)  # raises if there is no end token to train
    return _ids(segments(messages, tokenizer, template, train_from=train_from), tokenizer)


def render_prompt(messages: list[dict], tokenizer, template: str = "chatml") -> list[int]:
    """Ids of a conversation up to where the assistant begins to speak: exactly those that `render` puts before its
    next answer."""
    return _ids(segments(messages, tokenizer, template, prompt=True), tokenizer)[0]


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
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"unknown role {message['role']!r} (known: system, user, assistant)")
        if not isinstance(message["content"], str):
            raise ValueError(f"the content of a message must be text, not {_kind(message['content'])}")
    if train_from is not None and all(message["role"] != "assistant" for message in messages[train_from:]):
        raise ValueError("the assistant never speaks: nothing to train on")


# ---- rows of files -> conversations

class Chat(NamedTuple):
    name: str             # file:line
    messages: list[dict]  # {"role", "content"}; the user's of an Alpaca row with an input has that as "input", too
    tools: list | None = None


class Preference(NamedTuple):
    """One prompt and two ways to go on. A pair whose two are the same teaches nothing: skip and count it (`is_tie`)."""
    name: str
    prompt: list[dict]    # messages
    chosen: list[dict]    # messages that follow the prompt, the first of them the assistant's
    rejected: list[dict]

    @property
    def is_tie(self) -> bool:
        return self.chosen == self.rejected


def read_chats(sources: list[str]) -> Iterator[Chat]:
    """Conversations of files and of all .json, .jsonl (.gz) files in folders, in order. A row may have

        messages                          OpenAI:    [{"role": "user", "content": ...}, ...]
        conversations                     ShareGPT:  [{"from": "human", "value": ...}, ...]
        instruction, input, output        Alpaca; the user says instruction, blank line, input
        instruction, instances            self-instruct: one conversation per instance, {"input", "output"}
        prompt, completion                texts or messages
        chosen, rejected                  a preference row without an output: its chosen side

    and besides `system` (text) and `tools`. OSError or ValueError, naming file and line, when what is wrong is reached.
    """
    for name, row in _rows(sources):
        for messages in _named(name, _chats, row):
            yield Chat(name, messages, row.get("tools") or None)


def read_preferences(sources: list[str]) -> Iterator[Preference]:
    """Preference pairs of files and folders. A row has `chosen` and `rejected`, each a text, a message or messages, and
    `prompt` (text or messages), `conversations`, `messages` or `instruction` (`input`); if it has no `chosen`, `output`
    is it. Without a prompt both are whole conversations, lists of messages or HH transcripts ("Human: ... Assistant:
    ..."): what they have in common, up to a turn of the assistant's, is the prompt. Errors as in `read_chats`.
    To score a pair: render(prompt + chosen, tokenizer, template, train_from=len(prompt))."""
    for name, row in _rows(sources):
        yield Preference(name, *_named(name, _preference, row))


def _named(name: str, function, row: dict):
    try:
        return function(row)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _chats(row: dict) -> list[list[dict]]:
    if "rejected" in row and "output" not in row or "rejected_messages" in row:
        prompt, chosen, _ = _preference(row)
        return [prompt + chosen]
    field = _field(row)
    if field == "instruction":
        instances = row.get("instances", [row])
        if not isinstance(instances, list) or not all(isinstance(one, dict) for one in instances) or not instances:
            raise ValueError('"instances" must be a list of objects with input and output')
        found = [_prompt(row | one) + _dialogue(one.get("output"), "assistant", "output") for one in instances]
    else:
        answer = _dialogue(row.get("completion"), "assistant", "completion") if field == "prompt" else []
        found = [_prompt(row) + answer]
    for messages in found:
        check_messages(messages, train_from=0)
    return found


def _preference(row: dict) -> tuple[list[dict], list[dict], list[dict]]:
    sides = []
    for side, other in (("chosen", "output"), ("rejected", "rejected")):
        value = row.get(side, row.get(f"{side}_messages", row.get(other)))
        sides.append(_dialogue(value, "assistant", side))
    prompt = []
    if sides[0][:1] and sides[0][0]["role"] == "assistant":  # answers only
        prompt = _prompt(row)
    else:  # whole conversations
        common = 0
        while common < min(map(len, sides)) and sides[0][common] == sides[1][common]:
            common += 1
        while common and not all(side[common:] and side[common]["role"] == "assistant" for side in sides):
            common -= 1
        prompt, sides = sides[0][:common], [side[common:] for side in sides]
    if not prompt:
        raise ValueError("chosen and rejected have no prompt: none is given, and they do not begin alike")
    for side, messages in zip(("chosen", "rejected"), sides):
        if not messages or messages[0]["role"] != "assistant":
            raise ValueError(f'"{side}" does not go on from the prompt with a turn of the assistant')
    return prompt, *sides


def _field(row: dict) -> str:
    """The field that holds the conversation, or its beginning."""
    for field in ("messages", "conversations", "instruction", "prompt"):
        if field in row:
            return field
    raise ValueError("no conversation in this row: expected messages, conversations, instruction and output, or prompt "
                     f"and completion (or chosen and rejected); found {', '.join(row) or 'nothing'}")


def _prompt(row: dict) -> list[dict]:
    """What comes before the answer; of `messages` and `conversations`, everything."""
    field = _field(row)
    messages = _dialogue(row[field], "user", field)
    if field == "instruction" and row.get("input"):
        given = _text(row["input"], "input")
        messages = [{"role": "user", "content": messages[0]["content"] + "\n\n" + given, "input": given}]
    if row.get("system"):
        messages = [{"role": "system", "content": _text(row["system"], "system")}, *messages]
    return messages


def _dialogue(value, role: str, field: str) -> list[dict]:
    """Messages of a field: a text of `role`'s, an HH transcript, one message, or a list of messages."""
    if isinstance(value, str):
        text = _text(value, field)
        if not text.startswith("\n\nHuman:"):
            return [{"role": role, "content": text}]
        parts = re.split(r"\n\n(Human|Assistant):", text)
        turns = [{"role": "user" if who == "Human" else "assistant", "content": said.strip()}
                 for who, said in zip(parts[1::2], parts[2::2])]
        return turns[:-1] if role == "user" and not turns[-1]["content"] else turns  # a prompt that ends "Assistant:"
    if not isinstance(value, (dict, list)):
        raise ValueError(f'"{field}" must be a text or messages, not {_kind(value)}')
    messages = []
    for message in [value] if isinstance(value, dict) else value:
        if not isinstance(message, dict):
            raise ValueError(f'"{field}": a message must be an object with role and content, not {_kind(message)}')
        who = message.get("role", message.get("from"))
        if not isinstance(who, str) or who not in ROLES:
            raise ValueError(f"unknown role {who!r} (known: {', '.join(ROLES)})")
        messages.append({"role": ROLES[who], "content": _text(message.get("content", message.get("value")), "content")})
    return messages


def _text(value, field: str) -> str:
    if isinstance(value, list):  # OpenAI's parts: [{"type": "text", "text": ...}]
        parts = [part.get("text", part.get("value")) if isinstance(part, dict) else part for part in value]
        value = "".join(parts) if all(isinstance(part, str) for part in parts) else value
    if not isinstance(value, str):
        raise ValueError(f'"{field}" must be text, not {_kind(value)}')
    if not value.isascii() and re.search("[\ud800-\udfff]", value):  # legal JSON, but no text: cannot be UTF-8
        raise ValueError(f'"{field}" holds half of a surrogate pair')
    return value


def _kind(value) -> str:
    return "nothing" if value is None else type(value).__name__


def _rows(sources: list[str]) -> Iterator[tuple[str, dict]]:
    """(file:line, object) of every row; all sources are checked to exist before the first is read."""
    files: list[Path] = []
    for source in map(Path, sources):
        inside = sorted(p for p in source.rglob("*") if p.name.endswith(ENDINGS) and not p.name.startswith("."))
        if not source.exists():
            raise FileNotFoundError(f"{source}: no such file or folder")
        if not (inside if source.is_dir() else source.name.endswith(ENDINGS)):
            raise ValueError(f"{source}: {'no file' if source.is_dir() else 'not a kind'} of {', '.join(ENDINGS)}")
        files += inside if source.is_dir() else [source]
    for path in files:
        rows = 0
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            try:
                for number, data in enumerate(file if ".jsonl" in path.name else [file.read()], 1):
                    for line, row in _values(data, path, number):
                        if not isinstance(row, dict):
                            raise ValueError(f"{path}:{line}: expected a JSON object, found {_kind(row)}")
                        yield f"{path}:{line}", row
                        rows += 1
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{path}: damaged gzip file ({error})") from None
        if not rows:
            raise ValueError(f"{path}: the file holds no rows")


def _values(data: bytes, path: Path, line: int) -> Iterator[tuple[int, object]]:
    """(line, value) of the JSON values in `data`, which begins at `line`: the elements of one array, or values that
    follow one another. A long array is not parsed at once, so that each element's line is known."""
    try:
        text = data.decode("utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason})") from None

    def skip_blank(at: int) -> int:
        return re.compile(r"\s*").match(text, at).end()

    at, counted = skip_blank(0), 0
    end = "]" if text[at:at + 1] == "[" else ""
    at = skip_blank(at + len(end))
    while text[at:at + 1] != end:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = json.JSONDecoder().raw_decode(text, at)
            begins, at = line, skip_blank(at)
            if end and text[at:at + 1] not in (",", end):
                raise json.JSONDecodeError("Expecting a comma or the end of the list", text, at)
        except (ValueError, RecursionError) as error:
            line += text.count("\n", counted, getattr(error, "pos", at))
            raise ValueError(f"{path}:{line}: malformed JSON ({getattr(error, 'msg', error)})") from None
        yield begins, value
        at = skip_blank(at + 1) if end and text[at] == "," else at


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


def main():
    from data.tokenizer import BPETokenizer, load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="files or folders of conversations")
    parser.add_argument("--show_mask", action="store_true", help="print the conversations, what is trained in green")
    parser.add_argument("--template", default="chatml", choices=TEMPLATES)
    parser.add_argument("--tokenizer", help="a tokenizer's file or folder (default: one token per byte)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N conversations (0: all)")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else BPETokenizer.train([], 257)
    if added := prepare_tokenizer(tokenizer, args.template):
        print(f"tokenizer: without {' '.join(added)}, added for this display")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    conversations = tokens = trained = longest = 0
    for name, messages, _ in itertools.islice(read_chats(args.files), args.limit or None):
        ids, mask = render(messages, tokenizer, args.template)
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
