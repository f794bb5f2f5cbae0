"""Human feedback in the browser: several people at once, by click or key, into the file that the terminal writes.

The program asks and waits (`Board.ask`) while pages take questions and answer them (`Board.act`) in threads of the
server. Nothing of the page is needed for that: gradio carries messages (see `common.web_page`).
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from minirlhf.common.text import printable
from minirlhf.common.web_page import HOST, PORT, require_web, served
from minirlhf.rewards.human import SCORES, FeedbackFile, HumanReward, Question, as_question, as_record

AHEAD = 4  # questions that are sampled before a page asks for them
AWAY = 60.0  # seconds without a sign of a page, after which its question goes to another one
LAST_LOOK = 5.0  # seconds in which pages learn that the session has ended


class Asked(NamedTuple):
    """A question of a round. name: another one each time that it is asked, which tells old answers from new ones."""

    name: str
    number: int
    question: Question


class Board:
    """Questions for several people, each of whom has another one.

    file: receives the answers. clock: seconds.
    """

    def __init__(self, file: FeedbackFile, clock: Callable[[], float] = time.monotonic):
        self.file, self.ended, self._clock = file, False, clock
        self._change = threading.Condition()  # of what follows
        self._names = map(f"{secrets.token_hex(4)}-{{}}".format, itertools.count())
        self._ranked, self._total, self._unsampled = True, 0, 0
        self._ready: deque[Asked] = deque()  # for the next person who has none
        self._open: dict[str, Asked] = {}  # by person
        self._seen: dict[str, float] = {}  # when, by person
        self._past: dict[str | None, list[tuple[Asked, dict[str, Any] | None]]] = {}  # None: of earlier sessions
        self._given: dict[int, list[int] | None] = {}
        self._error: OSError | None = None

    def ask(
        self,
        numbers: Sequence[int],
        question_of: Callable[[int], Question],
        ranked: bool,
        total: int,
        earlier: Sequence[dict[str, Any]] = (),
    ) -> dict[int, list[int] | None]:
        """Wait until all questions are answered or skipped (None). Raises OSError if an answer cannot be written.

        numbers: of the rounds. question_of: see `ask_rounds`. total: rounds with those of before, for the progress.
        earlier: records that may be taken back, too.
        """
        with self._change:
            self._ranked, self._total, self._unsampled, self._given = ranked, total, len(numbers), {}
            self._past = {None: [(Asked("", r["round"], as_question(r)), r) for r in earlier]}
        for number in numbers:
            question = question_of(number)
            with self._change:
                self._wait(lambda: self._error or len(self._ready) < AHEAD)
                if self._error:
                    raise self._error
                self._unsampled -= 1
                if len(question.answers) >= (2 if ranked else 1):
                    self._ready.append(Asked(next(self._names), number, question))
        with self._change:
            self._wait(lambda: self._error or not (self._ready or self._open))
            if self._error:
                raise self._error
            self._past = {}
            return self._given

    def _wait(self, predicate: Callable[[], object]) -> None:
        while not self._change.wait_for(predicate, 1):  # in seconds, as on Windows Ctrl-C interrupts no endless wait
            pass

    def end(self) -> None:
        """Tell the pages that the session has ended; waits some seconds for those that are still there."""
        with self._change:
            self.ended = True
            there = [person for person, seen in self._seen.items() if self._clock() - seen < LAST_LOOK]
            self._change.wait_for(lambda: not any(person in self._seen for person in there), LAST_LOOK)
        time.sleep(0.5)  # the last answer is under way

    def act(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a page says, and tell it what to show.

        message: person; do: look, answer, skip or undo; of an answer or skip the name of the question; of an answer its
            values, the numbers of the answers, best first, or their scores.
        Raises ValueError for values that are none.
        """
        person, act = message["person"], message["do"]
        with self._change:
            now = self._seen[person] = self._clock()
            try:
                if act == "undo":
                    self._undo(person)
                elif act != "look":
                    self._answer(person, message["name"], message["values"] if act == "answer" else None)
            except OSError as error:
                self._error = error
            if person not in self._open:
                away = [other for other in self._open if now - self._seen[other] > AWAY]
                if self._ready:
                    self._open[person] = self._ready.popleft()
                elif away:
                    self._open[person] = self._open.pop(away[0])
            if self.ended:  # now this page knows
                del self._seen[person]
            self._change.notify_all()
            left = self._unsampled + len(self._ready) + len(self._open)
            state: dict[str, object] = dict(
                done=self._total - left, total=self._total, ended=self.ended, ranked=self._ranked, name=None,
                undo=bool(self._past.get(person) or self._past.get(None)), error=printable(str(self._error or "")),
            )  # fmt: skip
            if person in self._open:
                name, _, question = self._open[person]
                prompt, *answers = ("\n".join(map(printable, text.split("\n"))) for text in
                                    (question.prompt, *question.answers))  # fmt: skip
                state |= {"name": name, "prompt": prompt, "answers": answers}
            return state

    def _answer(self, person: str, name: str, values: list[int] | None) -> None:
        """Write an answer down, unless the question has another answer by now."""
        holder = next((each for each, asked in self._open.items() if asked.name == name), None)
        if holder is None:
            return
        asked, record = self._open[holder], None
        if values is not None:
            count = len(asked.question.answers)
            fine = sorted(values) == list(range(1, count + 1)) if self._ranked else set(values) <= set(SCORES)
            if not fine or len(values) != count or any(type(value) is not int for value in values):
                raise ValueError(f"{values!r:.80} says nothing about {count} answers")
            record = as_record(asked.number, asked.question, values, self._ranked)
            self.file.append(record)
        del self._open[holder]
        self._given[asked.number] = values
        self._past.setdefault(person, []).append((asked, record))

    def _undo(self, person: str) -> None:
        """Ask the person again what they answered or skipped last, or else the last question of earlier sessions."""
        past = self._past.get(person) or self._past.get(None)
        if not past:
            return
        asked, record = past[-1]
        if record is not None:
            self.file.undo(next(i for i, each in enumerate(self.file.records) if each is record))
        past.pop()
        self._given.pop(asked.number, None)
        if person in self._open:
            self._ready.appendleft(self._open[person])
        self._open[person] = asked._replace(name=next(self._names))


class PageReward(HumanReward):
    """`HumanReward` whose texts are scored by all who have the page open; each is asked about one at a time."""

    def __init__(self, board: Board):
        self.file, self._board = board.file, board

    def _ask(self, asked: Sequence[Question]) -> list[int | None]:
        first = 1 + max((record["round"] for record in self.file.records), default=-1)
        numbers = range(first, first + len(asked))
        given = self._board.ask(numbers, lambda number: asked[number - first], False, len(asked))
        return [None if (values := given[number]) is None else values[0] for number in numbers]


def ask_rounds_on_page(board: Board, question_of: Callable[[int], Question], rounds: int, scores: bool = False) -> None:
    """`ask_rounds` for all who have the page open."""
    numbers = [number for number in range(rounds) if board.file.unanswered(number) == number]
    board.ask(numbers, question_of, not scores, rounds, list(board.file.records))


@contextlib.contextmanager
def feedback_page(file: FeedbackFile, host: str = HOST, port: int = PORT) -> Iterator[Board]:
    """Serve the page of a Board inside this context, where Ctrl-C raises KeyboardInterrupt. Raises as `require_web`."""
    gradio, board = require_web(host, port), Board(file)

    def act(message: dict[str, Any]) -> dict[str, Any]:
        return board.act(message)

    with gradio.Blocks(title="minirlhf", analytics_enabled=False) as page:
        gradio.HTML(html_template=HTML, css_template=CSS, js_on_load=SCRIPT, apply_default_css=False,
                    server_functions=[act])  # fmt: skip
    with served(page, host, port), contextlib.ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():  # where alone Python sets handlers
            undo.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
        yield board
        board.end()


HTML = """
<div class="bar"><div class="fill"></div></div>
<div class="line"><span class="count"></span><span class="note"></span></div>
<div class="prompt"></div>
<div class="answers"></div>
<div class="line"><span class="hint"></span><button class="undo"></button><button class="skip"></button></div>
"""
CSS = """
max-width: 46rem; margin: 1.5rem auto; font-size: 1.05rem; line-height: 1.6; color: var(--body-text-color);
--edge: 1px solid var(--border-color-primary);
.bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden }
.fill { height: 100%; background: var(--color-accent); transition: width .3s }
.line { display: flex; align-items: center; gap: .5rem; margin: .5rem 0; min-height: 2.4rem; font-size: .9rem }
.count, .hint { flex: 1; opacity: .75 }
.prompt { font-size: 1.2rem; font-weight: 600; margin: .5rem 0 1rem }
.prompt, p { white-space: pre-wrap; overflow-wrap: anywhere }
.answer { display: flex; flex-wrap: wrap; align-items: center; gap: .8rem; margin: .6rem 0; padding: .8rem 1rem;
  border: var(--edge); border-radius: 10px; background: var(--block-background-fill) }
.answer.next { box-shadow: inset 4px 0 0 var(--color-accent) }
.answer.ranked { cursor: pointer }
.answer p { flex: 1 1 20rem; margin: 0 }
.key, .rank { min-width: 1.7rem; text-align: center; border: var(--edge); border-radius: 6px; font-size: .9rem }
.rank:empty { visibility: hidden }
button { padding: .25rem .8rem; border: var(--edge); border-radius: 8px; background: var(--block-background-fill) }
button:disabled { opacity: .4 }
.answer.ranked:hover, button:hover:enabled { border-color: var(--color-accent) }
.rank:not(:empty), button.on { background: var(--color-accent); border-color: var(--color-accent); color: white }
"""
SCRIPT = r"""
const words = navigator.language.startsWith('zh') ? {
  undo: '撤销 u', skip: '跳过 s', empty: '（空）', wait: '请稍候，马上有新的问题……',
  ended: '全部完成，谢谢！可以关闭此页。', lost: '连不上程序：它已结束或正在重启。',
  rank: '从好到差依次点击，或按数字键；退格键取消一个', score: '1（差）到 5（好）：点击，或按数字键；退格键取消一个',
} : {
  undo: 'undo u', skip: 'skip s', empty: '(empty)', wait: 'The next question comes in a moment ...',
  ended: 'All done, thank you! You can close this page.',
  lost: 'Cannot reach the program: it has ended or is starting again.',
  rank: 'Click the answers, best first, or press their numbers; Backspace: one back',
  score: '1 (bad) to 5 (good): click, or press the number; Backspace: one back',
};
const person = sessionStorage.person ??= Math.random().toString(36).slice(2);  // a reload stays the same person
const at = name => element.querySelector('.' + name);
const make = (parent, tag, name, text = '') =>
  parent.appendChild(Object.assign(document.createElement(tag), {className: name, textContent: text}));
let state = {}, marks = new Map(), busy = false, looking = false, serial = 0;  // marks: answer -> score

async function act(what, values = []) {
  if (busy || what === 'look' && looking) return;  // a slow reply is waited for, not overtaken by the next look
  what === 'look' ? looking = true : busy = true;
  const mine = ++serial;
  try {
    const news = await server.act({person, do: what, name: state.name ?? '', values});
    if (mine !== serial) return;  // a look that an answer has overtaken
    const other = busy || news.name !== state.name;
    state = news;
    if (other) build();
    draw(news.error || (news.name ? '' : news.ended ? words.ended : words.wait));
  } catch (error) { if (!state.ended) draw(words.lost); }
  finally { what === 'look' ? looking = false : busy = false; }
}

function build() {
  marks.clear();
  at('prompt').textContent = state.name ? state.prompt : '';
  at('hint').textContent = state.name ? (state.ranked ? words.rank : words.score) : '';
  at('answers').replaceChildren();
  (state.answers ?? []).forEach((text, i) => {
    const card = make(at('answers'), 'div', state.ranked ? 'answer ranked' : 'answer');
    if (state.ranked) make(card, 'span', 'key', i + 1);
    make(card, 'p', '', text || words.empty);
    if (state.ranked) { make(card, 'span', 'rank'); card.onclick = () => mark(i); }
    else for (let score = 1; score <= 5; score++) make(card, 'button', '', score).onclick = () => mark(i, score);
  });
}

function draw(note = '') {
  const order = [...marks.keys()], next = next_answer();
  [...at('answers').children].forEach((card, i) => {
    if (state.ranked) card.querySelector('.rank').textContent = marks.has(i) ? order.indexOf(i) + 1 : '';
    else card.querySelectorAll('button').forEach((button, k) => button.classList.toggle('on', marks.get(i) === k + 1));
    card.classList.toggle('next', !state.ranked && state.answers.length > 1 && i === next);
  });
  at('note').textContent = note;
  at('count').textContent = state.total ? `${state.done + (state.name ? 1 : 0)} / ${state.total}` : '';
  at('fill').style.width = `${100 * (state.done ?? 0) / (state.total || 1)}%`;
  at('undo').disabled = !state.undo && !marks.size;
  at('skip').disabled = !state.name;
}

const next_answer = () => (state.answers ?? []).findIndex((_, i) => !marks.has(i));

function mark(i, score = 0) {
  if (busy || i < 0) return;  // all are marked
  if (state.ranked && marks.delete(i)) return draw();
  marks.set(i, score);
  if (state.ranked && marks.size === state.answers.length - 1) marks.set(next_answer(), 0);  // the last one follows
  draw();
  if (marks.size === state.answers.length)
    act('answer', state.ranked ? [...marks.keys()].map(k => k + 1) : state.answers.map((_, k) => marks.get(k)));
}

function back() { marks.delete([...marks.keys()].pop()); draw(); }
at('undo').textContent = words.undo; at('undo').onclick = () => marks.size && !busy ? back() : act('undo');
at('skip').textContent = words.skip; at('skip').onclick = () => act('skip');
document.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const code = event.key === 'Process' ? event.code.replace(/^(Key|Digit|Numpad)/, '') : event.key;  // an input method
  const key = code.normalize('NFKC').toLowerCase(), n = Number(key), count = (state.answers ?? []).length;
  if (key === 'u') at('undo').click();
  else if (key === 's') at('skip').click();
  else if (key === 'backspace' && !busy) back();
  else if (state.ranked ? n >= 1 && n <= count && !marks.has(n - 1) : count && n >= 1 && n <= 5)
    state.ranked ? mark(n - 1) : mark(next_answer(), n);
});
act('look');
setInterval(() => state.ended || act('look'), 1000);
"""
