"""What a judge's answer is read as: one number if it can be read in one way, and nothing otherwise."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.rewards.judge_answer import parse_score, text_of

EIGHTS = [
    "8", " 8\n", "8.0", "008", "+8", "8.", "８", "８.０", "8分", "8 分。", "8/10", "8 / 10", "8 out of 10", "8 points",
    "**8**", '"8"',
    "`8`", "### 8", "8\n8", "Score: 8", "score:8", "Score = 8", "Score: 8/10", "Score: 8.", "**Score:** 8",
    "Score: **8**/10",
    "The score is 8", "My final score is: 8", "Rating: 8 stars", "Score (0-10): 8", "Final answer: 8/10", "评分：8",
    "评分：8分",
    "**评分：８／１０**", "得分: 8/10 分", "评分为8", "【评分】8", "我给这段文字打8分", "[[8]]", "Rating: [[8]]",
    "[[8/10]]",
    '{"score": 8}', '{"score": "8/10"}', '{"rating": 8.0}', '{"评分": 8}', '{"reason": "10 stars", "score": 8}',
    '{"x": 8}',
    '```json\n{"score": 8}\n```', 'Here it is: {"score": 8, "words": 3}', "<think>a 3, or 4?</think>8", "</think>\n8",
    "<think>fine</think>\n<think>9?</think>\n\nScore: 8", "[THINK]9[/THINK]8", "The guest is content.\n\n8",
    "Score: 8\nThe 3 rooms are clean.", "The 10 rooms are clean. Score: 8/10.", "Style 7, content 9. Score: 8",
    "Score: 8. I say it again: score: 8", "<score>8</score>", "<think>9</think>\n<answer>8</answer>", r"\boxed{8}",
    r"The answer is $\boxed{8}$.", "Score out of 10: 8", "Score from 0 to 10: 8", "Score [0-10]: 8",
    "评分为：8", "可以得8分",
    "\ufeff8\u200b", '{"score": 8, "details": {"grammar": 3}}', '{"grammar": {"score": 3}, "score": 8}',
    '{"reason": "a {b}", "score": 8}', '{"reason": "x", "result": {"score": 8}}', "as {asked}: 3 lines.\nScore: 8",
    "◁think▷Score: 3◁/think▷8", "<|START_THINKING|>score: 3<|END_THINKING|>8", "<seed:think>3</seed:think>8",
    "<|channel|>analysis<|message|>score: 3<|end|><|start|>assistant<|channel|>final<|message|>8",
    "8分（满分10分）", "8 (out of 10)", "8 stars out of 10", "最终得分8分", "评分结果：8", "综合评价：8分", "总评：8",
    "Overall: 8", "Style: 7\nOverall: 8/10", "【评分】：8分", "Score - 8", "**Score** - 8/10", "Score: (8)", "(8)",
    "Score: 8 (0-10)", "评分：8分/10分", "Score (0 = bad, 10 = good): 8", "打分（满分10分）：8",
    "Score (a whole number): 8", "Rating: [[8]]/10", "满分10分，我给8分", "On a scale of 1 to 10, my rating is 8.",
    "Score: 8 on a scale from 0 to 10", "十分制。评分：8", "Score: 8 — very good", "Score: 8 - good",
    "Score: 8 (good)", "Score: 8, as it is good", "Score: 8; good", "Score: 8 because it is good.",
    "Score: 8 The text is good. It has 3 rooms.", "评分：8分。3 间房", "评分：8\n分析：好", "评分：8 分析：好",
    "评分：8分 —— 好", "(Score: 8)", "[Score: 8]", "【评分：8分】", "| Score: 8 |", "Score: 8</s>",
    "Score: 8\r\n3 rooms", "评分：\u30008\u3000理由：好", "'Score: 8'", "{'score': 8}",
    "{'reason': \"it's\", 'score': 8}", "It's {'reason': 'it\\'s', 'score': '8/10'}.",
    '{"分析": "服务很好", "评分": 8}', '{"评分理由": "好", "评分": 8}', '{"score_reason": "x", "score": 8}',
    '{"score": 8, "grade_level": 3}', '{"finalScore": 8, "words": 3}', '{"score": 8, "out_of": 10}',
    '{"score": 8, "max_score": 10}', '{"score": 8, "scale": "0-10"}', '{"得分": 8, "满分": 10}',
    '{"score_out_of_10": 8, "x": "y"}', '{"评分（满分10分）": 8, "x": "y"}', "[Analysis] good [Score]: 8",
    "<|begin_of_thought|>\nScore: 7\n<|end_of_thought|>\n\n<|begin_of_solution|>8<|end_of_solution|>",
    "<reflection>Score: 7</reflection>8", "<scratchpad>\n7\n</scratchpad>\n8",
    "<Analysis>a <b>7</b></Analysis>Score: 8", "<rating>8</rating><rationale>Score: 7, at first</rationale>",
    "<analysis><analysis>7</analysis>7</analysis>8",
]  # fmt: skip
NONE = [
    "", " \n", "I'm sorry, but I can't help with that.", "seven", "eight", "八", "八分", "٨", "7 because it is nice",
    "The text deserves a 7.", "7 8", "7\n8", "7-8", "7 or 8", "7, 8", "8,5", "8%", "1e0", "inf", "nan", "NaN", "0x7",
    "1_0", "−1",
    "7\0", "7*8", "7½", "4/5", "Score: 4/5", "80/100", "Score: 7-8", "Score: 7 or 8", "评分：7到8", "Score: 80%",
    "Score: 8,5",
    "Score: 1e1", "Score: 8x", "Scores 8 and 7", "The score should be 8", "The score is not 8", "8 of the 12 words",
    "Style score: 7. Final score: 8", 'The text says "Score: 10". Score: 2', "[[7]] or [[8]]", "[7]", '{"score": true}',
    '{"score": null}', '{"score": [8]}', '{"score": 8, "other score": 7}', '{"a": 8, "b": 7}', '{"score": 8',
    '{"score": 7} {"score": 8}', "<think>The text is", "<think>8", "<think>7</think>", "8<think>",
    "10 stars for 8 rooms", "Score: 8½", "Score: 8 and a half", '{"details": {"grammar": 3}, "score": 8',
    '{"scores": {"style": 7, "grammar": 8}}', '{"a": {"score": 7}, "b": {"score": 8}}', '{"a":' * 3000,
    "<|channel|>analysis<|message|>score: 3",
    "Score: 2+3+3 = 8", "Score: 4 × 2 = 8", "Score: 4*2 = 8", "Score: 2^3", "Score: 9 -> 7", "Score: 9 → 7",
    "Score: 9... 7", "评分：7分半", "评分：7 分半", "Score: 7 1/2", "Score: 8 ½", "评分：7点5", "评分：7点五",
    "Score: 7·5", "Score: 7٫5", "Score: 7+", "Score: 7±1", "Score: 7.5.3", "Score: 8?", "Score: 7 percent",
    "评分：7分以上", "Score: 4 out of five", "Score: 4/5 stars", "Score: 4 (out of five)", "评分：4（满分五分）",
    "评分（五分制）：4", "Score (out of five): 4", "Score: 4 on a five-point scale", "Score: 4, out of 5",
    "Score: 4 stars (max 5)", "评分：4 星（共5星）", "Score (1-5): 4/10", "Score (0-10): 4/5", "Score: 8/10/10",
    "Score: 7、8", "Score: 7 — 8", "Score: 7\u20118", "Score: 7|8", "Score: 9; 7", "Score: 7 or eight",
    "评分：7 或八", "给 7 分或 8 分", "Score: 8 for style, 7 for content", "Score: 7 (or 8)",
    "Score: 7-8\n\nScore: 8", "Overall: 8 rooms", "Overall: 7-8", "Overall: 7\nScore: 8", "(4/5)", "(7) (8)",
    "Style: 8 rooms\n(7) 8", '{"充分性": 8, "总评": 3}', '{"分类": 1, "总评": 8}', '{"分析": 9, "结论": 3}',
    '{"berating": 1, "overall": 9}', '{"grade_level": 3, "quality": 8}', '{"upgrade": 3, "quality": 8}',
    '{"score": 4, "out_of": "five"}', '{"score": 8, "finalScore": 7}', "{'score': 8", "{'score': 8, 'rating': 7}",
    "{'grammar': {'score': 3}, 'style': {'score': 8}}", "{'score': True}",
    "<scratchpad>\n7\n</scratchpad>\nThe final is 8.", "<analysis>Score: 7", "<scratchpad>7",
    "<|begin_of_thought|>Score: 7",
]  # fmt: skip
FOURS_OF_FIVE = [
    "评分：4分（满分5分）", "Score: 4 (out of 5)", "Score: 4 stars out of 5", "4 stars out of 5", "评分：4分/5分",
    "Score (1-5): 4", "打分（满分5分）：4", "评分：4分（5分制）", "满分5分，我给4分。", "满分：5分\n得分：4分",
    "On a scale of 1 to 5, the score is 4.", "Score on a 5-point scale.\n4", "[[4]]/5", "[[4]] out of 5",
    '{"score": 4, "out_of": 5}', '{"score": 4, "maxScore": 5}', '{"score": 4, "scale": "1-5"}',
    '{"得分": 4, "满分": 5}', '{"score_out_of_5": 4, "x": "y"}', '{"score (1-5)": 4}',
]  # fmt: skip


@pytest.mark.parametrize("answer", EIGHTS)
def test_a_number_that_can_be_read_in_one_way_is_the_score(answer):
    assert parse_score(answer, 0, 10) == 8
    assert parse_score(answer, 8.5, 10) is None and parse_score(answer, 0, 7.5) is None  # out of range, in any words


@pytest.mark.parametrize("answer", NONE)
def test_anything_else_is_none(answer):
    assert parse_score(answer, 0, 10) is None


@pytest.mark.parametrize("answer", FOURS_OF_FIVE)
def test_a_score_of_another_scale_is_none(answer):
    assert parse_score(answer, 0, 5) == 4
    assert parse_score(answer, 0, 10) is None and parse_score(answer, 0, 4) is None


@pytest.mark.parametrize("answer", [
    "Score" + " " * 50000 + "x", "Score: 1" + " " * 50000 + "x", '{"score": "Score' + " " * 50000 + 'x"}',
    "<analysis>" * 9000, "1 to " * 9000,
], ids=lambda answer: answer[:10])  # fmt: skip
def test_a_judge_that_repeats_itself_is_read_in_no_time(answer):  # some patterns would take minutes
    assert parse_score(answer, 0, 10) is None


@pytest.mark.parametrize(("answer", "low", "high", "score"), [
    ("-0", 0, 10, 0), (".5", 0, 1, 0.5), ("-2.5", -5, 5, -2.5), ("Score: -3", -5, 5, -3), ("4/5", 1, 5, 4),
    ("Score: 80/100", 0, 100, 80), ("10/10", 0, 10, 10), ('{"score": -1e-1}', -1, 1, -0.1), ("10.01", 0, 10, None),
    ("-0.01", 0, 10, None), ("1" + "0" * 400, 0, 10, None), ('{"score": 1' + "0" * 400 + "}", 0, 10, None),
    ("Score: 11", 0, 10, None), ("Score - 3", -5, 5, None), ("Score -3", -5, 5, -3), ('{"score": NaN}', 0, 10, None),
])  # fmt: skip
def test_signs_and_ranges(answer, low, high, score):
    assert parse_score(answer, low, high) == score


@given(st.text(alphabet='0123456789.-+/ \n分score:[]{}"*七', max_size=12), st.floats(-20, 20), st.floats(0, 20))
def test_a_score_is_in_the_range_whatever_the_answer(answer, low, width):
    score = parse_score(answer, low, low + width)
    assert score is None or (low <= score <= low + width and any(char.isdigit() for char in answer))


@given(
    st.integers(-(10**6), 10**6),
    st.integers(0, 3),
    st.sampled_from(["{}", "Score: {}", "评分：{}分", "[[{}]]", "**{}**", "Overall: {}", "{{'score': {}}}"]),
)
def test_every_decimal_number_is_read_exactly(number, digits, form):
    text = f"{number / 10**digits:.{digits}f}"
    answer, value = form.format(text), float(text)
    assert parse_score(answer, -1e7, 1e7) == parse_score(answer, value, value) == value
    assert parse_score(answer, math.nextafter(value, math.inf), 1e7) is None
    assert parse_score(answer, -1e7, math.nextafter(value, -math.inf)) is None


@pytest.mark.parametrize(("content", "text"), [
    ("8", "8"), (None, ""), ([{"type": "text", "text": "8"}], "8"), (["8", "/10"], "8/10"), ([], ""),
    ([{"type": "reasoning", "text": "Score: 9"}, {"type": "output_text", "text": "8"}], "8"),
    ([{"type": "reasoning", "summary": "9"}, {"type": "text", "text": "a "}, {"type": "text", "text": "8"}], "a 8"),
])  # fmt: skip
def test_the_text_of_a_message_in_one_part_or_in_several(content, text):
    assert text_of(content) == text


@pytest.mark.parametrize("content", [8, {"text": "8"}, b"8"], ids=lambda x: type(x).__name__)
def test_what_is_no_text_is_refused(content):
    with pytest.raises(ValueError, match=f"an answer must be a text, got {type(content).__name__}"):
        text_of(content)
