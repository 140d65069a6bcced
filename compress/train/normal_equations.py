"""Least squares with a ridge penalty from sums over tokens, so that no token's features are kept."""

from __future__ import annotations

import torch


class NormalEquations:
    """Sums of one layer, in float64: F features that all head groups share, f of each, and one number to fit a group.

    Args:
        groups, shared, own: G, F and f.
        device: where the sums are held.
    """

    def __init__(self, groups: int, shared: int, own: int, device: torch.device | str = "cpu") -> None:
        sizes = {
            "count": (),
            "shared": (shared,),
            "own": (groups, own),
            "target": (groups,),
            "shared_shared": (shared, shared),
            "shared_own": (groups, shared, own),
            "own_own": (groups, own, own),
            "shared_target": (groups, shared),
            "own_target": (groups, own),
        }
        self.sums = {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()}

    def add(self, shared: torch.Tensor, own: torch.Tensor, target: torch.Tensor) -> None:
        """Take n tokens.

        Args:
            shared: `[n, F]`; own: `[G, n, f]`; target: `[G, n]`.
        """
        shared, own, target = shared.double(), own.double(), target.double()
        sums = self.sums
        sums["count"] += len(shared)
        sums["shared"] += shared.sum(0)
        sums["own"] += own.sum(1)
        sums["target"] += target.sum(1)
        sums["shared_shared"] += shared.T @ shared
        sums["shared_own"] += shared.T @ own
        sums["own_own"] += own.mT @ own
        sums["shared_target"] += target @ shared
        sums["own_target"] += (target[:, None] @ own).squeeze(1)

    def solve(self, penalty: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weights of the shared features `[G, F]`, of the own ones `[G, f]`, and the intercepts `[G]`, in float64.

        They minimise the mean squared error plus `penalty` times the squared weights, each weight measured in standard
        deviations of its feature; the intercept costs nothing. A feature that never changes gets the weight 0.
        """
        sums, count = self.sums, self.sums["count"]
        groups, size = sums["shared_target"].shape
        solved = []
        for group in range(groups):
            mixed = sums["shared_own"][group]
            gram = torch.cat(
                [torch.cat([sums["shared_shared"], mixed], 1), torch.cat([mixed.T, sums["own_own"][group]], 1)]
            )
            mean = torch.cat([sums["shared"], sums["own"][group]]) / count
            target = torch.cat([sums["shared_target"][group], sums["own_target"][group]])
            covariance = gram / count - mean.outer(mean)
            slope = target / count - mean * (sums["target"][group] / count)
            variance = covariance.diagonal().clone()
            still = variance <= 1e-12 * (gram.diagonal() / count).clamp(min=torch.finfo(torch.float64).tiny)
            covariance[still], covariance[:, still], slope[still] = 0, 0, 0
            covariance.diagonal().add_(torch.where(still, 1.0, penalty * variance))
            weight = torch.linalg.solve(covariance, slope)
            solved.append(torch.cat([weight, (sums["target"][group] / count - weight @ mean)[None]]))
        found = torch.stack(solved)
        return found[:, :size], found[:, size:-1], found[:, -1]
