"""examples/benchmark/gpu_record.py, as far as a machine without a GPU shows it."""

import pytest
import torch

from benchmark import gpu_record
from benchmark.work import Work

TINY = Work(size="tiny", batch=4, new_tokens=4)


def test_graphed_decoding_equals_plain_decoding_on_a_cpu():
    """There it is the same code at fixed shapes, without a graph."""
    found = gpu_record.parity(TINY.gpt2(), TINY.lengths().prompts, "fp32", new_tokens=6)
    assert found["equal tokens"] == 1 and found["largest difference, nats"] < 1e-5
    assert found["plain s"] > 0 and found["graphed s"] > 0


def test_the_first_unequal_token_ends_the_comparison(monkeypatch):
    """Two rows of four tokens: one unequal from its third token on, the other equal."""
    plain = torch.tensor([[1, 7, 7, 7, 7], [1, 8, 8, 8, 8]]), torch.tensor([[-1.0, -1, -1, -1], [-2, -2, -2, -2]])
    graphed = torch.tensor([[1, 7, 7, 5, 7], [1, 8, 8, 8, 8]]), torch.tensor([[-1.0, -1, -9, -9], [-2, -2, -2, -2.5]])
    made = iter([plain, plain, graphed, graphed])

    def generate(*given, **named):
        tokens, logprobs = next(made)
        return type("Sampled", (), {"tokens": tokens, "logprobs": logprobs})

    monkeypatch.setattr(gpu_record, "generate", generate)
    found = gpu_record.parity(TINY.gpt2(), [], "fp32", new_tokens=4)
    assert found["equal tokens"] == 7 / 8 and found["largest difference, nats"] == 0.5


@pytest.mark.parametrize("fine", [True, False])
def test_the_record_has_hardware_tests_parity_and_benchmark(fine):
    rows = [{"precision": "fp32", "equal tokens": 1.0}]
    text = gpu_record.record({"GPU": "H", "threads": 2, "preloaded": []}, (fine, "3 passed"), rows, "TABLES")
    assert "GPU H, threads 2." in text and "3 passed" in text and "| fp32 | 1 |" in text and text.endswith("TABLES\n")
    assert ("All passed." if fine else "**Some failed.**") in text and "preloaded" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu_record.py", "--output", str(tmp_path / "record.md")])
    with pytest.raises(ValueError, match="finds no GPU"):
        gpu_record.main()
    assert list(tmp_path.iterdir()) == []
