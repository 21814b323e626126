"""The noise of log s_i from rounding logits, against GSPO's clip range: simulated on a CPU.

    .venv/bin/python tools/logit_noise.py

Two passes over one response at equal weights differ in the order of their sums, and so in what reaches the head. Here a
token's hidden state is drawn once and rounded to bfloat16 twice, each time after noise of some units in its last place:
the same token in two packings. Both go through a head of bfloat16 weights; logits are exact products, rounded to
bfloat16 or kept in float32. The token is drawn from the softmax of the hidden state before its noise.

A token's two logprobs differ by d, whose distribution is symmetric; log s_i is the mean of d over L tokens that are
independent here, so that its root mean square is that of d divided by sqrt(L). The table has it.
"""

from __future__ import annotations

import argparse

import torch

CLIP_LOW, CLIP_HIGH = 3e-4, 4e-4


def main() -> None:
    options = _options()
    generator = torch.Generator().manual_seed(options.seed)
    print("| noise of h | largest logit | logits | " + " | ".join(f"{it:,} tokens" for it in options.lengths) + " |")
    print("|---|---|---|" + "---|" * len(options.lengths))
    for noise in options.noises:
        for size in options.sizes:
            for name, of_token in simulate(size, noise, options, generator).items():
                rms = float(of_token.square().mean().sqrt())
                cells = " | ".join(f"{rms / length**0.5:.1e}" for length in options.lengths)
                print(f"| {noise:g} | {size:g} | {name} | {cells} |", flush=True)
    print(f"\nclip range: {CLIP_LOW:g} below, {CLIP_HIGH:g} above; {options.tokens:,} tokens for each line")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 300, 1000, 3000, 8000])
    parser.add_argument("--sizes", type=float, nargs="+", default=[8.0, 16.0, 32.0], help="each token's largest logit")
    parser.add_argument("--noises", type=float, nargs="+", default=[0.1, 0.5], help="units in h's last place")
    parser.add_argument("--tokens", type=int, default=1024, help="drawn for each line")
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def simulate(
    size: float, noise: float, options: argparse.Namespace, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """By rounding of logits, [tokens] differences of a sampled token's logprob between two passes."""
    weight = torch.randn(options.vocab, options.hidden, generator=generator) * options.hidden**-0.5
    weight = weight.bfloat16().float()
    found: dict[str, list[torch.Tensor]] = {}
    for start in range(0, options.tokens, 256):
        h = torch.randn(min(256, options.tokens - start), options.hidden, generator=generator)
        z = h @ weight.t()
        scale = size / z.amax(dim=1, keepdim=True)
        labels = torch.multinomial((z * scale).softmax(dim=1), 1, generator=generator)
        passes = [_in_pass(h * scale, noise, weight, generator) for _ in range(2)]
        for name, (a, b) in {"bf16": [z.bfloat16().float() for z in passes], "fp32": passes}.items():
            d = _logprobs(a, labels) - _logprobs(b, labels)
            found.setdefault(name, []).append(d.double())
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def _in_pass(h: torch.Tensor, noise: float, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Logits of h in bfloat16 after noise, uniform within ``noise`` units of its last place; and each with an error of
    float32's order of sums, a few units in its last place."""
    unit = torch.exp2(h.abs().clamp_min(1e-30).log2().floor() - 7)
    noisy = (h + noise * unit * (2 * torch.rand(h.shape, generator=generator) - 1)).bfloat16().float()
    z = noisy @ weight.t()
    return z * (1 + 2.0**-22 * torch.rand(z.shape, generator=generator))


def _logprobs(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(z, dim=1).gather(1, labels)[:, 0]


if __name__ == "__main__":
    main()
