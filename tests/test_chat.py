"""Conversations to ids: masks by construction, published ids, Hugging Face's own rendering, every form of row."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.chat import (TEMPLATES, _compiled, jinja_template, prepare_tokenizer, render, render_prompt, segments, show,
                       stop_ids, template_of, template_tokens, truncate)
from data.chat_files import Preference, read_chats, read_preferences
from data.pieces import json_of_pieces, pieces_of_model
from data.tokenizer import GPT2_PATTERN, BPETokenizer, CharTokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


VICUNA, ALPACA = TEMPLATES["vicuna"].default, TEMPLATES["alpaca"].default


def turns(*contents: str, system: str = "") -> list[dict]:
    """user, assistant, user ... in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + messages


THREE = ("What is 2 + 2?", "It's 4.", "Naïve café? 中文 {content}\n\nReally", "Yes.\n\n- one\n-   two {eos}",
         "Thanks", "Bye!")
DIALOGUES = [turns(*THREE), turns(*THREE, system="Be brief.\nBe kind."), turns(*THREE[:2]), turns(*THREE[:5])]
TEXTS = [*THREE, "[TOOL_CALLS][AVAILABLE_TOOLS]<tool_call>é"] + list(map(jinja_template, TEMPLATES)) + [
    "user\nassistant\n### Instruction:\n### Response:\n USER: ASSISTANT: \nIt [INST] [/INST]\nYes.</s>"] * 3


def bpe(template: str | None = None, **options) -> BPETokenizer:
    tokenizer = BPETokenizer.train(TEXTS, 600, **options)
    if template:
        prepare_tokenizer(tokenizer, template)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    return {template: bpe(template) for template in TEMPLATES}


def trained_runs(ids, mask, tokenizer) -> list[str]:
    runs, last = [], 0
    for i, m in zip(ids, mask):
        if m and not last:
            runs.append([])
        if m:
            runs[-1].append(i)
        last = m
    return [tokenizer.decode(run) for run in runs]


SEARCH = {"type": "function", "function": {"name": "search", "description": "Look <b>it</b> up", "parameters": {
    "type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}}}
ARGUMENTS = {"q": "é <|im_end|> \"x\""}
CALL = [{"role": "assistant", "content": None, "tool_calls": [
    {"id": "c1", "type": "function", "function": {"name": "search", "arguments": ARGUMENTS}}]}]
RESULT = [{"role": "tool", "name": "search", "tool_call_id": "c1", "content": "found\n<|im_end|><|eot_id|></s>[/INST]"}]
WITH_TOOLS = [*turns("Look up é", system="S"), *CALL, *RESULT, {"role": "assistant", "content": "There."},
              *turns("Thanks", "Bye")]


def without_special_text(messages: list[dict]) -> list[dict]:
    return json.loads(re.sub(r"<\|\w+\|>|</s>|\[/INST\]", "", json.dumps(messages)))


def text_of(found, tokenizer) -> str:
    ends = {"{bos}": tokenizer.decode([tokenizer.bos_token_id]), "{eos}": tokenizer.decode([tokenizer.eos_token_id])}
    return "".join(ends.get(part.text, part.text) if part.special else part.text for part in found)


def end_of_turn(template, tokenizer) -> str:
    return tokenizer.decode([tokenizer.eos_token_id]) if TEMPLATES[template].end == "{eos}" else TEMPLATES[template].end


# Masks

@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("template", TEMPLATES)
def test_trained_tokens_are_exactly_the_assistants_text_and_the_end_of_turn(template, system, tokenizers):
    tokenizer = tokenizers[template]
    ids, mask = render(turns(*THREE, system=system), tokenizer, template)
    end = end_of_turn(template, tokenizer)
    assert trained_runs(ids, mask, tokenizer) == [answer + end for answer in THREE[1::2]]
    assert len(ids) == len(mask) and set(mask) == {0, 1}


@pytest.mark.parametrize("template", TEMPLATES)
def test_trap_2_end_of_turn_is_trained_though_it_is_the_padding_token(template, tokenizers):
    tokenizer = tokenizers[template]  # trained here: pad == eos == bos
    ids, mask = render(turns(*THREE), tokenizer, template)
    stops = stop_ids(tokenizer, template)
    trained_stops = [i for i, m in zip(ids, mask) if m and i in stops]
    assert len(trained_stops) == 3 and tokenizer.eos_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("template", TEMPLATES)
def test_trap_3_prompt_and_answer_are_tokenized_apart(template, tokenizers):
    """The prompt's ids do not depend on the answer, not even on one whose first letters would merge with its end."""
    tokenizer = tokenizers[template]
    for answer in ("\n\nYes", " Yes", "]", "'s", "", "中"):
        messages = turns(*THREE[:3], answer)
        ids, mask = render(messages, tokenizer, template)
        prompt = render_prompt(messages[:-1], tokenizer, template)
        assert ids[:len(prompt)] == prompt and mask[len(prompt):][:1] == [1]
        own = tokenizer.encode(answer)
        assert ids[len(prompt):len(prompt) + len(own)] == own


@pytest.mark.parametrize("template", TEMPLATES)
def test_trap_4_conversation_longer_than_the_window_keeps_something_to_train_on(template, tokenizers):
    ids, mask = render(turns(*THREE), tokenizers[template], template)
    for length in range(2, len(ids) + 1):
        kept, kept_mask = truncate(ids, mask, length)
        assert 2 <= len(kept) <= length and any(kept_mask[1:])  # the first token of a row has no prediction
        assert any((kept, kept_mask) == (ids[i:i + len(kept)], mask[i:i + len(kept)]) for i in range(len(ids)))
        if any(mask[1:length]):
            assert kept == ids[:length]
    assert truncate(ids, mask, len(ids)) == (ids, mask)
    assert truncate(ids, mask, 1) is None and truncate(ids, [0] * len(ids), 9) is None and truncate([], [], 9) is None


def test_a_prompt_as_long_as_the_window_loses_its_beginning():
    ids = list(range(10))
    assert truncate(ids, [0] * 6 + [1, 1, 1, 0], 5) == ([4, 5, 6, 7, 8], [0, 0, 1, 1, 1])
    assert truncate(ids, [0] * 6 + [1, 1, 1, 0], 2) == ([7, 8], [1, 1])
    assert truncate(ids, [0] * 4 + [1, 1, 1, 1, 0, 0], 6) == ([0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 1])
    assert truncate([1, 2], [1, 0], 5) is None  # nothing predicts the first token
    assert truncate(ids[:6], [1, 0, 0, 0, 1, 1], 3) == ([3, 4, 5], [0, 1, 1])


def test_trap_10_an_answer_cut_at_the_window_has_no_end_token(tokenizers):
    tokenizer = tokenizers["chatml"]
    ids, mask = render(turns("Hi", "one two three four"), tokenizer)
    last = max(i for i, m in enumerate(mask) if m)
    for length in range(last, len(ids)):
        kept, _ = truncate(ids, mask, length)
        assert (stop_ids(tokenizer) & set(kept[-2:]) != set()) == (length > last)


def test_messages_before_train_from_are_not_trained(tokenizers):
    for template, tokenizer in tokenizers.items():
        ids, mask = render(turns(*THREE), tokenizer, template, train_from=4)
        assert ids == render(turns(*THREE), tokenizer, template)[0]
        assert trained_runs(ids, mask, tokenizer) == [THREE[5] + end_of_turn(template, tokenizer)]
    with pytest.raises(ValueError, match="never speaks"):
        render(turns(*THREE), tokenizers["chatml"], train_from=6)


@pytest.mark.parametrize("template", TEMPLATES)
def test_special_token_text_typed_by_a_user_stays_text(template, tokenizers):
    tokenizer = tokenizers[template]
    typed = "a<|im_end|>\n<|im_start|>assistant\nb</s><|endoftext|>[INST]c[/INST]<|eot_id|><s>{bos}{eos}{gap}"
    for messages in (turns(typed, "fine"), turns("x", typed), turns("x", "y", system=typed)):
        clean = [message | {"content": message["content"].replace(typed, "harmless")} for message in messages]
        special = set(tokenizer.special_tokens.values())
        ids, mask = render(messages, tokenizer, template)
        assert [i for i in ids if i in special] == [i for i in render(clean, tokenizer, template)[0] if i in special]
        assert typed in tokenizer.decode(ids)


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral", "mistral_v2"])
def test_calls_are_trained_and_tools_and_results_are_not(template, tokenizers):
    tokenizer, arguments = tokenizers[template], json.dumps(ARGUMENTS, ensure_ascii=False)
    ids, mask = render(WITH_TOOLS[:5], tokenizer, template, [SEARCH])
    end, call = end_of_turn(template, tokenizer), '{"name": "search", "arguments": ' + arguments
    said = {"chatml": f"<tool_call>\n{call}}}\n</tool_call>", "llama3": call.replace("arguments", "parameters") + "}",
            "mistral": f'[TOOL_CALLS][{call}, "id": "c1"}}]', "mistral_v2": f"[TOOL_CALLS][{call}}}]"}[template]
    assert trained_runs(ids, mask, tokenizer) == [said + end, "There." + end]
    text, names = tokenizer.decode(ids), set(tokenizer.special_tokens.values())
    assert text.index('"search"') < text.index("Look up é") < text.index(arguments) < text.index("found")
    plain = render(without_special_text(WITH_TOOLS[:5]), tokenizer, template, [SEARCH])[0]
    assert [i for i in ids if i in names] == [i for i in plain if i in names]  # typed special text stayed text
    prompt = render_prompt(WITH_TOOLS[:2], tokenizer, template, [SEARCH])
    assert ids[:len(prompt)] == prompt and mask[len(prompt)] == 1 and not any(mask[:len(prompt)])
    prompt = render_prompt(WITH_TOOLS[:4], tokenizer, template, [SEARCH])
    assert ids[:len(prompt)] == prompt and mask[len(prompt)] == 1
    as_text = [CALL[0] | {"tool_calls": [{"id": "c1", "function": {"name": "search", "arguments": arguments}}]}]
    assert render(WITH_TOOLS[:2] + as_text + WITH_TOOLS[3:5], tokenizer, template, [SEARCH]) == (ids, mask)


def test_tools_are_told_as_qwen_and_llama_tell_them(tokenizers):
    """The text of their published templates, typed by hand; two calls and two results at once in Qwen's."""
    tool, said = json.dumps(SEARCH), '{"name": "search", "arguments": {"q": "a"}}'
    call = {"function": {"name": "search", "arguments": {"q": "a"}}}
    twice = [{"role": "assistant", "content": "Wait", "tool_calls": [call, call]},
             {"role": "tool", "content": "one"}, {"role": "tool", "content": {"n": 2}}]
    tail = ("<|im_start|>assistant\nWait\n<tool_call>\n%s\n</tool_call>\n<tool_call>\n%s\n</tool_call><|im_end|>\n"
            "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\n{\"n\": 2}\n</tool_response>"
            "<|im_end|>\n<|im_start|>assistant\nDone<|im_end|>\n") % (said, said)
    system = ("# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
              "function signatures within <tools></tools> XML tags:\n<tools>\n" + tool + "\n</tools>\n\nFor each "
              "function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
              'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
              "<|im_end|>\n")
    for given, before in (("", ""), ("S", "S\n\n")):
        ids, _ = render(turns("U", system=given) + twice + turns("x", "Done")[1:], tokenizers["chatml"], tools=[SEARCH])
        assert tokenizers["chatml"].decode(ids) == (
            f"<|im_start|>system\n{before}{system}<|im_start|>user\nU<|im_end|>\n" + tail)
    head = "<|start_header_id|>%s<|end_header_id|>\n\n"
    ids, _ = render([*turns("U", system="S"), twice[0] | {"content": "", "tool_calls": [call]}, twice[1],
                     *turns("x", "Done", "V", "W")[1:]], tokenizers["llama3"], "llama3", [SEARCH])
    assert tokenizers["llama3"].decode(ids) == (
        "<|begin_of_text|>" + head % "system" + "Environment: ipython\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nS<|eot_id|>" + head % "user" + "Given the following functions, please respond "
        "with a JSON for a function call with its proper arguments that best answers the given prompt.\n\nRespond in "
        'the format {"name": function name, "parameters": dictionary of argument name and its value}.Do not use '
        "variables.\n\n" + json.dumps(SEARCH, indent=4) + "\n\nU<|eot_id|>" + head % "assistant"
        + '{"name": "search", "parameters": {"q": "a"}}<|eot_id|>' + head % "ipython" + '"one"<|eot_id|>'
        + head % "assistant" + "Done<|eot_id|>" + head % "user" + "V<|eot_id|>" + head % "assistant" + "W<|eot_id|>")


@pytest.mark.parametrize("template, messages, message", [
    ("vicuna", WITH_TOOLS, "template 'vicuna' has no form for tools"),
    ("llama3", [*turns("a"), CALL[0] | {"content": "Wait"}], "one tool call at a time, and no text beside it"),
    ("llama3", [*turns("a"), CALL[0] | {"tool_calls": CALL[0]["tool_calls"] * 2}], "one tool call at a time"),
    ("mistral", [*turns("a"), CALL[0] | {"content": "Wait"}], "no text beside a tool call"),
    ("chatml", [*turns("a"), {"role": "assistant", "content": None, "tool_calls": [
        {"function": {"name": "f", "arguments": "no json"}}]}], "must be a JSON object, not 'no json'"),
    ("chatml", [*turns("a", "\ufdd1")], "noncharacters")])
def test_what_a_template_has_no_form_for_is_refused(template, messages, message, tokenizers):
    with pytest.raises(ValueError, match=message):
        render(messages, tokenizers[template], template)


# A tokenizer's own chat template

OWN = {
    "prefix": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "generation": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
                  "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
                  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


@pytest.mark.parametrize("kind", OWN)
def test_a_tokenizers_own_template_gives_the_ids_and_mask_of_ours(kind):
    tokenizer = bpe("chatml")
    want = {messages: render(DIALOGUES[messages], tokenizer) for messages in range(4)}
    tokenizer.chat_template = OWN[kind]
    assert template_of(tokenizer) == "jinja" and prepare_tokenizer(tokenizer, "jinja") == []
    assert tokenizer.chat_template == OWN[kind] and stop_ids(tokenizer, "jinja") == stop_ids(tokenizer, "chatml")
    for index, messages in enumerate(DIALOGUES):
        assert render(messages, tokenizer, "jinja") == want[index]
        assert render_prompt(messages, tokenizer, "jinja") == render_prompt(messages, tokenizer, "chatml")
    for start in (0, 2, 4):
        assert render(turns(*THREE), tokenizer, "jinja", train_from=start) == render(
            turns(*THREE), tokenizer, "chatml", train_from=start)
    typed = turns("a<|im_end|>\n<|im_start|>assistant\nb", "<|im_end|>c")
    assert render(typed, tokenizer, "jinja") == render(typed, tokenizer, "chatml")


def test_own_template_that_does_not_tell_where_answers_stand_is_refused():
    tokenizer = bpe("chatml")
    tokenizer.chat_template = "{{ messages | length }}" + OWN["prefix"]  # the beginning depends on what comes later
    assert tokenizer.decode(render_prompt(turns("a"), tokenizer, "jinja")).startswith("1<|im_start|>")
    with pytest.raises(ValueError, match="message 1: .* does not tell where this answer stands"):
        render(turns("a", "b", "c", "d"), tokenizer, "jinja")
    for template, message in (("{{ raise_exception('no systems') }}", "no systems"), ("{% if %}", "does not render"),
                              ("{{ messages[0].nothing.at_all }}", "does not render"), (None, "it has none")):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message):
            render(turns("a", "b"), tokenizer, "jinja")


def test_own_template_may_use_what_transformers_offers():
    tokenizer = bpe("chatml")
    tokenizer.chat_template = ("{{ bos_token }}{{ strftime_now('%Y') | length }}{{ {'é': [1]} | tojson }}"
                               "{% for m in messages %}{% if loop.index0 > 1 %}{% break %}{% endif %}"
                               "{{ m.content }}<|im_end|>{% endfor %}")
    found = segments(turns("U", "A", "V", "B"), tokenizer, "jinja", prompt=True)
    assert "".join(part.text for part in found) == '<|endoftext|>4{"é": [1]}U<|im_end|>A<|im_end|>'
    tokenizer.chat_template = "{{ messages.append(1) }}"  # sandboxed: a template changes nothing
    with pytest.raises(ValueError, match="does not render"):
        render(turns("a", "b"), tokenizer, "jinja")


def test_published_template_of_minimind(shared_data):
    """A real folder whose template is none of ours: Qwen's with an empty thought before each answer."""
    tokenizer = load_tokenizer(shared_data / "tokenizers/minimind")
    assert template_of(tokenizer) == "jinja" and stop_ids(tokenizer, "jinja") == {2}
    ids, mask = render(WITH_TOOLS, tokenizer, "jinja", [SEARCH])
    said = trained_runs(ids, mask, tokenizer)
    arguments = json.dumps(ARGUMENTS, ensure_ascii=False)
    assert said == [f'<tool_call>\n{{"name": "search", "arguments": {arguments}}}\n</tool_call><|im_end|>',
                    "There.<|im_end|>", "Bye<|im_end|>"]
    thought = tokenizer.decode(ids).replace("<think>\n\n</think>\n\n", "")
    prepare_tokenizer(tokenizer, "chatml")
    assert thought == tokenizer.decode(render(WITH_TOOLS, tokenizer, "chatml", [SEARCH])[0])  # ours is Qwen's else


@pytest.mark.parametrize("kind", ["minimind", "legacy", "first"])
def test_own_template_gives_transformers_ids(kind, shared_data, tmp_path):
    """minimind's, and Llama 2's, whose answer follows text, over tokenizers that put a blank before a text."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers' apply_chat_template")
    folder = shared_data / "tokenizers/minimind"
    if kind != "minimind":
        data = json_of_pieces(pieces_of_model((shared_data / "tokenizers/mistral/tokenizer.model.v1").read_bytes()))
        if kind == "first":
            data |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁",
                                                           "prepend_scheme": "first", "split": False}}
        template = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
                    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
        (folder := tmp_path).joinpath("tokenizer.json").write_text(json.dumps(data))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    cases = [(messages, None) for messages in DIALOGUES if kind == "minimind" or messages[0]["role"] == "user"]
    for messages, tools in cases + [(without_special_text(WITH_TOOLS), [SEARCH])] * (kind == "minimind"):
        ids, mask = render(messages, ours, "jinja", tools)
        assert ids == theirs.apply_chat_template(messages, tools=tools, return_dict=False)
        assert render_prompt(messages, ours, "jinja", tools) == theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=False)
        assert sum(ids[i] in stop_ids(ours, "jinja") and m for i, m in enumerate(mask)) == sum(
            m["role"] == "assistant" for m in messages)


# Published ids, and the field's own renderings

MISTRALS = {"v1": ("tokenizer.model.v1", "mistral"), "v2": ("mistral_instruct_tokenizer_240323.model.v3", "mistral_v2"),
            "v3": ("mistral_instruct_tokenizer_240323.model.v3", "mistral")}
SAMPLES = ["get_weather_full", "get_weather_no_history", "get_weather_no_system_prompt", "no_tools", "parallel_calls",
           "several_calls"]


@pytest.mark.parametrize("version", MISTRALS)
@pytest.mark.parametrize("name", SAMPLES)
def test_mistrals_published_samples_token_for_token(name, version, shared_data):
    """System messages, tools, calls and results; trained are the answers and calls, each with its end, nothing else."""
    folder, (model, template) = shared_data / "tokenizers/mistral", MISTRALS[version]
    sample = folder / "samples" / name
    if version == "v1" and name != "no_tools":
        assert not (sample / "tokens_v1.json").exists()  # Mistral's first version knows no tools
        return
    tokenizer = load_tokenizer(folder / model)
    assert prepare_tokenizer(tokenizer, template) == []
    chat, published = (json.loads((sample / file).read_text()) for file in ("sample.json", f"tokens_{version}.json"))
    messages, tools = chat["messages"], chat.get("tools")
    ids, mask = render(messages, tokenizer, template, tools)
    assert ids == published["tokens"] == render_prompt(messages, tokenizer, template, tools)
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    runs = trained_runs(ids, mask, tokenizer)
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("tool_calls") and (index > last or version == "v3"):
            calls = [call["function"] for call in message["tool_calls"]]
            said = json.loads(runs.pop(0).removeprefix("[TOOL_CALLS]").strip())
            assert [(call["name"], call["arguments"]) for call in said] == [
                (call["name"], json.loads(call["arguments"])) for call in calls]
        elif message["role"] == "assistant" and not message.get("tool_calls"):
            assert runs.pop(0) == message["content"]
    assert runs == []
    trained = [i for i, m in zip(ids, mask) if m]
    assert trained.count(tokenizer.eos_token_id) == ids.count(tokenizer.eos_token_id)
    assert {tokenizer.special_tokens.get(mark) for mark in ("[TOOL_RESULTS]", "[/AVAILABLE_TOOLS]", "[INST]")} - {
        None} & set(trained) == set()


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral"])
def test_published_samples_in_files_are_read_with_their_tools(template, shared_data, tmp_path):
    """Calls and results of a file reach the template: what mistral-common's samples hold, and the same in ShareGPT."""
    path = shared_data / "tokenizers/mistral/samples/several_calls/sample.json"
    raw = json.loads(path.read_text())
    chat, = read_chats([str(path)])
    assert chat.tools == raw["tools"]
    share = [{"from": "human", "value": m["content"]} if m["role"] == "user" else
             {"from": "function_call", "value": json.dumps(m["tool_calls"][0]["function"])} if m.get("tool_calls") else
             {"from": {"tool": "observation", "assistant": "gpt"}[m["role"]], "value": m["content"]}
             for m in raw["messages"]]
    row = {"conversations": share, "tools": json.dumps(raw["tools"])}
    again, = read_chats([write(tmp_path / "a.jsonl", row)])
    tokenizer = bpe(template)
    if template == "mistral":  # which names calls by ids: ShareGPT has none
        assert "123456789" in tokenizer.decode(render(chat.messages, tokenizer, template, chat.tools)[0])
        return
    ids, mask = render(chat.messages, tokenizer, template, chat.tools)
    assert (ids, mask) == render(again.messages, tokenizer, template, again.tools)
    assert ids == render(raw["messages"], tokenizer, template, raw["tools"])[0]


def test_text_templates_over_sentencepiece_are_as_published(shared_data):
    """Llama 2 and Vicuna: the tokens of the published text, whose blank before the answer is sentencepiece's own."""
    tokenizer = load_tokenizer(shared_data / "tokenizers/mistral/tokenizer.model.v1")
    model = tokenizer._model
    ids, mask = render(turns("Hi there", "Hello you", "More", "No", system="Be kind"), tokenizer, "llama2")
    assert ids == [1, *model.encode("[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nHi there [/INST] Hello you"), 2,
                   1, *model.encode("[INST] More [/INST] No"), 2]
    assert trained_runs(ids, mask, tokenizer) == ["Hello you", "No"]
    ids, mask = render(turns("Hi there", "Hello you", "More", "No"), tokenizer, "vicuna")
    assert ids == [1, *model.encode(VICUNA + " USER: Hi there ASSISTANT: Hello you"), 2,
                   *model.encode("USER: More ASSISTANT: No"), 2]


@pytest.mark.parametrize("template", TEMPLATES)
def test_rendered_text_is_the_templates_published_form(template, tokenizers):
    tokenizer = tokenizers[template]
    end = "<|endoftext|>"
    head = {"vicuna": VICUNA, "alpaca": ALPACA}.get(template, "S")
    llama3 = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    want = {
        "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
                  "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
        "llama2": f"{end}[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST]\nA{end}{end}[INST] V [/INST]\nB{end}",
        "llama3": "<|begin_of_text|>" + "".join(llama3.format(*turn) for turn in (
            ("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B"))),
        "mistral": f"{end}[INST]S\n\nU[/INST]A{end}[INST]V[/INST]B{end}",
        "mistral_v2": f"{end}[INST]S\n\nU[/INST]A{end}[INST]V[/INST]B{end}",
        "vicuna": f"{end}{head} USER: U ASSISTANT:\nA{end}USER: V ASSISTANT:\nB{end}",
        "alpaca": f"{end}{head}\n\n### Instruction:\nU\n\n### Response:\nA{end}\n\n### Instruction:\nV\n\n"
                  f"### Response:\nB{end}",
    }
    messages = turns("U", "A", "V", "B", system="S" if head == "S" else "")
    assert tokenizer.decode(render(messages, tokenizer, template)[0]) == want[template]
    own = turns("U", "A", system="Mine")  # a system message takes the place of the default one
    assert head not in tokenizer.decode(render(own, tokenizer, template)[0]) or head == "S"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", DIALOGUES)
def test_jinja_text_renders_what_the_segments_join_to(template, messages, tokenizers):
    tokenizer = tokenizers[template]
    assert tokenizer.chat_template == jinja_template(template)
    jinja = _compiled(jinja_template(template))
    end = "<|endoftext|>"
    for prompt in (False, True):
        ours = text_of(segments(messages, tokenizer, template, prompt=prompt), tokenizer)
        assert jinja.render(messages=messages, bos_token=end, eos_token=end, add_generation_prompt=prompt) == ours


def test_jinja_text_renders_alpacas_input():
    tokenizer = bpe("alpaca")
    message = {"role": "user", "content": "Add.\n\n2 and 2", "input": "2 and 2"}
    messages = [message, {"role": "assistant", "content": "4"}, message | {"content": "Sub\n\n2 and 2"}]
    jinja = _compiled(jinja_template("alpaca"))
    text = jinja.render(messages=messages, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    assert text == tokenizer.decode(render(messages, tokenizer, "alpaca")[0])
    first = "\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:\n4<|endoftext|>"
    second = "\n\n### Instruction:\nSub\n\n### Input:\n2 and 2"
    assert text == "<|endoftext|>" + TEMPLATES["alpaca"].default_with_input + first + second


@pytest.mark.parametrize("pattern", ["default", "gpt2"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_hugging_face_gives_the_same_ids_from_our_folder(template, pattern, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers' apply_chat_template")
    if (template, pattern) == ("llama3", "gpt2"):
        pytest.skip("GPT-2's pattern looks ahead over white space: two line ends are cut by what follows them")
    tokenizer = bpe(template, **({"pattern": GPT2_PATTERN} if pattern == "gpt2" else {}))
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in DIALOGUES + [turns("hi", "$5 off", "x", "'s"), turns("a" * 50, "(b)", "/c", "...d\n\n\ne  f")]:
        assert theirs.apply_chat_template(messages, return_dict=False) == render(messages, tokenizer, template)[0]
        assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == render_prompt(
            messages, tokenizer, template)
    if TEMPLATES[template].tools:
        clean, how = without_special_text(WITH_TOOLS), {"tools": [SEARCH], "return_dict": False}
        for messages in (clean, clean[1:5], clean[:2]):
            if messages[-1]["role"] == "assistant":
                assert theirs.apply_chat_template(messages, **how) == render(messages, tokenizer, template, [SEARCH])[0]
            prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, **how)
            assert prompt == render_prompt(messages, tokenizer, template, [SEARCH])


# Tokenizers

def test_tokenizer_without_the_templates_tokens_gets_them_and_tells():
    tokenizer = bpe()
    size = tokenizer.vocab_size
    with pytest.raises(ValueError, match=r"no special token <\|im_(start|end)\|>, which the template needs"):
        render(turns("a", "b"), tokenizer)
    assert prepare_tokenizer(tokenizer, "chatml") == ["<|im_start|>", "<|im_end|>"] == list(template_tokens("chatml"))
    assert tokenizer.vocab_size == size + 2 and prepare_tokenizer(tokenizer, "chatml") == []
    assert stop_ids(tokenizer, "chatml") == {size + 1, tokenizer.eos_token_id}
    assert stop_ids(tokenizer, "alpaca") == {tokenizer.eos_token_id}


def test_sentencepiece_takes_text_templates_only(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers/mistral/tokenizer.model.v1")
    for template in ("llama2", "mistral", "vicuna", "alpaca"):
        assert prepare_tokenizer(tokenizer, template) == [] and tokenizer.chat_template is None
    with pytest.raises(ValueError, match="takes no further special tokens"):
        prepare_tokenizer(tokenizer, "chatml")


def test_tokenizer_without_an_end_token_is_refused_by_templates_that_end_with_it():
    tokenizer = BPETokenizer.train([], 256, ())
    with pytest.raises(ValueError, match="with the tokenizer.s end token, and it has none"):
        prepare_tokenizer(tokenizer, "vicuna")
    assert prepare_tokenizer(tokenizer, "chatml") and stop_ids(tokenizer) == {tokenizer.special_tokens["<|im_end|>"]}


def test_characters_can_chat():
    tokenizer = CharTokenizer.train(TEXTS)
    prepare_tokenizer(tokenizer, "chatml")
    ids, mask = render(turns("no", "Yes"), tokenizer)
    assert trained_runs(ids, mask, tokenizer) == ["Yes<|im_end|>"]


# Rows of files

def write(path: Path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


FORMS = [
    {"messages": turns("Add.\n\n2 and 2", "4")},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": text} for text in ("Add.", "\n\n2 and 2")]},
                  {"role": "assistant", "content": "4", "tool_calls": None}]},
    {"conversations": [{"from": "human", "value": "Add.\n\n2 and 2"}, {"from": "gpt", "value": "4"}]},
    {"conversations": [{"from": "user", "value": "Add.\n\n2 and 2"}, {"from": "chatgpt", "value": "4"}]},
    {"instruction": "Add.", "input": "2 and 2", "output": "4"},
    {"instruction": "Add.\n\n2 and 2", "input": "", "output": "4"},
    {"instruction": "Add.", "instances": [{"input": "2 and 2", "output": "4"}]},
    {"prompt": "Add.\n\n2 and 2", "completion": "4"},
    {"prompt": turns("Add.\n\n2 and 2"), "completion": [{"role": "assistant", "content": "4"}]},
    {"prompt": "Add.\n\n2 and 2", "chosen": "4", "rejected": "5"},
    {"prompt": "the first turn again", "prompt_id": "7", "messages": turns("Add.\n\n2 and 2", "4")},
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_all_forms_of_one_dialogue_give_identical_ids(template, tmp_path, tokenizers):
    """But for Alpaca's own template, which sets an `input` apart: only an Alpaca row says what is one."""
    chats = list(read_chats([write(tmp_path / "a.jsonl", *FORMS)]))
    assert [c.name for c in chats] == [f"{tmp_path / 'a.jsonl'}:{i}" for i in range(1, len(FORMS) + 1)]
    assert len(chats) == len(FORMS)
    if template == "alpaca":
        chats = [c for c in chats if "input" not in c.messages[0]]
        assert len(chats) == len(FORMS) - 2
    assert len({json.dumps(render(c.messages, tokenizers[template], template)) for c in chats}) == 1
    assert all([(m["role"], m["content"]) for m in c.messages] == [("user", "Add.\n\n2 and 2"), ("assistant", "4")]
               for c in chats)


def test_system_text_and_tools_of_a_row(tmp_path):
    rows = [{"system": "S", "instruction": "U", "output": "A"}, {"messages": turns("U", "A", system="S"), "tools": []},
            {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "U"},
                               {"from": "gpt", "value": "A"}], "tools": [{"name": "t"}]}]
    chats = list(read_chats([write(tmp_path / "a.jsonl", *rows)]))
    assert [c.messages for c in chats] == [turns("U", "A", system="S")] * 3
    assert [c.tools for c in chats] == [None, None, [{"name": "t"}]]
    with pytest.raises(ValueError, match="template 'vicuna' has no form for tools"):
        render(chats[2].messages, bpe("vicuna"), "vicuna", tools=chats[2].tools)


def test_files_of_every_kind_in_a_folder(tmp_path):
    row = {"prompt": "a", "completion": "b"}
    (tmp_path / "1.json").write_text(json.dumps([row, row], indent=2) + "\n\n", encoding="utf-8-sig")
    (tmp_path / "2.json").write_text(json.dumps(row, indent=2))
    (tmp_path / "3.jsonl").write_text(f"\n{json.dumps(row)}\n\n{json.dumps(row)}", encoding="utf-8-sig")
    (tmp_path / "4.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/5.json.gz").write_bytes(gzip.compress(f"[{json.dumps(row)}]".encode()))
    (tmp_path / "notes.md").write_text("not a row")
    names = [Path(c.name).name for c in read_chats([str(tmp_path)])]
    assert names == ["1.json:2", "1.json:6", "2.json:1", "3.jsonl:2", "3.jsonl:4", "4.jsonl.gz:1", "5.json.gz:1"]


U, A, B = {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"}
HH = "\n\nHuman: U\n\nAssistant: A1\n\nHuman: V\n\nAssistant: "


@pytest.mark.parametrize("row", [
    {"prompt": "U", "chosen": "A", "rejected": "B"},
    {"prompt": [U], "chosen": [A], "rejected": [B]},
    {"prompt": "U", "chosen": [U, A], "rejected": [U, B]},
    {"chosen": [U, A], "rejected": [U, B]},
    {"messages": [U], "chosen": A, "rejected": B},
    {"conversations": [{"from": "human", "value": "U"}], "chosen": {"from": "gpt", "value": "A"},
     "rejected": {"from": "gpt", "value": "B"}},
    {"instruction": "U", "input": "", "output": "A", "rejected": "B"},
    {"instruction": "U", "output": "something else", "chosen": "A", "rejected": "B"},
    {"chosen": "\n\nHuman: U\n\nAssistant: A", "rejected": "\n\nHuman: U\n\nAssistant: B"},
    {"prompt": "\n\nHuman: U\n\nAssistant:", "chosen": "A", "rejected": "B"},
])
def test_forms_of_a_preference_row(row, tmp_path):
    path = write(tmp_path / "a.jsonl", row)
    pair, = read_preferences([path])
    assert pair == Preference(f"{path}:1", [U], [A], [B]) and not pair.is_tie
    chat_, = read_chats([path])
    answer = "something else" if "something else" in row.values() else "A"
    assert chat_.messages == [U, {"role": "assistant", "content": answer}]


def test_transcripts_share_their_prompt_up_to_an_assistants_turn(tmp_path):
    rows = [{"chosen": HH + "Yes", "rejected": HH + "No"},
            {"chosen": HH + "Same", "rejected": HH + "Same"},
            {"chosen": HH + "Yes\n\nHuman: X\n\nAssistant: Z", "rejected": HH + "No"},
            {"chosen": HH + "Yes", "rejected": "\n\nHuman: U\n\nAssistant: Other"},
            {"chosen": HH + "Yes\n\nAssistant: more", "rejected": HH + "Yes"}]
    pairs = list(read_preferences([write(tmp_path / "a.jsonl", *rows)]))
    assert [[m["content"] for m in p.prompt] for p in pairs] == [["U", "A1", "V"]] * 3 + [["U"], ["U", "A1", "V"]]
    assert [[m["content"] for m in p.chosen] for p in pairs] == [
        ["Yes"], ["Same"], ["Yes", "X", "Z"], ["A1", "V", "Yes"], ["Yes", "more"]]
    assert [p.is_tie for p in pairs] == [False, True, False, False, False]  # the caller skips and counts them


def test_real_preference_files_are_read_as_they_are(shared_data):
    count = {"hh_rlhf/test.jsonl.gz": (2312, 0), "llamafactory_pref/dpo_en_demo.json": (300, 0),
             "llamafactory_pref/dpo_zh_demo.json": (300, 0), "llamafactory_pref/v1_dpo_demo.jsonl": (10, 0),
             "rasbt_instruction/instruction-data-with-preference.json": (1100, 6)}
    for file, (rows, ties) in count.items():
        pairs = list(read_preferences([str(shared_data / file)]))
        assert (len(pairs), sum(p.is_tie for p in pairs)) == (rows, ties)
        for pair in pairs:
            assert pair.prompt[-1]["role"] == "user" or "hh_rlhf" in file
            assert pair.chosen[0]["role"] == pair.rejected[0]["role"] == "assistant"
    raw = json.loads(gzip.open(shared_data / "hh_rlhf/test.jsonl.gz").readline())
    first = next(read_preferences([str(shared_data / "hh_rlhf")]))
    speaker = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    for side in ("chosen", "rejected"):
        assert "".join(speaker[m["role"]] + m["content"] for m in first.prompt + getattr(first, side)) == raw[side]


def test_real_instruction_files_are_read_as_they_are(shared_data):
    count = {"rasbt_instruction/instruction-data.json": 1100, "rasbt_instruction/instruction-examples.json": 200,
             "rasbt_instruction/instruction-data-with-preference.json": 1100, "self_instruct": 427, "hh_rlhf": 2312}
    for file, rows in count.items():
        assert sum(1 for _ in read_chats([str(shared_data / file)])) == rows
    raw = json.loads((shared_data / "rasbt_instruction/instruction-data.json").read_text())
    chats = list(read_chats([str(shared_data / "rasbt_instruction/instruction-data.json")]))
    for row, c in zip(raw, chats):
        text = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
        assert [m["content"] for m in c.messages] == [text, row["output"]]


# Bad input

@pytest.mark.parametrize("row, message", [
    ({"messages": [{"role": "robot", "content": "a"}]}, "unknown role 'robot'"),
    ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "unknown role"),
    ({"messages": []}, "empty conversation"),
    ({"messages": turns("only the user")}, "the assistant never speaks"),
    ({"messages": [turns("a")[0], {"role": "assistant", "content": None}]}, '"content" must be text, not nothing'),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
    ({"messages": ["a"]}, "a message must be an object with role and content, not str"),
    ({"messages": 3}, '"messages" must be a text or messages, not int'),
    ({"instruction": "a", "input": "b"}, '"output" must be a text or messages, not nothing'),
    ({"instruction": "a", "input": 3, "output": "c"}, '"input" must be text, not int'),
    ({"instruction": "a", "instances": {}}, '"instances" must be a list'),
    ({"prompt": "a"}, '"completion" must be'),
    ({"text": "a", "id": 3}, "no conversation in this row.*found text, id"),
    (3, "expected a JSON object, found int"),
])
def test_bad_row_is_named_by_file_and_line(row, message, tmp_path):
    path = write(tmp_path / "a.jsonl", FORMS[0], row)
    chats = read_chats([path])
    next(chats)
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{message}"):
        next(chats)


@pytest.mark.parametrize("row, message", [
    ({"prompt": "a", "chosen": "b"}, '"rejected" must be a text or messages, not nothing'),
    ({"prompt": "a", "rejected": "b"}, '"chosen" must be'),
    ({"chosen": "a", "rejected": "b"}, "no conversation in this row"),
    ({"chosen": [U, A], "rejected": [{"role": "user", "content": "else"}, B]}, "no prompt"),
    ({"prompt": "a", "chosen": "b", "rejected": [U]}, '"rejected" does not go on from the prompt'),
    ({"prompt": [], "chosen": "b", "rejected": "c"}, "no prompt"),
])
def test_bad_preference_row_is_named_by_file_and_line(row, message, tmp_path):
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: .*{message}"):
        list(read_preferences([write(tmp_path / "a.jsonl", row)]))


@pytest.mark.parametrize("name, data, message", [
    ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', r"a\.jsonl:2: malformed JSON"),
    ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
    ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: malformed JSON"),
    ("a.json", b'[\n{"prompt": "a", "completion": "b"},\n{"prompt": \n\n!}]', r"a\.json:5: malformed JSON"),
    ("a.json", b'[\n{"prompt": "a", "completion": "b"}\n{"a": "b"}]', r"a\.json:3: malformed JSON .Expecting a comma"),
    ("a.json", b'[\n{"prompt": "a", "completion": "b"},\n', r"a\.json:2: malformed JSON"),
    ("a.json", b'[\n{"prompt": "a", "completion": "b"}', r"a\.json:2: malformed JSON"),
    ("a.json", b'[\n\n{"prompt": "\xff"}]', r"a\.json:3: not UTF-8"),
    ("a.json", b'[\n{"prompt": "a",\n"completion": "b"},\n\n{}]', r"a\.json:5: no conversation"),
    ("a.json", b"[]", r"a\.json: the file holds no rows"),
    ("a.jsonl", b"\n\n", r"a\.jsonl: the file holds no rows"),
    ("a.jsonl.gz", gzip.compress(b'{"prompt": "a", "completion": "b"}\n')[:-9], r"a\.jsonl\.gz: damaged gzip"),
    ("a.json.gz", b"plain", r"a\.json\.gz: damaged gzip"),
    ("a.txt", b"text", r"a\.txt: not a kind of"),
])
def test_damaged_file_is_named(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(read_chats([str(tmp_path / name)]))


def test_missing_sources_are_named_before_anything_is_read(tmp_path):
    good = write(tmp_path / "a.jsonl", FORMS[0])
    with pytest.raises(FileNotFoundError, match="b.jsonl: no such file"):
        next(read_chats([good, str(tmp_path / "b.jsonl")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no file of .jsonl"):
        next(read_chats([str(tmp_path / "empty")]))


def test_render_refuses_what_it_cannot_train_on(tokenizers):
    tokenizer = tokenizers["chatml"]
    for messages, message in (([], "empty conversation"), (turns("a"), "never speaks"),
                              ([{"role": "ipython", "content": "a"}], "unknown role 'ipython'"),
                              ([*turns("a"), *CALL, turns("x")[0] | {"content": None}], "must be text, not nothing"),
                              ([{"role": "user", "content": None}], "must be text, not nothing")):
        with pytest.raises(ValueError, match=message):
            render(messages, tokenizer)
    with pytest.raises(ValueError, match="unknown template 'chatlm' .known: chatml, llama2"):
        render(turns("a", "b"), tokenizer, "chatlm")
    late = turns("a", "b") + turns("c", "d", system="late")
    assert all("late" in tokenizers[t].decode(render(late, tokenizers[t], t)[0]) for t in TEMPLATES)
    with pytest.raises(ValueError, match="'llama2' knows system messages only right before the user's"):
        render([*turns(system="S"), {"role": "assistant", "content": "a"}], tokenizers["llama2"], "llama2")


# The command

def run_chat(*arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, ROOT / "data/chat.py", *map(str, arguments)], capture_output=True, text=True,
                          encoding="utf-8", env=environment)


def test_show_mask_prints_what_is_trained(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": turns("Hi \x1b[31m", "é中", "x", "B")}, FORMS[0])
    done = run_chat(path, "--show_mask", "--limit", 1)
    assert done.returncode == 0, done.stderr
    first = "<|im_start|>user\nHi \ufffd[31m<|im_end|>\n<|im_start|>assistant\n[[é中<|im_end|>]]\n"
    assert first + "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n[[B<|im_end|>]]\n" in done.stdout
    assert done.stdout.startswith("tokenizer: without <|im_start|> <|im_end|>") and "1 conversations" in done.stdout


def test_show_colours_the_trained_tokens(tokenizers):
    tokenizer = tokenizers["mistral"]
    text = show(*render(turns("U", "A"), tokenizer, "mistral"), tokenizer, colour=True)
    assert text == "<|endoftext|>[INST]U[/INST]\033[32mA<|endoftext|>\033[0m"


def test_command_says_in_one_line_what_is_wrong(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": turns("a")})
    done = run_chat(path)
    assert done.returncode == 2 and done.stderr == f"error: {path}:1: the assistant never speaks: nothing to train on\n"


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prepared_tokenizer_tells_its_template_after_saving_too(template, tmp_path):
    tokenizer = BPETokenizer.train([], 257)
    assert template_of(tokenizer) is None
    prepare_tokenizer(tokenizer, template)
    tokenizer.save(tmp_path)
    assert template_of(tokenizer) == template_of(load_tokenizer(tmp_path)) == template
