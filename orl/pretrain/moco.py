"""MoCo v2 (He et al., 2020; Chen et al., 2020), as in the ORL release."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy, normalize

from orl import InputError
from orl.config import Stage1
from orl.networks.ema import Pair
from orl.training import ranks


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose training statistics are those of `group` consecutive samples, on however many GPUs they are.

    A batch smaller than `group` is one group. Running statistics follow the mean over the groups of their means and
    unbiased variances; in eval mode, and as to its state, this is nn.BatchNorm2d. Not to be made a SyncBatchNorm.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, features: int, group: int) -> None:
        super().__init__(features)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, H, W] -> the same shape, type and memory format."""
        if not self.training:
            return super().forward(x)
        if len(x) > self.group and len(x) % self.group:
            raise InputError(
                f"stage1: a process's batch of {len(x)} is no multiple of stage1.shuffled_batch, {self.group}; "
                f"change that or stage1.optimizer.batch."
            )
        groups = max(1, len(x) // self.group)
        # One call for all groups, put side by side as channels: `cat` keeps the memory format, reshape would not.
        mean, variance = self.running_mean.new_zeros(2, groups * self.num_features)
        weight, bias = self.weight.repeat(groups), self.bias.repeat(groups)
        side_by_side = torch.cat(x.chunk(groups), 1) if groups > 1 else x
        out = batch_norm(side_by_side, mean, variance, weight, bias, training=True, momentum=1.0, eps=self.eps)
        self.running_mean.lerp_(mean.view(groups, -1).mean(0), self.momentum)
        self.running_var.lerp_(variance.view(groups, -1).mean(0), self.momentum)
        self.num_batches_tracked.add_(1)
        return torch.cat(out.chunk(groups, 1)) if groups > 1 else out


def group_statistics(module: nn.Module, group: int) -> None:
    """Put a fresh GroupedBatchNorm2d in the place of each (fresh) nn.BatchNorm2d inside `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, GroupedBatchNorm2d(child.num_features, group))
        else:
            group_statistics(child, group)


class MoCo(Pair):
    """Stage 1 by contrast with a queue of earlier photos' keys, which the target encodes.

    A photo's key is normalised in the company of other photos than its query is: sharing it, the two could be told
    from their batch statistics. The paper shuffles keys among GPUs; here groups of `stage1.shuffled_batch` take the
    place of GPUs, so that the number of GPUs changes nothing. Row b of rank r is row r * B + b of the global batch.
    """

    # MoCo moves the target before it encodes the keys, starting with a move that changes nothing (target = online).
    # Moved after the optimizer step, the target is the same whenever it encodes.
    constant_momentum = True

    queue: Tensor
    pointer: Tensor

    def __init__(self, settings: Stage1, generator: torch.Generator) -> None:
        if settings.queue < settings.optimizer.batch:
            raise InputError(
                f"stage1.queue is {settings.queue}, which cannot hold the keys of one batch, stage1.optimizer.batch = "
                f"{settings.optimizer.batch}; make the queue longer."
            )
        super().__init__(settings.network, generator, "moco")
        group_statistics(self, settings.shuffled_batch)
        self.target.requires_grad_(False)
        self.temperature = settings.temperature
        noise = torch.randn(settings.queue, settings.network.projection, generator=generator)
        self.register_buffer("queue", normalize(noise, dim=1))  # float32 [K, P], unit rows
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # the oldest row

    def forward(self, query_view: Tensor, key_view: Tensor, order: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Views [B, 3, S, S] -> losses by name (their sum is minimised), and unit projections [2, B, P].

        `order` int64 [global batch]: the permutation in which all ranks' keys are encoded, the same on every rank.
        """
        queries = normalize(self.online(query_view).float(), dim=1)
        everyone = self.keys(key_view, order)
        keys = everyone.chunk(ranks.count())[ranks.rank()]
        loss = self.contrast(queries, keys)
        self.enqueue(everyone)
        if self.training:
            self.share_statistics()
        return {"contrast": loss}, torch.stack([queries, keys]).detach()

    @torch.no_grad()
    def keys(self, view: Tensor, order: Tensor) -> Tensor:
        """Unit keys [global batch, P] of all ranks' views, encoded in the order `order`, returned in their own."""
        shuffled = ranks.gather(view)[order.chunk(ranks.count())[ranks.rank()]]
        keys = ranks.gather(normalize(self.target(shuffled).float(), dim=1))
        return torch.empty_like(keys).index_copy_(0, order, keys)

    def contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        """-log(exp(q·k / t) / (exp(q·k / t) + sum over the queue of exp(q·n / t))), mean over q: [B, P] twice."""
        with torch.autocast(queries.device.type, enabled=False):
            positive = (queries * keys).sum(1, keepdim=True)
            negative = queries @ self.queue.clone().T  # a copy: backward needs it as it is now
            logits = torch.cat([positive, negative], 1) / self.temperature
            return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put keys [n, P] in the place of the oldest n."""
        rows = torch.arange(len(keys), device=keys.device)
        self.queue.index_copy_(0, (self.pointer + rows) % len(self.queue), keys)
        self.pointer.add_(len(keys)).remainder_(len(self.queue))

    @torch.no_grad()
    def share_statistics(self) -> None:
        """Average the running statistics over the ranks: they are then those of all groups, on every rank."""
        if ranks.count() > 1:
            norms = [part for part in self.modules() if isinstance(part, GroupedBatchNorm2d)]
            statistics = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
            total = torch.cat(statistics)
            dist.all_reduce(total)
            torch._foreach_copy_(statistics, (total / ranks.count()).split([len(value) for value in statistics]))
