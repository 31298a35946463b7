"""Keys and values of the tokens that were already read, for generation."""

from __future__ import annotations

import torch


class KVCache:
    """Preallocated keys and values of every layer, filled from the left.

    A batch of prompts of different lengths is padded on the left; ``starts`` says where each row begins, and
    what stands before is neither seen by attention nor counted in positions. A prompt may be fed in any
    chunks.

    Cost: 2 · layers · batch · kv_heads · max_length · head_size numbers.

    Attributes:
        keys: one [batch, kv_heads, max_length, head_size] a layer.
        values: likewise.
        length: columns filled, padding included.
        starts: [batch] int64, the column of each row's first token; None: no padding.
        positions: positions of the columns being fed: [s] or, with ``starts``, [batch, s]; int64.
        mask: which columns each fed one sees, True = seen: [s, length + s] or [batch, 1, s, length + s];
            None: all of them.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        starts: torch.Tensor | None = None,
    ) -> None:
        shape = (batch, kv_heads, max_length, head_size)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.device = device
        self.max_length = max_length
        self.length = 0
        self.starts = None if starts is None else starts.to(device)
        self.positions = torch.empty(0, dtype=torch.int64, device=device)
        self.mask: torch.Tensor | None = None

    def begin(self, count: int) -> None:
        """Prepare positions and mask for feeding ``count`` columns more."""
        total = self.length + count
        assert total <= self.max_length, f"{total} tokens in a cache for {self.max_length}"
        columns = torch.arange(total, device=self.device)
        fed = columns[self.length :]
        self.positions, self.mask = fed, None
        if self.starts is not None:
            self.positions = (fed - self.starts[:, None]).clamp(min=0)
            seen = columns <= fed[:, None]
            seen = seen & (columns >= self.starts[:, None, None])
            # A padding column sees itself: softmax over nothing would be NaN and spread by 0 · NaN.
            self.mask = (seen | (columns == fed[:, None]))[:, None]
        elif count > 1:
            self.mask = columns <= fed[:, None]

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[batch, kv_heads, s, head_size]`` of the fed columns; return all columns so far."""
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, count: int) -> None:
        """Count the fed columns, once every layer has stored them."""
        self.length += count
