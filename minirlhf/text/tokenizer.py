"""Text to token ids and back: BERT's WordPiece, which Chinese GPT-2 models use as well, and GPT-2's byte-level BPE.

Any other BPE of a `tokenizer.json`, as Llama and Qwen have one, is what the file says.

Built on the `tokenizers` package. `tokenizer_models` and `tokenizer_json` have the kinds; `tokenizer_folder` reads any
from files.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence, Set

from torch import Tensor

from minirlhf.io.files import atomic_write, replaced_folder, write_json
from minirlhf.text.chat import ChatPrompt, Message, assistant_turns, check_messages, default_template, render
from minirlhf.text.tokenizer_folder import TOKENIZER_FILES, read_tokenizer
from minirlhf.text.tokenizer_models import TokenizerModel, WordPiece, build_vocab, is_unicode

__all__ = ["Tokenizer", "build_vocab"]


class Tokenizer:
    """A tokenizer of any kind, with the ids that transformers' class for the same folder gives.

    model: a WordPiece, a ByteBPE or a JSONTokenizer; a list of tokens, in the order of their ids, is BERT's WordPiece.
    vocab: the tokens in the order of their ids, as the vocabulary file writes them.
    special_ids: ids of the special tokens, which are found literally in a text ("[SEP]") and left out of decoded text.
    eos_id: ends a text: [SEP], or <|endoftext|>, or the eos_token of the folder. eos_ids: all ids that end a sampled
        text: that one, then those of the folder's `generation_config.json`. pad_id: fills batches; it may equal
        eos_id, because a mask marks the padding.
    Raises ValueError for a bad vocabulary (see the models).
    """

    def __init__(self, model: TokenizerModel | Sequence[str]):
        if not isinstance(model, TokenizerModel):
            if isinstance(model, (str, Set, Mapping)) or not isinstance(model, Iterable):
                advice = "of another library's save_pretrained, minirlhf.Tokenizer.from_pretrained(folder) loads it"
                raise ValueError(f"a vocabulary must be a list of tokens by id, got a {type(model).__name__}: {advice}")
            model = WordPiece(list(model))
        self.model = model
        self.vocab = self.model.vocab
        self.special_ids = self.model.special_ids
        self.pad_id, self.eos_id = self.model.pad_id, self.model.eos_id
        blank = {i for i, token in enumerate(self.vocab) if token == "" and self.model.backend.id_to_token(i) is None}
        self._silent_ids = self.special_ids | blank  # what `decode` leaves out
        self.eos_ids = tuple(dict.fromkeys([self.eos_id, *self.model.stop_ids]))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read the tokenizer of a model folder, of any supported kind.

        See `read_tokenizer` for the files and errors.
        """
        return cls(read_tokenizer(folder))

    def save_pretrained(self, folder: str | os.PathLike[str], max_length: int | None = None) -> None:
        """Write all that transformers needs for the same ids, at one moment, in the place of other tokenizer files.

        max_length: of the model's input in tokens, where other tools cut long texts; None: as in the folder read.
        Raises OSError if the folder cannot be written.
        """
        files = self.model.files(max_length)
        with replaced_folder(folder) as staged:
            for name in TOKENIZER_FILES:
                (staged / name).unlink(missing_ok=True)  # or the folder would hold two tokenizers
            for name, content in files.items():
                if isinstance(content, Mapping):
                    write_json(staged / name, content)
                else:
                    atomic_write(staged / name, content.encode("utf-8"))

    def __repr__(self) -> str:
        ends = f"pad {self.vocab[self.pad_id]!r}, end {self.vocab[self.eos_id]!r}"
        return f"Tokenizer({type(self.model).__name__}, {len(self)} tokens, {ends})"

    def __len__(self) -> int:
        return len(self.vocab)

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Token ids of a text: [CLS] ... [SEP], of BPE the text's alone; cut at the end to `max_length` in all.

        Raises ValueError for anything but a text, and for a `max_length` without room.
        """
        room = self._room(max_length)
        return self._framed(self._encode(text)[:room])

    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """`encode` over many texts at once, in parallel threads."""
        if isinstance(texts, str):
            raise ValueError("texts must be a list of texts, got a single one")
        room = self._room(max_length)
        return [self._framed(ids[:room]) for ids in self._encode_batch(texts)]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt to be continued: [CLS] ... without the final [SEP], of BPE the text's alone.

        Raises ValueError if no token is left of the text (an empty prompt; of WordPiece a blank one as well). With BPE
        the prompt "<|endoftext|>" is the beginning of a new text, as the published GPT-2 has learned it.
        """
        ids = self._encode(text)
        if not ids:
            raise ValueError(f"prompt {text!r} is empty: it must hold at least one token")
        return ids if isinstance(text, ChatPrompt) else [*self.model.opening, *ids]

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a chat by the folder's own template, as transformers' `apply_chat_template` gives them.

        messages: dicts with "role" and "content". add_generation_prompt: whether the assistant's answer comes next.
        A special token that stands in a content is that token: leave out what users must not write.
        Raises ValueError for bad messages, a folder without a template, and a template that fails or refuses them;
        ImportError without jinja2.
        """
        return self._encode(self._rendered(check_messages(messages), add_generation_prompt))

    def chat_prompt(self, messages: Sequence[Message]) -> ChatPrompt:
        """A chat as a prompt like any other text; `encode_prompt` gives the ids of `chat`. Raises as `chat`."""
        checked = check_messages(messages)
        return ChatPrompt.of(self._rendered(checked, True), checked)

    def chat_turns(self, messages: Sequence[Message]) -> list[tuple[list[int], bool]]:
        """Token ids of a whole chat in pieces, and of each whether the assistant writes it.

        A piece of the assistant goes from the place where it is asked to answer to the special token that ends its
        turn. Pieces are encoded separately, as an answer is sampled after its prompt: no token spans two.
        Raises ValueError as `chat`, and as `text.chat.assistant_turns`.
        """
        template, checked = default_template(self.model.kept.get("chat_template")), check_messages(messages)
        found: list[tuple[list[int], bool]] = []
        for text, by_assistant in assistant_turns(template, checked, self.model.roles):
            ids = self._encode(text)
            ends = [i for i, token in enumerate(ids, 1) if token in self.special_ids]
            end = ends[-1] if by_assistant and ends else len(ids)
            found += [(ids[:end], by_assistant), (ids[end:], False)]
        return [(ids, by_assistant) for ids, by_assistant in found if ids]

    def _rendered(self, messages: list[Message], add_generation_prompt: bool) -> str:
        template = default_template(self.model.kept.get("chat_template"))
        return render(template, messages, self.model.roles, add_generation_prompt)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that a language model learns, with their end: [CLS] ... [SEP], or ... <|endoftext|>.

        Raises ValueError for an empty text of BPE: its end alone leaves nothing to predict.
        """
        documents = [[*self.model.opening, *ids, self.eos_id] for ids in self._encode_batch(texts)]
        for i, document in enumerate(documents):
            if len(document) < 2:
                raise ValueError(f"text {i} is empty: there is nothing to predict in it")
        return documents

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of token ids, special tokens left out.

        WordPiece: no spaces between Chinese characters, a space between Latin words. BPE: byte for byte; an incomplete
        character becomes U+FFFD. Raises ValueError for an id outside the vocabulary.
        """
        try:
            ids = [operator.index(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        except TypeError as error:
            raise ValueError(f"expected token ids of one text, got {ids!r:.80}") from error
        for i in ids:
            if not 0 <= i < len(self.vocab):
                raise ValueError(f"token id {i} is outside the vocabulary of {len(self.vocab)} tokens")
        return self.model.decode(ids)

    def decode_response(self, prompt_ids: Iterable[int] | Tensor, response_ids: Iterable[int] | Tensor) -> list[str]:
        """What each token of a response adds to the text of its prompt; joined, they are the text of the response.

        It begins with the space after a Latin word, or with a character that the prompt left incomplete, so that prompt
        and response together are `decode` of all tokens. Raises ValueError as `decode`.
        """
        prompt, response = (x.tolist() if isinstance(x, Tensor) else list(x) for x in (prompt_ids, response_ids))
        return self.decode_pieces([*prompt, *response])[len(prompt) :]

    def decode_pieces(self, ids: Iterable[int] | Tensor) -> list[str]:
        """The text that each token adds: as many texts as ids, which joined are `decode` of all.

        Special tokens and blank lines of the vocabulary add nothing; of the tokens of one character, only the last
        does. Raises ValueError as `decode`.
        """
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        spoken = [i for i, token in enumerate(ids) if token not in self._silent_ids]
        pieces = [""] * len(ids)
        context = begin = 0  # in `spoken`: the last tokens that gave a piece, and the first that gave none yet
        for end, place in enumerate(spoken, 1):
            text = self.decode(ids[i] for i in spoken[context:end])
            byte_ids = self.model.byte_ids
            within = end < len(spoken) and {ids[place], ids[spoken[end]]} <= byte_ids  # a row of tokens of one byte
            if end == len(spoken) or not (within or text.endswith("\ufffd")):  # else a character is not complete
                pieces[place] = text[len(self.decode(ids[i] for i in spoken[context:begin])) :]
                context, begin = begin, end
        return pieces

    def width(self, token_id: int) -> int:
        """How many characters of text a token stands for, white space left out; a special token counts as one."""
        return 1 if token_id in self.special_ids else self.model.width(token_id)

    @property
    def eos_token_id(self) -> int | tuple[int, ...]:
        """`eos_ids` as `generate` and the configs take them: the id, or several."""
        return self.eos_id if len(self.eos_ids) == 1 else self.eos_ids

    @property
    def cls_id(self) -> int:
        """Id of [CLS]. Raises ValueError for BPE, as the two below."""
        return self._bert_id("[CLS]")

    @property
    def sep_id(self) -> int:
        """Id of [SEP]."""
        return self._bert_id("[SEP]")

    @property
    def mask_id(self) -> int:
        """Id of [MASK]."""
        return self._bert_id("[MASK]")

    def _bert_id(self, token: str) -> int:
        if not isinstance(self.model, WordPiece):
            raise ValueError(f"a byte-level BPE has no {token}: what asks for it needs a tokenizer of BERT's kind")
        return self.model.ids[token]

    def _room(self, max_length: int | None) -> int | None:
        """How many tokens of a text fit into `max_length` beside those before and after it."""
        frame = len(self.model.opening) + len(self.model.closing)
        if max_length is None:
            return None
        if max_length < max(frame, 1):
            least = f"{frame} for [CLS] and [SEP]" if frame else "1"
            raise ValueError(f"max_length must be at least {least}, got {max_length}")
        return max_length - frame

    def _framed(self, ids: list[int]) -> list[int]:
        return [*self.model.opening, *ids, *self.model.closing]

    def _encode(self, text: str) -> list[int]:
        return self.model.backend.encode(_checked(text), add_special_tokens=False).ids

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        checked = [_checked(text) for text in texts]
        return [encoding.ids for encoding in self.model.backend.encode_batch_fast(checked, add_special_tokens=False)]


def require_tokenizer(tokenizer: object) -> None:
    """Raise ValueError for a tokenizer of another library."""
    if not hasattr(tokenizer, "encode_prompt"):
        advice = "save it with save_pretrained(folder) and load it with minirlhf.Tokenizer.from_pretrained(folder)"
        raise ValueError(f"the tokenizer must be a minirlhf.Tokenizer, got a {type(tokenizer).__name__}: {advice}")


def _checked(text: object) -> str:
    """A text that can be encoded. Raises ValueError for anything but a str; lone surrogates become U+FFFD."""
    if not isinstance(text, str):
        raise ValueError(f"expected a text, got {text!r} of type {type(text).__name__}")
    return text if is_unicode(text) else "".join(char if is_unicode(char) else "\ufffd" for char in text)
