"""
Flextron's surrogate model: what a router's outputs do to the loss, learned from pairs seen, so that the routers can
follow its gradient without one backward pass through the language model (flextron.py: surrogate_step).

    python flextron.py --teach surrogate --threshold 0.05

A router trusts it while its error, on pairs it has not learned from yet, is under the threshold; then it is thrown away.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from space import random_generator


class Surrogate:
    """S: the routers' soft choices, (rows, 2 n_layers * K) -> excess loss in nats, (rows,). A row is a token if the
    routers are dynamic, else a sequence. `error` is that of the mean over a batch not yet learned, averaged over steps."""
    KEEP, ROUNDS, BATCH = 4096, 8, 256  # pairs remembered; updates per step; pairs in each

    def __init__(self, width: int, seed: int):
        self.net = nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, 1))
        self.seed, self.error, generator = seed, None, random_generator("surrogate", seed)
        with torch.no_grad():
            for p in self.net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * p.size(-1) ** -0.5 if p.dim() == 2 else p * 0)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3)
        self.x, self.y = torch.zeros(0, width), torch.zeros(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)[:, 0]

    def observe(self, x: torch.Tensor, y: torch.Tensor, step: int) -> None:
        """Judges S by new pairs, then learns from them and from those remembered."""
        with torch.no_grad():
            error = (self(x).mean() - y.mean()).abs().item()
        self.error = error if self.error is None else 0.9 * self.error + 0.1 * error
        self.x, self.y = torch.cat((self.x, x))[-self.KEEP:], torch.cat((self.y, y))[-self.KEEP:]
        generator = random_generator(self.seed, step, "pairs", len(self.y))
        for _ in range(self.ROUNDS):
            rows = torch.randint(len(self.y), (self.BATCH,), generator=generator)
            self.optimizer.zero_grad()
            F.mse_loss(self(self.x[rows]), self.y[rows]).backward()
            self.optimizer.step()

    def state(self) -> dict:
        return dict(net=self.net.state_dict(), optimizer=self.optimizer.state_dict(), x=self.x, y=self.y, error=self.error)

    def load(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.x, self.y, self.error = state["x"], state["y"], state["error"]
