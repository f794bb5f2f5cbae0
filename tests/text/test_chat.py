"""Chats against transformers on templates in the style of common families, and the turns that a model learns."""

import json
import sys

import pytest
from bpe import trained_bpe
from transformers import AutoTokenizer

from minirlhf import Tokenizer
from minirlhf.text.chat import ChatPrompt, assistant_turns, check_messages
from minirlhf.text.demonstrations import Conversation, read_demonstrations, split_demonstrations
from minirlhf.text.prompts import as_prompts, read_prompts
from minirlhf.text.tokenizer_models import ByteBPE

MARKS = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"]

# In the style of ChatML: every message alike.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# In the style of Qwen2.5: a system message if there is none, `-` against white space, tools and loops.
QWEN = """{%- if tools %}{{- raise_exception('no tools here') }}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(n=0) %}
{%- for message in messages %}
    {%- if message.role in ('user', 'assistant') %}
        {%- set ns.n = ns.n + 1 %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
    {%- elif not loop.first %}
        {%- continue %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# In the style of Llama 3: the beginning of text, heads, stripped contents; JSON and a macro besides.
LLAMA = """{{- bos_token }}
{%- macro head(role) %}{{ '<|head|>' + role + '<|/head|>\\n\\n' }}{% endmacro %}
{% for message in messages %}
    {%- if message.role == 'tool' %}
        {{- head('ipython') + {'output': message.content} | tojson + '<|eot|>' }}
    {%- else %}
        {{- head(message['role']) }}{% generation %}{{- message['content'] | trim }}{% endgeneration %}{{- '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{ head('assistant') }}
{%- endif %}"""
TEMPLATES = {"chatml": CHATML, "qwen": QWEN, "llama": LLAMA}

USER, ANSWER = (
    {"role": "user", "content": "Is the hotel <good> & near?\n\n"},
    {"role": "assistant", "content": "\n非常好"},
)
CHATS = {
    "one question": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "turns": [USER, ANSWER, {"role": "user", "content": "  wifi 😀 <|im_end|> "}],
    "tool": [USER, {"role": "tool", "content": "3 < 4 é"}],
    "answered": [USER, ANSWER, USER, {"role": "assistant", "content": "yes"}],
}


def make(template=None, form="setting", folder=None):
    """A small byte-level BPE with the marks of chats, as a folder or in memory."""
    vocab, merges = trained_bpe()
    tokenizer = Tokenizer(ByteBPE([*vocab, *MARKS], merges, extra_special=MARKS))
    if template is not None:
        tokenizer.model.kept = {"chat_template": template}
    if folder is not None:
        tokenizer.save_pretrained(folder)
        if form == "file":
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            settings["chat_template"] = "the file counts"
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


@pytest.mark.parametrize("form", ["setting", "file"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers(tmp_path, name, form):
    make(TEMPLATES[name], form, tmp_path)
    ours, theirs = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for label, messages in CHATS.items():
        for asked in (True, False):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=asked, return_dict=False)
            assert ours.chat(messages, asked) == expected, (label, asked)
    prompt = ours.chat_prompt([USER])
    assert ours.encode_prompt(prompt) == ours.chat([USER]) and prompt.messages == [USER]
    # A saved copy has the template, and no file that would count before it.
    ours.save_pretrained(tmp_path / "copy")
    assert Tokenizer.from_pretrained(tmp_path / "copy").chat([USER]) == ours.chat([USER])
    assert not (tmp_path / "copy/chat_template.jinja").exists()
    ours.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).get_chat_template() == TEMPLATES[name]


def test_the_default_one_of_several_templates_counts():
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages|length }}"}]
    assert make(several).chat([USER, USER]) == make().encode("2")
    assert make({"default": "x", "rag": "y"}).chat([USER]) == make().encode("x")
    with pytest.raises(ValueError, match="none is named default: tool_use"):
        make(several[:1]).chat([USER])


def test_a_word_piece_tokenizer_adds_nothing_to_a_chat(tokenizer):
    other = Tokenizer(tokenizer.vocab)
    other.model.kept = {"chat_template": "{% for m in messages %}{{ m.content }}{{ sep_token }}{% endfor %}"}
    ids = other.chat([{"role": "user", "content": "酒店"}])
    assert (
        ids == [*tokenizer.encode("酒店")[1:]] == other.encode_prompt(other.chat_prompt([USER | {"content": "酒店"}]))
    )


def test_without_a_template_one_error_says_what_to_do(tokenizer):
    for other in (tokenizer, make()):
        for call in (other.chat, other.chat_prompt, other.chat_turns):
            with pytest.raises(ValueError, match=r"no chat_template, in tokenizer_config.json or chat_template.jinja"):
                call([USER])


@pytest.mark.parametrize(("template", "message"), [
    ("{% if %}", "TemplateSyntaxError"),
    ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{% set _ = messages.append(1) %}", "SecurityError"),
    ("{{ range(10**9) | list }}", "OverflowError"),
    ("{{ messages[0].content + 1 }}", "TypeError"),
    ("{{ missing.field }}", "UndefinedError"),
])  # fmt: skip
def test_a_template_that_fails_is_one_error(template, message):
    with pytest.raises(ValueError, match=rf"the chat_template does not take these messages: {message}"):
        make(template).chat([USER])


@pytest.mark.parametrize(("messages", "message"), [
    ([], r"messages must be a list of objects"),
    ("hello", r"messages must be a list of objects"),
    ([USER, "hello"], r"message 2 must be an object with role and content, got 'hello'"),
    ([{"role": "user"}], r"message 1 must have a text as its content, it has 'role'"),
    ([{"role": "user", "content": [{"type": "image"}]}], r"message 1 must have a text as its content, got \["),
    ([{"role": 1, "content": ""}], r"message 1 must have a text as its role, got 1"),
])  # fmt: skip
def test_bad_messages_are_named(messages, message):
    with pytest.raises(ValueError, match=message):
        make(CHATML).chat(messages)


def test_without_jinja_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install jinja2 \(minirlhf's extra chat\)"):
        make("{{ 'not compiled before' }}").chat([USER])


# ---- turns ----------------------------------------------------------------------------------------------------------


def test_the_turns_of_the_assistant_by_hand():
    pieces = assistant_turns(CHATML, CHATS["answered"], {})
    asked = "<|im_start|>user\nIs the hotel <good> & near?\n\n<|im_end|>\n<|im_start|>assistant\n"
    assert pieces == [
        (asked, False), ("\n非常好<|im_end|>\n", True), (asked, False), ("yes<|im_end|>\n", True), ("", False),
    ]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_ends_with_its_special_token_and_joined_pieces_are_the_chat(name):
    ours = make(TEMPLATES[name])
    turns = ours.chat_turns(CHATS["answered"])
    spoken = [ids for ids, by_assistant in turns if by_assistant]
    end = ours.model.ids["<|eot|>" if name == "llama" else "<|im_end|>"]
    assert [ours.decode(ids) for ids in spoken] == ["非常好" if name == "llama" else "\n非常好", "yes"]
    assert all(ids.count(end) == 1 and ids[-1] == end for ids in spoken)
    joined = [i for ids, _ in turns for i in ids]
    assert ours.decode(joined) == ours.decode(ours.chat(CHATS["answered"], False))
    assert joined[: len(turns[0][0])] == ours.chat([USER])  # what is given when the answer is sampled


def test_a_template_that_rewrites_earlier_turns_is_refused():
    forgetful = (
        "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last or m.role == 'user' else '-' }};{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"writes message 2 differently once others follow"):
        make(forgetful + "{% if add_generation_prompt %}assistant:{% endif %}").chat_turns(CHATS["answered"])
    with pytest.raises(ValueError, match="no message of the assistant"):
        make(CHATML).chat_turns([USER])


# ---- files ----------------------------------------------------------------------------------------------------------


def test_prompts_may_be_chats(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = [{"prompt": [USER]}, {"messages": CHATS["turns"], "prompt": None}, {"prompt": "酒店"}]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    assert read_prompts(path) == [[USER], CHATS["turns"], "酒店"]
    ours = make(CHATML)
    for given in (path, read_prompts(path)):
        found = as_prompts(given, ours)
        assert [type(prompt) for prompt in found] == [ChatPrompt, ChatPrompt, str] and found[0] == ours.chat_prompt(
            [USER]
        )
        assert as_prompts(found) == found and type(as_prompts(found)[0]) is ChatPrompt
    with pytest.raises(ValueError, match="prompt 0 is a chat, and only texts can be given here"):
        as_prompts(path)
    path.write_text(json.dumps({"messages": CHATS["answered"]}))
    with pytest.raises(ValueError, match=r"p.jsonl, line 1: the last message is the assistant's"):
        read_prompts(path)


def test_demonstrations_may_be_chats(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": CHATS["answered"], "id": 3}) + '\n{"text": "a"}', encoding="utf-8")
    chat, text = read_demonstrations(path)
    assert chat.messages == check_messages(CHATS["answered"]) and text.response == "a"
    many = [Conversation([{"role": "user", "content": str(i % 50)}, ANSWER]) for i in range(100)]
    train, held_out = split_demonstrations(many, 0.3)
    asked = [{one.messages[0]["content"] for one in side} for side in (train, held_out)]
    assert not asked[0] & asked[1] and len(train) + len(held_out) == 100
    path.write_text(json.dumps({"messages": [USER]}))
    with pytest.raises(ValueError, match=r"line 1: no message is the assistant's"):
        read_demonstrations(path)
