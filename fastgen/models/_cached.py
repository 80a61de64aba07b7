"""Generation by a Transformer: the keys and values of the tokens so far are kept, and each token is fed once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgen.functional import gelu, scaled_dot_product_attention
from fastgen.models._sampling import IGNORED, STEPS_A_CALL, RowState, TokenRows
from fastgen.nn.lora import LoRALinear
from fastgen.reference.generate import Status

if TYPE_CHECKING:
    from fastgen.models.gpt import GPT, GPTConfig

__all__ = ["CachedRows", "GPTState", "KeyValueCache", "LayerPass"]


@dataclasses.dataclass
class GPTState(RowState):
    """Where n rows stand: what `GPT.generate(..., state=)` continues. The state of a Transformer is its tokens.

    Attributes:
        context: (n, T) int64, the tokens before the last one that attention still looks at, from the left; -100
            fills up shorter rows.
        pending: (n,) int64, the last token.
        position: (n,) int64, how many tokens come before it.
        seeds: (n,) int64, the bit patterns of the rows' seeds.
        seen: (n, vocab_size) bool, the tokens of the row so far.
    """

    context: Tensor


class LayerPass:
    """What the layers of one pass through the model share, and how they multiply and attend.

    Attributes:
        embedding: the embedding's weight (vocab_size, hidden_size) where it is the output's too and wants a
            gradient, else None.
        rotation: cosines and sines of rotary positions, or None.
        index: which layer is running.
    """

    embedding: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    index: int = 0

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return layer(x)

    def gelu(self, layer: nn.Linear, x: Tensor, approximate: str) -> Tensor:
        """GELU of what the layer makes of x."""
        return gelu(self.linear(layer, x), approximate=approximate)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (B, H, T, head_dim), key and value (B, Hkv, T, head_dim) -> like query."""
        raise NotImplementedError


class KeyValueCache:
    """Keys and values of all layers for a number of rows; row r begins at place 0, so no row shows in another.

    Attributes:
        keys, values: (num_layers, rows, Hkv, capacity, head_dim).
        lengths: how many tokens each row has in it.
    """

    def __init__(self, model: GPT, rows: int) -> None:
        config: GPTConfig = model.config
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, 0, config.head_dim)
        self.keys = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.values = self.keys.clone()
        self.lengths = [0] * rows
        self._limit = config.max_position_embeddings

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens, and some more, that not every token moves what is there."""
        capacity = self.keys.shape[3]
        if length <= capacity:
            return
        capacity = min(max(length + 64, 2 * capacity), self._limit)
        grown = []
        for before in (self.keys, self.values):
            # Not left as it is found: a NaN that no row may look at, times its weight of 0, would still be one.
            after = before.new_zeros(*before.shape[:3], capacity, before.shape[4])
            after[:, :, :, : before.shape[3]] = before
            grown.append(after)
        self.keys, self.values = grown

    def copy(self, source: int, row: int) -> None:
        """Let `row` have what row `source` has."""
        self.lengths[row] = self.lengths[source]
        for held in (self.keys, self.values):
            held[:, row, :, : self.lengths[row]] = held[:, source, :, : self.lengths[row]]

    def keep(self, rows: list[int]) -> None:
        """Only these rows stay, in this order."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = [self.lengths[row] for row in rows]


class _GenerationPass(LayerPass):
    """Products whose rows have the same bits however many there are, where the device has a kernel for that."""

    def __init__(self, model: GPT, cache: KeyValueCache) -> None:
        self._grouped = model.config.num_key_value_heads != model.config.num_attention_heads
        self._cache = cache

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        result = rows_times(x, layer.weight, layer.bias)
        if isinstance(layer, LoRALinear):
            result += layer.scale * rows_times(rows_times(x, layer.lora_A, None), layer.lora_B, None)
        return result


class _Prefill(_GenerationPass):
    """All tokens (1, T) of one row, which has none in the cache yet."""

    def __init__(self, model: GPT, cache: KeyValueCache, row: int, length: int) -> None:
        super().__init__(model, cache)
        self._row = row
        cache.reserve(length)
        cache.lengths[row] = length

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = key.shape[2]
        self._cache.keys[self.index, self._row, :, :length] = key[0]
        self._cache.values[self.index, self._row, :, :length] = value[0]
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self._grouped)


class _Step(_GenerationPass):
    """The next token (k, 1) of k rows."""

    def __init__(self, model: GPT, cache: KeyValueCache, rows: list[int]) -> None:
        super().__init__(model, cache)
        lengths = [cache.lengths[row] for row in rows]
        self._longest = max(lengths) + 1
        cache.reserve(self._longest)
        self._all = rows == list(range(len(cache.lengths)))
        device = cache.keys.device
        self._rows, self.positions = (torch.tensor(x, device=device) for x in (rows, lengths))
        # Rows of one length, which is usual, need no mask, and store what is new at one place.
        self._mask, self._equal = None, min(lengths) + 1 == self._longest
        if not self._equal:
            seen = torch.arange(self._longest, device=device) <= self.positions.unsqueeze(1)
            self._mask = seen.view(len(rows), 1, 1, self._longest)
        for row in rows:
            cache.lengths[row] += 1

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = self._appended(self._cache.keys, key), self._appended(self._cache.values, value)
        return scaled_dot_product_attention(query, key, value, self._mask, enable_gqa=self._grouped)

    def _appended(self, cache: Tensor, new: Tensor) -> Tensor:
        """Store new (k, Hkv, 1, head_dim); gives all that the rows have (k, Hkv, T, head_dim)."""
        layer = cache[self.index]
        if self._all and self._equal:
            held = layer[:, :, : self._longest]
            held[:, :, -1:] = new
            return held
        layer[self._rows, :, self.positions] = new.squeeze(2)
        return (layer if self._all else layer[self._rows])[:, :, : self._longest]


class CachedRows(TokenRows):
    """Rows of a GPT. Each is fed its whole prompt at once, then all take a token a turn."""

    state_class = GPTState

    def __init__(self, model: GPT, prompts: list[Tensor], *arguments: Any) -> None:
        context = model.config.max_position_embeddings
        longest = max(len(prompt) for prompt in prompts)
        if longest > context:
            raise ValueError(f"prompt: expected at most {context} tokens, the context of the model, got {longest}")
        super().__init__(model, prompts, *arguments)

    def _begin(self, n: int, state: GPTState | None) -> tuple[Tensor, Tensor]:
        model: GPT = self._model
        device = model.device
        self._cache = KeyValueCache(model, 0)
        self._running: list[int] = []
        self._context = model.config.max_position_embeddings
        # Tokens of each row in front of the buffer, and the place of the buffer's first.
        self._before = [torch.empty(0, dtype=torch.int64, device=device)] * n
        self._offsets = [0] * n
        self._starts = [0] * n
        if state is None:
            return torch.zeros(n, dtype=torch.int64, device=device), torch.zeros(
                n, model.vocab_size, dtype=torch.bool, device=device
            )
        if len(state) != n:
            raise ValueError(f"state: expected one of {n} rows, as the prompt has, got {len(state)}")
        if state.seen is None or state.seen.shape[1] != model.vocab_size:
            raise ValueError("state: expected that of a model with this configuration, got another's")
        self._before = [row[row != IGNORED].to(device) for row in state.context]
        self._offsets = state.position.tolist()
        return state.position.to(device), state.seen.to(device, copy=True)

    def _advance(self, running: list[int], one_by_one: bool) -> None:
        known = torch.maximum(self._position + 1, self._given).tolist()
        with self._model.inference(), torch.autocast(self._tokens.device.type, enabled=False):
            for _ in range(1 if one_by_one else STEPS_A_CALL):
                self._draw(running, known, self._logits(running, known))
                status = self._status.tolist()
                for row in running:
                    known[row] += 1
                running = [row for row in running if status[row] == Status.RUNNING]
                if not running:
                    return

    def _window(self, row: int, known: int) -> int:
        """The place from where the row is read to draw the token behind `known` of its buffer."""
        place = self._offsets[row] + known
        half = max(self._context // 2, 1)
        return max(0, -(-(place - self._context) // half) * half)

    def _text(self, row: int, first: int, known: int) -> Tensor:
        """The row's tokens from place `first` to what is known of its buffer."""
        text = torch.cat((self._before[row], self._tokens[row, :known]))
        return text[first - (self._offsets[row] - len(self._before[row])) :]

    def _logits(self, running: list[int], known: list[int]) -> Tensor:
        """(k, vocab_size) of the token behind the `known` ones of each running row."""
        model: GPT = self._model
        cache = self._cache
        if self._running != running:
            if self._running:
                cache.keep([self._running.index(row) for row in running])
            else:
                cache = self._cache = KeyValueCache(model, len(running))
            self._running = running
        hidden = torch.empty(len(running), model.config.hidden_size, dtype=model.dtype, device=model.device)
        steps = []
        for slot, row in enumerate(running):
            first = self._window(row, known[row])
            if cache.lengths[slot] and first == self._starts[row]:
                steps.append(slot)
                continue
            self._starts[row] = first
            text = self._text(row, first, known[row])
            positions = torch.arange(len(text), device=text.device)
            hidden[slot] = model.run_layers(text.unsqueeze(0), positions, _Prefill(model, cache, slot, len(text)))[
                0, -1
            ]
        if steps:
            rows = torch.tensor([running[slot] for slot in steps], device=hidden.device)
            last = torch.tensor([known[running[slot]] - 1 for slot in steps], device=hidden.device)
            step = _Step(model, cache, steps)
            tokens = self._tokens[rows, last].unsqueeze(1)
            hidden[steps] = model.run_layers(tokens, step.positions.unsqueeze(1), step).squeeze(1)
        logits = rows_times(hidden, model.output_weight, None)
        if model.tokenizer is not None and model.tokenizer.vocab_size < model.vocab_size:
            logits[:, model.tokenizer.vocab_size :] = -torch.inf  # what fills up the vocabulary stands for no text
        return logits

    def _draw(self, running: list[int], known: list[int], logits: Tensor) -> None:
        device = logits.device
        rows = torch.tensor(running, device=device)
        index = torch.tensor([known[row] for row in running], device=device)
        self._position[rows] = index
        if self._processor is not None:
            logits = self._processed(rows, logits)
        sampling = self._sampling
        drawn = torch.ops.fastgen.pick_tokens(
            logits,
            self._seen[rows] if self._penalised else None,
            torch.stack((self._seeds[rows, 0], self._seeds[rows, 1] + index), dim=-1),
            *dataclasses.astuple(sampling),
        )
        status = self._status[rows]
        status[index + 1 == self._end[rows]] = Status.FULL
        status[torch.isin(drawn, self.stop)] = Status.STOPPED
        status[drawn < 0] = Status.NOT_FINITE
        self._status[rows] = status
        drawn = drawn.clamp(min=0)
        self._tokens[rows, index] = drawn
        if self._penalised:
            self._seen[rows, drawn] = True

    def state(self) -> GPTState:
        common: dict[str, Any] = self._common_state()
        known: list[int] = (self._position + 1).tolist()
        context = [self._text(row, self._window(row, count), count)[:-1] for row, count in enumerate(known)]
        return GPTState(**common, context=nn.utils.rnn.pad_sequence(context, batch_first=True, padding_value=IGNORED))


def rows_times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times weight (N, K) transposed, plus bias (N,)."""
    if x.device.type != "cpu":
        return nn.functional.linear(x, weight, bias)
    return torch.ops.fastgen.linear_rows(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
