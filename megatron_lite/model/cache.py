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
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def begin(self, count: int) -> None:
        """Prepare positions for feeding ``count`` columns more."""
        total = self.length + count
        assert total <= self.max_length, f"{total} tokens in a cache for {self.max_length}"
        self.positions = torch.arange(self.length, total, device=self.device)
        if self.starts is not None:
            self.positions = (self.positions - self.starts[:, None]).clamp(min=0)
        self._masks = {}

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, window: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Store ``[batch, kv_heads, s, head_size]`` of the fed columns; what they see of all columns so far.

        Keys, values, and which of them each fed column sees, True = seen: [s, t] or [batch, 1, s, t]; None:
        all of them. With a ``window`` only the columns come that one of the fed ones sees.
        """
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        first = 0 if window is None else max(0, self.length - window + 1)
        if window not in self._masks:
            self._masks[window] = self._mask(first, end, window)
        return self.keys[layer][:, :, first:end], self.values[layer][:, :, first:end], self._masks[window]

    def _mask(self, first: int, end: int, window: int | None) -> torch.Tensor | None:
        """Which of the columns ``first`` ... ``end - 1`` the fed ones see."""
        columns = torch.arange(first, end, device=self.device)
        fed = columns[self.length - first :]
        if self.starts is None and len(fed) == 1:
            return None
        seen = columns <= fed[:, None]
        if window is not None:
            seen = seen & (columns > fed[:, None] - window)
        if self.starts is None:
            return seen
        seen = seen & (columns >= self.starts[:, None, None])
        # A padding column sees itself: softmax over nothing would be NaN and spread by 0 · NaN.
        return (seen | (columns == fed[:, None]))[:, None]

    def advance(self, count: int) -> None:
        """Count the fed columns, once every layer has stored them."""
        self.length += count
