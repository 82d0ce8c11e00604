"""Rows of files to conversations: OpenAI's messages, ShareGPT, Alpaca, prompt and completion, preference pairs.

    for chat in read_chats(["chats.jsonl", "folder"]):
        print(chat.name, chat.messages, chat.tools)      # chats.jsonl:1 [{"role": "user", "content": ...}, ...] None

A row's form is seen from its fields; an error names the file and the line. Tool calls and results are kept: OpenAI's
`tool_calls` and role "tool", and the turns function_call and observation of ShareGPT files.

    python data/chat_files.py FILE ...     counts rows, turns and tools
"""

import gzip
import json
import re
import sys
import zlib
from pathlib import Path
from typing import Iterator, NamedTuple

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "chatgpt": "assistant", "function_call": "assistant", "tool": "tool", "function": "tool", "ipython": "tool",
         "observation": "tool"}  # as files name them -> as we do
ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


class Chat(NamedTuple):
    name: str             # file:line
    messages: list[dict]  # {"role", "content"}; the user's of an Alpaca row with an input has that as "input", too;
                          # the assistant's may have "tool_calls", a tool's "tool_call_id" and "name"
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
            yield Chat(name, messages, _named(name, _tools, row.get("tools")))


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
    if not all(found):
        raise ValueError("an empty conversation")
    if not all(any(message["role"] == "assistant" for message in messages) for messages in found):
        raise ValueError("the assistant never speaks: nothing to train on")
    return found


def _tools(value) -> list | None:
    """Tool definitions, or JSON text of them."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f'"tools" is not JSON ({error})') from None
    if value and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise ValueError(f'"tools" must be a list of definitions, not {_kind(value)}')
    return value or None


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
        messages.append(_message(message, who))
    return messages


def _message(message: dict, who: str) -> dict:
    """One message as we have it: OpenAI's, or a ShareGPT turn."""
    role, content = ROLES[who], message.get("content", message.get("value"))
    calls = message.get("tool_calls") if role == "assistant" else None
    if who == "function_call":  # JSON text of a call, or of several
        try:
            calls, content = json.loads(_text(content, "function_call")), None
        except ValueError as error:
            raise ValueError(f"function_call is not JSON ({error})") from None
        calls = calls if isinstance(calls, list) else [calls]
    if role == "tool":
        kept = {key: message[key] for key in ("tool_call_id", "name") if message.get(key) is not None}
        return {"role": role, "content": content if isinstance(content, dict) else _text(content, "content"), **kept}
    if not calls:
        return {"role": role, "content": _text(content, "content")}
    if not isinstance(calls, list):
        raise ValueError(f'"tool_calls" must be a list, not {_kind(calls)}')
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("a tool call must be an object with a function's name and arguments")
        function = {"name": function["name"], "arguments": function.get("arguments", {})}
        found.append({"type": "function", "function": function} | ({"id": call["id"]} if call.get("id") else {}))
    return {"role": role, "content": content and _text(content, "content"), "tool_calls": found}


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


def main() -> None:
    for source in sys.argv[1:]:
        chats = list(read_chats([source]))
        calls = sum(bool(message.get("tool_calls")) for chat in chats for message in chat.messages)
        print(f"{source}: {len(chats):,} conversations, {sum(len(chat.messages) for chat in chats):,} messages, "
              f"{sum(chat.tools is not None for chat in chats):,} with tools, {calls:,} messages that call them")
    if len(sys.argv) == 1:
        print(__doc__)


if __name__ == "__main__":
    main()
