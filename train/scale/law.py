"""What a batch is worth: loss by parameters and tokens, and the tokens that a large batch takes more.

loss(N, D) = E + A/N^a + B/D^b, Chinchilla's law as it was fitted again (arXiv 2404.10102; the data are 2203.15556's).
Steps and tokens to one loss lie on a hyperbola (arXiv 1812.06162, equation 2.7): with a batch of B tokens it takes
1 + B/critical times the tokens that a small batch would. The critical batch grows as the loss falls (arXiv 2001.08361,
equation 5.3). Both were measured on other data and tokenizers than anybody's next run: published laws, used beyond
where they were measured (up to 16 B parameters; 1.5 B for the batch). Of experts the active parameters are counted.
"""

from __future__ import annotations

E, A, B, a, b = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
SOURCE = "arXiv 2404.10102, 2001.08361 and 1812.06162; extrapolated"


def loss(parameters: float, tokens: float) -> float:
    """Nats a token, by steps of a small batch."""
    return float(E + A / parameters**a + B / tokens**b)


def critical_batch(nats: float) -> float:
    """Tokens a step at which a run to this loss takes twice the fewest tokens, and twice the fewest steps."""
    return float(2.1e8 / nats ** (1 / 0.21))


def tokens_needed(tokens: float, batch: float, nats: float) -> float:
    """Tokens that a batch of so many takes to where `tokens` of a small batch lead."""
    return tokens * (1 + batch / critical_batch(nats))
