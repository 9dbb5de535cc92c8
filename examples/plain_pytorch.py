"""A hand-written MoE layer, balanced: three lines are moebalance's, the rest is the model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moebalance as mb

HIDDEN, EXPERTS, TOP_K, VOCABULARY = 32, 8, 2, 512


class MoE(nn.Module):
    def __init__(self, method: mb.Method) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.router = mb.BalancedRouter(method, EXPERTS, TOP_K)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * HIDDEN) / HIDDEN**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, HIDDEN) / HIDDEN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.router(self.gate(x))
        # Every expert on every token: simple, and fine for an example of this size.
        outputs = torch.einsum("bsh,ehf->bsef", x, self.up).relu()
        outputs = torch.einsum("bsef,efh->bseh", outputs, self.down)
        chosen = outputs.gather(2, experts.unsqueeze(-1).expand(-1, -1, -1, HIDDEN))
        return x + (chosen * weights.unsqueeze(-1)).sum(dim=2)


def train(method: mb.Method, steps: int = 200, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    words, head = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, VOCABULARY)
    # Hidden states of real models share a direction, so a few experts would take most tokens.
    words.weight.data += torch.randn(HIDDEN)
    model = nn.Sequential(words, MoE(method), MoE(method), head)
    balancing = mb.attach(model)
    balancing.watch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    frequency = 1.0 / torch.arange(1, VOCABULARY + 1)
    for _ in range(steps):
        ids = torch.multinomial(frequency, 512, replacement=True).view(4, 128)
        loss = F.cross_entropy(model(ids).flatten(0, 1), (ids * 7 % VOCABULARY).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        balancing.step()
    with torch.no_grad():  # judged on tokens that it was not trained on, far more than a step has
        model.eval()(torch.multinomial(frequency, 32768, replacement=True).view(256, 128))
    return {"loss": loss.item(), **balancing.evaluation()[0]}


if __name__ == "__main__":
    for method in (mb.NoBalancing(), mb.PhiBalancing(strength=0.04)):
        end = train(method)
        print(f"{type(method).__name__:13} MaxVio {end['maxvio']:.2f}  Gini {end['gini']:.2f}")
