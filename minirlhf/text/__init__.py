"""Text and token ids: tokenizers, padding and batching, demonstrations, preferences. No model lives here."""
