"""Another trainer's loss without logits: `F.cross_entropy(hidden @ W.T, y)` becomes one call, with the same gradients."""

import torch

import lldfast as lld

torch.manual_seed(0)
trunk, head = torch.nn.Linear(64, 64), torch.nn.Linear(64, 1000, bias=False)
optimizer = torch.optim.AdamW([*trunk.parameters(), *head.parameters()], lr=1e-3)
x, y = torch.randn(512, 64), torch.randint(1000, (512,))
for _ in range(20):
    hidden = torch.tanh(trunk(x))
    # before: loss = F.cross_entropy(hidden @ head.weight.T, y), which holds a [512, 1000] tensor twice
    loss = lld.linear_cross_entropy(hidden, head.weight, y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.4f}")
