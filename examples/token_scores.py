"""Log-probability, greedy token and entropy at every position, without logits: what evaluation and RL code asks a model for."""

import torch

import lldfast as lld

torch.manual_seed(0)
hidden, weight = torch.randn(2, 16, 64), torch.randn(1000, 64) / 8  # [batch, time, d], [V, d]
labels = torch.randint(1000, (2, 16))
labels[1, 10:] = -100  # padding
result = lld.linear_logprob(hidden, weight, labels, return_argmax=True, return_entropy=True)
for row in range(2):
    scored = labels[row] != -100
    greedy = bool((result.argmax[row] == labels[row])[scored].all())
    entropy = result.entropy[row][scored].mean()
    print(f"text {row}: {result.logprob[row].sum():.3f} nats, greedy {greedy}, mean entropy {entropy:.3f}")
